"""training/checkpoints.py: the folder that a run writes, and what it must not touch there."""
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForSeq2SeqLM

from conftest import run
from training.checkpoints import read_weights, write_weights
from training.output_folder import claim_folder, finish_saving, save_checkpoint
from utils import InputError, World

WORLD = World(0, 0, 1, torch.device("cpu"))


def write_files(*names):
    """Return a writer for save_checkpoint, of files that contain their own names."""
    def writer(folder):
        for name in names:
            path = os.path.join(folder, name)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            with open(path, "w") as file:
                file.write(name)
    return writer


def claim(out, resume=False, overwrite=False):
    with claim_folder(str(out), resume, overwrite, WORLD):
        pass


def names_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def out(tmp_path):
    """Return a folder with a checkpoint of two encoders and a file of the user."""
    folder = tmp_path / "out"
    save_checkpoint(str(folder), {"best": 1}, write_files("query/model.safetensors",
                                                          "key/model.safetensors"))
    (folder / "query" / "notes.txt").write_text("mine")
    return folder


# ---------------------------------------------------------------- what is claimed

def test_files_of_the_users_are_never_touched(tmp_path):
    notes = tmp_path / "proj" / "query" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(InputError, match="holds files that no run has written, such as query"):
            claim(tmp_path / "proj", **flags)
    assert notes.read_text() == "mine"


def test_a_pretrained_model_is_no_output(tiny, records_file, tmp_path):
    before = {name: os.stat(f"{tiny}/{name}").st_mtime_ns for name in os.listdir(tiny)}
    _, error = run("train_epoch.py", tiny, records_file, records_file, "--t5_name", tiny,
                   "--overwrite", code=1)
    assert "holds files that no run has written" in error
    _, error = run("train_dense.py", "--output_dir", tiny, "--train_data", records_file, code=1)
    assert "holds files that no run has written" in error
    assert before == {name: os.stat(f"{tiny}/{name}").st_mtime_ns for name in os.listdir(tiny)}


def test_an_earlier_run_is_replaced_only_on_request(out, tmp_path, capsys):
    with pytest.raises(InputError, match="--resume continues it, --overwrite replaces it"):
        claim(out)
    claim(out, overwrite=True)
    claim(out, resume=True)
    assert "no {} to resume from".format(f"{out}.state") in capsys.readouterr().out
    with pytest.raises(InputError, match="leave one out"):
        claim(out, resume=True, overwrite=True)
    torch.save({}, tmp_path / "new.state")  # a state without a model
    with pytest.raises(InputError, match="holds an earlier run"):
        claim(tmp_path / "new")


def test_training_data_beside_the_folder_is_no_log(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"question": "who", "answers": ["x"]}) + "\n")
    with pytest.raises(InputError, match="train.jsonl: was not written by a run"):
        claim(tmp_path / "train", overwrite=True)
    data.write_text(json.dumps({"update": 1, "loss_curve": [1.0]}) + "\n")
    claim(tmp_path / "train")  # a run that was killed before it saved anything


@pytest.mark.parametrize("name", ["run.state", "run.jsonl"])
def test_what_lies_beside_the_folder_is_a_runs(name, tmp_path):
    path = tmp_path / name
    path.mkdir()
    with pytest.raises(InputError, match=f"{name}: was not written by a run"):
        claim(tmp_path / "run", overwrite=True)
    path.rmdir()
    path.write_text("my notes")
    with pytest.raises(InputError, match=f"{name}: was not written by a run"):
        claim(tmp_path / "run", overwrite=True)
    assert path.read_text() == "my notes" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("files", [["../precious.txt"], ["/etc/hosts"], [1], {"a": 1}, "all"])
def test_args_json_names_files_of_its_folder_only(files, out):
    (out / "args.json").write_text(json.dumps({"files": files}))
    with pytest.raises(InputError, match="args.json: 'files' must list files of the folder"):
        claim(out, overwrite=True)


def test_a_folder_of_an_earlier_version_is_refused(out):
    (out / "args.json").write_text(json.dumps({"versions": {}, "args": {}}))
    with pytest.raises(InputError, match="by an earlier version of this code"):
        claim(out, overwrite=True)


