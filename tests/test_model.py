"""FiDT5 against the originals' outputs, against a plain padded T5, and through every checkpoint
format.
"""
import argparse
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ByT5Tokenizer,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    UMT5Config,
    UMT5ForConditionalGeneration,
    get_linear_schedule_with_warmup,
)
from transformers.modeling_outputs import BaseModelOutput

from conftest import ROOT, TOKENIZER, make_t5
from data import pack_padded
from layers import packing
from model import CROSS_BIAS, FiDT5, plain_fid, plain_key
from training.checkpoints import load_tokenizer, read_training_args
from utils import InputError

CONFIG = {"model_type": "t5", "architectures": ["FiDT5"], "d_ff": 128, "d_kv": 16, "d_model": 64,
          "num_heads": 4, "num_layers": 3, "vocab_size": 384, "decoder_start_token_id": 0,
          "dropout_rate": 0.0, "eos_token_id": 1, "pad_token_id": 0}


@pytest.fixture(scope="module")
def golden():
    """Return outputs of facebookresearch/FiD (torch 1.6, transformers 3.0.2) and minFiD (1.10,
    4.17) on one random tiny model.
    """
    return dict(np.load(ROOT / "tests" / "golden" / "readers.npz"))


def released_folder(golden, folder):
    """Write a folder in the format of FiD's released readers: wrapped keys, tied aliases, .bin, a
    cross-attention bias, no tokenizer.
    """
    folder.mkdir()
    weights = {key[7:]: torch.from_numpy(value) for key, value in golden.items()
               if key.startswith("weight/")}
    shared = weights["shared.weight"]
    weights |= dict.fromkeys(("encoder.encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
                              "lm_head.weight"), shared)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


def minfid_file(golden, folder):
    """Write minFiD's file {'sd': t5.*, 'args': Namespace}, with the configuration in a folder next
    to it that has the name in args.t5_name.
    """
    (folder / "t5_tiny").mkdir(parents=True)
    (folder / "t5_tiny" / "config.json").write_text(json.dumps(CONFIG))
    weights = {"t5." + key[7:].replace(".module.", ".t5block."): torch.from_numpy(value) for key,
               value in golden.items() if key.startswith("weight/")
               and not key.endswith(CROSS_BIAS)}
    args = argparse.Namespace(t5_name="t5_tiny", num_contexts=5, max_length=24)
    torch.save({"sd": weights, "args": args}, folder / "model")
    return folder / "model"


@pytest.fixture(scope="module", params=["fid", "minfid"])
def peer(request, golden, tmp_path_factory):
    """Return (name, path of its checkpoint, its outputs, the batch)."""
    folder = tmp_path_factory.mktemp("peer") / "checkpoint"
    path = (released_folder if request.param == "fid" else minfid_file)(golden, folder)
    batch = [torch.from_numpy(golden[key]) for key in ("input_ids", "attention_mask", "labels")]
    return request.param, str(path), {k.split("/", 1)[1]: v for k, v in golden.items()
                                      if k.startswith(request.param + "/")}, batch


@pytest.mark.parametrize("chunk_tokens", [4096, 30])
def test_golden_outputs_and_gradients(peer, chunk_tokens, monkeypatch):
    name, path, want, (ids, mask, labels) = peer
    monkeypatch.setitem(packing.CHUNK_ROWS, "cpu", chunk_tokens)
    reader = FiDT5.from_pretrained(path).train()
    assert (reader.cross_bias is not None) == (name == "fid")
    memory = reader.encode(pack_padded(ids, mask))
    np.testing.assert_allclose(memory.states[memory.mask].detach(), want["encoder_output"],
                               atol=3e-5)
    loss, logits = reader(pack_padded(ids, mask), labels)
    np.testing.assert_allclose(logits.detach(), want["logits"], atol=1e-4)
    assert abs(loss.item() - want["loss_train"]) < 1e-5
    loss.backward()
    grads = {plain_key(key): p.grad for key, p in reader.t5.named_parameters()}
    checked = [key for key in want if key.startswith("grad/")]
    assert len(checked) >= 5
    for key in checked:
        np.testing.assert_allclose(grads[plain_key(key[5:])], want[key], atol=1e-5)


def test_golden_generation(peer):
    _, path, want, (ids, mask, _) = peer
    reader = FiDT5.from_pretrained(path).eval()
    assert np.array_equal(reader.generate(pack_padded(ids, mask), 50), want["generated_ids"])
    generated, scores = reader.generate(pack_padded(ids, mask), 50, return_scores=True)
    assert np.array_equal(generated, want["generated_ids"])  # scoring changes no answer
    if "crossattention_scores" in want:
        np.testing.assert_allclose(scores, want["crossattention_scores"], atol=1e-5)


