"""Read documents from the lines of a file: JSON objects, or rows of a tab-separated table.

Other files (gzipped, a JSON list, a table with commas or semicolons, or with cells of several
lines) are converted once to FILE.lines, with one document per line, and read from there.
"""
import codecs
import csv
import io
import json
import os
import shlex
from itertools import chain
from typing import NamedTuple

from records.files import new_file
from records.json_values import parse_json
from records.names import DOCUMENT_ID_NAMES, TEXT_NAMES, TITLE_NAMES, find_name, fold
from records.reading import (
    check_quotes,
    choose_delimiter,
    decode_line,
    is_not_one_record,
    name_cells,
    read_cells,
    read_lines,
    refuse_other_formats,
)
from utils import InputError, progress_bar, shorten

READ_COLUMNS = ("title", "text", "contents", "content", "body")  # their values must be texts
COLLECTION = ("id", "text", "title")  # the columns of a table without a header
BEGINNING = 65536                     # bytes in which to look for a table's header


# Python that converts a pickle of documents to JSON lines. The documents are dictionaries or, as in
# LangChain and LocalRQA, objects with page_content and metadata.
UNPICKLE = ("import json, pickle, sys; [print(json.dumps(d if isinstance(d, dict) else "
            "{'title': d.metadata.get('title', ''), 'text': d.page_content})) for d in "
            "pickle.load(open(sys.argv[1], 'rb'))]")


class NotPlain(Exception):
    """Signal a table in which some row is not exactly one tab-separated line."""


# ---------------------------------------------------------------- one line

class Layout(NamedTuple):
    """Describe how the lines of a file hold the columns of documents."""
    header: list | None      # the names of a table's columns; None for JSON lines
    has_header: bool = True  # whether a table's first line is its header, not a document
    columns: tuple = ()      # the names of the first document's columns, including aliases
    aliases: tuple = ()      # (name, field) pairs: the field is also read under this name


def read_layout(path, content):
    """Return (Layout, whether each line is one document) of a file's bytes.

    Raises InputError for an empty file.
    """
    if not content:
        raise InputError(f"{path}: holds no documents")
    # table_rows writes a blank line for a header, so a file may begin with blank lines
    beginning = content[:BEGINNING]
    if beginning.lstrip()[:1] in (b"{", b""):
        return read_json_layout(content, path), True
    text = beginning.split(b"\n")[0].decode("utf-8", "replace").rstrip("\r")
    if lacks_header(text):
        columns = COLLECTION[:text.count("\t") + 1]
        return Layout(list(columns), has_header=False, columns=columns), True
    delimiter = choose_delimiter(text)
    header = name_columns(next(read_cells(io.StringIO(text, newline=""), delimiter), []))
    aliases = find_aliases(header)
    columns = (*header, *(name for name, _ in aliases))
    return Layout(header, columns=columns, aliases=aliases), delimiter == "\t" and "\r" not in text


def read_json_layout(content, path):
    """Return the Layout of JSON lines, with the columns of the first object."""
    lines = enumerate(iter(io.BytesIO(content[:BEGINNING]).readline, b""), 1)
    line_number, line = next(((number, line) for number, line in lines if line.strip()), (1, b""))
    if not line.endswith(b"\n") and len(content) > BEGINNING:  # the first document is longer
        start = content[:BEGINNING].index(line)
        end = content.find(b"\n", start)
        line = content[start:end if end >= 0 else len(content)]
    row = parse_row(line, Layout(None), path, line_number) if line.strip() else {}
    aliases = find_aliases(row)
    columns = (*row, *(name for name, _ in aliases))
    return Layout(None, columns=columns, aliases=aliases)


def lacks_header(first_line):
    """Return True if a table has no header, as MS MARCO's collection.tsv.

    Its first line then has a number as id, a text and perhaps a title, and no known column name.
    """
    cells = first_line.split("\t")
    known = (*DOCUMENT_ID_NAMES, *TEXT_NAMES, *TITLE_NAMES)
    is_known = find_name([cell.strip() for cell in cells], known)
    return 2 <= len(cells) <= len(COLLECTION) and cells[0].strip().isdecimal() and not is_known


def find_aliases(fields):
    """Return ((name, field), ...) for fields that hold a title or a text under another spelling."""
    aliases = []
    title = None if "title" in fields else find_name(fields, TITLE_NAMES)
    if title is not None:
        aliases.append(("title", title))
    for name in READ_COLUMNS:
        field = None if name in fields else find_name(fields, [name])
        if field is not None and (name, field) not in aliases:
            aliases.append((name, field))
    return tuple(aliases)


def parse_row(line, layout, path, line_number):
    """Return the columns {name: value} of a line of bytes.

    Raises InputError, or NotPlain if a table's row is not exactly this line.
    """
    text = decode_line(line, path, line_number)
    if layout.header is None:
        row = parse_json(text, path, line_number)
        if not isinstance(row, dict):
            raise InputError(f"{path}:{line_number}: a document must be a JSON object, got a "
                             f"{type(row).__name__}")
    elif layout.has_header:
        row = name_cells(split_row(text), layout.header, f"{path}:{line_number}")
    else:
        row = name_cells(text.split("\t"), layout.header, f"{path}:{line_number}")
    for name, field in layout.aliases:
        row[name] = row.get(field)
    if layout.header is None:
        for name in READ_COLUMNS:
            if not isinstance(row.get(name, ""), (str, type(None))):
                raise InputError(f"{path}:{line_number}: '{name}' must be a text, got "
                                 f"{shorten(row[name])}")
    return row


