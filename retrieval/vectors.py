"""Encode a corpus into one memory-mapped array of vectors, on all processes; resume if killed.

An index folder holds vectors.npy (N, D), done.npy (a mark per block of documents) and index.json
(the fingerprint).
"""
import math
import os
from collections import deque
from contextlib import nullcontext

import numpy as np
import torch

from records.files import lock, write_json
from retrieval.fingerprint import await_index, check_fingerprint
from training.loop import make_loader
from utils import (
    InputError,
    gather_lists,
    progress_bar,
    refusing,
    shorten,
    start_copy_to_host,
    sum_over_processes,
    wait_for_all,
)

DONE_BLOCK = 4096  # documents that are encoded, written and marked as done together
DTYPES = ("float16", "float32", "uint8")  # types of vectors, and of marks


class TokenBlocks(torch.utils.data.Dataset):
    """Provide blocks of documents, which a loader's workers read and tokenise.

    An item is (block, token ids of its documents, indices of its documents without text).
    """

    def __init__(self, corpus, tokenize):
        self.corpus, self.tokenize = corpus, tokenize

    def __getitem__(self, block):
        last = min((block + 1) * DONE_BLOCK, len(self.corpus))
        texts = [self.corpus.text(doc_index) for doc_index in range(block * DONE_BLOCK, last)]
        empty = [block * DONE_BLOCK + i for i, text in enumerate(texts) if not text.strip()]
        return block, self.tokenize(texts), empty


def take_only_item(items):
    """Return the only item of a batch: a collator for loaders whose batches are single blocks."""
    return items[0]


# ---------------------------------------------------------------- encoding

@torch.no_grad()
def encode_corpus(model, corpus, tokenize, max_length, folder, dtype, world, expected,
                  num_workers=0, bf16=False):
    """Encode the missing documents, on all processes. Return the corpus's vectors (N, D).

    model: a BiEncoder. tokenize: texts -> token ids, truncated to max_length. expected: the
    fingerprint of the index. Raises InputError if the folder holds another index or cannot be
    written, the disk is full, or a vector is not finite.
    """
    model.eval()
    # if several commands encode into one folder, one goes first and the others wait for it
    must_write = world.is_main and not is_encoded(folder, expected)
    with lock(folder) if must_write else nullcontext():
        if world.is_main and not check_fingerprint(folder, expected):
            width = model.encode(tokenize(["probe"]), "key").shape[1]
            make_arrays(folder, len(corpus), width, dtype, expected)
        await_index(folder, expected, world)
        counts = encode_missing(model, TokenBlocks(corpus, tokenize), max_length, folder, dtype,
                                world, num_workers, bf16)
    num_long, num_encoded, empty = counts
    note_long_documents([num_long, num_encoded], max_length, world)
    note_empty_documents(empty, corpus, world)
    if not open_array(folder, "done").all():
        raise InputError(f"{folder}: not all documents are encoded; check that all machines share "
                         "this folder, and run the same command again to continue")
    return open_array(folder, "vectors")


def is_encoded(folder, expected):
    """Return True if the folder holds all vectors. Raises InputError for another fingerprint."""
    return check_fingerprint(folder, expected) and bool(open_array(folder, "done").all())


def encode_missing(model, token_blocks, max_length, folder, dtype, world, num_workers, bf16):
    """Encode this process's share of the missing blocks, and wait for the other processes.

    Returns, for its share, [number of documents that fill max_length, number of documents, indices
    of documents without text].
    """
    vectors, done = open_array(folder, "vectors"), open_array(folder, "done")
    if not (done.all() or os.access(os.path.join(folder, "done.npy"), os.W_OK)):
        raise InputError(f"{folder}: not all documents are encoded yet, and the folder cannot be "
                         "written; give another --index folder")
    missing = np.flatnonzero(done == 0)
    share = np.array_split(missing, world.size)[world.rank].tolist()
    wait_for_all(world)  # all processes must read the marks before any of them writes a new one

    loader = make_loader(token_blocks, [[block] for block in share], take_only_item, num_workers)
    bar = progress_bar(total=len(share) * DONE_BLOCK, unit=" documents", desc="encoding",
                       is_main=world.is_main)
    num_long, num_encoded, all_empty = 0, 0, []
    # a GPU encodes the next block while this one is written
    most_waiting = 1 if world.device.type == "cuda" else 0
    waiting = deque()

    def write_oldest():
        block, fetch = waiting.popleft()
        rows = fetch().numpy().astype(dtype)
        check_finite(rows, block * DONE_BLOCK, dtype)
        write_rows(vectors, block * DONE_BLOCK, rows)
        write_rows(done, block, np.ones(1, np.uint8))  # only what is on disk counts as done
        bar.update(len(rows))
    for block, token_ids, empty in loader:
        all_empty += empty
        num_long += sum(len(ids) >= max_length for ids in token_ids)
        num_encoded += len(token_ids)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            rows = model.encode(token_ids, "key")
        waiting.append((block, start_copy_to_host(rows.float())))
        if len(waiting) > most_waiting:
            write_oldest()
    while waiting:
        write_oldest()
    bar.close()
    wait_for_all(world)
    return [num_long, num_encoded, all_empty]


