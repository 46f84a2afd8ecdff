"""Vectors of a corpus in one memory-mapped array: written by all processes, resumed block by block, never held in memory."""
import hashlib
import json
import math
import os
from contextlib import nullcontext

import numpy as np
import torch
from tqdm import tqdm

from data import make_loader
from utils import InputError, lock, wait_for_all, write_json

BLOCK = 4096  # documents that are encoded, written and marked as done together
MODEL_FILES = (".safetensors", ".bin", "config.json"), ("tokenizer", "vocab", "merges", "spiece", "sentencepiece", "special_tokens")


class Blocks(torch.utils.data.Dataset):
    """Token ids of a block of documents; workers read and tokenise them."""

    def __init__(self, corpus, tokenize):
        self.corpus, self.tokenize = corpus, tokenize

    def __getitem__(self, block):
        numbers = range(block * BLOCK, min((block + 1) * BLOCK, len(self.corpus)))
        return block, self.tokenize([self.corpus.text(number) for number in numbers])


def fingerprint(corpus, model, settings):
    """What an index depends on: sizes and contents of the corpus's and the model's files, and the settings. {name: value}.

    model: a folder or file, known by its files, or a hub name; None where settings say what takes its place.
    """
    files = [["", os.path.getsize(path), content_hash(path, 256)] for path, *_ in corpus.parts]  # a corpus may be named anew
    if model is not None:
        paths = [model] if os.path.isfile(model) else [
            os.path.join(folder, name) for folder, _, names in sorted(os.walk(model)) for name in sorted(names)
            if name.endswith(MODEL_FILES[0]) or name.startswith(MODEL_FILES[1])]
        files += [[os.path.basename(path), os.path.getsize(path), content_hash(path)] for path in paths]
    name = "" if model is None or os.path.exists(model) else str(model)
    return {"documents": len(corpus), "model": name, "files": files, **settings}


def content_hash(path, windows=None):
    """A hash of a file: whole, or so many evenly spaced 64 KiB of it, for corpora of many gigabytes."""
    digest, last = hashlib.blake2b(digest_size=12), max(0, os.path.getsize(path) - 65536)
    with open(path, "rb") as file:
        if windows is None:
            return hashlib.file_digest(file, lambda: digest).hexdigest()
        for i in range(windows):
            file.seek(last * i // (windows - 1))
            digest.update(file.read(65536))
    return digest.hexdigest()


def check_fingerprint(folder, wanted):
    """True if the folder holds vectors of this corpus, model and settings, False if it holds none; InputError if others."""
    path = os.path.join(folder, "index.json")
    if not os.path.exists(path):
        return False
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give another --index folder, or delete this one") from None
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise InputError(f"{folder} holds an index of another {', '.join(other)} ({other[0]}: {str(found.get(other[0]))[:80]}, now "
                         f"{str(wanted[other[0]])[:80]}); give the flags it was made with, another --index folder, or delete this one")
    return True


def await_index(folder, wanted, world):
    """Returns when the main process has made the folder's index; InputError on a process that does not see it."""
    wait_for_all(world)
    if not check_fingerprint(folder, wanted):
        raise InputError(f"{folder}: process {world.rank} does not see the index that process 0 made; it must lie on a shared disk")


def make_arrays(folder, count, width, dtype, wanted):
    """The files of the vectors (count, width) and of the marks of blocks that are done, all zeros; InputError if they do not fit."""
    try:
        os.makedirs(folder, exist_ok=True)
        for name, kind, shape in (("vectors", dtype, (count, width)), ("done", "uint8", (-(-count // BLOCK),))):
            with open(os.path.join(folder, f"{name}.npy"), "w+b") as file:  # readable, where fallocate is emulated
                np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(kind).str, "fortran_order": False, "shape": shape})
                file.flush()  # room is taken now, not after hours of encoding
                os.posix_fallocate(file.fileno(), 0, file.tell() + np.dtype(kind).itemsize * math.prod(shape))
    except OSError as error:
        raise InputError(f"{folder}: {count:,} vectors of {width} numbers cannot be stored ({error.strerror}); make room, or give "
                         "another --index folder") from None
    write_json(os.path.join(folder, "index.json"), wanted)


def open_array(folder, name):
    """A memory-mapped array of the folder, as it is now on disk."""
    try:
        return np.lib.format.open_memmap(os.path.join(folder, f"{name}.npy"), "r")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}/{name}.npy: cannot be opened ({error}); copy it again, or delete the folder") from None


def write_rows(array, first, rows):
    """Puts rows into the file of a memory-mapped array and onto the disk.

    A plain write, since a full disk kills a process that writes to mapped memory. O_DSYNC also keeps NFS from widening a write to whole
    pages, which would put back what another machine has written beside it.
    """
    content, place = memoryview(rows.tobytes()), array.offset + first * array.strides[0]
    file = os.open(array.filename, os.O_WRONLY | os.O_DSYNC)
    try:
        while content:
            written = os.pwrite(file, content, place)
            content, place = content[written:], place + written
    finally:
        os.close(file)


@torch.no_grad()
def encode_corpus(model, corpus, tokenize, folder, dtype, world, wanted, num_workers=0, bf16=False):
    """The array of a corpus's vectors, (N, D), encoding what is not done yet; each process takes a contiguous part of it."""
    model.eval()
    whole = not world.is_main or check_fingerprint(folder, wanted) and open_array(folder, "done").all()
    with nullcontext() if whole else lock(folder):  # another command that encodes the same waits, and finds it done
        return encode_undone(model, corpus, tokenize, folder, dtype, world, wanted, num_workers, bf16)


def encode_undone(model, corpus, tokenize, folder, dtype, world, wanted, num_workers, bf16):
    """encode_corpus, by the one command that may write."""
    if world.is_main and not check_fingerprint(folder, wanted):
        make_arrays(folder, len(corpus), model.encode(tokenize(["probe"]), "key").shape[1], dtype, wanted)
    await_index(folder, wanted, world)
    vectors, done = open_array(folder, "vectors"), open_array(folder, "done")
    if not (done.all() or os.access(os.path.join(folder, "done.npy"), os.W_OK)):
        raise InputError(f"{folder}: not all documents are encoded yet, and it cannot be written; give another --index folder")
    mine = np.array_split(np.flatnonzero(done == 0), world.size)[world.rank].tolist()
    wait_for_all(world)  # all have read the marks before one of them makes a new one
    loader = make_loader(Blocks(corpus, tokenize), [[block] for block in mine], lambda items: items[0], num_workers)
    bar = tqdm(total=len(mine) * BLOCK, unit=" documents", desc="encoding", leave=False, disable=None if world.is_main else True)
    for block, ids in loader:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            rows = model.encode(ids, "key").float().cpu().numpy().astype(dtype)
        if not np.isfinite(rows).all():
            raise InputError(f"document {block * BLOCK + int(np.argmin(np.isfinite(rows).all(1)))} gets a vector that is not finite in "
                             f"{dtype}; use --dtype float32 or leave out --bf16, and if that does not help the checkpoint is broken")
        write_rows(vectors, block * BLOCK, rows)
        write_rows(done, block, np.ones(1, np.uint8))  # only what is on disk counts as done
        bar.update(len(rows))
    bar.close()
    wait_for_all(world)
    if not open_array(folder, "done").all():
        raise InputError(f"{folder}: not all documents are encoded; do all machines share this folder? The same command goes on")
    return open_array(folder, "vectors")
