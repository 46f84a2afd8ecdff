"""The estimate of what a run will cost, printed after its first updates and by --plan."""
import json
import os
import re
from types import SimpleNamespace

import torch

from conftest import make_bert, make_records, run
from training import cost

FLAGS = ("--num_contexts", 3, "--max_length", 60, "--num_warmup_steps", 2, "--lr", "1e-3")


def file_bytes(line):
    """Return the bytes in a log line, of the model and of its state."""
    units = {"GB": 1e9, "MB": 1e6}
    return [float(number) * units[unit] for number, unit in re.findall(r"([\d.]+) (GB|MB)", line)]


def test_reader(tiny, tmp_path):
    data = tmp_path / "r.json"
    data.write_text(json.dumps(make_records(9)))
    flags = (data, data, "--t5_name", tiny, *FLAGS, "--epochs", 3, "--eval_every", 5)
    out, _ = run("train_epoch.py", tmp_path / "new" / "m", *flags, "--plan", "--tensorboard")
    assert os.listdir(tmp_path) == ["r.json"]
    assert re.search(r"cost: 27 updates at \d.* \(median of 4\), .*; 8 evaluations at about", out)
    line = next(line for line in out.splitlines() if "on disk" in line)
    model, state, _ = file_bytes(line)

    out, _ = run("train_epoch.py", tmp_path / "m", *flags)
    assert re.search(r"cost: 22 updates at .* \(median of 4\), .* evaluations not counted", out)
    assert out.index("cost:") < out.index("epoch   0")
    for path, expected in (("m/model.safetensors", model), ("m.state", state)):
        # headers, the schedule and the random states are not counted
        assert expected < os.path.getsize(tmp_path / path) < expected + 3e5
    run("train_epoch.py", tmp_path / "m", *flags, "--plan")  # an earlier run does not prevent it


def test_retriever(tmp_path):
    bert = make_bert(tmp_path / "bert")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"_id": str(i), "text": f"town {i}"}) + "\n"
                              for i in range(20)))
    records = [{"query": f"which town {i}", "pos": [f"town {i}"], "neg": ["river", "a baker"],
                "pos_index": [i]} for i in range(20)]
    data = tmp_path / "r.json"
    data.write_text(json.dumps(records))
    flags = ("--output_dir", tmp_path / "m", "--train_data", data, "--query_encoder", bert,
             "--batch_size", 2, "--group_size", 2, "--eval_data", data, "--corpus", corpus,
             "--metrics", "mrr", "--cutoffs", 10, "--eval_steps", 4, "--key_template", "{text}",
             "--max_steps", 10, "--query_max_length", 16, "--key_max_length", 16)
    out, _ = run("train_dense.py", *flags, "--plan")
    assert re.search(r"cost: 10 updates at .* \(median of 4\), .*; 3 evaluations at about", out)
    assert not (tmp_path / "m").exists() and not list(tmp_path.glob("m.*"))
    out, _ = run("train_dense.py", *flags)
    assert "cost: 5 updates at" in out


def test_a_disk_that_is_too_small_is_reported(tmp_path, monkeypatch):
    model = torch.nn.Linear(1000, 1000)
    lines = []
    run_ = SimpleNamespace(unwrapped=model, optimizer=torch.optim.AdamW(model.parameters()),
                           out=str(tmp_path / "new" / "m"),
                           world=SimpleNamespace(log=lines.append, is_main=True))
    cost.log_disk(run_)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=20 * 10 ** 6))
    cost.log_disk(run_)
    assert lines[0].startswith("cost: ") and "takes 4.0 MB on disk, its state 12.0 MB" in lines[0]
    assert lines[1].startswith("warning: too little space on disk; cost: ")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "m.state").write_bytes(bytes(12 * 10 ** 6))  # it will be replaced
    cost.log_disk(run_)
    assert lines[2].startswith("cost: ")
