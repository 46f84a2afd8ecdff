"""resume.py: what --overwrite does to an earlier run's state.

What is saved and resumed is tested with the training scripts.
"""
from types import SimpleNamespace

import pytest

from resume import forget_replaced_state, refuse_other_flags
from utils import InputError


@pytest.mark.parametrize("overwrite, is_main, is_left", [
    (True, True, False), (True, False, True), (False, True, True)])
def test_a_replaced_runs_state_goes(overwrite, is_main, is_left, tmp_path):
    """Else a run that is killed before it saves anything would go on with the replaced one."""
    state = tmp_path / "run.state"
    run = SimpleNamespace(out=str(tmp_path / "run"), args=SimpleNamespace(overwrite=overwrite),
                          world=SimpleNamespace(is_main=is_main))
    forget_replaced_state(run)  # there is none
    state.write_text("old")
    forget_replaced_state(run)
    assert state.exists() == is_left


def test_a_flag_that_is_newer_than_the_state_may_be_off():
    refuse_other_flags("m.state", {"lr": 1, "new": False, "other": None, "gpus": "0"}, {"lr": 1},
                       {"gpus"})
    with pytest.raises(InputError, match=r"is of a run with --new None \(now True\)"):
        refuse_other_flags("m.state", {"lr": 1, "new": True}, {"lr": 1}, set())
    with pytest.raises(InputError, match=r"is of a run with --lr 1 \(now 0\)"):
        refuse_other_flags("m.state", {"lr": 0}, {"lr": 1}, set())
