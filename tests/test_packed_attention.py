"""Packed self-attention against textbook attention of each text alone, with replayed dropout
masks.
"""
import pytest
import torch

from layers import dropout
from layers.packed_attention import group_texts, packed_attention, split_by_length

P = 0.25


@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 4, 1]], ids=["equal", "ragged"])
@pytest.mark.parametrize("with_bias", [True, False])
def test_packed_attention_with_a_replayed_mask(lengths, with_bias, monkeypatch):
    torch.manual_seed(0)
    H, d, L, S = 2, 4, 6, sum(lengths)
    keep = torch.rand(3, H, L, L) >= P
    monkeypatch.setattr(dropout, "keep_mask", lambda shape, p: keep)
    groups = group_texts(lengths, torch.device("cpu"))
    inputs = [torch.randn(S, H, d, requires_grad=True) for _ in range(3)]
    bias = torch.randn(H, L, L,
                       requires_grad=True) if with_bias else torch.zeros(H, L, L,
                       requires_grad=True)

    outputs, start = [], 0
    for i, length in enumerate(lengths):
        q, k, v = (x[start:start + length].transpose(0, 1) for x in inputs)  # (H, length, d)
        scores = 0.5 * q @ k.transpose(1, 2) + bias[:, :length, :length]
        probs = torch.softmax(scores, -1) * keep[i, :, :length, :length] / (1 - P)
        outputs.append((probs @ v).transpose(0, 1).flatten(1))
        start += length
    expected = torch.cat(outputs)

    got = packed_attention(*inputs, groups, bias if with_bias else None, P, 0.5)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    weight = torch.randn(got.shape)
    differentiable = [*inputs, bias] if with_bias else inputs
    for a, b in zip(torch.autograd.grad((got * weight).sum(), differentiable),
                    torch.autograd.grad((expected * weight).sum(), differentiable)):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_groups_cover_all_rows(monkeypatch):
    lengths = [900, 400, 400, 200, 200, 100, 3, 1]
    groups = group_texts(lengths, torch.device("cpu"))
    assert [group.start for group in groups] == [0] + [group.end for group in groups[:-1]]
    assert groups[-1].end == sum(lengths) and sum(group.n for group in groups) == len(lengths)
    assert all(group.n * group.L <= 1024 for group in groups)


def test_runs_hold_the_tokens_and_texts_they_may():
    lengths = [30, 9, 8, 3, 2, 2]
    assert list(split_by_length(lengths, 20, 2)) == [(0, 1), (1, 3), (3, 5), (5, 6)]
    assert list(split_by_length(lengths, 1000)) == [(0, 6)]
    assert list(split_by_length([], 20)) == []
