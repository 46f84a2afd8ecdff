"""The lines of a corpus's file, one document each: JSON objects, or rows of a tab-separated table.

A file of any other form (gzipped, a JSON list, a table with commas or semicolons, or with cells of
several lines) is written out once, as FILE.lines, and read from there.
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
from records.names import DOCUMENT_ID_NAMES, TEXT_NAMES, TITLE_NAMES, find_name, fold
from records.reading import (
    check_quotes,
    choose_delimiter,
    decode_line,
    is_not_one_record,
    name_cells,
    parse_json,
    read_cells,
    read_lines,
    refuse_other_formats,
)
from utils import InputError, progress_bar, shorten

READ_COLUMNS = ("title", "text", "contents", "content", "body")  # whose values must be texts
COLLECTION = ("id", "text", "title")  # the columns of a table without a header
BEGINNING = 65536     # bytes that a table's header fits into


# what makes JSON lines of a pickle of documents: objects with page_content and metadata, as
# LangChain's and LocalRQA's, or dictionaries
UNPICKLE = ("import json, pickle, sys; [print(json.dumps(d if isinstance(d, dict) else "
            "{'title': d.metadata.get('title', ''), 'text': d.page_content})) for d in "
            "pickle.load(open(sys.argv[1], 'rb'))]")


class NotPlain(Exception):
    """A table whose rows are not all one tab-separated line each."""


# ---------------------------------------------------------------- one line

class Layout(NamedTuple):
    """How the lines of a file hold the columns of documents."""
    header: list | None      # the names of a table's columns; None: JSON lines
    has_header: bool = True  # a table's first line is its header, not a document
    columns: tuple = ()      # the names of the first document's columns, aliases included
    aliases: tuple = ()      # (name, field): a field that is read by that name too


def read_layout(path, content):
    """Return (Layout, whether its lines are plain) of a file's bytes.

    Raises InputError for an empty file.
    """
    if not content:
        raise InputError(f"{path}: holds no documents")
    # blank lines come first where table_rows has left out a header
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
    """Return the Layout of JSON lines, whose first object names the columns."""
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
    """Return True for the first line of a table without a header, as MS MARCO's collection.tsv: an
    id that is a number, a text and perhaps a title, and no name of a column.
    """
    cells = first_line.split("\t")
    known = (*DOCUMENT_ID_NAMES, *TEXT_NAMES, *TITLE_NAMES)
    is_known = find_name([cell.strip() for cell in cells], known)
    return 2 <= len(cells) <= len(COLLECTION) and cells[0].strip().isdecimal() and not is_known


def find_aliases(fields):
    """Return ((name, field), ...) of fields that are a title or a text by another spelling."""
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

    Raises InputError, or NotPlain for a table's row that is not just this line.
    """
    text = decode_line(line, path, line_number)
    if layout.header is None:
        row = parse_json(text, path, line_number)
        if not isinstance(row, dict):
            raise InputError(f"{path}:{line_number}: a document must be a JSON object, this is a "
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
                raise InputError(f"{path}:{line_number}: '{name}' must be a text, it is "
                                 f"{shorten(row[name])}")
    return row


def split_row(text):
    """Return the cells of a tab-separated line. Raise NotPlain if its last cell goes on behind it.

    Cells are unquoted if all are quoted as csv does; else their quotes are letters of the text, as
    in `"Hello" she said`.
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
    if next(lines, None) is None:  # the reader went on to the second line for the end of a quote
        raise NotPlain
    return text.split("\t")


def name_columns(header):
    """Return a header's cells, those of texts and titles spelled as records/names.py has them."""
    known = {fold(name): name for name in (*TEXT_NAMES, "title")}
    names = []
    for cell in header:
        is_id = find_name([cell.strip()], DOCUMENT_ID_NAMES) is not None
        names.append(cell.strip() if is_id else known.get(fold(cell), cell))
    return names


# ---------------------------------------------------------------- plain lines

def plain_lines(path):
    """Return the path of a file of plain lines: `path` itself or, made of it, PATH.lines.

    The latter if it has been made, or for a file that is gzipped, a JSON list or begins with a byte
    order mark.
    """
    try:
        with open(path, "rb") as file:
            beginning = file.peek(3)
            is_object = beginning.startswith(b"{") and is_not_one_record(file.readline())
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; scripts/make_corpus.py makes a corpus of its "
                         "files") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    refuse_pickle(path, beginning)
    refuse_other_formats(path)
    unpacked = f"{path}.lines"
    if os.path.exists(unpacked) and has_date_of(unpacked, path) and is_later(unpacked, path):
        return unpacked
    is_list = is_object or beginning.startswith((b"[", codecs.BOM_UTF8))
    if str(path).endswith(".gz") or is_list:
        return write_plain_lines(path, read_lines(path))
    return path


def has_date_of(made, path):
    """Return True if a file has the date of the file that it was made of."""
    return os.stat(made).st_mtime_ns == os.stat(path).st_mtime_ns


def is_later(made, path):
    """Return True if a file was written after the last change of the file that it was made of.

    Dates can be set, and many archives give all their files one date. The time of the last change
    (ctime) cannot. What lies in a folder that cannot be written is taken as it is.
    """
    is_fixed = not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK)
    return is_fixed or os.stat(made).st_ctime_ns >= os.stat(path).st_ctime_ns


def refuse_pickle(path, beginning):
    """Raises InputError, which tells how to convert it, for a pickle: opening one may run any code.
    """
    is_binary = beginning[:1] == b"\x80" and beginning[1:2] in (b"\2", b"\3", b"\4", b"\5")
    if is_binary or str(path).endswith((".pkl", ".pickle")):
        target = os.path.splitext(path)[0] + ".jsonl"
        raise InputError(f"{path}: a pickle, which may run any code when it is opened; if you "
                         f'trust it: python -c "{UNPICKLE}" {shlex.quote(str(path))} > '
                         f"{shlex.quote(target)}")


def write_plain_lines(path, lines):
    """Writes a file's lines (bytes) to PATH.lines, and returns that path.

    It gets the file's own date, by which plain_lines knows it. Raises InputError.
    """
    if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        raise InputError(f"{path}: must be made plain lines, and its folder cannot be written; "
                         "copy the file to another folder, and give that one")
    unpacked = f"{path}.lines"
    changed = os.stat(path).st_mtime_ns
    bar = progress_bar(lines, unit=" lines", desc=f"unpacking {os.path.basename(path)}")
    with new_file(unpacked, "wb") as file:
        file.writelines(bar)
        file.flush()
        os.utime(file.name, ns=(changed, changed))
    return unpacked


def table_rows(path):
    """Yields a table's rows as JSON lines (bytes), whatever its delimiter and its line ends.

    Blank lines stand for the header and for the further lines of a row, so that a document keeps
    its line number. Raises InputError for what is not quoted as csv does.
    """
    lines = split_text_lines(path)
    first_line = next(lines)
    delimiter = choose_delimiter(first_line)
    reader = read_cells(chain([first_line], lines), delimiter, strict=True)
    header = None
    first = 1  # the line that a row begins in
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
        raise InputError(f"{path}:{first}: not quoted as csv does ({error}); a cell that holds "
                         "quotes is put in quotes, and they are written twice") from None


def split_text_lines(path):
    """Yields a file's lines as texts; a bare carriage return, old Macs' line end, ends one too.

    Raises InputError.
    """
    for line_number, line in enumerate(read_lines(path), 1):
        text = decode_line(line, path, line_number, keep_end=True)
        yield from io.StringIO(text, newline="")
