"""The packed encoder, the folded cross-attention and greedy decoding against the plain forms: a
padded Hugging Face T5.
"""
import pytest
import torch
import torch.nn.functional as F
from transformers import T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from data import pack_padded
from layers import packed_attention, packing
from layers import t5 as layers
from model import FiDT5, plain_fid, plain_key
from test_model import FAMILIES, family_folder, random_batch


def gradients(loss, module):
    loss.backward()
    return {plain_key(key): p.grad for key, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["plain", "fused"])
@pytest.mark.parametrize("tokens", [(4096, 1024), (15, 10)], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("targets", [5, 60])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_the_padded_model(name, targets, tokens, attention, tmp_path,
                                                   monkeypatch):
    monkeypatch.setitem(packing.CHUNK_ROWS, "cpu", tokens[0])
    monkeypatch.setitem(packing.GROUP_ROWS, "cpu", tokens[1])
    monkeypatch.setattr(packed_attention, "attention",
                        getattr(packed_attention, f"{attention}_attention"))
    kind, folder = family_folder(name, tmp_path / "hub")
    ids, mask, labels = random_batch()
    labels = labels.repeat(1, targets // 5)
    plain, reader = kind.from_pretrained(folder).eval(), FiDT5.from_pretrained(folder).eval()
    plain_loss, plain_logits = plain_fid(plain, ids, mask, labels)
    loss, logits = reader(pack_padded(ids, mask), labels)
    torch.testing.assert_close(logits, plain_logits, atol=1e-4, rtol=0)
    expected, got = gradients(plain_loss, plain), gradients(loss, reader.t5)
    assert expected.keys() == got.keys()
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], atol=2e-6, rtol=1e-3, msg=lambda text,
                                   key=key: f"{key}: {text}")


def test_a_block_that_is_computed_again_drops_the_same_units(tiny, monkeypatch):
    monkeypatch.setitem(packing.CHUNK_ROWS, "cpu", 15)
    ids, mask, labels = random_batch()
    results = []
    for use_checkpoint in (False, True):
        reader = FiDT5.from_pretrained(tiny, dropout=0.3).train()
        reader.set_checkpoint(use_checkpoint)
        torch.manual_seed(0)
        loss, _ = reader(pack_padded(ids, mask), labels)
        results.append((loss.detach(), gradients(loss, reader)))
    (loss, expected), (loss_again, got) = results
    assert torch.equal(loss, loss_again)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, atol=1e-6, rtol=1e-5)


def test_cross_attention_equals_its_plain_form(tiny):
    """Compare result, raw scores and gradients with those of a key and a value for every memory
    token.
    """
    attention = FiDT5.from_pretrained(tiny).t5.decoder.block[0].layer[1].EncDecAttention
    B, T, M, D = 2, 5, 30, 32
    torch.manual_seed(0)
    bias = torch.randn(B, 4, T, M)
    weight = torch.randn(B, T, 32)
    results = []
    for function in (layers.plain_cross_attention, layers.cross_attention):
        torch.manual_seed(1)
        x, memory = torch.randn(B, T, D,
                                requires_grad=True), torch.randn(B, M, D, requires_grad=True)
        y, scores = function(attention, x, memory, bias, 0.0)
        inputs = [x, memory, attention.q.weight, attention.k.weight, attention.v.weight]
        grads = torch.autograd.grad((y * weight).sum(), inputs)
        results.append([y, scores, *grads])
    for expected, got in zip(*results):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_training_dropout_is_unbiased(tiny):
    """Check that the mean of many encodings with dropout nears the encoding without dropout, as
    with transformers' T5.
    """
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(tiny, dropout=0.1)
    with torch.no_grad():
        exact = reader.eval().encode(pack_padded(ids, mask)).states
        reader.train()
        torch.manual_seed(0)
        ours = torch.stack([reader.encode(pack_padded(ids, mask)).states for _ in range(300)])
        stack = T5ForConditionalGeneration.from_pretrained(tiny, dropout_rate=0.1).encoder.train()
        passage, real = ids[0, 2:], mask[0, 2:]
        theirs = torch.stack([stack(input_ids=passage, attention_mask=real).last_hidden_state[0]
                              for _ in range(300)])
    ours, exact = ours[:, 0, 12:24], exact[0, 12:24]
    assert (ours.mean(0) - exact).abs().mean() < 1.5 * (theirs.mean(0) - exact).abs().mean()
    assert 0.9 < (ours.std(0) / theirs.std(0)).mean() < 1.1


