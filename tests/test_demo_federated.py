"""scripts/demo-federated.sh and its picture, on a small world with two clients."""
import json
import os
import random
import subprocess

import pytest

import world
from conftest import ROOT, run


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    """Return a folder with the files of toy/world.py --hard, of 60 passages and 40 questions."""
    rng = random.Random(0)
    entities, people = world.make_entities(rng, 20, 10, held_out=False)
    passages = [passage for entity in entities
                for passage in world.write_passages(rng, entity, people)]
    for number, passage in enumerate(passages, 1):
        passage["id"] = str(number)
    folder = tmp_path_factory.mktemp("world")
    rows = [f"{passage['id']}\t{passage['text']}\t{passage['title']}" for passage in passages]
    world.write_lines(folder / "corpus.tsv", ["id\ttext\ttitle", *rows])
    ranker = world.OverlapRanker(passages, blur=0)
    for split, count in (("train", 24), ("dev", 8), ("test", 8)):
        records = world.make_records(rng, split, entities, ranker, count, top_k=0)
        world.write_qrels(folder, split, records)
        world.write_questions(folder, split, records, passages)
    return folder


@pytest.fixture
def demo(small_world, launcher, tmp_path):
    """Return a function(code=0, **settings) that runs the demo into tmp_path / "out" and returns
    (lines of its output, lines of its errors).
    """
    def start(code=0, **settings):
        env = os.environ | {"OUT": str(tmp_path / "out"), "WORLD": str(small_world),
                            "PYTHON": launcher, "CLIENTS": "2", "ROUNDS": "2", "UPDATES": "1",
                            "READER_ROUNDS": "2", "READER_UPDATES": "1", "EPOCHS": "1"} | settings
        process = subprocess.run(["sh", ROOT / "scripts" / "demo-federated.sh"], env=env,
                                 timeout=280, capture_output=True, text=True)
        assert process.returncode == code, process.stdout + process.stderr
        return process.stdout.splitlines(), process.stderr.splitlines()
    return start


def stages_run(lines):
    """Return the stages that the demo ran, sorted; each line begins with the name of its chain."""
    return sorted(line.split("== ")[1] for line in lines
                  if "| == " in line and "done before" not in line)


def test_demo(demo, small_world, tmp_path):
    lines, _ = demo()
    *_, table_note = lines
    assert table_note == f"the table: {tmp_path}/out/table.json"
    table = lines[-7:-1]
    assert table[0].split() == ["recall@1", "recall@5", "recall@20", "em"]
    assert [line.split("  ")[0] for line in table[1:]] == [
        "before training", "client 1 alone", "client 2 alone", "federated",
        "all records at one place"]
    assert all(line.split()[-1] != "-" for line in table[2:])

    # a topic is one client's alone, and no record is lost
    out = tmp_path / "out" / "1"
    for model, questions in (("retriever", "labelled.neg.bm25.json"),
                             ("reader", "contexts.train.jsonl")):
        topics, count = [], 0
        for client in (1, 2):
            path = out / f"{model}.clients" / f"client{client}.jsonl"
            records = [json.loads(line) for line in path.read_text().splitlines()]
            topics.append({record["topic"] for record in records})
            count += len(records)
        assert not topics[0] & topics[1]
        assert count == len((out / questions).read_text().splitlines()) == 24

    # alone, a client trains on what it has in the federation
    for model in ("retriever", "reader"):
        args = json.loads((out / f"{model}-client2" / "args.json").read_text())["args"]
        given = args["train_data"][0] if model == "retriever" else args["data_train"]
        assert given == str(out / f"{model}.clients" / "client2.jsonl")

    # what is done is not done again
    stages_before = stages_run(lines)
    assert len(stages_before) == len(set(stages_before)) == 23
    lines, _ = demo()
    assert stages_run(lines) == [] and lines[-7:-1] == table

    run("bench/draw_federated.py", tmp_path / "federated.svg", out)
    assert "<svg" in (tmp_path / "federated.svg").read_text()


def test_demo_refuses_in_one_line(demo):
    _, errors = demo(code=1, MORE="all")
    assert errors == ["error: MORE is 'all'; it must be strategies or privacy, or empty"]


@pytest.mark.parametrize("rows, message", [
    (None, "retriever.jsonl: no such file; make demo-federated writes it"),
    ([{"round": 0}], "no row has recall@5; run make demo-federated"),
    ([{"recall@5": 0.5}], "has no round, or a recall@5 that is not a number"),
    ([{"round": 0, "recall@5": "x"}], "has no round, or a recall@5 that is not a number"),
])
def test_draw_refuses_in_one_line(rows, message, tmp_path):
    if rows is not None:
        path = tmp_path / "retriever.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, errors = run("bench/draw_federated.py", tmp_path / "federated.svg", tmp_path, code=1)
    assert message in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "federated.svg").exists()
