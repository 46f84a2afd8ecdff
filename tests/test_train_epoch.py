"""train_epoch.py and test.py as a user runs them: one and two processes, killed and resumed, with
bad input.
"""
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer, T5ForConditionalGeneration

from conftest import TOKENIZER, command, make_records, run, run_and_kill
from data import Collator
from records.record_file import LARGE

FAST = ("--num_contexts", 3, "--max_length", 60, "--num_warmup_steps", 2, "--lr", "1e-3")


def state(out):
    return torch.load(f"{out}.state", weights_only=True)


def assert_same_run(out, other):
    """Assert that weights, optimizer state and log rows, except times, are bit-identical."""
    a, b = state(out), state(other)
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for index, slots in a["optimizer"]["state"].items():
        assert all(torch.equal(slots[k], b["optimizer"]["state"][index][k]) for k in slots)
    assert a["progress"] == b["progress"]
    rows = [[{k: v for k, v in json.loads(line).items() if "second" not in k}
             for line in open(f"{path}.jsonl")] for path in (out, other)]
    assert rows[0] == rows[1]


# ---------------------------------------------------------------- training

def test_memorises_then_evaluates_equally_with_one_and_two_processes(tiny, tmp_path):
    records = make_records(5)
    data = tmp_path / "r.json"
    data.write_text(json.dumps(records))
    out, _ = run("train_epoch.py", tmp_path / "m", data, data, *FAST, "--t5_name", tiny, "--epochs",
                 60, "--batch_size", 2, "--lr", "1e-2", "--dropout", 0, "--no_shuffle",
                 "--data_test", data, "--gpus", "")
    assert "best dev EM 100.00" in out and "test EM 100.00 (5/5)" in out
    assert ("effective batch 2 = 2 questions x 1 micro-batches x 1 processes (mean); "
            "3 updates per epoch, 180 in all, 2 of") in out
    saved = json.load(open(tmp_path / "m" / "args.json"))
    assert (saved["dev_em"], saved["num_contexts"], saved["args"]["epochs"]) == (100.0, 3, 60)
    rows = [json.loads(line) for line in open(tmp_path / "m.jsonl")]
    assert len(rows) == 60 and len(rows[0]["loss_curve"]) == 3
    assert rows[-1]["loss"] < rows[0]["loss"]
    T5ForConditionalGeneration.from_pretrained(tmp_path / "m")  # the ecosystem can open it
    del records[1]["answers"]
    data.write_text(json.dumps(records))
    for processes in (1, 2):
        out, _ = run("test.py", tmp_path / "m", data, "--pred", tmp_path / f"p{processes}.tsv",
                     "--batch_size", 2, processes=processes)
        assert "100.00 100.00      4/4" in out
        assert "1 of them without answers: predicted, not scored" in out
    assert (tmp_path / "p1.tsv").read_text() == (tmp_path / "p2.tsv").read_text()
    lines = [line.split("\t") for line in (tmp_path / "p1.tsv").read_text().splitlines()]
    assert [line[0] for line in lines] == list("01234")
    assert lines[1][2:] == ["[]", "nan"] and lines[0][3] == "1.0"
    assert lines[0][2] == str(records[0]["answers"])


def test_records_on_disk_train_as_those_in_memory(tiny, tmp_path):
    records = json.dumps(make_records(5))
    # enough blanks for the file to be large
    for name, text in (("small", records), ("large", records + " " * LARGE)):
        data = tmp_path / f"{name}.json"
        data.write_text(text)
        out, _ = run("train_epoch.py", tmp_path / name, data, data, *FAST, "--t5_name", tiny,
                     "--epochs", 2, "--batch_size", 2, "--num_workers", 1, "--data_test", data,
                     processes=2)
        assert "5 training and 5 dev questions" in out
        run("test.py", tmp_path / name, data, "--scores", tmp_path / f"{name}.scores.json",
            "--pred", tmp_path / f"{name}.jsonl")
    assert (tmp_path / "large.json.records").is_dir()
    assert not (tmp_path / "small.json.records").exists()
    assert_same_run(tmp_path / "small", tmp_path / "large")
    for kind in (".scores.json", ".jsonl"):
        assert (tmp_path / f"small{kind}").read_text() == (tmp_path / f"large{kind}").read_text()


def test_three_processes_with_more_batches_than_records(tiny, tmp_path):
    data = tmp_path / "r.json"
    data.write_text(json.dumps(make_records(4)))
    out, _ = run("train_epoch.py", tmp_path / "m", data, data, *FAST, "--t5_name", tiny, "--epochs",
                 2, "--bf16", "--use_checkpoint", "--num_workers", 1, "--accumulate", "sum",
                 processes=3)
    assert "(0/4)" in out or "/4)" in out and "4 updates in all" in out
    # 4 records over 3 processes: a full update and a part
    assert state(tmp_path / "m")["progress"]["total_updates"] == 4


