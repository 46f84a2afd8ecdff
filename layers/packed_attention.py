"""Self-attention over texts that lie side by side without padding, shared by the reader's and the
retriever's encoders.

All real tokens of a batch are the rows of one (S, D) matrix, so linear layers, norms and dropout
waste nothing on padding. Only attention must know where texts begin: neighbours of similar length
are padded to a small batch and attend there.

    lengths [3, 2]      rows of the packed matrix   a1 a2 a3 b1 b2
    one group           (n = 2, L = 3)              a1 a2 a3
                                                    b1 b2 --   the padded key scores -inf
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from layers.dropout import dropout

# tokens that attend at a time: on a CPU what its cache holds
GROUP_TOKENS = {"cpu": 1024, "cuda": 16384}


class Group(NamedTuple):
    """Neighbouring texts of similar length whose attention is one padded batch of n texts of L
    tokens.
    """
    start: int                     # rows start .. end of the packed tokens are the group's
    end: int
    n: int
    L: int
    # (n * L) the group's row at each position, a neighbour's at padding; None: nothing is padded
    padded_rows: torch.Tensor
    # (end - start) positions of the n * L that hold real tokens; None: nothing is padded
    real_positions: torch.Tensor
    padding: torch.Tensor  # (n, 1, 1, L) float, -inf at padded keys; None: nothing is padded


def split_by_length(lengths, most_tokens, most_texts=None):
    """Yields (first, last) of runs of texts whose lengths come in falling order.

    A run has at most `most_tokens` tokens when padded to its longest text, or one text, and at most
    `most_texts` texts.
    """
    first = 0
    while first < len(lengths):
        n = max(1, most_tokens // max(1, lengths[first]))
        if most_texts is not None:
            n = min(n, most_texts)
        last = min(first + n, len(lengths))
        yield first, last
        first = last


def group_texts(lengths, device):
    """Groups of at most GROUP_TOKENS tokens of texts whose lengths come in falling order."""
    groups, start = [], 0
    for first, last in split_by_length(lengths, GROUP_TOKENS[device.type]):
        group_lengths = lengths[first:last]
        n, L, end = len(group_lengths), group_lengths[0], start + sum(group_lengths)
        padded_rows = real_positions = padding = None
        if group_lengths[-1] < L:
            limits = torch.tensor(group_lengths, device=device)[:, None]             # (n, 1)
            is_real = torch.arange(L, device=device) < limits                        # (n, L)
            padded_rows = is_real.flatten().cumsum(0) - 1
            real_positions = is_real.flatten().nonzero().squeeze(1)
            padding = torch.zeros(n, L, device=device).masked_fill(~is_real, float("-inf"))
            padding = padding[:, None, None]                             # (n, L) -> (n, 1, 1, L)
        groups.append(Group(start, end, n, L, padded_rows, real_positions, padding))
        start = end
    return groups


def packed_attention(q, k, v, groups, bias=None, p=0.0, scale=1.0):
    """Self-attention of packed texts, (S, H * d), a group at a time.

    q, k, v (S, H, d); bias (H, L, L) of relative positions or None; p the dropout of the
    probabilities.
    """
    outputs = []
    for group in groups:
        group_bias = group.padding
        if bias is not None:
            group_bias = bias[None, :, :group.L, :group.L]
            if group.padding is not None:
                group_bias = group_bias + group.padding  # (n, H, L, L)
        # (n, H, L, d)
        y = attention(pad(q, group), pad(k, group), pad(v, group), group_bias, p, scale)
        outputs.append(unpad(y, group))
    return torch.cat(outputs).flatten(1)


def pad(packed, group):
    """(S, H, d) to the group's padded batch (n, H, L, d)."""
    rows = packed[group.start:group.end]
    if group.padded_rows is not None:
        rows = rows.index_select(0, group.padded_rows)
    return rows.view(group.n, group.L, *rows.shape[1:]).transpose(1, 2)


def unpad(y, group):
    """(n, H, L, d) to the group's real rows (end - start, H, d)."""
    rows = y.transpose(1, 2).flatten(0, 1)
    if group.real_positions is not None:
        rows = rows.index_select(0, group.real_positions)
    return rows


def attention(q, k, v, bias, p, scale):
    """dropout(softmax(scale * q k' + bias)) v of a padded batch (n, H, L, d); bias broadcasts to
    (n, H, L, L), or None.

    On a CPU torch's fused form takes half the time without gradients, but longer with them.
    """
    if q.is_cuda or not torch.is_grad_enabled():
        return fused_attention(q, k, v, bias, p, scale)
    return plain_attention(q, k, v, bias, p, scale)


def plain_attention(q, k, v, bias, p, scale):
    """Attention in textbook form."""
    scores = (q @ k.transpose(-1, -2)).float() * scale
    if bias is not None:
        scores = scores + bias
    return dropout(torch.softmax(scores, -1), p).to(v.dtype) @ v


def fused_attention(q, k, v, bias, p, scale):
    """The same by torch's scaled_dot_product_attention."""
    n, H, L, _ = q.shape
    mask = None if bias is None else bias.to(q.dtype).expand(n, H, L, k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
