"""T5's layers (arXiv 1910.10683) for Fusion-in-Decoder, with the weights of transformers' T5.

The encoder computes on packed tokens: the tokens of many passages are the rows of one (S, D) matrix
(packing.py). In the decoder a short target attends to a memory of tens of thousands of tokens,
without computing their keys and values. Under autocast matrix products are computed in bfloat16;
norms, softmax and the residual stream stay float32. On a GPU the functions marked as a region are
compiled (regions.py).
"""
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from layers.dropout import dropout
from layers.packed_attention import make_groups, packed_attention
from layers.regions import region

# ---------------------------------------------------------------- encoder

def encode(stack, ids, is_real, shapes):
    """Return the last hidden states (S, D) of a chunk of packed token ids (S); see
    packing.split_chunks. The blocks of the stack are CheckpointWrappers (model.py).
    """
    p = stack.dropout.p if stack.training else 0.0
    longest = max(shape.L for shape in shapes)
    x = dropout(stack.embed_tokens(ids), p)  # (S, D)
    for block in stack.block:
        attention = block.module.layer[0].SelfAttention
        if attention.has_relative_attention_bias:  # T5: block 0; umT5: each
            position_bias = attention.compute_bias(longest, longest)[0]  # (H, L, L)
            groups = make_groups(shapes, is_real, position_bias)
        x = block(x, groups, p)
    return dropout(stack.final_layer_norm(x), p)


def encode_block(block, x, groups, p):
    """Return the states (S, D) after a block of the encoder; p is the dropout probability."""
    qkv = project(block.layer[0], x)
    y = packed_attention(qkv, groups, p)  # (S, H * d)
    return finish_block(block, x, y, p)


@region
def project(layer, x):
    """Return the queries, keys and values (S, 3, H, d) of a self-attention layer, by one matrix
    product of the packed states x (S, D).
    """
    attention = layer.SelfAttention
    weights = torch.cat([attention.q.weight, attention.k.weight, attention.v.weight])
    qkv = F.linear(layer.layer_norm(x), weights)  # (S, 3 * H * d)
    return qkv.unflatten(-1, (3, attention.n_heads, attention.key_value_proj_dim))


@region
def finish_block(block, x, y, p):
    """Return the states (S, D) after a block, from those before it and the result of its attention
    y (S, H * d).
    """
    self_attention, feed_forward_layer = block.layer
    x = x + dropout(self_attention.SelfAttention.o(y), p)
    return x + feed_forward(feed_forward_layer, x, p)


def split_heads(x, attention):
    """Reshape (..., H * d) -> (..., H, d)."""
    return x.unflatten(-1, (attention.n_heads, attention.key_value_proj_dim))


def feed_forward(layer, x, p):
    """Return what a feed-forward layer adds to x (..., D): T5's with ReLU, or v1.1's gated one."""
    dense = layer.DenseReluDense
    normed = layer.layer_norm(x)
    if hasattr(dense, "wi_0"):
        hidden = dense.act(dense.wi_0(normed)) * dense.wi_1(normed)
    else:
        hidden = dense.act(dense.wi(normed))
    return dropout(dense.wo(dropout(hidden, p)), p)


# ---------------------------------------------------------------- decoder

def decode(stack, ids, memory, memory_bias, cache=None, raw_scores=None, use_checkpoint=False):
    """Return the last hidden states (B, T, D) of the target ids (B, T), which attend to the memory
    (B, M, D).

    memory_bias (B, 1 or H, 1 or T, M) is added to the cross-attention's scores. `cache`, a list,
    holds the keys and values of the earlier ids in each block; it is empty before the first ids,
    and extended here. `raw_scores`, a list, gets each block's cross-attention scores (B, H, T, M)
    without the bias. use_checkpoint: compute each block again in the backward pass.
    """
    p = stack.dropout.p if stack.training else 0.0
    past_length = cache[0][0].shape[2] if cache else 0
    x = dropout(stack.embed_tokens(ids), p)  # (B, T, D)
    for index, block in enumerate(stack.block):
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:  # T5: block 0; umT5: each
            causal_bias = make_causal_bias(attention, past_length, ids.shape[1], ids.device)
        past = cache[index] if past_length else None
        inputs = block, x, causal_bias, memory, memory_bias, p, past, raw_scores is not None
        if use_checkpoint:
            x, present, scores = checkpoint(decode_block, *inputs, use_reentrant=False)
        else:
            x, present, scores = decode_block(*inputs)
        if cache is not None:
            cache[index:index + 1] = [present]
        if raw_scores is not None:
            raw_scores.append(scores)
    return dropout(stack.final_layer_norm(x), p)


