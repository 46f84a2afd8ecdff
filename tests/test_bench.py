"""bench/reader.py runs as the README says, on one small cell."""
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
