"""Run the stages that grow with the data at published sizes, on one small machine.

    python bench/full_size.py --records    # 79,168 questions with 100 contexts, as FiD's train.json
    python bench/full_size.py --bm25       # an index of 21,015,324 passages, as DPR's
    python bench/full_size.py --vectors    # exact search and IVF-PQ over 21,015,324 x 768
    python bench/full_size.py --loader     # how many questions one worker tokenises

All texts and vectors are made up: words are drawn by Zipf's law, vectors by a random generator.
They are written to --folder and deleted at the end (--keep: not). If a stage is killed, the same
command goes on with what is finished.
"""
import os
import platform
import shutil
import sys
import time

import numpy as np
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
from utils import InputError, Parser, check_at_least, run_script

QUESTIONS, CONTEXTS = 79_168, 100   # NaturalQuestions' training set as FiD reads it
PASSAGES, WIDTH = 21_015_324, 768   # DPR's Wikipedia, the vectors of a base model


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("stages").add_argument
    add("--records", action="store_true", help="train.json: the first start, later starts, memory")
    add("--bm25", action="store_true", help="BM25: building, size, searching")
    add("--vectors", action="store_true", help="vectors: a store, exact search, IVF-PQ")
    add("--loader", action="store_true", help="questions that one worker tokenises in a second")
    add = parser.add_argument_group("sizes").add_argument
    add("--questions", type=int, default=QUESTIONS, help="questions of train.json")
    add("--contexts", type=int, default=CONTEXTS, help="contexts of a question")
    add("--passages", type=int, default=PASSAGES, help="passages, or vectors")
    add("--width", type=int, default=WIDTH, help="numbers of a vector")
    add("--queries", type=int, default=1000, help="queries of a search")
    add = parser.add_argument_group("run").add_argument
    add("--folder", default=os.path.join(ROOT, "out", "full_size"), help="where to write")
    add("--keep", action="store_true", help="keep the files of a stage that has finished")
    return parser.parse_args()


# ---------------------------------------------------------------- what the stages share

def require_disk(folder, needed, what):
    """Print the disk that a stage needs. Raises InputError if less is free.

    needed: bytes, of which the files that a killed run has left count as free.
    """
    os.makedirs(folder, exist_ok=True)
    present = sum(entry.stat().st_blocks * 512 for entry in scan_files(folder))
    free = shutil.disk_usage(folder).free + present
    print(f"{what}: needs {needed / 1e9:.1f} GB in {folder}, {free / 1e9:.1f} GB are free",
          flush=True)
    if free < needed:
        raise InputError(f"{folder}: {what} needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                         "free; make room, or give another --folder")


def scan_files(folder):
    """Yield the entries of all files below a folder."""
    for entry in os.scandir(folder):
        if entry.is_dir(follow_symlinks=False):
            yield from scan_files(entry.path)
        else:
            yield entry


def read_memory(name, process="self"):
    """Return the bytes of a line of /proc/PROCESS/status, such as VmHWM (the peak) or RssAnon."""
    with open(f"/proc/{process}/status") as file:
        line = next(line for line in file if line.startswith(name + ":"))
    return 1024 * int(line.split()[1])


# ---------------------------------------------------------------- records

def measure_records(args, folder):
    """Measure reading train.json: not built yet."""


# ---------------------------------------------------------------- BM25

def measure_bm25(args, folder):
    """Measure a BM25 index: not built yet."""


# ---------------------------------------------------------------- vectors

def measure_vectors(args, folder):
    """Measure a store of vectors, exact search and IVF-PQ: not built yet."""


# ---------------------------------------------------------------- the loader

def measure_loader(args, folder):
    """Measure what one worker tokenises: not built yet."""


STAGES = {"records": measure_records, "bm25": measure_bm25, "vectors": measure_vectors,
          "loader": measure_loader}


def main(args):
    check_at_least(args, {"questions": 1, "contexts": 1, "passages": 1, "width": 1, "queries": 1})
    chosen = [name for name in STAGES if getattr(args, name)]
    if not chosen:
        raise InputError(f"name a stage: {', '.join(f'--{name}' for name in STAGES)}")
    print(f"{platform.machine()} cpu, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, numpy "
          f"{np.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
          flush=True)
    for name in chosen:
        folder = os.path.join(args.folder, name)
        STAGES[name](args, folder)
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    run_script(main, parse_args())
