"""The weights on their way between server and clients: one array of Flower's, float32 or bfloat16.

In bfloat16 a client sends the change of each weight, because rounding the weight itself would lose
most of a small update.
"""
import hashlib
import json
import math
from weakref import WeakKeyDictionary

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from utils import InputError, first_line

CLIENT_FAILED = 100  # the code of a client's own error, whose reason is "NAME: REASON"
CLIENT_NAME = r"\w[\w.-]{0,59}"  # a folder has this name, too


class OpenError(InputError):
    """Mark an InputError that quotes no record, so that a client may send it to the server."""


WEIGHTS = "weights"  # the name of the array in which all weights travel
BF16 = "bfloat16"    # the array's dtype and stype; Flower passes any bytes on
DIGESTS = WeakKeyDictionary()  # {model: hash of its frozen weights}


def pack(tensors):
    """Return {name: tensor} in the form of Flower's strategies: an array each, float32."""
    return ArrayRecord({name: Array(tensor.detach().cpu().float().contiguous().numpy())
                        for name, tensor in tensors.items()})


def unpack(record):
    """Return the ArrayRecord of pack as {name: float32 tensor}."""
    return {name: torch.from_numpy(array.numpy().astype(np.float32, copy=False))
            for name, array in record.items()}


def to_wire(tensors, dtype="float32"):
    """Return {name: tensor} as (ArrayRecord, layout) for a message; dtype: float32 or bf16.

    All weights form one array, because Flower sends several requests for each. The layout is JSON,
    [[name, shape]] in the array's order.
    """
    flat = torch.cat([tensor.detach().cpu().float().reshape(-1) for tensor in tensors.values()])
    layout = json.dumps([[name, list(tensor.shape)] for name, tensor in tensors.items()])
    if dtype == "bf16":
        bits = flat.to(torch.bfloat16).view(torch.int16).numpy()
        array = Array(BF16, tuple(flat.shape), BF16, bits.tobytes())
    else:
        array = Array(flat.numpy())
    return ArrayRecord({WEIGHTS: array}), layout


def from_wire(record, layout):
    """Return what to_wire made as {name: float32 tensor}; the tensors are views of one.

    Raises OpenError if it has another form.
    """
    try:
        array = record[WEIGHTS]
        if array.stype == BF16:
            bits = torch.from_numpy(np.frombuffer(array.data, np.int16).copy())
            flat = bits.view(torch.bfloat16).float()
        else:
            flat = torch.from_numpy(array.numpy().astype(np.float32, copy=False))
        shapes = {name: torch.Size(shape) for name, shape in json.loads(layout)}
        parts = flat.split([shape.numel() for shape in shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts)}
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        raise OpenError(f"the weights came in a form that cannot be read "
                        f"({first_line(error)})") from None


def count_bytes(record):
    """Return the number of bytes in an ArrayRecord's arrays."""
    return sum(len(array.data) for array in record.values())


def is_finite(tensor):
    """Return True if all numbers of a tensor are finite.

    This takes one pass; torch.isfinite(tensor).all() takes eight times as long, 0.6 s for t5-base.
    """
    if not tensor.numel():
        return True
    lowest, highest = tensor.aminmax()  # both are nan if any number is
    return math.isfinite(lowest) and math.isfinite(highest)


def check_same(received, own, sender, receiver):
    """Raise OpenError if two {name: tensor} differ in a name or a shape, naming the first one."""
    given = {name: tuple(tensor.shape) for name, tensor in received.items()}
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    if given == wanted:
        return
    for name in [*wanted, *given]:
        if given.get(name) != wanted.get(name):
            raise OpenError(f"{name} is {given.get(name, 'missing')} at {sender}, "
                            f"{wanted.get(name, 'missing')} at {receiver}; all must start from "
                            "the same model with the same flags")


def copy_weights(tensors, parameters):
    """Copy {name: tensor} into {name: parameter}."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def digest_frozen(run):
    """Return a hash of the weights that are not trained, "" if all are trained.

    All parties must have the same frozen weights. No round changes them, so they are hashed once
    per model, which takes 1 s for t5-base.
    """
    if run.unwrapped not in DIGESTS:
        DIGESTS[run.unwrapped] = hash_frozen(run)
    return DIGESTS[run.unwrapped]


def hash_frozen(run):
    """Compute the hash of digest_frozen."""
    frozen = {name: parameter for name, parameter in run.unwrapped.named_parameters()
              if not parameter.requires_grad}
    if not frozen:
        return ""
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in frozen.items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
