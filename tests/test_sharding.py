"""train_epoch.py --fsdp: the numbers and files of DDP, every weight spread over two processes."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from causal_helpers import make_causal
from checkpoints import read_weights, write_weights
from conftest import killed_script, make_records, make_t5, run

# seven records: of an epoch's last update one process has two micro-batches, the other one; of the
# dev set's batches, two records each, one has two, the other two, of which one is a filler
FLAGS = ("--num_contexts", 3, "--max_length", 80, "--num_warmup_steps", 1, "--lr", "1e-3",
         "--epochs", 2, "--batch_size", 1, "--grad_accumulation", 2, "--batch_size_val", 3)

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "records.json"
    path.write_text(json.dumps(make_records(7)))
    return path


def rows(path):
    """The rows of a log without times."""
    return [{name: value for name, value in json.loads(line).items() if "second" not in name}
            for line in open(path)]


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_equals_ddp(family, data, tmp_path):
    # a file of bfloat16; half of Llama's answers end early, and with them a process's part
    if family == "t5":
        model, kind = make_t5(tmp_path / "model"), AutoModelForSeq2SeqLM
    else:
        ends = [1, *range(3, 400, 6)]
        model = make_causal(tmp_path / "model", family, eos_token_id=ends)
        kind = AutoModelForCausalLM
    kind.from_pretrained(model).bfloat16().save_pretrained(model)
    for name, flags in (("ddp", []), ("fsdp", ["--fsdp"])):
        out, _ = run("train_epoch.py", tmp_path / name, data, data, *FLAGS, "--t5_name", model,
                     "--dropout", 0, "--use_checkpoint", "--data_test", data, *flags, processes=2)
        assert "/7), F1" in out
    whole, spread = (load_file(tmp_path / name / "model.safetensors") for name in ("ddp", "fsdp"))
    assert list(whole) == list(spread)
    for name in whole:
        torch.testing.assert_close(whole[name], spread[name], atol=1e-5, rtol=1e-4)
    for a, b in zip(rows(tmp_path / "ddp.jsonl"), rows(tmp_path / "fsdp.jsonl"), strict=True):
        assert a["loss_curve"] == pytest.approx(b["loss_curve"], rel=1e-4)
        assert (a["dev_em"], a["dev_f1"]) == (b["dev_em"], b["dev_f1"])
    assert sorted(os.listdir(tmp_path / "ddp")) == sorted(os.listdir(tmp_path / "fsdp"))
    configs = [json.load(open(tmp_path / name / "config.json")) for name in ("ddp", "fsdp")]
    assert configs[0] == configs[1] and configs[0]["dtype"] == "float32"

    # test.py, too; what is generated and scored with every block gathered is what is without
    outputs = []
    for name, flags in (("plain", []), ("spread", ["--fsdp"])):
        out = tmp_path / f"{name}.jsonl"
        run("test.py", tmp_path / "fsdp", data, "--pred", out, "--scores", "--batch_size", 3,
            *flags, processes=2)
        outputs.append([json.loads(line) for line in open(out)])
    for a, b in zip(*outputs, strict=True):
        assert a["prediction"] == b["prediction"]
        for context, other in zip(a["contexts"], b["contexts"], strict=True):
            assert context["score"] == pytest.approx(other["score"], abs=1e-4)

    # a process's state holds its half alone
    part = torch.load(next(tmp_path.glob("fsdp.state.1of2.*")), weights_only=True)
    for name, weight in part["model"].items():
        if name.removeprefix("t5.").removeprefix("lm.") in spread:
            assert weight.shape[0] <= (spread[name.split(".", 1)[1]].shape[0] + 1) // 2


def test_a_killed_run_goes_on_bit_for_bit(tiny, data, tmp_path):
    flags = [data, data, *FLAGS, "--t5_name", tiny, "--fsdp", "--save_every", 1]
    run("train_epoch.py", tmp_path / "whole", *flags, processes=2)
    # the other process's third part is written, the main one's not
    killed = killed_script(tmp_path, 3)
    run(killed, tmp_path / "m", *flags, processes=2, code=-9)
    (tmp_path / "m.state.1of2.2.mine").touch()  # a user's copy
    parts = sorted(path.name for path in tmp_path.glob("m.state.*.[0-9]"))
    assert parts == ["m.state.1of2.2", "m.state.1of2.3"]  # OUT.state is of the second update
    out, _ = run("train_epoch.py", tmp_path / "m", *flags, "--resume", processes=2)
    assert "resuming after 2 updates" in out
    assert rows(tmp_path / "m.jsonl") == rows(tmp_path / "whole.jsonl")
    for name in ("state", "state.1of2.4"):
        a, b = (torch.load(f"{tmp_path / out}.{name}", weights_only=True) for out in ("m", "whole"))
        assert all(torch.equal(a["model"][key], b["model"][key]) for key in b["model"])
        for index, moments in b["optimizer"]["state"].items():
            assert all(torch.equal(a["optimizer"]["state"][index][key], moments[key])
                       for key in moments)
    assert sorted(path.name for path in tmp_path.glob("m.state*")) == [
        "m.state", "m.state.1of2.2.mine", "m.state.1of2.4"]

    # a part is missing; then the run is replaced by one that needs none
    os.remove(tmp_path / "m.state.1of2.4")
    _, error = run("train_epoch.py", tmp_path / "m", *flags, "--resume", processes=2, code=1)
    assert "m.state.1of2.4: is missing" in error and "Traceback" not in error


def test_one_process_is_refused(tiny, data, tmp_path):
    flags = ("--t5_name", tiny, "--fsdp")
    _, error = run("train_epoch.py", tmp_path / "m", data, data, *flags, code=1)
    assert error.startswith("error: --fsdp spreads a model over several processes")


def test_large_weights_go_into_several_files(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("checkpoints.FILE_BYTES", 20_000)
    weights = read_weights(tiny)
    (tmp_path / "config.json").write_text((Path(tiny) / "config.json").read_text())
    write_weights(tmp_path, weights)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = read_weights(tmp_path)
    assert again.keys() == weights.keys()
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], weights[name]) and torch.equal(theirs[name], weights[name])
               for name in weights)
