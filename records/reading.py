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

# every escape of a JSON text, from left to right; the group is a half of a character that stands
# alone: no text file can hold it, and no tokenizer reads it
ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)")
CELL_LIMIT = 2 ** 24  # characters: a quote that nothing closes must not take in a file of gigabytes
LARGEST = 3.4e38  # of the numbers that float32 holds, in which scores are computed
# how files of other forms begin, and what makes JSON lines of them
PARQUET = ('python -c "import json, sys, pyarrow.parquet as p; [print(json.dumps(r, default=str)) '
           'for r in p.read_table(sys.argv[1]).to_pylist()]" {path} > {stem}.jsonl')


ARROW = ('python -c "import json, sys, datasets as d; [print(json.dumps(r, default=str)) for r in '
         'd.Dataset.from_file(sys.argv[1])]" {path} > {stem}.jsonl')


UTF16 = "write it in UTF-8: iconv -f UTF-16 -t UTF-8 {path} > {stem}.utf8{ending}"
OTHER_FORMS = {
    b"PAR1": ("a parquet file", f"make JSON lines of it (with the package pyarrow): {PARQUET}"),
    b"ARROW1": ("an Arrow file", f"make JSON lines of it (with the package datasets): {ARROW}"),
    b"\xff\xff\xff\xff": ("an Arrow file",
                           f"make JSON lines of it (with the package datasets): {ARROW}"),
    b"\xff\xfe": ("in UTF-16", UTF16),
    b"\xfe\xff": ("in UTF-16", UTF16),
    b"PK\x03\x04": ("a zip file or a spreadsheet's own form", "unpack it, or save the table as "
                    "\"CSV UTF-8\""),
    b"BZh": ("packed by bzip2", "unpack it: bunzip2 {path}"),
    b"\xfd7zXZ": ("packed by xz", "unpack it: unxz {path}"),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", "unpack it: unzstd {path}"),
    b"\x1f\x8b": ("gzipped", "its name must end in .gz: mv {path} {path}.gz"),
}
BLANKS = re.compile(r"\s*")


def open_text(path):
    """A text file object, gunzipped where the name ends in .gz."""
    opener = gzip.open if str(path).endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig")  # -sig: some files begin with a byte order mark


def read_json(path):
    """[(object, location)] of the file that iterate_json reads."""
    return list(iterate_json(path))


def iterate_json(path):
    """Yield (object, location) of a list of objects, or of one object per line; either may be
    .json. Lines are read one at a time.

    Objects that take several lines, one after another, are read, too, and so is one object whose
    values are the records, as pyserini writes runs. A location is 'FILE:LINE' or 'FILE, record N'.
    Raises InputError for a missing, unreadable, empty or malformed file.
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
                if is_unfinished(text):
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


def is_unfinished(line):
    """Return True for the first line of a JSON object that goes on in the next line."""
    if not line.rstrip().endswith(("{", "[", ",", ":")):  # saves parsing every line twice
        return False
    try:
        json.loads(line)
        return False
    except json.JSONDecodeError as error:
        return line.endswith("\n") and error.pos >= len(line.rstrip())
    except (RecursionError, ValueError):
        return False


def goes_on(line):
    """Return True for a line of bytes that is_unfinished, or an object that holds_records."""
    try:
        text = line.decode()
        return is_unfinished(text) or holds_records(json.loads(text))
    except (ValueError, RecursionError):
        return False


def iterate_objects(text, path, first_line):
    """Yield (object, 'FILE:LINE') of JSON objects that take several lines, one after another.

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
            offset = len(text)  # parse_json words the error
        item = parse_json(text[begin:offset], path, line_number)
        if holds_records(item):
            yield from iterate_records(item, path)
        else:
            yield item, f"{path}:{line_number}"


def holds_records(item):
    """Return True for an object that is no record but holds them: by their ids, as pyserini writes
    runs, or as a list under `data`.
    """
    if not isinstance(item, dict) or not item:
        return False
    if isinstance(item.get("data"), list) and all(isinstance(row, dict) for row in item["data"]):
        return True
    return all(isinstance(row, dict) and not all(isinstance(value, (int, float))
                                                 for value in row.values())
               for row in item.values())


def holds_scores(item):
    """Return True for an object of qrels or of a run: {query: {document: number}}."""
    return isinstance(item, dict) and bool(item) and all(
        isinstance(scores, dict) and scores and all(isinstance(score, (int, float))
                                                    for score in scores.values())
        for scores in item.values())


def iterate_records(item, path):
    """Yield (record, location) of an object that holds_records; an id that is the record's name
    becomes its `id`.
    """
    if isinstance(item.get("data"), list):
        for index, row in enumerate(item["data"]):
            yield row, f"{path}, record {index}"
        return
    for name, row in item.items():
        yield {"id": name} | row, f"{path}, record {shorten(name)}"


@contextmanager
def open_json(path):
    """Yield a text file to read, gunzipped. Raises InputError for one that cannot be read."""
    refuse_other_forms(path)
    try:
        with open_text(path) as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise find_wrong_byte(path) from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); is it a whole .json or "
                         ".jsonl file in UTF-8, or one gzipped?") from None


def find_wrong_byte(path):
    """Return the InputError that names the first line that is not UTF-8."""
    with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
        for line_number, line in enumerate(file, 1):
            try:
                decode_line(line, path, line_number)
            except InputError as error:
                return error
    return InputError(f"{path}: is not UTF-8; save the file in UTF-8")


