"""Retrievers and rankers: BiEncoder (one vector per text) and CrossEncoder (one score per pair of
query and key). dense/checkpoints.py opens and saves their folders.
"""
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from dense.checkpoints import open_encoders, open_ranker, save_encoder
from layers.grad_cache import run_in_chunks
from training.checkpoints import check_vocabulary

OWN_TOKENIZER = "put the tokenizer that the model was trained with into its folder"  # the remedy


class BiEncoder(nn.Module):
    """Score queries and keys by their vectors, with one encoder for each or one for both.

    metric: ip (inner product), cos (inner product of vectors of length 1) or l2 (minus the squared
    distance). Scores are divided by the temperature.
    """

    def __init__(self, query_encoder, key_encoder=None, metric="cos", temperature=1.0):
        super().__init__()
        self.query_encoder = query_encoder
        if key_encoder is not None:
            self.key_encoder = key_encoder
        self.metric = metric
        self.temperature = temperature

    @property
    def encoders(self):
        """Return {role: encoder}; an encoder for both roles has the empty role."""
        if hasattr(self, "key_encoder"):
            return {"query": self.query_encoder, "key": self.key_encoder}
        return {"": self.query_encoder}

    def encode(self, texts, role, chunk_size=0):
        """Return vectors (n, D) of n lists or arrays of token ids.

        role: query or key; chunk_size: see layers/grad_cache.py.
        """
        encoder = self.encoders.get(role, self.query_encoder)
        vectors = encoder(texts, role, chunk_size)
        if self.metric == "cos" and not encoder.is_normalised:
            vectors = F.normalize(vectors, dim=-1)
        return vectors

    def forward(self, queries, keys, chunk_size=0):
        """Return vectors (Q, D) and (K, D) of lists or arrays of token ids."""
        return self.encode(queries, "query", chunk_size), self.encode(keys, "key", chunk_size)

    def score(self, queries, keys):
        """Return scores (Q, K) of vectors (Q, D) and (K, D), in float32 even under autocast,
        because a temperature of 0.01 magnifies rounding errors.
        """
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = queries.float(), keys.float()
            scores = queries @ keys.t()
            if self.metric == "l2":  # -(q - k)^2 = 2qk - q^2 - k^2
                scores = 2 * scores - queries.square().sum(1, keepdim=True) - keys.square().sum(1)
            return scores / self.temperature

    def use_texts(self, texts):
        """Set the encoders up for the tokenizers and prompts of a Texts.

        Raises InputError if a tokenizer has ids that its encoder has no embedding for.
        """
        for role, tokenizer in texts.tokenizers.items():
            encoder = self.encoders.get(role, self.query_encoder)
            check_vocabulary(tokenizer, encoder.model.get_input_embeddings(), OWN_TOKENIZER)
            encoder.skip = texts.skip
            encoder.gives_types = "token_type_ids" in tokenizer("a")

    def save_pretrained(self, folder, max_length, prompts=None):
        """Write the folder. sentence-transformers reads max_length and the prompts {query,
        document} from it.
        """
        for role, encoder in self.encoders.items():
            save_encoder(os.path.join(folder, role), encoder, self.metric, max_length, prompts
                         or {})

    @classmethod
    def open(cls, name, key_name=None, *, metric=None, pooling=None, temperature=None, dropout=None,
             truncate_dim=None, trained=False):
        """Return the retriever of a folder or hub name (ours, sentence-transformers',
        transformers', FiD's), or of minDPR's or DPR's file. key_name opens a second encoder for the
        keys.

        Arguments that are None take the checkpoint's values. If it stores none, the metric is cos,
        the pooling mean (last token for a causal language model) and the temperature 1. A stored
        temperature counts only for the stored metric.

        trained: refuse a folder without weights. Raises InputError.
        """
        encoders = open_encoders(str(name), key_name, pooling, dropout, trained, truncate_dim)
        query_encoder, key_encoder, stated = encoders
        stated_metric = stated.get("metric", "cos")
        if metric is None:
            metric = stated_metric
        if temperature is None:  # a temperature for cosines does not suit inner products
            temperature = stated.get("temperature", 1.0) if metric == stated_metric else 1.0
        model = cls(query_encoder, key_encoder, metric, temperature)
        for encoder in model.encoders.values():
            encoder.separator = stated.get("separator")
        return model


