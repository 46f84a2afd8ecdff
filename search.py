"""The documents with the best scores: exact search of memory-mapped vectors, faiss's and bm25s's indices, the merge of parts."""
import os
import re
import sys
import warnings
from array import array

import bm25s
import faiss
import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from utils import InputError, gather_lists, new_file, save_folder

BLOCK = 65536   # a process's part is a multiple of so many vectors, so that scores do not depend on the number of processes
TILE = 4096     # vectors that exact search scores at once on a CPU: their scores stay in its cache
QUERIES = 1024  # queries that it scores them for at once
ADDED = 16384   # vectors that an index takes at once
MERGED = 4096   # queries whose documents are merged over the processes at once


def best_by_place(scores, k):
    """(numbers, scores) of the k highest of scores (N,), equal ones by number."""
    k = min(k, len(scores))
    some = scores  # k maxima of groups bound the k-th highest score from below, and are found twice as fast
    if len(scores) >= 32 * k:
        some = np.maximum.reduce(scores[:len(scores) // 32 * 32].reshape(32, -1))
    numbers = np.flatnonzero(scores >= np.partition(some, -k)[-k])
    numbers = numbers[np.argsort(-scores[numbers], kind="stable")][:k]
    return numbers, scores[numbers]


def merge(parts, k):
    """The k best of several (numbers, scores), each (n, k_i); equal scores by number, -1 last."""
    numbers, scores = (np.concatenate(arrays, 1) for arrays in zip(*parts))
    scores = np.where(numbers < 0, -np.inf, scores)
    order = np.lexsort((numbers, -scores), axis=1)[:, :k]
    return np.take_along_axis(numbers, order, 1), np.take_along_axis(scores, order, 1)


def merge_processes(numbers, scores, k, world):
    """The k best of all processes' (numbers, scores), each (Q, at most k), on the main process; (None, None) on the others."""
    if world.size == 1:
        return numbers, scores
    fill, merged = [(0, 0), (0, k - numbers.shape[1])], []  # a part may have fewer documents
    numbers, scores = np.pad(numbers, fill, constant_values=-1), np.pad(scores, fill)
    for start in range(0, len(numbers), MERGED):
        parts = []
        for values in (numbers, scores):
            own = torch.from_numpy(values[start:start + MERGED]).to(world.device)
            parts.append([torch.empty_like(own) for _ in range(world.size)] if world.is_main else None)
            dist.gather(own, parts[-1])
        if world.is_main:
            merged.append(merge([(number.cpu().numpy(), score.cpu().numpy()) for number, score in zip(*parts)], k))
    return tuple(map(np.concatenate, zip(*merged))) if world.is_main else (None, None)


# ---------------------------------------------------------------------------------------------------- exact search

@torch.no_grad()
def search_exactly(vectors, asked, first, last, k, metric, quiet=False):
    """(numbers (Q, k), scores) of the k rows of vectors[first:last] that are best for asked (Q, D); equal scores by number.

    One tile of scores is made at a time, on the device of `asked`. Of a tile only scores above the query's k-th best so far are
    kept (later numbers lose ties), and they are sorted when k per query have come together. metric: ip, or l2 (scores are minus
    squared distances).
    """
    k, device, tile = min(k, last - first), asked.device, TILE if asked.device.type == "cpu" else BLOCK
    least, waiting = torch.full((len(asked), 1), -torch.inf, device=device), 0
    found = [tuple(torch.zeros(0, dtype=dtype, device=device) for dtype in (torch.int64, torch.int64, torch.float32))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a mapping that is not writable: it is only read
        vectors = torch.from_numpy(vectors)
    room = torch.empty(min(QUERIES, len(asked)) * tile, device=device)  # for all tiles: freed ones would leave holes in the memory
    for start in tqdm(range(first, last, tile), desc="searching", leave=False, disable=True if quiet else None):
        block = vectors[start:min(start + tile, last)].to(device).float()
        for begin in range(0, len(asked), QUERIES):
            part = asked[begin:begin + QUERIES]
            scores = torch.mm(part, block.T, out=room[:len(part) * len(block)].view(len(part), len(block)))
            if metric == "l2":
                scores.mul_(2).sub_(block.square().sum(1)).sub_(part.square().sum(1, keepdim=True))
            if start == first and k < len(block):  # what is below the k-th best of the first tile is out from the start
                least[begin:begin + QUERIES] = scores.topk(k).values[:, -1:].nextafter(least.new_tensor(-torch.inf))
            places = above(scores, least[begin:begin + QUERIES])
            rows = places.div(len(block), rounding_mode="floor")
            found.append((rows + begin, places - rows * len(block) + start, scores.flatten()[places]))
            waiting += len(places)
        if waiting >= len(asked) * k or start + tile >= last:
            found, waiting = [keep_best(*map(torch.cat, zip(*found)), len(asked), k)], 0
            if len(found[0][0]) == len(asked) * k:
                least = found[0][2].view(-1, k)[:, -1:].clone()
    return tuple(values.view(len(asked), k).cpu().numpy() for values in found[0][1:])


def above(scores, least):
    """Places, rising, in the flattened scores (n, N) of those above least (n, 1).

    The maxima of groups of 16 columns are compared first, which is three times as fast as comparing all scores.
    """
    count, width = scores.shape
    groups = scores.view(count, 16 if width % 16 == 0 else 1, -1)
    rows, group = (groups.amax(1) > least).nonzero(as_tuple=True)
    columns = group[:, None] + torch.arange(0, width, groups.shape[2], device=scores.device)
    places = rows[:, None] * width + columns
    places = places[scores[rows[:, None], columns] > least[rows]]
    if places.device.type == "cpu":  # numpy sorts ten times as fast as torch there
        return torch.from_numpy(np.sort(places.numpy()))
    return places.sort().values


def keep_best(rows, numbers, scores, count, k):
    """(rows, numbers, scores) of each row's k highest scores, by row and falling score; equal ones in the order given."""
    order = scores.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    starts = torch.searchsorted(rows[order], torch.arange(count, device=rows.device))
    order = order[torch.arange(len(rows), device=rows.device) - starts[rows[order]] < k]
    return rows[order], numbers[order], scores[order]


# ---------------------------------------------------------------------------------------------------- faiss

def search_indices(indices, asked, k, metric, settings):
    """(numbers (Q, k), scores) by [(first row, faiss index)]; settings {nprobe, efSearch}, None leaves them alone. Raises InputError."""
    found = [(np.full((len(asked), 1), -1), np.zeros((len(asked), 1), np.float32))]
    for first, index in indices:
        for name, value in settings.items():
            try:
                if value is not None:
                    faiss.ParameterSpace().set_index_parameter(index, name, value)
            except RuntimeError:
                raise InputError(f"--{name} is no setting of this index; leave it out, or name another --faiss_index_factory") from None
        scores, numbers = index.search(asked.cpu().numpy(), k)
        found.append((np.where(numbers < 0, -1, numbers + first), -scores if metric == "l2" else scores))
    return merge(found, k)


def reason(error):
    """The end of faiss's message, which says what was wrong."""
    return str(error).splitlines()[-1][-120:]


def part_range(count, part, size):
    """(first, last) of one of `size` parts of the rows: whole BLOCKs, so that a few rows leave parts empty."""
    return tuple(min(count, BLOCK * (-(-count // BLOCK) * i // size)) for i in (part, part + 1))


def open_indices(folder, vectors, factory, metric, sample, seed, world):
    """[(first row, faiss index)] that this process searches: its share of the parts that the folder has, or its own part, made now.

    Parts made by any number of processes serve any other number. sample: vectors that a part is trained on at most; None is 40 per
    list, 200,000 at least. Raises InputError.
    """
    lists = re.search(r"IVF(\d+)", factory)
    sample = sample or max(200_000, 40 * int(lists[1]) if lists else 0)
    stem = f"{factory.replace(',', '_')}.{sample}.{seed}"

    def part_path(part, size):
        return f"{folder}/{stem}.{part}-of-{size}.faiss"

    def missing(size):
        ranges = enumerate(part_range(len(vectors), part, size) for part in range(size))
        return any(first < last and not os.path.exists(part_path(part, size)) for part, (first, last) in ranges)
    made = {int(name[1]) for name in map(re.compile(re.escape(stem) + r"\.\d+-of-(\d+)\.faiss").fullmatch, os.listdir(folder)) if name}
    size = next((size for size in sorted(made, key=lambda size: size != world.size) if not missing(size)), world.size)
    size = gather_lists([size], world)[0]  # as the main process sees it, before one of them writes
    indices = []
    for part in range(world.rank, size, world.size):
        first, last = part_range(len(vectors), part, size)
        if first < last:
            path = part_path(part, size)
            if not os.path.exists(path):
                write_index(build_index(vectors, first, last, factory, metric, sample, seed, not world.is_main), path)
            indices.append((first, read_index(path)))
    return indices


def write_index(index, path):
    """A faiss index as a file, whole or not at all."""
    with new_file(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def read_index(path):
    """The faiss index of a file. Raises InputError."""
    try:
        return faiss.read_index(path)
    except RuntimeError as error:
        raise InputError(f"{path}: faiss cannot read it ({reason(error)}); delete it, the same command makes it "
                         "again") from None


def build_index(vectors, first, last, factory, metric, sample, seed, quiet):
    """The trained and filled faiss index of vectors[first:last], a block in memory at a time. Raises InputError."""
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"--faiss_index_factory {factory}: faiss makes no such index of {vectors.shape[1]} numbers "
                         f"({reason(error)})") from None
    if "OPQ" in factory and min(sample, last - first) < vectors.shape[1]:  # faiss would abort
        raise InputError(f"--faiss_index_factory {factory}: {min(sample, last - first):,} vectors are too few to train a rotation of "
                         f"{vectors.shape[1]} numbers; use Flat, or a factory without OPQ")
    if not index.is_trained:
        rows = first + np.sort(np.random.default_rng(seed).permutation(last - first)[:sample])
        chosen = np.empty((len(rows), vectors.shape[1]), np.float32)
        for start in range(0, len(rows), ADDED):
            chosen[start:start + ADDED] = vectors[rows[start:start + ADDED]]
        try:
            index.train(chosen)
        except RuntimeError as error:
            raise InputError(f"--faiss_index_factory {factory}: {last - first:,} vectors are too few to train it "
                             f"({reason(error)}); use Flat, or fewer lists") from None
        del chosen
    for start in tqdm(range(first, last, ADDED), desc="indexing", leave=False, disable=True if quiet else None):
        try:
            index.add(vectors[start:min(start + ADDED, last)].astype(np.float32))
        except RuntimeError as error:
            raise InputError(f"--faiss_index_factory {factory}: takes no vectors without ids "
                             f"({reason(error)})") from None
    return index


# ---------------------------------------------------------------------------------------------------- BM25

def bm25_words(stopwords, stemmer):
    """bm25s's stop words and stemmer by their languages; 'none' or None for none. Raises InputError."""
    try:
        bm25s.tokenize([""], stopwords=stopwords, show_progress=False)
    except ValueError as error:
        raise InputError(f"--stopwords {error}; or say none") from None
    if stemmer:
        try:
            import Stemmer
            stemmer = Stemmer.Stemmer(stemmer)
        except ImportError:
            raise InputError("--stemmer needs the package PyStemmer: pip install PyStemmer") from None
        except KeyError:
            raise InputError(f"--stemmer {stemmer}: choose of {', '.join(Stemmer.algorithms())}") from None
    return {"stopwords": stopwords, "stemmer": stemmer}


def build_bm25(folder, corpus, words, k1, b):
    """Makes bm25s's index of a corpus. Raises InputError."""
    index, tokens = bm25s.BM25(k1=k1, b=b), TokenLists(bm25s.tokenization.Tokenizer(**words), corpus)
    if not tokens.flat:
        raise InputError(f"{corpus.parts[0].path}: no document has a word besides stop words; use --stopwords none, or "
                         "another --key_template")
    index.index(tokens, show_progress=sys.stderr.isatty())

    def save(temporary):
        index.save(temporary)
        bm25s.BM25.load(temporary, mmap=True)  # np.save, which it uses, does not notice a full disk
    try:
        save_folder(folder, save)
    except ValueError:
        raise InputError(f"{folder}: the index could not be written whole; make room") from None


def load_bm25(folder):
    """bm25s's index of a folder, its arrays mapped. Raises InputError."""
    try:
        return bm25s.BM25.load(folder, mmap=True)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: bm25s cannot open the index ({error}); copy it again, or delete the folder") from None


class TokenLists:
    """A corpus for bm25s: the documents' token ids in one array, 4 bytes each, and the vocabulary."""

    def __init__(self, tokenizer, corpus):
        self.flat, self.ends = array("i"), array("q", [0])
        texts = tqdm(map(corpus.text, range(len(corpus))), total=len(corpus), desc="tokenizing", leave=False, disable=None)
        for ids in tokenizer.streaming_tokenize(texts, allow_empty=False):
            self.flat.extend(ids)
            self.ends.append(len(self.flat))
        self.ids, self.vocab = self, tokenizer.get_vocab_dict()

    def __len__(self):
        return len(self.ends) - 1

    def __iter__(self):
        return (self.flat[start:end] for start, end in zip(self.ends, self.ends[1:]))
