"""The shell recipes: data from a loopback server, flags and checks, the comparison at their end,
and FiD's run on small files.
"""
import argparse
import functools
import gzip
import http.server
import io
import json
import os
import runpy
import shutil
import subprocess
import tarfile
import threading
import zipfile

import pytest

import fid_data
from conftest import ROOT, make_records, run, stages_run

RECIPES = ("nq.sh", "tqa.sh", "released-models.sh", "dpr-nq.sh", "fid-kd.sh", "lsr.sh",
           "msmarco.sh", "3iter-nq.sh", "3iter-msmarco.sh", "llm-embedder.sh", "federated.sh")
# what get_data.sh and fid_data.py leave in DATA, as far as recipes look for it
TASKS = ("chat/msc", "lrlm/arxiv", "lrlm/books3", "lrlm/codeparrot", "qa/msmarco", "qa/nq",
         "icl/icl", "tool/toolbench")
PUBLISHED_FILES = [
    "psgs_w100.tsv.gz", "hf_bert_base.cp", "hf_bert_base.hn.cp", "hf_bert_base.multiset.cp",
    "nq-test.qa.csv", "biencoder-nq-train.json.gz", "biencoder-nq-dev.json.gz",
    "msmarco/corpus.jsonl", "msmarco/queries.jsonl", "msmarco/qrels/train.tsv",
    "msmarco/qrels/dev.tsv", "convsearch/qrecc/train.concat.json",
    *(f"{task}/{name}.json" for task in TASKS for name in ("train", "dev", "test", "corpus")),
    *(f"{name}/{split}.json" for name in ("NQ", "TQA") for split in ("train", "dev", "test")),
    *(f"nq-{split}.json.gz" for split in ("train", "dev", "test")),
    *(f"{name}_{kind}/x" for name in ("nq", "tqa")
      for kind in ("reader_base", "reader_large", "retriever"))]


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serve files, from a later byte on if requested, and record the requests."""
    requests = []  # (path, first byte)
    claimed_sizes = {}  # {path: bytes} of files that are too large for a test

    def do_HEAD(self):
        if self.path not in self.claimed_sizes:
            return super().do_HEAD()
        self.send_response(200)
        self.send_header("Content-Length", str(self.claimed_sizes[self.path]))
        self.end_headers()

    def do_GET(self):
        first_byte = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.requests.append((self.path, first_byte))
        with open(self.translate_path(self.path), "rb") as file:
            content = file.read()
        self.send_response(206 if first_byte else 200)
        self.send_header("Content-Length", str(len(content) - first_byte))
        if first_byte:
            last_byte = len(content) - 1
            self.send_header("Content-Range", f"bytes {first_byte}-{last_byte}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[first_byte:])

    def log_message(self, *_):
        pass


def write_archive(path, files):
    """Write a .tar.gz of {name: JSON content}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            packed = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))


def write_fid_files(root):
    """Write the files of FiD's get-data.sh: ten questions of a small world, eight for training."""
    records = make_records(10)
    passages = {context["id"]: context for record in records for context in record["ctxs"]}
    ids = [[context["id"] for context in record["ctxs"]] for record in records]
    wikipedia = root / "dpr" / "wikipedia_split" / "psgs_w100.tsv.gz"
    wikipedia.parent.mkdir()
    with gzip.open(wikipedia, "wt") as file:
        file.write("id\ttext\ttitle\n")
        for identifier, passage in passages.items():
            file.write(f"{identifier}\t{passage['text']}\t{passage['title']}\n")

    # of the originals, lines 0 to 5 are FiD's training questions, 6 and 7 its dev questions
    index = {"train": range(6), "dev": range(6, 8), "test": range(2)}
    files = {f"{name}.{split}.idx.json": list(numbers)
             for split, numbers in index.items() for name in ("NQ", "TQA")}
    write_archive(root / "FiD" / "data" / "dataindex.tar.gz", files)

    # NaturalQuestions
    lines = [json.dumps({"question": record["question"], "answer": record["answers"]}) + "\n"
             for record in records]
    questions = root / "google-research-datasets" / "natural-questions" / "master" / "nq_open"
    questions.mkdir(parents=True)
    (questions / "NQ-open.train.jsonl").write_text("".join(lines[:8]))
    (questions / "NQ-open.dev.jsonl").write_text("".join(lines[8:]))
    by_position = {"train": ids[:6], "dev": ids[6:8], "test": ids[8:]}
    files = {f"nq_passages/{split}.json": {str(i): item for i, item in enumerate(lists)}
             for split, lists in by_position.items()}
    write_archive(root / "FiD" / "data" / "nq_passages.tar.gz", files)

    # TriviaQA
    items = [{"Question": record["question"], "QuestionId": f"q_{i}",
              "Answer": {"Value": record["answers"][0], "Aliases": record["answers"]}}
             for i, record in enumerate(records)]
    files = {"triviaqa-unfiltered/unfiltered-web-train.json": {"Data": items[:8]},
             "triviaqa-unfiltered/unfiltered-web-dev.json": {"Data": items[8:]}}
    write_archive(root / "triviaqa" / "data" / "triviaqa-unfiltered.tar.gz", files)
    by_id = {f"q_{i}": item for i, item in enumerate(ids)}
    files = {f"tqa_passages/{split}.json": by_id for split in index}
    write_archive(root / "FiD" / "data" / "tqa_passages.tar.gz", files)


