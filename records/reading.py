"""Read JSON, lines and table cells, with errors that name FILE:LINE."""
import codecs
import csv
import gzip
import json
import os
import re
import shlex
import zlib
from contextlib import contextmanager
from itertools import chain

from utils import InputError, first_line, shorten

# Matches every escape of a JSON text, from left to right. The group matches a lone surrogate, half
# of a character: no text file can hold it, and no tokenizer accepts it.
ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)")
CELL_LIMIT = 2 ** 24  # characters: an unclosed quote must not swallow a file of gigabytes
LARGEST = 3.4e38      # about float32's largest number; scores are computed in float32
BLANKS = re.compile(r"\s*")

# the first bytes of files in other formats, with the command that converts them to JSON lines
PARQUET = ('python -c "import json, sys, pyarrow.parquet as p; [print(json.dumps(r, default=str)) '
           'for r in p.read_table(sys.argv[1]).to_pylist()]" {path} > {stem}.jsonl')
ARROW = ('python -c "import json, sys, datasets as d; [print(json.dumps(r, default=str)) for r in '
         'd.Dataset.from_file(sys.argv[1])]" {path} > {stem}.jsonl')
UTF16 = "convert it to UTF-8: iconv -f UTF-16 -t UTF-8 {path} > {stem}.utf8{ending}"
OTHER_FORMATS = {
    b"PAR1": ("a parquet file", f"convert it to JSON lines (with the package pyarrow): {PARQUET}"),
    b"ARROW1": ("an Arrow file", f"convert it to JSON lines (with the package datasets): {ARROW}"),
    b"\xff\xff\xff\xff": ("an Arrow file",
                          f"convert it to JSON lines (with the package datasets): {ARROW}"),
    b"\xff\xfe": ("in UTF-16", UTF16),
    b"\xfe\xff": ("in UTF-16", UTF16),
    b"PK\x03\x04": ("a zip file or a spreadsheet", "unpack it, or save the table as "
                    "\"CSV UTF-8\""),
    b"BZh": ("compressed by bzip2", "unpack it: bunzip2 {path}"),
    b"\xfd7zXZ": ("compressed by xz", "unpack it: unxz {path}"),
    b"\x28\xb5\x2f\xfd": ("compressed by zstd", "unpack it: unzstd {path}"),
    b"\x1f\x8b": ("gzipped", "its name must end in .gz: mv {path} {path}.gz"),
}


def open_text(path):
    """Return a text file object; a file whose name ends in .gz is decompressed."""
    opener = gzip.open if str(path).endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig")  # -sig: skips a byte order mark


def read_json(path):
    """Return [(object, location)] of a JSON file, as iterate_json yields them."""
    return list(iterate_json(path))


def iterate_json(path):
    """Yield (object, location) of each record of a JSON file.

    The file is a list of objects, or one object per line; .json files may be either. Objects may
    also span several lines, and one object may hold all records as its values, as pyserini writes
    runs. Lines are read one at a time. A location is 'FILE:LINE' or 'FILE, record N'. Raises
    InputError for a missing, unreadable, empty or malformed file.
    """
    path = str(path)
    with open_json(path) as file:
        lines = enumerate(file, 1)
        line_number, line = next(((number, line) for number, line in lines if line.strip()),
                                 (1, ""))
        beginning = line.lstrip()[:1]
        is_lines = path.removesuffix(".gz").endswith(".jsonl") and beginning != "["
        if is_lines or beginning == "{":  # LLM-Embedder's .json files hold lines
            for number, text in chain([(line_number, line)], lines):
                if is_unfinished_object(text):
                    yield from iterate_objects(text + file.read(), path, number)
                    return
                item = parse_json(text.rstrip("\n"), path, number) if text.strip() else None
                if number == line_number and holds_records(item):
                    yield from iterate_records(item, path)
                elif text.strip():
                    yield item, f"{path}:{number}"
            return
        text = line + file.read()
    if not beginning:
        raise InputError(f"{path}: the file is empty; it must hold a list of records")
    objects = parse_json(text, path, line_number)
    if not isinstance(objects, list):
        raise InputError(f"{path}: holds one {type(objects).__name__}, not a list of records or "
                         "one record per line")
    for index, item in enumerate(objects):
        yield item, f"{path}, record {index}"


def is_unfinished_object(line):
    """Return True if a JSON object begins in this line and continues in the next one."""
    if not line.rstrip().endswith(("{", "[", ",", ":")):  # saves parsing every line twice
        return False
    try:
        json.loads(line)
        return False
    except json.JSONDecodeError as error:
        return line.endswith("\n") and error.pos >= len(line.rstrip())
    except (RecursionError, ValueError):
        return False


