"""LoRA adapters on weights in 4 bits: what is saved is what was trained; killed runs go on."""
import copy
import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, T5EncoderModel

import train_dense
import train_epoch
from causal_helpers import make_causal
from conftest import killed_script, make_bert, make_records, make_t5, run
from dense.flags import parse_retriever_flags
from reader import open as readers
from reader.causal_lm import open_causal_lm
from test_train_epoch import assert_same_run
from training.adapters import (
    LoraSettings,
    add_lora,
    copy_to_cpu,
    is_packed,
    pack_weights,
    save_adapters,
    unload_adapters,
)
from training.checkpoints import load_tokenizer
from training.cost import count_numbers
from utils import InputError

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
CPU = torch.device("cpu")
RANK_4 = LoraSettings(4, None, None, None, False, False)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return make_causal(tmp_path_factory.mktemp("llama"))


def test_the_merged_model_is_the_packed_one(llama):
    plain = AutoModelForCausalLM.from_pretrained(llama).eval()
    model = copy.deepcopy(plain)
    pack_weights(model, CPU, bf16=False)
    assert is_packed(model) and not is_packed(plain)
    size = [sum(parameter.nbytes for parameter in part.model.layers.parameters())
            for part in (plain, model)]
    assert size[1] < size[0] / 6  # 4 bits, the scales and the norms in place of 32
    assert sum(map(count_numbers, model.parameters())) == sum(
        parameter.numel() for parameter in plain.parameters())
    model = add_lora(model, 4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    ids = torch.arange(3, 33)[None]
    packed = model(ids).logits
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    merged = unload_adapters(copy_to_cpu(model))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert type(merged) is type(plain) and not is_packed(merged)
    torch.testing.assert_close(merged(ids).logits, packed, atol=1e-4, rtol=1e-4)
    # NF4 rounds: close to the model, but not it
    difference = (merged(ids).logits - plain(ids).logits).abs().max()
    assert 0.01 < difference < 5


def test_t5_whose_input_takes_the_type_of_its_weights(tmp_path):
    model = T5EncoderModel.from_pretrained(make_t5(tmp_path / "t5")).eval()
    plain = copy.deepcopy(model)
    pack_weights(model, CPU, bf16=False)
    ids = torch.arange(3, 33)[None]
    model = add_lora(model, 4)
    packed = model(ids).last_hidden_state
    merged = unload_adapters(model)(ids).last_hidden_state
    torch.testing.assert_close(merged, packed, atol=1e-4, rtol=1e-4)
    assert 0.001 < (plain(ids).last_hidden_state - packed).abs().max() < 1


def test_a_killed_reader_goes_on_bit_for_bit(llama, tmp_path):
    data = tmp_path / "r.json"
    data.write_text(json.dumps(make_records(6)))
    flags = [data, data, "--num_contexts", 2, "--max_length", 80, "--t5_name", llama, "--lora", 4,
             "--load_in_4bit", "--lr", "1e-2", "--warmup_ratio", 0.1, "--epochs", 2, "--save_every",
             1, "--batch_size", 2]
    run("train_epoch.py", tmp_path / "whole", *flags)
    run(killed_script(tmp_path, 3), tmp_path / "m", *flags, code=-9)
    out, _ = run("train_epoch.py", tmp_path / "m", *flags, "--resume")
    assert "resuming after 2 updates" in out
    assert_same_run(tmp_path / "whole", tmp_path / "m")
    kept = torch.load(tmp_path / "m.state", weights_only=True)["model"]
    assert kept and all("lora_" in name for name in kept)  # the rest stays in the checkpoint
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "m")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    config = json.load(open(tmp_path / "m" / "config.json"))
    assert "quantization_config" not in config
    out, _ = run("test.py", tmp_path / "m", data)
    assert "6 questions" in out


def test_a_retriever_learns(tmp_path):
    bert = make_bert(tmp_path / "bert")
    data = tmp_path / "r.jsonl"
    records = [{"query": f"which {a} {b}", "pos": [f"the {a} of {b}"], "neg": ["a river"]}
               for a in ("town", "baker", "river") for b in ("born", "hobby", "stood")]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    run("train_dense.py", "--output_dir", tmp_path / "m", "--train_data", data, "--query_encoder",
        bert, "--lora", 4, "--load_in_4bit", "--max_steps", 20, "--lr", "1e-2", "--batch_size", 9,
        "--group_size", 2, "--logging_steps", 1, "--query_max_length", 12, "--key_max_length", 12,
        "--cos_temperature", 0.05, "--pooling_method", "cls")
    losses = [json.loads(line)["loss"] for line in open(tmp_path / "m.jsonl")]
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert all(weight.is_floating_point() for weight in weights.values())


def make_args(tmp_path, llama, *flags):
    data = tmp_path / "r.json"
    data.write_text(json.dumps(make_records(4)))
    return train_epoch.parse_args([str(value) for value in (
        tmp_path / "m", data, data, "--num_contexts", 2, "--max_length", 80, "--t5_name", llama,
        "--lora", 4, "--lr", "3e-2", "--warmup_ratio", 0.1, "--epochs", 1, "--batch_size", 2,
        *flags)])


