"""Weights between server and clients: none is lost, and none passes that is not finite."""
import math

import pytest
import torch

pytest.importorskip("flwr")
from flwr.app import Array, ArrayRecord

from federated.transport import (
    BF16,
    WEIGHTS,
    check_same,
    from_wire,
    is_finite,
    pack,
    to_wire,
    unpack,
)
from utils import InputError


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


SENT = {"whole": torch.randn(7, 5), "turned": torch.randn(7, 5).T, "one": torch.tensor(3.0),
        "none": torch.zeros(0, 2)}


@pytest.mark.parametrize("travel", [lambda sent: unpack(pack(sent)),
                                    lambda sent: from_wire(*to_wire(sent))])
def test_float32_travels_bit_for_bit(travel):
    arrived = travel(SENT)
    assert list(arrived) == list(SENT)
    assert all(torch.equal(arrived[name], SENT[name]) for name in SENT)


def test_bf16_travels_rounded_in_half_the_bytes():
    record, layout = to_wire(SENT, "bf16")
    arrived = from_wire(record, layout)
    assert len(record) == 1 and len(record[WEIGHTS].data) == 2 * 71
    assert all(torch.equal(arrived[name], SENT[name].bfloat16().float()) for name in SENT)


@pytest.mark.parametrize("array,layout", [
    (Array(BF16, (3,), BF16, b"12345"), '[["w", [3]]]'), (Array("f", (3,), "x", b""), "[]"),
    (Array(torch.zeros(3).numpy()), '[["w", [4]]]'), (Array(torch.zeros(3).numpy()), "{"),
    (Array(torch.zeros(3).numpy()), '[["w", [3], 1]]'), (Array(torch.zeros(3).numpy()), '[1]')])
def test_what_cannot_be_read_is_refused(array, layout):
    with pytest.raises(InputError, match="the weights came in a form that cannot be read"):
        from_wire(ArrayRecord({WEIGHTS: array}), layout)


def test_other_models_are_told_by_the_first_weight():
    with pytest.raises(InputError, match=r"whole is \(7, 5\) at a, \(2, 2\) at b"):
        check_same(SENT, SENT | {"whole": torch.zeros(2, 2)}, "a", "b")
    with pytest.raises(InputError, match="extra is missing at a"):
        check_same(SENT, SENT | {"extra": torch.zeros(1)}, "a", "b")
