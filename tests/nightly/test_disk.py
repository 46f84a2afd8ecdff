"""A disk that is full at any point of a run, or read-only: each script says so in one line and ends
with exit code 1, what stood there before stands, nothing half-written is left, and with room the
same command ends as if nothing had been.

    DISKS=2 pytest -s tests/nightly/test_disk.py     two full disks for each script, not eight
"""
import gzip
import json
import os
import random
import shutil
import subprocess
import time

import pytest

import campaign
from causal_helpers import make_causal
from conftest import WORDS, make_bert, make_records, make_t5, start_server

DISKS = int(os.environ.get("DISKS", 8))
PAGE = 4096
OLD = "what stood there before\n"

TEXTS = ["--query_max_length", 16, "--key_max_length", 24]
READER = ["--t5_name", "../in/t5", "--num_contexts", 2, "--max_length", 40, "--num_warmup_steps", 0,
          "--epochs", 1, "--batch_size", 4, "--save_every", 1]
SEARCH = ["retrieve.py", "--eval_data", "questions.jsonl", "--hits", 3, "--index", "index"]
DENSE = [*SEARCH, "--corpus", "../in/corpus.jsonl", "--query_encoder", "../in/bert", *TEXTS]

# {name: (command, its output files, its inputs that must lie beside the outputs)}
RUNS = {
    "train_epoch.py": (["train_epoch.py", "out", "../in/records.json", "../in/dev.json",
                        *READER, "--resume"], [], []),
    "train_epoch.py --retriever": (
        ["train_epoch.py", "out", "../in/records.json", "../in/dev.json", *READER[:2],
         *READER[4:], "--retriever", "bm25", "--corpus", "corpus.jsonl.gz", "--resume"], [],
        ["corpus.jsonl.gz"]),
    "train_dense.py": (["train_dense.py", "--output_dir", "out", "--query_encoder", "../in/bert",
                        *TEXTS, "--train_data", "../in/questions.jsonl", "--eval_data",
                        "../in/questions.jsonl", "--corpus", "../in/corpus.jsonl", "--max_steps", 4,
                        "--save_steps", 2, "--metrics", "recall", "--resume"], [], []),
    "retrieve.py": ([*DENSE, "--output", "found.json", "--trec", "found.run", "--metrics", "recall",
                     "collate_neg", "--measures", "measures.json", "--save_name", "x"],
                    ["found.json", "found.run", "measures.json", "questions.neg.x.jsonl"],
                    ["questions.jsonl"]),
    "retrieve.py --faiss": ([*DENSE, "--faiss_index_factory", "IVF2,Flat", "--output",
                             "found.jsonl.gz"], ["found.jsonl.gz"], ["questions.jsonl"]),
    "retrieve.py bm25": ([*SEARCH, "--retrieval_method", "bm25", "--corpus", "corpus.jsonl.gz",
                          "--metrics", "collate_pos", "--save_name", "x"],
                         ["questions.pos.x.jsonl"], ["questions.jsonl", "corpus.jsonl.gz"]),
    "retrieve.py rank": (["retrieve.py", "--eval_data", "questions.jsonl", "--retrieval_method",
                          "rank", "--query_encoder", "../in/bert", *TEXTS, "--metrics",
                          "collate_score", "--save_name", "x"], ["questions.scored.x.jsonl"],
                         ["questions.jsonl"]),
    "lm_score.py": (["lm_score.py", "--eval_data", "questions.jsonl", "--model_name_or_path",
                     "../in/gpt2", "--save_name", "x", "--batch_size", 2],
                    ["questions.scored.x.jsonl"], ["questions.jsonl"]),
    "test.py": (["test.py", "../in/t5", "../in/records.json", "--num_contexts", 0, 2, "--pred",
                 "pred.jsonl", "--scores", "scored.json", "--measures", "measures.json"],
                ["pred.0.jsonl", "pred.2.jsonl", "scored.json", "measures.json"], []),
    "ask.py": (["ask.py", "../in/t5", "--corpus", "corpus.jsonl.gz", "--retrieval_method", "bm25",
                "--question", "who is the baker of the town", "--html", "page.html", "--index",
                "index"], ["page.html"], ["corpus.jsonl.gz"]),
    "federate.py": (["federate.py", "out", "--mode", "generator", "--simulate", 2, "--data",
                     "../in/records.json", "--rounds", 2, "--resume", "--", *READER[:8],
                     "--batch_size", 4, "--eval_file", "../in/dev.json"], [], []),
    "scripts/make_corpus.py": (["scripts/make_corpus.py", "../in/notes", "--output", "c.jsonl"],
                               ["c.jsonl"], []),
    "scripts/make_crops.py": (["scripts/make_crops.py", "../in/corpus.jsonl", "--output",
                               "crops.jsonl"], ["crops.jsonl"], []),
    "scripts/table.py": (["scripts/table.py", "a=../in/measures.json", "--columns", "em", "--json",
                          "table.json"], ["table.json"], []),
    "toy/world.py": (["toy/world.py", "--out", "world", "--hard"], [], []),
    "bench/draw.py": (["bench/draw.py", "picture.svg", "a=../in/printed.txt"], ["picture.svg"], []),
}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """The folder `in` with what the runs read."""
    folder, rng = tmp_path_factory.mktemp("full") / "in", random.Random(0)
    folder.mkdir()
    make_t5(folder / "t5")
    make_bert(folder / "bert")
    make_causal(folder / "gpt2", "gpt2")
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(5, 15))) for _ in range(100)]
    write_lines(folder / "questions.jsonl", [
        {"query": " ".join(rng.sample(documents[i].split(), 4)), "query_id": i, "task": "qa",
         "pos": [documents[i]], "neg": rng.sample(documents[9:], 4), "pos_index": [i],
         "answers": ["baker"]} for i in range(9)])
    write_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "", "text": text}
                                          for i, text in enumerate(documents)])
    content = (folder / "corpus.jsonl").read_bytes()
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(content, mtime=0))
    records = make_records(7)
    for record in records:
        record["passage"] = record["ctxs"][0]["text"]
    (folder / "dev.json").write_text(json.dumps(make_records(2, seed=1)))
    (folder / "records.json").write_text(json.dumps(records))
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text(". ".join(documents))
    (folder / "measures.json").write_text('{"em": 0.5}')
    (folder / "printed.txt").write_text("contexts EM\n 1 30.00 31.00 3/10 7.5\n 2 40.0 41.0 4/10 7")
    return folder


