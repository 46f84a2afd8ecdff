"""Read questions from tables, with or without a header."""
import csv

from records.fields import NUMPY_ARRAY, parse_answers
from records.names import (
    ANSWER_NAMES,
    DOCUMENT_ID_NAMES,
    QUESTION_ID_NAMES,
    QUESTION_NAMES,
    find_name,
    find_value,
)
from records.reading import (
    check_quotes,
    choose_delimiter,
    decode_line,
    name_cells,
    read_cells,
    read_lines,
)
from utils import InputError, shorten


def read_table(path):
    """Return [(record, 'FILE:LINE')] of a table; its first line with text may be a header.

    Raises InputError.
    """
    lines = read_table_lines(path)
    first_line = next((index for index, line in enumerate(lines) if line.strip()), None)
    if first_line is None:
        return []
    location = f"{path}:{first_line + 1}"
    names, separator = split_header(lines[first_line], location)
    if names:
        return read_named_columns(path, lines, names, separator)
    rows = []
    for line_number, line in enumerate(lines, 1):
        if line.strip():
            location = f"{path}:{line_number}"
            rows.append((parse_two_columns(line, path, location), location))
    return rows


def read_table_lines(path):
    """Return the lines of a table, without line ends.

    Raises InputError for a line that is not in UTF-8, or that contains a carriage return: only some
    programs end a line there.
    """
    lines = []
    for line_number, line in enumerate(read_lines(path), 1):
        text = decode_line(line, path, line_number)
        if "\r" in text:
            raise InputError(f"{path}:{line_number}: a carriage return inside the line; convert "
                             "line ends to line feeds: tr '\\r' '\\n'")
        lines.append(text)
    return lines


def split_line(line, separator, location):
    """Return the cells of a line; quotes need not follow csv's rules. Raises InputError."""
    try:
        return next(read_cells([line], separator), [])
    except csv.Error as error:
        raise InputError(f"{location}: cannot be split into cells ({error})") from None


def split_header(line, location):
    """Return (column names or None, separator) of a table's first line.

    The line is a header if it names a question column and, unless that is the only column, an id or
    an answer column. Raises InputError for a header without a question, or with a repeated name.
    """
    separator = choose_delimiter(line)
    names = [cell.strip().lower() for cell in split_line(line, separator, location)]
    if len(names) > 1 and names[0].isdecimal():
        return None, separator  # the first cell is an id: a number is not a column's name
    has_question = find_name(names, QUESTION_NAMES) is not None
    others = (*QUESTION_ID_NAMES, *DOCUMENT_ID_NAMES, *ANSWER_NAMES)
    has_others = find_name(names, others) is not None
    if has_others and not has_question:
        raise InputError(f"{location}: the header has no column 'question' (or 'query', 'text'); "
                         "rename the column with the questions")
    if not has_question or len(names) > 1 and not has_others:
        return None, separator
    repeated = next((name for name in names if name and names.count(name) > 1), None)
    if repeated:
        raise InputError(f"{location}: the header has {repeated!r} twice; rename one of them")
    return names, separator


def read_named_columns(path, lines, names, separator):
    """Return [(record, 'FILE:LINE')] of a table with a header; quoted cells may hold line ends.

    Raises InputError.
    """
    reader = read_cells((line + "\n" for line in lines), separator, strict=True)
    rows = []
    while True:
        location = f"{path}:{reader.line_num + 1}"
        try:
            cells = next(reader, None)
        except csv.Error:
            raise InputError(f"{location}: a cell begins with a quote that is not closed by csv's "
                             'rules; double the quotes inside it, as in "a ""b"" c"') from None
        if cells is None:
            return rows[1:]  # the first row is the header
        if not any(cell.strip() for cell in cells):
            continue
        row = name_cells(cells, names, location)
        check_quotes(cells, separator, location)
        rows.append((make_record(row, location), location))


def make_record(row, location):
    """Return the record of a row {column: cell}, without empty cells.

    The id and the answers are stored as `id` and `answers` (a list). Raises InputError.
    """
    record = {name: cell.strip() for name, cell in row.items() if name and cell.strip()}
    identifier = find_value(record, QUESTION_ID_NAMES)
    if identifier is not None:
        record["id"] = identifier
    answers = find_value(record, ANSWER_NAMES)
    record.pop("answer", None)
    if answers is not None:
        is_list = answers.startswith("[") or NUMPY_ARRAY.fullmatch(answers)
        record["answers"] = parse_answers(answers, location) if is_list else [answers]
    return record


def parse_two_columns(line, path, location):
    """Return the record of a line in a table without a header.

    If the second column is a list, the columns are question and answers, quoted as in a csv (DPR's
    files). Any other line is an id and a text: everything after the first tab, unchanged. A second
    column in brackets is also a text if the first is a number, or if the first is a single word and
    the brackets hold no list. Raises InputError.
    """
    if "\t" not in line:
        raise InputError(f"{location}: neither a header, such as question,answer, nor question and "
                         f"answers separated by a tab: {shorten(line)}")
    cells = split_line(line, "\t", location)
    identifier, _, question = line.partition("\t")
    if len(cells) == 2 and holds_answers(cells[1], path) and not identifier.strip().isdecimal():
        try:
            return {"question": cells[0], "answers": parse_answers(cells[1], location)}
        except InputError:
            if len(identifier.split()) != 1 or cells[1].startswith(("['", '["')):
                raise
    if len(identifier.split()) != 1:
        raise InputError(f"{location}: the first of two columns must be an id, got "
                         f"{shorten(identifier)}; if it is a question, add the header line "
                         "question<TAB>answer")
    return {"id": identifier, "question": question}


def holds_answers(cell, path):
    """Return True if a second column is meant as a list of answers, not as a text."""
    # in DPR's .csv files a list may be cut off
    is_csv = str(path).removesuffix(".gz").endswith(".csv")
    return cell.startswith("[") and (cell.endswith("]") or is_csv)