class PaddedPairs(NamedTuple):
    """Hold pairs of query and key as the model's inputs, padded to the longest, L."""
    input_ids: torch.Tensor       # (n, L)
    attention_mask: torch.Tensor  # (n, L)
    token_type_ids: torch.Tensor  # (n, L)


class CrossEncoder(nn.Module):
    """Score a query and a key that a transformer reads together: a ranker.

    activation: a torch layer that `predict` applies to the scores, or None; training does not apply
    it.
    """

    def __init__(self, model, activation=None):
        super().__init__()
        self.model = model
        self.activation = activation

    def predict(self, pairs):
        """Return the scores (n) of n pairs, as sentence-transformers' CrossEncoder.predict does."""
        scores = self(pairs)
        return scores if self.activation is None else self.activation(scores)

    def forward(self, pairs, chunk_size=0):
        """Return scores (n) of n pairs given as (token ids, token types); chunk_size: see
        layers/grad_cache.py.
        """
        device = next(self.parameters()).device
        if not pairs:
            return torch.zeros(0, device=device)
        pad = self.model.config.pad_token_id

        def make_inputs(indices):
            ids, types = [], []
            for index in indices:
                pair_ids, pair_types = pairs[index]
                ids.append(torch.tensor(pair_ids))
                types.append(torch.tensor(pair_types))
            mask = [torch.ones_like(pair_ids) for pair_ids in ids]
            return PaddedPairs(pad_sequence(ids, batch_first=True, padding_value=pad),
                               pad_sequence(mask, batch_first=True),
                               pad_sequence(types, batch_first=True))

        lengths = [len(ids) for ids, _ in pairs]
        return run_in_chunks(self.score_chunk, make_inputs, lengths, chunk_size, device)

    def score_chunk(self, padded):
        """Return scores (n) of PaddedPairs."""
        inputs = padded._asdict()
        if getattr(self.model.config, "type_vocab_size", 1) <= 1:
            inputs.pop("token_type_ids")
        return self.model(**inputs).logits[:, 0].float()

    def use_texts(self, texts):
        """Raise InputError if the tokenizer has ids that the model has no embedding for."""
        check_vocabulary(texts.tokenizers["query"], self.model.get_input_embeddings(),
                         OWN_TOKENIZER)

    def save_pretrained(self, folder, *_):
        """Write the folder. The other arguments of BiEncoder.save_pretrained are ignored."""
        self.model.save_pretrained(folder)

    @classmethod
    def open(cls, name, dropout=None, trained=False):
        """Return the ranker of a folder or hub name; an encoder without a ranking head gets a
        random one.

        trained: refuse a folder that is not a trained ranker. Raises InputError.
        """
        return cls(*open_ranker(name, dropout, trained))


def limit_lengths(lengths, model, log):
    """Return the lengths {query, key}, lowered to the positions of the model's transformers.

    A ranker reads query and key together, so they share its positions.
    """
    is_ranker = isinstance(model, CrossEncoder)
    lengths = dict(lengths)
    for encoder in [model] if is_ranker else model.encoders.values():
        positions = count_positions(encoder.model.config)
        if positions is None:
            continue
        for role in ("query", "key"):
            shared = lengths["query"] if is_ranker and role == "key" else 0
            if lengths[role] > positions - shared:
                log(f"note: the model has {positions} positions; --{role}_max_length is "
                    f"{positions - shared}, not {lengths[role]}")
                lengths[role] = positions - shared
    return lengths


def count_positions(config):
    """Return the number of tokens that a transformer has positions for, or None without a limit."""
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return None
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet"):
        positions -= config.pad_token_id + 1  # these models' positions start after the padding id
    return positions
