"""layers/causal.py: packed texts give the likelihoods and gradients of single forward passes."""
import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPTNeoXConfig,
    MistralConfig,
    OPTConfig,
)

from causal_helpers import CONFIGS, SIZES, make_causal
from layers import causal as causal_lm
from layers.causal import (
    Text,
    list_leaves,
    log_likelihoods,
    pack_families,
    packed_logits,
    score_answers,
    to_ids,
    why_not_packed,
)
from reader.causal_lm import open_causal_lm, open_lm
from utils import InputError

VOCABULARY = 50
PACKED = CONFIGS | {
    "neox": lambda **changes: GPTNeoXConfig(**SIZES, **changes),
    "opt": lambda **changes: OPTConfig(hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                                       num_attention_heads=4, word_embed_proj_dim=32,
                                       max_position_embeddings=256, **changes)}
PADDED = {
    "ALiBi": lambda **changes: BloomConfig(hidden_size=32, n_layer=2, n_head=4, **changes),
    "caps": lambda **changes: Gemma2Config(**SIZES | {"head_dim": 8}, **changes),
    "window": lambda **changes: MistralConfig(**SIZES | {"sliding_window": 8}, **changes),
    "long positions": lambda **changes: CONFIGS["llama"](
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0,
                         "original_max_position_embeddings": 16, "short_factor": [1.0] * 4,
                         "long_factor": [3.0] * 4}, **changes)}


def make_model(config):
    """Return a small model in evaluation mode whose weights are large enough that texts differ."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(vocab_size=VOCABULARY, bos_token_id=0,
                                                    eos_token_id=0, pad_token_id=0)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def draw(rng, least, most):
    return [rng.randrange(VOCABULARY) for _ in range(rng.randint(least, most))]


def make_families(with_answers=True):
    """Return questions with keys of many lengths, some of them equal, and one or two answers."""
    rng = random.Random(0)
    families = []
    for question in range(4):
        head = draw(rng, question, 6)
        keys = [head + draw(rng, 1, 25) for _ in range(5)]
        keys[3] = keys[0]
        answers = [draw(rng, 1, 4) for _ in range(1 + question % 2)]
        texts = [[Text(key, answer) for answer in answers] for key in keys]
        families.append(texts if with_answers else [answers[0] for answers in texts])
    return families


def plain_score(model, text):
    """Return the log-likelihood of a Text from a forward pass of its own."""
    ids = torch.tensor([text.prompt + text.answer])
    log_p = model(input_ids=ids).logits[0].float().log_softmax(-1)
    places = range(len(text.prompt) - 1, ids.shape[1] - 1)
    return sum(log_p[place, token] for place, token in zip(places, text.answer))


@torch.no_grad()
def plain_scores(model, families):
    texts = [text for family in families for text in list_leaves(family)]
    return torch.tensor([plain_score(model, text) for text in texts])


@pytest.mark.parametrize("family", PACKED)
@pytest.mark.parametrize("pass_tokens", [2048, 40])
def test_packed_scores_equal_single_passes(family, pass_tokens, monkeypatch):
    monkeypatch.setitem(causal_lm.PASS_TOKENS, "cpu", pass_tokens)
    model = make_model(PACKED[family])
    expected = plain_scores(model, make_families())
    assert why_not_packed(model) is None
    scores = torch.tensor(score_answers(model, make_families()))
    assert expected.std() > 1
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", PADDED)
def test_other_models_are_padded_and_give_the_same(family, monkeypatch):
    monkeypatch.setitem(causal_lm.PASS_TOKENS, "cpu", 100)
    model = make_model(PADDED[family])
    expected = plain_scores(model, make_families())
    assert why_not_packed(model, 40)
    scores = torch.tensor(score_answers(model, make_families(), is_packed=False))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_a_window_wider_than_the_texts_changes_nothing():
    model = make_model(lambda **changes: MistralConfig(**SIZES | {"sliding_window": 64}, **changes))
    expected = plain_scores(model, make_families())
    assert "64 tokens" in why_not_packed(model, 65)
    assert why_not_packed(model, 64) is None
    scores = torch.tensor(score_answers(model, make_families()))
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)


def test_gradients_equal_those_of_single_passes():
    model = make_model(PACKED["llama"])
    families = make_families(with_answers=False)
    texts = [text for family in families for text in family]
    torch.stack([plain_score(model, text) for text in texts]).sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}

    model.zero_grad()
    assert why_not_packed(model) is None
    packed = pack_families([to_ids(family) for family in families], model.device)
    rows, targets = [], []
    for text, text_rows in zip(texts, packed.rows):
        rows += text_rows[len(text.prompt) - 1:].tolist()
        targets += text.answer
    log_likelihoods(packed_logits(model, packed, rows), targets).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)


def test_beginnings_are_computed_once():
    packed = pack_families([[[1, 2, 3, 4], [1, 2, 5]], [[1, 2], [1, 2]], [[7]]], "cpu")
    assert packed.input_ids.shape == (1, 5 + 2 + 1)
    texts = [packed.input_ids[0, rows].tolist() for rows in packed.rows]
    assert texts == [[1, 2, 3, 4], [1, 2, 5], [1, 2], [1, 2], [7]]
    positions = [packed.position_ids[0, rows].tolist() for rows in packed.rows]
    assert positions == [[0, 1, 2, 3], [0, 1, 2], [0, 1], [0, 1], [0]]


def test_three_levels_share_beginnings():
    answers = [[1, 2, 3, 8], [1, 2, 3, 9]]  # of one key
    packed = pack_families([[answers, [[1, 4, 8], [1, 4, 9]]]], "cpu")
    assert packed.input_ids.shape == (1, 1 + 2 + 2 + 1 + 2)


def test_bf16_comes_near(tmp_path):
    path = make_causal(tmp_path, "llama")
    single, _ = open_causal_lm(path, "cpu")
    half, reason = open_causal_lm(path, "cpu", torch.bfloat16)
    assert half.dtype == torch.bfloat16 and reason is None
    scores = torch.tensor(score_answers(half, make_families()))
    torch.testing.assert_close(scores, torch.tensor(score_answers(single, make_families())),
                               atol=0.5, rtol=0.1)


def test_weights_that_are_missing_are_refused(tmp_path):
    path = make_causal(tmp_path, "llama")
    model, _ = open_causal_lm(path, "cpu")
    weights = model.state_dict()
    del weights["model.norm.weight"]
    model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match=r"model.norm.weight is missing"):
        open_causal_lm(path, "cpu")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="has no model.safetensors"):
        open_causal_lm(path, "cpu")


def test_another_kind_of_model_is_refused(tiny):
    with pytest.raises(InputError, match="is a t5 model, not a causal language model"):
        open_causal_lm(tiny, "cpu")


@pytest.mark.parametrize("family", PACKED)
def test_what_transformers_saves_opens(family, tmp_path):
    model = make_model(PACKED[family])
    model.save_pretrained(tmp_path)
    opened = open_lm(tmp_path)
    assert opened.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], weight), name
