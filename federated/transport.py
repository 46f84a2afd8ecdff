"""What travels between server and clients: the trained weights as Flower's arrays, float32 or
bfloat16.

In bfloat16 a client sends the difference between what it received and what it trained: a weight
itself would lose most of a small update to rounding.
"""
import hashlib
import math

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from utils import InputError

CLIENT_FAILED = 100  # the code of an error that a client tells, "NAME: REASON"
CLIENT_NAME = r"\w[\w.-]{0,59}"  # it names a folder, too


class OpenError(InputError):
    """An InputError whose message names weights only, so that a client may tell it the server."""


BF16 = "bfloat16"  # the arrays' dtype and stype: Flower passes on the bytes of any


def pack(tensors, dtype="float32"):
    """The ArrayRecord of {name: tensor}, in float32 or bf16."""
    record = ArrayRecord()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if dtype == "float32":
            record[name] = Array(tensor.float().numpy())
        else:
            bits = tensor.to(torch.bfloat16).view(torch.int16).numpy()
            record[name] = Array(BF16, tuple(tensor.shape), BF16, bits.tobytes())
    return record


def unpack(record):
    """{name: float32 tensor} of an ArrayRecord. Raises OpenError for arrays that are none."""
    tensors = {}
    for name, array in record.items():
        try:
            tensors[name] = unpack_array(array)
        except (ValueError, TypeError, RuntimeError) as error:
            raise OpenError(f"{name} came as an array that cannot be read ({error})") from None
    return tensors


def unpack_array(array):
    """The float32 tensor of an Array."""
    if array.stype != BF16:
        return torch.from_numpy(array.numpy().astype(np.float32, copy=False))
    bits = torch.from_numpy(np.frombuffer(array.data, np.int16).copy())
    return bits.view(torch.bfloat16).reshape(array.shape).float()


def count_bytes(record):
    """The bytes of an ArrayRecord's arrays."""
    return sum(len(array.data) for array in record.values())


def is_finite(tensor):
    """True if all its numbers are finite.

    One pass over them: torch.isfinite(tensor).all() takes eight times as long, 0.6 s for t5-base.
    """
    if not tensor.numel():
        return True
    lowest, highest = tensor.aminmax()  # both are nan if any number is
    return math.isfinite(lowest) and math.isfinite(highest)


def check_same(received, own, sender, receiver):
    """Raises OpenError that names the first weight which is missing, unknown or of another shape
    than the receiver's own; both are {name: tensor}.
    """
    given = {name: tuple(tensor.shape) for name, tensor in received.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if given == wanted:
        return
    for name in [*wanted, *given]:
        if given.get(name) != wanted.get(name):
            raise OpenError(f"{name} is {given.get(name, 'missing')} at {sender}, "
                            f"{wanted.get(name, 'missing')} at {receiver}; all must start from "
                            "the same model with the same flags")


def load_weights(run_parameters, tensors):
    """Copies {name: tensor} into {name: parameter}."""
    with torch.no_grad():
        for name, parameter in run_parameters.items():
            parameter.copy_(tensors[name])


def digest_frozen(run):
    """A hash of the weights that are not trained, which all parties must have alike; "" if all are
    trained.
    """
    frozen = {name: parameter for name, parameter in run.unwrapped.named_parameters()
              if not parameter.requires_grad}
    if not frozen:
        return ""
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in frozen.items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