@pytest.mark.parametrize("accumulate", ["mean", "sum"])
def test_the_split_of_a_batch_does_not_matter(tiny, records_file, tmp_path, accumulate):
    """Compare the weights of 1 process x batch 4, 2 x batch 2, and accumulation. The last update of
    an epoch has 3 records.
    """
    splits = {"one": (4, 1, 1), "processes": (2, 1, 2), "accumulated": (1, 4, 1), "both": (1, 2, 2)}
    # in the originals' scale splits are equal only if each micro-batch has one record
    if accumulate == "sum":
        splits = {"accumulated": (1, 4, 1), "again": (1, 4, 1)}
    for name, (batch, accumulation, processes) in splits.items():
        run("train_epoch.py", tmp_path / name, records_file, records_file, *FAST, "--t5_name", tiny,
            "--epochs", 2, "--dropout", 0, "--batch_size", batch, "--grad_accumulation",
            accumulation, "--accumulate", accumulate, processes=processes)
    first, *others = [state(tmp_path / name) for name in splits]
    assert first["progress"]["total_updates"] == 6
    for other in others:
        for key, value in first["model"].items():
            torch.testing.assert_close(other["model"][key], value, atol=2e-5, rtol=0)


def test_sum_is_the_originals_gradient_scale(tiny, records_file, tmp_path, monkeypatch):
    """Check that k accumulated micro-batches have k times the gradient of their mean, as in FiD and
    minFiD; --clip is out of reach.
    """
    import train_epoch as script
    from data import plan_epoch
    from training.loop import make_loader
    seen_norms, norms = [], {}
    clip_grad_norm = torch.nn.utils.clip_grad_norm_

    def keep_norm(parameters, max_norm):
        seen_norms.append(clip_grad_norm(parameters, max_norm))
        return seen_norms[-1]
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", keep_norm)
    for accumulate in ("mean", "sum"):
        sys.argv = ["train_epoch.py", str(tmp_path / "m"), records_file, records_file, "--t5_name",
                    tiny, "--dropout", "0", "--accumulate", accumulate, "--grad_accumulation", "4",
                    "--clip", "1e9", "--no_shuffle"]
        run_ = script.set_up(script.parse_args(), script.start_processes(""))
        records = run_.train_set.records
        for record in records:
            # equally long targets: the mean over tokens is the mean over records
            record["answers"] = ["town"]
        plan = plan_epoch(4, 0, 0, False, 1, 4)
        batches = iter(make_loader(run_.train_set, plan[0], run_.collator, 0))
        script.train_update(run_, batches, 4)
        norms[accumulate] = seen_norms[-1].item()
    assert norms["sum"] == pytest.approx(4 * norms["mean"], rel=1e-3)


