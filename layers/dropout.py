"""Dropout with cheap random numbers on a CPU.

torch draws one random number per unit; numpy's SFC64 gives four per draw, which takes 4.0 instead
of 6.6 ns per unit on an AMD EPYC (bench/reader.py prints both). A training step of t5-small with 10
passages is 1.1 to 1.5 times as fast as with F.dropout, depending on the machine's load
(bench/reader.py, readers ours and "torch's dropout").
"""
import math

import numpy as np
import torch
import torch.nn.functional as F


def dropout(x, p):
    """Return F.dropout(x, p); on a CPU with the random numbers of keep_mask, and p rounded to a
    multiple of 2 ** -16, except in a compiled region (layers/regions.py).
    """
    if p == 0:
        return x
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p)
    return Dropout.apply(x, p)


class Dropout(torch.autograd.Function):
    """Compute x * keep / (1 - p), and save only the bool mask for the backward pass."""

    @staticmethod
    def forward(ctx, x, p):
        keep = keep_mask(x.shape, p)
        ctx.save_for_backward(keep)
        ctx.scale = 1 / (1 - p)
        return x * keep * ctx.scale

    @staticmethod
    def backward(ctx, grad):
        keep, = ctx.saved_tensors
        return grad * keep * ctx.scale, None


def keep_mask(shape, p):
    """Return a bool tensor that is False with probability p.

    numpy draws it with a seed from torch's generator, so that activation checkpointing and --resume
    replay the same masks.
    """
    count = math.prod(shape)
    seed = int(torch.randint(2 ** 62, ()))
    words = np.random.SFC64(seed).random_raw((count + 3) // 4)  # 64 bits each: four units
    units = words.view(np.uint16)[:count]
    keep = units >= round(p * 2 ** 16)
    return torch.from_numpy(keep).view(shape)
