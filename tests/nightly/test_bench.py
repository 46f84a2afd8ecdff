"""The benchmarks run as the README says, on small cells."""
import json
import re
import subprocess
import sys

from causal_helpers import make_causal
from conftest import ROOT


def run_bench(script, *flags):
    """Runs a script of bench/ and returns what it prints."""
    command = [sys.executable, ROOT / "bench" / script, *map(str, flags)]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_reader_bench(tmp_path):
    output = run_bench("reader.py", "--contexts", 2, "--modes", "train", "--precisions", "float32",
                       "--rounds", 1, "--readers", "padded SDPA", "ours",
                       "--json", tmp_path / "rows.json", "--picture", tmp_path / "speed.svg")
    assert "losses agree" in output
    assert "input pipeline" in output
    padded, ours = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert ours["reader"] == "ours"
    assert ours["speed_ratio"] > 0
    assert 0 < ours["memory"] < padded["memory"]
    assert "<svg" in (tmp_path / "speed.svg").read_text()


def test_retrieve_bench(tmp_path):
    output = run_bench("retrieve.py", "--vectors", 3000, "--width", 16, "--queries", 20,
                       "--factories", "HNSW8", "Flat", "--passages", 200, "--encoded", 64,
                       "--rounds", 1, "--json", tmp_path / "rows.json", "--folder", tmp_path)
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    indices = {row["name"]: row for row in rows if row["what"] == "index"}
    assert indices["Flat"]["recall"] == 1
    assert indices["Flat"]["bytes"] == 3000 * 16 * 2
    assert 0.5 < indices["HNSW8"]["recall"] <= 1
    assert {row["what"] for row in rows} >= {"BM25", "encoding", "exact search, 20 queries"}
    assert "| HNSW8 |" in output


def test_lm_score_bench(tmp_path):
    model = make_causal(tmp_path / "model", "gpt2")
    output = run_bench("lm_score.py", "--model", model, "--questions", 1, "--keys", 3,
                       "--rounds", 1, "--json", tmp_path / "rows.json")
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert {(row["precision"], row["template"]) for row in rows} == {
        (precision, template) for precision in ("float32", "bf16")
        for template in ("qa", "question first")}
    assert all(row["keys_per_second"] > 0 for row in rows)
    assert output.count("keys per second") == 12


def test_causal_reader_bench(tmp_path):
    model = make_causal(tmp_path / "model", max_position_embeddings=1024)
    output = run_bench("causal_reader.py", "--model", model, "--questions", 1, 2,
                       "--answer_tokens", 3, "--rounds", 1, "--json", tmp_path / "rows.json")
    assert "answers agree" in output
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 2 * 4 + 2 * 2 and all(row["ours"] > 0 for row in rows)


def test_federate_bench(tmp_path):
    output = run_bench("federate.py", "--models", "tiny", "--rounds", 1, "--no_deployment",
                       "--json", tmp_path / "rows.json")
    plain, half = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert 4 * plain["weights"] < plain["mb_down"] * 1e6 < 4.1 * plain["weights"]
    assert half["mb_up"] * 1e6 == 2 * half["weights"]
    assert all(row[stage] > 0 for row in (plain, half) for stage in ("pack", "client", "check"))
    assert "| tiny | bf16 | 1.6 M |" in output


def test_plan_bench(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import plan
    small = {"d_model": 32, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    monkeypatch.setitem(plan.MODELS, "t5-base", plan.T5Config(**plan.T5 | small))
    monkeypatch.setitem(plan.MODELS, "bert-base", plan.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
    monkeypatch.setitem(plan.ROWS, "FiD base", plan.ROWS["FiD base"]._replace(
        flags="--num_contexts 2 --batch_size 1"))
    monkeypatch.setattr(sys, "argv", ["plan.py", "--rows", "FiD base", "DPR", "--passages", "300"])
    plan.main(plan.parse_args())
    output = capsys.readouterr().out
    assert re.search(r"FiD base: 1 M parameters, an update .*; 18,555 updates .* h", output)
    assert re.search(r"DPR: 2 M parameters, .*; 18,400 updates .* h", output)
    assert re.search(r"encoding: [\d,]+ passages a second; 21,015,324 in .* h on one", output)


def test_gpu_bench(tmp_path):
    """Check the parts that a CPU can run in a short time."""
    output = run_bench("gpu.py", "--shape", "small", "--contexts", 2, "--batch_size", 1,
                       "--rounds", 1, "--parts", "machine", "numbers", "attention", "readers",
                       "--output", tmp_path / "gpu.txt")
    assert (tmp_path / "gpu.txt").read_text() in output
    assert "Error" not in output
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    errors = [row["worst"] for row in rows if row["part"] == "numbers"]
    assert len(errors) == 2 and max(errors) < 1e-4
    assert {row["mode"] for row in rows if row["part"] == "readers"} == {"train", "eval"}


def test_full_size_loader(tmp_path):
    output = run_bench("full_size.py", "--loader", "--questions", 2, "--contexts", 3,
                       "--passages", 50, "--folder", tmp_path)
    assert output.count("questions/s by tokenizer(texts)") == 2
    assert "MiniLM's, 50 documents:" in output


def test_full_size_records_bench(tmp_path):
    output = run_bench("full_size.py", "--records", "--questions", 30, "--contexts", 2, "--folder",
                       tmp_path)
    assert "30 and 1,000 questions with 2 contexts" in output
    for name in ("first start", "later start", "an epoch, 3 workers", "2 processes", "8 processes"):
        assert re.search(rf"^{name}: .* s after the imports to the first batch", output, re.M)
    assert not list(tmp_path.iterdir())


def test_full_size_bm25(tmp_path):
    output = run_bench("full_size.py", "--bm25", "--passages", 2000, "--queries", 20, "--folder",
                       tmp_path)
    assert "2,000 passages in five parts: documents and scores of 20 queries equal" in output
    assert "index, 2 processes" in output
    assert "search, 2 processes: 20 queries" in output
    assert not list(tmp_path.rglob("*.tsv"))


def test_full_size_vectors(tmp_path):
    output = run_bench("full_size.py", "--vectors", "--passages", 30000, "--width", 16,
                       "--queries", 20, "--factory", "IVF16,Flat", "--nprobe", 2, 16, "--folder",
                       tmp_path)
    assert re.search("^writing the vectors: killed after .*^writing the vectors: .* was there$",
                     output, re.M | re.S)
    assert "; 100% was there" in output
    recalls = [float(recall) for recall in re.findall(r"recall@100 (\S+)", output)]
    assert recalls[0] < recalls[1] == 1
    assert not list(tmp_path.iterdir())
