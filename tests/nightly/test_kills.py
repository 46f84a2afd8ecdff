"""kill -9 at random moments: the same command, given again, ends with the bits of a run that
nothing disturbed, and leaves no other file.

Half of the moments are drawn over the time that the undisturbed run takes, half over the changes
that it makes to its folder: files opened for writing, renamed, removed, folders made.

    KILLS=10 pytest -s tests/nightly/test_kills.py     ten kills in all, not a hundred
"""
import gzip
import json
import os
import random
import shutil
import time

import pytest

import campaign
from causal_helpers import make_causal
from conftest import WORDS, make_bert, make_records, make_t5, start_server

KILLS = int(os.environ.get("KILLS", 100))
LONGEST_CHAIN = 4  # kills of one run, before it may end

READER = ["train_epoch.py", "out", "in/records.json", "in/dev.json", "--t5_name", "in/t5",
          "--num_contexts", 3, "--max_length", 60, "--num_warmup_steps", 2, "--lr", "1e-3",
          "--epochs", 3, "--batch_size", 2, "--dropout", 0.2, "--save_every", 1, "--eval_every", 4,
          "--resume"]
TEXTS = ["--query_max_length", 16, "--key_max_length", 24]
RETRIEVER = ["train_dense.py", "--output_dir", "out", "--query_encoder", "in/bert", *TEXTS, "--lr",
             "1e-3", "--warmup_ratio", 0, "--logging_steps", 2, "--train_data", "in/train.jsonl",
             "--eval_data", "in/dev.jsonl", "--corpus", "in/small.jsonl", "--metrics", "recall",
             "--max_steps", 24, "--save_steps", 3, "--resume"]
SEARCH = ["retrieve.py", "--eval_data", "in/dev.jsonl", "--hits", 5, "--metrics", "recall",
          "--cutoffs", 1, 5, "--index", "index", "--output", "found.jsonl", "--trec", "found.run"]
DENSE = [*SEARCH, "--corpus", "in/large.jsonl", "--query_encoder", "in/bert", *TEXTS]
SCORE = ["lm_score.py", "--eval_data", "in/many.jsonl", "--model_name_or_path", "in/gpt2",
         "--save_name", "x", "--batch_size", 2]
FEDERATE = ["federate.py", "out", "--simulate", 3, "--data"]
DENSE_TASK = ["--query_encoder", "in/bert", *TEXTS, "--batch_size", 4, "--group_size", 2, "--clip",
              "1e9", "--warmup_ratio", 0, "--eval_data", "in/dev.jsonl", "--corpus",
              "in/small.jsonl", "--metrics", "recall"]
READER_TASK = ["--t5_name", "in/t5", "--num_contexts", 2, "--max_length", 40, "--batch_size", 4,
               "--num_warmup_steps", 0, "--eval_file", "in/dev.json"]

