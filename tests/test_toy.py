"""The embedded world is what its page says: deterministic, held out, ambiguous by words alone."""
import hashlib
import json
import random

import world
from conftest import run
from metrics import has_answer


def test_world_is_deterministic(tmp_path):
    run("toy/world.py", "--out", tmp_path)
    digest = hashlib.sha256()
    for name in ("corpus.tsv", "train.json", "dev.json", "test.json"):
        digest.update((tmp_path / name).read_bytes())
    passages, splits = world.make_demo()
    assert json.loads((tmp_path / "test.json").read_text()) == splits["test"]
    assert len((tmp_path / "corpus.tsv").read_text().splitlines()) == len(passages) + 1
    assert digest.hexdigest()[:16] == "90f27bfd927a248e"


def test_test_names_never_occur_in_training():
    passages, splits = world.make_demo()
    titles = {p["title"] for p in passages}
    held_out = {title for title in titles if world.is_held_out(title)}
    assert 0.3 < len(held_out) / len(titles) < 0.5
    training = json.dumps(splits["train"])
    assert not any(name in training for name in held_out)
    for split in ("dev", "test"):
        assert all(any(name in r["question"] for name in held_out) for r in splits[split])
    dev, test = ({n for n in held_out for r in splits[s] if n in r["question"]} for s in ("dev", "test"))
    assert not dev & test


def test_gold_passages_state_the_answer_at_varying_ranks():
    _, splits = world.make_demo()
    ranks = []
    for record in splits["test"]:
        gold = [i for i, c in enumerate(record["ctxs"]) if c["has_answer"]]
        ranks += gold[:1]
        assert all(has_answer(record["ctxs"][i]["text"], record["answers"]) for i in gold)
    assert 0.3 < ranks.count(0) / len(ranks) < 0.5 and max(ranks) > 5  # word overlap alone misleads
    assert sum(" and " in r["question"] for r in splits["test"]) == 90


def test_pretraining_runs_and_avoids_held_out_names(tmp_path):
    import pretrain
    texts = pretrain.Pretexts(random.Random(0), 30, 20)
    assert not any(world.is_held_out(p["title"]) for p in texts.passages)
    pairs = [texts.read(crop, shared=0.3) for crop in (True, False) * 100]
    answered = [target for _, target in pairs if target != pretrain.NO_ANSWER]
    assert 60 < len(answered) < 140 and all(
        has_answer(source, [target]) for source, target in pairs if target != pretrain.NO_ANSWER)
    out, _ = run("toy/pretrain.py", "--out", tmp_path / "m", "--steps", 4, "--batch_size", 4, "--log_every", 2)
    rows = [json.loads(line) for line in open(tmp_path / "m" / "pretrain.jsonl")]
    assert rows[0]["args"]["steps"] == 4 and [row["step"] for row in rows[1:]] == [2, 4] and (tmp_path / "m" / "model.safetensors").exists()


def test_span_corruption_loses_nothing():
    import pretrain
    rng, sentinels = random.Random(0), list(range(900, 920))
    for _ in range(200):
        ids = [rng.randrange(3, 800) for _ in range(40)]
        source, target = pretrain.corrupt_spans(rng, ids, sentinels, eos=1)
        spans, current = {}, None
        for token in target[:-1]:
            current = token if token in sentinels else current
            spans.setdefault(current, []).append(token)
        restored = [t for token in source for t in (spans[token][1:] if token in sentinels else [token])]
        assert restored == ids and target[-1] == 1
