"""The reader's input texts and targets, batches, and the plan of an epoch over processes."""
import json
import random

import pytest
import torch
from transformers import AutoTokenizer, ByT5Tokenizer

import data
from conftest import TOKENIZER, pad_packed
from data import (
    Collator,
    TrainSet,
    check_targets,
    encode_inputs,
    eval_loader,
    input_texts,
    note_long_passages,
    plan_epoch,
)
from records.reader_records import read_records
from utils import InputError

CONTEXT = {"title": "T", "text": "some text"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


def test_input_text_of_the_original():
    assert input_texts({"question": "q", "ctxs": [CONTEXT, {"text": "no title"}, CONTEXT]}, 2) == [
        "question: q title: T context: some text", "question: q context: no title"]
    assert input_texts({"question": "q", "ctxs": []},
                       2) == input_texts({"question": "q", "ctxs": [CONTEXT]}, 0) == ["question: q"]


def test_targets(tmp_path):
    record = {"question": "q", "answers": list("abcdef")}
    given = record | {"target": "t"}
    in_order, shuffled = (TrainSet([record, given], 0, shuffle) for shuffle in (False, True))
    assert in_order[0, True][2] == "a" and shuffled[1, True][2] == "t"
    drawn = set()
    for shuffled.epoch in range(40):
        drawn.add(shuffled[0, True][2])
    assert drawn == set("abcdef") and shuffled[0, False][2] is None
    trivia = {"Question": "", "question": "q",
              "answer": {"Value": "PARIS", "Aliases": ["Paris", "City of Light"]}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps([trivia, trivia
                                | {"answer": {"value": "McCoy", "aliases": ["McCoy"]}}]))
    first, second = read_records(path)
    assert (first["target"], first["answers"],
            second["target"]) == ("Paris", ["Paris", "City of Light"], "McCoy")


def test_answers_are_drawn_anew_each_epoch_and_alike_on_every_process():
    records = [{"question": "q", "answers": [str(i) for i in range(50)]} for _ in range(20)]
    one, other = TrainSet(records, 1, True), TrainSet(records, 1, True)
    first = [one[i, True][2] for i in range(20)]
    assert first == [other[i, True][2] for i in range(20)][:20] and len(set(first)) > 5
    one.epoch = 1
    assert first != [one[i, True][2] for i in range(20)]
    assert [TrainSet(records, 1, False)[i, True][2] for i in range(20)] == ["0"] * 20


def test_passages_that_are_cut_off_are_counted(tokenizer, monkeypatch):
    records = [{"question": "q", "ctxs": [CONTEXT, {"text": "word " * 30}, {"text": "word " * 30}]},
               {"question": "q", "ctxs": []}]
    text = input_texts(records[0], 1)[0]
    length = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    said = []
    note_long_passages(records, Collator(tokenizer, 2, length), said.append)
    assert len(said) == 1  # the first passage just fits
    assert said[0].startswith(f"note: 1 of 3 passages exceed {length} tokens")
    note_long_passages(records, Collator(tokenizer, 1, length), said.append)
    assert len(said) == 1
    monkeypatch.setattr(data, "LENGTH_SAMPLE", 2)
    note_long_passages(records, Collator(tokenizer, 3, length), said.append)
    assert said[1].startswith("note: 1 of the first 2 passages exceed")


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False).input_ids


def test_history_comes_before_question_and_passage(tokenizer):
    """Check that they are one text, and that an empty history is read like a missing one."""
    question = "question: who? title: T context: some text"
    histories = [
        (None, question), ([], question), ("", question), (" \n", question), ([""], question),
        ("one two", f"history: one two {question}"),
        ("one\n\ntwo", f"history: one two {question}"),
        (["one", "two three"], f"history: one two three {question}"),
        ([{"role": "user", "content": "one"}, {"content": "two"}],
         f"history: user: one two {question}")]
    records = [{"question": "who?", "ctxs": [CONTEXT], "chat_history": history}
               for history, _ in histories]
    for (_, text), inputs in zip(histories, encode_inputs(tokenizer, records, 1, 250)):
        assert inputs == [ids_of(tokenizer, text)]
    alone = encode_inputs(tokenizer, [{"question": "who?", "ctxs": [], "chat_history": "one"}], 1,
                          250)
    assert alone == [[ids_of(tokenizer, "history: one question: who?")]]


@pytest.mark.parametrize("history", [["one town", "two", "three letters it"],
                                     "one town\ntwo\nthree letters it"])
def test_the_oldest_turns_go_first_then_the_passage(tokenizer, history):
    record = {"question": "who?", "ctxs": [CONTEXT, {"text": "x"}], "chat_history": history}
    turns = ["one town", "two", "three letters it"]
    for number, text in enumerate(input_texts(record, 2)):
        base = ids_of(tokenizer, text)
        fitting = [ids_of(tokenizer, " ".join(["history:", *turns[first:], text]))
                   for first in range(3)] + [base]
        for max_length in range(1, len(fitting[0]) + 2):
            ids = encode_inputs(tokenizer, [record], 2, max_length)[0][number]
            expected = next((ids for ids in fitting if len(ids) <= max_length), base[:max_length])
            assert ids == expected, max_length


def test_a_history_of_one_text_loses_its_oldest_tokens(tokenizer):
    record = {"question": "who?", "ctxs": [CONTEXT], "chat_history": "one town two three letters"}
    base, head = ids_of(tokenizer, input_texts(record, 1)[0]), ids_of(tokenizer, "history:")
    history = ids_of(tokenizer, record["chat_history"])
    for room in range(len(head) + len(history) + 2):
        kept = min(len(history), max(0, room - len(head)))
        expected = head + history[len(history) - kept:] + base if kept else base
        assert encode_inputs(tokenizer, [record], 1, len(base) + room) == [[expected]]


