"""The documents with the best scores: exact search of memory-mapped vectors, faiss's indices, the merge of several parts."""
import os

import faiss
import numpy as np
import torch
from tqdm import tqdm

from utils import InputError

BLOCK = 65536   # a process's part is a multiple of so many vectors, so that scores do not depend on the number of processes
TILE = 4096     # vectors that exact search scores at once on a CPU: their scores stay in its cache
QUERIES = 1024  # queries that it scores them for at once
ADDED = 16384   # vectors that an index takes at once


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
    room = torch.empty(min(QUERIES, len(asked)) * tile, device=device)  # for all tiles: freed ones would leave holes in the memory
    for start in tqdm(range(first, last, tile), desc="searching", leave=False, disable=True if quiet else None):
        block = torch.from_numpy(np.array(vectors[start:min(start + tile, last)])).to(device).float()
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
    return places[scores[rows[:, None], columns] > least[rows]].sort().values


def keep_best(rows, numbers, scores, count, k):
    """(rows, numbers, scores) of each row's k highest scores, by row and falling score; equal ones in the order given."""
    order = scores.argsort(descending=True, stable=True)
    order = order[rows[order].argsort(stable=True)]
    starts = torch.searchsorted(rows[order], torch.arange(count, device=rows.device))
    order = order[torch.arange(len(rows), device=rows.device) - starts[rows[order]] < k]
    return rows[order], numbers[order], scores[order]


# ---------------------------------------------------------------------------------------------------- faiss

def search_index(index, asked, k, first, metric, settings):
    """(numbers (Q, k), scores) by a faiss index of the rows from `first` on; settings {nprobe, efSearch}, None leaves them alone."""
    for name, value in settings.items():
        if value is not None:
            try:
                faiss.ParameterSpace().set_index_parameter(index, name, value)
            except RuntimeError:
                raise InputError(f"--{name} is no setting of this index; leave it out, or name another --faiss_index_factory") from None
    scores, numbers = index.search(asked.cpu().numpy(), k)
    return merge([(np.where(numbers < 0, -1, numbers + first), -scores if metric == "l2" else scores)], k)


def open_index(folder, vectors, first, last, factory, metric, sample, seed, quiet=False):
    """The faiss index of vectors[first:last], made from a sample of at most so many of them, or opened if the folder has it."""
    path = os.path.join(folder, f"{factory.replace(',', '_')}.{sample}.{seed}.{first}-{last}.faiss")
    if os.path.exists(path):
        return faiss.read_index(path)
    index, temporary = build_index(vectors, first, last, factory, metric, sample, seed, quiet), f"{path}.writing"
    try:
        faiss.write_index(index, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:
        raise InputError(f"{path}: cannot be written ({str(error).splitlines()[-1][-120:]}); make room") from None
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)
    return index


def build_index(vectors, first, last, factory, metric, sample, seed, quiet):
    """The trained and filled faiss index of vectors[first:last], a block in memory at a time. Raises InputError."""
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise InputError(f"--faiss_index_factory {factory}: faiss makes no such index of {vectors.shape[1]} numbers "
                         f"({str(error).splitlines()[-1][-120:]})") from None
    if not index.is_trained:
        rows = first + np.sort(np.random.default_rng(seed).permutation(last - first)[:sample])
        chosen = np.empty((len(rows), vectors.shape[1]), np.float32)
        for start in range(0, len(rows), ADDED):
            chosen[start:start + ADDED] = vectors[rows[start:start + ADDED]]
        try:
            index.train(chosen)
        except RuntimeError as error:
            raise InputError(f"--faiss_index_factory {factory}: {last - first:,} vectors are too few to train it "
                             f"({str(error).splitlines()[-1][-120:]}); use Flat, or fewer lists") from None
        del chosen
    for start in tqdm(range(first, last, ADDED), desc="indexing", leave=False, disable=True if quiet else None):
        index.add(vectors[start:min(start + ADDED, last)].astype(np.float32))
    return index
