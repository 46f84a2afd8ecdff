"""Records of all forms, the originals' sorting and targets, batches, and the plan of an epoch over processes."""
import gzip
import json
import random

import pytest
import torch
from transformers import AutoTokenizer

from conftest import TOKENIZER
from data import Collator, TrainSet, check_targets, choose_target, eval_loader, input_texts, plan_epoch, read_records
from utils import InputError

CONTEXT = {"title": "T", "text": "some text"}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER)


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.json.gz", "r.jsonl.gz"])
def test_reads_all_forms(tmp_path, name):
    records = [{"question": "q0", "answers": ["a"], "ctxs": [CONTEXT], "extra": 7}, {"query": "q1", "query_id": "x"}]
    text = json.dumps(records, indent=1) if "jsonl" not in name else "\n".join(map(json.dumps, records)) + "\n\n"
    path = tmp_path / name
    if name.endswith(".gz"):
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    first, second = read_records(path)
    assert first["extra"] == 7 and first["id"] == 0 and first["ctxs"] == [CONTEXT]
    assert (second["question"], second["id"], second["answers"], second["ctxs"]) == ("q1", "x", [], [])


@pytest.mark.parametrize("name, text, message", [
    ("r.json", '[{"question": "q"},\n {"question": ', "r.json:2: not valid JSON"),
    ("r.jsonl", '{"question": "q"}\n{"question": "q"\n{"question": "q"}\n', "r.jsonl:2: not valid JSON"),
    ("r.json", '[{"question": "q"}, {"answers": ["a"]}]', "record 1: no 'question'"),
    ("r.json", '[{"question": " "}]', "record 0: no 'question'"),
    ("r.json", "", "the file is empty"),
    ("r.json", "[]", "holds no records"),
    ("r.jsonl", "\n", "holds no records"),
    ("r.json", '"q"', "not a list of records"),
    ("r.json", '["q"]', "must be a JSON object"),
    ("r.json", '[{"question": "q", "answers": "a"}]', "'answers' must be a list of strings"),
    ("r.json", '[{"question": "q", "ctxs": [{"title": "t"}]}]', "'text' string"),
    ("r.json", '[{"question": "q", "ctxs": [{"text": "t", "score": "high"}]}]', "is not a number"),
    ("r.json.gz", None, "cannot be read"),
])
def test_bad_files_are_one_clear_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'[{"question": "q"}]')[:-9] if text is None else text.encode())
    with pytest.raises(InputError) as error:
        read_records(path)
    assert message in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_records(tmp_path / "none.json")


def scored(*scores):
    return [{"text": str(i)} | ({} if s is None else {"score": s}) for i, s in enumerate(scores)]


def order(path, records):
    path.write_text(json.dumps(records))
    return ["".join(c["text"] for c in r["ctxs"]) for r in read_records(path)]


def test_contexts_are_sorted_by_score_if_the_first_has_one(tmp_path):
    records = [{"question": "q", "ctxs": scored(1, 3, 3, "2.5")}, {"question": "q", "ctxs": scored(None, 0.5, None, 1)}]
    assert order(tmp_path / "a.json", records) == ["1230", "3102"]         # ties keep their order, scoreless ones come last
    assert order(tmp_path / "b.json", records[::-1]) == ["0123", "0123"]   # the first context of the file has none


def test_keep_contexts_is_after_sorting(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"question": "q", "ctxs": scored(1, 2, 3)}]))
    assert [c["text"] for c in read_records(path, 2)[0]["ctxs"]] == ["2", "1"]


def test_input_text_of_the_original():
    assert input_texts({"question": "q", "ctxs": [CONTEXT, {"text": "no title"}, CONTEXT]}, 2) == [
        "question: q title: T context: some text", "question: q context: no title"]
    assert input_texts({"question": "q", "ctxs": []}, 2) == input_texts({"question": "q", "ctxs": [CONTEXT]}, 0) == ["question: q"]


def test_targets(tmp_path):
    record = {"question": "q", "answers": list("abcdef")}
    assert choose_target(record | {"target": "t"}, "seed") == "t"
    assert choose_target(record) == "a"
    assert len({choose_target(record, f"s{i}") for i in range(40)}) == 6
    trivia = {"Question": "", "question": "q", "answer": {"Value": "PARIS", "Aliases": ["Paris", "City of Light"]}}
    path = tmp_path / "r.json"
    path.write_text(json.dumps([trivia, trivia | {"answer": {"value": "McCoy", "aliases": ["McCoy"]}}]))
    first, second = read_records(path)
    assert (first["target"], first["answers"], second["target"]) == ("Paris", ["Paris", "City of Light"], "McCoy")


