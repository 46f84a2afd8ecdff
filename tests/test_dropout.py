"""The cheap dropout: its probability, its replay under a seed, its gradient."""
import torch

from layers import dropout
from layers.dropout import keep_mask

P = 0.25


def test_keep_mask_has_its_probability():
    torch.manual_seed(0)
    for p in (0.1, 0.5, 0.03):
        keep = keep_mask((1000, 1001), p)
        assert keep.dtype == torch.bool
        assert abs((~keep).double().mean() - p) < 4 * (p * (1 - p) / keep.numel()) ** 0.5


def test_the_seed_replays_the_mask():
    torch.manual_seed(1)
    first = keep_mask((7, 5), P)
    assert not torch.equal(first, keep_mask((7, 5), P))  # the generator moves on
    torch.manual_seed(1)
    assert torch.equal(first, keep_mask((7, 5), P))


def test_dropout_and_its_gradient_with_a_replayed_mask(monkeypatch):
    torch.manual_seed(0)
    keep = torch.rand(11, 8) >= P
    monkeypatch.setattr(dropout, "keep_mask", lambda shape, p: keep)
    x = torch.randn(11, 8, requires_grad=True)
    weight = torch.randn(11, 8)
    y = dropout.dropout(x, P)
    torch.testing.assert_close(y, x * keep / (1 - P))
    grad, = torch.autograd.grad((y * weight).sum(), x)
    torch.testing.assert_close(grad, weight * keep / (1 - P))
    assert dropout.dropout(x, 0.0) is x
    assert dropout.dropout(x.bfloat16(), P).dtype == torch.bfloat16


def test_neighbouring_units_are_independent():
    """Check that the masks of four units from one draw of 64 bits are uncorrelated."""
    torch.manual_seed(0)
    dropped = (~keep_mask((250_000, 4), 0.5)).double()
    correlation = torch.corrcoef(dropped.T) - torch.eye(4)
    assert correlation.abs().max() < 0.01
