"""Packing, and packed self-attention against textbook attention of each text alone, with replayed
dropout masks.
"""
import pytest
import torch

from data import pack_padded, pack_passages
from layers import dropout
from layers.packed_attention import make_groups, packed_attention
from layers.packing import Shape, cut_shapes, pack_texts, split_by_length, split_chunks

P = 0.25


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 4, 1]], ids=["equal", "ragged"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_attention_with_a_replayed_mask(lengths, with_bias, align, monkeypatch):
    torch.manual_seed(0)
    H, d, L = 2, 4, 8
    packed = pack_texts([[5] * length for length in lengths], 0, align=align)
    keep = torch.rand(3, H, L, L) >= P
    keeps = iter(keep) if align == 1 and lengths[0] != lengths[1] else iter([keep])

    def replay(shape, p):
        mask = next(keeps)
        return mask[..., :shape[-2], :shape[-1]].reshape(shape)
    monkeypatch.setattr(dropout, "keep_mask", replay)
    qkv = torch.randn(len(packed.ids), 3, H, d, requires_grad=True)
    bias = torch.randn(H, L, L, requires_grad=True)

    outputs = []
    for i, (start, length) in enumerate(zip(packed.starts.tolist(), lengths)):
        q, k, v = qkv[start:start + length].permute(1, 2, 0, 3)  # (H, length, d)
        scores = 0.5 * q @ k.transpose(1, 2)
        if with_bias:
            scores = scores + bias[:, :length, :length]
        probs = torch.softmax(scores, -1) * keep[i, :, :length, :length] / (1 - P)
        outputs.append((probs @ v).transpose(0, 1).flatten(1))
    expected = torch.cat(outputs)

    groups = make_groups(packed.shapes, packed.is_real, bias if with_bias else None)
    got = packed_attention(qkv, groups, P, 0.5)[packed.is_real]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(got.shape)
    differentiable = [qkv, bias] if with_bias else [qkv]
    for a, b in zip(torch.autograd.grad((got * weight).sum(), differentiable),
                    torch.autograd.grad((expected * weight).sum(), differentiable)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_texts_are_packed_longest_first():
    packed = pack_texts([[1, 2, 3], [], [4, 5, 6, 7, 8], [9], [10, 11]], 0, align=4)
    assert packed.ids.tolist() == [4, 5, 6, 7, 8, 0, 0, 0, 1, 2, 3, 0, 10, 11, 0, 0, 9, 0, 0, 0]
    assert packed.is_real.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 8, 9, 10, 12, 13, 16]
    assert packed.texts.tolist() == [2] * 8 + [0] * 4 + [4] * 4 + [3] * 4
    assert packed.starts[[0, 2, 3, 4]].tolist() == [8, 0, 16, 12]
    assert packed.lengths.tolist() == [3, 0, 5, 1, 2]
    assert packed.shapes == [Shape(1, 8, True), Shape(3, 4, True)]
    tight = pack_texts([[1], [2, 3]], 0, align=1)
    assert tight.ids.tolist() == [2, 3, 1] and tight.is_real.all()
    assert pack_texts([[], []], 0, align=4).shapes == []


def test_groups_and_chunks_have_the_rows_they_may(monkeypatch):
    assert cut_shapes([Shape(5, 8, True), Shape(1, 4, False)], 16) == [
        Shape(2, 8, True), Shape(2, 8, True), Shape(1, 8, True), Shape(1, 4, False)]
    packed = pack_texts([[7] * n for n in (900, 400, 400, 3000, 200, 200, 100, 3, 1)], 0, align=1)
    chunks = split_chunks(packed)
    assert torch.equal(torch.cat([ids for ids, _, _ in chunks]), packed.ids)
    for ids, is_real, shapes in chunks:
        assert sum(shape.n * shape.L for shape in shapes) == len(ids) == len(is_real) <= 4096
        assert all(shape.n * shape.L <= 1024 or shape.n == 1 for shape in shapes)


def test_the_memory_takes_real_tokens_in_passage_order():
    passages = pack_passages([[[1, 2, 3], [4]], [[5, 6]], [[]]], 0)
    assert passages.counts.tolist() == [[3, 1], [2, 0], [0, 0]]
    S = len(passages.texts.ids)
    ids = torch.cat([passages.texts.ids, torch.tensor([-1])])
    assert ids[passages.memory_rows].tolist() == [[1, 2, 3, 4], [5, 6, -1, -1], [-1] * 4]
    assert passages.memory_rows[2].tolist() == [S] * 4
    assert passages.passages.tolist() == [[0, 0, 0, 1], [0] * 4, [0] * 4]
    assert passages.positions.tolist() == [[0, 1, 2, 0], [0, 1, 0, 0], [0] * 4]
    assert passages.longest == 3
    nothing = pack_passages([[[]]], 0)
    assert nothing.memory_rows.tolist() == [[0]] and len(nothing.texts.ids) == 0


def test_padded_passages_are_packed_alike():
    ids = torch.tensor([[[1, 2, 3], [4, 0, 0]], [[5, 6, 0], [0, 0, 0]]])
    packed = pack_padded(ids, ids > 0)
    want = pack_passages([[[1, 2, 3], [4]], [[5, 6], []]], 0)
    for got, expected in zip(packed.texts[:5] + packed[1:5], want.texts[:5] + want[1:5]):
        assert torch.equal(got, expected)


def test_runs_hold_the_tokens_and_texts_they_may():
    lengths = [30, 9, 8, 3, 2, 2]
    assert list(split_by_length(lengths, 20, 2)) == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert list(split_by_length(lengths, 1000)) == [(0, 6)]
    assert list(split_by_length([], 20)) == []