def test_adapters_alone_open_again(llama, tmp_path):  # E16
    """Check that adapters saved alone give the trained model's logits, in our reader and in peft.
    """
    from peft import PeftModel
    args = make_args(tmp_path, llama, "--save_adapters", "--lora_alpha", 12, "--lora_targets",
                     "q_proj", "v_proj", "--lora_dropout", 0.1)
    train_epoch.main(args)
    names = {path.name for path in (tmp_path / "m").iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 12, 0.1)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    base = AutoModelForCausalLM.from_pretrained(llama).eval()
    ids = torch.arange(3, 33)[None]
    before = base(ids).logits
    expected = PeftModel.from_pretrained(base, tmp_path / "m").eval()(ids).logits
    reader = readers.open_reader(tmp_path / "m").eval()
    torch.testing.assert_close(reader.lm(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected - before).abs().max() > 0.1
    assert reader.prompts.answer_lines == "all"
    # without the tokenizer's files the model's own is taken
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "m" / name).unlink()
    assert len(load_tokenizer(tmp_path / "m", "no-such/model")) == 400
    model, _ = open_causal_lm(tmp_path / "m", "cpu")
    for name, weight in reader.lm.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name


def test_training_from_adapters(llama, tmp_path):  # E13, E16
    """Check that all weights are trained, as from the merged model, and that adapters of adapters
    are refused.
    """
    train_epoch.main(make_args(tmp_path, llama, "--save_adapters"))
    adapters, out = str(tmp_path / "m"), tmp_path / "second"
    reader = readers.open_reader(adapters, trains=True)
    assert all(weight.requires_grad for weight in reader.parameters())
    with pytest.raises(InputError, match="--save_adapters: .* holds adapters itself"):
        reader.add_adapters(RANK_4, CPU, base=adapters)
    save_adapters(add_lora(AutoModelForCausalLM.from_pretrained(llama), 2), out, adapters)
    with pytest.raises(InputError, match="must be a whole model"):
        readers.open_reader(out)


def test_frozen_weights_in_bfloat16(llama, tmp_path):  # E16
    reader = readers.open_reader(llama, trains=True)
    args = make_args(tmp_path, llama, "--frozen_bf16")
    reader.add_adapters(RANK_4._replace(frozen_bf16=True), CPU)
    trained = {weight.dtype for weight in reader.parameters() if weight.requires_grad}
    frozen = {weight.dtype for weight in reader.parameters() if not weight.requires_grad}
    assert trained == {torch.float32} and frozen == {torch.bfloat16}
    train_epoch.main(args)
    weights = load_file(tmp_path / "m" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    before = load_file(f"{llama}/model.safetensors")
    name = "model.embed_tokens.weight"
    assert torch.equal(weights[name], before[name].bfloat16().float())


def test_frozen_weights_of_a_retriever_in_bfloat16(tmp_path):  # E16
    bert = make_bert(tmp_path / "bert")
    data = tmp_path / "r.jsonl"
    data.write_text(json.dumps({"query": "which town", "pos": ["the town"], "neg": ["a river"]}))
    train_dense.main(parse_retriever_flags("", [str(value) for value in (
        "--output_dir", tmp_path / "m", "--train_data", data, "--query_encoder", bert, "--lora", 2,
        "--lora_alpha", 1, "--lora_targets", "query", "--frozen_bf16", "--max_steps", 2,
        "--num_warmup_steps", 0, "--lr", "1e-2", "--group_size", 2, "--query_max_length", 12,
        "--key_max_length", 12)]))
    weights = load_file(tmp_path / "m" / "model.safetensors")
    before = load_file(f"{bert}/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    name = "encoder.layer.0.attention.self.{}.weight"
    changed = {part: not torch.equal(weights[name.format(part)],
                                     before[name.format(part)].bfloat16().float())
               for part in ("query", "key")}
    assert changed == {"query": True, "key": False}


def test_adapters_that_do_not_fit_are_one_line(llama, tmp_path):  # E13
    def refuse(message, **changes):
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings | changes))
        with pytest.raises(InputError, match=message):
            readers.open_reader(tmp_path)

    model = add_lora(AutoModelForCausalLM.from_pretrained(llama), 2)
    save_adapters(model, tmp_path, llama)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == llama
    refuse("holds adapters of 'no-such/model'", base_model_name_or_path="no-such/model")
    refuse("does not name the model", base_model_name_or_path=None)
    refuse("lora_A.default.weight is missing|is missing in the file", target_modules=["lm_head"])
    refuse("its adapters cannot be read", peft_type="NEW")
    with pytest.raises(InputError, match="peft cannot add the adapters .*--lora_targets"):
        add_lora(AutoModelForCausalLM.from_pretrained(llama), 2, targets=["no_such_layer"])


@pytest.mark.parametrize("flags, message", [
    (["--lora_alpha", "0"], "--lora_alpha must be > 0, got 0.0"),
    (["--lora_dropout", "1"], "--lora_dropout must be >= 0 and < 1, got 1.0"),
    (["--frozen_bf16", "--load_in_4bit"], "are two ways to store the frozen weights")])
def test_flags_of_adapters_that_cannot_be(flags, message, llama, tmp_path):  # E16
    with pytest.raises(InputError, match=message):
        train_epoch.check_args(make_args(tmp_path, llama, *flags))


def test_what_cannot_be_is_one_line(llama, tmp_path, monkeypatch):
    data = tmp_path / "r.json"
    data.write_text(json.dumps(make_records(2)))
    flags = [tmp_path / "m", data, data, "--load_in_4bit", "--max_length", 80]
    for more, message in ((["--t5_name", llama],
                           "--load_in_4bit is for adapters on frozen weights; add --lora R"),
                          (["--t5_name", make_causal(tmp_path / "gpt2", "gpt2"), "--lora", 2],
                           "a gpt2 model of transformers has no linear layers")):
        _, error = run("train_epoch.py", *flags, *more, code=1)
        assert message in error and error.startswith("error: ") and "Traceback" not in error
    model = AutoModelForCausalLM.from_pretrained(llama)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match="needs the package bitsandbytes: pip install"):
        pack_weights(model, CPU, bf16=False)
