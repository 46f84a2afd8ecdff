"""The causal reader over packed prompts: losses, gradients, answers and scores are those of padded
prompts, without padding, and shared beginnings are computed once.
"""
import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from causal_helpers import CONFIGS, SIZES, make_causal
from layers import causal
from layers.causal import PackedPrompts, why_not_packed
from reader.causal import CausalReader, list_prompts, pad_prompts
from training.adapters import LoraSettings

VOCABULARY = 64
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
FAMILIES = CONFIGS | {
    "gemma": lambda **changes: transformers.Gemma3TextConfig(
        **SIZES | {"head_dim": 8, "sliding_window": 64} | changes),
    "mixtral": lambda **changes: transformers.MixtralConfig(**SIZES | EXPERTS | changes),
    "neox": lambda **changes: transformers.GPTNeoXConfig(**SIZES | changes),
    "opt": lambda **changes: transformers.OPTConfig(
        hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=256, **changes)}
START, QUESTION = [5, 6, 7, 8], [9, 10, 11]  # of all prompts, and of those of the first question
# [question][prompt]: equal prompts, a prompt that is the beginning of another, prompts of one token
PROMPTS = [[START + QUESTION + [12, 13, 14, 15, 16, 17], START + QUESTION + [12, 13],
            START + QUESTION + [20, 21, 22]],
           [START + [30]], [START + [40, 41, 42]] * 2, [START, START + [50] * 30]]
ANSWERS = [[20, 21, 2], [33, 2], [2], [44, 45, 46, 47, 2]]


def make_reader(family, **changes):
    """Return a small reader without dropout whose weights are large enough that texts differ."""
    torch.manual_seed(0)
    config = FAMILIES[family](vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2,
                              pad_token_id=0, **changes)
    lm = AutoModelForCausalLM.from_config(config).eval()
    for weight in lm.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    lm.tie_weights()
    reader = CausalReader(lm)
    reader.why_padded = why_not_packed(lm, longest=0)
    return reader


def make_inputs(prompts=PROMPTS):
    """Return the inputs of a batch with unequal weights."""
    input_ids, attention_mask = pad_prompts(prompts, 2)
    torch.manual_seed(1)
    scores = torch.randn(attention_mask.shape[:2])
    scores = scores.masked_fill(~attention_mask.any(2), -torch.inf)
    return {"input_ids": input_ids, "attention_mask": attention_mask,
            "log_weights": scores.log_softmax(1)}


def make_labels():
    rows = [torch.tensor(answer) for answer in ANSWERS]
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)


def run_both(reader, function):
    """Return what function() gives with packed and with padded prompts."""
    assert reader.why_padded is None
    packed = function()
    reader.why_padded = "a test"
    padded = function()
    reader.why_padded = None
    return packed, padded


def watch_tokens(reader, seen):
    """Append the shape of the token ids of each forward pass to `seen`."""
    reader.lm.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))


def train_step(reader):
    """Return (loss, logits, {name: gradient})."""
    reader.zero_grad()
    loss, logits = reader(**make_inputs(), labels=make_labels())
    loss.backward()
    return loss, logits, {name: p.grad.clone() for name, p in reader.named_parameters()
                          if p.requires_grad}


# ---------------------------------------------------------------- equal to padded prompts

