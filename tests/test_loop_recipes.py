"""The recipes of the loop, their stages and their table, on small files."""
import json
import os
import subprocess

import pytest

from conftest import ROOT, run

# ---------------------------------------------------------------- stages

RECIPE = """
set -euo pipefail
. "$ROOT/scripts/stages.sh"
stage first ./record.py --lr "${LR:-1}" --gpus "${GPUS-}" --resume "two words"
stage second ./record.py ${FAIL:+--fail} --index "$OUT/index"
stage third $LAUNCH ./record.py --resume
"""
# notes how it was called
RECORD = """#!/usr/bin/env bash
echo "$@" >> calls
[[ $* != *--fail* ]] || { [ -e mended ] || exit 7; }
"""


@pytest.fixture
def recipe(tmp_path):
    """A function(**settings) that runs a recipe of three stages: (finished process, its calls)."""
    (tmp_path / "recipe.sh").write_text(RECIPE)
    (tmp_path / "record.py").write_text(RECORD)
    (tmp_path / "record.py").chmod(0o755)

    def start(code=0, **settings):
        (tmp_path / "calls").write_text("")
        env = os.environ | {"ROOT": str(ROOT), "OUT": "out", "LAUNCH": "env"} | settings
        process = subprocess.run(["bash", "recipe.sh"], cwd=tmp_path, env=env, timeout=30,
                                 capture_output=True, text=True)
        assert process.returncode == code, process.stderr
        return process, (tmp_path / "calls").read_text().splitlines()
    return start


def test_a_stage_runs_once(recipe):
    process, calls = recipe()
    assert process.stdout.splitlines() == ["== first", "== second", "== third"]
    assert calls == ["--lr 1 --gpus  --resume two words", "--index out/index", "--resume"]
    # what launches a stage, and on which GPUs, changes nothing that it makes
    process, calls = recipe(GPUS="0,1", LAUNCH="env A=1")
    assert process.stdout.splitlines() == [f"== {name}: done before"
                                           for name in ("first", "second", "third")]
    assert not calls and not process.stderr


def test_a_recipe_goes_on_at_the_stage_that_failed(recipe, tmp_path):
    process, calls = recipe(code=7, FAIL="1")
    assert process.stderr.splitlines() == [
        "error: stage second failed with exit code 7; the same command goes on there"]
    assert len(calls) == 2
    (tmp_path / "mended").touch()
    process, calls = recipe(FAIL="1")
    assert process.stdout.splitlines() == ["== first: done before", "== second", "== third"]
    assert calls == ["--fail --index out/index", "--resume"]  # --resume: third is new


def test_a_changed_command_is_told_and_run_anew_on_demand(recipe, tmp_path):
    recipe()
    process, calls = recipe(code=1, LR="2")
    assert process.stderr.splitlines() == [
        "error: stage first in out was run with other settings (--lr 1, now --lr 2); give another "
        "OUT, or REDO=first to run it and the stages behind it anew"]
    assert not calls

    # an earlier run's models are replaced, also by a command that goes on after a failure
    process, calls = recipe(code=7, LR="2", FAIL="1", REDO="first")
    assert calls == ["--lr 2 --gpus  --overwrite two words", "--fail --index out/index"]
    (tmp_path / "mended").touch()
    process, calls = recipe(LR="2", FAIL="1")
    assert calls == ["--fail --index out/index", "--overwrite"]
    process, calls = recipe(LR="2", FAIL="1", REDO="third")
    assert calls == ["--overwrite"]
    process, calls = recipe(LR="2", FAIL="1", REDO="fourth")
    assert process.stderr.splitlines() == [
        "note: this recipe did not come to a stage named fourth, so that none is run anew"]
    assert not calls


# ---------------------------------------------------------------- the table

@pytest.fixture
def measures(tmp_path):
    """A folder of files of measures."""
    files = {"bm25": {"method": "bm25", "queries": 600, "recall@1": 0.460833, "recall@5": 0.9775},
             "em1": {"em": 0.9}, "em2": {"em": 0.92}, "em3": {"em": 0.94}}
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    return tmp_path


def test_table_of_one_seed(measures):
    table, _ = run("scripts/table.py", "--columns", "recall@1", "recall@5", "em",
                   "BM25=bm25.json", "BM25, read=bm25.json,em2.json", cwd=measures)
    assert table.splitlines() == ["            recall@1  recall@5     em",
                                  "BM25           46.08     97.75      -",
                                  "BM25, read     46.08     97.75  92.00"]


def test_table_of_seeds(measures):
    table, _ = run("scripts/table.py", "a=bm25.json", "b=bm25.json,em{seed}.json", "--columns",
                   "em", "recall@5", "--seeds", "1", "2", "3", "--json", "t.json", cwd=measures)
    assert table.splitlines() == [
        "            em     recall@5", "a            -        97.75", "b  92.00 ±2.00  97.75 ±0.00",
        "mean of the seeds 1, 2, 3 ± half the distance from the lowest to the highest",
        "the table: t.json"]
    content = json.loads((measures / "t.json").read_text())
    assert content["columns"] == ["em", "recall@5"] and content["seeds"] == ["1", "2", "3"]
    assert content["rows"][0]["values"]["em"] is None
    assert content["rows"][1]["values"]["em"] == {"mean": 92, "lowest": 90, "highest": 94}


@pytest.mark.parametrize("words, message", [
    (["em", "a=no.json"], "no.json: no such file; the stage that writes it has not run"),
    (["method", "a=bm25.json"], "bm25.json: method is 'bm25', which is no number"),
    (["em", "a=em1.json,em2.json"], "em2.json: em is 0.92, and 0.9 in another file of the row"),
    (["em", "a=em{seed}.json"], "{seed} stands for nothing; give --seeds"),
    (["em", "a=em{seed}.json", "--seeds", "1", "4"], "em4.json: no such file"),
    (["em", "a="], "a row is NAME=FILE"),
    (["em"], "no row to print"),
    (["a=em1.json"], "no measure to show"),
    (["em", "a=em1.json", "--json", "no/t.json"], "no/t.json: its folder does not exist"),
])
def test_table_refuses_in_one_line(measures, words, message):
    _, errors = run("scripts/table.py", "--columns", *words, cwd=measures, code=1)
    assert message in errors and len(errors.splitlines()) == 1
