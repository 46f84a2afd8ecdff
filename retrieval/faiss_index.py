"""Search approximately with faiss: build, store and search indices of parts of the corpus."""
import math
import os
import re
import time
from contextlib import suppress

import faiss
import numpy as np

from records.files import new_file
from retrieval.exact_search import merge, part_range
from utils import InputError, gather_lists, progress_bar

ADDED = 16384      # vectors that are added to an index at once
SAVED_EVERY = 600  # seconds between two copies of an index that is being built
FAISS_METRICS = {"ip": faiss.METRIC_INNER_PRODUCT, "l2": faiss.METRIC_L2}


# ---------------------------------------------------------------- opening

def open_indices(folder, vectors, factory, metric, train_sample, seed, world):
    """Return [(index of the first vector, faiss index)] for the parts that this process searches.

    A folder holds one part per process that made the index. Any other number of processes can use
    the parts. If the set of parts is incomplete, each process builds its own part, or finishes
    one that a killed process has left.

    factory       faiss's string, such as IVF4096,PQ64
    metric        ip or l2
    train_sample  largest number of vectors to train a part on; None: 40 per list, at least 200,000

    Raises InputError if faiss cannot build this factory for the vectors, or a file is broken.
    """
    if train_sample is None:
        train_sample = choose_train_sample(factory)
    stem = f"{factory.replace(',', '_')}.{train_sample}.{seed}"
    # all processes use the number that the main process found before any process writes
    size = gather_lists([find_parts(folder, stem, len(vectors), world.size)], world)[0]
    if world.is_main:
        remove_unfinished(folder, stem, size)
    indices = []
    for rank in range(world.rank, size, world.size):
        first, last = part_range(len(vectors), rank, size)
        if first == last:
            continue  # with few vectors, some parts are empty
        path = part_path(folder, stem, rank, size)
        if not os.path.exists(path):
            build_part(vectors, first, last, path, factory, metric, train_sample, seed,
                       world.is_main)
        remove(unfinished_path(path))
        indices.append((first, read_index(path, last - first)))
    return indices


def choose_train_sample(factory):
    """Return how many vectors to train on: 40 per list of an IVF index, at least 200,000."""
    lists = re.search(r"IVF(\d+)", factory)
    return max(200_000, 40 * int(lists[1])) if lists else 200_000


def part_path(folder, stem, rank, size):
    """Return the path of one of `size` parts of an index."""
    return os.path.join(folder, f"{stem}.{rank}-of-{size}.faiss")


def unfinished_path(path):
    """Return the path of the copy of a part that is being built."""
    return path.removesuffix(".faiss") + ".unfinished.faiss"


def remove_unfinished(folder, stem, size):
    """Remove the unfinished parts that another number of processes has left."""
    names = re.compile(re.escape(stem) + r"\.\d+-of-(\d+)\.unfinished\.faiss")
    for name in os.listdir(folder):
        match = names.fullmatch(name)
        if match and int(match[1]) != size:
            remove(os.path.join(folder, name))


def remove(path):
    """Remove a file that is not needed, if it is there and the folder can be written."""
    with suppress(OSError):
        os.remove(path)


def find_parts(folder, stem, count, preferred_size):
    """Return the number of parts of the folder's index of `count` vectors.

    It is preferred_size if the folder has all these parts, or if it has no complete set of parts.
    """
    names = re.compile(re.escape(stem) + r"\.\d+-of-(\d+)\.faiss")
    sizes = {int(match[1]) for match in map(names.fullmatch, os.listdir(folder)) if match}
    for size in [preferred_size, *sorted(sizes)]:
        if has_all_parts(folder, stem, count, size):
            return size
    return preferred_size


def has_all_parts(folder, stem, count, size):
    """Return True if the folder has each of `size` parts, except empty ones."""
    for rank in range(size):
        first, last = part_range(count, rank, size)
        if first < last and not os.path.exists(part_path(folder, stem, rank, size)):
            return False
    return True


def write_index(index, path):
    """Write a faiss index, whole or not at all."""
    with new_file(path, "wb") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def read_index(path, count):
    """Return the faiss index in a file, with `count` vectors. Raises InputError if it is broken."""
    index = load_index(path)
    if index.ntotal != count:
        raise InputError(f"{path}: holds {index.ntotal} vectors, not {count}; delete it, and the "
                         "same command makes it again")
    return index


def load_index(path):
    """Return the faiss index in a file. Raises InputError if faiss cannot read it."""
    # With a wrong size in a broken file, faiss would fill memory with zeros for minutes. Vectors
    # take at most the file's size, and tables that faiss computes (IVF-PQ's) at most 2 GiB.
    faiss.set_deserialization_vector_byte_limit(os.path.getsize(path) + 2 ** 31)
    try:
        return faiss.read_index(path)
    except (RuntimeError, MemoryError) as error:  # MemoryError: a size in the file is wrong
        raise InputError(f"{path}: faiss cannot read it ({faiss_reason(error)}); delete it, and "
                         "the same command makes it again") from None


def faiss_reason(error):
    """Return the end of faiss's message, which has the reason."""
    return str(error).splitlines()[-1][-120:]


