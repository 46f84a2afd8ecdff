"""Vectors of a corpus in one memory-mapped array: written by all processes, resumed block by block, never held in memory."""
import hashlib
import json
import os

import numpy as np
import torch
from tqdm import tqdm

from data import make_loader
from utils import InputError, wait_for_all, write_json

BLOCK = 4096  # documents that are encoded, written and marked as done together


class Blocks(torch.utils.data.Dataset):
    """Token ids of a block of documents; workers read and tokenise them."""

    def __init__(self, corpus, tokenize):
        self.corpus, self.tokenize = corpus, tokenize

    def __getitem__(self, block):
        numbers = range(block * BLOCK, min((block + 1) * BLOCK, len(self.corpus)))
        return block, self.tokenize([self.corpus.text(number) for number in numbers])


def fingerprint(corpus, model_name, settings):
    """What vectors depend on: sizes and contents of the corpus's and the model's files, and the settings. {name: value}."""
    paths = [path for path, *_ in corpus.parts] + [model_name] * os.path.isfile(model_name)
    for folder, _, names in sorted(os.walk(model_name)):
        paths += [os.path.join(folder, name) for name in sorted(names) if name.endswith((".safetensors", ".bin", "config.json"))]
    files = [(os.path.basename(path), os.path.getsize(path), content_hash(path)) for path in paths]
    name = str(model_name) if not os.path.exists(model_name) else ""  # a local one is known by its files
    return {"documents": len(corpus), "model": name, "files": [list(file) for file in files], **settings}


def content_hash(path):
    """A hash of a file's first, middle and last 64 KiB: enough to tell two files of one size apart, at once."""
    size, digest = os.path.getsize(path), hashlib.blake2b(digest_size=12)
    with open(path, "rb") as file:
        for place in (0, size // 2, max(0, size - 65536)):
            file.seek(place)
            digest.update(file.read(65536))
    return digest.hexdigest()


def check_fingerprint(folder, wanted):
    """True if the folder holds vectors of this corpus, model and settings, False if it holds none; InputError if others."""
    path = os.path.join(folder, "index.json")
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as file:
        found = json.load(file)
    other = [key for key in wanted if found.get(key) != wanted[key]]
    if other:
        raise InputError(f"{folder} holds an index of another {', '.join(other)} ({other[0]}: {str(found.get(other[0]))[:80]}, now "
                         f"{str(wanted[other[0]])[:80]}); give another --index folder, or delete this one")
    return True


def open_array(folder, count, width, dtype, world, wanted):
    """(memory-mapped array (count, width), marks of the blocks that are done); made by the main process where there is none."""
    paths = [os.path.join(folder, name) for name in ("vectors.npy", "done.npy")]
    if world.is_main and not check_fingerprint(folder, wanted):
        os.makedirs(folder, exist_ok=True)
        try:
            np.lib.format.open_memmap(paths[0], "w+", dtype, (count, width)).flush()
            with open(paths[0], "r+b") as file:  # room is taken now: a full disk must not kill a write to the mapped array
                os.posix_fallocate(file.fileno(), 0, os.path.getsize(paths[0]))
            np.lib.format.open_memmap(paths[1], "w+", np.uint8, (-(-count // BLOCK),)).flush()
        except OSError as error:
            raise InputError(f"{folder}: {count:,} vectors of {width} numbers do not fit ({error.strerror})") from None
        write_json(os.path.join(folder, "index.json"), wanted)
    wait_for_all(world)
    check_fingerprint(folder, wanted)
    return [np.lib.format.open_memmap(path, "r+") for path in paths]


@torch.no_grad()
def encode_corpus(model, corpus, tokenize, folder, dtype, world, wanted, num_workers=0, bf16=False):
    """The array of a corpus's vectors, (N, D), encoding what is not done yet; each process takes a contiguous part."""
    model.eval()
    width = model.encode(tokenize(["probe"]), "key").shape[1]
    vectors, done = open_array(folder, len(corpus), width, dtype, world, wanted)
    first, last = (len(done) * part // world.size for part in (world.rank, world.rank + 1))
    mine = [block for block in range(first, last) if not done[block]]
    loader = make_loader(Blocks(corpus, tokenize), [[block] for block in mine], lambda items: items[0], num_workers)
    bar = tqdm(total=len(mine) * BLOCK, unit=" documents", desc="encoding", leave=False, disable=None if world.is_main else True)
    for block, ids in loader:
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            rows = model.encode(ids, "key").float().cpu().numpy()
        vectors[block * BLOCK:block * BLOCK + len(rows)] = rows
        vectors.flush()
        done[block] = 1  # only what is on disk counts as done
        done.flush()
        bar.update(BLOCK)
    bar.close()
    wait_for_all(world)
    return vectors
