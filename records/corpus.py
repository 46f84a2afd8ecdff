"""Open corpora in all the field's formats; read documents from disk by index or id."""
import json
import mmap
import os
import re
from array import array
from string import Formatter
from typing import NamedTuple

import numpy as np
from numpy.lib.format import open_memmap

from records.files import describe_version, write_array, write_json
from records.ids import IdPacker, PackedIds, find_repeated
from records.names import (
    DOCUMENT_ID_NAMES,
    TEXT_NAMES,
    TITLE_NAMES,
    find_name,
    list_unknown,
    may_hold_ids,
    spell_id,
)
from records.tables import (
    Layout,
    NotPlain,
    is_later,
    parse_row,
    plain_lines,
    read_layout,
    table_rows,
    write_plain_lines,
)
from records.templates import format_key
from utils import InputError, progress_bar, refusing, shorten, wait_for_all

CHUNK = 65536  # a scan packs ids and moves its bar after this many documents

# For files of at least this many bytes, the table of lines is kept next to the file, in FILE.table.
# Making a table takes 5.2 us per passage (measured on 400,000), or 110 s at every start for 21
# million passages; opening a kept table takes 0.02 s.
KEEP_TABLE = 2 ** 26
QUOTED_TITLE = re.compile(r'"([^\n]*)"\n(.*)', re.DOTALL)
TABLE_VERSION = 4  # raised if the tables' content, or the definition of a line, changes


class Part(NamedTuple):
    """Hold one file of a corpus, with N documents."""
    path: str           # as the user gave it
    content: mmap.mmap  # its bytes, mapped
    layout: Layout      # how its lines hold columns
    starts: np.ndarray  # (N + 1): the byte at which each document starts, and the file's end
    ids: PackedIds      # its documents' ids; empty without an id column
    first: int          # the index of its first document in the corpus