@pytest.fixture(scope="module")
def disk(inputs):
    """A folder beside `in` that is a disk of its own, whose size and rights can be set."""
    folder = inputs.parent / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "campaign", folder],
                          capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here, which takes root: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def set_disk(disk, option):
    """Changes the mounted disk: its size in bytes, its rights."""
    subprocess.run(["mount", "-o", f"remount,{option}", disk], check=True)


def start_run(command, cwd):
    script, *args = command
    return start_server().run(script, args, cwd)


def prepare(folder, inputs, outputs, beside):
    """Empties a folder, then puts old outputs and the inputs there."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for name in outputs:
        if name.endswith(".gz"):
            (folder / name).write_bytes(gzip.compress(OLD.encode(), mtime=0))
        else:
            (folder / name).write_text(OLD)
    for name in beside:
        shutil.copy2(inputs / name, folder / name)


def used_bytes(folder):
    """What the files below a folder take, in whole pages."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // PAGE) * PAGE for size in sizes)


def check_refusal(what, code, stdout, stderr):
    """The run must have ended with one line that says what cannot be written."""
    errors = [line for line in stderr.splitlines() if line.startswith("error")]
    assert code == 1 and "Traceback" not in stderr, f"{what}: exit code {code}\n{stderr}"
    assert len(errors) == 1 and ("written" in errors[0] or "stored" in errors[0]), (
        f"{what}: {stderr}")


def check_outputs(what, folder, before, whole):
    """Each output is the old one or the new one, and no file is half-written."""
    after = campaign.snapshot(folder)
    for path, content in before.items():
        assert after.get(path) in (content, whole.get(path, content)), f"{what}: {path} is neither"
    left = [path for path in after if path.endswith(".writing")]
    assert not left, f"{what}: {left} left over"


@pytest.mark.parametrize("name", RUNS)
def test_a_full_disk_and_a_read_only_one(name, inputs, disk):
    command, outputs, beside = RUNS[name]
    rng, start = campaign.generator(name), time.time()
    whole = inputs.parent / "whole"
    whole.mkdir(exist_ok=True)
    prepare(whole, inputs, [], beside)
    small = used_bytes(whole)
    code, stdout, stderr = start_run(command, whole)
    assert code == 0, stdout + stderr
    expected, most = campaign.snapshot(whole), used_bytes(whole) - small
    assert set(outputs) <= set(expected), f"{name} writes {list(expected)}"

    counts = {"full": 0, "large_enough": 0, "read_only": 0}
    # what is written beside the old file, or aside, takes room twice
    rooms = [0] + [rng.randrange(2 * most) for _ in range(DISKS - 1)]
    for room in rooms:
        set_disk(disk, "size=64m")
        prepare(disk, inputs, outputs, beside)
        before = campaign.snapshot(disk)
        set_disk(disk, f"size={used_bytes(disk) + room + PAGE}")
        if room == 0:  # not one page is left
            (disk / "ballast").write_bytes(b"x" * PAGE)
        what = f"{name} with {room} bytes"
        code, stdout, stderr = start_run(command, disk)
        if code == 0:
            counts["large_enough"] += 1
        else:
            check_refusal(what, code, stdout, stderr)
            check_outputs(what, disk, before, expected)
            counts["full"] += 1
        set_disk(disk, "size=64m")
        if room == 0:
            (disk / "ballast").unlink()
        code, stdout, stderr = start_run(command, disk)
        assert code == 0, f"{what}, then room: {stdout}{stderr}"
        difference = campaign.describe_difference(expected, campaign.snapshot(disk))
        assert not difference, f"{what}, then room: {difference}"

    prepare(disk, inputs, outputs, beside)
    before = campaign.snapshot(disk)
    set_disk(disk, "ro")
    try:
        check_refusal(f"{name}, read-only", *start_run(command, disk))
    finally:
        set_disk(disk, "rw")
    assert campaign.snapshot(disk) == before
    counts["read_only"] += 1
    campaign.note("disk", name.replace("/", " "), start, **counts)
