"""Read JSON, lines and table cells, with errors that name FILE:LINE."""
import codecs
import csv
import gzip
import json
import os
import shlex
import zlib
from contextlib import contextmanager

from records.json_values import JsonStream, parse_json
from utils import InputError, first_line, shorten

CELL_LIMIT = 2 ** 24  # characters: an unclosed quote must not swallow a file of gigabytes
LARGEST = 3.4e38      # about float32's largest number; scores are computed in float32

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
    """Yield (object, location) of each record of a JSON file (scan_json). Raises InputError."""
    for item, location, _ in scan_json(path):
        yield item, location


def scan_json(path):
    """Yield (object, location, (first byte, byte after it)) of each record of a JSON file.

    The file is a list of objects, or one object per line; .json files may be either. Objects may
    also span several lines. The file is read piece by piece. One object may also hold all records
    as its values, as pyserini writes runs; the bytes of these are given as None. A location is
    'FILE:LINE' or 'FILE, record N'. Raises InputError for a missing, unreadable, empty or malformed
    file.
    """
    path = str(path)
    with open_json(path) as file:
        offset, line_number = skip_blanks(file)
        beginning = file.peek(1)[:1]
        is_lines = path.removesuffix(".gz").endswith(".jsonl") and beginning != b"["
        if is_lines or beginning == b"{":  # LLM-Embedder's .json files hold lines
            yield from scan_lines(file, path, offset, line_number)
            return
        if not beginning:
            raise InputError(f"{path}: the file is empty; it must hold a list of records")
        stream = JsonStream(path, file, offset, line_number)
        if beginning != b"[":
            value, *_ = stream.value()
            raise InputError(f"{path}: holds one {type(value).__name__}, not a list of records or "
                             "one record per line")
        for index, (item, start, end, _) in enumerate(stream.items()):
            yield item, f"{path}, record {index}", (start, end)


def skip_blanks(file):
    """Move an open binary file on to its first character that is not a blank, past a byte order
    mark. Returns (number of bytes passed, line number).
    """
    offset, line_number = 0, 1
    if file.peek(3).startswith(codecs.BOM_UTF8):
        offset = len(file.read(3))
    while file.peek(1)[:1].isspace():
        line_number += file.read(1) == b"\n"
        offset += 1
    return offset, line_number


def scan_lines(file, path, offset, line_number):
    """Yield what scan_json does for a file of objects, from its first object on, which begins at
    this byte and line. Raises InputError.
    """
    first_line = line_number
    for content in file:
        # a bare carriage return (old Macs) also ends a line
        lines = content.splitlines(True) if b"\r" in content else [content]
        for index, line in enumerate(lines):
            text = line.decode()
            if is_unfinished_object(text):
                stream = JsonStream(path, file, offset, line_number, b"".join(lines[index:]))
                yield from scan_objects(stream, path)
                return
            item = parse_json(text.rstrip("\r\n"), path, line_number) if text.strip() else None
            if line_number == first_line and holds_records(item):
                for record, location in iterate_records(item, path):
                    yield record, location, None
            elif text.strip():
                yield item, f"{path}:{line_number}", (offset, offset + len(line))
            offset += len(line)
            line_number += 1


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


def scan_objects(stream, path):
    """Yield what scan_json does for consecutive JSON objects that span several lines.

    Raises InputError.
    """
    while stream.peek():
        item, start, end, line_number = stream.value()
        if holds_records(item):
            for record, location in iterate_records(item, path):
                yield record, location, None
        else:
            yield item, f"{path}:{line_number}", (start, end)


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
    """Yield a binary file object for a JSON file, decompressed. Raises InputError if the file
    cannot be read, and for bytes that the block cannot decode.
    """
    refuse_other_formats(path)
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
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
        text = file.read().removeprefix(codecs.BOM_UTF8).decode()
    settings = parse_json(text, path, 1)
    if not isinstance(settings, kind):
        raise InputError(f"{path}: must hold a JSON {'list' if kind is list else 'object'}, got a "
                         f"{type(settings).__name__}; download the file again")
    return settings


def read_args(folder):
    """Return the content of a checkpoint's args.json, or {} without one. Raises InputError."""
    return read_settings(os.path.join(str(folder), "args.json"))


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