def make_causal_bias(attention, past, T, device):
    """Return the bias (1, H, T, past + T) of T targets after `past` earlier ones: the relative
    position bias, with -inf at later targets.
    """
    bias = attention.compute_bias(T, past + T, past_seen_tokens=past)
    later = torch.full((T, past + T), float("-inf"), device=device).triu(past + 1)
    return bias + later


@region
def decode_block(block, x, causal_bias, memory, memory_bias, p, past=None, with_scores=False):
    """Return (the targets' states (B, T, D) after a block of the decoder, their keys and values
    with those of the `past`, the cross-attention's scores before the bias or None).
    """
    self_attention, crossing, feed_forward_layer = block.layer
    y, present = decoder_self_attention(self_attention, x, causal_bias, p, past)
    x = x + dropout(y, p)
    y, scores = cross_attention(crossing.EncDecAttention, crossing.layer_norm(x), memory,
                                memory_bias, p)
    x = x + dropout(crossing.EncDecAttention.o(y), p)
    x = x + feed_forward(feed_forward_layer, x, p)
    return x, present, scores if with_scores else None


def decoder_self_attention(layer, x, bias, p, past=None):
    """Return what a self-attention layer adds to the targets' states x (B, T, D), and its keys and
    values (B, H, past + T, d).
    """
    attention = layer.SelfAttention
    normed = layer.layer_norm(x)
    q, k, v = (split_heads(linear(normed), attention).transpose(1, 2)  # (B, H, T, d)
               for linear in (attention.q, attention.k, attention.v))
    if past is not None:
        past_k, past_v = past
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)  # (B, H, past + T, d)
    probs = torch.softmax((q @ k.transpose(-1, -2)).float() + bias, -1)  # (B, H, T, past + T)
    y = dropout(probs, p).to(v.dtype) @ v  # (B, H, T, d)
    return attention.o(y.transpose(1, 2).flatten(2)), (k, v)  # (B, T, H * d) -> (B, T, D)


def plain_cross_attention(attention, x, memory, bias, p):
    """Return the cross-attention (B, T, H * d) in textbook form, with a key and a value for every
    memory token, and its scores (B, H, T, M) before the bias; cross_attention is tested against it.
    """
    q = split_heads(attention.q(x), attention).transpose(1, 2)  # (B, H, T, d)
    k = split_heads(attention.k(memory), attention).transpose(1, 2)  # (B, H, M, d)
    v = split_heads(attention.v(memory), attention).transpose(1, 2)  # (B, H, M, d)
    scores = (q @ k.transpose(-1, -2)).float()  # (B, H, T, M)
    probs = dropout(torch.softmax(scores + bias, -1), p).to(v.dtype)
    return (probs @ v).transpose(1, 2).flatten(2), scores


def cross_attention(attention, x, memory, bias, p):
    """Return the cross-attention (B, T, H * d) of x (B, T, D), with the projections of keys and
    values applied to the targets instead of the memory, and its scores (B, H, T, M) before the
    bias.

    A memory token m (D) has the key Wk m and the value Wv m of size d. For a head's query q (d) and
    its probabilities P, therefore,

        score  = q . (Wk m) = (transpose(Wk) q) . m
        result = sum of P (Wv m) = Wv (sum of P m)

    This takes H T D multiplications per memory token instead of H d D for its key, which is less
    for T < d targets. No layer keeps keys and values of the memory, in training or generation: this
    is the main gain, since a training step is only 1.1 times as fast (t5-small with 10 passages, 2
    cores; bench/reader.py, readers ours and "plain cross-attention").
    """
    H, d, D = attention.n_heads, attention.key_value_proj_dim, memory.shape[-1]
    wk = attention.k.weight.view(H, d, D)  # (H * d, D) -> (H, d, D)
    wv = attention.v.weight.view(H, d, D)
    q = split_heads(attention.q(x), attention).transpose(1, 2)  # (B, H, T, d)
    folded = torch.einsum("bhtd,hdD->bhtD", q, wk).to(memory.dtype)  # (B, H, T, D)
    scores = (folded.flatten(1, 2) @ memory.transpose(1, 2)).float()  # (B, H * T, M)
    scores = scores.unflatten(1, (H, -1))  # (B, H, T, M)
    probs = dropout(torch.softmax(scores + bias, -1), p).to(memory.dtype)
    mixed = (probs.flatten(1, 2) @ memory).unflatten(1, (H, -1))  # (B, H, T, D)
    y = torch.einsum("bhtD,hdD->bhtd", mixed, wv)  # (B, H, T, d)
    return y.transpose(1, 2).flatten(2), scores  # (B, T, H * d)