def split_row(text):
    """Return the cells of a tab-separated line. Raises NotPlain if a cell continues after it.

    Quotes are removed if all cells follow csv's rules. Otherwise they are part of the text, as in
    `"Hello" she said`.
    """
    try:
        return next(read_cells([text], "\t", strict=True), [])
    except csv.Error:
        pass
    lines = iter((text, ""))
    try:
        next(read_cells(lines, "\t"), [])
    except csv.Error:  # a bare carriage return ends the row inside the line
        raise NotPlain from None
    if next(lines, None) is None:  # the reader took the second line to find the end of a quote
        raise NotPlain
    return text.split("\t")


def name_columns(header):
    """Return a header's cells, with names of texts and titles spelled as in records/names.py."""
    known = {fold(name): name for name in (*TEXT_NAMES, "title")}
    names = []
    for cell in header:
        is_id = find_name([cell.strip()], DOCUMENT_ID_NAMES) is not None
        names.append(cell.strip() if is_id else known.get(fold(cell), cell))
    return names


# ---------------------------------------------------------------- plain lines

def plain_lines(path):
    """Return the path of a file with one document per line: `path` itself, or PATH.lines.

    PATH.lines is used if it exists and is up to date. It is written for a file that is gzipped, is
    a JSON list or begins with a byte order mark.
    """
    try:
        with open(path, "rb") as file:
            beginning = file.peek(3)
            is_object = beginning.startswith(b"{") and is_not_one_record(file.readline())
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; make a corpus of its files with "
                         "scripts/make_corpus.py") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    refuse_pickle(path, beginning)
    refuse_other_formats(path)
    unpacked = f"{path}.lines"
    if os.path.exists(unpacked):
        has_its_date = os.stat(unpacked).st_mtime_ns == os.stat(path).st_mtime_ns
        if has_its_date and is_later(unpacked, path):
            return unpacked
    is_list = is_object or beginning.startswith((b"[", codecs.BOM_UTF8))
    if str(path).endswith(".gz") or is_list:
        return write_plain_lines(path, read_lines(path))
    return path


def is_later(made, path):
    """Return True if a file was written after the last change of the file that it was made from.

    The comparison uses ctime, the time of the last change. Dates (mtime) can be set by hand, and
    many archives give all their files one date. In a read-only folder the answer is always True.
    """
    is_fixed = not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK)
    return is_fixed or os.stat(made).st_ctime_ns >= os.stat(path).st_ctime_ns


def refuse_pickle(path, beginning):
    """Raise InputError for a pickle, which may run any code, with the command that converts it."""
    is_binary = beginning[:1] == b"\x80" and beginning[1:2] in (b"\2", b"\3", b"\4", b"\5")
    if is_binary or str(path).endswith((".pkl", ".pickle")):
        target = os.path.splitext(path)[0] + ".jsonl"
        raise InputError(f"{path}: a pickle, which may run any code when it is opened; if you "
                         f'trust it, convert it: python -c "{UNPICKLE}" {shlex.quote(str(path))} > '
                         f"{shlex.quote(target)}")


def write_plain_lines(path, lines):
    """Write a file's lines (bytes) to PATH.lines and return that path.

    PATH.lines gets the date of the file, which plain_lines compares. Raises InputError.
    """
    if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        raise InputError(f"{path}: needs {os.path.basename(path)}.lines next to it, but its folder "
                         "cannot be written; copy the file to another folder and use the copy")
    unpacked = f"{path}.lines"
    changed = os.stat(path).st_mtime_ns
    bar = progress_bar(lines, unit=" lines", desc=f"unpacking {os.path.basename(path)}")
    with new_file(unpacked, "wb") as file:
        file.writelines(bar)
        file.flush()
        os.utime(file.name, ns=(changed, changed))
    return unpacked


def table_rows(path):
    """Yield the rows of a table, with any delimiter and line ends, as JSON lines (bytes).

    The header, and each further line of a row, become blank lines, so that documents keep their
    line numbers. Raises InputError for cells that do not follow csv's rules.
    """
    lines = split_text_lines(path)
    first_line = next(lines)
    delimiter = choose_delimiter(first_line)
    reader = read_cells(chain([first_line], lines), delimiter, strict=True)
    header = None
    first = 1  # the line in which the row begins
    try:
        for cells in reader:
            row = b""
            if header is None:
                header = name_columns(cells)
            elif any(cells):
                check_quotes(cells, delimiter, f"{path}:{first}")
                row = json.dumps(name_cells(cells, header, f"{path}:{first}")).encode()
            end = reader.line_num + 1
            yield row + b"\n" * (end - first)
            first = end
    except csv.Error as error:
        raise InputError(f"{path}:{first}: does not follow csv's rules for quotes ({error}); put a "
                         "cell that holds quotes in quotes, and write its own quotes "
                         "twice") from None


def split_text_lines(path):
    """Yield the lines of a file as text; a bare carriage return (old Macs) also ends a line.

    Raises InputError.
    """
    for line_number, line in enumerate(read_lines(path), 1):
        text = decode_line(line, path, line_number, keep_end=True)
        yield from io.StringIO(text, newline="")