class Corpus:
    """Read documents from disk by index or id. In memory, a document takes 24 bytes and its id.

    Files are tables with a header, such as psgs_w100.tsv (id, text, title), with tabs or commas;
    BEIR's corpus.jsonl (_id, title, text); or JSON lines with any columns. Without an id column
    (names.DOCUMENT_ID_NAMES) the ids are the indices. Files in other formats are converted once to
    FILE.lines (records/tables.py), and the table of a large file's lines is kept in FILE.table.

    `template` formats a document's text, with columns in braces. Raises InputError for a line that
    is not a document, lacks a column or repeats an id.
    """

    def __init__(self, paths, template):
        self.template = template
        self.parts = []
        self.size = 0
        paths = [paths] if isinstance(paths, str) else paths
        for path in paths:
            self.open_part(path)
        self.has_ids = self.parts[0].ids.count > 0
        names = ", ".join(map(str, paths))
        if any((part.ids.count > 0) != self.has_ids for part in self.parts):
            raise InputError(f"{names}: some files have an id column, others do not; add one to "
                             "all of them")
        if len(self.parts) > 1 and self.has_ids:  # scan has checked each part alone
            check_unique([part.ids for part in self.parts], names)

    def __len__(self):
        return self.size

    # ---------------------------------------------------------------- opening

    def open_part(self, path):
        """Add a file of any format to the corpus."""
        try:
            self.open_lines(path, plain_lines(path))
        except NotPlain:
            self.open_lines(path, write_plain_lines(path, table_rows(path)))

    def open_lines(self, path, plain_path):
        """Add a file: map the bytes of its plain lines, and read or make their table.

        Raises NotPlain if a table's rows are not exactly its lines.
        """
        with open(plain_path, "rb") as file:
            is_empty = os.path.getsize(plain_path) == 0  # an empty file cannot be mapped
            content = b"" if is_empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        layout, is_plain = read_layout(path, content)
        if layout.header is not None:
            self.check_header(layout, path)
        if not is_plain:
            raise NotPlain

        table_folder = f"{path}.table"
        stamp = {"version": TABLE_VERSION, "file": describe_version(os.stat(plain_path))}
        if read_stamp(table_folder, plain_path) == stamp:
            starts, ids = open_table(table_folder, len(content))
        else:
            starts, ids = self.scan(path, content, layout)
            if len(content) >= KEEP_TABLE:
                keep_table(table_folder, stamp, starts, ids)
        self.parts.append(Part(path, content, layout, starts, ids, self.size))
        self.size += len(starts) - 1

    def scan(self, path, content, layout):
        """Check every line of a file and return (starts, PackedIds)."""
        starts = array("q")
        id_column = None
        ids, packer = [], IdPacker()
        end = 0
        bar = progress_bar(total=len(content), unit="B", unit_scale=True,
                           desc=f"reading {os.path.basename(path)}",
                           is_main=len(content) >= KEEP_TABLE)  # a small file needs no bar
        lines = iter(content.readline, b"") if content else ()
        is_json = layout.header is None
        for line_number, line in enumerate(lines, 1):
            start, end = end, end + len(line)
            if line.isspace() or (line_number == 1 and layout.has_header and not is_json):
                continue
            row = parse_row(line, layout, path, line_number)
            is_first = not starts
            if is_first:
                id_column = find_name(row, DOCUMENT_ID_NAMES)
            if is_first or is_json:  # in a table all lines have the columns of the first one
                format_key(row, self.template, f"{path}:{line_number}")
            starts.append(start)
            if id_column is not None:
                if row.get(id_column) in (None, ""):
                    raise InputError(f"{path}:{line_number}: no '{id_column}', although other "
                                     "documents have it; add it")
                identifier = spell_id(row[id_column])
                if type(row[id_column]) not in (str, int) and not identifier.isdecimal():
                    raise InputError(f"{path}:{line_number}: '{id_column}' must be a text or an "
                                     f"integer, got {shorten(row[id_column])}")
                ids.append(identifier.encode())
            if len(starts) % CHUNK == 0:
                packer.add(ids)
                ids = []
                bar.update(end - bar.n)
        bar.close()
        if not starts:
            raise InputError(f"{path}: holds no documents")
        starts.append(end)
        packer.add(ids)
        packed = packer.pack()
        check_unique([packed], path)
        return np.frombuffer(starts, np.int64), packed

    def check_header(self, layout, path):
        """Raise InputError if a table's header lacks a column of the template."""
        format_key(dict.fromkeys(layout.columns, ""), self.template,
                   f"{path}:1: neither JSON lines nor a table with these columns")

    # ---------------------------------------------------------------- documents

    def row(self, doc_index):
        """Return (columns {name: value}, location) of a document."""
        part = next(part for part in reversed(self.parts) if part.first <= doc_index)
        index = doc_index - part.first
        lines = part.content[part.starts[index]:part.starts[index + 1]]
        line = lines.split(b"\n", 1)[0]  # blank lines may follow the document's line
        has_header = part.layout.header is not None and part.layout.has_header
        line_number = index + 2 if has_header else index + 1
        return parse_row(line, part.layout, part.path, line_number), f"{part.path}:{line_number}"

    def text(self, doc_index):
        """Return a document's text for the retriever, formatted by the template."""
        row, location = self.row(doc_index)
        return format_key(row, self.template, location)

    def passage(self, doc_index):
        """Return {id, title, text} of a document; answers are searched for in the text alone.

        In Pyserini's and FlashRAG's Wikipedia, `contents` holds a quoted title, a line break and
        the text, which are separated here.
        """
        row, location = self.row(doc_index)
        column = next((name for name in TEXT_NAMES
                       if isinstance(row.get(name, 0), (str, type(None)))), None)
        if column is None:
            text = format_key(row, self.template, location)
        else:
            text = row[column] or ""
        title = row.get("title") or ""
        titled = QUOTED_TITLE.fullmatch(text) if column == "contents" and not title else None
        if titled:
            title, text = titled.groups()
        return {"id": self.ids([doc_index])[0], "title": title, "text": text}

    # ---------------------------------------------------------------- ids

    def ids(self, doc_indices):
        """Return a list of documents' ids; without an id column, their indices as text."""
        if not self.has_ids:
            return [str(doc_index) for doc_index in doc_indices]
        doc_indices = np.asarray(doc_indices, np.int64)
        ids = np.empty(len(doc_indices), object)
        for part in self.parts:
            in_part = (part.first <= doc_indices) & (doc_indices < part.first + part.ids.count)
            ids[in_part] = part.ids.ids(doc_indices[in_part] - part.first)
        return ids.tolist()

    def indices(self, ids):
        """Return the indices of documents by their ids, a list with -1 for an unknown id."""
        if not self.has_ids:
            return [self.parse_index(document_id) for document_id in ids]
        expected = [document_id.encode() for document_id in ids]
        indices = np.full(len(ids), -1)
        for part in self.parts:
            found = part.ids.indices(expected)
            indices[found >= 0] = found[found >= 0] + part.first
        return indices.tolist()

    def require_ids(self, needed_by):
        """Raise InputError if there is no id column, but a column of unknown name may hold ids.

        needed_by: the flag that matches documents by their ids.
        """
        unknown = [] if self.has_ids else self.unknown_columns()
        if unknown:
            raise InputError(f"{self.parts[0].path}: {needed_by} needs documents' ids, and no "
                             "column is known to hold them; its columns are "
                             f"{shorten(list(self.parts[0].layout.columns))}; rename the column "
                             "with the ids to 'id', or add one")

    def refuse_blanks(self, path):
        """Raise InputError if a document's id has a blank, which a TREC run cannot hold."""
        for part in self.parts if self.has_ids else ():
            index = part.ids.find_blank()
            if index is not None:
                identifier, = part.ids.ids(np.array([index]))
                raise InputError(f"{path}: a TREC run cannot hold the blank in the id "
                                 f"{shorten(identifier)} of {part.path}; use --output, or remove "
                                 "the blanks from the ids")

    def unknown_columns(self):
        """Return the columns of the first file that may hold ids.

        They are not texts, titles or parts of the template, and hold a single word or a number in
        the first document.
        """
        in_template = [name for _, name, _, _ in Formatter().parse(self.template) if name]
        row, _ = self.row(0)
        return [name for name in list_unknown(row, TEXT_NAMES, TITLE_NAMES, in_template)
                if may_hold_ids([row[name]])]

    def note_columns(self, log):
        """Log if columns are read under other names, or if a header or an id column is missing."""
        for part in self.parts:
            layout = part.layout
            if not layout.has_header:
                log(f"note: {part.path} has no header; its columns are read as "
                    f"{', '.join(layout.columns)}")
            for name, field in layout.aliases:
                log(f"note: {part.path}: '{field}' is read as the {name}")
        if not self.has_ids:
            log(f"note: {self.parts[0].path} has no column of ids (its columns are "
                f"{', '.join(map(str, self.parts[0].layout.columns))[:200]}): documents' "
                "positions, from 0, are their ids")

    def parse_index(self, text):
        """Return the document index that a text spells, in the form of str(index), or -1."""
        is_index = text.isdecimal() and str(int(text)) == text and int(text) < self.size
        return int(text) if is_index else -1


