"""Batches of a retriever's training: the plan of an epoch over processes and datasets, and the
collator's token ids.
"""
from dataclasses import replace

import pytest

from conftest import make_bert
from dense import batches
from dense.batches import (
    GroupCollator,
    GroupSet,
    identity,
    note_long_keys,
    plan_batches,
    tokenize,
)
from dense.examples import Example
from dense.texts import Texts, TextSettings
from dense.training_data import GroupRule
from training.checkpoints import load_tokenizer
from utils import InputError


def test_documents_are_the_same_by_their_text():
    """DPR 91, 158: different passages are not copies if their ids are numbered per question."""
    assert identity("a text") == identity(" a  text\n") != identity("another")


@pytest.mark.parametrize("same", [None, "epoch", "random"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_plan_batches(same, world_size):
    sizes = [10, 3, 7]
    plans = [plan_batches(sizes, 1, 42, True, 2, 2, same, rank, world_size)
             for rank in range(world_size)]
    entries = [entry for plan in plans for update in plan for batch in update for entry in batch]
    real = [index for index, is_real in entries if is_real]
    if same != "random":
        assert sorted(real) == list(range(20))  # each once, whatever the number of processes
    if same:
        dataset = [0] * 10 + [1] * 3 + [2] * 7
        for updates in zip(*plans):
            for batches in zip(*updates):
                assert len({dataset[index] for batch in batches for index, _ in batch}) == 1
    assert all(len(update) == len(plans[0][i]) for plan in plans for i, update in enumerate(plan))
    assert plans[0] != plan_batches(sizes, 2, 42, True, 2, 2, same, 0, world_size)
    assert plan_batches(sizes, 0, 1, False, 4,
                        1)[0] == [[(0, True), (1, True), (2, True), (3, True)]]


def test_collator(tmp_path):
    tokenizer = load_tokenizer(make_bert(tmp_path / "b"), "")
    settings = TextSettings(key_template="{title} [SEP] {text}")
    passage = {"title": "a", "text": "town in the river of it", "passage_id": "1"}
    examples = [Example("who", [passage], ["it", "it"], None, "qa"),
                Example("what", ["it"], ["in", "of"], [3.0, 2.0, 1.0])]
    rule = GroupRule(3, "first", "first", False)
    groups = GroupSet(examples, [rule, rule], 0)
    texts = Texts({"query": tokenizer, "key": tokenizer}, {"query": 20, "key": 6}, settings,
                  instructions={"qa": ("who wrote ", "the ")})
    collator = GroupCollator(texts)
    batch = collator([groups[(0, True)], groups[(1, True)]])
    assert batch["indices"] == [0, 1] and batch["is_real"] is True and batch["task"] == "qa"
    texts = [tokenizer.decode(ids) for ids in batch["queries"] + batch["keys"]]
    assert texts[0] == "[CLS] who wrote who [SEP]" and texts[3] == "[CLS] the it [SEP]"
    # title and text as a pair, truncated on the right
    assert texts[2] == "[CLS] the a [SEP] town [SEP]"
    assert batch["teacher"][0].isnan().all() and batch["teacher"][1].tolist() == [3, 2, 1]
    same = batch["identities"].tolist()
    assert same[1] == same[2] == same[3] and len(set(same)) == 4
    assert tokenize(tokenizer, ["who " * 9], 5, append_eos=True)[0][-1] == tokenizer.sep_token_id
    collator.settings = replace(settings, key_template="{title} {body}")
    with pytest.raises(InputError, match="no column 'body' for .*its columns are .*'title'"):
        collator([groups[(0, True)]])


def test_a_rankers_batch_has_pairs(tmp_path):
    tokenizer = load_tokenizer(make_bert(tmp_path / "b"), "")
    settings = TextSettings(key_template="{text}", ranker=True)
    groups = GroupSet([Example("who", ["it"], ["town"]), Example("what", ["in"], ["of"])],
                      [GroupRule(2, "first", "first", False)] * 2, 0)
    collator = GroupCollator(Texts({"query": tokenizer, "key": tokenizer}, {"query": 4, "key": 6},
                                   settings))
    batch = collator([groups[(0, True)], groups[(1, False)]])
    assert [tokenizer.decode(ids) for ids, _ in batch["pairs"]][:3] == [
        "[CLS] who [SEP] it [SEP]", "[CLS] who [SEP] town [SEP]", "[CLS] what [SEP] in [SEP]"]
    assert batch["pairs"][0][1] == [0, 0, 0, 1, 1] and "queries" not in batch


@pytest.mark.parametrize("is_ranker", [False, True])
def test_long_keys_are_counted(is_ranker, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(make_bert(tmp_path / "b"), "")
    settings = TextSettings(key_template="{text}", ranker=is_ranker)
    collator = GroupCollator(Texts({"query": tokenizer, "key": tokenizer}, {"query": 3, "key": 6},
                                   settings))
    examples = [Example("who", ["it"], ["town in the river of it"]), Example("what", [], []),
                Example("what", ["town of it in the river of it"], ["of"])]
    lines = []
    note_long_keys(examples, collator, lines.append)
    what = "pairs of a query and a key have 9" if is_ranker else "keys have 6"
    assert lines[0].startswith(f"note: 2 of 4 {what} tokens or more")
    monkeypatch.setattr(batches, "LENGTH_SAMPLE", 3)
    note_long_keys(examples, collator, lines.append)
    assert lines[1].startswith("note: 2 of the first 3 ")
    note_long_keys(examples[:1] + examples[1:2], collator, lines.append)
    note_long_keys([Example("who", ["it"], [])], collator, lines.append)
    assert len(lines) == 3
