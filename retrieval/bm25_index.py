"""Build and open the files of a BM25 index: a corpus's postings in parts that fit in memory.

With V words and P parts, the folder holds

    words.NAME.npy      the vocabulary in the order of its letters: records.ids.PackedIds
    idf.npy             (V) float32, for the second pass, by the frequencies in the whole corpus
    parts.npy           (P + 1) each part's first document, and the number of documents
    0.starts.npy        (V + 1) where each word's postings start in part 0
    0.documents.npy     a word's documents, in ascending order, counted from the part's first
    0.scores.npy        float32, the word's score in each of them
    index.json          the fingerprint, which is named unfinished.json until all parts are scored

A first pass counts each part's words, a second one turns the counts into scores. Both divide the
parts among the processes. In between, the main process merges the parts' vocabularies. Each pass
skips what a killed build has finished: a step's last file marks it as done.
"""
import math
import os
from array import array
from typing import NamedTuple

import numpy as np

from records.files import write_array
from records.ids import IdPacker, PackedIds, shorten_numbers
from retrieval.fingerprint import UNFINISHED, remove_index
from utils import InputError, progress_bar, refusing, wait_for_all

FORMAT = 2                # of the files; 1: those of bm25s
PART_DOCUMENTS = 2 ** 20  # most documents of a part; building takes about 3 GB for a part
PART_BYTES = 2 ** 30      # most bytes of a part's documents, unless a single one has more
BAR_STEP = 1024           # documents between two moves of the bar
BLOCK = 2 ** 22           # postings that are scored at once
TEMPORARY = ("words", "frequencies", "lengths", "counts")  # a part's files between the passes


class Part(NamedTuple):
    """Hold the postings of a range of documents, memory-mapped."""
    first: int             # index of its first document
    count: int             # number of its documents
    starts: np.ndarray     # (V + 1)
    documents: np.ndarray  # counted from `first`
    scores: np.ndarray     # float32

    def postings(self, token):
        """Return (documents, scores) of a word by its number."""
        start, end = self.starts[token], self.starts[token + 1]
        return self.documents[start:end], self.scores[start:end]


class Index(NamedTuple):
    """Hold an open index."""
    vocabulary: PackedIds
    parts: list

    def tokens(self, words):
        """Return the numbers of the words that occur in the corpus, in their order."""
        tokens = self.vocabulary.indices([word.encode() for word in words])
        return tokens[tokens >= 0]


# ---------------------------------------------------------------- files

def save_array(folder, name, values):
    """Write FOLDER/NAME.npy, whole or not at all. Raises InputError."""
    write_array(os.path.join(folder, f"{name}.npy"), values)


def open_array(folder, name, kinds):
    """Return FOLDER/NAME.npy, memory-mapped. Raises InputError if it is broken.

    kinds: the kinds of numbers (numpy's dtype.kind) that it may hold.
    """
    path = os.path.join(folder, f"{name}.npy")
    with refusing(f"{path}: cannot be opened", f"copy it again, or delete {folder}, and the same "
                  "command makes the index again"):
        values = np.lib.format.open_memmap(path, "r")
        is_whole = values.offset + values.nbytes == os.path.getsize(path)
        if values.ndim != 1 or values.dtype.kind not in kinds or not is_whole:
            raise ValueError(f"its header has {values.dtype} {values.shape}, which does not fit")
        return np.asarray(values)  # slices of a memmap are made slowly


def has_array(folder, name):
    """Return True if FOLDER/NAME.npy exists; a file that exists is whole."""
    return os.path.exists(os.path.join(folder, f"{name}.npy"))


def open_index(folder, count):
    """Return the Index of `count` documents. Raises InputError if it is broken."""
    ids = [open_array(folder, f"words.{name}", "u") for name in PackedIds._fields]
    vocabulary, idf = PackedIds(*ids), open_array(folder, "idf", "f")
    bounds = open_array(folder, "parts", "i")
    parts = []
    for i, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        parts.append(Part(first, last - first, open_array(folder, f"{i}.starts", "iu"),
                          open_array(folder, f"{i}.documents", "i"),
                          open_array(folder, f"{i}.scores", "f")))
    fits = [len(bounds) > 1 and bounds[-1] == count, len(idf) == len(vocabulary.order) == len(
        vocabulary.hashes) == len(vocabulary.offsets) - 1]
    for part in parts:
        fits.append(len(part.starts) == len(idf) + 1 and (
            len(part.scores) == len(part.documents) == part.starts[-1]))
    if not all(fits):
        raise InputError(f"{folder}: its files do not belong together, or to a corpus of {count} "
                         "documents; copy it again, or delete it, and the same command makes it "
                         "again")
    return Index(vocabulary, parts)