def note_long_documents(counts, max_length, world):
    """Log how many of the documents encoded now, on all processes, fill max_length.

    The count includes documents of exactly that length: truncated ones cannot be told from them.
    """
    num_long, num_encoded = sum_over_processes(counts, world)
    if num_long:
        world.log(f"note: {num_long:,.0f} of {num_encoded:,.0f} documents have {max_length} tokens "
                  f"or more; only the first {max_length} are encoded (--key_max_length; "
                  "scripts/make_corpus.py cuts documents into passages)")


def note_empty_documents(empty, corpus, world):
    """Log how many of the documents encoded now have no text, and the id of the first.

    empty: their indices in this process's share. They get the vector of the empty text.
    """
    all_empty = gather_lists(empty, world)
    if all_empty:
        first = corpus.ids([min(all_empty)])[0]
        world.log(f"note: {len(all_empty):,} documents have no text (first: "
                  f"{shorten(str(first))}); they get the vector of the empty text")


def check_finite(rows, first, dtype):
    """Raise InputError, which names the document, for the first vector that is not finite."""
    is_finite = np.isfinite(rows).all(axis=1)
    if not is_finite.all():
        raise InputError(f"document {first + int(np.argmin(is_finite))} gets a vector that is not "
                         f"finite in {dtype}; use --dtype float32 or leave out --bf16; if that "
                         "does not help, the checkpoint is broken")


# ---------------------------------------------------------------- arrays on disk

def make_arrays(folder, count, width, dtype, expected):
    """Create the files of vectors and marks (zeros), then the fingerprint. Raises InputError."""
    blocks = -(-count // DONE_BLOCK)
    try:
        os.makedirs(folder, exist_ok=True)
        make_array(os.path.join(folder, "vectors.npy"), (count, width), np.dtype(dtype))
        make_array(os.path.join(folder, "done.npy"), (blocks,), np.dtype("uint8"))
    except OSError as error:
        raise InputError(f"{folder}: {count:,} vectors of {width} numbers cannot be stored "
                         f"({error.strerror}); make room, or give another --index folder") from None
    write_json(os.path.join(folder, "index.json"), expected)


def make_array(path, shape, dtype):
    """Create a .npy file of zeros and reserve its disk space now, not after hours of encoding."""
    with open(path, "w+b") as file:  # file systems that emulate fallocate need it readable
        header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, file.tell() + dtype.itemsize * math.prod(shape))


def open_array(folder, name):
    """Return a memory-mapped array of the folder. Raises InputError if it is broken."""
    path = os.path.join(folder, f"{name}.npy")
    with refusing(f"{path}: cannot be opened", "copy it again, or delete the folder"):
        array = np.lib.format.open_memmap(path, "r")
        if array.offset + array.nbytes != os.path.getsize(path) or array.dtype not in DTYPES:
            raise ValueError(f"its header has {array.dtype} {array.shape}, which does not fit its "
                             "size")
        return array


def write_rows(array, first, rows):
    """Write rows into the file of a memory-mapped array, from row `first` on, through to the disk.

    Writing to mapped memory would kill the process if the disk is full. O_DSYNC also prevents NFS
    from widening a write to whole pages, which would overwrite another machine's rows with old
    ones.
    """
    content = memoryview(rows.tobytes())
    offset = array.offset + first * array.strides[0]
    file = os.open(array.filename, os.O_WRONLY | os.O_DSYNC)
    try:
        while content:  # pwrite may write only a part
            written = os.pwrite(file, content, offset)
            content = content[written:]
            offset += written
    finally:
        os.close(file)
