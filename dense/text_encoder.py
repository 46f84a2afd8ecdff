"""Text encoders without padding: a transformer's states of packed tokens, pooled to one vector per
text.

Packed: the tokens of all texts of a chunk lie side by side as the rows of one (S, D) matrix, see
packed_attention.py. BERT-shaped models (BERT, DPR, BGE, E5, Contriever, MiniLM, the FiD-KD
retriever) run so; every other architecture runs in transformers, its texts sorted by length and
padded within a chunk.
"""
from itertools import chain

import torch
from torch import nn

from dense.grad_cache import run_in_chunks
from dropout import dropout
from packed_attention import group_texts, packed_attention


class TextEncoder(nn.Module):
    """A transformer, the pooling of its token states, and a head of linear and norm layers if the
    checkpoint has one.

    pooling     cls (the first token's state), mean or last
    head_first  the head is applied to every token's state before pooling, not to the vector (the
                FiD-KD retriever)
    pad_to      {query, key}: every text is filled to this length with padding that counts as text,
                which the FiD-KD retriever without masks was trained with
    separator   a token id; tokens after a text's first one get token type 1, as minDPR and
                transformers do for pairs of title and text (DPR's code does not); None: all have
                type 0
    """

    def __init__(self, model, pooling="cls", head=None):
        super().__init__()
        self.model = model
        self.pooling = pooling
        self.head = nn.Sequential() if head is None else head
        self.head_first = False
        self.pad_to = {}
        self.separator = None
        pooler = getattr(model, "pooler", None)
        if pooler is not None:
            # no vector passes through it; DDP must not wait for its gradient
            pooler.requires_grad_(False)

    @property
    def dimension(self):
        """The length D of a vector."""
        for layer in self.head:
            if isinstance(layer, nn.Linear):
                return layer.out_features
        return self.model.config.hidden_size

    def forward(self, texts, role="query", chunk_size=0):
        """Vectors (n, D) float32 of n texts given as lists of token ids; chunk_size: see
        run_in_chunks.
        """
        device = next(self.parameters()).device
        if not texts:
            return torch.zeros(0, self.dimension, device=device)
        fill_to = self.pad_to.get(role, 0)
        pad = self.model.config.pad_token_id
        texts = [text + [pad] * (fill_to - len(text)) for text in texts]
        lengths = [len(text) for text in texts]

        def make_inputs(indices):
            token_ids = chain.from_iterable(texts[index] for index in indices)
            return [torch.tensor(list(token_ids), device=device)]                      # (S)
        return run_in_chunks(self.encode_chunk, make_inputs, lengths, chunk_size, device)

    def encode_chunk(self, ids, lengths):
        """Vectors (n, D) of n texts of falling lengths, whose token ids lie side by side in ids
        (S).
        """
        lengths_tensor = torch.tensor(lengths, device=ids.device)                      # (n)
        starts = lengths_tensor.cumsum(0) - lengths_tensor                             # (n)
        types = self.token_types(ids, starts, lengths_tensor)
        if is_packable(self.model):
            offsets = torch.arange(len(ids),
                                   device=ids.device) - starts.repeat_interleave(lengths_tensor)
            states = encode_bert(self.model, ids, types, offsets, group_texts(lengths, ids.device))
        else:
            states = encode_padded(self.model, ids, types, lengths_tensor)
        if self.head_first:
            return pool(self.head(states), starts, lengths_tensor, self.pooling)
        return self.head(pool(states, starts, lengths_tensor, self.pooling)).float()

    def token_types(self, ids, starts, lengths):
        """The token types (S): 1 behind a text's first separator, else 0."""
        if self.separator is None:
            return torch.zeros_like(ids)
        is_separator = (ids == self.separator).long()
        # separators before each token, of all texts
        seen_before = is_separator.cumsum(0) - is_separator
        seen_before_text = seen_before[starts].repeat_interleave(lengths)
        return (seen_before > seen_before_text).long()


def is_packable(model):
    """True if encode_bert computes this model: BERT with absolute positions and plain linear
    layers, without adapters.
    """
    config = model.config
    if config.model_type != "bert" or config.is_decoder:
        return False
    if getattr(config, "position_embedding_type", "absolute") != "absolute":
        return False
    return type(model.encoder.layer[0].attention.self.query) is nn.Linear


def encode_bert(bert, ids, types, offsets, groups):
    """Last hidden states (S, D) of packed token ids, their types and their offsets in their text,
    all (S).

    The computation is BertModel's (arXiv 1810.04805) on its own modules; tests/test_text_encoder.py
    compares the two.
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
    """The same of any transformer that can run in transformers, on texts padded to the longest, the
    first one.
    """
    is_real = torch.arange(int(lengths[0]), device=ids.device) < lengths[:, None]       # (n, L)
    padded = torch.full(is_real.shape, model.config.pad_token_id or 0, device=ids.device)
    inputs = {"input_ids": padded.masked_scatter(is_real, ids), "attention_mask": is_real.long()}
    if types.any():
        inputs["token_type_ids"] = torch.zeros_like(padded).masked_scatter(is_real, types)
    return model(**inputs).last_hidden_state[is_real]  # (n, L, D) -> (S, D)


def pool(states, starts, lengths, pooling):
    """Vectors (n, D) float32 of packed states (S, D): each text's first token's, its last one's or
    their mean.
    """
    if pooling == "cls":
        return states[starts].float()
    if pooling == "last":
        return states[starts + lengths - 1].float()
    # (S)
    text_of_token = torch.arange(len(lengths), device=states.device).repeat_interleave(lengths)
    sums = torch.zeros(len(lengths), states.shape[1], device=states.device)
    sums = sums.index_add(0, text_of_token, states.float())
    return sums / lengths[:, None]
