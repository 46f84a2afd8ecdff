"""T5's layers (arXiv 1910.10683) for Fusion-in-Decoder, with the weights of transformers' T5.

The encoder computes on packed tokens: the real tokens of many passages are the rows of one (S, D)
matrix (packed_attention.py). In the decoder a short target attends to a memory of tens of thousands
of tokens, without computing their keys and values. Under autocast matrix products are computed in
bfloat16; norms, softmax and the residual stream stay float32.
"""
import torch
from torch.utils.checkpoint import checkpoint

from layers.dropout import dropout
from layers.packed_attention import packed_attention

# ---------------------------------------------------------------- encoder

def encode(stack, chunks, use_checkpoint=False):
    """Return the last hidden states [(S, D)] of chunks [(ids, groups)] of packed token ids (S) with
    their Groups. All chunks pass one block before the next.

    use_checkpoint: keep only the inputs of each block, and compute the block again in the backward
    pass.
    """
    p = stack.dropout.p if stack.training else 0.0
    longest = max((group.L for _, groups in chunks for group in groups), default=1)
    xs = [dropout(stack.embed_tokens(ids), p) for ids, _ in chunks]  # [(S, D)]
    for block in stack.block:
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:  # T5: block 0; umT5: each
            bias = attention.compute_bias(longest, longest)[0]  # (H, L, L)
        for i, (_, groups) in enumerate(chunks):
            if use_checkpoint:
                xs[i] = checkpoint(encode_block, block, xs[i], bias, groups, p,
                                   use_reentrant=False)
            else:
                xs[i] = encode_block(block, xs[i], bias, groups, p)
    return [dropout(stack.final_layer_norm(x), p) for x in xs]


def encode_block(block, x, bias, groups, p):
    """Return the states (S, D) after a block of the encoder; p is the dropout probability."""
    self_attention, feed_forward_layer = block.layer
    x = x + encoder_attention(self_attention, x, bias, groups, p)
    return x + feed_forward(feed_forward_layer, x, p)


def encoder_attention(layer, x, bias, groups, p):
    """Return what a self-attention layer adds to the packed states x (S, D)."""
    attention = layer.SelfAttention
    normed = layer.layer_norm(x)
    q, k, v = (split_heads(linear(normed), attention)
               for linear in (attention.q, attention.k, attention.v))
    y = packed_attention(q, k, v, groups, bias, p)  # (S, H * d)
    return dropout(attention.o(y), p)


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
    without the bias. use_checkpoint: compute the cross-attention again in the backward pass.
    """
    p = stack.dropout.p if stack.training else 0.0
    past = cache[0][0].shape[2] if cache else 0
    x = dropout(stack.embed_tokens(ids), p)  # (B, T, D)
    for index, block in enumerate(stack.block):
        self_attention, crossing, feed_forward_layer = block.layer
        if self_attention.SelfAttention.has_relative_attention_bias:  # T5: block 0; umT5: each
            causal_bias = make_causal_bias(self_attention.SelfAttention, past, ids.shape[1],
                                           ids.device)
        x = x + decoder_self_attention(self_attention, x, causal_bias, cache, index, p)

        attention, normed = crossing.EncDecAttention, crossing.layer_norm(x)
        if use_checkpoint:
            y = checkpoint(cross_attention, attention, normed, memory, memory_bias, p,
                           use_reentrant=False)
        else:
            y = cross_attention(attention, normed, memory, memory_bias, p, raw_scores)
        x = x + dropout(attention.o(y), p)

        x = x + feed_forward(feed_forward_layer, x, p)
    return dropout(stack.final_layer_norm(x), p)


def make_causal_bias(attention, past, T, device):
    """Return the bias (1, H, T, past + T) of T targets after `past` earlier ones: the relative
    position bias, with -inf at later targets.
    """
    bias = attention.compute_bias(T, past + T, past_seen_tokens=past)
    later = torch.full((T, past + T), float("-inf"), device=device).triu(past + 1)
    return bias + later


def decoder_self_attention(layer, x, bias, cache, block_index, p):
    """Return what a self-attention layer adds to the targets' states x (B, T, D)."""
    attention = layer.SelfAttention
    normed = layer.layer_norm(x)
    q, k, v = (split_heads(linear(normed), attention).transpose(1, 2)  # (B, H, T, d)
               for linear in (attention.q, attention.k, attention.v))
    if cache is not None:
        if block_index < len(cache):
            past_k, past_v = cache[block_index]
            k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)  # (B, H, past + T, d)
        cache[block_index:block_index + 1] = [(k, v)]
    probs = torch.softmax((q @ k.transpose(-1, -2)).float() + bias, -1)  # (B, H, T, past + T)
    y = dropout(probs, p).to(v.dtype) @ v  # (B, H, T, d)
    return dropout(attention.o(y.transpose(1, 2).flatten(2)), p)  # (B, T, H * d) -> (B, T, D)


def plain_cross_attention(attention, x, memory, bias, p, raw_scores=None):
    """Return the cross-attention (B, T, H * d) in textbook form, with a key and a value for every
    memory token; cross_attention is tested against it.
    """
    q = split_heads(attention.q(x), attention).transpose(1, 2)  # (B, H, T, d)
    k = split_heads(attention.k(memory), attention).transpose(1, 2)  # (B, H, M, d)
    v = split_heads(attention.v(memory), attention).transpose(1, 2)  # (B, H, M, d)
    scores = (q @ k.transpose(-1, -2)).float()  # (B, H, T, M)
    if raw_scores is not None:
        raw_scores.append(scores)
    probs = dropout(torch.softmax(scores + bias, -1), p).to(v.dtype)
    return (probs @ v).transpose(1, 2).flatten(2)  # (B, T, H * d)


def cross_attention(attention, x, memory, bias, p, raw_scores=None):
    """Return the cross-attention (B, T, H * d) of x (B, T, D), with the projections of keys and
    values applied to the targets instead of the memory.

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
    if raw_scores is not None:
        raw_scores.append(scores)
    probs = dropout(torch.softmax(scores + bias, -1), p).to(memory.dtype)
    mixed = (probs.flatten(1, 2) @ memory).unflatten(1, (H, -1))  # (B, H, T, D)
    y = torch.einsum("bhtD,hdD->bhtd", mixed, wv)  # (B, H, T, d)
    return y.transpose(1, 2).flatten(2)  # (B, T, H * d)