def test_the_position_bias_keeps_no_state(golden, tmp_path):
    """Check that decoding a memory again gives the same logits after an answer has ended early, and
    that beam search clears the attribute that it sets.
    """
    reader = FiDT5.from_pretrained(released_folder(golden, tmp_path / "r")).eval()
    ids, mask = (torch.from_numpy(golden[key]) for key in ("input_ids", "attention_mask"))
    first_tokens = reader.generate(pack_padded(ids, mask), 2)[:, 1]
    assert len(first_tokens.unique()) > 1
    reader.config.eos_token_id = int(first_tokens[0])  # the first question ends at once
    with torch.no_grad():
        memory = reader.encode(pack_padded(ids, mask))
        before = reader.decode(ids[:, 0, :3], memory)
        reader.greedy(memory, 4)
        assert torch.equal(reader.decode(ids[:, 0, :3], memory), before)
    reader.generate(pack_padded(ids, mask), 4, num_beams=2)
    assert reader.cross_bias.beam_offsets is None


def test_golden_training_curve(peer):
    _, path, want, (ids, mask, labels) = peer
    reader = FiDT5.from_pretrained(path).train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    scheduler = get_linear_schedule_with_warmup(optimizer, 2, 20)
    for step in range(10):
        assert scheduler.get_last_lr()[0] == pytest.approx(want["lr"][step])
        loss, _ = reader(pack_padded(ids, mask), labels)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        assert abs(loss.item() - want["loss_before"][step]) < 1e-4
        assert abs(norm.item() - want["grad_norm_before_clip"][step]) < 2e-3
        optimizer.step(), scheduler.step(), optimizer.zero_grad()


def test_bias_counts_the_originals_padded_offsets(golden, tmp_path):
    """Check that inputs padded to their longest passage give the same result as padded to
    max_length, if passage_stride is max_length.
    """
    reader = FiDT5.from_pretrained(released_folder(golden, tmp_path / "r")).eval()
    ids, mask, labels = (torch.from_numpy(golden[key])
                         for key in ("input_ids", "attention_mask", "labels"))
    # 35 targets: later ones see the second passage's offsets with stride 24
    labels = labels.clamp(min=3).repeat(1, 5)
    padded = [torch.nn.functional.pad(x, (0, 30)) for x in (ids, mask)]
    want = reader(pack_padded(*padded), labels)[1]
    assert (reader(pack_padded(ids, mask), labels)[1] - want).abs().max() > 1e-3
    reader.config.passage_stride = 54
    torch.testing.assert_close(reader(pack_padded(ids, mask), labels)[1], want, atol=1e-4, rtol=0)


def random_batch(seed=0, vocab=300):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[9, 3, 12], [7, 0, 0], [1, 12, 5]])
    mask = torch.arange(12) < lengths[..., None]
    ids = torch.randint(3, vocab, mask.shape, generator=generator) * mask
    labels = torch.randint(3, vocab, (3, 5), generator=generator)
    labels[1, 3:] = -100
    return ids, mask, labels


