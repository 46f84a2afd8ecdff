"""CausalReader against a plain loop over prompts; prompts, targets, folders and scripts."""
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import train_epoch
from causal_helpers import CONFIGS, make_causal, make_tokenizer, script_logits
from conftest import make_records, run, run_and_kill
from reader.causal import CausalReader, PromptCollator, Prompts, choose_prompts
from reader.causal_lm import open_lm
from reader.open import open_reader
from test_train_epoch import assert_same_run, state
from training.checkpoints import load_tokenizer
from utils import InputError

FAMILIES = list(CONFIGS)
RECORDS = [
    {"id": "a", "question": "who wrote it?", "answers": ["one town"],
     "ctxs": [{"title": "T", "text": "some text of a town", "score": 3.0},
              {"title": None, "text": "the river", "score": 1.5},
              {"title": "A", "text": "x", "score": 1.0}]},
    {"id": "b", "question": "where?", "answers": ["x"], "ctxs": []},
    {"id": "c", "question": "what is a hobby", "answers": ["to bake bread in the morning"],
     "ctxs": [{"title": "B", "text": "the baker kept a dog", "score": -0.5}]}]
SCORES = Prompts(passage_weights="score", retriever_temperature=0.7)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return {family: a tiny model's folder}."""
    return {family: make_causal(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


def open_causal(folder, prompts=None, **options):
    reader = CausalReader.from_pretrained(folder, prompts=prompts, **options)
    tokenizer = load_tokenizer(folder, folder)
    reader.check_tokenizer(tokenizer)
    return reader, tokenizer


def make_batch(reader, tokenizer, records=RECORDS, max_length=60):
    samples = [(index, record, record["answers"][0]) for index, record in enumerate(records)]
    return reader.make_collator(tokenizer, 3, max_length)(samples)


# ---------------------------------------------------------------- the plain form

def plain_prompts(inputs):
    """Return [[(ids of a prompt, its weight)]] of each question."""
    questions = []
    for ids, mask, log_weights in zip(*inputs.values()):
        questions.append([(row[real].tolist(), weight.exp()) for row, real, weight
                          in zip(ids, mask, log_weights) if real.any()])
    return questions


def plain_loss(lm, inputs, labels):
    """Return the summed loss, computed prompt by prompt and token by token."""
    total = 0
    for prompts, label in zip(plain_prompts(inputs), labels):
        target = [token for token in label.tolist() if token != -100]
        for ids, weight in prompts:
            log_p = lm(input_ids=torch.tensor([ids + target])).logits[0].log_softmax(-1)
            for place, token in enumerate(target):
                total = total - weight * log_p[len(ids) + place - 1, token]
    return total


@torch.no_grad()
def plain_generation(lm, inputs, max_length, ends):
    """Return ([ids], [scores], [log p under the average]) of the answers; each step runs every
    prompt as a whole.
    """
    answers, scores, means = [], [], []
    for prompts in plain_prompts(inputs):
        answer, log_p, likelihoods = [], 0.0, [weight.log() for _, weight in prompts]
        while len(answer) < max_length and not (answer and answer[-1] in ends):
            rows = [lm(input_ids=torch.tensor([ids + answer])).logits[0, -1].softmax(-1)
                    for ids, _ in prompts]
            mean = sum(weight * row for row, (_, weight) in zip(rows, prompts))
            answer.append(int(mean.argmax()))
            log_p += float(mean.max().log())
            likelihoods = [value + row[answer[-1]].log() for value, row in zip(likelihoods, rows)]
        answers.append(answer)
        scores.append(torch.stack(likelihoods).log_softmax(0))
        means.append(log_p)
    return answers, scores, means


@pytest.mark.parametrize("prompts", [None, SCORES], ids=["equal", "score"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_a_plain_loop(folders, family, prompts):
    reader, tokenizer = open_causal(folders[family], prompts)
    reader.eval()
    batch = make_batch(reader, tokenizer)
    inputs, labels = batch["inputs"], batch["labels"]
    assert inputs["attention_mask"].any(2).sum(1).tolist() == [3, 1, 1]
    want = plain_loss(reader.lm, inputs, labels)
    want.backward()
    gradients = {name: p.grad.clone() for name, p in reader.named_parameters()}
    reader.zero_grad()
    loss, logits = reader(**inputs, labels=labels, reduction="sum")
    loss.backward()
    torch.testing.assert_close(loss, want, atol=1e-5, rtol=1e-6)
    lengths = labels.ne(-100).sum(1)  # of the answers to 3, 1 and 1 prompts
    assert logits.shape == (3 * lengths[0] + lengths[1] + lengths[2], reader.config.vocab_size)
    for name, parameter in reader.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)
    tokens = labels.ne(-100).sum()
    torch.testing.assert_close(reader(**inputs, labels=labels)[0], want / tokens)


@pytest.mark.parametrize("prompts", [None, SCORES], ids=["equal", "score"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_scores_equal_a_plain_loop(folders, family, prompts):
    reader, tokenizer = open_causal(folders[family], prompts)
    reader.eval()
    inputs = make_batch(reader, tokenizer)["inputs"]
    first = plain_generation(reader.lm, inputs, 12, [])[0]
    # one question ends early, another later, the third never
    reader.config.eos_token_id = [first[0][2], first[2][5]]
    want, want_scores, want_log_p = plain_generation(reader.lm, inputs, 12, reader.end_tokens)
    assert len({len(answer) for answer in want}) > 1
    answers, scores = reader.generate(**inputs, max_length=12, return_scores=True)
    for answer, row in zip(want, answers.tolist()):
        if answer[-1] in reader.end_tokens:
            answer = answer[:-1]
        assert row[:len(answer)] == answer and set(row[len(answer):]) <= {reader.end_tokens[-1]}
    assert answers.shape[1] == max(map(len, want))
    for score, row, real in zip(want_scores, scores, inputs["attention_mask"].any(2)):
        torch.testing.assert_close(row[real], score, atol=1e-4, rtol=0)
        assert row[~real].tolist() == [-torch.inf] * int((~real).sum())
    assert torch.equal(reader.generate(**inputs, max_length=12), answers)
    # D: the answer's likelihood under the average of the prompts
    again, log_p = reader.generate(**inputs, max_length=12, n_best=1)
    assert torch.equal(again[:, 0], answers)
    assert log_p[:, 0].tolist() == pytest.approx(want_log_p, abs=1e-4)


def test_probabilities_are_averaged_and_not_logits(folders):
    """Check two prompts of which only one predicts a token with certainty."""
    reader, tokenizer = open_causal(folders["gpt2"])
    inputs = make_batch(reader, tokenizer)["inputs"]
    rows = torch.zeros(5, 1, reader.config.vocab_size)
    rows[0, 0, 7], rows[1, 0, [7, 9]] = 9.0, torch.tensor([-50.0, 5.0])
    rows[2, 0, [7, 9]] = torch.tensor([-50.0, 5.0])
    script_logits(reader, lambda ids: rows)
    assert rows[:3].mean(0).argmax() == 9 and rows[:3].softmax(-1).mean(0).argmax() == 7
    assert reader.generate(**inputs, max_length=1)[0].tolist() == [7]


def test_the_average_is_of_float32_under_autocast(folders):
    """Check two tokens that are equal in bfloat16, where the second is the likelier."""
    reader, tokenizer = open_causal(folders["gpt2"])
    inputs = make_batch(reader, tokenizer)["inputs"]
    rows = torch.full((5, 1, reader.config.vocab_size), -50.0)
    rows[:, 0, [7, 9]] = torch.tensor([0.4995, 0.5005]).log()
    script_logits(reader, lambda ids: rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert reader.generate(**inputs, max_length=1)[0].tolist() == [9]


def test_a_batch_that_is_not_real_has_a_loss_of_zero(folders):
    reader, tokenizer = open_causal(folders["llama"])
    inputs = make_batch(reader, tokenizer)["inputs"]
    loss, _ = reader(**inputs, labels=torch.full((3, 1), -100))
    loss.backward()
    assert loss == 0 and all((p.grad == 0).all() for p in reader.parameters())


def test_checkpointing_replays_dropout(folders):
    gradients = []
    for use_checkpoint in (False, True):
        reader, tokenizer = open_causal(folders["llama"], dropout=0.3)
        assert reader.lm.model.layers[0].self_attn.attention_dropout == 0.3
        reader.train().set_checkpoint(use_checkpoint)
        batch = make_batch(reader, tokenizer)
        torch.manual_seed(5)
        reader(**batch["inputs"], labels=batch["labels"])[0].backward()
        gradients.append([p.grad for p in reader.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# ---------------------------------------------------------------- prompts and targets

@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def collate(tokenizer, template, record, max_length=100, target=None):
    collator = PromptCollator(tokenizer, 2, max_length, Prompts(template))
    batch = collator([(0, record, target)])
    texts = []
    for ids, mask in zip(batch["inputs"]["input_ids"][0], batch["inputs"]["attention_mask"][0]):
        texts.append(tokenizer.decode(ids[mask]))
    return texts, batch


def test_prompts(tokenizer):
    texts, batch = collate(tokenizer, Prompts().prompt_template, RECORDS[0])
    assert texts == ["Background: T some text of a town\n\nQuestion: who wrote it?\nAnswer:",
                     "Background: the river\n\nQuestion: who wrote it?\nAnswer:"]
    assert not batch["inputs"]["attention_mask"][0, 1, 0]  # the padding lies on the left
    assert batch["inputs"]["log_weights"].exp().tolist() == [[0.5, 0.5]] and not batch["labels"]
    alone, _ = collate(tokenizer, Prompts().prompt_template, RECORDS[1])
    assert alone == ["Question: where?\nAnswer:"]
    alone, _ = collate(tokenizer, "({text}) {question} A", RECORDS[1])
    assert alone == ["() where? A"]
    odd = {"question": "{text}?", "ctxs": [{"title": "{title}", "text": "{question} {x}"}]}
    assert collate(tokenizer, "{title}: {text} {question}", odd)[0] == [
        "{title}: {question} {x} {text}?"]


def test_the_passage_is_cut_and_nothing_else(tokenizer):
    record = {"id": "r", "question": "who wrote it?", "ctxs": [{"text": "the river " * 40}]}
    template = r"{question} Passage: {text}\nAnswer:"
    full, batch = collate(tokenizer, template, record, max_length=10 ** 6)
    for length in range(30, batch["inputs"]["attention_mask"].sum(), 7):
        (text,), batch = collate(tokenizer, template, record, max_length=length)
        assert batch["inputs"]["attention_mask"].sum() == length
        assert text.startswith("who wrote it? Passage:") and text.endswith("\nAnswer:")
        assert full[0].startswith(text.removesuffix("\nAnswer:").rstrip())
    (text,), _ = collate(tokenizer, template, record, max_length=1)  # what cannot be cut stays
    assert text.split() == ["who", "wrote", "it?", "Passage:", "Answer:"]


def test_the_oldest_turns_go_before_the_passage_is_cut(tokenizer):
    record = {"id": "a", "question": "who?", "ctxs": [{"title": "T", "text": "some text"}] * 2,
              "chat_history": ["one town", "two", "three letters"]}
    template = r"{title}: {text}\n{question}"
    fitting = []
    for first in range(4):
        lines = ["T: some text", *record["chat_history"][first:], "who?"]
        text = "\n".join(lines)
        fitting.append((len(tokenizer(text, add_special_tokens=False)["input_ids"]), text))
    (longest, _), (shortest, question_alone) = fitting[0], fitting[3]
    for max_length in range(shortest, longest + 2):
        expected = next(text for length, text in fitting if length <= max_length)
        assert collate(tokenizer, template, record, max_length)[0] == [expected] * 2
    (text, _), _ = collate(tokenizer, template, record, shortest - 2)
    assert text != question_alone and question_alone.startswith(text.split("\n")[0])
    assert text.endswith("\nwho?")
    # a single text loses its oldest words
    record["chat_history"] = "one town two three letters"
    (text, _), _ = collate(tokenizer, template, record, longest - 3)
    kept = text.removeprefix("T: some text\n").removesuffix("\nwho?")
    assert record["chat_history"].endswith(kept) and 0 < len(kept) < len(record["chat_history"])


def test_targets_have_the_tokens_of_their_place(tokenizer):
    eos = tokenizer.eos_token_id
    for template, separator in [("{text}{question}:", " "), (r"{text}{question}:\n", ""),
                                ("{text}{question}:  ", "  ")]:
        texts, batch = collate(tokenizer, template, RECORDS[0], target="one town <end>")
        labels = batch["labels"][0].tolist()
        assert labels[-1] == eos and labels.count(eos) == 1
        ids, mask = batch["inputs"]["input_ids"][0, 0], batch["inputs"]["attention_mask"][0, 0]
        joined = tokenizer(texts[0] + separator + "one town ", add_special_tokens=False).input_ids
        assert ids[mask].tolist() + labels[:-1] == joined
        assert texts[0].endswith("\n") == (separator == "")  # the prompt keeps its line end, E1


def test_a_tokenizer_with_a_beginning_puts_it_before_prompts_alone(tmp_path):
    tokenizer = make_tokenizer(bos_token="<s>", pad_token="<pad>")
    from tokenizers.processors import TemplateProcessing
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    texts, batch = collate(tokenizer, "{text} {question}:", RECORDS[0], 12, "one town")
    assert [text.startswith("<s>") and text.count("<s>") == 1 for text in texts] == [True] * 2
    assert batch["inputs"]["attention_mask"].sum(2).max() <= 12
    assert tokenizer.bos_token_id not in batch["labels"]


def test_weights_are_the_softmax_of_the_scores(folders):
    reader, tokenizer = open_causal(folders["llama"], SCORES)
    weights = make_batch(reader, tokenizer)["inputs"]["log_weights"]
    want = (torch.tensor([3.0, 1.5, 1.0]) / 0.7).softmax(0)
    torch.testing.assert_close(weights[0].exp(), want)
    assert weights[1:].exp().tolist() == [[1, 0, 0], [1, 0, 0]]
    # A22: a reader's score does not take the place of the retriever's
    scored = [dict(context, score=-i, retrieval_score=context["score"])
              for i, context in enumerate(RECORDS[0]["ctxs"])]
    collator = reader.make_collator(tokenizer, 3, 100)
    assert torch.equal(collator.log_weights({"ctxs": scored}), weights[0])
    reader.check_records(RECORDS, 3, "f.json")
    for score in (None, float("inf")):
        record = {"id": "r7", "ctxs": [{"text": "x", "score": 2}, {"text": "x", "score": score}]}
        reader.check_records([record], 1, "f.json")
        with pytest.raises(InputError, match="f.json: record 'r7' has a context without a finite"):
            reader.check_records([record], 2, "f.json")


@pytest.mark.parametrize("given, message", [
    ({"prompt_template": "{question}"}, r"with \{question\}, and with \{text\}"),
    ({"prompt_template": "{text} {question} {text}"}, "once"),
    ({"prompt_template": "{text} {question} {key}"}, r"not contain \{key\}, only \{question\}"),
    ({"retriever_temperature": 0.0}, "--retriever_temperature must be a number > 0, got 0.0"),
    ({"retriever_temperature": float("nan")}, "--retriever_temperature must be .*, got nan")])
def test_flags_that_cannot_be_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        choose_prompts(given, {}, "x")


def test_what_a_checkpoint_states_is_checked_too():
    stated = {"passage_weights": "score", "retriever_temperature": 2}
    assert choose_prompts({"retriever_temperature": 3.0}, stated, "x")[1:3] == ("score", 3.0)
    for name, value in [("prompt_template", 7), ("passage_weights", []),
                        ("retriever_temperature", "x")]:
        with pytest.raises(InputError, match=f"x: {name} in its args.json must be"):
            choose_prompts({}, {name: value}, "x")


# ---------------------------------------------------------------- folders

@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folders_open_in_transformers_with_equal_logits(folders, family, tmp_path):
    reader, tokenizer = open_causal(folders[family])
    ids = torch.tensor([tokenizer("who wrote the river").input_ids])
    want = AutoModelForCausalLM.from_pretrained(folders[family]).eval()(ids).logits
    reader.eval().save_pretrained(tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    for lm in (reader.lm, again, open_lm(tmp_path / "ours").eval()):
        torch.testing.assert_close(lm(ids).logits, want, atol=1e-6, rtol=0)
    names = set(load_file(tmp_path / "ours" / "model.safetensors"))
    assert names == set(load_file(f"{folders[family]}/model.safetensors"))


def test_older_names_and_half_precision_are_read(folders, tmp_path):
    """Check GPT-2's file on the hub, which has no prefix and holds the causal masks."""
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes(open(f"{folders['gpt2']}/{file}", "rb").read())
    weights = load_file(f"{folders['gpt2']}/model.safetensors")
    old = {name.removeprefix("transformer."): value.bfloat16() for name, value in weights.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 8, 8), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(old, tmp_path / "model.safetensors")
    reader = open_reader(tmp_path)
    assert isinstance(reader, CausalReader)
    assert all(p.dtype == torch.float32 for p in reader.parameters())
    assert reader.lm.lm_head.weight is reader.lm.transformer.wte.weight
    torch.testing.assert_close(reader.lm.lm_head.weight,
                               weights["transformer.wte.weight"].bfloat16().float())


def test_no_weights_starts_at_random_and_says_so(folders, tmp_path, capsys):
    (tmp_path / "config.json").write_bytes(open(f"{folders['llama']}/config.json", "rb").read())
    assert isinstance(open_reader(tmp_path), CausalReader)
    assert "starting from random initialisation" in capsys.readouterr().out


def test_bad_checkpoints_are_one_clear_line(folders, tiny, tmp_path):
    def refuse(message, **changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(InputError) as error:
            open_reader(tmp_path)
        assert message in str(error.value) and "\n" not in str(error.value)

    config = json.load(open(f"{folders['llama']}/config.json"))
    save_file(load_file(f"{folders['llama']}/model.safetensors"), tmp_path / "model.safetensors")
    refuse("down_proj.weight is (32, 48) in the file, (32, 40) by", intermediate_size=40)
    refuse("missing in the file", num_hidden_layers=3)
    refuse("unknown to the configuration", num_hidden_layers=1)
    refuse("config.json sets num_hidden_layers 5000", num_hidden_layers=5000)
    refuse("weights do not match config.json", hidden_size=10 ** 6)  # at once, without the memory
    refuse("is a bert model; the reader needs T5", model_type="bert")
    refuse("is a bart model; the reader needs T5", model_type="bart")
    with pytest.raises(InputError, match="no such folder or file"):
        open_reader("no-such/model")
    with pytest.raises(InputError, match="--passage_weights is for causal language models"):
        open_reader(tiny, prompt_flags={"passage_weights": "score"})


def test_tokenizers_that_do_not_fit_are_refused(folders):
    reader, tokenizer = open_causal(folders["llama"])
    assert tokenizer.pad_token is None
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="has no end-of-sequence token"):
        reader.check_tokenizer(tokenizer)
    other = make_tokenizer(eos_token="<pad>")
    reader.check_tokenizer(other)
    assert reader.end_tokens == [1, 2]  # the model's own and the tokenizer's
    other.add_tokens([f"<{number}>" for number in range(9)])
    with pytest.raises(InputError, match="the tokenizer has 409 ids, the model embeds 408"):
        reader.check_tokenizer(other)


def test_what_is_longer_than_the_model_reads_is_refused(folders):
    reader, tokenizer = open_causal(folders["gpt2"])
    reader.set_lengths(206, 50)
    with pytest.raises(InputError, match="--max_length 207 and answers of 50 tokens exceed the"):
        reader.set_lengths(207, 50)
    record = make_records(1)[0] | {"id": "r7", "question": "who " * 300}
    with pytest.raises(InputError, match="record 'r7': prompt and answer .* the model reads 256"):
        make_batch(reader, tokenizer, [record])
    inputs = make_batch(reader, tokenizer)["inputs"]
    with pytest.raises(InputError, match="and an answer of 250 exceed the 256"):
        reader.generate(**inputs, max_length=250)
    with pytest.raises(InputError, match="--num_beams 3: a causal language model"):
        reader.generate(**inputs, num_beams=3)


def test_a_question_that_is_too_long_is_found_before_the_first_update(folders, tmp_path):  # E8
    reader, _ = open_causal(folders["gpt2"])  # of 256 positions
    reader.set_lengths(100, 50)
    records = make_records(3)
    reader.check_records(records, 2, "f.json")
    reader.check_records(records, 2, "f.json", trains=True)
    long = records[1] | {"question": "who " * 300}
    for trains in (False, True):
        with pytest.raises(InputError, match="f.json: record 'r-1': its question takes [0-9]+ "
                           "tokens without a passage and .* shorten the question, or drop"):
            reader.check_records([records[0], long], 2, "f.json", trains=trains)
    target = records[1] | {"target": "bread " * 60, "ctxs": [{"title": "T", "text": "town " * 99}]}
    with pytest.raises(InputError, match="prompt and answer take .* lower --max_length to"):
        reader.set_lengths(180, 50)
        reader.check_records([target], 2, "f.json", trains=True)
    data = tmp_path / "r.json"
    data.write_text(json.dumps([*records, long]))
    with pytest.raises(InputError, match="record 'r-1': its question"):
        train_epoch.main(train_epoch.parse_args([str(value) for value in (
            tmp_path / "m", data, data, "--t5_name", folders["gpt2"], "--max_length", 100)]))
    assert not (tmp_path / "m.jsonl").exists()


def script_reader(reader, tokenizer, text):
    """Make the reader generate a given text, and count its steps in `steps`."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def next_logits(inputs):
        rows = torch.zeros(len(inputs), 1, reader.config.vocab_size)
        rows[:, 0, ids[len(steps)]] = 9.0
        steps.append(1)
        return rows

    steps = []
    script_logits(reader, next_logits)
    return steps, ids


@pytest.mark.parametrize("text, answer", [
    (" one town.\nQuestion: who", "one town."), ("\n\n one town\n\nWhere", "one town"),
    (" one town", "one town")])
def test_answers_end_at_the_first_line_end(folders, tokenizer, text, answer):  # E11
    reader, tokenizer = open_causal(folders["llama"], Prompts(answer_lines="first"))
    steps, ids = script_reader(reader, tokenizer, text)
    inputs = torch.full((1, 1, 4), 5), torch.ones(1, 1, 4).bool(), torch.zeros(1, 1)
    generated = reader.generate(*inputs, max_length=len(ids))
    assert tokenizer.decode(generated[0], skip_special_tokens=True).strip() == answer
    shortest = next((count for count in range(1, len(ids))
                     if "\n" in tokenizer.decode(ids[:count]).lstrip()), len(ids))
    assert len(steps) == shortest  # nothing is generated after it
    reader, tokenizer = open_causal(folders["llama"])
    script_reader(reader, tokenizer, text)
    generated = reader.generate(*inputs, max_length=len(ids))
    assert tokenizer.decode(generated[0]) == text


def test_the_test_set_is_answered_by_first_lines(folders, records_file, tmp_path, capsys):  # E11
    """Check that the best checkpoint, opened again for --data_test, has its tokenizer."""
    train_epoch.main(train_epoch.parse_args([str(value) for value in (
        tmp_path / "m", records_file, records_file, "--data_test", records_file, "--t5_name",
        folders["llama"], "--answer_lines", "first", "--epochs", 1, "--batch_size", 4,
        "--num_contexts", 1, "--max_length", 80, "--eval_answer_maxlength", 3)]))
    assert "test EM 0.00 (0/11)" in capsys.readouterr().out


def test_lines_end_answers_of_models_not_trained_here(folders, tmp_path, capsys):  # E11
    assert open_reader(folders["llama"]).prompts.answer_lines == "first"
    assert "was not trained here: its answers end at the first line" in capsys.readouterr().out
    assert open_reader(folders["llama"], trains=True).prompts.answer_lines == "all"
    given = {"answer_lines": "all"}
    assert open_reader(folders["llama"], prompt_flags=given).prompts.answer_lines == "all"
    make_causal(tmp_path)
    (tmp_path / "args.json").write_text('{"num_contexts": 3, "max_length": 40}')
    assert open_reader(tmp_path).prompts.answer_lines == "all"
    (tmp_path / "args.json").write_text('{"num_contexts": 3, "prompts": {"answer_lines": "first"}}')
    assert open_reader(tmp_path).prompts.answer_lines == "first"
    (tmp_path / "args.json").write_text('{"num_contexts": 3, "prompts": {"answer_lines": 3}}')
    with pytest.raises(InputError, match="answer_lines .* must be one of first, all, got 3"):
        open_reader(tmp_path)


# ---------------------------------------------------------------- the scripts

FAST = ("--num_contexts", 3, "--max_length", 100, "--num_warmup_steps", 2, "--lr", "1e-2")


def test_memorises_and_answers_as_trained(folders, tmp_path):
    records = make_records(5)
    records[1]["ctxs"] = []  # asked alone
    data = tmp_path / "r.json"
    data.write_text(json.dumps(records))
    train = ["train_epoch.py", tmp_path / "m", data, data, *FAST, "--batch_size", 2, "--dropout", 0,
             "--no_shuffle", "--model_name_or_path", folders["llama"], "--epochs", 20]
    out, _ = run(*train, "--prompt_template", r"{text} {title}\n{question} =", "--passage_weights",
                 "score", "--retriever_temperature", 2, "--data_test", data)
    assert "best dev EM 100.00" in out and "test EM 100.00 (5/5)" in out
    rows = [json.loads(line) for line in open(tmp_path / "m.jsonl")]
    assert rows[-1]["loss"] < 0.1 < rows[0]["loss"]
    saved = json.load(open(tmp_path / "m" / "args.json"))
    assert saved["prompts"] == {"prompt_template": r"{text} {title}\n{question} =",
                                "passage_weights": "score", "retriever_temperature": 2.0,
                                "chat_template": False, "answer_lines": "all"}
    AutoModelForCausalLM.from_pretrained(tmp_path / "m")

    # prompts and weights are those of the training unless flags say otherwise
    out, _ = run("test.py", tmp_path / "m", data, "--pred", tmp_path / "p.jsonl", "--scores",
                 tmp_path / "s.json")
    assert "100.00 100.00      5/5" in out
    row = json.loads(open(tmp_path / "p.jsonl").readline())
    assert row["prediction"] in records[0]["answers"] and len(row["contexts"]) == 3
    posterior = torch.tensor([context["score"] for context in row["contexts"]]).exp()
    torch.testing.assert_close(posterior.sum(), torch.tensor(1.0))
    scored = json.load(open(tmp_path / "s.json"))
    assert scored[0]["ctxs"][0]["score"] == row["contexts"][0]["score"]
    assert scored[0]["ctxs"][0]["retrieval_score"] == records[0]["ctxs"][0]["score"]
    out, _ = run("test.py", tmp_path / "m", data, "--prompt_template", "{question} {text}")
    assert "100.00 100.00      5/5" not in out
    _, error = run("test.py", tmp_path / "m", data, "--num_beams", 2, code=1)
    assert error.count("error: --num_beams 2: a causal language model") == 1
    del records[0]["ctxs"][1]["score"]
    data.write_text(json.dumps(records))
    _, error = run("test.py", tmp_path / "m", data, code=1)
    assert f"error: {data}: record 'r-0' has a context without a finite 'score'" in error
    _, error = run(*train, "--resume", code=1)
    assert "--prompt_template '{text} {title}\\\\n{question} =' (now None)" in error


def test_the_split_of_a_batch_does_not_matter(folders, records_file, tmp_path):
    """Check that 1 process x batch 4 and 2 processes x 2 micro-batches of 1 give the same weights.
    """
    splits = {"one": (4, 1, 1), "both": (1, 2, 2)}
    for name, (batch, accumulation, processes) in splits.items():
        run("train_epoch.py", tmp_path / name, records_file, records_file, *FAST, "--lr", "1e-3",
            "--t5_name", folders["qwen2"], "--epochs", 1, "--dropout", 0, "--batch_size", batch,
            "--grad_accumulation", accumulation, processes=processes)
    first, other = [state(tmp_path / name) for name in splits]
    assert first["progress"]["total_updates"] == 3
    for key, value in first["model"].items():
        torch.testing.assert_close(other["model"][key], value, atol=2e-5, rtol=0)


def test_adapters_killed_and_resumed_equal_uninterrupted_ones(folders, records_file, tmp_path,
                                                              monkeypatch):
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    common = [records_file, records_file, *FAST, "--t5_name", folders["gpt2"], "--epochs", 3,
              "--batch_size", 2, "--dropout", 0.2, "--save_every", 1, "--eval_every", 4, "--lora",
              4, "--use_checkpoint"]
    out, _ = run("train_epoch.py", tmp_path / "whole", *common)
    run_and_kill("train_epoch.py", tmp_path / "killed", *common, "--resume", at=40)
    done, _ = run("train_epoch.py", tmp_path / "killed", *common, "--resume")
    assert "resuming after" in done
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])

    # adapters are merged: the names are the model's, the embeddings stayed, the layers did not
    before = load_file(f"{folders['gpt2']}/model.safetensors")
    assert weights[0].keys() == before.keys()
    changed = {name for name, value in before.items() if not torch.equal(weights[0][name], value)}
    assert changed and all(".attn.c_" in name or ".mlp.c_" in name for name in changed)
    out, _ = run("test.py", tmp_path / "whole", records_file)
    assert "11 questions" in out


def test_what_a_reader_does_not_offer_is_one_line(folders, tiny, records_file, tmp_path):
    def refuse(message, *args, model=tiny):
        _, error = run("train_epoch.py", tmp_path / "m", records_file, records_file, *FAST,
                       "--t5_name", model, *args, code=1)
        lines = [line for line in error.splitlines() if line.startswith("error")]
        assert len(lines) == 1 and message in lines[0] and "Traceback" not in error, error

    refuse("--lora is for causal language models", "--lora", 4)
    refuse("with {question}, and with {text} once", "--prompt_template", "{question}",
           model=folders["llama"])
    refuse("exceed the 256 tokens that the model reads", "--max_length", 250,
           model=folders["llama"])
