"""Families of causal language models: each is read as transformers reads it, or refused when it is
opened.
"""
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from causal_helpers import SIZES, make_causal, make_tokenizer, script_logits
from layers.causal import Text, score_answers
from reader import open as readers
from reader.causal import CausalReader
from reader.causal_lm import open_causal_lm, open_lm
from utils import InputError

IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
          "v_head_dim": 12, "num_key_value_heads": 4, "head_dim": 8}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
           "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1,
           "first_k_dense_replace": 1}
VISION = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
          "num_attention_heads": 2}
PROMPTS = [[7, 9, 11, 13, 15, 17, 19, 21, 23], [31, 33, 35]]


def config(name, **changes):
    return getattr(transformers, f"{name}Config")(**SIZES | IDS | changes)


CONFIGS = {
    "Mamba": lambda: config("Mamba", state_size=8),
    "Mamba2": lambda: config("Mamba2", state_size=8, num_heads=8, head_dim=8, n_groups=1),
    "RWKV": lambda: transformers.RwkvConfig(**IDS, hidden_size=32, num_hidden_layers=2),
    "RecurrentGemma": lambda: config("RecurrentGemma", lru_width=32, attention_window_size=64),
    "GPT-1": lambda: transformers.OpenAIGPTConfig(**IDS, n_embd=32, n_layer=2, n_head=4),
    "CPM-Ant": lambda: transformers.CpmAntConfig(**IDS, hidden_size=32, num_hidden_layers=2,
                                                 num_attention_heads=4, dim_head=8, dim_ff=48),
    "LFM2": lambda: config("Lfm2", layer_types=["conv", "full_attention"], block_ff_dim=48),
    "Qwen3-Next": lambda: config(
        "Qwen3Next", head_dim=8, layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, shared_expert_intermediate_size=16, **EXPERTS),
    "Falcon-H1": lambda: config("FalconH1", head_dim=8, mamba_d_ssm=64, mamba_n_heads=8,
                                mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8),
    "Bamba": lambda: config("Bamba", attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8,
                            mamba_n_groups=1, mamba_d_state=8),
    "MiniCPM3": lambda: config("MiniCPM3", **LATENT),
    "DeepSeek V3": lambda: config("DeepseekV3", **LATENT | EXPERTS),
    "Mixtral": lambda: config("Mixtral", **EXPERTS),
    "Qwen3-MoE": lambda: config("Qwen3Moe", head_dim=8, **EXPERTS),
}
STATES = ["Mamba", "Mamba2", "RWKV", "RecurrentGemma"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a function that makes the folder of a tiny model of a family, once."""
    made = {}

    def make(name):
        if name not in made:
            made[name] = str(tmp_path_factory.mktemp("family"))
            save_tiny(AutoModelForCausalLM.from_config(CONFIGS[name]()), made[name])
        return made[name]
    return make


def save_tiny(model, folder):
    """Write a model whose weights are large enough that texts differ."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=0.2)
    model.tie_weights()
    model.eval().save_pretrained(folder)


def plain_answers(lm, steps):
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(steps):
            with torch.no_grad():
                ids.append(int(lm(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        answers.append(ids[len(prompt):])
    return answers


def check_answers(reader):
    """Check that a reader's answers, one of which ends first, are those of single passes."""
    reader.eval()
    expected = plain_answers(reader.lm, 5)
    reader.config.eos_token_id = reader.lm.generation_config.eos_token_id = expected[0][1]
    assert expected[0][1] not in expected[1][:2]
    L = max(map(len, PROMPTS))
    ids, mask = torch.zeros(2, 1, L, dtype=torch.long), torch.zeros(2, 1, L, dtype=torch.bool)
    for row, prompt in enumerate(PROMPTS):
        ids[row, 0, L - len(prompt):] = torch.tensor(prompt)
        mask[row, 0, L - len(prompt):] = True
    answers = reader.generate(ids, mask, torch.zeros(2, 1), max_length=5).tolist()
    assert answers[0][:2] == expected[0][:2]
    end = expected[1].index(expected[0][1]) if expected[0][1] in expected[1] else 5
    assert answers[1][:end] == expected[1][:end]


@pytest.mark.parametrize("name", ["LFM2", "Qwen3-Next", "Falcon-H1", "Bamba"])
def test_hybrids_answer_when_one_question_ends_first(folders, name):  # E5
    check_answers(CausalReader.from_pretrained(folders(name)))


@pytest.mark.parametrize("name", [*STATES, "GPT-1", "CPM-Ant"])
def test_what_cannot_be_a_reader_is_refused_when_it_is_opened(folders, name):  # E6
    with pytest.raises(InputError, match="model of transformers cannot be a reader here") as error:
        readers.open_reader(folders(name))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*STATES, "GPT-1", "LFM2", "MiniCPM3", "DeepSeek V3", "Mixtral"])
def test_scores_are_those_of_single_passes(folders, name):  # E6, E12
    lm, reason = open_causal_lm(folders(name), "cpu")
    texts = [Text([7, 9, 11, 13], [15, 17]), Text([7, 9, 11, 13], [5]), Text([7, 9], [33, 12, 14]),
             Text([21], [22])]
    scores = score_answers(lm, [texts[:2], texts[2:]], reason is None)
    plain = AutoModelForCausalLM.from_pretrained(folders(name)).eval()
    for text, score in zip(texts, scores):
        with torch.no_grad():
            log_p = plain(torch.tensor([text.prompt + text.answer]),
                          use_cache=False).logits[0].log_softmax(-1)
        expected = sum(log_p[len(text.prompt) - 1 + i, token] for i, token
                       in enumerate(text.answer))
        assert score == pytest.approx(expected.item(), abs=1e-4)


def test_other_scores_when_padded_are_refused(folders):  # E6
    with pytest.raises(InputError, match="cpmant model .* cannot score here .padding changes"):
        open_causal_lm(folders("CPM-Ant"), "cpu")


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3-MoE", "DeepSeek V3"])
def test_mixtures_of_experts_open(folders, name, tmp_path):  # E12
    plain = AutoModelForCausalLM.from_pretrained(folders(name)).eval()
    reader = CausalReader.from_pretrained(folders(name)).eval()
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(reader.lm(ids).logits, plain(ids).logits)
    check_answers(reader)
    reader.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(ids).logits, plain(ids).logits)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(
        f"{folders(name)}/model.safetensors").keys()


@pytest.mark.parametrize("name", ["Mixtral", "LFM2"])
def test_weights_that_are_missing_or_unused_are_named(folders, name, tmp_path, capsys):
    weights = load_file(f"{folders(name)}/model.safetensors")
    settings = json.load(open(f"{folders(name)}/config.json"))
    (tmp_path / "config.json").write_text(json.dumps(settings))

    def refuse(message, **changes):
        given = {key: value for key, value in (weights | changes).items() if value is not None}
        save_file(given, tmp_path / "model.safetensors")
        with pytest.raises(InputError, match=message):
            open_lm(tmp_path)

    norm = next(key for key in sorted(weights) if "norm" in key)
    refuse(f"{norm} is missing in the file", **{norm: None})
    refuse("other.weight is unknown to the configuration", **{"model.other.weight": torch.ones(3)})
    refuse(rf"{norm} is \(3,\) in the file, \(32,\) by", **{norm: torch.ones(3)})
    # a wrapper's prefix is left out, and the weights are those of the file
    save_file({f"module.{key}": value for key, value in weights.items()},
              tmp_path / "model.safetensors")
    capsys.readouterr()
    opened = open_lm(tmp_path).state_dict()
    assert "the prefix 'module.' of its weights' names is left out" in capsys.readouterr().out
    for key, value in open_lm(folders(name)).state_dict().items():
        assert torch.equal(opened[key], value), key


def gemma3():
    return transformers.Gemma3Config(
        text_config=config("Gemma3Text", head_dim=8).to_dict(),
        vision_config=VISION | {"image_size": 28, "patch_size": 14}, mm_tokens_per_image=4)


def qwen35():
    text = config("Qwen3_5Text", head_dim=8, layer_types=["linear_attention", "full_attention"],
                  linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
                  linear_value_head_dim=8)
    return transformers.Qwen3_5Config(text_config=text.to_dict(), vision_config={
        "depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32,
        "out_hidden_size": 32})


@pytest.mark.parametrize("make", [gemma3, qwen35])
def test_models_with_a_vision_part_open_by_their_text(make, tmp_path):  # E13
    save_tiny(AutoModelForImageTextToText.from_config(make()), tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    reader = CausalReader.from_pretrained(tmp_path)
    ids = torch.arange(3, 20)[None]
    torch.testing.assert_close(reader.eval().lm(ids).logits, plain(ids).logits)
    assert reader.longest == 256
    check_answers(reader)
    trained = {name for name, weight in reader.named_parameters() if weight.requires_grad}
    assert trained and not any("vision" in name or "visual" in name for name in trained)


def test_other_forms_of_weights_have_the_true_reason(folders, tmp_path):  # E13
    path = make_causal(tmp_path / "lm")
    settings = json.load(open(f"{path}/config.json"))
    quantised = settings | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    (tmp_path / "lm" / "config.json").write_text(json.dumps(quantised))
    with pytest.raises(InputError, match="its weights are quantised .'gptq'.*--load_in_4bit"):
        readers.open_reader(path)
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf" / "tiny.gguf").write_bytes(b"GGUF")
    for source in (tmp_path / "gguf", tmp_path / "gguf" / "tiny.gguf"):
        with pytest.raises(InputError, match="GGUF form .tiny.gguf., which is not read"):
            readers.open_reader(str(source))


def test_end_tokens_of_generation_config_end_answers(tmp_path):  # E4
    tokenizer = make_tokenizer(pad_token="<pad>")
    path = make_causal(tmp_path / "lm", tokenizer=tokenizer)
    (tmp_path / "lm" / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": [1, 2, 77], "do_sample": True, "temperature": 0.6}))
    reader = readers.open_reader(path)
    reader.check_tokenizer(tokenizer)
    assert sorted(reader.end_tokens) == [1, 2, 77] and reader.end_tokens[-1] == 1
    reader.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    assert sorted(again.generation_config.eos_token_id) == [1, 2, 77]
    assert again.generation_config.temperature == 0.6
    # an end token that is no special one is no part of the answer
    rows = torch.zeros(2, 1, reader.config.vocab_size)
    rows[:, 0, 77] = 9.0
    script_logits(reader, lambda ids: rows)
    batch = torch.full((2, 1, 3), 5), torch.ones(2, 1, 3).bool(), torch.zeros(2, 1)
    assert reader.generate(*batch, max_length=4).tolist() == [[1], [1]]
    (tmp_path / "lm" / "generation_config.json").write_text('{"eos_token_id": [1, 9999]}')
    with pytest.raises(InputError, match="eos_token_id must be ids below .*, got .1, 9999."):
        readers.open_reader(path)
