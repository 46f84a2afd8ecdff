"""Search exactly: score all vectors, a block at a time, and keep the best documents.

Equal scores are ranked by document index, and each process takes whole blocks. The result is
therefore the same for any number of processes.
"""
import math
import warnings

import numpy as np
import torch
import torch.distributed as dist

from utils import progress_bar

BLOCK = 16384   # vectors that are scored at once
QUERIES = 1024  # queries that a block is scored for at once
MANY = 4        # candidates per best document above which a block is ranked as a whole
MERGED = 4096   # queries whose results are merged over the processes at once
# Each process's part has a multiple of this many vectors. It is a multiple of BLOCK, so that all
# products have the same shape for any number of processes: the last bits of scores depend on it.
# The files of faiss indices hold the same parts.
PART_UNIT = 65536


def top_k(scores, k):
    """Return (values, columns), each (n, k'), of the k highest scores in each row of scores (n, K).

    They are sorted; equal scores are ordered by ascending column. k' is the smaller of k and K.
    """
    width = scores.shape[1]
    k = min(k, width)
    # torch.topk breaks ties arbitrarily; a value beyond the k-th shows whether it has cut a tie
    values, columns = scores.topk(min(k + 1, width))
    if k < width:
        is_cut_tie = values[:, k - 1] == values[:, k]
        values, columns = values[:, :k], columns[:, :k]
        for row in is_cut_tie.nonzero().flatten().tolist():
            # candidates are in the order of their columns, which a stable sort keeps among ties
            candidates = (scores[row] >= values[row, -1]).nonzero().flatten()
            best = scores[row, candidates].sort(descending=True, stable=True).indices[:k]
            columns[row] = candidates[best]
            values[row] = scores[row, columns[row]]
    # sort by column, then stably by score, so that equal scores are ordered by column
    columns, order = columns.sort(dim=1)
    values, by_score = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, by_score)


@torch.no_grad()
def search_blocks(query_vectors, blocks, k, metric="ip"):
    """Return (doc_indices (Q, k'), scores (Q, k')) of the k best documents for each query.

    query_vectors: (Q, D); the results are on their device. blocks: an iterable, in the order of the
    corpus, of (first document's index, vectors (n, D) of any float type). metric: ip (inner
    product; for unit vectors, the cosine) or l2 (minus squared distances). k' is less than k if
    there are fewer documents.
    """
    device = query_vectors.device
    make_best = BestOnCPU if device.type == "cpu" else BestOnGPU
    slices = query_vectors.float().split(QUERIES)
    best = [make_best(len(part), k, device) for part in slices]
    for_vectors, for_scores = Buffer(device), Buffer(device)
    for first, vectors in blocks:
        if vectors.dtype != torch.float32 or vectors.device != device:
            vectors = for_vectors.take(*vectors.shape).copy_(vectors)
        for part, part_best in zip(slices, best):
            scores = for_scores.take(len(part), len(vectors))
            part_best.add(score_block(part, vectors, metric, scores), first)
    results = [part_best.result() for part_best in best]
    return torch.cat([indices for indices, _ in results]), torch.cat([s for _, s in results])


class Buffer:
    """Provide float32 memory that is used again for each block.

    On a CPU, the page faults of new memory take eight times as long as converting a block to
    float32, and a tenth of the time of a matrix product.
    """

    def __init__(self, device):
        self.memory = torch.empty(0, device=device)

    def take(self, *shape):
        """Return a tensor of this shape; it is valid until the next call."""
        size = math.prod(shape)
        if len(self.memory) < size:
            self.memory = self.memory.new_empty(size)
        return self.memory[:size].view(shape)


def score_block(query_vectors, vectors, metric, scores):
    """Write the scores of float32 vectors (n, D) for query_vectors (Q, D) to scores (Q, n).

    Returns scores.
    """
    # without autocast: the vectors of a bfloat16 model are searched in float32, too
    with torch.autocast(scores.device.type, enabled=False):
        torch.mm(query_vectors, vectors.T, out=scores)
    if metric == "l2":  # -|q - v|^2 = 2 q.v - |v|^2 - |q|^2
        scores.mul_(2)
        scores.sub_(vectors.square().sum(1))
        scores.sub_(query_vectors.square().sum(1, keepdim=True))
    return scores


class BestOnGPU:
    """Keep the k best documents of each query: the best of each block are merged with those so far.

    This plain form works on any device; tests compare BestOnCPU with it.
    """

    def __init__(self, num_queries, k, device):
        self.k = k
        self.scores = torch.zeros(num_queries, 0, device=device)
        self.indices = torch.zeros(num_queries, 0, dtype=torch.int64, device=device)

    def add(self, scores, first):
        """Add the scores (Q, n) of documents first, first + 1, ..., which follow those so far."""
        values, columns = top_k(scores, self.k)
        # the best so far come first: they have lower document indices, so they win ties
        values = torch.cat([self.scores, values], dim=1)
        indices = torch.cat([self.indices, columns + first], dim=1)
        self.scores, columns = top_k(values, self.k)
        self.indices = indices.gather(1, columns)

    def result(self):
        """Return (doc_indices, scores), each (Q, k')."""
        return self.indices, self.scores


