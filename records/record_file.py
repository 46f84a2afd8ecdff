"""Read the records of a large JSON file by index, from disk.

FILE.records/KIND.jsonl, the table, has a line per record: where its bytes are, and the facts about
it that a script needs before it reads the record. One process makes the table, in the pass over
FILE that checks the records; the others wait. The table is made again if FILE changes.
"""
import json
import os
import zlib
from contextlib import suppress

import numpy as np

from records.files import describe_version, new_file, take_lock, write_json
from records.hashes import hash_file
from records.json_values import parse_json
from records.reading import read_settings, scan_json
from records.tables import is_later, plain_lines
from utils import InputError, progress_bar

# A file of at least this many bytes stays on disk. In memory, its records take 2.5 times as much.
LARGE = 2 ** 26
GZIP_RATIO = 4  # gzip makes JSON about this much smaller
VERSION = 1     # raised if the form of tables, or the facts of any kind, change


class RecordFile:
    """Read records by index, and facts about them, from a file whose table has been made.

    An item is (object, location), as records.reading.iterate_json yields it. The file is opened for
    each item, so that processes share nothing, and a change of the file is noticed.
    """

    def __init__(self, path, version, lines):
        """path, version: the file and its describe_version; lines: the bytes of the table's lines,
        except the last one.
        """
        self.path, self.version, self.lines = path, version, lines
        # bytes and an array: objects in a worker grow its memory, because it counts references
        line_ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))
        self.starts = np.concatenate([[0], line_ends + 1])  # (N + 1) of the records' lines

    def __len__(self):
        return len(self.starts) - 1

    def read_line(self, index):
        """Return [first byte, byte after it, location without the path, facts] of a record."""
        return json.loads(self.lines[self.starts[index]:self.starts[index + 1]])

    def facts(self):
        """Yield the facts about each record."""
        for index in range(len(self)):
            yield self.read_line(index)[-1]

    def __getitem__(self, index):
        """Return a record's (object, location). Raises InputError if the file has changed."""
        start, end, place, _ = self.read_line(index)
        try:
            with open(self.path, "rb") as file:
                check_version(self.path, file, self.version)
                file.seek(start)
                content = file.read(end - start)
        except OSError as error:
            raise InputError(f"{self.path}: can no longer be read ({error.strerror}); start "
                             "again") from None
        return parse_json(content.decode(), self.path, 1), self.path + place

    def __iter__(self):
        return map(self.__getitem__, range(len(self)))


def is_large(path):
    """Return True for a file whose records stay on disk."""
    if not os.path.isfile(path):
        return False  # a pipe, or a wrong path, which raises an error when it is read
    ratio = GZIP_RATIO if str(path).endswith(".gz") else 1
    return ratio * os.path.getsize(path) >= LARGE


def open_record_file(path, kind, inspect, settings=None):
    """Return the RecordFile of a large file. Return None if the file is small, or if its records
    cannot stay on disk: those of a gzipped file in a folder that cannot be written, and those that
    are the values of one object.

    inspect(object, location, index) checks a record and returns the facts about it, which JSON can
    hold. kind: the name of the table. settings: what the facts depend on besides the record, as
    JSON can hold it. A gzipped file is unpacked once, to FILE.lines. Raises InputError.
    """
    path = str(path)
    if not is_large(path):
        return None
    is_gzipped = path.endswith(".gz")
    if not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
        return None if is_gzipped else make_table(path, inspect)
    plain_path = f"{path}.lines" if is_gzipped else path
    table = os.path.join(f"{path}.records", f"{kind}.jsonl")
    record_file = read_table(table, path, plain_path, settings)
    if record_file is not None:
        return record_file
    with open(path, "rb") as file:
        take_lock(file, wait=True)  # another process may be making the table
        record_file = read_table(table, path, plain_path, settings)
        if record_file is None:
            if is_gzipped:
                plain_lines(path)
            record_file = make_table(plain_path, inspect)
            keep_table(table, record_file, settings)
    return record_file


def hash_record_file(path):
    """Return a hash of a whole file of records; that of a large file is kept next to its tables."""
    if not is_large(path):
        return hash_file(path)
    kept_path = os.path.join(f"{path}.records", "hash.json")
    stamp = {"file": describe_version(os.stat(path))}
    with suppress(InputError):  # a damaged file is written again
        kept = read_settings(kept_path)
        is_kept = "hash" in kept and stamp.items() <= kept.items()
        if is_kept and is_later(kept_path, path):
            return kept["hash"]
    stamp["hash"] = hash_file(path)
    with suppress(InputError):  # if it cannot be written, the next run computes it again
        write_json(kept_path, stamp)
    return stamp["hash"]


# ---------------------------------------------------------------- the table

def check_version(path, file, version):
    """Raise InputError if an open file is not of this version."""
    if describe_version(os.fstat(file.fileno())) != version:
        raise InputError(f"{path}: has changed since it was first read; start again")


def make_table(path, inspect):
    """Return the RecordFile of a file, or None for records that are the values of one object.

    Raises InputError.
    """
    lines = []
    with open(path, "rb") as file:
        version = describe_version(os.fstat(file.fileno()))
    with progress_bar(total=version[0], unit="B", unit_scale=True,
                      desc=f"reading {os.path.basename(path)}") as bar:
        for index, (item, location, span) in enumerate(scan_json(path)):
            if span is None:
                return None
            start, end = span
            facts = inspect(item, location, index)
            lines.append(json.dumps([start, end, location.removeprefix(path), facts]) + "\n")
            bar.update(end - bar.n)
    with open(path, "rb") as file:
        check_version(path, file, version)
    if not lines:
        raise InputError(f"{path}: holds no records")
    return RecordFile(path, version, "".join(lines).encode())


def keep_table(path, record_file, settings):
    """Write the table of a RecordFile. If it cannot be written, the next run makes it again."""
    if record_file is None:
        return
    stamp = make_stamp(record_file.lines, record_file.version, settings)
    with suppress(InputError), new_file(path, "wb") as file:
        file.write(record_file.lines)
        file.write(json.dumps(stamp).encode() + b"\n")


def make_stamp(lines, version, settings):
    """Return the last line of a table, which shows whether it is whole and up to date."""
    return {"version": VERSION, "file": version, "settings": settings,
            "checksum": zlib.crc32(lines)}


def read_table(path, given_path, plain_path, settings):
    """Return the RecordFile of a table, or None if the table is missing, damaged, or out of date.

    given_path: the file of records; plain_path: the same, or the file that it is unpacked to.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
        version = describe_version(os.stat(plain_path))
        start = content.rindex(b"\n", 0, -1) + 1  # of the last line
        lines, stamp = content[:start], json.loads(content[start:])
        is_fresh = is_later(path, plain_path) and is_later(path, given_path)
    except (OSError, ValueError, RecursionError):
        return None
    if not is_fresh or stamp != make_stamp(lines, version, settings):
        return None
    return RecordFile(plain_path, version, lines)
