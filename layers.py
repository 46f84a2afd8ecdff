"""T5's layers (arXiv 1910.10683) as functions over the weights of transformers' modules, written for Fusion-in-Decoder's shapes.

Encoder: all real tokens of a chunk of passages lie in one (S, D) matrix; only attention sees passages, a group at a time.
Decoder: a short target against a memory of tens of thousands of tokens, whose keys and values are never projected.
Each autograd Function keeps for the backward pass only what it cannot cheaply compute again. Weights stay float32; with
autocast to bfloat16 the matrix products run in it, norms, softmax and the residual stream in float32.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dropout import ActDropped, AddDropped, GatedDropped, random_bits, threshold

GROUP_TOKENS = {"cpu": 1024, "cuda": 16384}  # attended at a time: on a CPU what its cache holds


class Group(NamedTuple):
    """Neighbouring passages of similar length whose attention is computed as one padded batch."""
    start: int     # rows start .. end of the packed tokens
    end: int
    count: int     # passages
    length: int    # of the longest
    spread: object  # (count * length) row for each place, a neighbouring one for padding; None if nothing is padded
    real: object    # (end - start) the real tokens' places
    padding: object  # (count, 1, 1, length) float, -inf at padded keys


def group_passages(sizes, device, tokens=None):
    """Groups of at most `tokens` (GROUP_TOKENS) tokens of passages whose sizes come in falling order."""
    groups, first, start = [], 0, 0
    while first < len(sizes):
        length = sizes[first]
        own = sizes[first:first + max(1, (tokens or GROUP_TOKENS[device.type]) // length)]
        spread = real = padding = None
        if own[-1] < length:
            mask = torch.arange(length, device=device) < torch.tensor(own, device=device)[:, None]  # (count, length)
            spread, real = mask.flatten().cumsum(0) - 1, mask.flatten().nonzero().squeeze(1)
            padding = torch.zeros(mask.shape, device=device).masked_fill_(~mask, float("-inf"))[:, None, None]
        groups.append(Group(start, start + sum(own), len(own), length, spread, real, padding))
        first, start = first + len(own), start + sum(own)
    return groups


def compute_dtype(device):
    """The type that products are computed in: autocast's where it is on, else float32."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32


# ---------------------------------------------------------------------------------------------------- norm and projections

class NormLinear(torch.autograd.Function):
    """T5LayerNorm, then one product with all the weights side by side; only x and its root mean square are kept.

    x (..., D) float32, weights (K_i, D): (..., sum K_i) in `dtype`.
    """

    @staticmethod
    def forward(ctx, x, scale, eps, dtype, *weights):
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, rms, scale, *weights)
        ctx.dtype = dtype
        if rms.numel() < sum(map(len, weights)):  # few rows: leave the weights as they lie
            normed = (x * rms * scale).to(dtype)
            return torch.cat([F.linear(normed, weight.to(dtype)) for weight in weights], -1)
        return F.linear((x * rms).to(dtype), (side_by_side(weights) * scale).to(dtype))

    @staticmethod
    def backward(ctx, grad):
        x, rms, scale, *weights = ctx.saved_tensors
        weight, unit = side_by_side(weights), x * rms                                       # (K, D), (..., D)
        dscaled = (grad.flatten(0, -2).t() @ unit.flatten(0, -2).to(ctx.dtype)).float()     # of weight * scale
        dscale = (dscaled * weight).sum(0)
        dweights = dscaled.mul_(scale).split([len(w) for w in weights])
        dunit = (grad @ (weight * scale).to(ctx.dtype)).float()
        along = (dunit * unit).sum(-1, keepdim=True)
        return dunit.addcmul_(unit, along, value=-1 / x.shape[-1]).mul_(rms), dscale, None, None, *dweights


def side_by_side(weights):
    """Several linear layers' weights as one."""
    return weights[0] if len(weights) == 1 else torch.cat(weights)


def norm_linear(x, norm, linears, dtype):
    """The outputs of linear layers, side by side, of T5's norm of x."""
    return NormLinear.apply(x, norm.weight, norm.variance_epsilon, dtype, *(linear.weight for linear in linears))


# ---------------------------------------------------------------------------------------------------- attention

