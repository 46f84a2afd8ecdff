"""The shell recipes: data fetched from a loopback server, DPR's and FiD's runs on small files."""
import argparse
import functools
import gzip
import http.server
import io
import json
import os
import subprocess
import sys
import tarfile
import threading

import pytest

import fid_data
from conftest import ROOT, WORDS, make_bert, make_records


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, from a later byte on if requested, and notes the requests."""
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
    """Writes a .tar.gz of {name: JSON content}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            packed = json.dumps(content).encode()
            member = tarfile.TarInfo(name)
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))


def write_fid_files(root):
    """Writes what FiD's get-data.sh fetches: ten questions of a small world, eight for training."""
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
    """(address, folder) of a server that has DPR's question files and FiD's data."""
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
    """The finished process of scripts/get_data.sh."""
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


def test_the_fid_recipe_on_small_files(mirror, tmp_path, tiny):
    address, _ = mirror
    data = tmp_path / "data"
    process = get_data(data, address, "fid-nq", "fid-tqa")
    assert process.returncode == 0, process.stderr
    fetched = [path for path, _ in RangeHandler.requests]
    assert len(fetched) == len(set(fetched)) == 7  # what both need is fetched once

    # data, training, test
    out = tmp_path / "out"
    settings = {"DATA": str(data), "OUT": str(out), "MODEL": tiny, "GPUS": "", "CONTEXTS": "2",
                "LAUNCH": sys.executable, "PYTHON": sys.executable, "EPOCHS": "1", "WARMUP": "1",
                "OMP_NUM_THREADS": "1"}
    process = subprocess.run(["sh", ROOT / "scripts" / "fid-nq.sh"], env=os.environ | settings,
                             capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "6 training and 2 dev questions, 2 contexts" in process.stdout
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


def write_dpr_files(folder):
    """Writes train.json, corpus.tsv and test.csv in DPR's forms: twenty passages, ten questions."""
    texts = [" ".join(WORDS[i:i + 6]) for i in range(20)]
    passages = [{"title": "it", "text": text} for text in texts]
    records, test_rows = [], []
    for i in range(10):
        words = texts[i].split()
        question = " ".join(words[:3])
        records.append({"question": question, "answers": ["x"], "positive_ctxs": [passages[i]],
                        "hard_negative_ctxs": [passages[i + 9]], "negative_ctxs": []})
        test_rows.append(f"{question}\t['{words[0]}']\n")
    corpus_rows = [f"{i}\t{text}\tit\n" for i, text in enumerate(texts)]
    (folder / "train.json").write_text(json.dumps(records))
    (folder / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(corpus_rows))
    (folder / "test.csv").write_text("".join(test_rows))


def test_the_dpr_recipe_on_small_files(tmp_path):
    write_dpr_files(tmp_path)
    out = tmp_path / "out"
    files = {"MODEL": make_bert(tmp_path / "bert"), "TRAIN": f"{tmp_path}/train.json",
             "DEV": f"{tmp_path}/train.json", "CORPUS": f"{tmp_path}/corpus.tsv",
             "TEST": f"{tmp_path}/test.csv", "OUT": str(out)}
    settings = {"GPUS": "", "LAUNCH": sys.executable, "EPOCHS": "4", "WARMUP": "1",
                "EVAL_STEPS": "2", "OMP_NUM_THREADS": "1"}
    process = subprocess.run(["sh", ROOT / "scripts" / "dpr-nq.sh"],
                             env=os.environ | files | settings,
                             capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "best rank" in process.stdout
    assert json.loads((out / "measures.json").read_text())["nq@20"] == 1
    first_record = json.loads((out / "test.json").read_text())[0]
    assert len(first_record["ctxs"]) == 20
