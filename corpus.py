"""Corpora and queries of all the field's formats, gzipped or not."""
import codecs
import csv
import gzip
import json
import mmap
import os
import sys
import zlib
from array import array
from collections import defaultdict
from string import Formatter
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import parse_json, read_json
from utils import InputError, new_file, wait_for_all, write_json


ID_COLUMNS = ("_id", "id", "docid", "doc_id", "passage_id")
TABLE = ("starts", "ids", "order")
KEEP_TABLE = 2 ** 26  # bytes of a file from which on its table of lines is kept beside it


class Part(NamedTuple):
    """A corpus's file: its name, its bytes, its columns' names if it is a table, and, as arrays, where each document starts (N + 1),
    the ids (N) as bytes and their order; no ids where no column holds them, first is the number of its first document."""
    path: str
    content: mmap.mmap
    header: list
    starts: np.ndarray
    ids: np.ndarray
    order: np.ndarray
    first: int


class Corpus:
    """Documents by number or id, read from disk when they are asked for; in memory are 16 bytes and the id per document.

    Files: psgs_w100.tsv (id, text, title, with a header), BEIR's corpus.jsonl (_id, title, text), or JSON lines with any
    columns, whose ids are their numbers if no column is named id, _id, docid, doc_id or passage_id. A gzipped file or a JSON list
    is written out once as FILE.lines; a large file's table of lines is kept in FILE.table, so that it opens at once. Raises InputError.
    """

    def __init__(self, paths, template):
        self.template, self.parts, self.size = template, [], 0
        for path in [paths] if isinstance(paths, str) else paths:
            self.open_part(path)
        self.has_ids = len(self.parts[0].ids) > 0
        if any(bool(len(part.ids)) != self.has_ids for part in self.parts):
            raise InputError(f"{', '.join(paths)}: some files name ids, others do not; give all of them an id column")
        if len(self.parts) > 1 and self.has_ids:
            check_unique(np.sort(np.concatenate([part.ids[part.order] for part in self.parts]), kind="stable"), ", ".join(paths))

    def __len__(self):
        return self.size

    def open_part(self, path):
        """Adds a file: its bytes mapped, its table of lines read or made."""
        plain, kept = plain_lines(path), f"{path}.table"
        with open(plain, "rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(plain) else b""
        first = content[:content.find(b"\n") + 1 or None]
        header = None if first[:1] == b"{" else first.decode("utf-8", "replace").rstrip("\r\n").split("\t")
        if header and not {"id", "text"} <= set(header):
            raise InputError(f"{path}:1: neither JSON lines nor a table whose header names id and text" if content else
                             f"{path}: holds no documents")
        stamp = {"size": len(content), "changed": os.stat(plain).st_mtime_ns}
        if read_stamp(kept) == stamp:
            arrays = [np.load(os.path.join(kept, f"{name}.npy"), mmap_mode="r") for name in TABLE]
        else:
            arrays = self.scan(path, content, header)
            if len(content) >= KEEP_TABLE:
                keep_table(kept, stamp, **dict(zip(TABLE, arrays)))
        self.parts.append(Part(path, content, header, *arrays, self.size))
        self.size += len(arrays[0]) - 1

    def scan(self, path, content, header):
        """(starts, ids, order) of a file, each line of which is checked."""
        starts, chunks, ids, place, column = array("q"), [], [], 0, None
        bar = tqdm(total=len(content), unit="B", unit_scale=True, desc=f"reading {os.path.basename(path)}", leave=False,
                   disable=None if len(content) >= KEEP_TABLE else True)
        for number, line in enumerate(iter(content.readline, b"") if content else (), 1):
            start, place = place, place + len(line)
            if line.isspace() or header and number == 1:
                continue
            row = self.parse(line, header, path, number)
            if not (header and starts):  # a table's lines have the same columns
                self.format(row, f"{path}:{number}")
            if not starts:
                column = next((key for key in ID_COLUMNS if key in row), None)
            if column and row.get(column) in (None, ""):
                raise InputError(f"{path}:{number}: no '{column}', which other documents have; add it")
            starts.append(start)
            if column:
                ids.append(str(row[column]).encode())
            if len(starts) % 65536 == 0:
                chunks, ids = chunks + [np.array(ids, "S")] * bool(ids), []
                bar.update(place - bar.n)
        bar.close()
        if not starts:
            raise InputError(f"{path}: holds no documents")
        starts.append(place)
        names = np.concatenate(chunks + [np.array(ids, "S")])
        order = np.argsort(names, kind="stable")
        check_unique(names[order], path)
        return np.frombuffer(starts, np.int64), names, order

    @staticmethod
    def parse(line, header, path, number):
        """The columns {name: value} of a line of bytes."""
        text = line.decode("utf-8", "replace").rstrip("\r\n")
        if header is None:
            row = parse_json(text, path, number)
            if not isinstance(row, dict):
                raise InputError(f"{path}:{number}: a document must be a JSON object, this is a {type(row).__name__}")
            return row
        cells = split_cells(text)
        if len(cells) != len(header):
            raise InputError(f"{path}:{number}: {len(cells)} columns, the header names {len(header)}; the line may be cut off")
        return dict(zip(header, cells))

    def format(self, row, place):
        """The text of a row by the template, or InputError naming the place."""
        try:
            return format_key(row, self.template)
        except KeyError as error:
            raise InputError(f"{place}: no column {error} for --key_template '{self.template}'; its columns are "
                             f"{sorted(row)}") from None

    def row(self, number):
        """(columns, place) of a document."""
        part = next(part for part in reversed(self.parts) if part.first <= number)
        own = number - part.first
        start, line = part.starts[own], own + 1 + bool(part.header)
        return self.parse(part.content[start:part.starts[own + 1]].split(b"\n", 1)[0], part.header, part.path, line), f"{part.path}:{line}"

    def text(self, number):
        """The key text of a document, by the template."""
        return self.format(*self.row(number))

    def passage(self, number):
        """{id, title, text} of a document; answers are searched in the text alone."""
        row, place = self.row(number)
        name = next((name for name in ("text", "content", "contents") if name in row), None)
        text = row[name] or "" if name else self.format(row, place)
        return {"id": self.ids([number])[0], "title": row.get("title") or "", "text": text}

    def ids(self, numbers):
        """The ids of documents (a list) by their numbers; the numbers as text where the corpus names no ids."""
        numbers = np.asarray(numbers, np.int64)
        if not self.has_ids:
            return [str(number) for number in numbers]
        found = np.empty(len(numbers), object)
        for part in self.parts:
            own = (numbers >= part.first) & (numbers < part.first + len(part.ids))
            found[own] = np.asarray(part.ids)[numbers[own] - part.first]
        return [id.decode() for id in found]

    def numbers(self, ids):
        """The numbers of documents (a list) by their ids, -1 for those that are not there."""
        if not self.has_ids:
            return [int(id) if id.isdecimal() and int(id) < self.size and str(int(id)) == id else -1 for id in ids]
        wanted, found = np.array([id.encode() for id in ids] or [b""]), np.full(max(1, len(ids)), -1)
        for part in self.parts:
            own = wanted.astype(part.ids.dtype)  # of one width, or numpy would widen all the ids; what it cuts off is not equal
            places = part.order[np.searchsorted(part.ids, own, sorter=part.order).clip(max=len(part.ids) - 1)]
            found = np.where(part.ids[places] == wanted, places + part.first, found)
        return found[:len(ids)].tolist()


def check_unique(ids, place):
    """InputError if two of the sorted ids are equal."""
    twice = ids[1:][ids[1:] == ids[:-1]]
    if len(twice):
        raise InputError(f"{place}: the id {twice[0].decode()!r} occurs twice in the corpus; make ids unique")


def split_cells(text):
    """The cells of a tab-separated line, quoted as csv does; [] of an empty one."""
    csv.field_size_limit(sys.maxsize)  # a document may be longer than csv's 131,072 characters
    return next(csv.reader([text], delimiter="\t"), [])


def read_lines(path):
    """The lines of a file as bytes, one by one, gunzipped; a JSON list gives one line per item. Raises InputError."""
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            if file.peek(4)[:4].removeprefix(codecs.BOM_UTF8)[:1] == b"[":
                yield from (json.dumps(row).encode() + b"\n" for row, _ in read_json(path))
            else:
                for number, line in enumerate(file):
                    yield line if number else line.removeprefix(codecs.BOM_UTF8)
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error}); check the path, or fetch the file "
                         "again") from None