def is_not_one_record(line):
    """Return True if a line of bytes is an unfinished object, or an object that holds records."""
    try:
        text = line.decode()
        return is_unfinished_object(text) or holds_records(json.loads(text))
    except (ValueError, RecursionError):
        return False


def iterate_objects(text, path, first_line):
    """Yield (object, 'FILE:LINE') of consecutive JSON objects that span several lines.

    Raises InputError.
    """
    decoder = json.JSONDecoder()
    offset = 0
    while True:
        begin = BLANKS.match(text, offset).end()
        if begin == len(text):
            return
        line_number = first_line + text.count("\n", 0, begin)
        try:
            _, offset = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError):
            offset = len(text)  # parse_json raises the error
        item = parse_json(text[begin:offset], path, line_number)
        if holds_records(item):
            yield from iterate_records(item, path)
        else:
            yield item, f"{path}:{line_number}"


def holds_records(item):
    """Return True for an object that is not a record but holds records.

    Its names are the records' ids, as in pyserini's runs, or it has a list of records in `data`.
    """
    if not isinstance(item, dict) or not item:
        return False
    if isinstance(item.get("data"), list) and all(isinstance(row, dict) for row in item["data"]):
        return True
    return all(isinstance(row, dict) and not all(isinstance(value, (int, float))
                                                 for value in row.values())
               for row in item.values())


def holds_scores(item):
    """Return True for an object that holds qrels or a run: {query: {document: number}}."""
    return isinstance(item, dict) and bool(item) and all(
        isinstance(scores, dict) and scores and all(isinstance(score, (int, float))
                                                    for score in scores.values())
        for scores in item.values())


def iterate_records(item, path):
    """Yield (record, location) of an object that holds_records.

    If records are stored by their ids, the id becomes the record's `id`.
    """
    if isinstance(item.get("data"), list):
        for index, row in enumerate(item["data"]):
            yield row, f"{path}, record {index}"
        return
    for name, row in item.items():
        yield {"id": name} | row, f"{path}, record {shorten(name)}"


@contextmanager
def open_json(path):
    """Yield a text file object for a JSON file. Raises InputError if it cannot be read."""
    refuse_other_formats(path)
    try:
        with open_text(path) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise find_wrong_byte(path) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); check that it is a "
                         "complete .json or .jsonl file in UTF-8, or a gzipped one") from None


def find_wrong_byte(path):
    """Return the InputError that names the first line that is not UTF-8."""
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for line_number, line in enumerate(file, 1):
                decode_line(line, path, line_number)
    except InputError as error:
        return error
    except (OSError, EOFError, zlib.error):
        pass  # a truncated gzip file, whose last line is wrong
    return InputError(f"{path}: is not UTF-8; save the file in UTF-8")


def refuse_other_formats(path):
    """Raise InputError for a file in another format, with the command that converts it."""
    if not os.path.isfile(path):
        return
    try:
        with open(path, "rb") as file:
            beginning = file.read(8)
    except OSError:
        return  # the caller raises the error
    for start, (format_name, remedy) in OTHER_FORMATS.items():
        is_named = start == b"\x1f\x8b" and str(path).endswith(".gz")
        if beginning.startswith(start) and not is_named:
            stem, ending = os.path.splitext(str(path))
            if ending == ".jsonl" and "{stem}.jsonl" in remedy:
                stem = str(path)  # the command must not write to the file that it reads
            command = remedy.format(path=shlex.quote(str(path)), stem=shlex.quote(stem),
                                    ending=ending)
            raise InputError(f"{path}: is {format_name}, which is not read; {command}")


def read_settings(path, kind=dict):
    """Return the JSON object (or list, by `kind`) of a file, or an empty one without the file.

    Raises InputError if the content is not JSON or is of another kind.
    """
    if not os.path.exists(path):
        return kind()
    with open_json(path) as file:
        text = file.read()
    settings = parse_json(text, path, 1)
    if not isinstance(settings, kind):
        raise InputError(f"{path}: must hold a JSON {'list' if kind is list else 'object'}, got a "
                         f"{type(settings).__name__}; download the file again")
    return settings


def read_args(folder):
    """Return the content of a checkpoint's args.json, or {} without one. Raises InputError."""
    return read_settings(os.path.join(str(folder), "args.json"))


