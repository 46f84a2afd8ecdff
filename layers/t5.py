"""T5's layers (arXiv 1910.10683) in the shapes of Fusion-in-Decoder, computed with the modules of
transformers' T5.

Encoder: the real tokens of many passages lie side by side in one (S, D) matrix
(packed_attention.py). Decoder: a short target attends to a memory of tens of thousands of tokens
whose keys and values are never computed. Under autocast to bfloat16 the matrix products run in it;
norms, softmax and the residual stream stay float32.
"""
import torch
from torch.utils.checkpoint import checkpoint

from layers.dropout import dropout
from layers.packed_attention import packed_attention

# ---------------------------------------------------------------- encoder

def encode(stack, chunks, use_checkpoint=False):
    """Return the last hidden states [(S, D)] of chunks [(ids, groups)]: packed token ids (S), and
    which rows are one passage. All chunks pass one block before the next.

    use_checkpoint: keep only the inputs of each block, and compute the block again in the backward
    pass.
    """
    p = dropout_rate(stack)
    longest = max((group.L for _, groups in chunks for group in groups), default=1)
    xs = [dropout(stack.embed_tokens(ids), p) for ids, _ in chunks]  # [(S, D)]
    for block in stack.block:
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:  # T5's first block, each of umT5's
            bias = attention.compute_bias(longest, longest)[0]  # (H, L, L)
        for i, (_, groups) in enumerate(chunks):
            if use_checkpoint:
                xs[i] = checkpoint(encode_block, block, xs[i], bias, groups, p,
                                   use_reentrant=False)
            else:
                xs[i] = encode_block(block, xs[i], bias, groups, p)
    return [dropout(stack.final_layer_norm(x), p) for x in xs]


def encode_block(block, x, bias, groups, p):
    """The states (S, D) after a block of the encoder."""
    self_attention, feed_forward_layer = block.layer
    x = x + encoder_attention(self_attention, x, bias, groups, p)
    return x + feed_forward(feed_forward_layer, x, p)


def dropout_rate(stack):
    """The dropout probability that holds now: 0 in evaluation."""
    return stack.dropout.p if stack.training else 0.0


def encoder_attention(layer, x, bias, groups, p):
    """What a self-attention layer adds to the packed states x (S, D)."""
    attention = layer.SelfAttention
    normed = layer.layer_norm(x)
    q, k, v = (split_heads(linear(normed), attention)
               for linear in (attention.q, attention.k, attention.v))
    y = packed_attention(q, k, v, groups, bias, p)  # (S, H * d)
    return dropout(attention.o(y), p)


def split_heads(x, attention):
    """(..., H * d) -> (..., H, d)."""
    return x.unflatten(-1, (attention.n_heads, attention.key_value_proj_dim))


def feed_forward(layer, x, p):
    """What a feed-forward layer adds to x (..., D), whether T5's (ReLU) or v1.1's (gated)."""
    dense = layer.DenseReluDense
    normed = layer.layer_norm(x)
    if hasattr(dense, "wi_0"):
        hidden = dense.act(dense.wi_0(normed)) * dense.wi_1(normed)
    else:
        hidden = dense.act(dense.wi(normed))
    return dropout(dense.wo(dropout(hidden, p)), p)


# ---------------------------------------------------------------- decoder

def decode(stack, ids, memory, memory_bias, cache=None, raw_scores=None, use_checkpoint=False):
    """Return last hidden states (B, T, D) of the target ids (B, T), which attend to the memory (B,
    M, D).

    memory_bias (B, 1 or H, 1 or T, M) is added to the cross-attention's scores. `cache`, a list,
    holds each block's past keys and values, empty at first: the ids follow on what it holds.
    `raw_scores`, a list, receives each layer's cross-attention scores (B, H, T, M) without the
    bias.
    """
    p = dropout_rate(stack)
    past = cache[0][0].shape[2] if cache else 0
    x = dropout(stack.embed_tokens(ids), p)  # (B, T, D)
    for i, block in enumerate(stack.block):
        attention = block.layer[0].SelfAttention
        if attention.has_relative_attention_bias:  # T5's first block, each of umT5's
            causal_bias = make_causal_bias(attention, past, ids.shape[1], ids.device)
        x = decode_block(block, x, memory, memory_bias, causal_bias, cache, i, p, raw_scores,
                         use_checkpoint)
    return dropout(stack.final_layer_norm(x), p)


def decode_block(block, x, memory, memory_bias, causal_bias, cache, index, p, raw_scores,
                 use_checkpoint):
    """The targets' states (B, T, D) after the decoder's block of this index."""
    self_attention, crossing, feed_forward_layer = block.layer
    x = x + decoder_self_attention(self_attention, x, causal_bias, cache, index, p)

    normed = crossing.layer_norm(x)
    if use_checkpoint:
        y = checkpoint(cross_attention, crossing.EncDecAttention, normed, memory, memory_bias, p,
                       use_reentrant=False)
    else:
        y = cross_attention(crossing.EncDecAttention, normed, memory, memory_bias, p, raw_scores)
    x = x + dropout(crossing.EncDecAttention.o(y), p)

    return x + feed_forward(feed_forward_layer, x, p)


def make_causal_bias(attention, past, T, device):
    """Return (1, H, T, past + T): relative position bias of T targets after `past` ones, -inf at
    later targets.
    """
    bias = attention.compute_bias(T, past + T, past_seen_tokens=past)
    later = torch.full((T, past + T), float("-inf"), device=device).triu(past + 1)
    return bias + later


def decoder_self_attention(layer, x, bias, cache, block_index, p):
    """What a self-attention layer adds to the targets' states x (B, T, D)."""
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
    """Cross-attention in textbook form, (B, T, H * d): every memory token gets a key and a value.

    What cross_attention is tested against.
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
    """The same, (B, T, H * d), with the projections folded into the side of x (B, T, D).

    A memory token m (D) has the key Wk m and the value Wv m of size d, so that for a head's query q
    (d) and its probabilities P

        score  = q . (Wk m) = (transpose(Wk) q) . m
        result = sum of P (Wv m) = Wv (sum of P m)

    Folding takes H T D multiplications per memory token instead of H d D for its key, less while
    there are T < d targets. No layer keeps keys and values, and generation needs no cache of them.
    Measured on t5-small with 10 passages, 2 cores (bench/reader.py, readers ours and "plain
    cross-attention"): a training step is 1.1 times as fast. That alone would not pay; that nothing
    of the memory's size is kept per layer does.
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