def plain_lines(path):
    """The path of a file of plain lines: `path` or, if it is gzipped, a JSON list or begins with a mark, PATH.lines, written once."""
    try:
        with open(path, "rb") as file:
            plain = not file.peek(3).startswith((b"[", codecs.BOM_UTF8)) and not str(path).endswith(".gz")
        source, unpacked = os.stat(path).st_mtime_ns, f"{path}.lines"
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if plain:
        return path
    if not os.path.exists(unpacked) or os.stat(unpacked).st_mtime_ns != source:  # of the same age: written from this very file
        if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
            raise InputError(f"{path}: must be made plain lines, and its folder cannot be written; unpack it elsewhere, and give that file")
        with new_file(unpacked, "wb") as file:
            file.writelines(tqdm(read_lines(path), unit=" lines", desc=f"unpacking {os.path.basename(path)}", leave=False, disable=None))
            file.flush()
            os.utime(file.name, ns=(source, source))
    return unpacked


def read_stamp(folder):
    """What keep_table stamped a table with, or None."""
    try:
        with open(os.path.join(folder, "stamp.json"), encoding="utf-8") as file:
            return json.load(file)
    except (OSError, ValueError):
        return None


def keep_table(folder, stamp, **arrays):
    """Saves a file's table of lines; the stamp, last, makes it valid. Where it cannot be written, it is made again next time."""
    stamp_path = os.path.join(folder, "stamp.json")
    try:
        if os.path.exists(stamp_path):
            os.remove(stamp_path)
        for name, values in arrays.items():
            with new_file(os.path.join(folder, f"{name}.npy"), "wb") as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(values))
                file.write(values.tobytes())  # np.save does not notice a full disk
        write_json(stamp_path, stamp)
    except (InputError, OSError):
        pass


