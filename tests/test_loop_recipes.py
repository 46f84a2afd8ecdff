"""The recipes of the loop, their stages and their table, on small files."""
import json
import os
import random
import subprocess

import pytest

import world
from conftest import ROOT, make_bert, run, stages_run

# ---------------------------------------------------------------- stages

RECIPE = """
set -euo pipefail
. "$ROOT/scripts/stages.sh"
stage first ./record.py --lr "${LR:-1}" --gpus "${GPUS-}" --output_dir model --resume "two words"
stage second ./record.py ${FAIL:+--fail} ${PLAN:-} --index "$OUT/index"
stage third $LAUNCH ./record.py --resume
"""
# notes how it was called
RECORD = """#!/usr/bin/env bash
echo "$@" >> calls
[[ $* != *--fail* ]] || { [ -e mended ] || exit ${FAIL_CODE:-7}; }
"""


@pytest.fixture
def recipe(tmp_path):
    """A function(**settings) that runs a recipe of three stages: (finished process, its calls)."""
    (tmp_path / "recipe.sh").write_text(RECIPE)
    (tmp_path / "record.py").write_text(RECORD)
    (tmp_path / "record.py").chmod(0o755)

    def start(code=0, **settings):
        (tmp_path / "calls").write_text("")
        env = os.environ | {"ROOT": str(ROOT), "OUT": "out", "LAUNCH": "env",
                            "GPUS": ""} | settings
        process = subprocess.run(["bash", "recipe.sh"], cwd=tmp_path, env=env, timeout=30,
                                 capture_output=True, text=True)
        assert process.returncode == code, process.stderr
        return process, (tmp_path / "calls").read_text().splitlines()
    return start


def stage_lines(process):
    """Returns the lines that name the stages, without those of their seconds."""
    return [line for line in process.stdout.splitlines() if line.startswith("==")]


def test_a_stage_runs_once(recipe):
    process, calls = recipe()
    assert process.stdout.count(" took ") == 3
    assert stage_lines(process) == ["== first", "== second", "== third"]
    assert calls == ["--lr 1 --gpus  --output_dir model --resume two words", "--index out/index",
                     "--resume"]
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
    recipe(code=1, FAIL="1", FAIL_CODE="2")  # 2 would say that figures differ
    (tmp_path / "mended").touch()
    process, calls = recipe(FAIL="1")
    assert stage_lines(process) == ["== first: done before", "== second", "== third"]
    assert calls == ["--fail --index out/index", "--resume"]


def test_a_plan_ends_a_recipe_and_is_no_stage_done(recipe):
    process, calls = recipe(PLAN="--plan")
    assert stage_lines(process) == ["== first", "== second"]
    assert calls[1] == "--plan --index out/index"
    process, _ = recipe()
    assert stage_lines(process) == ["== first: done before", "== second", "== third"]


def test_a_changed_command_is_told_and_run_anew_on_demand(recipe, tmp_path):
    recipe()
    process, calls = recipe(code=1, LR="2")
    assert process.stderr.splitlines() == [
        "error: stage first in out was run with other settings (--lr 1, now --lr 2); give another "
        "OUT, or REDO=first to run it and all later stages again"]
    assert not calls

    # --resume finds no state of the earlier run to go on with; what fails on the way goes on later
    (tmp_path / "model.state").touch()
    process, calls = recipe(code=7, LR="2", FAIL="1", REDO="first")
    assert len(calls) == 2 and calls[0].startswith("--lr 2")
    assert not (tmp_path / "model.state").exists()
    (tmp_path / "mended").touch()
    process, calls = recipe(LR="2", FAIL="1")
    assert calls == ["--fail --index out/index", "--resume"]
    process, calls = recipe(LR="2", FAIL="1", REDO="third")
    assert calls == ["--resume"]
    process, calls = recipe(LR="2", FAIL="1", REDO="fourth")
    assert process.stderr.splitlines() == [
        "note: out has no stage named fourth; nothing was run again"]
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


def test_the_best_row(measures):
    """Of equal ones the first; a reader's args.json is in per cent."""
    (measures / "args.json").write_text(json.dumps({"dev_em": 94.0, "args": {"seed": 1}}))
    best, _ = run("scripts/table.py", "--columns", "em", "--best", "em", "no=bm25.json",
                  "low=em1.json", "high=em3.json", "as high=em3.json", cwd=measures)
    assert best == "high\n"
    table, _ = run("scripts/table.py", "--columns", "dev_em", "a=args.json", cwd=measures)
    assert table.split() == ["dev_em", "a", "94.00"]


