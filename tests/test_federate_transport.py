"""What travels between server and clients: nothing is lost, and nothing that is not finite passes.
"""
import math

import pytest
import torch

pytest.importorskip("flwr")
from federated.transport import is_finite, pack, unpack


@pytest.mark.parametrize("shape", [(), (0,), (1,), (7, 5)])
def test_finite_numbers_pass(shape):
    assert is_finite(torch.randn(shape))
    assert is_finite(torch.full(shape, torch.finfo(torch.float32).max))  # its sum would not be


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 34])
def test_one_number_that_is_not_finite_is_found(number, place):
    tensor = torch.randn(7, 5)
    tensor.view(-1)[place] = number
    assert not is_finite(tensor)
    assert is_finite(tensor) == torch.isfinite(tensor).all().item()


def test_float32_travels_bit_for_bit():
    sent = {"whole": torch.randn(7, 5), "turned": torch.randn(7, 5).T, "one": torch.tensor(3.0)}
    arrived = unpack(pack(sent))
    assert list(arrived) == list(sent)
    assert arrived["one"].shape == ()
    assert all(torch.equal(arrived[name], sent[name]) for name in sent)
