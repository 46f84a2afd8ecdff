"""Text encoders without padding: a transformer's states of packed tokens, pooled to one vector per
text.

Packed: the tokens of all texts of a chunk are the rows of one (S, D) matrix, see
layers/packed_attention.py. BERT-shaped models (BERT, DPR, BGE, E5, Contriever, MiniLM, the FiD-KD
retriever) run packed. Every other architecture runs in transformers, with texts sorted by length
and padded within a chunk.
"""
from inspect import signature
from itertools import chain

import torch
import torch.nn.functional as F
from torch import nn

from layers.dropout import dropout
from layers.grad_cache import run_in_chunks
from layers.packed_attention import group_texts, packed_attention


class Normalize(nn.Module):
    """Scale vectors to length 1, as sentence-transformers' module of this name does."""

    def forward(self, vectors):
        return F.normalize(vectors.float(), dim=-1)


class TextEncoder(nn.Module):
    """Encode texts by a transformer, the pooling of its token states and a head.

    pooling       a name in dense/description.py's POOLING, or several joined by "+", whose vectors
                  are concatenated
    head          nn.Linear (and its activation), nn.LayerNorm and Normalize, in their order
    truncate_dim  how many numbers of the head's vector to keep; None: all
    skip          {query, key}: how many first tokens of a text to leave out of the pooling, for a
                  model that does not pool its prompt
    head_first    apply the head to every token's state before pooling, not to the pooled vector
                  (the FiD-KD retriever)
    pad_to        {query, key}: pad every text to this length with padding that counts as text, as
                  the FiD-KD retriever without masks was trained
    lowercases, skips_prompt
                  settings of the folder, see dense/description.py, kept for saving
    separator     a token id; tokens after its first occurrence in a text get token type 1, as in
                  minDPR and transformers for pairs of title and text (not in DPR's code); None: all
                  have type 0
    gives_types   whether the tokenizer gives token types; some models (GPT-2) add embeddings for
                  them even if all are 0

    A text without a token gets a pooled vector of zeros, as in sentence-transformers.
    """

    def __init__(self, model, pooling="cls", head=None):
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.head = nn.Sequential() if head is None else head
        self.truncate_dim = None
        self.skip = {}
        self.lowercases = False
        self.skips_prompt = False
        self.head_first = False
        self.pad_to = {}
        self.separator = None
        self.gives_types = False
        pooler = getattr(model, "pooler", None)
        if pooler is not None:
            # not used for vectors, so DDP must not wait for its gradient
            pooler.requires_grad_(False)

    @property
    def pooled_dimension(self):
        """Return the length of a pooled vector."""
        return self.model.config.hidden_size * len(self.pooling.split("+"))

    @property
    def dimension(self):
        """Return the length D of a vector."""
        dimension = self.untruncated_dimension
        return min(dimension, self.truncate_dim or dimension)

    @property
    def untruncated_dimension(self):
        """Return the length of a vector before it is truncated."""
        dimension = self.pooled_dimension
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                dimension = layer.out_features
        return dimension

    @property
    def is_normalised(self):
        """Return whether the head's vectors have length 1."""
        return (len(self.head) > 0 and isinstance(self.head[-1], Normalize)
                and self.truncate_dim is None)

    def forward(self, texts, role="query", chunk_size=0):
        """Return vectors (n, D) float32 of n texts given as lists of token ids.

        role: query or key; chunk_size: see layers/grad_cache.py.
        """
        device = next(self.parameters()).device
        if not texts:
            return torch.zeros(0, self.dimension, device=device)
        fill_to = self.pad_to.get(role, 0)
        pad = self.model.config.pad_token_id
        texts = [text + [pad] * (fill_to - len(text)) for text in texts]
        is_empty = torch.tensor([not text for text in texts], device=device)            # (n)
        texts = [text or [pad or 0] for text in texts]
        lengths = [len(text) for text in texts]
        skip = self.skip.get(role, 0)

        def make_inputs(indices):
            token_ids = chain.from_iterable(texts[index] for index in indices)
            return [torch.tensor(list(token_ids), device=device)]                      # (S)

        def encode(ids, lengths):
            return self.encode_chunk(ids, lengths, skip)
        vectors = run_in_chunks(encode, make_inputs, lengths, chunk_size, device)
        if is_empty.any():
            vectors = torch.where(is_empty[:, None], self.vector_of_nothing(device), vectors)
        return vectors[:, :self.truncate_dim]

    def vector_of_nothing(self, device):
        """Return the vector (1, D) of a text without a token, before it is truncated."""
        pooled = torch.zeros(1, self.pooled_dimension, device=device)
        if self.head_first:
            return pooled.new_zeros(1, self.dimension)
        return self.head(pooled).float()

    def encode_chunk(self, ids, lengths, skip=0):
        """Return vectors (n, D) of n texts of falling lengths from their packed token ids (S). The
        pooling leaves out the first `skip` tokens of each text.
        """
        lengths_tensor = torch.tensor(lengths, device=ids.device)                      # (n)
        starts = lengths_tensor.cumsum(0) - lengths_tensor                             # (n)
        types = self.token_types(ids, starts, lengths_tensor)
        if is_packable(self.model):
            offsets = torch.arange(len(ids),
                                   device=ids.device) - starts.repeat_interleave(lengths_tensor)
            states = encode_bert(self.model, ids, types, offsets, group_texts(lengths, ids.device))
        else:
            types = types if self.gives_types or types.any() else None
            states = encode_padded(self.model, ids, types, lengths_tensor)
        if self.head_first:
            return pool(self.head(states), starts, lengths_tensor, self.pooling)
        return self.head(pool(states, starts, lengths_tensor, self.pooling, skip)).float()

    def token_types(self, ids, starts, lengths):
        """Return token types (S): 1 after a text's first separator, else 0."""
        if self.separator is None:
            return torch.zeros_like(ids)
        is_separator = (ids == self.separator).long()
        # how many separators come before each token, in all texts so far
        seen_before = is_separator.cumsum(0) - is_separator
        seen_before_text = seen_before[starts].repeat_interleave(lengths)
        return (seen_before > seen_before_text).long()