def test_a_tokenizer_of_bytes_keeps_the_blanks_between_turns():
    tokenizer = ByT5Tokenizer()
    record = {"question": "who?", "ctxs": [], "chat_history": ["one", "two"]}
    assert encode_inputs(tokenizer, [record], 1, 99)[0][0] == ids_of(
        tokenizer, "history: one two question: who?")


def test_a_batch_without_histories_is_tokenised_in_one_call(tokenizer):
    calls = []

    def count(*args, **flags):
        calls.append(args)
        return tokenizer(*args, **flags)
    records = [{"question": "who?", "ctxs": [CONTEXT] * 3}] * 4
    encode_inputs(count, records, 3, 50)
    assert len(calls) == 1
    encode_inputs(count, [records[0], records[0] | {"chat_history": "one"}], 3, 50)
    assert len(calls) == 3


def test_collator_masks_what_is_absent(tokenizer):
    records = [{"question": "who?", "ctxs": [CONTEXT] * 3}, {"question": "who?", "ctxs": [CONTEXT]},
               {"question": "who?", "ctxs": []}]
    batch = Collator(tokenizer, 3, 250)([(i, r, "one town" if i < 2 else None) for i,
                                         r in enumerate(records)])
    ids, mask = pad_packed(batch["inputs"]["passages"])
    assert mask.any(2).tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert mask.shape[2] == len(tokenizer("question: who? title: T context: some text",
                                          add_special_tokens=False).input_ids)
    assert tokenizer.eos_token_id not in ids  # passages end without </s>
    labels = batch["labels"].tolist()
    assert labels[0][-1] == tokenizer.eos_token_id and labels[0].count(tokenizer.eos_token_id) == 1
    assert set(labels[2]) == {-100}


def test_collator_truncates_on_the_right(tokenizer):
    batch = Collator(tokenizer, 1, 5)([(0, {"question": "who?", "ctxs": [CONTEXT]}, None)])
    assert batch["labels"] is None
    expected = tokenizer("question: who? title: T", add_special_tokens=False).input_ids[:5]
    assert pad_packed(batch["inputs"]["passages"])[0][0, 0].tolist() == expected


def test_a_target_with_an_end_of_sequence_gets_no_second_one(tokenizer):
    labels = Collator(tokenizer, 1, 5)([(0, {"question": "q", "ctxs": []}, "town </s>")])["labels"]
    assert labels[0].tolist().count(tokenizer.eos_token_id) == 1


def test_too_long_and_missing_answers_are_named(tokenizer):
    records = [{"id": "r7", "question": "q", "answers": ["town", "a very long answer indeed"]}]
    check_targets(records, tokenizer, -1, "f.json")
    with pytest.raises(InputError,
                       match="'r7'.*'a very long answer indeed' takes .* tokens, "
                       "--answer_maxlength allows 4"):
        check_targets(records, tokenizer, 4, "f.json")
    with pytest.raises(InputError, match="'r7' has neither"):
        check_targets([{"id": "r7", "answers": []}], tokenizer, -1, "f.json")


def flatten(plan):
    """Return the entries (index, is_real) of a plan in a row."""
    return [entry for update in plan for micro_batch in update for entry in micro_batch]


@pytest.mark.parametrize("count, batch, accumulation, world",
                         [(11, 2, 1, 3), (11, 1, 4, 1), (9, 2, 2, 2), (1, 2, 2, 3)])
def test_plan_covers_every_record_once(count, batch, accumulation, world):
    plans = [plan_epoch(count, 3, 5, True, batch, accumulation, rank, world)
             for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1  # as many updates on every process
    seen = [index for plan in plans for index, is_real in flatten(plan) if is_real]
    assert sorted(seen) == list(range(count))
    assert all(1 <= len(micro) <= batch for plan in plans for update in plan for micro in update)
    assert all(1 <= len(update) <= accumulation for plan in plans for update in plan)
    # update by update, the records are those of one process with the same effective batch
    single = plan_epoch(count, 3, 5, True, batch * accumulation * world, 1)
    for number, update in enumerate(single):
        here = sorted(p for plan in plans for micro in plan[number] for p, is_real in micro
                      if is_real)
        assert here == sorted(p for micro in update for p, _ in micro)


def test_plan_shuffles_by_epoch_unless_told_not_to():
    assert flatten(plan_epoch(50, 0, 1, True, 5, 1)) != flatten(plan_epoch(50, 1, 1, True, 5, 1))
    assert flatten(plan_epoch(50, 0, 1, False, 5, 1)) == [(index, True) for index in range(50)]


def test_evaluation_batches_are_the_same_for_any_number_of_processes(tokenizer):
    records = [{"question": f"q {i}", "answers": [], "ctxs": [CONTEXT]} for i in range(11)]
    collator = Collator(tokenizer, 1, 9)

    def batches(rank, world_size):
        loader = eval_loader(records, 2, collator, 0, rank, world_size)
        return [batch["indices"] for batch in loader]

    together = sorted(batches(0, 3) + batches(1, 3) + batches(2, 3))
    assert together == batches(0, 1) and sorted(sum(together, [])) == list(range(11))


def test_loader_leaves_the_random_state_alone(tokenizer):
    records = [{"question": "q", "answers": [], "ctxs": [CONTEXT]}]
    torch.manual_seed(3)
    before, python = torch.get_rng_state(), random.getstate()
    list(eval_loader(records, 2, Collator(tokenizer, 1, 9), 0))
    assert torch.equal(before, torch.get_rng_state()) and python == random.getstate()