def test_rounds_can_be_driven_from_outside(tiny, records_file, tmp_path, monkeypatch):
    """Check that set_up, train_epoch and evaluate, called one after another, end with the script's
    weights.
    """
    import train_epoch as script
    flags = [*map(str, FAST), "--t5_name", tiny, "--epochs", "2", "--batch_size", "4"]
    run("train_epoch.py", tmp_path / "whole", records_file, records_file, *flags)
    monkeypatch.setattr(sys, "argv", ["train_epoch.py", str(tmp_path / "m"), records_file,
                                      records_file, *flags])
    args = script.parse_args()
    script.check_args(args)
    torch.set_num_threads(1)
    script.set_seed(args.seed)
    driven = script.set_up(args, script.start_processes(""))
    before = script.evaluate(driven)
    # evaluating does not advance the run
    assert driven.progress.epoch == 0 and driven.progress.total_updates == 0
    assert set(before) == {"dev_em", "dev_f1", "correct", "count", "cut", "eval_seconds"}
    for round_index in range(2):
        script.train_epoch(driven)
        assert driven.progress.epoch == round_index + 1
        assert script.evaluate(driven)["count"] == 11
    for key, value in state(tmp_path / "whole")["model"].items():
        torch.testing.assert_close(driven.unwrapped.state_dict()[key], value, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- kill and resume

@pytest.mark.parametrize("processes, kills", [(1, (30, 70, 40)), (2, (50,))])
def test_killed_and_resumed_equals_uninterrupted(tiny, records_file, tmp_path, monkeypatch,
                                                 processes, kills):
    monkeypatch.chdir(tmp_path)
    dev = tmp_path / "dev.json"
    dev.write_text(json.dumps(make_records(3, seed=1)))
    common = [records_file, dev, *FAST, "--t5_name", tiny, "--epochs", 3, "--batch_size",
              2, "--dropout", 0.2, "--save_every", 1, "--eval_every", 4, "--grad_accumulation",
              2 // processes]
    run("train_epoch.py", "whole", *common, processes=processes)
    for at in kills:
        run_and_kill("train_epoch.py", "killed", *common, "--resume", at=at, processes=processes)
    done, _ = run("train_epoch.py", "killed", *common, "--resume", processes=processes)
    assert "resuming after" in done and "resuming after 9" not in done
    assert_same_run("whole", "killed")
    # nothing is left over
    assert set(os.listdir()) == {"dev.json"} | {
        f"{name}{ending}" for name in ("whole", "killed") for ending in ("", ".jsonl", ".state")}
    assert set(os.listdir("killed")) == set(os.listdir("whole"))
    for name in ("model.safetensors", "config.json"):
        assert Path("whole", name).read_bytes() == Path("killed", name).read_bytes()
    # a finished run stays as it is
    again, _ = run("train_epoch.py", "killed", *common, "--resume", processes=processes)
    assert "done in 0 s" in again
    assert_same_run("whole", "killed")
    _, error = run("train_epoch.py", "killed", *common, "--resume", "--seed", 7, code=1,
                   processes=processes)
    assert "is from a run with --seed 42 (now 7)" in error


def test_a_run_does_not_continue_with_other_data(tiny, tmp_path):
    data = tmp_path / "r.json"
    args = [tmp_path / "m", data, data, *FAST, "--t5_name", tiny, "--epochs", 1]
    data.write_text(json.dumps(make_records(4)))
    run("train_epoch.py", *args)
    data.write_text(json.dumps(make_records(4, seed=1)))  # A32: other records, as many
    _, error = run("train_epoch.py", *args, "--resume", code=1)
    assert "m.state is from a run in which " in error and " had another content" in error
    assert error.count("\n") == 1 and "r.json" in error


@pytest.mark.parametrize("answer, reason", [
    ("9 m²", "the tokenizer cannot spell any of their answers"),
    ("word " * 80, "longer than --eval_answer_maxlength 50 allows"), ("baker", "train longer")])
def test_an_em_of_zero_is_explained(answer, reason):
    """Check that the advice is not to train longer if no answer can be right (A30, A31)."""
    import train_epoch as script
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    dev = [{"answers": [answer]}, {"answers": []}]
    run_ = SimpleNamespace(answer_limit=50, dev=dev,
                           collator=Collator(tokenizer, 1, 100),
                           unwrapped=SimpleNamespace(count_answer_tokens=lambda limit: limit - 1))
    assert reason in script.explain_zero(run_)


def test_a_dead_process_ends_the_run(tiny, records_file, tmp_path):
    args = [tmp_path / "m", records_file, records_file, *FAST, "--t5_name", tiny, "--epochs",
            100000]
    process = subprocess.Popen(command("train_epoch.py", *args, processes=2),
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               env=os.environ | {"OMP_NUM_THREADS": "1"})
    while "epoch   0" not in process.stdout.readline():
        assert process.poll() is None
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True,
                              text=True).stdout.split()
    os.kill(int(children[1]), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "Signal 9 (SIGKILL)" in output or "another process ended" in output


# ---------------------------------------------------------------- evaluation

def test_evaluation_files_and_warnings(tiny, records_file, tmp_path):
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": f"who {i}"}) + "\n" for i in range(5)))
    out, _ = run("train_epoch.py", tmp_path / "m", records_file, records_file, *FAST, "--t5_name",
                 tiny, "--epochs", 1, "--warmup_ratio", 0.3, "--data_test", questions,
                 "--eval_answer_maxlength", 3)
    # A27: questions without answers are not scored
    assert f"note: no record of {questions} has answers" in out and "test EM" not in out
    assert "11 in all, 4 of warm-up" in out
    assert "warning: no dev question was answered right" in out
    assert f"note: {records_file} is also the training file" in out
    out, _ = run("test.py", tmp_path / "m", records_file, "--num_contexts", 0, 2, "--max_length",
                 50, "--pred", tmp_path / "p.jsonl", "--scores", tmp_path / "s.jsonl",
                 "--num_beams", 2, "--n_best", 2, "--measures", tmp_path / "m.json")
    measures = [json.loads((tmp_path / f"m.{count}.json").read_text()) for count in (0, 2)]
    assert [row["num_contexts"] for row in measures] == [0, 2]
    # A30: test.py uses the limit of the evaluation in training
    assert "11 answers were cut at 3 tokens (--answer_maxlength)" in out
    assert "warning: --num_contexts 0, 2, but the checkpoint was trained with 3" in out
    assert "warning: --max_length 50, but the checkpoint was trained with 60" in out
    rows = [json.loads(line) for line in open(tmp_path / "p.2.jsonl")]
    alone = [json.loads(line) for line in open(tmp_path / "p.0.jsonl")]
    assert len(rows) == len(alone) == 11
    assert all(row["contexts"] == [] and row["best_context"] is None for row in alone)
    assert set(rows[0]) == {"index", "id", "question", "prediction", "answers", "em", "f1",
                            "probability", "n_best", "best_context", "contexts"}
    assert [best["prediction"] for best in rows[0]["n_best"]][0] == rows[0]["prediction"]
    assert 0 < rows[0]["n_best"][0]["probability"] == rows[0]["probability"] < 1
    scores = [context["score"] for context in rows[0]["contexts"]]
    best = rows[0]["contexts"][scores.index(max(scores))]
    assert len(scores) == 2 and rows[0]["best_context"] == best["id"]
    given = json.load(open(records_file))
    scored = [json.loads(line) for line in open(tmp_path / "s.jsonl")]
    for before, after in zip(given, scored):
        assert after["question"] == before["question"]
        assert [c["text"] for c in after["ctxs"]] == [c["text"] for c in before["ctxs"]]
        given_scores = [c["score"] for c in before["ctxs"][:2]]
        assert [c["retrieval_score"] for c in after["ctxs"][:2]] == given_scores
        unread = dict(before["ctxs"][2])
        assert after["ctxs"][2] == unread | {"retrieval_score": unread.pop("score")}
        assert all(-100 < c["score"] < 100 for c in after["ctxs"][:2])
    # A22: the same command reads the same contexts of its own output
    run("test.py", tmp_path / "m", tmp_path / "s.jsonl", "--num_contexts", 2, "--max_length", 50,
        "--num_beams", 2, "--pred", tmp_path / "q.jsonl")
    assert [json.loads(line)["prediction"] for line in open(tmp_path / "q.jsonl")] == [
        row["prediction"] for row in rows]
    # without answers, the first predictions are shown
    out, _ = run("test.py", tiny, questions)
    assert "does not store its num_contexts; using 5" in out
    assert "warning: 0 of 5 records" in out
    assert [f"who {i} -> " in out for i in range(5)] == [True, True, True, False, False]


# ---------------------------------------------------------------- bad input

def refuse(script, *args):
    """Return the error line of a script; fail on a traceback or another exit code."""
    _, error = run(script, *args, code=1)
    lines = [line for line in error.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in error, error
    return lines[0]


def test_bad_input_is_one_line_and_exit_code_1(tiny, records_file, tmp_path):
    cut = tmp_path / "cut.json"
    cut.write_text(open(records_file).read()[:900])

    def train(*args, data=records_file, out=tmp_path / "m", t5=tiny):
        return refuse("train_epoch.py", out, data, records_file, "--t5_name", t5, *args)

    assert f"{cut}:1: not valid JSON at column" in train(data=cut)
    assert "none.json: no such file" in train(data=tmp_path / "none.json")
    assert "no such folder or file" in train(t5="google/no-such-t5")
    assert "--num_contexts must be >= 1, got 0" in train("--num_contexts", 0)
    assert "later.json: no such file" in train("--data_test", tmp_path / "later.json")
    assert "--answer_maxlength allows 2" in train("--answer_maxlength", 2)
    (tmp_path / "file").write_text("")
    assert "cannot be written" in train(out=tmp_path / "file" / "m")
    assert "no CUDA device" in train("--gpus", "0") or torch.cuda.is_available()
    assert not (tmp_path / "m").exists() or not os.listdir(tmp_path / "m")
    assert "no such folder or file" in refuse("test.py", tmp_path / "nowhere", records_file)
    error = refuse("test.py", tiny, records_file, "--num_contexts", -1)
    assert "--num_contexts must be >= 0, got -1" in error
    config = json.load(open(f"{tiny}/config.json"))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_text(json.dumps(config | {"vocab_size": 384}))
    assert "the model embeds 384" in train("--tokenizer", tiny, t5=tmp_path / "small")
    assert "has no model.safetensors" in refuse("test.py", tmp_path / "small", records_file,
                                                "--t5_name", tiny)  # A12
    assert "cannot be written" in refuse("test.py", tiny, records_file, "--pred",
                                         tmp_path / "file" / "p.tsv")


def test_nan_names_the_records_and_leaves_the_last_good_checkpoint(tiny, records_file, tmp_path):
    error = refuse("train_epoch.py", tmp_path / "m", records_file, records_file, *FAST[:-2], "--lr",
                   "1e30", "--t5_name", tiny, "--batch_size", 3, "--eval_every", 1,
                   "--num_warmup_steps", 0)
    assert "is not finite in update" in error and "'r-" in error
    assert T5ForConditionalGeneration.from_pretrained(tmp_path / "m").shared.weight.isfinite().all()
    assert os.path.exists(tmp_path / "m.state")