# ---------------------------------------------------------------- building

def build_index(folder, corpus, words, k1, b, world):
    """Build the index of a corpus with all processes, or finish one that was interrupted.

    words: a retrieval.bm25.Words. Raises InputError if no document has a word, the disk is full, or
    a file of the interrupted build is broken.
    """
    if world.is_main and not has_array(folder, "parts"):
        save_array(folder, "parts", divide(corpus))
    wait_for_all(world)
    if not has_array(folder, "parts"):
        raise InputError(f"{folder}: process {world.rank} does not see the files of process 0; put "
                         "the folder on a shared disk")
    bounds = open_array(folder, "parts", "i").tolist()
    parts = range(len(bounds) - 1)

    share = [i for i in parts[world.rank::world.size] if not has_array(folder, f"{i}.documents")]
    bar = progress_bar(total=sum(bounds[i + 1] - bounds[i] for i in share), desc="tokenizing",
                       is_main=world.is_main)
    for i in share:
        count_part(folder, i, corpus, range(bounds[i], bounds[i + 1]), words, bar)
    bar.close()
    wait_for_all(world)

    if world.is_main and not has_array(folder, "idf"):
        merge_words(folder, corpus, len(parts))
    wait_for_all(world)

    share = [i for i in parts[world.rank::world.size] if not has_array(folder, f"{i}.scores")]
    if share:
        lengths = [open_array(folder, f"{i}.lengths", "i") for i in parts]
        mean_length = sum(int(part.sum()) for part in lengths) / len(corpus)
        for i in progress_bar(share, desc="scoring", is_main=world.is_main):
            score_part(folder, i, lengths[i], mean_length, k1, b)
    wait_for_all(world)

    if world.is_main:
        for i in parts:
            for name in TEMPORARY:
                if has_array(folder, f"{i}.{name}"):
                    os.remove(os.path.join(folder, f"{i}.{name}.npy"))
        os.replace(os.path.join(folder, UNFINISHED), os.path.join(folder, "index.json"))


def divide(corpus):
    """Return the first document of each part of a corpus, and the number of documents."""
    sizes = [np.diff(part.starts) for part in corpus.parts]
    ends = np.cumsum(np.concatenate(sizes))  # the bytes up to each document's end
    bounds = [0]
    while bounds[-1] < len(corpus):
        first = bounds[-1]
        begin = ends[first - 1] if first else 0
        last = int(np.searchsorted(ends, begin + PART_BYTES, side="right"))
        bounds.append(min(max(last, first + 1), first + PART_DOCUMENTS, len(corpus)))
    return np.array(bounds)


class Numbering(dict):
    """Number words in the order in which they are first looked up; stop words get -1.

    Words with the same stem have the same number.
    """

    def __init__(self, words):
        super().__init__()
        self.words = words
        self.stems = {}

    def __missing__(self, word):
        number = -1
        if word not in self.words.stopwords:
            stem = self.words.stemmer.stemWord(word) if self.words.stemmer else word
            number = self.stems.setdefault(stem, len(self.stems))
        self[word] = number
        return number