class PackedAttention(torch.autograd.Function):
    """Self-attention of packed passages, a group at a time: ctx = dropout(softmax(q k' + bias)) v.

    qkv (S, 3 * H * d), bias (H, L, L) float32 or None: (S, H * d). One tensor is kept besides qkv and the result: the
    probabilities, negative where dropped.
    """

    @staticmethod
    def forward(ctx, qkv, bias, heads, groups, p):
        out, kept = qkv.new_empty(len(qkv), qkv.shape[1] // 3), []
        for group in groups:
            q, k, v = unpack(qkv, group, 3, heads)
            probs = (q @ k.transpose(-1, -2)).float()
            if bias is not None:
                probs += bias[:, :group.length, :group.length]
            if group.padding is not None:
                probs += group.padding
            torch.softmax(probs, -1, out=probs)
            if p:
                probs.copysign_(random_bits(probs.shape, qkv.device).float().add_(0.5 - threshold(p)))
            probs = probs.to(qkv.dtype)
            kept.append(probs)
            result = (probs.relu() if p else probs) @ v.mul_(1 / (1 - p))
            out[group.start:group.end] = pack(result[None], group)
        ctx.save_for_backward(qkv, out, bias, *kept)
        ctx.heads, ctx.groups, ctx.p = heads, groups, p
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, bias, *kept = ctx.saved_tensors
        dqkv, dbias, heads = torch.empty_like(qkv), None if bias is None else torch.zeros_like(bias), ctx.heads
        for group, probs in zip(ctx.groups, kept):
            q, k, v = unpack(qkv, group, 3, heads)
            do, = unpack(grad, group, 1, heads)
            o, = unpack(out, group, 1, heads)
            if group.padding is not None:  # a padded query passes nothing on
                do.masked_fill_(group.padding.transpose(2, 3) < 0, 0)
            delta = (do * o).float().sum(-1, keepdim=True)                                 # sum over keys of p * dp
            do.mul_(1 / (1 - ctx.p))
            dv = (probs.relu() if ctx.p else probs).transpose(-1, -2) @ do
            ds = (do @ v.transpose(-1, -2)).float()                                        # dp, then the scores' gradient
            positive = probs.float()
            if ctx.p:
                torch.ops.aten.threshold_backward.grad_input(ds, positive, 0, grad_input=ds)
                positive = positive.abs_() if positive is not probs else positive.abs()
            ds.sub_(delta).mul_(positive)
            if bias is not None:
                dbias[:, :group.length, :group.length] += ds.sum(0)
            ds = ds.to(qkv.dtype)
            dqkv[group.start:group.end] = pack(torch.stack([ds @ k, ds.transpose(-1, -2) @ q, dv]), group)
        return dqkv, dbias, None, None, None


def unpack(packed, group, parts, heads):
    """(parts, count, H, length, d), a copy, of a group's rows (start .. end, parts * H * d); finite at the padding."""
    return spread(packed, group, parts, heads).clone(memory_format=torch.contiguous_format)


def spread(packed, group, parts, heads):
    """The same as a view of the rows, or of their copy where there is padding."""
    rows = packed[group.start:group.end]
    rows = rows if group.spread is None else rows.index_select(0, group.spread)
    return rows.view(group.count, group.length, parts, heads, -1).permute(2, 0, 3, 1, 4)


def pack(parts, group):
    """The inverse of unpack: (parts, count, H, length, d) to the group's real rows."""
    rows = parts.permute(1, 3, 0, 2, 4).reshape(group.count * group.length, -1)
    return rows if group.spread is None else rows.index_select(0, group.real)


def sdpa_attention(qkv, bias, heads, groups, p):
    """The same by torch's scaled_dot_product_attention, for GPUs; PackedAttention is what its test compares it with."""
    out = []
    for group in groups:
        q, k, v = spread(qkv, group, 3, heads)
        mask = group.padding if bias is None else bias[None, :, :group.length, :group.length]
        if bias is not None and group.padding is not None:
            mask = mask + group.padding
        mask = None if mask is None else mask.to(qkv.dtype).expand(group.count, heads, group.length, -1)
        out.append(pack(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=1.0)[None], group))
    return torch.cat(out)


ATTENTION = {"cpu": PackedAttention.apply, "cuda": sdpa_attention}


def cross_attention(module, q, memory, bias, p, raw=None):
    """What the queries q (B, T, H * d) read in memory (B, M, D): (B, T, H * d), not yet through the output projection.

    With q = x Wq, the scores q (m Wk)' equal (q Wk') m', and P (m Wv) equals (P m) Wv: while T is small it costs less to
    fold the projections into the targets' side than to project M memory tokens. bias is (B, 1 or H, 1 or T, M).
    `raw`, a list, receives the scores without the bias.
    """
    T, (M, D), H, d = q.shape[1], memory.shape[1:], module.n_heads, module.key_value_proj_dim
    q = q.unflatten(-1, (H, d))                                                            # (B, T, H, d)
    fold = H * T * (M + d) * D <= H * d * M * D + H * T * M * d                            # multiplications per product
    wk, wv = (linear.weight.to(q.dtype if fold else memory.dtype).view(H, d, D) for linear in (module.k, module.v))
    if fold:
        folded = torch.einsum("bthd,hdm->bhtm", q, wk).flatten(1, 2).to(memory.dtype)      # (B, H * T, D)
        scores = (memory @ folded.transpose(1, 2)).transpose(1, 2).unflatten(1, (H, T))
    else:
        scores = q.transpose(1, 2).to(memory.dtype) @ torch.einsum("bmc,hdc->bhdm", memory, wk)
    scores = scores.float().contiguous()                                                   # (B, H, T, M)
    if raw is not None:
        raw.append(scores)
    probs = F.dropout(torch.softmax(scores + bias, -1), p, p > 0).to(memory.dtype)
    if fold:
        read = (probs.flatten(1, 2) @ memory).unflatten(1, (H, T)).to(q.dtype)             # (B, H, T, D)
        return torch.einsum("bhtm,hdm->bthd", read, wv).flatten(2)
    return (probs @ torch.einsum("bmc,hdc->bhmd", memory, wv)).transpose(1, 2).flatten(2).to(q.dtype)