@pytest.fixture
def mirror(tmp_path):
    """Return (address, folder) of a server with DPR's question files and FiD's data."""
    root = tmp_path / "mirror"
    folder = root / "dpr" / "data" / "retriever"
    folder.mkdir(parents=True)
    for name in ("nq-dev.qa.csv", "nq-test.qa.csv"):
        (folder / name).write_text(name * 1000)
    write_fid_files(root)
    handler = functools.partial(RangeHandler, directory=str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    RangeHandler.requests.clear()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def get_data(out, mirror, *names):
    """Run scripts/get_data.sh, and return the finished process."""
    env = os.environ | {"OUT": str(out), "BASE_URL": mirror, "no_proxy": "127.0.0.1"}
    return subprocess.run(["sh", ROOT / "scripts" / "get_data.sh", *names], env=env,
                          capture_output=True, text=True, timeout=60)


def test_data_is_fetched_resumed_and_verified(mirror, tmp_path):
    address, folder = mirror
    out = tmp_path / "out"
    out.mkdir()
    half = (folder / "nq-test.qa.csv").read_text()[:5000]
    (out / "nq-test.qa.csv").write_text(half)  # cut off in an earlier run
    process = get_data(out, address, "dpr-nq-qa")
    assert process.returncode == 0, process.stderr
    assert "nq-dev.qa.csv: 0 MB" in process.stdout
    assert "nq-test.qa.csv: whole" in process.stdout
    for name in ("nq-dev.qa.csv", "nq-test.qa.csv"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert ("/dpr/data/retriever/nq-test.qa.csv", 5000) in RangeHandler.requests

    # nothing is fetched twice
    RangeHandler.requests.clear()
    process = get_data(out, address, "dpr-nq-qa")
    assert process.returncode == 0
    assert not RangeHandler.requests


def test_what_cannot_be_fetched(mirror, tmp_path):
    address, _ = mirror
    process = get_data(tmp_path / "out", address, "dpr-nq-model")
    assert process.returncode == 1
    assert "cannot be reached" in process.stderr
    process = get_data(tmp_path / "out", address, "nonsense")
    assert process.returncode == 1
    assert "no data set is named nonsense" in process.stderr


def test_a_disk_that_is_too_small_is_refused(mirror, tmp_path, monkeypatch):
    address, _ = mirror
    out = tmp_path / "out"
    monkeypatch.setattr(RangeHandler, "claimed_sizes", {
        "/dpr/data/retriever/nq-test.qa.csv": 10 ** 15,
        "/FiD/pretrained_models/nq_reader_base.tar.gz": 10 ** 15})
    process = get_data(out, address, "dpr-nq-qa")
    assert process.returncode == 1
    assert "1000000.0 GB to fetch, about 0.0 GB more once unpacked, " in process.stdout
    assert process.stderr.startswith(f"error: too little room in {out}; make room")
    assert len(process.stderr.splitlines()) == 1

    # an archive needs room for its files too, unless they are there already
    process = get_data(out, address, "nq-reader-base")
    assert "1000000.0 GB to fetch, about 1200000.0 GB more once unpacked, " in process.stdout
    (out / "nq_reader_base").mkdir()
    process = get_data(out, address, "nq-reader-base")
    assert "1000000.0 GB to fetch, about 0.0 GB more once unpacked, " in process.stdout
    assert not RangeHandler.requests


def test_archives_are_unpacked_and_dprs_models_have_names_of_their_own(mirror, tmp_path):
    address, folder = mirror
    root = folder.parent.parent.parent
    path = root / "thakur" / "BEIR" / "datasets" / "msmarco.zip"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("msmarco/qrels/dev.tsv", "a\tb\tc\n")
    for name in ("single/nq", "multiset", "single-adv-hn/nq"):
        spelt = "retriever" if name == "single/nq" else "retriver"  # as on DPR's server
        path = root / "dpr" / "checkpoint" / spelt / name / "hf_bert_base.cp"
        path.parent.mkdir(parents=True)
        path.write_text(name)
    out = tmp_path / "out"
    process = get_data(out, address, "msmarco", "dpr-nq-model", "dpr-nq-hn-model",
                       "dpr-multiset-model")
    assert process.returncode == 0, process.stderr
    assert (out / "msmarco" / "qrels" / "dev.tsv").read_text() == "a\tb\tc\n"
    assert (out / "hf_bert_base.cp").read_text() == "single/nq"
    assert (out / "hf_bert_base.hn.cp").read_text() == "single-adv-hn/nq"
    assert (out / "hf_bert_base.multiset.cp").read_text() == "multiset"


# ---------------------------------------------------------------- what all recipes have

@pytest.mark.parametrize("recipe", RECIPES)
def test_a_wrong_flag_prints_the_head_which_states_what_is_needed(recipe):
    process = subprocess.run(["sh", ROOT / "scripts" / recipe, "--tiy"], capture_output=True,
                             text=True, timeout=30)
    assert process.returncode == 1 and not process.stdout
    error, *head = process.stderr.splitlines()
    assert error.startswith("error: --tiy: the one flag is --toy; ")
    head = " ".join(head)
    for words in ("Published", "The exit code is 0", "GB of disk", f"scripts/{recipe} --toy",
                  "Not run here", "hour"):
        assert words.lower() in head.lower(), words


# notes the command lines of a recipe's stages instead of running them
NOTE = """#!/usr/bin/env bash
printf '%s\\0' "$@" >> "{path}"
printf '\\n' >> "{path}"
"""


@pytest.mark.parametrize("recipe, settings", [
    ("nq.sh", {}), ("nq.sh", {"PASSAGES": "dpr", "SIZE": "large"}), ("tqa.sh", {"PASSAGES": "dpr"}),
    ("released-models.sh", {}), ("dpr-nq.sh", {}), ("fid-kd.sh", {}), ("lsr.sh", {}),
    ("msmarco.sh", {}), ("3iter-nq.sh", {}), ("3iter-msmarco.sh", {}), ("llm-embedder.sh", {}),
    ("federated.sh", {}), ("alternate.sh", {})])
def test_the_flags_of_every_stage_exist_at_full_size(recipe, settings, tmp_path, monkeypatch):
    """Parse the recipes' commands at full size, which cannot be run here."""
    process, commands = note_commands(recipe, tmp_path, PROCESSES="8", **settings)
    stages = process.stdout.count("== ")
    assert len(commands) >= stages > 1
    parsed = []
    monkeypatch.setattr("utils.run_script", lambda main, args: parsed.append(args))
    for script, *arguments in commands:
        monkeypatch.setattr("sys.argv", [script, *arguments])
        runpy.run_path(script, run_name="__main__")  # exits if a flag is unknown
    assert len(parsed) == len(commands)


def note_commands(recipe, tmp_path, **settings):
    """Return (the finished process, each stage's command as words) of a recipe at full size, with
    empty files for data; no command is run.
    """
    note = tmp_path / "note"
    note.write_text(NOTE.format(path=tmp_path / "commands"))
    note.chmod(0o755)
    data = tmp_path / "data"
    for name in PUBLISHED_FILES:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        (data / name).touch()
    env = os.environ | {"DATA": str(data), "OUT": str(tmp_path / "out"), "DISK": "1",
                        "PYTHON": str(note), "LAUNCH": str(note), **settings}
    process = subprocess.run(["sh", ROOT / "scripts" / recipe], env=env, timeout=60,
                             capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    lines = (tmp_path / "commands").read_text().splitlines()
    return process, [line.split("\0")[:-1] for line in lines]


def test_an_update_that_cannot_be_shared_out_ends_a_retrievers_recipe_too(run_recipe, tmp_path):
    lines, errors = run_recipe("dpr-nq.sh", code=1, DATA=tmp_path, PROCESSES=3)
    assert not lines and len(errors) == 1
    assert errors[0].startswith("error: PROCESSES is '3', and 128, an update's questions")


@pytest.mark.parametrize("recipe, questions", [("nq.sh", [64]), ("dpr-nq.sh", [128]),
                                               ("3iter-nq.sh", [64, 64, 32, 64])])
def test_an_update_has_as_many_questions_on_fewer_gpus(recipe, questions, tmp_path):
    for processes in (8, 4, 1):
        folder = tmp_path / str(processes)
        folder.mkdir()
        _, commands = note_commands(recipe, folder, PROCESSES=str(processes))
        given = []
        for script, *arguments in commands:
            if "train_" in script:
                flags = dict(zip(arguments, arguments[1:]))
                given.append(int(flags["--batch_size"]) * processes
                             * int(flags.get("--grad_accumulation", 1)))
                is_chunked = "--chunk_size" in flags
                assert is_chunked == (processes < 8 and "train_dense" in script)
        assert given == questions


def test_help_is_the_head_and_no_error():
    process = subprocess.run(["sh", ROOT / "scripts" / "nq.sh", "--help"], capture_output=True,
                             text=True, timeout=30)
    assert process.returncode == 0 and "Fusion-in-Decoder" in process.stdout


@pytest.mark.parametrize("settings, message", [
    ({"SIZE": "huge"}, "SIZE is 'huge'; it must be one of: base large"),
    ({"PROCESSES": "3"}, "PROCESSES is '3', and 32, an update's questions or micro-batches, "),
    ({"LAUNCH": "torchrun -n 4"}, "with LAUNCH=torchrun ... give PROCESSES"),
    ({}, "NQ.test.idx.json: no such file; scripts/get_data.sh fid-nq fetches it, DATA names its"),
    ({"DISK": "33G"}, "DISK is '33G'; it must be a number of GB"),
    ({"DISK": "99999999"}, "out needs 99999999 GB; it holds 0 GB, and its disk has "),
    ({"PASSAGES": "dpr"}, "nq-train.json.gz: no such file; scripts/get_data.sh dpr-nq-results"),
])
def test_a_recipe_refuses_in_one_line(run_recipe, tmp_path, settings, message):
    _, errors = run_recipe("nq.sh", code=1, DATA=tmp_path, **settings)
    assert len(errors) == 1 and message in errors[0]


def test_folders_on_one_disk_need_room_together(tmp_path):
    free = shutil.disk_usage(tmp_path).free // 10 ** 9
    commands = (f". {ROOT}/scripts/stages.sh; OUT={tmp_path}/a; need_disk {free * 2 // 3} $OUT; "
                f"echo enough; need_disk {free * 2 // 3} {tmp_path}/b")
    process = subprocess.run(["bash", "-euc", commands, ROOT / "scripts" / "nq.sh"], timeout=30,
                             capture_output=True, text=True)
    assert process.returncode == 1 and process.stdout == "enough\n"
    assert f"which {free * 2 // 3} are for other folders: make room" in process.stderr


@pytest.fixture
def measures(tmp_path):
    """Return a folder of files of measures."""
    (tmp_path / "em.json").write_text('{"em": 0.5, "nq@20": 0.81}')
    (tmp_path / "central.json").write_text('{"em": 0.52}')
    (tmp_path / "args.json").write_text('{"dev_em": 49.0}')
    return tmp_path


def test_compare_tells_published_and_here(measures):
    lines, _ = run("scripts/compare.py", "--result", "NQ EM", "em.json", "em", "50.1", "0.1",
                   "--result", "dev", "args.json", "dev_em", "49.2", "0.3", "--result",
                   "federated", "em.json", "em", "central.json", "2", "--result", "top-20",
                   "em.json", "nq@20", "none", "0", cwd=measures)
    assert lines.splitlines() == [
        "NQ EM: published 50.10, here 50.00, difference -0.10",
        "dev: published 49.20, here 49.00, difference -0.20",
        "federated: central 52.00, here 50.00, difference -2.00",
        "top-20: none published, here 81.00"]


def test_compare_has_an_exit_code_of_its_own(measures):
    lines, errors = run("scripts/compare.py", "--toy", "--result", "EM", "em.json", "em", "51",
                        "0.5", "--result", "top", "em.json", "nq@20", "81", "0", cwd=measures,
                        code=2)
    assert lines.splitlines() == [
        "EM: on the embedded world expected 51.00, here 50.00, difference -1.00, more than 0.5",
        "top: on the embedded world expected 81.00, here 81.00, difference +0.00"]
    assert not errors


@pytest.mark.parametrize("words, message", [
    (["em.json", "f1", "1", "1"], "em.json: has no measure 'f1'"),
    (["em.json", "em", "no.json", "1"], "no.json: no such file"),
    (["no.json", "em", "1", "1"], "no.json: no such file"),
    (["em.json", "em", "1", "x"], "the tolerance 'x' is not a number"),
])
def test_compare_refuses_in_one_line(measures, words, message):
    _, errors = run("scripts/compare.py", "--result", "name", *words, cwd=measures, code=1)
    assert message in errors and len(errors.splitlines()) == 1


def test_a_run_becomes_qrels(tmp_path):
    (tmp_path / "a.trec").write_text("q1 Q0 d7 1 2.5 name\nq1 Q0 d3 2 1.5 name\n")
    run("scripts/run_qrels.py", "a.trec", "--output", "a.tsv", cwd=tmp_path)
    assert (tmp_path / "a.tsv").read_text().splitlines() == [
        "query-id\tcorpus-id\tscore", "q1\td7\t0", "q1\td3\t0"]
    (tmp_path / "a.trec").write_text("q1 0 d7 1\n")
    _, errors = run("scripts/run_qrels.py", "a.trec", "--output", "b.tsv", cwd=tmp_path, code=1)
    assert "a.trec:1: not a line of a TREC run" in errors and not (tmp_path / "b.tsv").exists()


def test_a_toy_that_was_killed_goes_on(run_recipe):
    """Expect exit code 2, because with few questions the results differ from the expected ones."""
    questions = {"QUESTIONS": "16 4 4", "PASSAGES": "dpr"}
    lines, _ = run_recipe("nq.sh", "--toy", code=-9, KILL_AT="train_epoch.py", **questions)
    assert stages_run(lines) == ["data", "reader"]
    lines, _ = run_recipe("nq.sh", "--toy", code=2, **questions)
    assert stages_run(lines) == ["reader", "test"]
    assert lines[-2].startswith("FiD base, NQ test EM: on the embedded world expected 83.00, here ")
    assert lines[-2].endswith(", more than 7")
    assert lines[-1].startswith("FiD base, NQ dev EM: none published, here ")


# ---------------------------------------------------------------- a recipe on small files

def test_the_fid_recipe_on_small_files(mirror, tmp_path, tiny, run_recipe):
    address, _ = mirror
    data = tmp_path / "data"
    process = get_data(data, address, "fid-nq", "fid-tqa")
    assert process.returncode == 0, process.stderr
    fetched = [path for path, _ in RangeHandler.requests]
    assert len(fetched) == len(set(fetched)) == 7  # what both need is fetched once

    # data, training, test
    out = tmp_path / "out"
    flags = "--epochs 1 --num_warmup_steps 1 --batch_size 2 --accumulate sum --max_length 60"
    lines, _ = run_recipe("nq.sh", code=2, DATA=data, MODEL=tiny, CONTEXTS=2, READER_FLAGS=flags)
    assert any("6 training and 2 dev questions, 2 contexts" in line for line in lines)
    assert "FiD base, NQ test EM: published 50.10, here 0.00, difference -50.10" in lines[-2]
    records = make_records(10)
    predictions = [json.loads(line) for line in (out / "test.jsonl").read_text().splitlines()]
    assert [row["answers"] for row in predictions] == [row["answers"] for row in records[8:]]
    test = json.loads((data / "NQ" / "test.json").read_text())
    for record, expected in zip(test, records[8:]):
        assert record["question"] == expected["question"]
        assert [context["text"] for context in record["ctxs"]] == [
            context["text"] for context in expected["ctxs"]]

    # TriviaQA's files serve too
    fid_data.main(argparse.Namespace(datasets=["tqa"], data=str(data), out=None, passages=None))
    dev = json.loads((data / "TQA" / "dev.json").read_text())
    assert [record["question"] for record in dev] == [row["question"] for row in records[6:8]]
