"""The shell recipes: fetching from a loopback server, resuming, sizes; minDPR's commands on small files."""
import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import pytest

from conftest import ROOT, WORDS, make_bert


class Ranged(http.server.SimpleHTTPRequestHandler):
    """Serves files, from the middle on if asked to, and notes what was asked."""
    asked = []

    def do_GET(self):
        path, start = self.translate_path(self.path), int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        type(self).asked.append((self.path, start))
        with open(path, "rb") as file:
            content = file.read()
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def mirror(tmp_path):
    """(address, folder) of a server that has DPR's question files."""
    folder = tmp_path / "mirror" / "dpr" / "data" / "retriever"
    folder.mkdir(parents=True)
    for name in ("nq-dev.qa.csv", "nq-test.qa.csv"):
        (folder / name).write_text(name * 1000)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Ranged, directory=str(tmp_path / "mirror")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Ranged.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


def get_data(out, mirror, *names):
    env = os.environ | {"OUT": str(out), "BASE_URL": mirror, "no_proxy": "127.0.0.1"}
    return subprocess.run(["bash", ROOT / "scripts" / "get_data.sh", *names], env=env, capture_output=True, text=True, timeout=60)


def test_data_is_fetched_resumed_and_verified(mirror, tmp_path):
    address, folder = mirror
    out = tmp_path / "out"
    out.mkdir()
    (out / "nq-test.qa.csv").write_text((folder / "nq-test.qa.csv").read_text()[:5000])  # cut off in an earlier run
    done = get_data(out, address, "dpr-nq-qa")
    assert done.returncode == 0, done.stderr
    assert "nq-dev.qa.csv: 0 MB" in done.stdout and "nq-test.qa.csv: whole" in done.stdout
    for name in ("nq-dev.qa.csv", "nq-test.qa.csv"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    assert ("/dpr/data/retriever/nq-test.qa.csv", 5000) in Ranged.asked
    Ranged.asked.clear()
    assert get_data(out, address, "dpr-nq-qa").returncode == 0 and not Ranged.asked  # nothing is fetched twice


def test_what_cannot_be_fetched(mirror, tmp_path):
    done = get_data(tmp_path / "out", mirror[0], "passages")
    assert done.returncode == 1 and "cannot be reached" in done.stderr
    done = get_data(tmp_path / "out", mirror[0], "nonsense")
    assert done.returncode == 1 and "no data set is named nonsense" in done.stderr


def test_the_dpr_recipe_on_small_files(tmp_path):
    texts = [" ".join(WORDS[i:i + 6]) for i in range(20)]
    ctxs = [{"title": "it", "text": text} for text in texts]
    records = [{"question": " ".join(texts[i].split()[:3]), "answers": ["x"], "positive_ctxs": [ctxs[i]],
                "hard_negative_ctxs": [ctxs[i + 9]], "negative_ctxs": []} for i in range(10)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    (tmp_path / "corpus.tsv").write_text("id\ttext\ttitle\n" + "".join(f"{i}\t{text}\tit\n" for i, text in enumerate(texts)))
    (tmp_path / "test.csv").write_text("".join(f"{r['question']}\t['{texts[i].split()[0]}']\n" for i, r in enumerate(records)))
    env = os.environ | {"MODEL": make_bert(tmp_path / "bert"), "TRAIN": f"{tmp_path}/train.json", "DEV": f"{tmp_path}/train.json",
                        "CORPUS": f"{tmp_path}/corpus.tsv", "TEST": f"{tmp_path}/test.csv", "OUT": f"{tmp_path}/out", "GPUS": "",
                        "LAUNCH": sys.executable, "EPOCHS": "4", "WARMUP": "1", "EVAL_STEPS": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", ROOT / "scripts" / "dpr-nq.sh"], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "best rank" in done.stdout and json.load(open(tmp_path / "out" / "measures.json"))["nq@20"] == 1
    assert len(json.load(open(tmp_path / "out" / "test.json"))[0]["ctxs"]) == 20
