"""Self-attention over packed texts, for the encoders of the reader and of the retriever.

Packed means that the real tokens of all texts are the rows of one (S, D) matrix, so linear layers,
norms and dropout waste nothing on padding. Only attention depends on where texts begin: a few
neighbouring texts of similar length are padded to a small batch, and attention is computed there.

    lengths [3, 2]      rows of the packed matrix   a1 a2 a3 b1 b2
    one group           (n = 2, L = 3)              a1 a2 a3
                                                    b1 b2 --   the padding's score is -inf
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F

from layers.dropout import dropout

# tokens, padding included, whose attention is computed at a time; a CPU's cache holds 1024
GROUP_TOKENS = {"cpu": 1024, "cuda": 16384}
CHUNK_TOKENS = {"cpu": 4096, "cuda": 32768}  # tokens, padding included, encoded at a time


class Group(NamedTuple):
    """Describe n neighbouring texts of similar length, whose attention is computed as one batch
    padded to L tokens. Without padding the three tensors are None.
    """
    start: int                    # the group has rows start .. end of the packed matrix
    end: int
    n: int
    L: int
    padded_rows: torch.Tensor     # (n * L) the group's row at each position; any row at padding
    real_positions: torch.Tensor  # (end - start) positions in n * L that hold real tokens
    padding: torch.Tensor         # (n, 1, 1, L) float, -inf at padded keys


def split_by_length(lengths, most_tokens, most_texts=None):
    """Yield (first, last) of consecutive runs of texts, whose lengths are given in falling order.

    A run, padded to its longest text, has at most `most_tokens` tokens, unless it is a single text,
    and at most `most_texts` texts.
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
    """Return Groups of at most GROUP_TOKENS tokens; lengths of texts are in falling order."""
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
    """Return the self-attention (S, H * d) of packed texts, computed group by group.

    q, k, v: (S, H, d). bias: (H, L, L) of relative positions, or None. p: the probability of
    dropping an attention weight.
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
    """Return the padded batch (n, H, L, d) of a group of packed rows (S, H, d)."""
    rows = packed[group.start:group.end]
    if group.padded_rows is not None:
        rows = rows.index_select(0, group.padded_rows)
    return rows.view(group.n, group.L, *rows.shape[1:]).transpose(1, 2)


def unpad(y, group):
    """Return the real rows (end - start, H, d) of a group's padded batch (n, H, L, d)."""
    rows = y.transpose(1, 2).flatten(0, 1)
    if group.real_positions is not None:
        rows = rows.index_select(0, group.real_positions)
    return rows


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
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=scale)