def test_finished_questions_leave_and_change_nothing(tiny):
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(tiny).eval()
    reader.config.eos_token_id = -1
    free = reader.generate(pack_padded(ids, mask), 12)
    reader.config.eos_token_id = int(free[1, 4])  # at least one question ends early now
    want = free.clone()
    for row in want:
        ends = (row[1:] == reader.config.eos_token_id).nonzero()
        if len(ends):
            row[int(ends[0]) + 2:] = reader.config.pad_token_id
    widths = []
    decode = reader.decode
    reader.decode = lambda tokens, *rest: widths.append(len(tokens)) or decode(tokens, *rest)
    got = reader.generate(pack_padded(ids, mask), 12)
    width = got.shape[1]
    assert torch.equal(got, want[:, :width])
    assert (want[:, width:] == reader.config.pad_token_id).all()
    assert widths[0] == 3 and widths[-1] < 3


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_bfloat16_is_near(use_checkpoint, tmp_path):
    """Check that in bfloat16 the loss is near float32's, and that the gradients are float32 and
    point the same way.
    """
    _, folder = family_folder("v1.1", tmp_path / "hub")
    ids, mask, labels = random_batch()
    found = []
    for bf16 in (False, True):
        reader = FiDT5.from_pretrained(folder, dropout=0.0).train()
        reader.set_checkpoint(use_checkpoint)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = reader(pack_padded(ids, mask), labels)
        found.append((loss.item(), gradients(loss, reader.t5)))
    (loss, want), (loss16, got) = found
    assert loss16 != loss and abs(loss16 - loss) < 0.02 * loss
    for key in want:
        assert got[key].dtype == torch.float32
        assert F.cosine_similarity(got[key].flatten(), want[key].flatten(), dim=0) > 0.97, key


def test_bfloat16_generation_runs_all_paths(tiny):
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(tiny).eval()
    with torch.autocast("cpu", torch.bfloat16):
        greedy, scores = reader.generate(pack_padded(ids, mask), 8, return_scores=True)
        beams = reader.generate(pack_padded(ids, mask), 8, num_beams=2)
    assert greedy.shape == beams.shape and scores.isfinite().sum() == 7


def test_checkpointing_keeps_only_the_blocks_inputs_per_token(tiny):
    def saved(num_passages):
        reader, held = FiDT5.from_pretrained(tiny, dropout=0.1).train(), {}
        reader.set_checkpoint(True)
        ids = torch.randint(3, 300, (1, num_passages, 40))

        def pack(x):
            held[x.untyped_storage().data_ptr()] = x  # kept alive, so that no address is used twice
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            reader(pack_padded(ids, torch.ones_like(ids)), torch.full((1, 4), 5))
        return sum(x.untyped_storage().nbytes() for x in held.values())
    per_token = (saved(400) - saved(200)) / (200 * 40)
    config = FiDT5.from_pretrained(tiny).config
    states = config.d_model * 4  # bytes of a token's states; one more set is the memory
    kept = per_token / states
    assert config.num_layers < kept < config.num_layers + 4


def test_a_mask_with_holes_is_refused(tiny):
    ids, mask, labels = random_batch()
    mask[0, 0, 1] = False
    with pytest.raises(ValueError, match="real tokens first"):
        FiDT5.from_pretrained(tiny)(pack_padded(ids, mask), labels)


def test_beams_attend_as_greedy_does(tiny):
    """Check that beam search with one beam, which runs transformers' decoder, finds the answers of
    the greedy loop here.
    """
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(tiny).eval()
    memory = reader.encode(pack_padded(ids, mask))
    want = reader.t5.generate(encoder_outputs=BaseModelOutput(memory.states),
                              attention_mask=memory.mask, max_length=10, num_beams=1,
                              do_sample=False)
    assert torch.equal(reader.generate(pack_padded(ids, mask), 10), want)
