"""The benchmarks run as the README says, on small cells."""
import json
import subprocess
import sys

from conftest import ROOT


def test_reader_bench(tmp_path):
    flags = ["--contexts", "2", "--modes", "train", "--precisions", "float32", "--rounds", "1", "--readers", "padded SDPA", "ours",
             "--json", tmp_path / "rows.json", "--picture", tmp_path / "speed.svg"]
    done = subprocess.run([sys.executable, ROOT / "bench" / "reader.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "losses agree" in done.stdout and "input pipeline" in done.stdout
    padded, ours = json.load(open(tmp_path / "rows.json"))["rows"]
    assert ours["reader"] == "ours" and ours["speed_ratio"] > 0
    assert 0 < ours["memory"] < padded["memory"]
    assert "<svg" in (tmp_path / "speed.svg").read_text()


def test_retrieve_bench(tmp_path):
    flags = ["--vectors", "3000", "--width", "16", "--queries", "20", "--factories", "HNSW8", "Flat", "--passages", "200", "--encoded", "64",
             "--rounds", "1", "--json", tmp_path / "rows.json", "--folder", tmp_path]
    done = subprocess.run([sys.executable, ROOT / "bench" / "retrieve.py", *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.load(open(tmp_path / "rows.json"))["rows"]
    indices = {row["name"]: row for row in rows if row["what"] == "index"}
    assert indices["Flat"]["recall"] == 1 and 0.5 < indices["HNSW8"]["recall"] <= 1 and indices["Flat"]["bytes"] == 3000 * 16 * 2
    assert {row["what"] for row in rows} >= {"BM25", "encoding", "exact search, 20 queries"} and "| HNSW8 |" in done.stdout