def open_corpus(paths, template, world):
    """The Corpus on every process; the main one goes first, so that what is written beside a file is written once. None without paths."""
    corpus = Corpus(paths, template) if paths and world.is_main else None
    wait_for_all(world)
    return corpus or (Corpus(paths, template) if paths else None)


def format_key(key, template):
    """The text of a key: itself, or its columns in the template; KeyError for a column it lacks."""
    if isinstance(key, str):
        return key
    return template.format_map({"title": ""} | {name: "" if value is None else value for name, value in key.items()}).strip()


def check_templates(args):
    """InputError for a --key_template that is no format string of column names, or a --query_template with others than query."""
    for name, columns in (("key_template", defaultdict(str)), ("query_template", {"query": ""})):
        template = getattr(args, name)
        try:
            template.format_map(columns)
            if not any(field for _, field, _, _ in Formatter().parse(template)):
                raise ValueError("it names no column")
        except (ValueError, IndexError, AttributeError, KeyError) as error:
            raise InputError(f"--{name} '{template}' cannot be used ({error}); name columns in braces, as in '{{title}} {{text}}' for keys "
                             "and '{query}' for queries") from None


def is_header(line):
    """True for a first line that names the columns: id and query, or question and answers."""
    names = [cell.strip().lower() for cell in line.split("\t")]
    return len(names) == 2 and (names[0] in (*ID_COLUMNS, "qid", "query_id") and names[1] in ("query", "question", "text")
                                or names == ["question", "answers"])


def read_queries(paths):
    """{id: text} of BEIR's queries.jsonl, id <tab> text, or records with query or question. Raises InputError."""
    queries = {}
    for path in paths:
        for number, line in enumerate(read_lines(path), 1):
            place, text = f"{path}:{number}", line.decode("utf-8", "replace").rstrip("\r\n")
            if not text.strip():
                continue
            if text.startswith("{"):
                row = parse_json(text, path, number)
                id = next((row[key] for key in ("_id", "id", "query_id", "qid") if key in row), None)
                query = row.get("text", row.get("query", row.get("question")))
            else:
                id, _, query = text.partition("\t")
                if number == 1 and is_header(text):
                    continue
            if id is None or not isinstance(query, str) or not query.strip():
                raise InputError(f"{place}: a query needs an id and a text")
            if queries.setdefault(str(id), query) != query:
                raise InputError(f"{place}: the id {str(id)!r} is another query's already; make ids unique")
    return queries
