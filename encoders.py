"""Text encoders without padding: a transformer's states of packed tokens, pooled to one vector per text.

BERT-shaped models (BERT, DPR, BGE, E5, Contriever, MiniLM, the FiD-KD retriever) run on layers.py's packed attention and
dropout.py's dropout; every other architecture runs in transformers, on texts sorted by length and padded within a chunk.
"""
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dropout import AddDropped
from layers import ATTENTION, compute_dtype, group_passages, sdpa_attention

CHUNK_TOKENS = {"cpu": 4096, "cuda": 32768}  # encoded at a time in float32, twice as many in 16 bits
GROUP_TOKENS = {"cpu": 2048, "cuda": 16384}  # attended at a time without autograd; layers.py's are for PackedAttention


def encode_bert(bert, ids, types, places, groups, weights=None):
    """Last hidden states (S, D) of packed token ids, token types and places in their text, all (S).

    Source: arXiv 1810.04805, as transformers' BertModel computes it. weights: bert_weights, made once for many chunks. Without
    autograd under bfloat16 the residual stream is bfloat16 too, else float32.
    """
    dtype, learns = compute_dtype(ids.device), torch.is_grad_enabled()
    p = bert.config.hidden_dropout_prob if bert.training else 0.0
    p_attention = bert.config.attention_probs_dropout_prob if bert.training else 0.0
    heads, embed = bert.config.num_attention_heads, bert.embeddings
    attend = ATTENTION[ids.device.type] if learns else sdpa_attention
    with torch.autocast(ids.device.type, enabled=False):
        x = embed.word_embeddings(ids) + embed.token_type_embeddings(types) + embed.position_embeddings(places)
        x = AddDropped.apply(None, embed.LayerNorm(x), p, 1.0)
        x = x if learns else x.to(dtype)
        for layer, (qkv, out, up, down) in zip(bert.encoder.layer, weights or bert_weights(bert, dtype)):
            y = attend(F.linear(x.to(dtype), *qkv), None, heads, groups, p_attention)
            x = add_norm(x, F.linear(y, *out), layer.attention.output.LayerNorm, p)
            h = layer.intermediate.intermediate_act_fn(F.linear(x.to(dtype), *up))
            x = add_norm(x, F.linear(h, *down), layer.output.LayerNorm, p)
        return x


def bert_weights(bert, dtype):
    """Per layer (weight, bias) of: queries, keys and values side by side, attention output, feed-forward up and down.

    The attention's scale is folded into the queries' part.
    """
    layers, scale = [], (bert.config.hidden_size / bert.config.num_attention_heads) ** -0.5
    for layer in bert.encoder.layer:
        own = layer.attention.self
        qkv = [torch.cat([getattr(own.query, name) * scale, getattr(own.key, name), getattr(own.value, name)])
               for name in ("weight", "bias")]
        others = [(m.weight, m.bias) for m in (layer.attention.output.dense, layer.intermediate.dense, layer.output.dense)]
        layers.append([[tensor.to(dtype) for tensor in pair] for pair in (qkv, *others)])
    return layers


def add_norm(x, y, norm, p):
    """LayerNorm(x + dropout(y)) in the type of x."""
    x = AddDropped.apply(x, y, p, 1.0) if x.dtype == torch.float32 else x + y
    return F.layer_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.bias.to(x.dtype), norm.eps)


def is_packable(model):
    """True if encode_bert computes this model: BERT with absolute positions and plain linear layers (no adapters)."""
    config = model.config
    return (config.model_type == "bert" and getattr(config, "position_embedding_type", "absolute") == "absolute"
            and not config.is_decoder and type(model.encoder.layer[0].attention.self.query) is nn.Linear)


def encode_packed(model, ids, types, sizes, weights=None):
    """States (S, D) of the packed tokens of texts whose sizes come in falling order; see encode_bert."""
    device, size = ids.device, torch.tensor(sizes, device=ids.device)
    if is_packable(model):
        places = torch.arange(len(ids), device=device) - (size.cumsum(0) - size).repeat_interleave(size)
        groups = group_passages(sizes, device, None if torch.is_grad_enabled() else GROUP_TOKENS[device.type])
        return encode_bert(model, ids, types, places, groups, weights)
    mask = torch.arange(sizes[0], device=device) < size[:, None]                                       # (n, L)
    padded = torch.full(mask.shape, model.config.pad_token_id or 0, device=device).masked_scatter(mask, ids)
    more = {"token_type_ids": torch.zeros_like(padded).masked_scatter(mask, types)} if types.any() else {}
    return model(input_ids=padded, attention_mask=mask.long(), **more).last_hidden_state[mask]