@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients(family):
    reader = make_reader(family)
    (loss, logits, gradients), (other, others, expected) = run_both(
        reader, lambda: train_step(reader))
    torch.testing.assert_close(loss, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits, others, atol=1e-4, rtol=1e-4)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("group_tokens", [1024, 40, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_and_scores(family, group_tokens, monkeypatch):
    monkeypatch.setitem(causal.GROUP_TOKENS, "cpu", group_tokens)
    reader = make_reader(family)
    first = reader.generate(**make_inputs(), max_length=9).tolist()
    reader.config.eos_token_id = [2, first[0][2], first[3][5]]  # so that some answers end earlier
    outputs = run_both(reader, lambda: reader.generate(
        **make_inputs(), max_length=9, return_scores=True, n_best=1))
    (ids, scores, log_p), (other_ids, other_scores, other_log_p) = outputs
    assert torch.equal(ids, other_ids)
    torch.testing.assert_close(scores, other_scores, atol=1e-4, rtol=0)
    torch.testing.assert_close(log_p, other_log_p, atol=1e-4, rtol=0)
    # with one step more or fewer the same tokens come first
    assert torch.equal(reader.generate(**make_inputs(), max_length=1), ids[:, 0, :1])


def test_adapters_and_checkpointing():
    pytest.importorskip("peft")
    reader = make_reader("qwen2")
    plain = reader.generate(**make_inputs(), max_length=9)
    reader.add_adapters(LoraSettings(4, None, None, None, False, False), torch.device("cpu"))
    for name, weight in reader.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.1)
    (loss, _, gradients), (other, _, expected) = run_both(reader, lambda: train_step(reader))
    reader.set_checkpoint(True)
    checkpointed, _, again = train_step(reader.train())
    reader.eval()
    assert loss.item() == pytest.approx(other.item(), abs=1e-5) == checkpointed.item()
    assert gradients and all("lora_" in name for name in gradients)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(gradient, again[name], atol=1e-6, rtol=1e-6)
    ids, other_ids = run_both(reader, lambda: reader.generate(**make_inputs(), max_length=9))
    assert torch.equal(ids, other_ids) and not torch.equal(ids, plain)


def test_bf16_comes_near():
    reader = make_reader("llama")
    expected = train_step(reader)[0]
    with torch.autocast("cpu", torch.bfloat16):
        (loss, *_), (other, *_) = run_both(reader, lambda: train_step(reader))
        ids, others = run_both(reader, lambda: reader.generate(**make_inputs(), max_length=1))
    assert loss.item() == pytest.approx(expected.item(), rel=0.05)
    assert loss.item() == pytest.approx(other.item(), rel=0.05)
    assert (ids == others).float().mean() >= 0.5


# ---------------------------------------------------------------- what is saved

def test_shared_beginnings_are_computed_once():
    reader, shapes = make_reader("llama"), []
    watch_tokens(reader, shapes)
    train_step(reader)
    # answers follow without their last tokens; the third question's prompts are equal
    tails = (6 + 2) + (2 + 2) + (3 + 2), 1 + 1, 3, 4 + (30 + 4)
    assert shapes == [(1, len(START) + len(QUESTION) + sum(tails))]


def test_prompts_are_run_once_and_ended_questions_leave():
    reader, shapes = make_reader("llama"), []
    end = reader.generate(**make_inputs(), max_length=1)[1, 0].item()
    reader.config.eos_token_id = end
    watch_tokens(reader, shapes)
    answers = reader.generate(**make_inputs(), max_length=6).tolist()
    running = [sum(len(prompts) for prompts, answer in zip(PROMPTS, answers)
                   if not {end, 2} & set(answer[:step])) for step in range(1, 6)]
    assert shapes[1:] == [(1, count) for count in running] and 0 < running[0] < 8
    tails = 6 + 2 + 3, 1, 3, 30
    assert shapes[0] == (1, len(START) + len(QUESTION) + sum(tails))


@torch.no_grad()
def test_a_step_moves_no_keys():
    reader = make_reader("llama")
    prompts = PackedPrompts(reader.lm, [PROMPTS], 3, "cpu")
    prompts.start()
    places = [keys.data_ptr() for layer in prompts.layers.values() for pair in layer
              for keys in pair]
    for _ in range(3):
        prompts.step(torch.full((8,), 7))
    assert places == [keys.data_ptr() for layer in prompts.layers.values() for pair in layer
                      for keys in pair]
    assert len(places) == 2 * 2 * len(prompts.groups)


# ---------------------------------------------------------------- padded prompts

def test_texts_beyond_the_window_are_padded(capsys):
    reader, shapes = make_reader("gemma", sliding_window=16), []
    watch_tokens(reader, shapes)
    inputs = make_inputs([PROMPTS[0], PROMPTS[1]])   # 13 tokens at most
    reader.generate(**inputs, max_length=3)
    assert shapes[0][0] == 1 and not capsys.readouterr().out
    ids = reader.generate(**inputs, max_length=4).tolist()
    assert shapes[3] == (4, 13)
    reader(**inputs, labels=torch.full((2, 4), 7))
    assert capsys.readouterr().out == (
        "note: the gemma3_text model has attention to 16 tokens only: its prompts are padded, "
        "which takes longer\n")
    plain = AutoModelForCausalLM.from_config(reader.config, attn_implementation="eager").eval()
    plain.load_state_dict(reader.lm.state_dict())
    with torch.no_grad():
        text = PROMPTS[1][0] + ids[1]
        for place in range(len(PROMPTS[1][0]), len(text)):
            assert plain(torch.tensor([text[:place]])).logits[0, -1].argmax() == text[place]


def test_readers_are_packed_if_their_model_can_be(tmp_path, capsys):
    reader = CausalReader.from_pretrained(make_causal(tmp_path / "llama"))
    assert reader.why_padded is None and reader.packs(256)
    # transformers' own calls of the model, with padding or without, work as before
    ids, mask = pad_prompts([[[5, 6, 7, 8], [9, 10]]], 2)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "llama").eval()
    for options in ({}, {"attention_mask": mask[0].long()}):
        torch.testing.assert_close(reader.lm(ids[0], **options).logits,
                                   plain(ids[0], **options).logits)
    reader.save_pretrained(tmp_path / "again")
    assert "packed" not in (tmp_path / "again" / "config.json").read_text()
    assert "padded" not in capsys.readouterr().out


def test_prompts_are_listed_as_they_were():
    assert list_prompts(*pad_prompts(PROMPTS, 2)) == PROMPTS
