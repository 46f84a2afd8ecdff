"""The packed encoder against transformers' padded model, its dropout, and other architectures."""
import pytest
import torch
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

from conftest import make_bert
from dense import text_encoder
from dense.model import BiEncoder
from dense.text_encoder import TextEncoder
from golden_retrievers import CONFIG
from layers import grad_cache, packed_attention
from layers.packing import pack_texts


@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("way", ["packed", "sdpa", "transformers"])
def test_packed_encoder_equals_padded_model(pooling, way, monkeypatch):
    torch.manual_seed(0)
    model = BertModel(BertConfig(**CONFIG)).eval()
    encoder = TextEncoder(model, pooling).train()
    if way == "sdpa":  # the form that runs on a GPU
        def fused(q, k, v, bias, p, scale):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias,
                                                                    dropout_p=p, scale=scale)
        monkeypatch.setattr(packed_attention, "plain_attention", fused)
    if way == "transformers":
        monkeypatch.setattr(text_encoder, "is_packable", lambda model: False)
    monkeypatch.setitem(grad_cache.CHUNK_ROWS, "cpu", 40)
    texts = [torch.randint(3, 120, (n,)).tolist() for n in (5, 17, 1, 30, 8, 8, 2)]
    vectors = encoder(texts)
    vectors.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    expected = []
    for text in texts:  # one at a time, without padding
        states = model(input_ids=torch.tensor([text])).last_hidden_state[0]
        expected.append({"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling])
    expected = torch.stack(expected)
    torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    expected.square().sum().backward()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, model.get_parameter(name).grad, atol=1e-4, rtol=1e-4)


def test_dropout_of_packed_encoder_has_the_right_mean_and_spread():
    torch.manual_seed(0)
    model = BertModel(BertConfig(**CONFIG | {"hidden_dropout_prob": 0.2,
                                             "attention_probs_dropout_prob": 0.2}))
    encoder = TextEncoder(model, "mean").train()
    text = torch.randint(3, 120, (12,)).tolist()
    with torch.no_grad():
        ours = encoder([text] * 4000)
        theirs = model.train()(input_ids=torch.tensor([text] * 4000)).last_hidden_state.mean(1)
    assert (ours.mean(0) - theirs.mean(0)).abs().max() < 6 * (theirs.std(0) / 4000 ** 0.5).max()
    assert (ours.std(0) / theirs.std(0) - 1).abs().max() < 0.1


def test_bfloat16_vectors_are_close_and_float32(tmp_path):
    encoder = BiEncoder.open(make_bert(tmp_path / "bert")).eval().query_encoder
    texts = [torch.randint(6, 30, (n,)).tolist() for n in (5, 9, 3)]
    with torch.no_grad():
        plain = encoder(texts)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = encoder(texts)
    assert rounded.dtype == torch.float32
    assert torch.cosine_similarity(plain, rounded).min() > 0.999


def test_token_types_behind_the_first_separator(tmp_path):
    encoder = BiEncoder.open(make_bert(tmp_path / "bert")).query_encoder
    encoder.separator = 3
    texts = [[2, 9, 3], [2, 7, 3, 8, 3]]  # the longer one comes first
    assert encoder.token_types(pack_texts(texts, 0, align=1)).tolist() == [0, 0, 0, 1, 1, 0, 0, 0]
    types = encoder.token_types(pack_texts(texts, 0, align=4))
    assert types[[0, 1, 2, 3, 4, 8, 9, 10]].tolist() == [0, 0, 0, 1, 1, 0, 0, 0]


def test_other_architectures_run_in_transformers(tmp_path):
    torch.manual_seed(0)
    model = RobertaModel(RobertaConfig(vocab_size=120, hidden_size=32, num_hidden_layers=2,
                                       num_attention_heads=4, intermediate_size=64,
                                       max_position_embeddings=64, pad_token_id=1)).eval()
    model.save_pretrained(tmp_path)
    ours = BiEncoder.open(tmp_path, pooling="mean", metric="ip").eval()
    texts = [[0, 5, 6, 7, 2], [0, 9, 2]]
    with torch.no_grad():
        expected = torch.stack([model(input_ids=torch.tensor([text])).last_hidden_state[0].mean(0)
                                for text in texts])
        torch.testing.assert_close(ours.encode(texts, "key"), expected, atol=1e-5, rtol=1e-5)
