"""training/t5_folder.py, reader/open.py: how a reader's folder is read, as by transformers and
sentencepiece. Comments name the row of the list of faults that a test belongs to.
"""
import argparse
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    T5ForConditionalGeneration,
    T5Tokenizer,
)
from transformers.modeling_outputs import BaseModelOutput

import ask
import lm_score
from conftest import ROOT, TOKENIZER, make_records, make_t5, pad_packed
from data import Collator, encode_inputs, pack_padded
from model import CROSS_BIAS, FiDT5, plain_fid
from reader.open import open_reader, open_reader_tokenizer, open_with_tokenizer
from reader.predict import decode_answers, predict
from test_model import random_batch
from training.checkpoints import read_config
from training.t5_folder import has_cross_bias, open_t5_tokenizer, parse_sentencepiece
from utils import InputError, World

GOLDEN = ROOT / "tests" / "golden"
SPIECE = json.loads((GOLDEN / "spiece.json").read_text())
WORLD = World(0, 0, 1, torch.device("cpu"))


def edit_json(path, **changes):
    """Set the values of a JSON file; None removes one."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content |= changes
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def edit_weights(folder, change):
    """Replace a folder's weights by change({name: weight})."""
    weights = change(load_file(folder / "model.safetensors"))
    weights = {name: weight.clone() for name, weight in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def open_pair(folder, **options):
    """Return (reader, tokenizer, the line that the scripts print) of a folder."""
    lines = []
    reader, tokenizer = open_with_tokenizer(folder, lines.append, **options)
    return reader.eval(), tokenizer, lines[0]


def answers(reader, tokenizer, records, beams=1, max_length=100):
    """Return the answers of a reader to records."""
    found = predict(reader, records, tokenizer, WORLD, num_contexts=3, max_length=max_length,
                    batch_size=16, num_beams=beams, answer_maxlength=12)
    return [prediction.text for prediction in found]


@pytest.fixture(scope="module")
def toy():
    """Return (records, the answers of toy/t5-tiny to them)."""
    records = make_records(24)
    reader, tokenizer, line = open_pair(TOKENIZER)
    assert line == (f"reader {TOKENIZER}: t5, its own tokenizer; answers end with </s> 1, begin "
                    "with <pad> 0, padding <pad> 0")
    texts = answers(reader, tokenizer, records)
    assert len(set(texts)) > 5
    return records, texts


@pytest.fixture
def copy(tmp_path):
    """Return a copy of toy/t5-tiny."""
    return shutil.copytree(TOKENIZER, tmp_path / "copy")


def permute(folder):
    """Give a folder's tokenizer sentencepiece's own order (<unk> 0, </s> 2, <pad> 3), and reorder
    the rows of its weights. config.json keeps T5's ids: </s> 1, <pad> 0, start 0.
    """
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    rows = [2, 3, 1, 0, *range(4, len(vocabulary))]  # the old ids in their new order
    content["model"] |= {"vocab": [vocabulary[old] for old in rows], "unk_id": 0}
    new_ids = {vocabulary[old][0]: new for new, old in enumerate(rows)}
    for token in content["added_tokens"]:
        token["id"] = new_ids[token["content"]]
    content["added_tokens"].sort(key=lambda token: token["id"])
    processor = content["post_processor"]["special_tokens"]["</s>"]
    processor["ids"] = [2]
    path.write_text(json.dumps(content))
    rows[0] = 0  # the decoder begins with the id 0, as it was trained to
    edit_weights(folder, lambda weights: {
        name: weight[torch.tensor(rows)] if name in ("shared.weight", "lm_head.weight") else weight
        for name, weight in weights.items()})


# ---------------------------------------------------------------- ids

@pytest.mark.parametrize("beams", [1, 2])
def test_own_special_ids_agree(beams, copy, toy, tmp_path):  # A1
    """Check that answers end with the tokenizer's </s>, whatever ids config.json and
    generation_config.json set, and that one set of ids is saved, with which transformers gives the
    same answers.
    """
    records, texts = toy
    permute(copy)
    reader, tokenizer, line = open_pair(copy)
    assert "answers end with </s> 2 (config.json: 1)" in line
    assert "padding <pad> 3 (config.json: 0)" in line
    if beams == 1:
        assert answers(reader, tokenizer, records) == texts
    collator = Collator(tokenizer, 3, 100)
    assert collator.target_ids("the")[-1] == 2 and reader.end_tokens == [2]
    batch = collator([(i, record, "the") for i, record in enumerate(records[:4])])

    reader.save_pretrained(tmp_path / "out")
    tokenizer.save_pretrained(tmp_path / "out")
    other = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    assert other.generation_config.eos_token_id == other.config.eos_token_id == 2
    assert other.config.pad_token_id == 3 and other.config.decoder_start_token_id == 0
    padded = pad_packed(batch["inputs"]["passages"])
    want_loss, want_logits = plain_fid(other, *padded, batch["labels"])
    loss, logits = reader(**batch["inputs"], labels=batch["labels"])
    torch.testing.assert_close(loss, want_loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
    want = generate(other, *padded, num_beams=beams)
    got = reader.generate(**batch["inputs"], max_length=12, num_beams=beams)
    assert torch.equal(got, want) and 2 in got
    again, _, line = open_pair(tmp_path / "out")
    assert "config.json" not in line and torch.equal(
        again.generate(**batch["inputs"], max_length=12, num_beams=beams), want)


def generate(t5, ids, mask, **options):
    """Return transformers' ids for passages (B, N, L), padded."""
    B, N, L = ids.shape
    with torch.no_grad():
        states = t5.encoder(input_ids=ids.view(B * N, L), attention_mask=mask.view(B * N, L))
        states = states.last_hidden_state.view(B, N * L, -1)
        return t5.generate(encoder_outputs=BaseModelOutput(states),
                           attention_mask=mask.view(B, N * L).long(), max_length=12,
                           do_sample=False, **options)


SETTINGS = {
    "several ends": {"eos_token_id": [1, 40]},
    "another end": {"eos_token_id": 40},
    "forced": {"forced_bos_token_id": 7, "forced_eos_token_id": 1},
    "no repeats": {"no_repeat_ngram_size": 1, "length_penalty": 2.0},
    "at least": {"min_length": 6, "suppress_tokens": [9, 10]},
    "sampling": {"do_sample": True, "num_beams": 4, "num_return_sequences": 2, "max_length": 3,
                 "temperature": 0.1, "return_dict_in_generate": True},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_generation_settings_are_transformers(name, tiny, tmp_path):
    """Check that settings of greedy and beam search are followed; sampling and lengths are flags.
    """
    folder = shutil.copytree(tiny, tmp_path / "t5")
    (folder / "generation_config.json").unlink()
    edit_json(folder / "generation_config.json", decoder_start_token_id=0, eos_token_id=1,
              pad_token_id=0)
    edit_json(folder / "generation_config.json", **SETTINGS[name])
    t5 = T5ForConditionalGeneration.from_pretrained(folder).eval()
    t5.generation_config.update(num_return_sequences=1, return_dict_in_generate=False)
    reader = FiDT5.from_pretrained(folder).eval()
    ids, mask, _ = random_batch()
    for beams in (1, 3):
        want = generate(t5, ids, mask, num_beams=beams)
        assert torch.equal(reader.generate(pack_padded(ids, mask), 12, beams), want)
    settings = reader.forget_generation()
    assert not reader.is_steered and all(SETTINGS[name][key] == settings[key] for key in settings)
    line = open_pair(folder)[2]
    assert ("not followed: num_beams 4, do_sample" in line) == (name == "sampling")
    assert ("no_repeat_ngram_size 1" in line) == (name == "no repeats")


def test_ends_that_no_one_can_know_are_refused(tiny, tmp_path):  # A1
    folder = shutil.copytree(tiny, tmp_path / "t5")
    edit_json(folder / "config.json", decoder_start_token_id=5)
    with pytest.raises(InputError, match="decoder_start_token_id is 5 in config.json and"):
        FiDT5.from_pretrained(folder)
    edit_json(folder / "config.json", decoder_start_token_id=0, eos_token_id=[1, 600])
    edit_json(folder / "generation_config.json", eos_token_id=None)
    with pytest.raises(InputError, match="eos_token_id 600, which is no id"):
        FiDT5.from_pretrained(folder)
    edit_json(folder / "config.json", eos_token_id=40)
    text = (folder / "tokenizer.json").read_text().replace('"</s>"', '"<end>"')
    (folder / "tokenizer.json").write_text(text)
    edit_json(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(InputError, match="has no end-of-sequence token, and eos_token_id 40"):
        open_pair(folder)


def test_a_missing_start_is_the_padding_of_config_json(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "t5")
    for file in ("config.json", "generation_config.json"):
        edit_json(folder / file, decoder_start_token_id=None)
    assert open_pair(folder)[0].start_token == 0
    edit_json(folder / "config.json", pad_token_id=None)
    permute(folder)
    assert open_pair(folder)[0].start_token == 3


# ---------------------------------------------------------------- tokenizers

def test_inputs_are_cut_on_the_right(copy, toy, tmp_path):  # A2
    records, _ = toy
    texts = answers(*open_pair(copy)[:2], records, max_length=25)
    edit_json(copy / "tokenizer_config.json", truncation_side="left", padding_side="left",
              model_max_length=4)
    content = json.loads((copy / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Left", "max_length": 6, "stride": 0,
                             "strategy": "LongestFirst"}
    content["padding"] = {"strategy": {"Fixed": 9}, "direction": "Left", "pad_id": 0,
                          "pad_type_id": 0, "pad_token": "<pad>", "pad_to_multiple_of": None}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    reader, tokenizer, line = open_pair(copy)
    assert line.endswith("not followed: truncation_side left")
    assert answers(reader, tokenizer, records, max_length=25) == texts
    as_it_is = AutoTokenizer.from_pretrained(copy)
    assert as_it_is.truncation_side == "left"
    assert encode_inputs(as_it_is, records, 3, 25) == encode_inputs(tokenizer, records, 3, 25)
    tokenizer.save_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").truncation_side == "right"


def test_answers_are_decoded_as_they_were_generated(copy, tmp_path):  # A3
    edit_json(copy / "tokenizer_config.json", clean_up_tokenization_spaces=True)
    _, tokenizer, line = open_pair(copy)
    assert line.endswith("not followed: clean_up_tokenization_spaces")
    ids = tokenizer("Bob 's boat .").input_ids
    assert tokenizer.batch_decode([ids], skip_special_tokens=True) == ["Bob 's boat ."]
    assert decode_answers(AutoTokenizer.from_pretrained(copy), [ids]) == ["Bob 's boat ."]
    tokenizer.save_pretrained(tmp_path / "out")
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.decode(ids, skip_special_tokens=True) == "Bob 's boat ."


def minfid_file(folder, name):
    """Write toy/t5-tiny as minFiD saves it, trained from the model `name`. Return the file."""
    weights = load_file(TOKENIZER / "model.safetensors")
    weights = {f"t5.{key}": value for key, value in weights.items()}
    torch.save({"sd": weights, "args": argparse.Namespace(t5_name=name)}, folder / "model")
    return folder / "model"


def test_the_tokenizer_is_the_checkpoints_or_named(toy, tmp_path, copy):  # A4, B8
    records, texts = toy
    (tmp_path / "else").mkdir()
    path = minfid_file(tmp_path / "else", str(copy))
    reader, tokenizer, line = open_pair(path)
    assert f"the tokenizer of {copy} (the checkpoint's t5_name)" in line
    assert answers(reader, tokenizer, records) == texts

    bare = shutil.copytree(copy, tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (bare / file).unlink()
    with pytest.raises(InputError, match="bare: has no tokenizer; name .*--tokenizer NAME"):
        open_pair(bare)
    with pytest.raises(InputError, match="no/such \\(--t5_name\\) cannot be opened"):
        open_pair(bare, fallback="no/such")
    with pytest.raises(InputError, match="has no tokenizer; .*bare \\(--tokenizer\\) has none"):
        open_pair(copy, chosen=str(bare))
    assert f"the tokenizer of {copy} (--t5_name)" in open_pair(bare, fallback=str(copy))[2]
    assert f"the tokenizer of {copy} (--tokenizer)" in open_pair(TOKENIZER, chosen=str(copy))[2]
    edit_json(bare / "args.json", args={"t5_name": str(copy)})
    assert "(the checkpoint's t5_name)" in open_pair(bare)[2]


def test_t5_base_is_assumed_for_its_vocabulary_alone(tmp_path, monkeypatch, copy):  # A4, B8
    """Check that a released FiD reader, which has no tokenizer, gets t5-base's, and that a line
    reports it.
    """
    edit_json(copy / "config.json", vocab_size=32128)
    edit_weights(copy, lambda weights: weights | {"shared.weight": torch.randn(32128, 128)})
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copy / file).unlink()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="t5-base .*cannot be opened"):
        open_pair(copy)
    shutil.copytree(TOKENIZER, "t5-base")
    line = open_pair(copy)[2]
    assert "the tokenizer of t5-base (the vocabulary of T5 is assumed)" in line
    assert line.endswith("the tokenizer has 564 tokens, the model embeds 32,128")
    edit_json(copy / "config.json", vocab_size=384)
    with pytest.raises(InputError, match="has no tokenizer; name the model"):
        open_reader_tokenizer(copy)


def test_tokenizer_json_alone(copy, toy):  # C
    records, texts = toy
    (copy / "tokenizer_config.json").unlink()
    reader, tokenizer, _ = open_pair(copy)
    assert len(tokenizer) == 564 and answers(reader, tokenizer, records) == texts


def test_tokenizer_json_is_taken_as_it_is(copy):
    """Check that tokenizer.json is used unchanged; transformers' T5Tokenizer would map unknown
    letters to the id 2, here </s>.
    """
    permute(copy)
    tokenizer = open_pair(copy)[1]
    assert 0 in tokenizer("♞", add_special_tokens=False).input_ids
    assert 2 not in tokenizer("♞", add_special_tokens=False).input_ids


@pytest.mark.parametrize("name", ["t5", "own", "bytes", "mt5"])
def test_spiece_model_alone(name, tmp_path):  # B7
    """Check that ids and texts are sentencepiece's, and ids of special tokens and sentinels T5's.
    """
    shutil.copy(GOLDEN / f"spiece.{name}.model", tmp_path / "spiece.model")
    tokenizer = open_t5_tokenizer(tmp_path, 600)
    want = SPIECE[name]
    rows = tokenizer(SPIECE["texts"], add_special_tokens=False).input_ids
    assert rows == want["ids"]
    texts = [tokenizer.decode([i for i in row if i != want["unk"]], skip_special_tokens=True)
             for row in rows]
    assert [text.strip() for text in texts] == [text.strip() for text in want["decoded"]]
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (want["eos"], want["pad"])
    assert tokenizer.unk_token_id == want["unk"]
    assert tokenizer("").input_ids == [want["eos"]]
    if name == "mt5":  # its vocabulary has the sentinels
        assert len(tokenizer) == want["size"]
    else:
        assert len(tokenizer) == want["size"] + 100
        assert tokenizer("<extra_id_0>").input_ids == [want["size"] + 99, want["eos"]]
        assert len(open_t5_tokenizer(tmp_path, want["size"])) == want["size"]
    tokenizer.save_pretrained(tmp_path / "out")
    again = open_t5_tokenizer(tmp_path / "out", 600)
    assert again(SPIECE["texts"]).input_ids == tokenizer(SPIECE["texts"]).input_ids


def test_added_tokens_of_a_sentencepiece_folder(tmp_path):  # B7, as fastchat-t5 has them
    shutil.copy(GOLDEN / "spiece.t5.model", tmp_path / "spiece.model")
    size = SPIECE["t5"]["size"]
    edit_json(tmp_path / "added_tokens.json", **{"♞": size + 100, "\n": size + 101})
    edit_json(tmp_path / "special_tokens_map.json", eos_token={"content": "</s>"})
    edit_json(tmp_path / "tokenizer_config.json", extra_ids=100, tokenizer_class="T5Tokenizer",
              additional_special_tokens=[f"<extra_id_{i}>" for i in range(100)] + ["<sep>"])
    tokenizer = open_t5_tokenizer(tmp_path, 600)
    assert tokenizer("a ♞", add_special_tokens=False).input_ids[-1] == size + 100
    assert tokenizer("<sep>", add_special_tokens=False).input_ids == [size + 102]
    edit_json(tmp_path / "added_tokens.json", **{"♞": size + 200})
    with pytest.raises(InputError, match="the added token '.*' would get the id"):
        open_t5_tokenizer(tmp_path, 600)


def test_broken_sentencepiece_files_are_refused(tmp_path):
    data = (GOLDEN / "spiece.t5.model").read_bytes()
    for broken in (b"", data[:700], b"version https://git-lfs", data[::-1]):
        with pytest.raises(InputError, match="not a sentencepiece model"):
            parse_sentencepiece(broken, "spiece.model")


def test_byt5_without_files(tmp_path):
    """Check ByT5, whose tokenizer needs no files and is named in config.json."""
    make_t5(tmp_path, vocab_size=384)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    edit_json(tmp_path / "config.json", tokenizer_class="ByT5Tokenizer")
    reader, tokenizer, _ = open_pair(tmp_path)
    assert isinstance(tokenizer, ByT5Tokenizer) and tokenizer("ab").input_ids == [100, 101, 1]
    assert reader.end_tokens == [1] and reader.config.pad_token_id == 0


def toy_folder(folder, **settings):
    """Copy toy/t5-tiny with other settings of its tokenizer. Return transformers' tokenizer."""
    shutil.copytree(TOKENIZER, folder)
    edit_json(folder / "tokenizer_config.json", **settings)
    return AutoTokenizer.from_pretrained(TOKENIZER)


def json_alone(folder):
    oracle = toy_folder(folder)
    (folder / "tokenizer_config.json").unlink()
    return oracle


def spiece_alone(folder):
    """Write a T5 with only spiece.model. Return transformers' tokenizer of its pieces."""
    make_t5(folder, vocab_size=240)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    shutil.copy(GOLDEN / "spiece.t5.model", folder / "spiece.model")
    pieces = open_t5_tokenizer(folder, 240)
    return T5Tokenizer(vocab=[tuple(piece) for piece in json.loads(
        pieces.backend_tokenizer.to_str())["model"]["vocab"]])


def byt5(folder):
    make_t5(folder, vocab_size=384)
    (folder / "tokenizer.json").unlink()
    ByT5Tokenizer().save_pretrained(folder)
    return ByT5Tokenizer()


def own_vocabulary(folder):
    """Write a T5 with other special tokens. Return transformers' tokenizer."""
    shutil.copytree(TOKENIZER, folder)
    content = (folder / "tokenizer.json").read_text()
    for old, new in (("</s>", "[END]"), ("<pad>", "[PAD]"), ("<unk>", "[UNK]")):
        content = content.replace(f'"{old}"', f'"{new}"')
    (folder / "tokenizer.json").write_text(content)
    edit_json(folder / "tokenizer_config.json", eos_token="[END]", pad_token="[PAD]",
              unk_token="[UNK]", tokenizer_class="PreTrainedTokenizerFast")
    return AutoTokenizer.from_pretrained(folder)


MATRIX = {
    "as it is": toy_folder,
    "left": lambda folder: toy_folder(folder, truncation_side="left", padding_side="left"),
    "clean-up": lambda folder: toy_folder(folder, clean_up_tokenization_spaces=True),
    "short": lambda folder: toy_folder(folder, model_max_length=3),
    "slow": lambda folder: toy_folder(folder, use_fast=False, legacy=True, sp_model_kwargs={}),
    "json alone": json_alone,
    "spiece alone": spiece_alone,
    "own vocabulary": own_vocabulary,
    "ByT5": byt5,
}


@pytest.mark.parametrize("name", MATRIX)
def test_tokenizers_read_as_transformers_does(name, toy, tmp_path):
    """Check the ids of inputs and targets, the loss, the logits, and greedy and beam search."""
    records, _ = toy
    oracle = MATRIX[name](tmp_path / "t5")
    reader, tokenizer, _ = open_pair(tmp_path / "t5")
    targets = [record["answers"][0] for record in records[:3]]
    batch = Collator(tokenizer, 2, 30)([(i, records[i], targets[i]) for i in range(3)])
    text = "question: {} title: {} context: {}".format(
        records[0]["question"], records[0]["ctxs"][0]["title"], records[0]["ctxs"][0]["text"])
    want = oracle(text, add_special_tokens=False).input_ids[:30]
    assert pad_packed(batch["inputs"]["passages"])[0][0, 0].tolist() == want
    assert batch["labels"][0][:len(oracle(targets[0]).input_ids)].tolist() == oracle(
        targets[0]).input_ids

    t5 = T5ForConditionalGeneration.from_pretrained(tmp_path / "t5").eval()
    padded = pad_packed(batch["inputs"]["passages"])
    want_loss, want_logits = plain_fid(t5, *padded, batch["labels"])
    loss, logits = reader(**batch["inputs"], labels=batch["labels"])
    torch.testing.assert_close(loss, want_loss, atol=1e-5, rtol=0)
    torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
    for beams in (1, 2):
        want = generate(t5, *padded, num_beams=beams)
        got = reader.generate(**batch["inputs"], max_length=12, num_beams=beams)
        assert torch.equal(got, want)
        texts = tokenizer.batch_decode(got, skip_special_tokens=True)
        assert texts == oracle.batch_decode(want, skip_special_tokens=True,
                                            clean_up_tokenization_spaces=False)


def test_generation_settings_that_cannot_be_are_one_line(copy):
    edit_json(copy / "generation_config.json", repetition_penalty=-1)
    reader, tokenizer, _ = open_pair(copy)
    with pytest.raises(InputError, match="among repetition_penalty, that cannot be followed"):
        answers(reader, tokenizer, make_records(1))
    edit_json(copy / "generation_config.json", repetition_penalty=None, eos_token_id="x")
    with pytest.raises(InputError, match="the ids of generation_config.json cannot be used"):
        open_pair(copy)


# ---------------------------------------------------------------- weights

@pytest.mark.parametrize("name", ["flax_model.msgpack", "tf_model.h5", "pytorch_model.pt",
                                  "adapter_model.safetensors", "model.ckpt.index", "t5.gguf",
                                  "consolidated.00.pth", "model.fp16.safetensors",
                                  "pytorch_model-00001-of-00001.bin", "rust_model.ot",
                                  "MODEL.SAFETENSORS", "__0_0.distcp",
                                  "checkpoint-500/model.safetensors"])
def test_weights_under_other_names_are_named(name, copy):  # A12
    (copy / name).parent.mkdir(exist_ok=True)
    (copy / "model.safetensors").rename(copy / name)
    (copy / "training_args.bin").write_text("")  # of a trainer, no weights
    with pytest.raises(InputError, match="model.safetensors: holds weights alone; give its folder"):
        open_reader(TOKENIZER / "model.safetensors")
    for trained in (True, False):
        with pytest.raises(InputError, match=f"{name}: looks like weights"):
            open_reader(copy, trained=trained)
    (copy / name).unlink()
    with pytest.raises(InputError, match="has no model.safetensors or pytorch_model.bin"):
        open_reader(copy, trained=True)


def test_nothing_untrained_answers_or_scores(copy):  # A12
    (copy / "model.safetensors").rename(copy / "flax_model.msgpack")
    args = argparse.Namespace(
        model=str(copy), model_name_or_path=str(copy), tokenizer=None, t5_name=None, bf16=False,
        context_max_length=60, key_max_length=20, chat_template=None)
    config = read_config(copy)
    for name in ("flax_model.msgpack: looks like weights", "has no model.safetensors"):
        for open_model in (lambda: ask.load_reader(args, WORLD),
                           lambda: lm_score.open_scorer(args, str(copy), True, {}, config, WORLD)):
            with pytest.raises(InputError, match=name):
                open_model()
        (copy / "flax_model.msgpack").unlink(missing_ok=True)


def test_a_tokenizer_without_an_unknown_token_is_refused(copy):
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["unk_id"] = None
    (copy / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="no usable tokenizer"):
        open_pair(copy)


def test_training_from_a_configuration_is_said(copy, capsys):  # A12
    (copy / "model.safetensors").unlink()
    open_reader(copy)
    assert f"WARNING: {copy} holds no weights" in capsys.readouterr().out
    save_file({}, copy / "model.safetensors")
    with pytest.raises(InputError, match="model.safetensors: holds no weights"):
        open_reader(copy)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "reader."])
def test_the_bias_of_fids_own_files_is_kept_under_a_wrapper(prefix):  # A14
    assert has_cross_bias([f"{prefix}encoder.encoder.block.0.module.layer.0.SelfAttention.q.weight",
                           prefix + CROSS_BIAS], {})
    assert not has_cross_bias([f"{prefix}encoder.block.0.layer.0.SelfAttention.q.weight",
                               prefix + CROSS_BIAS], {})


def test_quantised_weights_are_named(copy):
    edit_json(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(InputError, match="its weights are quantised \\('gptq'\\)"):
        open_reader(copy)


@pytest.mark.parametrize("prefix", ["module.", "model.", "module.model.", "_orig_mod."])
def test_prefixes_of_wrappers_are_left_out(prefix, copy, toy, capsys):  # C
    records, texts = toy
    edit_weights(copy, lambda weights: {prefix + name: w for name, w in weights.items()})
    reader, tokenizer, _ = open_pair(copy)
    assert f"the prefix {prefix!r} of its weights' names is left out" in capsys.readouterr().out
    assert answers(reader, tokenizer, records[:4]) == texts[:4]


OWN = {
    "decoder": ["decoder.embed_tokens.weight"],
    "encoder": ["encoder.embed_tokens.weight"],
    "both": ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"],
    "head": ["lm_head.weight"],
    "all": ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"],
    "head alone": ["lm_head.weight", "-shared.weight"],
    "no shared": ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "-shared.weight"],
}


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("name", OWN)
def test_own_embeddings_are_kept(name, tie, tiny, tmp_path):  # A13
    """Check embeddings that are not tied, when opened, trained, saved and opened again."""
    folder = shutil.copytree(tiny, tmp_path / "t5")
    generator = torch.Generator().manual_seed(2)

    def change(weights):
        own = {key: torch.randn(weights["shared.weight"].shape, generator=generator)
               for key in OWN[name] if key[0] != "-"}
        kept = {key: w for key, w in weights.items() if f"-{key}" not in OWN[name]}
        return {key: w for key, w in kept.items() if "embed_tokens" not in key} | own
    edit_weights(folder, change)
    edit_json(folder / "config.json", tie_word_embeddings=tie)
    ids, mask, labels = random_batch()
    t5 = T5ForConditionalGeneration.from_pretrained(folder).eval()
    want_loss, want_logits = plain_fid(t5, ids, mask, labels)
    reader = FiDT5.from_pretrained(folder).eval()
    reader.save_pretrained(tmp_path / "out")
    again = T5ForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    packed = pack_padded(ids, mask)
    for got_loss, got_logits in (reader(packed, labels), plain_fid(again, ids, mask, labels),
                                 FiDT5.from_pretrained(tmp_path / "out").eval()(packed, labels)):
        torch.testing.assert_close(got_logits, want_logits, atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(got_loss, want_loss, atol=1e-4, rtol=1e-5)
    assert torch.equal(reader.generate(packed, 12), generate(t5, ids, mask))
    count = sum(parameter.numel() for parameter in t5.parameters())
    assert sum(parameter.numel() for parameter in reader.parameters()) == count


def test_the_leftover_of_t5s_first_release_is_left_out(tiny, tmp_path, capsys):  # A14
    """Check that a plain T5 with FiD's cross-attention bias is read as transformers reads it, and
    that a reader trained with the bias keeps it.
    """
    folder = shutil.copytree(tiny, tmp_path / "t5")
    edit_weights(folder, lambda weights: weights | {CROSS_BIAS: 9 * torch.randn(32, 4)})
    ids, mask, labels = random_batch()
    want = plain_fid(T5ForConditionalGeneration.from_pretrained(tiny).eval(), ids, mask, labels)[1]
    reader = FiDT5.from_pretrained(folder).eval()
    assert "relative_attention_bias.weight is left out" in capsys.readouterr().out
    torch.testing.assert_close(reader(pack_padded(ids, mask), labels)[1], want, atol=1e-4, rtol=0)
    reader.set_lengths(12, 5)
    reader.save_pretrained(tmp_path / "out")
    assert "passage_stride" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert CROSS_BIAS not in load_file(tmp_path / "out" / "model.safetensors")

    edit_json(folder / "config.json", passage_stride=12)  # as readers were saved before
    reader = FiDT5.from_pretrained(folder).eval()
    logits = reader(pack_padded(ids, mask), labels)[1]
    assert reader.cross_bias is not None and (logits - want).abs().max() > 1e-2
    reader.save_pretrained(tmp_path / "fid")
    again = FiDT5.from_pretrained(tmp_path / "fid").eval()
    assert torch.equal(again(pack_padded(ids, mask), labels)[1], logits)
    assert json.loads((tmp_path / "fid" / "config.json").read_text())["fid_cross_attention_bias"]
    edit_weights(tmp_path / "fid", lambda weights: {
        name: weight for name, weight in weights.items() if name != CROSS_BIAS})
    with pytest.raises(InputError, match="relative_attention_bias.weight is missing in the file"):
        FiDT5.from_pretrained(tmp_path / "fid")


def test_an_adapters_folder_is_named(tiny, tmp_path):  # C
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path="no/such")
    save_file({"base_model.model.shared.weight": torch.zeros(1)},
              tmp_path / "adapter_model.safetensors")
    with pytest.raises(InputError, match="holds adapters of 'no/such' .*; set base_model"):
        open_reader(tmp_path)
    edit_json(tmp_path / "adapter_config.json", base_model_name_or_path=tiny)
    with pytest.raises(InputError, match="holds an adapter of .*, not a model; merge the two"):
        open_reader(tmp_path)
