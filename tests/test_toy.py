"""The embedded world: deterministic, with held-out names, ambiguous by words alone."""
import hashlib
import json
import random

import pytest

import pretrain
import world
from conftest import ROOT, run
from metrics import has_answer
from records.reader_records import read_records


@pytest.fixture(scope="module")
def demo_folder(tmp_path_factory):
    """Return a folder with the demo's world."""
    folder = tmp_path_factory.mktemp("demo")
    run("toy/world.py", "--out", folder)
    return folder


@pytest.fixture(scope="module")
def demo(demo_folder):
    """Return the demo's (titles of passages, {split: records})."""
    rows = (demo_folder / "corpus.tsv").read_text().splitlines()
    splits = {split: json.loads((demo_folder / f"{split}.json").read_text())
              for split in ("train", "dev", "test")}
    return {row.split("\t")[2] for row in rows[1:]}, splits


def test_world_is_deterministic(demo_folder):
    digest = hashlib.sha256()
    for name in ("corpus.tsv", "train.json", "dev.json", "test.json"):
        digest.update((demo_folder / name).read_bytes())
    assert digest.hexdigest()[:16] == "6b717ff07e39e2c6"
    assert len((demo_folder / "corpus.tsv").read_text().splitlines()) == 1301


def test_test_names_never_occur_in_training(demo):
    titles, splits = demo
    held_out = {title for title in titles if world.is_held_out(title)}
    assert 0.3 < len(held_out) / len(titles) < 0.5
    training = json.dumps(splits["train"])
    assert not any(name in training for name in held_out)

    names = {"dev": set(), "test": set()}  # that a split's questions ask about
    for split in names:
        for record in splits[split]:
            names_here = {name for name in held_out if name in record["question"]}
            assert names_here
            names[split] |= names_here
    assert not names["dev"] & names["test"]


def test_gold_passages_state_the_answer_at_varying_ranks(demo):
    _, splits = demo
    first_ranks = []
    for record in splits["test"]:
        gold_ranks = []
        for rank, context in enumerate(record["ctxs"]):
            if context["has_answer"]:
                gold_ranks.append(rank)
                assert has_answer(context["text"], record["answers"])
        first_ranks += gold_ranks[:1]
    # word overlap alone misleads
    assert 0.3 < first_ranks.count(0) / len(first_ranks) < 0.5
    assert max(first_ranks) > 5
    assert sum(" and " in record["question"] for record in splits["test"]) == 90


def test_pretraining_avoids_held_out_names():
    texts = pretrain.Pretexts(random.Random(0), 30, 20)
    assert not any(world.is_held_out(passage["title"]) for passage in texts.passages)


def test_half_of_the_pretraining_passages_answer():
    texts = pretrain.Pretexts(random.Random(0), 30, 20)
    pairs = [texts.read(crop, shared=0.3) for crop in (True, False) * 100]
    answered = [pair for pair in pairs if pair[1] != pretrain.NO_ANSWER]
    assert 60 < len(answered) < 140
    for source, target in answered:
        assert has_answer(source, [target])


def test_pretraining_runs(tmp_path):
    out = tmp_path / "m"
    run("toy/pretrain.py", "--out", out, "--steps", 4, "--batch_size", 4, "--log_every", 2)
    header, *rows = [json.loads(line) for line in (out / "pretrain.jsonl").read_text().splitlines()]
    assert header["args"]["steps"] == 4
    assert [row["step"] for row in rows] == [2, 4]
    assert (out / "model.safetensors").exists()


def test_span_corruption_loses_nothing():
    rng = random.Random(0)
    sentinels = list(range(900, 920))
    for _ in range(200):
        ids = [rng.randrange(3, 800) for _ in range(40)]
        source, target = pretrain.corrupt_spans(rng, ids, sentinels, eos=1)
        assert target[-1] == 1

        spans = {}  # {sentinel: the tokens that it stands for}
        for token in target[:-1]:
            if token in sentinels:
                sentinel = token
                spans[sentinel] = []
            else:
                spans[sentinel].append(token)
        restored = []
        for token in source:
            restored += spans[token] if token in sentinels else [token]
        assert restored == ids


def test_the_three_questions_are_answered_by_their_contexts():
    records = read_records(ROOT / "toy" / "train3.json")
    assert len(records) == 3
    for record in records:
        found = [has_answer(context["text"], record["answers"]) for context in record["ctxs"]]
        assert len(found) == 3 and found[0]


@pytest.fixture(scope="module")
def hard_world(tmp_path_factory):
    """Return a folder with the world of make demo-loop."""
    folder = tmp_path_factory.mktemp("hard")
    run("toy/world.py", "--out", folder, "--hard")
    return folder


def test_the_loops_world_is_harder_to_search_by_words(hard_world):
    args = ["--retrieval_method", "bm25", "--k1", 1.5, "--b", 0.75, "--corpus",
            hard_world / "corpus.tsv", "--eval_data", hard_world / "test.json", "--hits", 5,
            "--qrels", f"qrels={hard_world}/qrels.test.tsv", "--metrics", "recall", "--cutoffs", 5]
    run("retrieve.py", *args, "--measures", hard_world / "bm25.json")
    assert 0.65 < json.loads((hard_world / "bm25.json").read_text())["recall@5"] < 0.8


def test_the_loops_questions_carry_no_labels(hard_world):
    lines = (hard_world / "labelled.json").read_text().splitlines()
    labelled = [json.loads(line) for line in lines]
    for split in ("train", "dev", "test"):
        questions = json.loads((hard_world / f"{split}.json").read_text())
        assert all(set(question) == {"id", "topic", "question", "answers"}
                   for question in questions)
        for record in read_records(hard_world / f"gold.{split}.json"):
            assert record["ctxs"]
            for context in record["ctxs"]:
                assert has_answer(context["text"], record["answers"])
    assert len(labelled) == 1200
    rows = (hard_world / "corpus.tsv").read_text().splitlines()[1:]
    for record in labelled[:50]:
        for index, text in zip(record["pos_index"], record["pos"]):
            _, passage, title = rows[index].split("\t")
            assert text == f"{title} {passage}"


def test_crops_are_of_their_documents(hard_world, tmp_path):
    out = tmp_path / "crops.jsonl"
    run("scripts/make_crops.py", hard_world / "corpus.tsv", "--output", out, "--crops", 2,
        "--min_words", 2, "--max_words", 5)
    crops = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(crops) == 2 * 2360
    at_start = 0
    for crop in crops:
        assert crop["query"] in crop["pos"][0] and 2 <= len(crop["query"].split()) <= 5
        at_start += crop["pos"][0].startswith(crop["query"])
    assert 0.45 < at_start / len(crops) < 0.65
    (tmp_path / "empty.tsv").write_text("id\ttext\ttitle\n")
    _, errors = run("scripts/make_crops.py", tmp_path / "empty.tsv", "--output", out, code=1)
    assert len(errors.splitlines()) == 1
    _, errors = run("scripts/make_crops.py", hard_world / "corpus.tsv", "--output", out,
                    "--min_words", 9, code=1)
    assert "--max_words" in errors and len(errors.splitlines()) == 1