def open_corpus(paths, template, world):
    """Return the Corpus on every process, or None without paths; log how its columns are read."""
    if not paths:
        return None
    # the main process goes first and writes FILE.lines and FILE.table for the others
    corpus = Corpus(paths, template) if world.is_main else None
    wait_for_all(world)
    if corpus is None:
        corpus = Corpus(paths, template)
    corpus.note_columns(world.log)
    return corpus


def check_unique(parts, location):
    """Raise InputError if an id occurs twice in these PackedIds."""
    repeated = find_repeated(parts)
    if repeated is not None:
        raise InputError(f"{location}: the id {shorten(repeated)} occurs twice in the corpus; make "
                         "ids unique")


# ---------------------------------------------------------------- kept tables of lines

def open_table(folder, size):
    """Return the memory-mapped (starts, PackedIds) that keep_table saved.

    `size` is the number of bytes in the file. Raises InputError if the table is broken.
    """
    with refusing(f"{folder}: is broken", "delete it; the next run makes it again"):
        arrays = [open_memmap(os.path.join(folder, f"{name}.npy"), "r")
                  for name in ("starts", *PackedIds._fields)]
        starts, *packed = arrays
        ids = PackedIds(*map(np.asarray, packed))
        kinds = [values.dtype.kind for values in arrays]
        is_whole = all(values.offset + values.nbytes == os.path.getsize(values.filename)
                       for values in arrays)
        count = len(starts) - 1
        if kinds != ["i", "u", "u", "u", "u"] or not is_whole or starts[count] != size or not (
                len(ids.hashes) == len(ids.order) == len(ids.offsets) - 1
                and ids.count in (0, count) and ids.offsets[-1] == len(ids.letters)):
            raise ValueError("its parts do not belong together")
        return starts, ids


def read_stamp(folder, plain_path):
    """Return the stamp of a kept table, or None if it is missing or the file has changed since."""
    path = os.path.join(folder, "stamp.json")
    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file) if is_later(path, plain_path) else None
    except (OSError, ValueError, RecursionError):
        return None


def keep_table(folder, stamp, starts, ids):
    """Save a file's table of lines. The stamp is written last, and makes the table valid.

    If the table cannot be written, the next run makes it again.
    """
    stamp_path = os.path.join(folder, "stamp.json")
    try:
        if os.path.exists(stamp_path):
            os.remove(stamp_path)
        for name, values in {"starts": starts, **ids._asdict()}.items():
            write_array(os.path.join(folder, f"{name}.npy"), values)
        write_json(stamp_path, stamp)
    except (InputError, OSError):
        pass