def test_a_full_disk_is_reported(out, monkeypatch):
    def fail(folder):
        raise SafetensorError("No space left on device")
    with pytest.raises(InputError, match="cannot be written .*No space left"):
        save_checkpoint(str(out), {}, fail)


def test_two_runs_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("training.output_folder.time.sleep", lambda seconds: None)
    out = tmp_path / "out"
    with claim_folder(str(out), False, False, WORLD):
        for _ in range(2):  # a refused run does not release the lock
            with pytest.raises(InputError, match="another run is writing there"):
                claim(out)
            assert out.exists()
    assert not out.exists()  # nothing was saved, nothing is left
    out.mkdir()
    claim(out)
    assert out.exists()  # the user's folder, though empty


def test_a_claim_removes_what_killed_runs_left(out):
    (out / ".writing").mkdir()
    (out / ".writing" / "model.safetensors").write_text("half")
    leftovers = [out.parent / "out.state.77.writing", out.parent / "out.jsonl.77.writing"]
    for leftover in leftovers:
        leftover.write_text("half")
    claim(out, overwrite=True)
    assert not any(leftover.exists() for leftover in leftovers)
    assert not (out / ".writing").exists() and not (out / "model.safetensors").exists()


# ---------------------------------------------------------------- what is saved

def test_a_checkpoint_replaces_its_own_files_only(out):
    def close(folder):  # as safetensors does
        os.chmod(os.path.join(folder, "config.json"), 0o600)
    save_checkpoint(str(out), {"best": 2}, write_files("config.json", "model.safetensors"), close)
    assert names_below(out) == ["args.json", "config.json", "model.safetensors", "query/notes.txt"]
    assert not (out / "key").exists()
    assert (out / "config.json").stat().st_mode == (out / "args.json").stat().st_mode
    args = json.loads((out / "args.json").read_text())
    assert args == {"best": 2, "files": ["config.json", "model.safetensors"]}


@pytest.mark.parametrize("kill_at", range(5))
def test_a_killed_save_is_finished_or_has_not_begun(kill_at, out, monkeypatch):
    """Kill before each change of the folder: two files are moved, two removed, args.json is moved.
    """
    class Killed(BaseException):
        pass

    changes = []

    def dying(change):
        def die_or_change(*paths):
            if ".writing" not in str(paths[-1]):
                if len(changes) == kill_at:
                    raise Killed
                changes.append(paths)
            change(*paths)
        return die_or_change

    monkeypatch.setattr("records.files.os.replace", dying(os.replace))
    monkeypatch.setattr("training.output_folder.os.remove", dying(os.remove))
    with pytest.raises(Killed):
        save_checkpoint(str(out), {"best": 2}, write_files("config.json", "model.safetensors"))
    monkeypatch.undo()
    finish_saving(str(out))
    assert names_below(out) == ["args.json", "config.json", "model.safetensors", "query/notes.txt"]
    assert json.loads((out / "args.json").read_text())["best"] == 2


def test_a_save_that_is_killed_early_leaves_the_old_checkpoint(out):
    before = names_below(out)

    def fail(folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(str(out), {"best": 2}, write_files("config.json"), fail)
    finish_saving(str(out))
    assert names_below(out) == before


def test_an_error_without_a_kind_while_saving_is_one_of_writing(tmp_path):
    def write_tokenizer(folder):
        raise Exception("No space left on device (os error 28)")  # as tokenizers do
    with pytest.raises(InputError, match="cannot be written .*No space left"):
        save_checkpoint(str(tmp_path / "out"), {}, write_tokenizer)


def test_large_weights_go_into_several_files(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoints.FILE_BYTES", 20_000)
    weights = read_weights(tiny)
    (tmp_path / "config.json").write_text((Path(tiny) / "config.json").read_text())
    write_weights(tmp_path, weights)
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = read_weights(tmp_path)
    assert again.keys() == weights.keys()
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], weights[name]) and torch.equal(theirs[name], weights[name])
               for name in weights)