# ---------------------------------------------------------------- building

def build_part(vectors, first, last, path, factory, metric, train_sample, seed, is_main):
    """Build a faiss index of vectors[first:last] and write it to `path`. Raises InputError.

    The index is saved every ten minutes, and building continues from there after a kill. Only
    the index and either the training sample or ADDED vectors as float32 are in memory.
    """
    unfinished = unfinished_path(path)
    last_saved = time.monotonic()
    if os.path.exists(unfinished):
        index = load_index(unfinished)
    else:
        index = train_index(vectors, first, last, factory, metric, train_sample, seed)
    starts = range(first + index.ntotal, last, ADDED)
    for start in progress_bar(starts, desc="indexing", is_main=is_main):
        if time.monotonic() - last_saved > SAVED_EVERY:
            write_index(index, unfinished)
            last_saved = time.monotonic()
        try:
            index.add(vectors[start:min(start + ADDED, last)].astype(np.float32))
        except RuntimeError as error:
            raise InputError(f"--faiss_index_factory {factory}: this index needs ids for its "
                             f"vectors ({faiss_reason(error)}); choose another factory") from None
    write_index(index, path)


def train_index(vectors, first, last, factory, metric, train_sample, seed):
    """Return a trained, empty faiss index for vectors[first:last]. Raises InputError."""
    count, width = last - first, vectors.shape[1]
    flag = f"--faiss_index_factory {factory}"
    try:
        index = faiss.index_factory(width, factory, FAISS_METRICS[metric])
    except RuntimeError as error:
        raise InputError(f"{flag}: faiss cannot build this index for vectors of {width} numbers "
                         f"({faiss_reason(error)}); choose another factory") from None
    if "OPQ" in factory and min(train_sample, count) < width:  # faiss would abort
        raise InputError(f"{flag}: {min(train_sample, count):,} vectors are too few to train a "
                         f"rotation of {width} numbers; use Flat, or a factory without OPQ")
    if not index.is_trained:
        try:
            index.train(draw_sample(vectors, first, last, train_sample, seed))
        except RuntimeError as error:
            raise InputError(f"{flag}: {count:,} vectors are too few to train it "
                             f"({faiss_reason(error)}); use Flat, or fewer lists") from None
    return index


def draw_sample(vectors, first, last, train_sample, seed):
    """Draw at most train_sample of vectors[first:last], in file order, as float32."""
    drawn = np.random.default_rng(seed).permutation(last - first)[:train_sample]
    rows = first + np.sort(drawn)
    sample = np.empty((len(rows), vectors.shape[1]), np.float32)
    for start in range(0, len(rows), ADDED):
        sample[start:start + ADDED] = vectors[rows[start:start + ADDED]]
    return sample


# ---------------------------------------------------------------- searching

def search_indices(indices, query_vectors, k, metric, settings):
    """Return (doc_indices (Q, k), scores), numpy arrays, of the k best documents.

    The index is -1 if there are fewer documents. indices: from open_indices. settings: {nprobe,
    efSearch}; for a value of None, choose_settings decides. Raises InputError for a setting that an
    index does not have.
    """
    query_vectors = query_vectors.cpu().numpy()
    # what a process without a part merges: no document for any query
    shape = (len(query_vectors), 1)
    results = [(np.full(shape, -1), np.zeros(shape, np.float32))]
    for first, index in indices:
        set_parameters(index, choose_settings(index, k) | drop_none(settings))
        scores, rows = index.search(query_vectors, k)
        if metric == "l2":
            scores = -scores
        results.append((np.where(rows < 0, -1, rows + first), scores))
    return merge(results, k)


def drop_none(settings):
    """Return the settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def choose_settings(index, k):
    """Return {nprobe or efSearch: value} for a search of the k best, or {} for other index types.

    faiss's own defaults, one list and a breadth of 16, miss most of the best documents. In an IVF
    index, 2 sqrt(lists) lists are searched, or more, until they hold about 2 k vectors. HNSW gets a
    breadth of k, at least 64.
    """
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        enough = math.ceil(2 * k * inverted.nlist / max(1, inverted.ntotal))
        return {"nprobe": min(inverted.nlist, max(round(2 * math.sqrt(inverted.nlist)), enough))}
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    return {"efSearch": max(k, 64)} if isinstance(inner, faiss.IndexHNSW) else {}


def describe_search(index, k, settings):
    """Return a line for the log on how an index is searched, or "" for other index types."""
    chosen = choose_settings(index, k)
    used = chosen | drop_none(settings)
    if "nprobe" in chosen:
        lists = faiss.try_extract_index_ivf(index).nlist
        return f"{min(used['nprobe'], lists)} of {lists} lists are searched per query (--nprobe)"
    return f"a search has a breadth of {used['efSearch']} (--efSearch)" if chosen else ""


def set_parameters(index, settings):
    """Set a faiss index's search parameters. Raises InputError for one that it does not have."""
    for name, value in settings.items():
        try:
            faiss.ParameterSpace().set_index_parameter(index, name, value)
        except RuntimeError:
            raise InputError(f"--{name} is not a setting of this index; leave it out, or give "
                             "another --faiss_index_factory") from None
