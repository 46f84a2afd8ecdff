"""Text encoders: a transformer's states of packed tokens, pooled to one vector per text.

Packed: the tokens of all texts of a chunk are the rows of one (S, D) matrix, see layers/packing.py.
BERT-shaped models (BERT, DPR, BGE, E5, Contriever, MiniLM, the FiD-KD retriever) run packed. Every
other architecture runs in transformers, with texts sorted by length and padded within a chunk.
"""
from inspect import signature

import torch
import torch.nn.functional as F
from torch import nn

from layers.dropout import dropout
from layers.grad_cache import run_in_chunks
from layers.packed_attention import make_groups, packed_attention
from layers.packing import pack_texts
from layers.regions import region


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
        """Return vectors (n, D) float32 of n texts given as lists or arrays of token ids.

        role: query or key; chunk_size: see layers/grad_cache.py.
        """
        device = next(self.parameters()).device
        if not texts:
            return torch.zeros(0, self.dimension, device=device)
        pad = self.model.config.pad_token_id or 0
        texts = fill_up(texts, self.pad_to.get(role, 0), pad)
        is_empty = [len(text) == 0 for text in texts]
        texts = fill_up(texts, 1, pad)
        skip = self.skip.get(role, 0)

        def make_inputs(indices):
            chunk = [texts[index] for index in indices]
            longest = max(map(len, chunk))
            align = None if is_packable(self.model) else longest
            return pack_texts(chunk, pad, device.type, align)

        def encode(packed):
            return self.encode_chunk(packed, skip)
        vectors = run_in_chunks(encode, make_inputs, list(map(len, texts)), chunk_size, device)
        if any(is_empty):
            is_empty = torch.tensor(is_empty, device=device)                            # (n)
            vectors = torch.where(is_empty[:, None], self.vector_of_nothing(device), vectors)
        return vectors[:, :self.truncate_dim]

    def vector_of_nothing(self, device):
        """Return the vector (1, D) of a text without a token, before it is truncated."""
        pooled = torch.zeros(1, self.pooled_dimension, device=device)
        if self.head_first:
            return pooled.new_zeros(1, self.dimension)
        return self.head(pooled).float()

    def encode_chunk(self, packed, skip=0):
        """Return vectors (n, D) of PackedTexts; the pooling leaves out the first `skip` tokens of
        each text.
        """
        positions = torch.arange(len(packed.ids), device=packed.ids.device)
        positions = positions - packed.starts[packed.texts]                             # (S)
        types = self.token_types(packed)
        if is_packable(self.model):
            states = encode_bert(self.model, packed, types, positions)
        else:
            types = types if self.gives_types or self.separator is not None else None
            states = encode_padded(self.model, packed, types)
        if self.head_first:
            return pool(self.head(states), packed, positions, self.pooling)
        return self.head(pool(states, packed, positions, self.pooling, skip)).float()

    def token_types(self, packed):
        """Return token types (S): 1 after a text's first separator, else 0."""
        if self.separator is None:
            return torch.zeros_like(packed.ids)
        is_separator = (packed.ids == self.separator).long()
        # how many separators come before each token, in all texts so far
        seen_before = is_separator.cumsum(0) - is_separator
        seen_before_text = seen_before[packed.starts][packed.texts]
        return (seen_before > seen_before_text).long()


def fill_up(texts, length, pad):
    """Return token ids of texts, the shorter ones padded to a length."""
    return [text if len(text) >= length else [*text, *[pad] * (length - len(text))]
            for text in texts]


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