def test_answers_are_drawn_anew_each_epoch_and_alike_on_every_process():
    records = [{"question": "q", "answers": [str(i) for i in range(50)]} for _ in range(20)]
    one, other = TrainSet(records, 1, True), TrainSet(records, 1, True)
    first = [one[i, True][2] for i in range(20)]
    assert first == [other[i, True][2] for i in range(20)][:20] and len(set(first)) > 5
    one.epoch = 1
    assert first != [one[i, True][2] for i in range(20)]
    assert [TrainSet(records, 1, False)[i, True][2] for i in range(20)] == ["0"] * 20


def test_collator_masks_what_is_absent(tokenizer):
    records = [{"question": "who?", "ctxs": [CONTEXT] * 3}, {"question": "who?", "ctxs": [CONTEXT]}, {"question": "who?", "ctxs": []}]
    batch = Collator(tokenizer, 3, 250)([(i, r, "one town" if i < 2 else None) for i, r in enumerate(records)])
    mask = batch["attention_mask"]
    assert mask.any(2).tolist() == [[True] * 3, [True, False, False], [True, False, False]]
    assert mask.shape[2] == len(tokenizer("question: who? title: T context: some text", add_special_tokens=False).input_ids)
    assert (batch["input_ids"][~mask] == tokenizer.pad_token_id).all()
    assert tokenizer.eos_token_id not in batch["input_ids"]                       # passages end without </s>
    labels = batch["labels"].tolist()
    assert labels[0][-1] == tokenizer.eos_token_id and labels[0].count(tokenizer.eos_token_id) == 1
    assert set(labels[2]) == {-100}


def test_collator_cuts_at_the_right(tokenizer):
    batch = Collator(tokenizer, 1, 5)([(0, {"question": "who?", "ctxs": [CONTEXT]}, None)])
    assert batch["labels"] is None
    assert batch["input_ids"][0, 0].tolist() == tokenizer("question: who? title: T", add_special_tokens=False).input_ids[:5]


def test_a_target_with_an_end_of_sequence_gets_no_second_one(tokenizer):
    labels = Collator(tokenizer, 1, 5).labels(["town </s>"])
    assert labels[0].tolist().count(tokenizer.eos_token_id) == 1


def test_too_long_and_missing_answers_are_named(tokenizer):
    records = [{"id": "r7", "question": "q", "answers": ["town", "a very long answer indeed"]}]
    check_targets(records, tokenizer, -1, "f.json")
    with pytest.raises(InputError, match="'r7'.*'a very long answer indeed' takes .* tokens, --answer_maxlength allows 4"):
        check_targets(records, tokenizer, 4, "f.json")
    with pytest.raises(InputError, match="'r7' has neither"):
        check_targets([{"id": "r7", "answers": []}], tokenizer, -1, "f.json")


@pytest.mark.parametrize("count, batch, accumulation, world", [(11, 2, 1, 3), (11, 1, 4, 1), (9, 2, 2, 2), (1, 2, 2, 3)])
def test_plan_covers_every_record_once(count, batch, accumulation, world):
    plans = [plan_epoch(count, 3, 5, True, batch, accumulation, rank, world) for rank in range(world)]
    assert len({len(plan) for plan in plans}) == 1                                # as many updates on every process
    seen = [place for plan in plans for update in plan for micro in update for place, counted in micro if counted]
    assert sorted(seen) == list(range(count))
    assert all(1 <= len(micro) <= batch for plan in plans for update in plan for micro in update)
    assert all(1 <= len(update) <= accumulation for plan in plans for update in plan)
    # update by update, the records are those of one process with the same effective batch
    single = plan_epoch(count, 3, 5, True, batch * accumulation * world, 1)
    for number, update in enumerate(single):
        here = sorted(p for plan in plans for micro in plan[number] for p, counted in micro if counted)
        assert here == sorted(p for micro in update for p, _ in micro)


def test_plan_shuffles_by_epoch_unless_told_not_to():
    flat = lambda plan: [place for update in plan for micro in update for place, _ in micro]
    assert flat(plan_epoch(50, 0, 1, True, 5, 1)) != flat(plan_epoch(50, 1, 1, True, 5, 1))
    assert flat(plan_epoch(50, 0, 1, False, 5, 1)) == list(range(50))


def test_evaluation_batches_are_the_same_for_any_number_of_processes(tokenizer):
    records = [{"question": f"q {i}", "answers": [], "ctxs": [CONTEXT]} for i in range(11)]
    batches = lambda rank, world: [b["places"] for b in eval_loader(records, 2, Collator(tokenizer, 1, 9), 0, rank, world)]
    together = sorted(batches(0, 3) + batches(1, 3) + batches(2, 3))
    assert together == batches(0, 1) and sorted(sum(together, [])) == list(range(11))


def test_loader_leaves_the_random_state_alone(tokenizer):
    records = [{"question": "q", "answers": [], "ctxs": [CONTEXT]}]
    torch.manual_seed(3)
    before, python = torch.get_rng_state(), random.getstate()
    list(eval_loader(records, 2, Collator(tokenizer, 1, 9), 0))
    assert torch.equal(before, torch.get_rng_state()) and python == random.getstate()