def is_packable(model):
    """Return whether encode_bert can compute this model: BERT with absolute positions and plain
    linear layers, without adapters.
    """
    config = model.config
    if config.model_type != "bert" or config.is_decoder:
        return False
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return False
    return type(model.encoder.layer[0].attention.self.query) is nn.Linear


def encode_bert(bert, ids, types, offsets, groups):
    """Return the last hidden states (S, D) of packed token ids (S), with their token types (S) and
    their offsets in their text (S).

    The result is BertModel's (arXiv 1810.04805), computed with the model's own modules;
    tests/test_text_encoder.py compares the two.
    """
    config = bert.config
    p = config.hidden_dropout_prob if bert.training else 0.0
    p_attention = config.attention_probs_dropout_prob if bert.training else 0.0
    H = config.num_attention_heads
    d = config.hidden_size // H

    embeddings = bert.embeddings
    x = embeddings.word_embeddings(ids) + embeddings.token_type_embeddings(types)
    x = x + embeddings.position_embeddings(offsets)
    x = dropout(embeddings.LayerNorm(x), p)
    for layer in bert.encoder.layer:
        attention = layer.attention.self
        q, k, v = (project(x).unflatten(1, (H, d))  # (S, D) -> (S, H, d)
                   for project in (attention.query, attention.key, attention.value))
        y = packed_attention(q, k, v, groups, p=p_attention, scale=d ** -0.5)          # (S, D)
        y = layer.attention.output.dense(y)
        x = layer.attention.output.LayerNorm(x + dropout(y, p))
        h = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x))
        h = layer.output.dense(h)
        x = layer.output.LayerNorm(x + dropout(h, p))
    return x


def encode_padded(model, ids, types, lengths):
    """Return token states (S, D) of any model of transformers, with texts padded to the first one,
    which is the longest. types: None if the tokenizer gives none.
    """
    is_real = torch.arange(int(lengths[0]), device=ids.device) < lengths[:, None]       # (n, L)
    padded = torch.full(is_real.shape, model.config.pad_token_id or 0, device=ids.device)
    inputs = {"input_ids": padded.masked_scatter(is_real, ids), "attention_mask": is_real.long()}
    if types is not None and "token_type_ids" in signature(model.forward).parameters:
        inputs["token_type_ids"] = torch.zeros_like(padded).masked_scatter(is_real, types)
    return model(**inputs).last_hidden_state[is_real]  # (n, L, D) -> (S, D)


def pool(states, starts, lengths, pooling, skip=0):
    """Return vectors (n, D) float32 of packed states (S, D), pooled over each text's tokens after
    its first `skip` ones.

    pooling: see TextEncoder. A text with no such token gets zeros, or with cls its first token.
    """
    tokens = lengths - skip                                                             # (n)
    pooled = []
    for name in pooling.split("+"):
        if name == "cls":
            pooled.append(states[torch.where(tokens > 0, starts + skip, starts)].float())
        elif name == "last":
            last = states[starts + lengths - 1].float()
            pooled.append(last * (tokens > 0)[:, None])
        else:
            pooled.append(pool_all(states, starts, lengths, name, skip))
    return torch.cat(pooled, 1)


def pool_all(states, starts, lengths, name, skip):
    """Return vectors (n, D) float32 pooled over all tokens after the first `skip` ones.

    name: max, mean, mean_sqrt_len (the sum divided by the root of the number of tokens) or
    weighted_mean (a token's weight is its position in its text, from 1).
    """
    # (S)
    text_of_token = torch.arange(len(lengths), device=states.device).repeat_interleave(lengths)
    positions = torch.arange(1, len(states) + 1, device=states.device) - starts[text_of_token]
    is_pooled = positions > skip
    if name == "max":
        floor = torch.full((len(lengths), states.shape[1]), float("-inf"), device=states.device)
        values = states.float().masked_fill(~is_pooled[:, None], float("-inf"))
        highest = floor.scatter_reduce(0, text_of_token[:, None].expand_as(values), values, "amax")
        return torch.where((lengths > skip)[:, None], highest, torch.zeros_like(highest))
    weights = positions if name == "weighted_mean" else torch.ones_like(positions)
    weights = weights.float()
    values = states.float()
    if name == "weighted_mean" or skip:
        weights = weights * is_pooled
        values = values * weights[:, None]
    zeros = torch.zeros(len(lengths), states.shape[1], device=states.device)
    sums = zeros.index_add(0, text_of_token, values)
    totals = zeros[:, 0].index_add(0, text_of_token, weights)
    if name == "mean_sqrt_len":
        totals = totals.sqrt()
    return sums / totals.clamp(min=1e-9)[:, None]