def refuse_other_forms(path):
    """Raise InputError, which says how to convert it, for a file of a form that is not read."""
    if not os.path.isfile(path):
        return
    try:
        with open(path, "rb") as file:
            beginning = file.read(8)
    except OSError:
        return  # the caller words the error
    for start, (form, remedy) in OTHER_FORMS.items():
        is_named = start == b"\x1f\x8b" and str(path).endswith(".gz")
        if beginning.startswith(start) and not is_named:
            stem, ending = os.path.splitext(str(path))
            if ending == ".jsonl" and "{stem}.jsonl" in remedy:
                stem = str(path)  # a command that writes the file that it reads would empty it
            command = remedy.format(path=shlex.quote(str(path)), stem=shlex.quote(stem),
                                    ending=ending)
            raise InputError(f"{path}: is {form}, which is not read; {command}")


def read_settings(path, kind=dict):
    """The JSON object (or list, by `kind`) of a file; an empty one where there is no such file.

    Raises InputError if it is no JSON, or of another kind.
    """
    if not os.path.exists(path):
        return kind()
    with open_json(path) as file:
        text = file.read()
    settings = parse_json(text, path, 1)
    if not isinstance(settings, kind):
        raise InputError(f"{path}: must hold a JSON {'list' if kind is list else 'object'}, it "
                         f"holds a {type(settings).__name__}; fetch the file again")
    return settings


def parse_json(text, path, line_number):
    """Return the object that `text`, which begins at this line, spells.

    Raises InputError with file, line and column where it spells none, or one that cannot be used.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        line = line_number + error.lineno - 1
        raise InputError(f"{path}:{line}: not valid JSON at column {error.colno} ({error.msg}); "
                         f"{cut_off_or_wrong(text, error)}") from None
    except RecursionError:
        raise InputError(f"{path}:{line_number}: the JSON from here on is nested a thousand deep; "
                         "mend it") from None
    except ValueError:  # Python's limit: 4,300 digits
        raise InputError(f"{path}:{line_number}: the JSON from here on holds an integer of "
                         "thousands of digits; mend it") from None
    if "\\ud" in text or "\\uD" in text:
        check_escapes(text, path, line_number)
    return value


def cut_off_or_wrong(text, error):
    """Return the remedy for a text that is no JSON: it ends too early, or is wrong where it is."""
    if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
        return "the file may be cut off there: fetch it again or correct the line"
    return "correct the line: in JSON texts are in double quotes, and null, true and false are bare"


def check_escapes(text, path, line_number):
    """Raises InputError if a JSON text escapes half of a character (a lone surrogate)."""
    for escape in ESCAPE.finditer(text):
        if escape[1]:
            line = line_number + text.count("\n", 0, escape.start())
            raise InputError(f"{path}:{line}: \\{escape[1]} is half of a character, a lone "
                             "surrogate; take it out, or write the whole character")


def decode_line(line, path, line_number, keep_end=False):
    """The text of a line of bytes, without its end unless that is kept.

    Raises InputError if it is not UTF-8.
    """
    try:
        text = line.decode()
        return text if keep_end else text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}:{line_number}: byte {error.start + 1} of the line is not UTF-8; "
                         "save the file in UTF-8 (a spreadsheet as \"CSV UTF-8\")") from None


def read_lines(path):
    """Yield the lines of a file as bytes, gunzipped; a JSON list, or JSON objects of several lines,
    yield one line per item.

    Raises InputError.
    """
    refuse_other_forms(path)
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            beginning = file.peek(4)[:4].removeprefix(codecs.BOM_UTF8)
            first = file.readline().removeprefix(codecs.BOM_UTF8) if beginning[:1] == b"{" else b""
            if beginning.startswith(b"[") or goes_on(first):
                for item, _ in iterate_json(path):
                    yield json.dumps(item).encode() + b"\n"
                return
            if first:
                yield first
            for index, line in enumerate(file):
                yield line.removeprefix(codecs.BOM_UTF8) if index == 0 else line
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); check the path, or fetch "
                         "the file again") from None


def to_number(value):
    """The float that a number, or a text, spells.

    Raises ValueError for anything else, and for what is not finite in float32.
    """
    try:
        number = float(value)
    except (TypeError, OverflowError):
        raise ValueError(f"{type(value).__name__} is no number") from None
    if isinstance(value, bool) or not abs(number) <= LARGEST:  # nan is not
        raise ValueError(f"{number} is no finite number")
    return number


def choose_delimiter(first_line):
    """A tab or, in a first line without tabs, a comma or semicolon, whichever it has more of.

    Spreadsheet programs write semicolons where the comma is the decimal point.
    """
    commas, semicolons = first_line.count(","), first_line.count(";")
    if "\t" in first_line or not commas + semicolons:
        return "\t"
    return "," if commas >= semicolons else ";"


def read_cells(lines, delimiter, strict=False):
    """A csv.reader of texts that end where lines do."""
    csv.field_size_limit(CELL_LIMIT)
    # people write `1, "a title", a text` with blanks behind the commas
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=strict)


def name_cells(cells, header, location):
    """{column: cell} of a row. Raises InputError for more or fewer cells than columns."""
    if len(cells) != len(header):
        raise InputError(f"{location}: {len(cells)} columns, the header names {len(header)}; the "
                         "line may be cut off, or a cell that holds delimiters is not in quotes")
    return dict(zip(header, cells))


def check_quotes(cells, delimiter, location):
    """Raises InputError for a tab-separated cell that holds tabs and line ends: it is, by all odds,
    a quote that nothing closes with the rows behind it.
    """
    if delimiter == "\t" and any("\t" in cell and "\n" in cell for cell in cells):
        raise InputError(f"{location}: a quote opens a cell that takes in the rows behind it; a "
                         "cell that holds quotes is put in quotes, and they are written twice")


def read_args(folder):
    """The content of a checkpoint's args.json, or {} where it has none. Raises InputError."""
    return read_settings(os.path.join(str(folder), "args.json"))
