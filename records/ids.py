"""Pack the ids of a file's documents: each takes its own length plus 12 bytes.

In a numpy array of texts, one long id would make all others as long.
"""
import re
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

FOUR_BYTES = 2 ** 32  # smaller numbers fit into 4 bytes
# the white space of str.split(), in UTF-8; in an id it would break the line of a run
BLANK = re.compile(rb"[\t-\r\x1c-\x20]|\xc2[\x85\xa0]|\xe1\x9a\x80|\xe2\x80[\x80-\x8a\xa8\xa9\xaf]"
                   rb"|\xe2\x81\x9f|\xe3\x80\x80")


class PackedIds(NamedTuple):
    """Hold the ids of N documents, to be looked up by hash. N is 0 if documents have no ids."""
    letters: np.ndarray  # uint8: all ids in UTF-8, one after another
    offsets: np.ndarray  # (N + 1): where each id begins in letters, and where the last one ends
    hashes: np.ndarray   # (N) uint64, sorted
    order: np.ndarray    # (N): the index of the document for each hash

    @property
    def count(self):
        """Return the number of ids: N, or 0 if documents have none."""
        return len(self.order)

    def ids(self, indices):
        """Return the ids (texts) of documents by their indices, an array."""
        letters = memoryview(self.letters)
        starts, ends = self.offsets[indices].tolist(), self.offsets[np.add(indices, 1)].tolist()
        return [bytes(letters[start:end]).decode() for start, end in zip(starts, ends)]

    def indices(self, ids):
        """Return the document index of each id (bytes) as an array, -1 for an unknown id."""
        hashes = hash_ids(ids)
        found = np.full(len(ids), -1)
        ranks = np.searchsorted(self.hashes, hashes)
        waiting = np.arange(len(ids))
        letters = memoryview(self.letters)
        while True:  # repeats only if two ids share a hash
            waiting = waiting[ranks[waiting] < len(self.hashes)]
            waiting = waiting[self.hashes[ranks[waiting]] == hashes[waiting]]
            if not len(waiting):
                return found
            candidates = self.order[ranks[waiting]].astype(np.int64)
            starts, ends = self.offsets[candidates].tolist(), self.offsets[candidates + 1].tolist()
            is_equal = np.array([letters[start:end] == ids[i] for i, start, end
                                 in zip(waiting.tolist(), starts, ends)])
            found[waiting[is_equal]] = candidates[is_equal]
            waiting = waiting[~is_equal]
            ranks[waiting] += 1

    def find_blank(self):
        """Return the index of the first document with a blank in its id, or None."""
        blank = BLANK.search(memoryview(self.letters))
        if blank is None:
            return None
        return int(np.searchsorted(self.offsets, blank.start(), side="right")) - 1


class IdPacker:
    """Collect ids (bytes) into PackedIds."""

    def __init__(self):
        self.letters = bytearray()
        self.lengths = []
        self.hashes = []

    def add(self, ids):
        """Add the ids of the next documents."""
        self.letters += b"".join(ids)
        self.lengths.append(np.fromiter(map(len, ids), np.int64, len(ids)))
        self.hashes.append(hash_ids(ids))

    def pack(self):
        """Return the PackedIds of all documents that were added."""
        lengths = np.concatenate([np.zeros(1, np.int64), *self.lengths])
        hashes = np.concatenate([np.zeros(0, np.uint64), *self.hashes])
        order = np.argsort(hashes, kind="stable")
        return PackedIds(np.frombuffer(self.letters, np.uint8), shorten_numbers(lengths.cumsum()),
                         hashes[order], shorten_numbers(order))


def hash_ids(ids):
    """Return 64-bit hashes (n,) of n ids (bytes)."""
    digests = b"".join([blake2b(identifier, digest_size=8).digest() for identifier in ids])
    return np.frombuffer(digests, np.uint64)


def shorten_numbers(numbers):
    """Return non-negative numbers as uint32 if they all fit, else unchanged."""
    fits = not len(numbers) or numbers.max() < FOUR_BYTES
    return numbers.astype(np.uint32) if fits else numbers


def find_repeated(parts):
    """Return an id that occurs twice in these PackedIds, or None."""
    hashes = np.sort(np.concatenate([part.hashes for part in parts]))
    repeated = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    seen = set()
    for part in parts if len(repeated) else ():
        ranks = np.flatnonzero(np.isin(part.hashes, repeated))
        for identifier in part.ids(part.order[ranks].astype(np.int64)):
            if identifier in seen:
                return identifier
            seen.add(identifier)
    return None
