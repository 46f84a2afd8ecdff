"""lm_score.py as a user runs it: numbers of a plain loop, cuts, processes, resuming, errors."""
import json
import os
import sys
from argparse import Namespace

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5ForConditionalGeneration,
)

import lm_score
from causal_helpers import make_causal, make_tokenizer
from conftest import make_records, make_t5, run, run_in_background
from data import input_texts
from lm_score import choose_answers
from reader.open import open_reader
from reader.scorers import TASK_TEMPLATES, CausalScorer, Job
from records.questions import make_question
from training.checkpoints import read_config
from utils import InputError, World

KEYS = ["Mira baked bread in the old town.", "The baker of Oslo is Tom",
        " It rained, and nobody came. " * 3, "x"]
FIELDS = {"query": "who baked the bread? ", "answers": ["Mira of the old town", "Mira"]}
TASKS = ["qa", "convsearch", "icl", "chat", "lrlm", "tool"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return {family: folder of a tiny model}. No tokenizer has a padding token, Llama's has <s>.
    """
    folder = tmp_path_factory.mktemp("models")
    tokenizers = {"gpt2": make_tokenizer(), "llama": make_tokenizer(bos_token="<s>"),
                  "qwen2": make_tokenizer()}
    return {family: make_causal(folder / family, family, tokenizer)
            for family, tokenizer in tokenizers.items()}


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def task_records():
    """Return a record of every task, with positives and negatives, or a history."""
    records = []
    for task in TASKS:
        record = {"task": task, **FIELDS, "kept": task}
        if task == "chat":
            record["history"] = KEYS
        else:
            record |= {"pos": KEYS[:1], "neg": KEYS[1:]}
        if task == "lrlm":
            record["context"] = " In May "
        records.append(record)
    return records


def score(path, model, *flags, name="x", **options):
    """Run lm_score.py. Return the teacher scores of each record."""
    run("lm_score.py", "--eval_data", path, "--model_name_or_path", model, "--save_name", name,
        *flags, **options)
    return read_scores(path, name)


def read_scores(path, name="x"):
    scored = path.with_name(f"{path.stem}.scored.{name}{path.suffix}")
    return [json.loads(line)["teacher_scores"] for line in scored.read_text().splitlines()]


@torch.no_grad()
def plain_causal_scores(folder, record, answer, limit=256):
    """Return log p of each answer token, from a forward pass per key, by LLM-Embedder's templates.
    """
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encode(text, special=False):
        return tokenizer(text, add_special_tokens=special)["input_ids"]

    scores = []
    query = record["query"]
    for key in record.get("history") or record["pos"] + record["neg"]:
        before = {
            "icl": f"{key}\n{query}\n",
            "chat": f"{key}\nSpeaker 1: {query}\nSpeaker 2: ",
            "tool": f"Tool: {key.strip()}\n\nRequest: {query.strip()}\n\nAnswer: ",
        }.get(record["task"], f"Knowledge: {key.strip()}\n\nQuestion: {query.strip()}\n\nAnswer: ")
        ids = encode(before + answer, special=True)
        # the tokens that end after the prompt; the space before the answer is the answer's
        offsets = tokenizer(before + answer, return_offsets_mapping=True)["offset_mapping"]
        count = sum(end > len(before.rstrip(" ")) for _, end in offsets)
        if record["task"] == "lrlm":
            ids = encode(key) + encode(record["context"]) + encode(query) + encode(answer)
            count = len(encode(answer))
        assert len(ids) <= limit
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        scores.append([log_p[i - 1, ids[i]].item() for i in range(len(ids) - count, len(ids))])
    return scores


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_all_tasks_equal_a_plain_loop(family, models, tmp_path):
    records = task_records()
    path = write_records(tmp_path / "train.json", records)
    scores = score(path, models[family])
    for record, record_scores in zip(records, scores):
        rows = plain_causal_scores(models[family], record, record["answers"][0])
        expected = [sum(row) / len(row) for row in rows]
        assert record_scores == pytest.approx(expected, abs=1e-4)
        assert max(expected) - min(expected) > 1e-3
    scored = [json.loads(line) for line in (tmp_path / "train.scored.x.json").open()]
    assert [record.pop("teacher_scores") for record in scored] == scores
    assert scored == records
    assert not list(tmp_path.glob("*.journal*"))


def test_sums_and_several_answers(models, tmp_path):
    record = task_records()[0]
    path = write_records(tmp_path / "r.jsonl", [record])
    first, second = (plain_causal_scores(models["gpt2"], record, answer)
                     for answer in record["answers"])
    assert len(first[0]) > len(second[0])
    expected = [sum(row) for row in first]
    sums = score(path, models["gpt2"], "--likelihood", "sum")[0]
    assert sums == pytest.approx(expected, abs=1e-3)
    means = [[sum(row) / len(row) for row in rows] for rows in (first, second)]
    best = score(path, models["gpt2"], "--answer", "best")[0]
    assert best == pytest.approx([max(pair) for pair in zip(*means)], abs=1e-4)
    mean = score(path, models["gpt2"], "--answer", "mean")[0]
    assert mean == pytest.approx([sum(pair) / 2 for pair in zip(*means)], abs=1e-4)


def test_target_is_the_first_answer_and_response_is_one(models, tmp_path):
    fields = {"query": "who?", "pos": KEYS[:1], "neg": KEYS[1:]}
    path = write_records(tmp_path / "r.jsonl", [
        {**fields, "answers": ["Tom", "Mira"], "target": "Mira"}, {**fields, "response": "Mira"},
        {**fields, "answers": ["Tom"]}])
    by_target, by_response, by_answer = score(path, models["gpt2"])
    assert by_target == by_response != by_answer


def test_own_template_with_the_question_first(models, tmp_path):
    record = task_records()[0]
    path = write_records(tmp_path / "r.jsonl", [record])
    scores = score(path, models["llama"], "--template", r"Q: {query}\n{key} {key_of} A: {answer}",
                   "--likelihood", "sum")[0]
    tokenizer = AutoTokenizer.from_pretrained(models["llama"])
    model = AutoModelForCausalLM.from_pretrained(models["llama"]).eval()
    for key, value in zip(KEYS, scores):
        before = f"Q: {FIELDS['query'].strip()}\n{key.strip()} {{key_of}} A:"
        start = len(tokenizer(before)["input_ids"])
        ids = tokenizer(f"{before} {FIELDS['answers'][0]}")["input_ids"]
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = sum(log_p[i - 1, ids[i]].item() for i in range(start, len(ids)))
        assert value == pytest.approx(expected, abs=1e-3)


def test_keys_are_cut_and_neither_question_nor_answer(models, tmp_path):
    long = " ".join(KEYS * 20)
    tokenizer = AutoTokenizer.from_pretrained(models["gpt2"])
    ids = tokenizer(long)["input_ids"]
    frame = task_records()[0] | {"pos": [""], "neg": []}
    size = len(tokenizer(f"Knowledge: \n\nQuestion: {FIELDS['query'].strip()}\n\nAnswer: "
                         f"{FIELDS['answers'][0]}")["input_ids"])
    cut = [tokenizer.decode(ids[:count]) for count in (12, 256 - size - 10)]
    path = write_records(tmp_path / "r.jsonl", [frame | {"pos": [long]}])
    output, _ = run("lm_score.py", "--eval_data", path, "--model_name_or_path", models["gpt2"],
                    "--save_name", "x", "--key_max_length", 12)
    assert "note: 1 keys were too long for the model to read to the end" in output
    by_key_length = read_scores(path)
    by_context_length = score(path, models["gpt2"])  # 256 positions
    path = write_records(tmp_path / "r.jsonl", [frame | {"pos": cut}])
    expected = score(path, models["gpt2"])[0]
    assert by_key_length[0] == pytest.approx(expected[:1], abs=1e-4)
    assert by_context_length[0] != expected[1:]  # ten tokens more
    assert by_context_length[0] == pytest.approx(expected[1:], abs=1)


# ---------------------------------------------------------------- other models

def test_plain_t5(tiny, tmp_path):
    record = task_records()[0]
    path = write_records(tmp_path / "r.jsonl", [record])
    scores = score(path, tiny, "--answer", "mean", "--likelihood", "sum")[0]
    t5 = T5ForConditionalGeneration.from_pretrained(tiny).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for key, value in zip(KEYS, scores):
        prompt = f"Knowledge: {key.strip()}\n\nQuestion: {FIELDS['query'].strip()}\n\nAnswer:"
        expected = 0
        for answer in FIELDS["answers"]:
            labels = tokenizer(answer, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                loss = t5(**tokenizer(prompt, return_tensors="pt"), labels=labels).loss
            expected -= loss.item() * labels.shape[1] / 2
        assert value == pytest.approx(expected, abs=1e-3)


def test_other_sequence_to_sequence_model(tmp_path):
    tokenizer = make_tokenizer(pad_token="<pad>")
    torch.manual_seed(0)
    bart = BartForConditionalGeneration(BartConfig(
        vocab_size=len(tokenizer) + 8, d_model=16, encoder_layers=1, decoder_layers=1,
        pad_token_id=2, encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
        decoder_attention_heads=2, init_std=0.3, decoder_start_token_id=1)).eval()
    bart.save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    record = task_records()[0]
    path = write_records(tmp_path / "r.jsonl", [record])
    scores = score(path, tmp_path / "bart")[0]
    for key, value in zip(KEYS, scores):
        prompt = f"Knowledge: {key.strip()}\n\nQuestion: {FIELDS['query'].strip()}\n\nAnswer:"
        labels = torch.tensor([tokenizer(FIELDS["answers"][0])["input_ids"]])
        with torch.no_grad():
            loss = bart(torch.tensor([tokenizer(prompt)["input_ids"]]), labels=labels).loss
        assert value == pytest.approx(-loss.item(), abs=1e-4)


def make_reader(folder, make=make_t5):
    make(folder)
    (folder / "args.json").write_text(json.dumps({"num_contexts": 3, "max_length": 40}))
    return folder


def test_reader_with_one_context(tmp_path):
    folder = make_reader(tmp_path / "reader")
    records = make_records(5, contexts=4)
    path = write_records(tmp_path / "r.jsonl", records)
    scores = score(path, folder, "--likelihood", "sum")
    t5 = T5ForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for record, record_scores in zip(records, scores):
        answer = record.get("target") or record["answers"][0]
        labels = tokenizer(answer, return_tensors="pt")["input_ids"]
        for context, value in zip(record["ctxs"], record_scores, strict=True):
            ids = tokenizer(input_texts(record | {"ctxs": [context]}, 1)[0],
                            add_special_tokens=False)["input_ids"][:40]
            with torch.no_grad():
                loss = t5(torch.tensor([ids]), labels=labels).loss
            assert value == pytest.approx(-loss.item() * labels.shape[1], abs=1e-3)


def test_causal_reader_by_its_own_prompt(tmp_path):
    folder = make_reader(tmp_path / "reader", make_causal)
    records = make_records(3, contexts=2)
    path = write_records(tmp_path / "r.jsonl", records)
    scores = score(path, folder, "--likelihood", "sum")
    reader, tokenizer = open_reader(str(folder)).eval(), AutoTokenizer.from_pretrained(folder)
    reader.check_tokenizer(tokenizer)
    collator = reader.make_collator(tokenizer, 1, 40)
    for record, record_scores in zip(records, scores):
        for context, value in zip(record["ctxs"], record_scores, strict=True):
            answer = record.get("target") or record["answers"][0]
            batch = collator([(0, record | {"ctxs": [context]}, answer)])
            with torch.no_grad():
                loss, _ = reader(**batch["inputs"], labels=batch["labels"], reduction="sum")
            assert value == pytest.approx(-loss.item(), abs=1e-3)


def test_keys_of_other_forms(models, tmp_path):
    """Check that ctxs, objects for the key template, DPR's passages and documents of a corpus are
    scored as the same keys given as texts.
    """
    fields = {"query": "who?", "answers": ["Mira"]}
    documents = [{"id": str(i), "title": f"t{i}", "text": key} for i, key in enumerate(KEYS)]
    corpus = write_records(tmp_path / "corpus.jsonl", documents)
    texts = [f"t{i} {key}".strip() for i, key in enumerate(KEYS)]
    path = write_records(tmp_path / "r.jsonl", [
        {**fields, "pos": texts[:1], "neg": texts[1:]}, {**fields, "ctxs": documents},
        {**fields, "pos": documents[:1], "neg": documents[1:]}, {**fields, "history": texts},
        {**fields, "pos_index": [0], "neg_index": [1, 2, 3]},
        {**fields, "positive_ctxs": documents[:1], "hard_negative_ctxs": documents[1:],
         "negative_ctxs": documents, "ctxs": documents[2:]},  # DPR's
        {**fields, "ctxs": []}])
    *scores, none = score(path, models["gpt2"], "--corpus", corpus)
    assert none == []
    for other in scores[1:]:
        assert other == pytest.approx(scores[0], abs=1e-5)


# ---------------------------------------------------------------- runs

def test_llm_embedders_command_and_several_processes(models, tmp_path):
    data = tmp_path / "qa" / "msmarco"
    data.mkdir(parents=True)
    path = write_records(data / "train.json", task_records() * 3)
    alone = score(path, models["llama"], "--lm_batch_size", 4)
    run("lm_score.py", "--eval_data", "llm-embedder:qa/msmarco/train.json", "--data_root", tmp_path,
        "--model_name_or_path", models["llama"], "--save_name", "y", "--lm_batch_size", 4,
        "--key_max_length", 512, "--context_max_length", 1024, processes=2)
    assert read_scores(path, "y") == alone


def test_goes_on_after_kill(models, tmp_path):
    """Check that a killed run leaves a journal from which the same command continues, with any
    number of processes, while another command starts from scratch.
    """
    path = write_records(tmp_path / "r.jsonl", task_records() * 20)
    expected = score(path, models["gpt2"], "--batch_size", 2, name="whole")
    flags = ["--eval_data", path, "--model_name_or_path", models["gpt2"], "--save_name", "x",
             "--batch_size", 2]
    journal = tmp_path / "r.scored.x.jsonl.journal.0"
    process = run_in_background("lm_score.py", *flags)
    while not (journal.exists() and journal.read_bytes().count(b"\n") > 5):
        assert process.poll() is None, process.output()
    process.kill()
    assert not (tmp_path / "r.scored.x.jsonl").exists()
    done = journal.read_bytes().count(b"\n") - 1
    with open(journal, "ab") as file:
        file.write(b'{"part": 999, "result": [[1.0')  # a line that was cut off

    kept = journal.read_bytes()
    output, _ = run("lm_score.py", *flags, processes=2)
    assert f"{2 * done} questions are done" in output
    assert read_scores(path) == expected
    assert not list(tmp_path.glob("*.journal*"))

    journal.write_bytes(kept)
    output, _ = run("lm_score.py", *flags, "--likelihood", "sum")
    assert ("journal.0 was written for other data, another model or other flags; starting from "
            "scratch") in output
    assert read_scores(path) != expected
    assert not list(tmp_path.glob("*.journal*"))


@pytest.mark.parametrize("fields, first, all_answers", [
    ({"answers": ["", "a", "b"]}, ["a"], ["a", "b"]),
    ({"answer": {"Value": "A b", "Aliases": ["", "b"]}, "target": " "}, ["A b"], ["A b", "b"]),
])
def test_blank_answers_are_left_out(fields, first, all_answers):
    """Check that blank answers and targets are skipped (E15)."""
    question = make_question({"query": "who?", "pos": ["a key"], **fields}, "r.jsonl:1", 0)
    assert choose_answers(question, "first") == first
    assert choose_answers(question, "best") == all_answers


def test_all_lengths_are_checked_before_the_first_pass(models, tmp_path, monkeypatch):  # E7
    """Check that a record that does not fit is reported before anything is scored."""
    records = [*task_records(), {"task": "qa", **FIELDS, "query": "word " * 400, "pos": ["a"],
                                 "neg": []}]
    path = write_records(tmp_path / "r.jsonl", records)
    monkeypatch.setattr(sys, "argv", ["lm_score.py", "--eval_data", str(path), "--batch_size", "1",
                                      "--model_name_or_path", models["gpt2"]])
    monkeypatch.setattr(lm_score, "score_jobs", None)
    with pytest.raises(InputError, match="r.jsonl:7: question and answer take [0-9]+ tokens more"):
        lm_score.main(lm_score.parse_args())
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_the_longest_title_of_a_reader_is_checked(tmp_path):  # E7
    folder = make_reader(tmp_path / "reader", make_causal)
    context = {"title": "town " * 300, "text": "a"}
    records = [{**record, "ctxs": [*record["ctxs"], context]} for record in make_records(1)]
    args = Namespace(context_max_length=1024, key_max_length=512, bf16=False, t5_name="t5-base",
                     tokenizer=None, chat_template=None)
    scorer = lm_score.open_scorer(args, str(folder), True, {"max_length": 40},
                                  read_config(folder, "language"),
                                  World(0, 0, 1, torch.device("cpu")))
    job = Job(records[0], records[0]["question"], records[0]["ctxs"], ["x"], None, "f.jsonl:1")
    with pytest.raises(InputError, match="f.jsonl:1: the question takes"):
        lm_score.check_jobs(scorer, [job])
    lm_score.check_jobs(scorer, [job._replace(keys=job.keys[:-1])])


def test_keys_that_a_scorer_truncates_are_counted(models, tmp_path):
    job = Job({}, "who?", ["a town", "a town " * 60], ["Mira"], TASK_TEMPLATES["qa"], "f:1")
    for limit, key_limit in ((200, 10), (60, 500)):
        scorer = CausalScorer(None, make_tokenizer(), limit, key_limit)
        scorer.texts(job)
        assert scorer.num_truncated == 1

    folder = make_reader(tmp_path / "reader", make_causal)
    record = make_records(1)[0]
    contexts = [{"title": "town", "text": "a"}, {"title": "town", "text": "a town " * 60}]
    args = Namespace(context_max_length=1024, key_max_length=512, bf16=False, t5_name="t5-base",
                     tokenizer=None, chat_template=None)
    scorer = lm_score.open_scorer(args, str(folder), True, {"max_length": 100},
                                  read_config(folder, "language"),
                                  World(0, 0, 1, torch.device("cpu")))
    scorer.texts(Job(record, record["question"], contexts, ["x"], None, "f.jsonl:1"))
    assert scorer.num_truncated == 1


def test_the_chat_template_frames_the_text(models):  # E16
    tokenizer = make_tokenizer()
    scorer = CausalScorer(None, tokenizer, 200, 100, frame=("user: ", "\nassistant: "))
    job = Job({}, "who?", ["a town"], ["Mira"], TASK_TEMPLATES["qa"], "f:1")
    ((text,),) = scorer.texts(job)
    assert tokenizer.decode(text.prompt) == (
        "user: Knowledge: a town\n\nQuestion: who?\n\nAnswer:\nassistant:")
    assert tokenizer.decode(text.answer) == " Mira"
    with pytest.raises(InputError, match="f:1: the parts of an lrlm text continue each other"):
        scorer.texts(job._replace(template=TASK_TEMPLATES["lrlm"]))


# ---------------------------------------------------------------- errors

QA = {"task": "qa", **FIELDS, "pos": ["a key"], "neg": []}


@pytest.mark.parametrize("record, flags, message", [
    ({"query": "who?", "answers": ["x"]}, [], "r.jsonl:1: no keys: neither 'pos' and 'neg'"),
    ({"query": "who?", "pos": ["a"]}, [], "r.jsonl:1: no answer to score"),
    ({**QA, "answers": [" "]}, [], "r.jsonl:1: no answer to score"),
    ({**QA, "task": "poem"}, [], "r.jsonl:1: there is no template for the task 'poem', only"),
    ({**QA, "answers": ["word " * 400]}, [], "r.jsonl:1: question and answer take"),
    ({**QA, "query": "word " * 400}, [], "r.jsonl:1: question and answer take"),
    ({**QA, "pos": [3]}, [], "r.jsonl:1: every entry of 'pos' must be"),
    ({**QA, "pos": [{"contents": "a"}]}, [], "no column 'text' for --key_template"),
    ({"query": "who?", "answers": ["x"], "pos_index": [3]}, [], "give the corpus with --corpus"),
    (QA, ["--template", "{query} {answer}"], "must contain {key} once"),
    (QA, ["--template", "{key} {query}"], "must end with {answer}"),
    (QA, ["--template", "{answer} {key}"], "must end with {answer}"),
    (QA, ["--batch_size", "0"], "--batch_size must be >= 1, got 0"),
    ({**QA, "task": "lrlm", "context": 3}, [], "'context' must be a text"),
])
def test_errors_take_one_line(record, flags, message, models, tmp_path):
    path = write_records(tmp_path / "r.jsonl", [record])
    _, errors = run("lm_score.py", "--eval_data", path, "--model_name_or_path", models["gpt2"],
                    *flags, code=1)
    assert message in errors and len(errors.splitlines()) == 1
    assert os.listdir(tmp_path) == ["r.jsonl"]


def test_scores_that_are_no_numbers_are_refused(models, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(models["gpt2"])
    model.transformer.ln_f.weight.data[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(models["gpt2"]).save_pretrained(tmp_path / "nan")
    path = write_records(tmp_path / "r.jsonl", [QA])
    _, errors = run("lm_score.py", "--eval_data", path, "--model_name_or_path", tmp_path / "nan",
                    code=1)
    assert "teacher_scores would be nan" in errors and len(errors.splitlines()) == 1


def test_sequence_to_sequence_model_without_padding_is_refused(tmp_path):
    tokenizer = make_tokenizer()
    config = BartConfig(vocab_size=420, d_model=16, encoder_layers=1, decoder_layers=1,
                        encoder_ffn_dim=16, decoder_ffn_dim=16, encoder_attention_heads=2,
                        decoder_attention_heads=2)
    BartForConditionalGeneration(config).save_pretrained(tmp_path / "bart")
    settings = json.loads((tmp_path / "bart" / "config.json").read_text())
    (tmp_path / "bart" / "config.json").write_text(json.dumps(settings | {"pad_token_id": None}))
    tokenizer.save_pretrained(tmp_path / "bart")
    path = write_records(tmp_path / "r.jsonl", [QA])
    _, errors = run("lm_score.py", "--eval_data", path, "--model_name_or_path", tmp_path / "bart",
                    "--reader", code=1)
    assert "readers are T5 or causal" in errors and len(errors.splitlines()) == 1
    _, errors = run("lm_score.py", "--eval_data", path, "--model_name_or_path", tmp_path / "bart",
                    code=1)
    assert "config.json sets no pad_token_id" in errors and len(errors.splitlines()) == 1
