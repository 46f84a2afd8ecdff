"""Bi-encoders and rankers: the originals' outputs, losses, gradients and training curves; scores;
length limits.
"""
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import RobertaConfig, get_linear_schedule_with_warmup

from conftest import make_bert
from dense import losses
from dense.model import BiEncoder, CrossEncoder, limit_lengths
from golden_retrievers import (
    CONFIG,
    GOLDEN,
    dpr_file,
    mindpr_file,
    mindpr_passages,
    mindpr_queries,
    token_ids,
    weights_of,
)


@pytest.mark.parametrize("layout", [mindpr_file, dpr_file])
def test_mindpr_vectors_loss_and_gradients(tmp_path, layout):
    model = BiEncoder.open(layout(tmp_path / "x")).train()
    model.key_encoder.separator = 2  # minDPR's passages are pairs with token types
    queries, keys = model(mindpr_queries(), mindpr_passages())
    np.testing.assert_allclose(queries.detach(), GOLDEN["mindpr/query_embeddings"], atol=2e-5)
    np.testing.assert_allclose(keys.detach(), GOLDEN["mindpr/passage_embeddings"], atol=2e-5)
    scores = model.score(queries, keys)
    np.testing.assert_allclose(scores.detach(), GOLDEN["mindpr/scores"], atol=1e-4)
    loss = losses.contrastive(scores, torch.from_numpy(GOLDEN["mindpr/labels"]))
    assert loss.item() == pytest.approx(GOLDEN["mindpr/loss"].item(), abs=1e-5)
    is_correct = scores.argmax(1) == torch.from_numpy(GOLDEN["mindpr/labels"])
    assert is_correct.sum() == GOLDEN["mindpr/num_correct"]
    loss.backward()
    encoders = {"query_encoder.encoder.": model.query_encoder.model,
                "passage_encoder.encoder.": model.key_encoder.model}
    for key, value in GOLDEN.items():
        if key.startswith("mindpr/grad/"):
            prefix = next(prefix for prefix in encoders if key[12:].startswith(prefix))
            parameter = encoders[prefix].get_parameter(key[12 + len(prefix):])
            np.testing.assert_allclose(parameter.grad, value, atol=2e-5)


def test_mindpr_training_curve(tmp_path):
    model = BiEncoder.open(mindpr_file(tmp_path / "x"), dropout=0.0)
    model.key_encoder.separator = 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-8, weight_decay=0)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 10)
    queries, passages = mindpr_queries(), mindpr_passages()
    curve, norms, rates = [], [], []
    for _ in range(8):
        loss = losses.contrastive(model.score(*model(queries, passages)),
                                  torch.from_numpy(GOLDEN["mindpr/labels"]))
        loss.backward()
        curve.append(loss.item())
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 2.0).item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    np.testing.assert_allclose(rates, GOLDEN["mindpr/train_lr"], rtol=1e-6)
    np.testing.assert_allclose(curve, GOLDEN["mindpr/train_loss_before"], atol=2e-4)
    np.testing.assert_allclose(norms, GOLDEN["mindpr/train_grad_norm_before_clip"], rtol=1e-3)


@pytest.mark.parametrize("name, flags", [
    ("", {}),
    ("masked/", {"apply_question_mask": True, "apply_passage_mask": True}),
    ("cls/", {"apply_question_mask": True, "apply_passage_mask": True, "extract_cls": True}),
    ("cls_nomask/", {"extract_cls": True}),
])
def test_fid_retriever(tmp_path, name, flags):
    torch.save(weights_of("fid_weight/"), tmp_path / "pytorch_model.bin")
    config = CONFIG | {"indexing_dimension": 32, "projection": True, "extract_cls": False,
                       "apply_question_mask": False, "apply_passage_mask": False,
                       "question_maxlength": 12, "passage_maxlength": 20} | flags
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = BiEncoder.open(tmp_path)
    questions = token_ids(GOLDEN["fid/question_ids"], GOLDEN["fid/question_mask"])
    keys = token_ids(GOLDEN["fid/passage_ids"].reshape(12, 20),
                     GOLDEN["fid/passage_mask"].reshape(12, 20))
    q, k = model(questions, keys)
    np.testing.assert_allclose(q.detach(), GOLDEN[f"fid/{name}question_output"], atol=1e-5)
    np.testing.assert_allclose(k.detach(), GOLDEN[f"fid/{name}passage_output"], atol=1e-5)
    scores = model.score(q, k).gather(1, torch.arange(12).view(3, 4))
    np.testing.assert_allclose(scores.detach(), GOLDEN[f"fid/{name}score"], atol=1e-5)
    model.save_pretrained(tmp_path / "again", 20)
    with torch.no_grad():
        torch.testing.assert_close(BiEncoder.open(tmp_path / "again")(keys, keys)[1], k, atol=1e-5,
                                   rtol=1e-5)
    loss = losses.fid_kd(scores, torch.from_numpy(GOLDEN["fid/gold_score"]))
    assert loss.item() == pytest.approx(GOLDEN[f"fid/{name}loss"].item(), abs=1e-6)
    loss.backward()
    encoder = model.query_encoder
    value = "encoder.layer.0.attention.self.value.weight"
    for key, parameter in (("proj.weight", encoder.head[0].weight),
                           ("norm.weight", encoder.head[1].weight),
                           (f"model.{value}", encoder.model.get_parameter(value))):
        np.testing.assert_allclose(parameter.grad, GOLDEN[f"fid/{name}grad/{key}"], atol=1e-6)


@pytest.mark.parametrize("metric", ["ip", "cos", "l2"])
def test_scores_of_every_metric(metric, tmp_path):
    model = BiEncoder.open(make_bert(tmp_path / "bert"), metric=metric, temperature=0.5).eval()
    texts = [torch.randint(6, 30, (n,)).tolist() for n in (5, 9, 3, 7, 7, 2)]
    with torch.no_grad():
        queries, keys = model.encode(texts[:2], "query"), model.encode(texts, "key")
        expected = {"ip": queries @ keys.t(),
                    "cos": F.cosine_similarity(queries[:, None], keys[None], dim=-1),
                    "l2": -torch.cdist(queries, keys).square()}[metric] / 0.5
        torch.testing.assert_close(model.score(queries, keys), expected, atol=1e-3, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(model.score(queries, keys),
                               model.score(queries.float(), keys.float()))
            assert model.score(queries, keys).dtype == torch.float32


def test_lengths_are_limited_to_the_positions(tmp_path):
    bert = make_bert(tmp_path / "bert")  # of 64 positions
    lines = []
    lengths = limit_lengths({"query": 100, "key": 64}, BiEncoder.open(bert), lines.append)
    assert lengths == {"query": 64, "key": 64}
    assert lines == ["note: the model has 64 positions; --query_max_length is 64, not 100"]
    ranker = CrossEncoder.open(bert)
    lengths = limit_lengths({"query": 20, "key": 64}, ranker, lines.append)
    assert lengths == {"query": 20, "key": 44}  # a pair shares the positions
    ranker.model.config = RobertaConfig(max_position_embeddings=64, pad_token_id=1)
    assert limit_lengths({"query": 64, "key": 10}, ranker, lines.append)["query"] == 62
