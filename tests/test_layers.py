"""Every fast path of layers.py and of FiDT5 against the plain one: a padded Hugging Face T5, or a few lines of textbook code."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers.modeling_outputs import BaseModelOutput

import dropout
import layers
import model as model_file
from dropout import ActDropped, AddDropped, GatedDropped, keep_mask
from layers import NormLinear, PackedAttention, group_passages
from model import FiDT5, plain_key
from test_model import FAMILIES, family_folder, plain_fid, random_batch

P = 0.25


def gradients(loss, module):
    loss.backward()
    return {plain_key(key): p.grad for key, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("attention", ["packed", "sdpa"])
@pytest.mark.parametrize("tokens", [(4096, 1024), (15, 10)], ids=["one chunk", "many chunks"])
@pytest.mark.parametrize("targets", [5, 60], ids=["folded", "projected"])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_equal_the_padded_model(name, targets, tokens, attention, tmp_path, monkeypatch):
    monkeypatch.setitem(model_file.CHUNK_TOKENS, "cpu", tokens[0])
    monkeypatch.setitem(layers.GROUP_TOKENS, "cpu", tokens[1])
    if attention == "sdpa":
        monkeypatch.setitem(layers.ATTENTION, "cpu", layers.sdpa_attention)
    kind, folder = family_folder(name, tmp_path / "hub")
    ids, mask, labels = random_batch()
    labels = labels.repeat(1, targets // 5)
    plain, reader = kind.from_pretrained(folder).eval(), FiDT5.from_pretrained(folder).eval()
    want_loss, want_logits = plain_fid(plain, ids, mask, labels)
    loss, logits = reader(ids, mask, labels)
    torch.testing.assert_close(logits, want_logits, atol=1e-4, rtol=0)
    want, got = gradients(want_loss, plain), gradients(loss, reader.t5)
    assert want.keys() == got.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key], atol=2e-6, rtol=1e-3, msg=lambda text: f"{key}: {text}")


def test_long_targets_are_projected_and_short_ones_folded(tiny, monkeypatch):
    """The two orders are those of the test above: einsum sees the memory only if keys are projected."""
    seen, einsum = [], torch.einsum
    monkeypatch.setattr(torch, "einsum", lambda formula, *x: seen.append(formula) or einsum(formula, *x))
    reader = FiDT5.from_pretrained(tiny).eval()
    ids, mask, labels = random_batch()
    reader(ids, mask, labels)
    assert not any(formula.startswith("bmc") for formula in seen)
    reader(ids, mask, labels.repeat(1, 12))
    assert any(formula.startswith("bmc") for formula in seen)


def test_keep_mask_has_its_probability():
    torch.manual_seed(0)
    for p in (0.1, 0.5, 0.03):
        keep = keep_mask((1000, 1001), p, torch.device("cpu"))
        assert set(keep.unique().tolist()) == {0, -1}
        assert abs((keep == 0).double().mean() - p) < 4 * (p * (1 - p) / keep.numel()) ** 0.5
    torch.manual_seed(1)
    first = keep_mask((7, 5), P, torch.device("cpu"))
    assert not torch.equal(first, keep_mask((7, 5), P, torch.device("cpu")))  # the generator moves on
    torch.manual_seed(1)
    assert torch.equal(first, keep_mask((7, 5), P, torch.device("cpu")))


@pytest.fixture
def replay(monkeypatch):
    """Makes the next random bits known: keep(shape) is the mask that the next dropout of that shape will use."""
    def keep(shape):
        bits = torch.from_numpy(np.random.default_rng(3).integers(-2 ** 15, 2 ** 15, shape, dtype=np.int16))
        for module in (dropout, layers):
            monkeypatch.setattr(module, "random_bits", lambda *_: bits.clone())
        return bits >= dropout.threshold(P)
    return keep


def same_with_gradients(fast, plain, inputs):
    inputs = [x.requires_grad_() for x in inputs]
    want, got = plain(*inputs), fast(*inputs)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    weight = torch.randn(want.shape, generator=torch.Generator().manual_seed(9))
    for a, b in zip(torch.autograd.grad((got * weight).sum(), inputs), torch.autograd.grad((want * weight).sum(), inputs)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_dropout_layers_with_replayed_masks(replay):
    torch.manual_seed(0)
    x, y, u, wide = (torch.randn(11, n) for n in (8, 8, 8, 16))
    keep, gelu = replay((11, 8)), torch.nn.GELU()
    same_with_gradients(lambda x, y: AddDropped.apply(x, y * 1, P, 2.0), lambda x, y: x + 2 * keep * y / (1 - P), [x, y])
    same_with_gradients(lambda y: AddDropped.apply(None, y, P, 1.0), lambda y: keep * y / (1 - P), [y])
    same_with_gradients(lambda u: ActDropped.apply(u * 1, P), lambda u: keep * u.relu(), [u])
    same_with_gradients(lambda w: GatedDropped.apply(w, gelu, P), lambda w: keep * gelu(w[:, :8]) * w[:, 8:], [wide])
    for p in (P, 0.0):  # what is kept for the backward pass is not changed by it
        z = torch.randn(11, 8, requires_grad=True)
        out = ActDropped.apply(z * 1, p).sum()
        first, = torch.autograd.grad(out, z, retain_graph=True)
        assert torch.equal(first, torch.autograd.grad(out, z)[0])


def test_norm_linear():
    torch.manual_seed(0)
    x, scale, w1, w2 = torch.randn(3, 7, 8), torch.rand(8) + 0.5, torch.randn(5, 8), torch.randn(4, 8)
    norm = lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    same_with_gradients(lambda x, s, a, b: NormLinear.apply(x, s, 1e-6, torch.float32, a, b),
                        lambda x, s, a, b: (norm(x) * s) @ torch.cat([a, b]).t(), [x, scale, w1, w2])


@pytest.mark.parametrize("sizes", [[6, 6, 6], [6, 4, 1]], ids=["equal", "ragged"])
def test_attention_with_replayed_masks(sizes, replay):
    torch.manual_seed(0)
    H, d, n, S = 2, 4, 6, sum(sizes)
    groups = group_passages(sizes, torch.device("cpu"))
    keep = replay((3, H, n, n))

    def plain(qkv, bias):
        out = []
        for i, rows in enumerate(qkv.split(sizes)):
            own = len(rows)
            q, k, v = rows.view(own, 3, H, d).permute(1, 2, 0, 3)
            probs = torch.softmax(q @ k.transpose(1, 2) + bias[:, :own, :own], -1) * keep[i, :, :own, :own] / (1 - P)
            out.append((probs @ v).transpose(0, 1).flatten(1))
        return torch.cat(out)

    same_with_gradients(lambda qkv, bias: PackedAttention.apply(qkv, bias, len(bias), groups, P), plain,
                        [torch.randn(S, 3 * H * d), torch.randn(H, n, n)])


def test_training_dropout_is_unbiased(tiny):
    """The mean of many dropped encodings nears the encoding without dropout, as with Hugging Face's own."""
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(tiny, dropout=0.1)
    with torch.no_grad():
        exact = reader.eval().encode(ids, mask).states
        reader.train()
        torch.manual_seed(0)
        ours = torch.stack([reader.encode(ids, mask).states for _ in range(300)])
        stack = reader.t5.encoder.encoder.module
        passage, real = ids[0, 2:], mask[0, 2:]
        theirs = torch.stack([stack(input_ids=passage, attention_mask=real).last_hidden_state[0] for _ in range(300)])
    ours, exact = ours[:, 0, 12:24], exact[0, 12:24]
    assert (ours.mean(0) - exact).abs().mean() < 1.5 * (theirs.mean(0) - exact).abs().mean()
    assert 0.9 < (ours.std(0) / theirs.std(0)).mean() < 1.1


