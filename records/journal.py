"""Keep a journal of long work next to its output, so that finished parts survive kill -9.

Each process writes FILE.journal.RANK: first a line with the work's fingerprint, then a line per
finished part. Lines are only appended. If the last line is cut off, its part is done again.
"""
import glob
import json
import os
from contextlib import suppress

from records.files import take_lock, unwritable
from utils import InputError, gather_lists, wait_for_all


class Journal:
    """Hold the finished parts, {number: result}, and this process's journal file."""

    def __init__(self, output, fingerprint, world):
        """Read the parts that killed runs with this fingerprint have finished.

        The main process reads them for all processes. Journals with another fingerprint are
        reported and replaced.
        """
        self.output, self.fingerprint, self.rank = output, fingerprint, world.rank
        self.file = None  # made with the first part
        done = {}
        for path in list_journals(output) if world.is_main else []:
            parts, size = read_journal(path, fingerprint)
            done.update(parts)
            if not size:
                world.log(f"note: {path} was written for other data, another model or other flags; "
                          "starting from scratch")
        self.done = dict(gather_lists(done.items(), world))
        wait_for_all(world)

    def add(self, number, result):
        """Record a finished part. Raises InputError if the file is in use or cannot be written."""
        if self.file is None:
            self.file = open_journal(f"{self.output}.journal.{self.rank}", self.fingerprint)
        self.done[number] = result
        line = json.dumps({"part": number, "result": result})
        self.file.write(line.encode() + b"\n")
        self.file.flush()

    def remove(self):
        """Remove the journals of all processes, once the output is complete."""
        for path in list_journals(self.output):
            with suppress(FileNotFoundError):  # another process was faster
                os.remove(path)


def list_journals(output):
    """Return the paths of an output's journals."""
    return sorted(glob.glob(f"{glob.escape(output)}.journal.[0-9]*"))


def read_journal(path, fingerprint):
    """Return ({number: result}, size of the complete lines in bytes) of a journal.

    For a journal with another fingerprint, return ({}, 0).
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
                break  # the line may be cut off within a number
            size += len(line)
    return done, size


def open_journal(path, fingerprint):
    """Return a journal's file, open for appending and emptied if its fingerprint differs.

    Raises InputError if another run is writing it, or it cannot be written.
    """
    try:
        file = open(path, "ab")
        if not take_lock(file, without_locks=True):
            raise InputError(f"{path}: another run is writing it; wait until it ends, or give "
                             "another --save_name")
        _, size = read_journal(path, fingerprint)
        file.truncate(size)
        if not size:
            file.write(json.dumps(fingerprint).encode() + b"\n")
            file.flush()
        return file
    except OSError as error:
        raise unwritable(path, error, "choose another --save_name or make room") from None
