"""training/resume.py: what --overwrite does to an earlier run's state.

What is saved and resumed is tested with the training scripts.
"""
from types import SimpleNamespace

import pytest

from training.resume import (
    allow_no_inputs,
    forget_replaced_state,
    hash_inputs,
    refuse_other_flags,
    refuse_other_inputs,
)
from utils import InputError


@pytest.mark.parametrize("overwrite, is_main, is_left", [
    (True, True, False), (True, False, True), (False, True, True)])
def test_a_replaced_runs_state_is_removed(overwrite, is_main, is_left, tmp_path):
    """Otherwise --resume after a run that was killed early would continue the replaced one."""
    state = tmp_path / "run.state"
    arguments = str(tmp_path / "run"), overwrite, SimpleNamespace(is_main=is_main)
    forget_replaced_state(*arguments)  # there is none
    state.write_text("old")
    forget_replaced_state(*arguments)
    assert state.exists() == is_left


def test_a_flag_that_is_newer_than_the_state_may_be_off():
    refuse_other_flags("m.state", {"lr": 1, "new": False, "other": None, "gpus": "0"}, {"lr": 1},
                       {"gpus"})
    refuse_other_flags("m.state", {"lr": 1}, {"lr": 1, "fsdp": False}, set())  # a removed flag
    with pytest.raises(InputError, match=r"is from a run with --new None \(now True\)"):
        refuse_other_flags("m.state", {"lr": 1, "new": True}, {"lr": 1}, set())
    with pytest.raises(InputError, match=r"is from a run with --lr 1 \(now 0\)"):
        refuse_other_flags("m.state", {"lr": 0}, {"lr": 1}, set())


def test_a_run_does_not_continue_with_another_file_of_the_same_name(tmp_path):
    """Check files of equal length, too (A32). A state of an earlier version has no hashes, and is
    accepted.
    """
    world = SimpleNamespace(is_main=True, size=1)
    records, corpus = str(tmp_path / "r.json"), str(tmp_path / "c.tsv")
    for path in (records, corpus):
        with open(path, "w") as file:
            file.write("a" * 200_000)
    files = {records: True, corpus: False, str(tmp_path / "absent"): True, str(tmp_path): True}
    then = hash_inputs(files, world)
    assert set(then) == {records, corpus}
    refuse_other_inputs("m.state", hash_inputs(files, world), then)
    for path in (records, corpus):
        with open(path, "r+") as file:
            file.write("b")
        with pytest.raises(InputError, match="m.state is from a run in which '.* another"):
            refuse_other_inputs("m.state", hash_inputs({path: files[path]}, world),
                                {path: then[path]})
    old = {"model": {}}
    allow_no_inputs(old)
    refuse_other_inputs("m.state", hash_inputs(files, world), old["inputs"])