FAMILIES = {"t5": (T5ForConditionalGeneration, T5Config, {"feed_forward_proj": "relu"}),
            "v1.1": (T5ForConditionalGeneration, T5Config,
                     {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
            "flan-relu": (T5ForConditionalGeneration, T5Config,
                          {"feed_forward_proj": "gated-relu", "num_decoder_layers": 1}),
            "umt5": (UMT5ForConditionalGeneration, UMT5Config,
             {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": (MT5ForConditionalGeneration, MT5Config,
                    {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),}


def family_folder(name, folder):
    """Write a folder like the hub's, where v1.1 and mT5 have their own output layer and
    tie_word_embeddings is false.
    """
    kind, config_kind, changes = FAMILIES[name]
    torch.manual_seed(1)
    t5 = kind(config_kind(vocab_size=320, d_model=32, d_kv=8, num_heads=4, d_ff=64, num_layers=2,
                          decoder_start_token_id=0, **changes))
    weights = {k: v.clone().contiguous() for k, v in t5.state_dict().items()
               if "embed_tokens" not in k}
    if changes.get("tie_word_embeddings") is False:
        weights["lm_head.weight"] = torch.randn(320, 32)
    else:
        del weights["lm_head.weight"]
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(t5.config.to_dict() | changes))
    return kind, folder


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_a_plain_padded_t5_and_survive_saving(name, tmp_path):
    kind, folder = family_folder(name, tmp_path / "hub")
    plain = kind.from_pretrained(folder).eval()
    ids, mask, labels = random_batch()
    want_loss, want_logits = plain_fid(plain, ids, mask, labels)
    reader = FiDT5.from_pretrained(folder).eval()
    reader.save_pretrained(tmp_path / "ours")
    for candidate in (reader, FiDT5.from_pretrained(tmp_path / "ours").eval()):
        loss, logits = candidate(pack_padded(ids, mask), labels)
        torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
        torch.testing.assert_close(loss, want_loss, atol=1e-5, rtol=0)
    again = kind.from_pretrained(tmp_path / "ours").eval()  # what an ecosystem user opens
    torch.testing.assert_close(plain_fid(again, ids, mask, labels)[1], want_logits, atol=1e-5,
                               rtol=0)
    # the reader's generation equals transformers' on the padded memory
    states = plain.encoder(input_ids=ids.view(9, 12),
                           attention_mask=mask.view(9, 12)).last_hidden_state.view(3, 36, -1)
    for beams in (1, 3):
        want = plain.generate(encoder_outputs=BaseModelOutput(states),
                              attention_mask=mask.view(3, 36), max_length=12, num_beams=beams,
                              do_sample=False)
        assert torch.equal(reader.generate(pack_padded(ids, mask), 12, beams), want)


@pytest.mark.parametrize("beams, max_length", [(1, 12), (3, 12), (1, 2), (3, 3)])
def test_probabilities_equal_those_of_transformers(beams, max_length):
    """D: compare the n best answers' log probabilities, of answers that end and answers that are
    cut.
    """
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(TOKENIZER).eval()
    plain = T5ForConditionalGeneration.from_pretrained(TOKENIZER).eval()
    states = plain.encoder(input_ids=ids.view(9, 12),
                           attention_mask=mask.view(9, 12)).last_hidden_state.view(3, 36, -1)
    want = plain.generate(encoder_outputs=BaseModelOutput(states),
                          attention_mask=mask.view(3, 36), max_length=max_length, num_beams=beams,
                          do_sample=False, num_return_sequences=beams, output_scores=True,
                          return_dict_in_generate=True)
    steps = plain.compute_transition_scores(want.sequences, want.scores,
                                            want.get("beam_indices"), normalize_logits=beams == 1)
    steps = steps.masked_fill(want.sequences[:, 1:1 + steps.shape[1]] == 0, 0)  # padding
    answers, log_probabilities = reader.generate(pack_padded(ids, mask), max_length, beams,
                                                 n_best=beams)
    assert torch.equal(answers.flatten(0, 1), want.sequences)
    torch.testing.assert_close(log_probabilities.flatten().float(), steps.sum(1), atol=1e-4, rtol=0)
    is_cut = ~(answers == reader.config.eos_token_id).any(2)
    assert is_cut.any() if max_length < 4 else not is_cut.all()
    assert torch.equal(reader.generate(pack_padded(ids, mask), max_length, beams), answers[:, 0])


def test_checkpointing_replays_dropout(tiny):
    ids, mask, labels = random_batch()
    grads = []
    for use_checkpoint in (False, True):
        reader = FiDT5.from_pretrained(tiny, dropout=0.3).train()
        reader.set_checkpoint(use_checkpoint)
        torch.manual_seed(5)
        reader(pack_padded(ids, mask), labels)[0].backward()
        grads.append([p.grad for p in reader.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))
    assert reader.t5.encoder.encoder.block[0].module.layer[0].dropout.p == 0.3


def test_checkpointing_keeps_less(tiny):
    """Check that the tensors saved for the backward pass shrink to about the blocks' inputs."""
    def saved_bytes(use_checkpoint):
        reader, total = FiDT5.from_pretrained(tiny).train(), []
        reader.set_checkpoint(use_checkpoint)
        ids = torch.randint(3, 300, (2, 20, 60))

        def pack(x):
            total.append(x.numel() * x.element_size())
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            reader(pack_padded(ids, torch.ones_like(ids)), torch.full((2, 4), 5))
        return sum(total)
    assert saved_bytes(True) < 0.6 * saved_bytes(False)


def test_an_empty_question_is_finite(tiny):
    ids, mask, labels = random_batch()
    mask[1] = False
    reader = FiDT5.from_pretrained(tiny).train()
    loss, logits = reader(pack_padded(ids, mask), labels)
    loss.backward()
    assert logits.isfinite().all() and all(p.grad.isfinite().all() for p in reader.parameters()
                                           if p.grad is not None)
    assert reader(pack_padded(ids, torch.zeros_like(mask)), labels)[1].isfinite().all()
    _, scores = reader.eval().generate(pack_padded(ids, mask), 5, return_scores=True)
    assert scores[1].tolist() == [float("-inf")] * 3 and scores[0].isfinite().all()


def test_attention_shares_are_sums_of_transformers_attentions(tiny):
    ids, mask, _ = random_batch()
    mask[0, 1, 4:] = False
    reader = FiDT5.from_pretrained(tiny).eval()
    _, log_shares = reader.generate(pack_padded(ids, mask), 5, return_scores="attention")
    t5 = T5ForConditionalGeneration.from_pretrained(tiny, attn_implementation="eager").eval()
    B, N, L = ids.shape
    with torch.no_grad():
        states = t5.encoder(input_ids=ids.view(B * N, L), attention_mask=mask.view(B * N, L))
        memory = states.last_hidden_state.view(B, N * L, -1)
        output = t5(encoder_outputs=(memory,), attention_mask=mask.view(B, N * L),
                    decoder_input_ids=torch.zeros(B, 1, dtype=torch.long), output_attentions=True)
    attention = torch.stack(output.cross_attentions).mean((0, 2, 3))  # (B, N * L)
    torch.testing.assert_close(log_shares.exp(), attention.view(B, N, L).sum(2), atol=1e-5, rtol=0)


def test_passages_do_not_see_each_other(tiny):
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(tiny).eval()
    together = reader.encode(pack_padded(ids, mask))
    alone = reader.encode(pack_padded(ids[:1, 2:], mask[:1, 2:]))
    torch.testing.assert_close(together.states[0, 12:24], alone.states[0], atol=1e-5, rtol=0)


def test_no_weights_starts_at_random_and_says_so(tiny, tmp_path, capsys):
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes(open(f"{tiny}/{file}", "rb").read())
    ids, mask, labels = random_batch()
    assert FiDT5.from_pretrained(tmp_path)(pack_padded(ids, mask), labels)[0].isfinite()
    assert "starting from random initialisation" in capsys.readouterr().out


def test_shards_and_bfloat16_weights_load(tiny, tmp_path):
    weights = load_file(f"{tiny}/model.safetensors")
    names = sorted(weights)
    (tmp_path / "config.json").write_bytes(open(f"{tiny}/config.json", "rb").read())
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({k: weights[k].bfloat16() for k in keys}, tmp_path / shard)
    index = {"weight_map": {k: shard for shard, keys in shards.items() for k in keys}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    reader = FiDT5.from_pretrained(tmp_path)
    assert all(p.dtype == torch.float32 for p in reader.parameters())
    torch.testing.assert_close(reader.t5.shared.weight, weights["shared.weight"].bfloat16().float())


def test_training_args_and_tokenizers(tiny, golden, tmp_path):
    path = minfid_file(golden, tmp_path / "m")
    assert read_training_args(path)["max_length"] == 24
    assert read_training_args(tiny) == {}
    assert load_tokenizer(path,
                          tiny)("the").input_ids == load_tokenizer(tiny, "nowhere")("the").input_ids


def test_byt5_tokenizer_reads(tmp_path):
    make_t5(tmp_path, vocab_size=384)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).unlink()
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, "nowhere")("ab").input_ids == [100, 101, 1]


class Spy:
    def __reduce__(self):
        return print, ("unpickled",)


def test_bad_checkpoints_are_one_clear_line(tiny, tmp_path, capsys):
    def refuse(path, message):
        with pytest.raises(InputError) as error:
            FiDT5.from_pretrained(path)
        assert message in str(error.value) and "\n" not in str(error.value)

    refuse("no-such/model", "no such folder or file")
    refuse(tmp_path, "no usable config.json")
    config = json.load(open(f"{tiny}/config.json"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"d_ff": 96}))
    save_file(load_file(f"{tiny}/model.safetensors"), tmp_path / "model.safetensors")
    refuse(tmp_path,
           "DenseReluDense.wi.weight is (64, 32) in the file, (96, 32) by the configuration")
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    refuse(tmp_path, "missing in the file")
    (tmp_path / "model.safetensors").write_bytes(open(f"{tiny}/model.safetensors",
                                                      "rb").read()[:5000])
    refuse(tmp_path, "cannot be read")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    refuse(tmp_path, "is a bert model")
    torch.save({"sd": {}, "args": Spy()}, tmp_path / "evil")
    refuse(tmp_path / "evil", "not a checkpoint that can be loaded safely")
    assert "unpickled" not in capsys.readouterr().out
    torch.save([1], tmp_path / "list")
    refuse(tmp_path / "list", "neither a model folder, nor minFiD's")
