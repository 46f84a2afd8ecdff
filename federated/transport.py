"""What travels between server and clients: the trained weights, as one of Flower's arrays in
float32 or bfloat16.

In bfloat16 a client sends the difference between what it received and what it trained: a weight
itself would lose most of a small update to rounding.
"""
import hashlib
import json
import math
from weakref import WeakKeyDictionary

import numpy as np
import torch
from flwr.app import Array, ArrayRecord

from utils import InputError, first_line

CLIENT_FAILED = 100  # the code of an error that a client tells, "NAME: REASON"
CLIENT_NAME = r"\w[\w.-]{0,59}"  # it names a folder, too


class OpenError(InputError):
    """An InputError whose message names weights only, so that a client may tell it the server."""


WEIGHTS = "weights"  # the name of the array in which all weights travel
BF16 = "bfloat16"    # its dtype and stype: Flower passes on the bytes of any
DIGESTS = WeakKeyDictionary()  # {model: the hash of its frozen weights}


def pack(tensors):
    """The ArrayRecord of {name: tensor}, a float32 array each: what strategies compute with."""
    return ArrayRecord({name: Array(tensor.detach().cpu().float().contiguous().numpy())
                        for name, tensor in tensors.items()})


def unpack(record):
    """{name: float32 tensor} of such an ArrayRecord."""
    return {name: torch.from_numpy(array.numpy().astype(np.float32, copy=False))
            for name, array in record.items()}


def to_wire(tensors, dtype="float32"):
    """(ArrayRecord, layout) of {name: tensor}, in float32 or bf16: what travels.

    All weights are one array, since Flower sends each array with several requests. The layout is
    JSON, [[name, shape]] in the array's order.
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
    """{name: float32 tensor} of what to_wire returned, views of one tensor.

    Raises OpenError for anything else.
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

    No round changes these weights: a model's are hashed once, which takes 1 s for t5-base.
    """
    if run.unwrapped not in DIGESTS:
        DIGESTS[run.unwrapped] = hash_frozen(run)
    return DIGESTS[run.unwrapped]


def hash_frozen(run):
    """What digest_frozen returns, computed."""
    frozen = {name: parameter for name, parameter in run.unwrapped.named_parameters()
              if not parameter.requires_grad}
    if not frozen:
        return ""
    digest = hashlib.blake2b(digest_size=12)
    for name, parameter in frozen.items():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
