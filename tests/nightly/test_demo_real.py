"""Test the stages, tables and resumption of scripts/demo-real.sh and real-experiments.sh with a
stand-in for the Python scripts.
"""
import json
import os
import subprocess
import sys

import pytest

from conftest import ROOT, run

# logs its arguments, fails on inputs that no stage has written, and creates the outputs that they
# name
STAND_IN = """#!{python} -SE
import json, os, sys
script, *args = sys.argv[1:]
script = os.path.basename(script)
if script == "table.py":
    os.execv("{python}", ["{python}", *sys.argv[1:]])
with open("calls", "a") as file:
    print(script, *args, file=file)
if os.environ.get("FAIL_AT", "nothing") in " ".join(args):
    sys.exit(7)
measures = json.dumps({{"recall@1": 0.5, "recall@5": 0.6, "recall@20": 0.7, "mrr@20": 0.55,
                       "em": 0.25, "f1": 0.3}})
flags = {{flag: args[n + 1] for n, flag in enumerate(args[:-1]) if flag.startswith("--")}}
folders = [flags[name] for name in ("--output_dir", "--index", "--out") if name in flags]
files = [flags[name] for name in ("--output", "--trec", "--pred", "--measures") if name in flags]
if script == "train_epoch.py":
    folders.append(args[0])
if script == "python_docs.py":
    splits = ("train", "dev", "test", "check", "gold.dev", "gold.test", "labelled", "pairs",
              "rests", "corpus")
    files += [os.path.join(flags["--out"], name + ".jsonl") for name in splits]
    splits = ("train", "dev", "test", "check")
    files += [os.path.join(flags["--out"], f"qrels.{{name}}.tsv") for name in splits]
if script == "real_models.py":
    folders += ["out/minilm", "out/smollm2"]
if "--save_name" in flags:
    kind = "neg" if "collate_neg" in args else "scored"
    files.append(flags["--eval_data"][:-len("jsonl")] + kind + f".{{flags['--save_name']}}.jsonl")
if script == "test.py" and "--num_contexts" in args:
    counts = args[args.index("--num_contexts") + 1:]
    counts = [count for count in counts[:4] if count.isdigit()]
    if len(counts) > 1:
        files += [flags["--measures"][:-len("json")] + count + ".json" for count in counts]
for path in args:
    path = path.removeprefix("qrels=")
    if path.startswith("out/") and path not in folders + files and not os.path.exists(path):
        sys.exit(f"{{path}} is read before it is written")
for folder in folders:
    os.makedirs(folder, exist_ok=True)
for path in files:
    with open(path, "w") as file:
        file.write(measures + "\\n")
"""


@pytest.fixture
def demo_real(tmp_path):
    """A function(code=0, recipe=..., **settings) that runs the recipe and returns (its output, the
    calls of scripts).
    """
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)

    def start(code=0, recipe="demo-real.sh", **settings):
        (tmp_path / "calls").write_text("")
        env = os.environ | {"PYTHON": str(stand_in), "OUT": "out", "DISK": "0"} | settings
        process = subprocess.run(["sh", ROOT / "scripts" / recipe], cwd=tmp_path, env=env,
                                 timeout=100, capture_output=True, text=True)
        assert process.returncode == code, process.stdout + process.stderr
        return process.stdout, (tmp_path / "calls").read_text().splitlines()
    return start


def count_rows(output, name):
    return len([line for line in output.splitlines() if line.startswith(name)])


def test_every_stage_reads_what_an_earlier_one_wrote(demo_real):
    output, calls = demo_real()
    assert count_rows(output, "DPR, mined negatives") == count_rows(output, "LSR, EMDR2") == 1
    assert count_rows(output, "a ranker") == count_rows(output, "closed book") == 0
    assert calls[-1].startswith("ask.py out/1/reader ")

    # the rest continues from there, and every method has its row
    output, more_calls = demo_real(ALL="yes")
    for row in ("DPR, mined negatives", "distilled from the ranker", "LSR, the trained reader",
                "the gold passage", "alternated, 3 passages"):
        assert count_rows(output, row) == 1
    assert not set(calls[:-1]) & set(more_calls)

    # on another split the models are measured, and none is trained or scored again
    _, calls = demo_real(ALL="yes", SPLIT="dev")
    assert {call.split()[0] for call in calls} == {"retrieve.py", "test.py", "ask.py"}
    assert not any("test.jsonl" in call for call in calls)


def test_a_stage_is_run_again_with_all_later_ones(demo_real):
    demo_real()
    demo_real(ALL="yes")
    _, calls = demo_real(ALL="yes", REDO="ranker")
    outputs = " ".join(calls)
    for name in ("ranker", "distilled"):
        assert f"--output_dir out/1/{name} " in outputs
    for name in ("dpr1", "dpr2", "lsr-kl", "lsr-emdr2"):
        assert f"--output_dir out/1/{name} " not in outputs
    _, calls = demo_real(ALL="yes")
    assert {call.split()[0] for call in calls} == {"ask.py"}


def test_it_goes_on_with_the_seeds(demo_real):
    _, calls = demo_real(code=7, FAIL_AT="--loss emdr2")
    _, more_calls = demo_real(ALL="yes", SEEDS="1 2 3")
    trained = [call for call in calls + more_calls if call.startswith("train_dense.py")]
    # once failed
    assert len([call for call in trained if "--output_dir out/1/lsr-emdr2 " in call]) == 2

    # other seeds train DPR's and LSR's retrievers; the language model's students never see a label
    assert len([call for call in trained if "out/2/" in call]) == 4
    assert not any("ranker" in call or "reader" in call for call in more_calls if "out/2/" in call)
    for call in trained:
        if "/lsr" in call.split()[2]:
            assert "labelled" not in call and "qrels" not in call and "infonce" not in call


def test_experiments(demo_real):
    demo_real()
    demo_real(code=1, recipe="real-experiments.sh")  # without the ranker
    demo_real(ALL="yes")
    output, calls = demo_real(recipe="real-experiments.sh", BIG="yes")
    for row in ("the candidates", "demo-real's ranker", "all first sentences",
                "trained, 3 at 0.01"):
        assert count_rows(output, row) == 1
    assert not any("--output_dir out/1/" in call for call in calls)


def test_teachers(tmp_path):
    def record(number, kind, *likelihoods):
        contexts = [{"id": "gold", "score": 0.5}, {"id": "other", "score": 0.4 + 0.2 * number}]
        return {"id": f"q{number}", "kind": kind, "ctxs": contexts, "teacher_scores": likelihoods}

    records = [record(0, "task", -1, -2), record(0, "task", -4, -3.5), record(1, "task", -1, -9)]
    (tmp_path / "scored.jsonl").write_text("\n".join(map(json.dumps, records)))
    (tmp_path / "qrels.tsv").write_text("q0 0 gold 1\nq1 0 gold 1\n")
    command = ["bench/teachers.py", tmp_path / "scored.jsonl", "--qrels", tmp_path / "qrels.tsv"]
    lines = run(*command)[0].splitlines()
    # at temperature 0.05 a difference of 0.1 between scores is 2 nats
    assert lines[-1].split() == ["task", "3", "2", "2", "3"]

    del records[1]["teacher_scores"]
    (tmp_path / "scored.jsonl").write_text("\n".join(map(json.dumps, records)))
    assert "scored.jsonl:2: 'teacher_scores' is missing" in run(*command, code=1)[1]
