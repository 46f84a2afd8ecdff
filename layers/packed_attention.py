"""Self-attention over packed texts (layers/packing.py), for the encoders of the reader and of the
retriever.

The rows of a group are a batch (n, L), so the attention of all texts is a few ordinary attentions,
of views of the packed matrix.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers.dropout import dropout

# All kernels but cuDNN's. From torch 2.11 on, recent GPUs would take it for a mask that needs no
# gradient, and NaN gradients (pytorch issue 196678) and wrong numbers (191612) are reported for it.
# Flash attention refuses masks on a GPU, so the memory-efficient kernel computes them.
KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class Group(NamedTuple):
    """Describe n neighbouring texts of L rows each."""
    n: int
    L: int
    # (1 or n, 1 or H, 1 or L, L), added to the scores: relative positions, and -inf at padded keys;
    # None: neither
    bias: torch.Tensor


def make_groups(shapes, is_real, position_bias=None):
    """Return the Groups of these Shapes. They serve all layers that have this position_bias.

    is_real: (S) bool, False at padding. position_bias: (H, L, L) for the longest text, or None.
    """
    dtype = torch.float32
    if is_real.is_cuda and torch.is_autocast_enabled("cuda"):  # the type of queries and keys
        dtype = torch.get_autocast_dtype("cuda")
    if position_bias is not None:
        position_bias = position_bias.to(dtype)
    groups = []
    sizes = [shape.n * shape.L for shape in shapes]
    for (n, L, is_padded), real_rows in zip(shapes, is_real.split(sizes)):
        bias = None if position_bias is None else position_bias[None, :, :L, :L]
        if is_padded:
            padding = torch.zeros(n, 1, 1, L, dtype=dtype, device=is_real.device)
            padding = padding.masked_fill(~real_rows.view(n, 1, 1, L), float("-inf"))
            bias = padding if bias is None else bias + padding              # (n, 1 or H, 1 or L, L)
        groups.append(Group(n, L, bias))
    return groups


def packed_attention(qkv, groups, p=0.0, scale=1.0):
    """Return the self-attention (S, H * d) of packed texts, computed group by group.

    qkv: (S, 3, H, d) queries, keys and values. p: the probability of dropping an attention weight.
    """
    outputs = []
    rows = [group.n * group.L for group in groups]
    q, k, v = (x.split(rows) for x in qkv.unbind(1))
    for group, *parts in zip(groups, q, k, v):
        # (n * L, H, d) -> (n, H, L, d)
        parts = [x.unflatten(0, (group.n, group.L)).transpose(1, 2) for x in parts]
        y = attention(*parts, group.bias, p, scale)
        outputs.append(y.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).flatten(1)


def attention(q, k, v, bias, p, scale):
    """Return dropout(softmax(scale * q k' + bias)) v for a padded batch (n, H, L, d); bias is None
    or broadcasts to (n, H, L, L).

    On a CPU torch's fused form takes half the time without gradients, but longer with them.
    """
    if q.is_cuda or not torch.is_grad_enabled():
        return fused_attention(q, k, v, bias, p, scale)
    return plain_attention(q, k, v, bias, p, scale)


def plain_attention(q, k, v, bias, p, scale):
    """Compute attention in textbook form."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if bias is not None:
        scores = scores + bias
    return dropout(torch.softmax(scores, -1), p).to(v.dtype) @ v


def fused_attention(q, k, v, bias, p, scale):
    """Compute attention by torch's scaled_dot_product_attention."""
    n, H, L, _ = q.shape
    mask = None if bias is None else bias.to(q.dtype).expand(n, H, L, k.shape[2])
    with sdpa_kernel(KERNELS):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