class BestOnCPU:
    """Keep the k best documents of each query, with as few operations on all scores as possible.

    After the first blocks few documents are better than the k-th so far. Only these candidates are
    collected, and they are merged when there are as many as best documents.
    """

    def __init__(self, num_queries, k, device):
        self.k = k
        self.scores = np.zeros((num_queries, 0), np.float32)
        self.indices = np.zeros((num_queries, 0), np.int64)
        self.candidates = []    # (queries, document indices, scores), each (n)
        self.num_candidates = 0

    def add(self, scores, first):
        """Add the scores (Q, n) of documents first, first + 1, ..., which follow those so far."""
        if self.scores.shape[1] == self.k:
            # a document with the k-th score itself loses the tie, because its index is higher
            is_better = scores.numpy() > self.scores[:, -1:]
            better = np.flatnonzero(is_better)
            queries, columns = np.divmod(better, scores.shape[1])
        if self.scores.shape[1] < self.k or len(better) > MANY * self.scores.size:
            columns = top_k(scores, self.k)[1].numpy()
            queries = np.repeat(np.arange(len(columns)), columns.shape[1])
            columns = columns.ravel()
        self.candidates.append((queries, columns + first, scores.numpy()[queries, columns]))
        self.num_candidates += len(queries)
        if self.num_candidates >= self.scores.size:
            self.merge_candidates()

    def merge_candidates(self):
        """Merge the candidates into the best documents."""
        num_queries, width = self.scores.shape
        best_queries = np.repeat(np.arange(num_queries), width)
        best = (best_queries, self.indices.ravel(), self.scores.ravel())
        queries, indices, scores = map(np.concatenate, zip(best, *self.candidates))
        # a stable sort by query, then score: equal scores stay in the order of their documents
        order = np.lexsort((-scores, queries.astype(np.int16)))
        counts = np.bincount(queries, minlength=num_queries)
        starts = np.cumsum(counts) - counts
        chosen = order[starts[:, None] + np.arange(min(self.k, counts.min(initial=self.k)))]
        self.indices, self.scores = indices[chosen], scores[chosen]
        self.candidates, self.num_candidates = [], 0

    def result(self):
        """Return (doc_indices, scores), each (Q, k')."""
        if self.candidates:
            self.merge_candidates()
        return torch.from_numpy(self.indices), torch.from_numpy(self.scores)


def search_vectors(vectors, query_vectors, first, last, k, metric, is_main=True):
    """Search vectors[first:last] of a memory-mapped array by search_blocks; return numpy arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a read-only array, but it is never written
        vectors = torch.from_numpy(vectors)
    starts = progress_bar(range(first, last, BLOCK), desc="searching", is_main=is_main)
    blocks = ((start, vectors[start:min(start + BLOCK, last)]) for start in starts)
    doc_indices, scores = search_blocks(query_vectors, blocks, k, metric)
    return doc_indices.cpu().numpy(), scores.cpu().numpy()


# ---------------------------------------------------------------- parts

def part_range(count, rank, size, unit=None):
    """Return (first, last) of one process's part of `count` vectors.

    Each part has a multiple of `unit` vectors (default: PART_UNIT); if there are few vectors, some
    parts are empty.
    """
    unit = unit or PART_UNIT  # not a default argument, because tests change the constant
    units = -(-count // unit)
    first = min(count, unit * (units * rank // size))
    last = min(count, unit * (units * (rank + 1) // size))
    return first, last


def merge(parts, k):
    """Merge several (doc_indices, scores), each (n, k_i), into the k best of each row.

    The index -1 means no document, and comes last.
    """
    doc_indices = np.concatenate([indices for indices, _ in parts], axis=1)
    scores = np.concatenate([scores for _, scores in parts], axis=1)
    scores = np.where(doc_indices < 0, -np.inf, scores)
    order = np.lexsort((doc_indices, -scores), axis=1)[:, :k]
    return np.take_along_axis(doc_indices, order, 1), np.take_along_axis(scores, order, 1)


def merge_processes(doc_indices, scores, k, world):
    """Merge all processes' (doc_indices, scores), numpy arrays (Q, at most k), into the k best.

    Returns them on the main process, and (None, None) on the others. If all parts together have
    fewer than k documents, the remaining indices are -1.
    """
    if world.size == 1:
        return doc_indices, scores
    missing = k - doc_indices.shape[1]  # this part may have fewer than k documents
    doc_indices = np.pad(doc_indices, [(0, 0), (0, missing)], constant_values=-1)
    scores = np.pad(scores, [(0, 0), (0, missing)])
    merged = []
    for start in range(0, len(doc_indices), MERGED):
        end = start + MERGED
        all_indices = gather_arrays(doc_indices[start:end], world)
        all_scores = gather_arrays(scores[start:end], world)
        if world.is_main:
            merged.append(merge(list(zip(all_indices, all_scores)), k))
    if not world.is_main:
        return None, None
    doc_indices = np.concatenate([indices for indices, _ in merged])
    return doc_indices, np.concatenate([scores for _, scores in merged])


def gather_arrays(array, world):
    """Return, on the main process, all processes' arrays of equal shape; None on the others."""
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(world.device)
    tensors = [torch.empty_like(tensor) for _ in range(world.size)] if world.is_main else None
    dist.gather(tensor, tensors)
    return [tensor.cpu().numpy() for tensor in tensors] if world.is_main else None
