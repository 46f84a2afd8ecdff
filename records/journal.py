"""A journal beside a file that long work makes at its end: what is done survives kill -9.

FILE.journal.RANK, one per process, holds a line that says what the work depends on, then one line
per finished part. Lines are only added; the last one may be cut off, and is then done again.
"""
import glob
import json
import os
from contextlib import suppress

from records.files import take_lock, unwritable
from utils import InputError, gather_lists, wait_for_all


class Journal:
    """The parts that are done, {number: result}, and the file to which this process adds."""

    def __init__(self, output, fingerprint, world):
        """Reads what killed runs of the same fingerprint have done, on the main process for all;
        what others left is replaced, and a line says so.
        """
        self.output, self.fingerprint, self.rank = output, fingerprint, world.rank
        self.file = None  # made with the first part
        done = {}
        for path in list_journals(output) if world.is_main else []:
            parts, size = read_journal(path, fingerprint)
            done.update(parts)
            if not size:
                world.log(f"note: {path} is of other data, another model or other flags; starting "
                          "from scratch")
        self.done = dict(gather_lists(done.items(), world))
        wait_for_all(world)

    def add(self, number, result):
        """Notes a part as done. Raises InputError if the file cannot be written, or another run is
        writing it.
        """
        if self.file is None:
            self.file = open_journal(f"{self.output}.journal.{self.rank}", self.fingerprint)
        self.done[number] = result
        line = json.dumps({"part": number, "result": result})
        self.file.write(line.encode() + b"\n")
        self.file.flush()

    def remove(self):
        """Removes the journals of all processes, when the file that they are for is whole."""
        for path in list_journals(self.output):
            with suppress(FileNotFoundError):  # another process was faster
                os.remove(path)


def list_journals(output):
    """The paths of the journals beside a file."""
    return sorted(glob.glob(f"{glob.escape(output)}.journal.[0-9]*"))


def read_journal(path, fingerprint):
    """({number: result} of a journal, the bytes that its whole lines take); ({}, 0) for one of
    another fingerprint.
    """
    done, size = {}, 0
    with open(path, "rb") as file:
        for index, line in enumerate(file):
            try:
                entry = json.loads(line)
                if index == 0 and entry != fingerprint:
                    return {}, 0
                if index > 0:
                    done[entry["part"]] = entry["result"]
            except (ValueError, TypeError, KeyError, RecursionError):
                break
            if not line.endswith(b"\n"):
                break  # it may be cut off within a number
            size += len(line)
    return done, size


def open_journal(path, fingerprint):
    """The file of a journal, to be added to; it is begun anew unless it has this fingerprint.

    Raises InputError.
    """
    try:
        file = open(path, "ab")
        if not take_lock(file, without_locks=True):
            raise InputError(f"{path}: another run is writing it; wait for its end, or give "
                             "another --save_name")
        _, size = read_journal(path, fingerprint)
        file.truncate(size)
        if not size:
            file.write(json.dumps(fingerprint).encode() + b"\n")
            file.flush()
        return file
    except OSError as error:
        raise unwritable(path, error, "choose another --save_name or make room") from None