# {name: (command, processes)}
RUNS = {
    "reader": (READER, 1),
    "reader of two processes": (READER, 2),
    "reader with a frozen retriever": ([*READER[:6], *READER[8:], "--retriever", "bm25", "--corpus",
                                        "in/small.jsonl.gz"], 1),
    "retriever": (RETRIEVER, 1),
    "retriever of two processes": (RETRIEVER, 2),
    "encoding": ([*DENSE, "--faiss_index_factory", "IVF4,Flat"], 1),
    "encoding of two processes": (DENSE, 2),
    "BM25": ([*SEARCH, "--corpus", "in/large.jsonl.gz", "--retrieval_method", "bm25"], 1),
    "language model's scores": (SCORE, 1),
    "language model's scores of two processes": (SCORE, 2),
    "reader's scores": (["test.py", "in/t5", "in/many-records.json", "--num_contexts", 3, "--pred",
                         "predictions.jsonl", "--scores", "scored.json", "--measures",
                         "measures.json", "--batch_size", 2], 1),
    "federated retriever": ([*FEDERATE, "in/train.jsonl", "--mode", "retriever", "--rounds", 4,
                             "--strategy", "FedAdam", "eta=0.01", "fraction_train=0.7", "--privacy",
                             "DifferentialPrivacyServerSideAdaptiveClipping",
                             "noise_multiplier=1.5", "clipped_count_stddev=2", "--resume", "--",
                             *DENSE_TASK], 1),
    "federated reader": ([*FEDERATE, "in/records.json", "--mode", "generator", "--rounds", 4,
                          "--resume", "--", *READER_TASK], 1),
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
    """A folder with the models, records and corpora that the runs read; they get copies of it."""
    folder, rng = tmp_path_factory.mktemp("inputs"), random.Random(0)
    make_t5(folder / "t5")
    make_bert(folder / "bert")
    make_causal(folder / "gpt2", "gpt2")
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(5, 15))) for _ in range(9000)]
    rows = []
    for i in range(18):
        rows.append({"query": " ".join(rng.sample(documents[i].split(), 4)), "query_id": i,
                     "pos": [documents[i]], "neg": rng.sample(documents[18:60], 4),
                     "pos_index": [i], "answers": ["baker", "a town"], "task": "qa"})
    write_lines(folder / "train.jsonl", rows[:12])
    write_lines(folder / "dev.jsonl", rows[12:])
    write_lines(folder / "many.jsonl", rows * 10)
    corpus = [{"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)]
    for name, part in (("small", corpus[:60]), ("large", corpus)):
        write_lines(folder / f"{name}.jsonl", part)
        content = (folder / f"{name}.jsonl").read_bytes()
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    (folder / "records.json").write_text(json.dumps(make_records(11)))
    (folder / "dev.json").write_text(json.dumps(make_records(3, seed=1)))
    (folder / "many-records.json").write_text(json.dumps(make_records(60)))
    return folder


def prepare(inputs, folder):
    """An empty folder but for a copy of the inputs, their dates included."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(inputs, folder / "in")
    return folder


def is_writing(folder):
    """True if a file or a checkpoint is half-written in the folder."""
    return any(path.name.endswith(".writing") for path in folder.rglob("*"))


@pytest.mark.parametrize("name", RUNS)
def test_a_killed_run_ends_as_if_it_had_not_been(name, inputs, tmp_path):
    (script, *args), processes = RUNS[name]
    rng, start, server = campaign.generator(name), time.time(), start_server()
    position = list(RUNS).index(name)
    quota = (KILLS + position) // len(RUNS)  # they add up to KILLS

    def start_run(folder, **kill):
        return server.run(script, args, folder, processes=processes, **kill)

    whole = prepare(inputs, tmp_path / "whole")
    code, stdout, stderr = start_run(whole)
    assert code == 0, stdout + stderr
    length, changes, expected = server.seconds, server.changes, campaign.snapshot(whole)

    kills, writing, runs = 0, 0, 0
    while kills < quota:
        killed, moments = prepare(inputs, tmp_path / "killed"), []
        for _ in range(min(rng.randint(1, LONGEST_CHAIN), quota - kills)):
            kill = {"kill_after": round(rng.uniform(0, length), 3)}
            if rng.random() < 0.5:
                kill = {"kill_at": rng.randint(1, changes)}
            code, stdout, stderr = start_run(killed, **kill)
            if code == 0:  # it has ended before: less was left to do, or the machine is faster
                length = min(length, server.seconds) if not moments else length
                break
            assert code == -9, f"{kill}: {stdout}{stderr}"
            kills, writing = kills + 1, writing + is_writing(killed)
            moments.append(kill)
        code, stdout, stderr = start_run(killed)
        assert code == 0, f"{moments}: {stdout}{stderr}"
        difference = campaign.describe_difference(expected, campaign.snapshot(killed))
        assert not difference, f"{moments} of {length:.2f} s, {changes} changes: {difference}"
        print(f"killed at {moments} of {length:.2f} s, {changes} changes")
        runs += 1
    campaign.note("kills", name, start, kills=kills, while_a_file_was_written=writing, runs=runs)