def parse_json(text, path, line_number):
    """Return the object of a JSON text that begins at this line.

    Raises InputError, which names file, line and column, if the text is malformed, nested too
    deeply, or holds a number or an escape that cannot be used.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = line_number + error.lineno - 1
        raise InputError(f"{path}:{line}: not valid JSON at column {error.colno} ({error.msg}); "
                         f"{choose_json_remedy(text, error)}") from None
    except RecursionError:
        raise InputError(f"{path}:{line_number}: the JSON that begins here is nested a thousand "
                         "levels deep; fix it") from None
    except ValueError:  # Python's limit: 4,300 digits
        raise InputError(f"{path}:{line_number}: the JSON that begins here holds an integer of "
                         "thousands of digits; fix it") from None
    if "\\ud" in text or "\\uD" in text:
        check_escapes(text, path, line_number)
    return value


def choose_json_remedy(text, error):
    """Return the remedy for a malformed JSON text, which is either truncated or wrong."""
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return "the file may be cut off there: download it again or correct the line"
    return ("correct the line: JSON needs double quotes around texts, and none around null, true "
            "and false")


def check_escapes(text, path, line_number):
    """Raise InputError if a JSON text escapes half of a character (a lone surrogate)."""
    for escape in ESCAPE.finditer(text):
        if escape[1]:
            line = line_number + text.count("\n", 0, escape.start())
            raise InputError(f"{path}:{line}: \\{escape[1]} is half of a character, a lone "
                             "surrogate; remove it, or write the whole character")


def decode_line(line, path, line_number, keep_end=False):
    """Return the text of a line of bytes, without the line end unless keep_end.

    Raises InputError if the line is not UTF-8.
    """
    try:
        text = line.decode()
        return text if keep_end else text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{line_number}: byte {error.start + 1} of the line is not UTF-8; "
                         "save the file in UTF-8 (a spreadsheet as \"CSV UTF-8\")") from None


def read_lines(path):
    """Yield the lines of a file as bytes, decompressed.

    Each item of a JSON list, and each JSON object that spans several lines, becomes one line.
    Raises InputError.
    """
    refuse_other_formats(path)
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            beginning = file.peek(4)[:4].removeprefix(codecs.BOM_UTF8)
            first = file.readline().removeprefix(codecs.BOM_UTF8) if beginning[:1] == b"{" else b""
            if beginning.startswith(b"[") or is_not_one_record(first):
                for item, _ in iterate_json(path):
                    yield json.dumps(item).encode() + b"\n"
                return
            if first:
                yield first
            for index, line in enumerate(file):
                yield line.removeprefix(codecs.BOM_UTF8) if index == 0 else line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); check the path, or "
                         "download the file again") from None


def to_number(value):
    """Return a number, or a text that spells one, as a float.

    Raises ValueError for anything else, and for a number that is not finite in float32.
    """
    try:
        number = float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"{type(value).__name__} is not a number") from None
    if isinstance(value, bool) or not abs(number) <= LARGEST:  # written so that nan fails, too
        raise ValueError(f"{number} is not a finite number")
    return number


# ---------------------------------------------------------------- tables


def choose_delimiter(first_line):
    """Return the delimiter of a table: a tab if its first line has one, else a comma or semicolon.

    The more frequent of comma and semicolon is chosen. Spreadsheet programs write semicolons in
    countries with a decimal comma.
    """
    commas, semicolons = first_line.count(","), first_line.count(";")
    if "\t" in first_line or not commas + semicolons:
        return "\t"
    return "," if commas >= semicolons else ";"


def read_cells(lines, delimiter, strict=False):
    """Return a csv.reader of lines of text."""
    csv.field_size_limit(CELL_LIMIT)
    # people write blanks after the commas: `1, "a title", a text`
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=strict)


def name_cells(cells, header, location):
    """Return {column: cell} of a row. Raises InputError for more or fewer cells than columns."""
    if len(cells) != len(header):
        raise InputError(f"{location}: {len(cells)} columns, but the header has {len(header)}; the "
                         "line may be cut off, or a cell that holds delimiters is not in quotes")
    return dict(zip(header, cells))


def check_quotes(cells, delimiter, location):
    """Raise InputError for a tab-separated cell that holds both tabs and line ends.

    Most likely its quote is not closed, and it has swallowed the rows that follow.
    """
    if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
        raise InputError(f"{location}: a quote opens a cell that contains the rows after it; put a "
                         "cell that holds quotes in quotes, and write its own quotes twice")