def encode_bert(bert, packed, types, positions):
    """Return the last hidden states (S, D) of PackedTexts, with the types (S) of their tokens and
    the positions (S) of the tokens in their texts.

    The result is BertModel's (arXiv 1810.04805), computed with the model's own modules;
    tests/test_text_encoder.py compares the two.
    """
    config = bert.config
    p = config.hidden_dropout_prob if bert.training else 0.0
    p_attention = config.attention_probs_dropout_prob if bert.training else 0.0
    scale = (config.hidden_size // config.num_attention_heads) ** -0.5
    groups = make_groups(packed.shapes, packed.is_real)

    embeddings = bert.embeddings
    x = embeddings.word_embeddings(packed.ids) + embeddings.token_type_embeddings(types)
    # padding may lie behind the last position that the model has
    x = x + embeddings.position_embeddings(positions * packed.is_real)
    x = dropout(embeddings.LayerNorm(x), p)
    for layer in bert.encoder.layer:
        qkv = project_bert(layer, x)
        y = packed_attention(qkv, groups, p_attention, scale)                           # (S, D)
        x = finish_bert(layer, x, y, p)
    return x


@region
def project_bert(layer, x):
    """Return the queries, keys and values (S, 3, H, d) of a layer of BERT, by one matrix product of
    the packed states x (S, D).
    """
    attention = layer.attention.self
    linears = attention.query, attention.key, attention.value
    weights = torch.cat([linear.weight for linear in linears])
    biases = torch.cat([linear.bias for linear in linears])
    return F.linear(x, weights, biases).unflatten(-1, (3, attention.num_attention_heads, -1))


@region
def finish_bert(layer, x, y, p):
    """Return the states (S, D) after a layer of BERT, from those before it and the result of its
    attention y (S, D).
    """
    y = layer.attention.output.dense(y)
    x = layer.attention.output.LayerNorm(x + dropout(y, p))
    h = layer.intermediate.intermediate_act_fn(layer.intermediate.dense(x))
    h = layer.output.dense(h)
    return layer.output.LayerNorm(x + dropout(h, p))


def encode_padded(model, packed, types):
    """Return token states (S, D) of any model of transformers, for texts that all have the rows of
    the longest one. types: (S), or None if the tokenizer gives none.
    """
    size = len(packed.lengths), -1                                                     # (n, L)
    inputs = {"input_ids": packed.ids.view(size),
              "attention_mask": packed.is_real.view(size).long()}
    if types is not None and "token_type_ids" in signature(model.forward).parameters:
        inputs["token_type_ids"] = types.view(size)
    return model(**inputs).last_hidden_state.flatten(0, 1)  # (n, L, D) -> (S, D)


def pool(states, packed, positions, pooling, skip=0):
    """Return vectors (n, D) float32 of packed states (S, D), pooled over each text's tokens after
    its first `skip` ones.

    positions (S): the tokens' positions in their texts; pooling: see TextEncoder. A text with no
    such token gets zeros, or with cls its first token.
    """
    starts, lengths = packed.starts, packed.lengths
    is_left = lengths > skip                                                            # (n)
    pooled = []
    for name in pooling.split("+"):
        if name == "cls":
            first = torch.where(is_left, starts + skip, starts)
            pooled.append(states.index_select(0, first).float())
        elif name == "last":
            last = states.index_select(0, starts + lengths - 1).float()
            pooled.append(last * is_left[:, None])
        else:
            pooled.append(pool_all(states, packed, positions, name, skip))
    return torch.cat(pooled, 1)


def pool_all(states, packed, positions, name, skip):
    """Return vectors (n, D) float32 pooled over all tokens after the first `skip` ones.

    name: max, mean, mean_sqrt_len (the sum divided by the root of the number of tokens) or
    weighted_mean (a token's weight is its position in its text, from 1).
    """
    n, D = len(packed.lengths), states.shape[1]
    is_pooled = packed.is_real & (positions >= skip)                                    # (S)
    values = states.float()
    if name == "max":
        floor = torch.full((n, D), float("-inf"), device=states.device)
        values = values.masked_fill(~is_pooled[:, None], float("-inf"))
        highest = floor.scatter_reduce(0, packed.texts[:, None].expand_as(values), values, "amax")
        is_left = packed.lengths > skip
        return torch.where(is_left[:, None], highest, torch.zeros_like(highest))
    weights = is_pooled * (positions + 1.0 if name == "weighted_mean" else 1.0)
    zeros = torch.zeros(n, D, device=states.device)
    sums = zeros.index_add(0, packed.texts, values * weights[:, None])
    totals = zeros[:, 0].index_add(0, packed.texts, weights)
    if name == "mean_sqrt_len":
        totals = totals.sqrt()
    return sums / totals.clamp(min=1e-9)[:, None]