def count_part(folder, i, corpus, doc_indices, words, bar):
    """Write the words of part i, how often each document has each of them, and lengths."""
    numbering = Numbering(words)
    flat, lengths = array("i"), array("i")  # the numbers of all words; the words of each document
    for position, doc_index in enumerate(doc_indices, 1):
        numbers = map(numbering.__getitem__, words.split(corpus.text(doc_index)))
        kept = [number for number in numbers if number >= 0]
        flat.extend(kept)
        lengths.append(len(kept))
        if position % BAR_STEP == 0:
            bar.update(BAR_STEP)
    bar.update(len(doc_indices) % BAR_STEP)

    # words are numbered again in the order of their letters, which is the same in all parts
    spelled = sorted(numbering.stems)
    ranks = np.empty(len(spelled), np.int64)
    ranks[[numbering.stems[word] for word in spelled]] = np.arange(len(spelled))
    lengths = np.frombuffer(lengths, np.int32)
    occurrences = ranks[np.frombuffer(flat, np.int32)]
    del numbering, flat
    # a word's number and its document in one integer: sorting brings equal pairs together
    occurrences *= len(lengths)
    occurrences += np.repeat(np.arange(len(lengths)), lengths)
    occurrences.sort()
    firsts = np.flatnonzero(np.diff(occurrences, prepend=-1))
    counts = np.diff(firsts, append=len(occurrences))
    numbers, documents = np.divmod(occurrences[firsts], len(lengths))

    letters = np.frombuffer("\n".join(spelled).encode(), np.uint8)
    save_array(folder, f"{i}.words", letters)
    frequencies = np.bincount(numbers, minlength=len(spelled))
    save_array(folder, f"{i}.frequencies", shorten_numbers(frequencies))
    save_array(folder, f"{i}.lengths", lengths)
    save_array(folder, f"{i}.counts", counts.astype(np.min_scalar_type(counts.max(initial=0))))
    save_array(folder, f"{i}.documents", documents.astype(np.int32))  # last: the part is counted


def read_words(folder, i):
    """Return the list of the words of part i, in the order of their letters."""
    letters = bytes(open_array(folder, f"{i}.words", "u")).decode()
    return letters.split("\n") if letters else []


def merge_words(folder, corpus, num_parts):
    """Write the vocabulary of all parts, its idf, and where each word's postings start."""
    union = set()
    for i in progress_bar(range(num_parts), desc="merging vocabularies"):
        union.update(read_words(folder, i))
    if not union:
        remove_index(folder)
        raise InputError(f"{corpus.parts[0].path}: no document has a word except stop words; use "
                         "--stopwords none, or another --key_template")
    spelled = sorted(union)
    del union
    tokens = {word: token for token, word in enumerate(spelled)}
    frequencies = np.zeros(len(spelled), np.int64)
    for i in progress_bar(range(num_parts), desc="numbering words"):
        in_part = np.array([tokens[word] for word in read_words(folder, i)], np.int64)
        sizes = np.zeros(len(spelled), np.int64)
        sizes[in_part] = open_array(folder, f"{i}.frequencies", "iu")
        frequencies += sizes
        save_array(folder, f"{i}.starts", shorten_numbers(np.append(0, np.cumsum(sizes))))
    del tokens

    packer = IdPacker()
    for start in range(0, len(spelled), BLOCK):
        packer.add([word.encode() for word in spelled[start:start + BLOCK]])
    for name, values in packer.pack()._asdict().items():
        save_array(folder, f"words.{name}", values)
    save_array(folder, "idf", inverse_frequencies(frequencies, len(corpus)))  # last: all is merged


def inverse_frequencies(frequencies, count):
    """Return the idf (float32) of words by the number of their documents, among `count`.

    Lucene's variant, as in bm25s.
    """
    distinct, places = np.unique(frequencies, return_inverse=True)
    idf = [math.log(1 + (count - frequency + 0.5) / (frequency + 0.5))
           for frequency in distinct.tolist()]
    return np.array(idf, np.float32)[places]


def score_part(folder, i, lengths, mean_length, k1, b):
    """Write the scores of part i: idf * count / (count + k1 * (1 - b + b * length / mean_length)).
    """
    starts = open_array(folder, f"{i}.starts", "iu")
    documents, counts = open_array(folder, f"{i}.documents", "i"), open_array(
        folder, f"{i}.counts", "u")
    idf = np.repeat(open_array(folder, "idf", "f"), np.diff(starts))
    saturation = k1 * ((1 - b) + b * lengths / mean_length)  # float64, as in bm25s
    scores = np.empty(len(documents), np.float32)
    for start in range(0, len(documents), BLOCK):
        block = slice(start, start + BLOCK)
        scores[block] = idf[block] * (counts[block] / (saturation[documents[block]]
                                                       + counts[block]))
    save_array(folder, f"{i}.scores", scores)