# ---------------------------------------------------------------------------------------------------- encoder and decoder

def add_linear(x, y, linear, p, scale=1.0):
    """x + scale * dropout(linear(y)), the end of every layer."""
    return AddDropped.apply(x, F.linear(y, linear.weight.to(y.dtype)), p, scale)


def feed_forward(x, layer, p, dtype):
    """x + the feed-forward layer of x, whether T5's (ReLU) or v1.1's (gated)."""
    dense = layer.DenseReluDense
    gated = hasattr(dense, "wi_0")
    u = norm_linear(x, layer.layer_norm, (dense.wi_0, dense.wi_1) if gated else (dense.wi,), dtype)
    if gated:
        h = GatedDropped.apply(u, dense.act, p)
    elif isinstance(dense.act, nn.ReLU):
        h = ActDropped.apply(u, p)
    else:
        h = F.dropout(dense.act(u), p, p > 0) * (1 - p)
    return add_linear(x, h, dense.wo, p, 1 / (1 - p))


def encode(stack, ids, groups):
    """Last hidden states (S, D) of the packed tokens ids (S) of some passages."""
    p, dtype = stack.dropout.p if stack.training else 0.0, compute_dtype(ids.device)
    with torch.autocast(ids.device.type, enabled=False):
        longest = max(group.length for group in groups)
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(longest, longest)[0]     # (H, L, L)
        x = AddDropped.apply(None, stack.embed_tokens(ids), p, 1.0)
        for block in stack.block:
            attention = block.layer[0].SelfAttention
            qkv = norm_linear(x, block.layer[0].layer_norm, (attention.q, attention.k, attention.v), dtype)
            x = add_linear(x, ATTENTION[ids.device.type](qkv, bias, attention.n_heads, groups, p), attention.o, p)
            x = feed_forward(x, block.layer[1], p, dtype)
        return AddDropped.apply(None, stack.final_layer_norm(x), p, 1.0)


def decode(stack, ids, memory, bias, cache=None, raw=None, use_checkpoint=False):
    """Last hidden states (B, T, D) of the target ids (B, T) that attend to memory (B, M, D) under bias (B, 1 or H, 1 or T, M).

    `cache` is a list, empty at first, of each block's past keys and values; the ids follow on what it holds.
    """
    p, dtype = stack.dropout.p if stack.training else 0.0, compute_dtype(ids.device)
    past, T = cache[0][0].shape[2] if cache else 0, ids.shape[1]
    with torch.autocast(ids.device.type, enabled=False):
        memory = memory.to(dtype)
        dtype = dtype if ids.numel() >= 256 else torch.float32  # for few targets a product costs less than a cast of its weights
        first = stack.block[0].layer[0].SelfAttention
        own_bias = first.compute_bias(T, past + T, past_seen_tokens=past)
        own_bias = own_bias + torch.full((T, past + T), float("-inf"), device=ids.device).triu(past + 1)
        x = AddDropped.apply(None, stack.embed_tokens(ids), p, 1.0)
        for i, block in enumerate(stack.block):
            attention, crossing = block.layer[0].SelfAttention, block.layer[1].EncDecAttention
            qkv = norm_linear(x, block.layer[0].layer_norm, (attention.q, attention.k, attention.v), dtype)
            q, k, v = qkv.unflatten(-1, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
            if cache is not None:
                if past:
                    k, v = (torch.cat([old, new], 2) for old, new in zip(cache[i], (k, v)))
                cache[i:i + 1] = [(k, v)]
            probs = torch.softmax((q @ k.transpose(-1, -2)).float() + own_bias, -1)
            y = (F.dropout(probs, p, p > 0).to(dtype) @ v).transpose(1, 2).flatten(2)
            x = add_linear(x, y, attention.o, p)
            q = norm_linear(x, block.layer[1].layer_norm, (crossing.q,), dtype)
            if use_checkpoint:
                y = checkpoint(cross_attention, crossing, q, memory, bias, p, use_reentrant=False)
            else:
                y = cross_attention(crossing, q, memory, bias, p, raw)
            x = add_linear(x, y, crossing.o, p)
            x = feed_forward(x, block.layer[2], p, dtype)
        return AddDropped.apply(None, stack.final_layer_norm(x), p, 1.0)