def pool(states, sizes, pooling):
    """One vector per text, (n, D) float32, of packed states (S, D): the first token's, the last one's or their mean."""
    size = torch.tensor(sizes, device=states.device)
    ends = size.cumsum(0)
    if pooling == "cls":
        return states[ends - size].float()
    if pooling == "last":
        return states[ends - 1].float()
    owner = torch.arange(len(sizes), device=states.device).repeat_interleave(size)
    total = torch.zeros(len(sizes), states.shape[1], device=states.device).index_add(0, owner, states.float())
    return total / size[:, None]


def split_chunks(sizes, most_tokens, most_texts):
    """Splits falling sizes into runs of at most so many tokens (counted padded, but at least one text) and texts."""
    runs = []
    for size in sizes:
        if not runs or len(runs[-1]) == most_texts or (len(runs[-1]) + 1) * runs[-1][0] > most_tokens:
            runs.append([])
        runs[-1].append(size)
    return runs


def run_in_chunks(function, inputs, sizes, chunk_size, device):
    """function(*inputs(places), sizes) of the texts at these places, a chunk of similar length at a time; one row per text, in order.

    With a chunk_size only the results of that many texts are kept for the backward pass, which computes a chunk again under the
    replayed random state. For vectors this is GradCache (arXiv 2101.06983): its gradient cache is autograd's at the vectors.
    """
    order, results, start = sorted(range(len(sizes)), key=lambda i: -sizes[i]), [], 0
    most = CHUNK_TOKENS[device.type] * 4 // compute_dtype(device).itemsize
    for own in split_chunks([sizes[i] for i in order], most, chunk_size or len(sizes)):
        tensors = inputs(order[start:start + len(own)])
        start += len(own)
        if chunk_size and torch.is_grad_enabled():
            results.append(checkpoint(function, *tensors, own, use_reentrant=False, preserve_rng_state=True))
        else:
            results.append(function(*tensors, own))
    place = torch.empty(len(order), dtype=torch.long)
    place[order] = torch.arange(len(order))
    return torch.cat(results)[place.to(device)]


class TextEncoder(nn.Module):
    """A transformer, how its token states become one vector, and what follows: linear and norm layers, if the checkpoint has any.

    `head_first`: the head is applied to each token, before pooling. `pad_to`, {query, key}, is what the FiD-KD retriever without
    masks has: every text is filled to that length with padding that counts like its tokens. `separator`, a token id, gives what
    follows a text's first one the token type 1, as minDPR and transformers do with pairs of title and text (DPR's code does not).
    """

    def __init__(self, model, pooling="cls", head=None):
        super().__init__()
        self.model, self.pooling, self.head, self.pad_to = model, pooling, head or nn.Sequential(), {}
        self.separator, self.head_first = None, False
        pooler = getattr(model, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)  # no vector passes through it; DDP waits for no gradient of it

    def forward(self, texts, role="query", chunk_size=0):
        """Vectors (n, D) float32 of n texts given as lists of token ids; see run_in_chunks for chunk_size."""
        device, weights = next(self.parameters()).device, None
        texts = [text + [self.model.config.pad_token_id] * (self.pad_to.get(role, 0) - len(text)) for text in texts]
        if not torch.is_grad_enabled() and is_packable(self.model):
            weights = bert_weights(self.model, compute_dtype(device))  # once, not for each chunk

        def inputs(places):
            return [torch.tensor(list(chain.from_iterable(texts[i] for i in places)), device=device)]
        return run_in_chunks(partial(self.encode_chunk, weights=weights), inputs, list(map(len, texts)), chunk_size, device)

    def encode_chunk(self, ids, sizes, weights=None):
        """Vectors (n, D) of the packed tokens ids (S) of texts of these sizes."""
        types = torch.zeros_like(ids)
        if self.separator is not None:
            size, ends = torch.tensor(sizes, device=ids.device), (ids == self.separator).cumsum(0)
            before = (ends - (ids == self.separator).long())                           # separators before each token, of all texts
            types = (before > before[size.cumsum(0) - size].repeat_interleave(size)).long()
        states = encode_packed(self.model, ids, types, sizes, weights)
        if self.head_first:
            return pool(self.head(states), sizes, self.pooling)
        return self.head(pool(states, sizes, self.pooling)).float()