@pytest.mark.parametrize("words, message", [
    (["em", "a=em1.json", "--best", "f1"], "--best 'f1': no row has this measure"),
    (["em", "a=no.json"], "no.json: no such file; the stage that writes it has not run"),
    (["method", "a=bm25.json"], "bm25.json: method is 'bm25', which is not a number"),
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


# ---------------------------------------------------------------- a small world, and a recipe on it

@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """A folder with corpus.tsv (60 passages), and questions about it: with their positives, in
    LLM-Embedder's form (train.json, test.json) and DPR's (train.dpr.json), and without
    (train.questions.json, test.questions.json).
    """
    rng = random.Random(0)
    entities, people = world.make_entities(rng, 20, 10, held_out=False)
    passages = [passage for entity in entities
                for passage in world.write_passages(rng, entity, people)]
    for index, passage in enumerate(passages):
        passage["id"] = str(index)
    folder = tmp_path_factory.mktemp("world")
    rows = [f"{passage['id']}\t{passage['text']}\t{passage['title']}" for passage in passages]
    world.write_lines(folder / "corpus.tsv", ["id\ttext\ttitle", *rows])
    ranker = world.OverlapRanker(passages, blur=0.1)
    records, dpr_records = [], []
    for record in world.make_records(rng, "r", entities, ranker, 24, top_k=1):
        gold = [passages[int(index)] for index in record["gold"]]
        shared = {name: record[name] for name in ("id", "question", "answers")}
        records.append(shared | {"pos": [f"{passage['title']} {passage['text']}"
                                         for passage in gold],
                                 "pos_index": [int(passage["id"]) for passage in gold]})
        contexts = [{"title": passage["title"], "text": passage["text"],
                     "passage_id": passage["id"]} for passage in gold]
        dpr_records.append(shared | {"positive_ctxs": contexts, "hard_negative_ctxs": []})
    questions = [{name: record[name] for name in ("id", "question", "answers")}
                 for record in records]
    for name, rows in (("train", records[:16]), ("test", records[16:]),
                       ("train.dpr", dpr_records[:16]), ("train.questions", questions[:16]),
                       ("test.questions", questions[16:])):
        (folder / f"{name}.json").write_text(json.dumps(rows))
    make_bert(folder / "bert")
    return folder


# ---------------------------------------------------------------- three iterations

FAST = "--num_workers 0 --bf16 false"
TINY = f"--max_steps 2 --batch_size 4 --group_size 4 --lr 1e-3 --num_warmup_steps 1 {FAST}"


def three_iterations(folder, train):
    """The settings of scripts/3iter-*.sh on the small world."""
    bert = folder / "bert"
    return {"TRAIN": folder / train, "TEST": folder / "test.json", "CORPUS": folder / "corpus.tsv",
            "MODEL": bert, "RANKER_MODEL": bert, "HITS": 60, "NEGATIVES": 6,
            "RETRIEVER_FLAGS": TINY, "RANKER_FLAGS": TINY, "DISTILLED_FLAGS": TINY,
            "SEARCH_FLAGS": FAST}


def test_three_iterations(small_world, run_recipe, tmp_path):
    settings = three_iterations(small_world, "train.json")
    lines, _ = run_recipe("3iter-nq.sh", code=-9, KILL_AT="collate_score", **settings)
    assert stages_run(lines)[-1] == "ranker-scores" and len(stages_run(lines)) == 11
    # the stage that was killed runs again, and what is behind it
    lines, _ = run_recipe("3iter-nq.sh", code=2, **settings)
    assert stages_run(lines) == ["ranker-scores", "retriever3", "retriever3-test"]
    table = lines[-7:-1]
    assert lines[-1].startswith("SimLM, NQ test top-20: published 85.20, here ")
    assert table[0].split() == ["nq@1", "nq@5", "nq@20", "nq@100"]
    assert [line.split("(")[0].strip() for line in table[2:]] == [
        "retriever 1", "retriever 2", "ranker", "retriever 3"]
    out = tmp_path / "out"
    bm25 = json.loads((out / "bm25.json").read_text())
    assert table[1].split() == ["BM25", *(f"{100 * bm25[f'nq@{k}']:.2f}" for k in (1, 5, 20, 100))]

    # each retriever has negatives of its own, the last one the ranker's scores of one positive and
    # of the negatives
    mined = []
    for name in ("bm25", "retriever1", "retriever2"):
        lines = (out / f"train.neg.{name}.json").read_text().splitlines()
        mined.append([json.loads(line) for line in lines])
    assert len({str([record["neg_index"] for record in records]) for records in mined}) == 3
    scored = json.loads((out / "train.neg.retriever2.scored.ranker.json").read_text()
                        .splitlines()[0])
    scores = scored.pop("teacher_scores")
    assert scored == mined[2][0] and len(scores) == len(scored["pos"]) + 6
    # the ranker orders what retriever 2 found: all 60 passages
    assert json.loads((out / "ranker.json").read_text())["nq@100"] == json.loads(
        (out / "retriever2.json").read_text())["nq@100"]

    # the same command does nothing again, and tells the same table
    lines, _ = run_recipe("3iter-nq.sh", code=2, **settings)
    assert not stages_run(lines) and lines[-7:-1] == table
    _, errors = run_recipe("3iter-nq.sh", code=1, **settings | {"NEGATIVES": 5})
    assert len(errors) == 1
    assert "stage bm25-negatives" in errors[0]
    assert "(--max_neg_num 6, now --max_neg_num 5)" in errors[0]
    _, errors = run_recipe("3iter-nq.sh", code=1, **settings | {"CORPUS": tmp_path / "no.tsv"})
    assert len(errors) == 1 and "no.tsv: no such file; scripts/get_data.sh" in errors[0]


def test_three_iterations_of_records_in_dprs_form(small_world, run_recipe, tmp_path):
    """The first stages, with the flags and measures of MS MARCO."""
    settings = three_iterations(small_world, "train.dpr.json")
    lines, _ = run_recipe("3iter-msmarco.sh", code=-9, KILL_AT="train_dense.py", **settings)
    assert stages_run(lines) == ["bm25-test", "bm25-negatives", "retriever1"]
    measures = json.loads((tmp_path / "out" / "bm25.json").read_text())
    assert {"mrr@10", "ndcg@10", "recall@50", "recall@200"} < set(measures)
    path = tmp_path / "out" / "train.neg.bm25.json"
    assert len(json.loads(path.read_text().splitlines()[0])["hard_negative_ctxs"]) == 6
    assert (tmp_path / "out" / "retriever1" / "model.safetensors").exists()


# ---------------------------------------------------------------- alternation

def alternation(folder, tiny, **changes):
    """The settings of scripts/alternate.sh on the small world."""
    return {"TRAIN": folder / "train.questions.json", "DEV": folder / "test.questions.json",
            "TEST": folder / "test.questions.json", "CORPUS": folder / "corpus.tsv",
            "READER_MODEL": tiny, "MODEL": folder / "bert", "HITS": 4, "CUTOFFS": "1 4",
            "TEACHER": "lsr", "ROUNDS": 1,
            "READER_FLAGS": "--epochs 1 --batch_size 8 --max_length 40 --num_warmup_steps 1",
            "RETRIEVER_FLAGS": "--loss kl --max_steps 2 --batch_size 8 --group_size 4 --lr 1e-3",
            } | changes


def test_alternation(small_world, tiny, run_recipe, tmp_path):
    settings = alternation(small_world, tiny)
    out = tmp_path / "out"
    lines, _ = run_recipe("alternate.sh", code=-9, KILL_AT="--likelihood", **settings)
    assert stages_run(lines) == ["contexts0-train", "contexts0-dev", "contexts0-test", "reader0",
                                 "em0", "scores1"]
    lines, _ = run_recipe("alternate.sh", **settings)
    assert stages_run(lines) == ["scores1", "retriever1", "contexts1-train", "contexts1-dev",
                                 "contexts1-test", "reader1", "em1"]
    assert [line[:7] for line in lines[-3:-1]] == ["round 0", "round 1"]
    readers = [json.loads((out / f"reader{number}" / "args.json").read_text())
               for number in (0, 1)]
    assert readers[1]["args"]["t5_name"] == str(out / "reader0")  # it goes on

    # of equal rounds the first is the best, which links name
    best = int(readers[1]["dev_em"] > readers[0]["dev_em"])
    assert lines[-1] == f"the best on dev is round {best}: {out}/best"
    assert os.path.samefile(out / "best" / "reader", out / f"reader{best}")
    assert (out / "best" / "retriever").exists() == bool(best)

    # another teacher has other scores: told, and on demand all behind them is done anew
    settings["TEACHER"] = "fid-kd"
    _, errors = run_recipe("alternate.sh", code=1, **settings)
    assert len(errors) == 1 and "stage scores1" in errors[0]
    assert "lm_score.py" in errors[0] and "REDO=scores1" in errors[0]
    before = (out / "retriever1" / "model.safetensors").read_bytes()
    lines, _ = run_recipe("alternate.sh", REDO="scores1", **settings)
    assert stages_run(lines)[0] == "scores1" and len(stages_run(lines)) == 7
    assert (out / "retriever1" / "model.safetensors").read_bytes() != before
    with open(out / "reader1.jsonl") as file:  # of the new run alone
        assert len(file.readlines()) == 1


@pytest.mark.parametrize("changes, message", [
    ({"ROUNDS": "two"}, "the number of rounds is 'two'"),
    ({"TEACHER": "me"}, "TEACHER is 'me'; it must be fid-kd or lsr"),
    ({"DEV": "no.json"}, "no.json: no such file; scripts/get_data.sh fid-nq"),
])
def test_alternation_refuses_in_one_line(small_world, tiny, run_recipe, changes, message):
    _, errors = run_recipe("alternate.sh", code=1, **alternation(small_world, tiny, **changes))
    assert len(errors) == 1 and message in errors[0]


# ---------------------------------------------------------------- all tasks at once

def test_llm_embedder(small_world, tiny, run_recipe, tmp_path):
    """The scores of one distilled task are missing, and made; those of the others are theirs."""
    data = tmp_path / "data"
    texts = [f"{first} was born in {second}" for first in ("it", "who", "she") for second in "abc"]
    record = {"query": "where was it born", "answers": ["a"]}
    pool = {"pos": texts[:1], "neg": texts[1:], "teacher_scores": list(range(9))}
    chat = {"history": texts, "teacher_scores": list(range(9))}
    unscored = {"pos": texts[:1], "neg": texts[1:]}
    for name, task, keys in (
            ("chat/msc/train", "chat", chat), ("lrlm/arxiv/train", "lrlm", pool),
            ("lrlm/books3/train", "lrlm", pool), ("lrlm/codeparrot/train", "lrlm", pool),
            ("qa/msmarco/train", "qa", unscored), ("qa/nq/train", "qa", pool),
            ("icl/icl/train", "icl", pool), ("convsearch/qrecc/train.concat", "convsearch", pool),
            ("tool/toolbench/train", "tool", pool), ("tool/toolbench/test", "tool",
                                                     {"pos_index": [0]}), ("qa/nq/test", "qa", {})):
        path = data / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record | {"task": task} | keys) + "\n")
    for folder in ("tool/toolbench", "qa/nq"):
        rows = [json.dumps({"title": "", "text": text}) for text in texts]
        world.write_lines(data / folder / "corpus.json", rows)

    settings = {"DATA": data, "MODEL": small_world / "bert", "LM": tiny, "SEARCH_FLAGS": FAST,
                "SCORE_FLAGS": "--batch_size 1",
                "RETRIEVER_FLAGS": f"--batch_size 2 --early_exit_steps 3 {FAST}"}
    lines, _ = run_recipe("llm-embedder.sh", code=2, **settings)
    assert stages_run(lines) == ["score-qa-msmarco-train", "retriever", "tool", "nq"]
    assert any("10 training examples of 10 dataset(s)" in line for line in lines)
    scored = json.loads((tmp_path / "out" / "scored" / "qa-msmarco-train.scored.lm.json")
                        .read_text())
    assert len(scored["teacher_scores"]) == 9
    assert sorted(path.name for path in (data / "qa" / "msmarco").iterdir()) == ["train.json"]
    assert [line.split()[0] for line in lines[-7:-5]] == ["tool", "nq"]
    assert lines[-5].startswith("LLM-Embedder, tools, ndcg@5: published 86.45, here ")
    assert lines[-1].startswith("LLM-Embedder, NQ test top-100: none published, here ")
    (data / "icl" / "icl" / "train.json").unlink()
    _, errors = run_recipe("llm-embedder.sh", code=1, **settings)
    assert len(errors) == 1 and "icl/icl/train.json: no such file" in errors[0]