def test_finished_questions_leave_and_change_nothing(tiny):
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(tiny).eval()
    reader.config.eos_token_id = -1
    free = reader.generate(ids, mask, 12)
    reader.config.eos_token_id = int(free[1, 4])  # at least one question ends early now
    want = free.clone()
    for row in want:
        ends = (row[1:] == reader.config.eos_token_id).nonzero()
        if len(ends):
            row[int(ends[0]) + 2:] = reader.config.pad_token_id
    widths = []
    decode = reader.decode
    reader.decode = lambda tokens, *rest: widths.append(len(tokens)) or decode(tokens, *rest)
    got = reader.generate(ids, mask, 12)
    assert torch.equal(got, want[:, :got.shape[1]]) and (want[:, got.shape[1]:] == reader.config.pad_token_id).all()
    assert widths[0] == 3 and widths[-1] < 3


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_bfloat16_is_near(use_checkpoint, tmp_path):
    """In bfloat16 the loss is near float32's, the gradients point the same way and are float32."""
    _, folder = family_folder("v1.1", tmp_path / "hub")
    ids, mask, labels = random_batch()
    found = []
    for bf16 in (False, True):
        reader = FiDT5.from_pretrained(folder, dropout=0.0).train()
        reader.set_checkpoint(use_checkpoint)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss, _ = reader(ids, mask, labels)
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
        greedy, scores = reader.generate(ids, mask, 8, return_scores=True)
        beams = reader.generate(ids, mask, 8, num_beams=2)
    assert greedy.shape == beams.shape and scores.isfinite().sum() == 7


def test_checkpointing_keeps_only_the_encoder_output_per_passage(tiny):
    def saved(num_passages):
        reader, held = FiDT5.from_pretrained(tiny, dropout=0.1).train(), {}
        reader.set_checkpoint(True)
        ids = torch.randint(3, 300, (1, num_passages, 40))

        def pack(x):
            held[x.untyped_storage().data_ptr()] = x  # kept alive, so that no address is used twice
            return x
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            reader(ids, torch.ones_like(ids), torch.full((1, 4), 5))
        return sum(x.untyped_storage().nbytes() for x in held.values())
    per_token = (saved(400) - saved(200)) / (200 * 40)
    output = FiDT5.from_pretrained(tiny).config.d_model * 4
    assert output <= per_token < output + 64  # beside it ids, places and the mask


def test_a_mask_with_holes_is_refused(tiny):
    ids, mask, labels = random_batch()
    mask[0, 0, 1] = False
    with pytest.raises(ValueError, match="real tokens first"):
        FiDT5.from_pretrained(tiny)(ids, mask, labels)


def test_beams_attend_as_greedy_does(tiny):
    """Beam search runs through transformers' decoder: with one beam it must find what our greedy loop finds."""
    ids, mask, _ = random_batch()
    reader = FiDT5.from_pretrained(tiny).eval()
    memory = reader.encode(ids, mask)
    want = reader.t5.generate(encoder_outputs=BaseModelOutput(memory.states), attention_mask=memory.mask, max_length=10,
                              num_beams=1, do_sample=False)
    assert torch.equal(reader.generate(ids, mask, 10), want)
