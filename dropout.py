"""Dropout that costs a CPU little: 16 bits of a fast generator per unit, applied in place, in one autograd function with its neighbours."""
import math

import numpy as np
import torch


def random_bits(shape, device):
    """int16 tensor of uniform random bits.

    On a CPU numpy's SFC64, seeded by torch's generator, makes four of them per draw: several times as fast as bernoulli_.
    """
    if device.type != "cpu":
        return torch.randint(-2 ** 15, 2 ** 15, shape, dtype=torch.int16, device=device)
    count = math.prod(shape)
    seed = int(torch.randint(2 ** 62, ()))
    bits = np.random.SFC64(seed).random_raw((count + 3) // 4)
    return torch.from_numpy(bits.view(np.int16))[:count].view(shape)


def threshold(p):
    """The number below which a fraction p of random_bits lies; p is rounded to a multiple of 2 ** -16."""
    return round(p * 2 ** 16) - 2 ** 15


def keep_mask(shape, p, device):
    """int8 tensor: 0, dropped, with probability p, else -1, all bits set."""
    t = threshold(p)
    return random_bits(shape, device).clamp_(t - 1, t).sub_(t - 1).neg_().to(torch.int8)


def drop_(x, keep):
    """Zeroes x in place where keep is 0: a bitwise and costs a third of a product with a bool mask."""
    bits = x.view(torch.int16 if x.element_size() == 2 else torch.int32)
    bits.bitwise_and_(keep.to(bits.dtype))
    return x


class AddDropped(torch.autograd.Function):
    """x + scale * dropout(y) in float32, keeping only the mask; x may be None. y is overwritten if there is an x."""

    @staticmethod
    def forward(ctx, x, y, p, scale):
        keep = keep_mask(y.shape, p, y.device) if p else None
        ctx.save_for_backward(keep)
        ctx.alpha, ctx.dtype = scale / (1 - p), y.dtype
        if keep is not None:
            y = drop_(y if x is not None else y.clone(), keep)
        return torch.add(x, y.float(), alpha=ctx.alpha) if x is not None else y.float() * ctx.alpha

    @staticmethod
    def backward(ctx, grad):
        keep, = ctx.saved_tensors
        dy = (grad * ctx.alpha).to(ctx.dtype)
        return grad if ctx.needs_input_grad[0] else None, dy if keep is None else drop_(dy, keep), None, None


class ActDropped(torch.autograd.Function):
    """ReLU and dropout of u, in place and without dropout's scale: its zeros are all that the backward pass needs."""

    @staticmethod
    def forward(ctx, u, p):
        u.relu_()
        if p:
            drop_(u, keep_mask(u.shape, p, u.device))
        ctx.mark_dirty(u)
        ctx.save_for_backward(u)
        return u

    @staticmethod
    def backward(ctx, grad):
        return torch.ops.aten.threshold_backward(grad, ctx.saved_tensors[0], 0), None


class GatedDropped(torch.autograd.Function):
    """act(u0) * u1 of u = (u0, u1) and dropout without its scale; the activation is computed again in the backward pass."""

    @staticmethod
    def forward(ctx, u, act, p):
        u0, u1 = u.chunk(2, dim=-1)
        keep = keep_mask(u1.shape, p, u.device) if p else None
        ctx.save_for_backward(u, keep)
        ctx.act = act
        h = act(u0) * u1
        return h if keep is None else drop_(h, keep)

    @staticmethod
    def backward(ctx, grad):
        u, keep = ctx.saved_tensors
        u0, u1 = u.chunk(2, dim=-1)
        if keep is not None:
            grad = drop_(grad.clone(), keep)
        with torch.enable_grad():
            u0 = u0.detach().requires_grad_()
            a = ctx.act(u0)
        du0, = torch.autograd.grad(a, u0, grad * u1)
        return torch.cat([du0, a.detach() * grad], -1), None, None
