"""The shell recipes: data fetched from a loopback server, and minDPR's commands on small files."""
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from conftest import ROOT, WORDS, make_bert


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files, from a later byte on if requested, and notes the requests."""
    requests = []  # (path, first byte)

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


@pytest.fixture
def mirror(tmp_path):
    """(address, folder) of a server that has DPR's question files."""
    root = tmp_path / "mirror"
    folder = root / "dpr" / "data" / "retriever"
    folder.mkdir(parents=True)
    for name in ("nq-dev.qa.csv", "nq-test.qa.csv"):
        (folder / name).write_text(name * 1000)
    handler = functools.partial(RangeHandler, directory=str(root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    RangeHandler.requests.clear()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def get_data(out, mirror, *names):
    """The finished process of scripts/get_data.sh."""
    env = os.environ | {"OUT": str(out), "BASE_URL": mirror, "no_proxy": "127.0.0.1"}
    return subprocess.run(["bash", ROOT / "scripts" / "get_data.sh", *names], env=env,
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
    process = get_data(tmp_path / "out", address, "passages")
    assert process.returncode == 1
    assert "cannot be reached" in process.stderr
    process = get_data(tmp_path / "out", address, "nonsense")
    assert process.returncode == 1
    assert "no data set is named nonsense" in process.stderr


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
    process = subprocess.run(["bash", ROOT / "scripts" / "dpr-nq.sh"],
                             env=os.environ | files | settings,
                             capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout + process.stderr
    assert "best rank" in process.stdout
    assert json.loads((out / "measures.json").read_text())["nq@20"] == 1
    first_record = json.loads((out / "test.json").read_text())[0]
    assert len(first_record["ctxs"]) == 20
