"""Fusion-in-Decoder (Izacard & Grave 2021, arXiv 2007.01282) around a Hugging Face T5.

The encoder reads every passage by itself, the decoder attends to all of them at once:

    input_ids (B, N, L) -> EncoderWrapper -> memory (B, M, D) -> decoder -> logits (B, T, V)

B questions, N passages each, L tokens at most; M is the number of real tokens of the longest question.
"""
import json
import os
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import MT5ForConditionalGeneration, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention

from checkpoints import check_shapes, find_model, read_config, read_weights
from layers import compute_dtype, decode, encode, group_passages
from utils import InputError

CHUNK_TOKENS = {"cpu": 4096, "cuda": 16384}  # encoded at a time
LOWEST = torch.finfo(torch.float32).min      # masks finitely: a question without a token attends to all of its padding
CROSS_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
CLASSES = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration}  # v1.1, Flan and ByT5 are "t5" or "mt5"


class Memory(NamedTuple):
    """What the decoder attends to: the real tokens of each question's passages, side by side, in passage order."""
    states: torch.Tensor  # (B, M, D)
    mask: torch.Tensor    # (B, M) bool
    places: torch.Tensor  # (B, M) place of each token in the original's padded concatenation, n * stride + l


class CheckpointWrapper(nn.Module):
    """The encoder's blocks on one chunk of passages; with use_checkpoint only the result is kept, for the backward pass the
    chunk is computed again.

    The random state of the first pass is replayed, so dropout drops the same units (arXiv 1604.06174).
    """

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.use_checkpoint = False

    def forward(self, ids, groups):
        if self.use_checkpoint and self.training:
            return checkpoint(encode, self.module, ids, groups, use_reentrant=False, preserve_rng_state=True)
        return encode(self.module, ids, groups)


class EncoderWrapper(nn.Module):
    """Encodes (B, N, L) passages independently and concatenates their real tokens for the decoder (FiD section 3).

    Passages are sorted by length and encoded in chunks of about CHUNK_TOKENS real tokens, side by side and without padding.
    The result equals that of the padded batch, attention being masked there.
    """
    main_input_name = "input_ids"  # Hugging Face's generate() asks for it

    def __init__(self, encoder):
        super().__init__()
        self.encoder = CheckpointWrapper(encoder)

    def forward(self, input_ids, attention_mask, stride=None):
        B, N, L = input_ids.shape
        device, mask = input_ids.device, attention_mask.bool()
        if not (mask[..., 1:] <= mask[..., :-1]).all():
            raise ValueError("attention_mask must have each passage's real tokens first and its padding after them")
        sizes = mask.sum(2)                                                                  # (B, N) tokens per passage
        widest = max(1, int(sizes.sum(1).max()))                                             # M
        begins = sizes.cumsum(1) - sizes + widest * torch.arange(B, device=device)[:, None]  # in the memory laid flat
        passage_sizes, order = sizes.flatten().sort(descending=True, stable=True)
        within = torch.arange(int(passage_sizes.sum()), device=device)                       # place of a token in its passage
        within -= (passage_sizes.cumsum(0) - passage_sizes).repeat_interleave(passage_sizes)
        packed = order.repeat_interleave(passage_sizes)                                      # (S) passage of each token
        ids, target = input_ids.reshape(B * N, L)[packed, within], begins.flatten()[packed] + within
        states, start = [], 0
        for chunk in chunks([size for size in passage_sizes.tolist() if size], CHUNK_TOKENS[device.type]):
            states.append(self.encoder(ids[start:start + sum(chunk)], group_passages(chunk, device)))
            start += sum(chunk)
        states = torch.cat(states) if states else torch.zeros(0, self.encoder.module.config.d_model, device=device)
        places = within.new_zeros(B * widest).index_copy(0, target, packed % N * max(stride or 0, L) + within)
        real = torch.zeros_like(places, dtype=torch.bool).index_fill(0, target, True)
        memory = states.new_zeros(B * widest, states.shape[1]).index_put((target,), states)    # keeps no second copy of states
        return Memory(memory.view(B, widest, -1), real.view(B, widest), places.view(B, widest))


def chunks(sizes, most):
    """Splits falling sizes into runs that sum to at most `most` (or hold one)."""
    runs, total = [], most
    for size in sizes:
        if total + size > most:
            runs.append([])
            total = 0
        runs[-1].append(size)
        total += size
    return runs


class BiasedCrossAttention(T5Attention):
    """Cross-attention with the relative position bias that transformers 3.0.2 applied there (removed later as a bug).

    The released FiD readers were trained with it. Query i sees the bias of bucket(max(i - place, 0)), so only the first
    places of the first passage differ from a constant. Used in decoder block 0, whose bias all blocks share.
    """
    memory_places = None  # (B, M), set before each use of the decoder

    def forward(self, hidden_states, position_bias=None, past_key_values=None, **kwargs):
        if position_bias is None:
            length = hidden_states.shape[1]
            # block 0's self-attention has already added these queries to its cache
            offset = past_key_values.get_seq_length() - length if past_key_values is not None else 0
            position_bias = self.place_bias(hidden_states.shape[0], length, offset)
        return super().forward(hidden_states, position_bias=position_bias, past_key_values=past_key_values, **kwargs)

    def place_bias(self, batch_size, length, offset):
        """(B, heads, length, M) bias of the queries offset .. offset + length - 1; beams share their question's places."""
        places = self.memory_places.repeat_interleave(batch_size // self.memory_places.shape[0], dim=0)
        queries = torch.arange(offset, offset + length, device=places.device)
        bucket = self._relative_position_bucket(places[:, None, :] - queries[:, None], bidirectional=False,
                                                num_buckets=self.relative_attention_num_buckets,
                                                max_distance=self.relative_attention_max_distance)
        return self.relative_attention_bias(bucket).permute(0, 3, 1, 2)  # (B, length, M, heads) -> (B, heads, length, M)


class FiDT5(nn.Module):
    """A T5 whose encoder reads N passages per question; see the module's docstring for shapes."""

    def __init__(self, t5):
        super().__init__()
        self.t5 = t5
        self.t5.encoder = EncoderWrapper(t5.encoder)
        self.config = t5.config

    @property
    def cross_bias(self):
        """The cross-attention that holds the released readers' position bias, or None."""
        attention = self.t5.decoder.block[0].layer[1].EncDecAttention
        return attention if isinstance(attention, BiasedCrossAttention) else None

    def set_checkpoint(self, use_checkpoint):
        """Turns activation recomputation of the encoder and of the cross-attention on or off."""
        self.t5.encoder.encoder.use_checkpoint = use_checkpoint

    def check_tokenizer(self, tokenizer):
        """InputError if the tokenizer has ids that the model has no embedding for."""
        if len(tokenizer) > self.t5.shared.num_embeddings:
            raise InputError(f"the tokenizer has {len(tokenizer)} ids, the model embeds {self.t5.shared.num_embeddings}; name the "
                             "model that the tokenizer belongs to with --t5_name")

    def encode(self, input_ids, attention_mask):
        """Memory of the (B, N, L) passages; makes the decoder ready for it."""
        memory = self.t5.encoder(input_ids, attention_mask, getattr(self.config, "passage_stride", None))
        if self.cross_bias is not None:
            self.cross_bias.memory_places = memory.places
        return memory

    def forward(self, input_ids, attention_mask, labels, reduction="mean"):
        """(loss, logits (B, T, V)): cross-entropy over the labels (B, T) that are not -100, their mean or their sum."""
        memory = self.encode(input_ids, attention_mask)
        logits = self.decode(self.t5._shift_right(labels), memory)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss / labels.ne(-100).sum().clamp(min=1) if reduction == "mean" else loss, logits

    def decode(self, ids, memory, cache=None, raw=None):
        """Logits (B, T, V) after the target ids (B, T); see layers.decode for `cache` and `raw`."""
        bias = torch.zeros(memory.mask.shape, device=ids.device).masked_fill(~memory.mask, LOWEST)[:, None, None]
        if self.cross_bias is not None:
            bias = bias + self.cross_bias.place_bias(len(ids), ids.shape[1], cache[0][0].shape[2] if cache else 0)
        states = decode(self.t5.decoder, ids, memory.states, bias, cache, raw,
                        self.training and self.t5.encoder.encoder.use_checkpoint)
        if self.config.model_type == "t5" and self.config.scale_decoder_outputs:
            states = states * self.config.d_model ** -0.5
        with torch.autocast(ids.device.type, enabled=False):  # a cast of all the vocabulary would cost more than the product
            return self.t5.lm_head(states)

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_length=50, num_beams=1, return_scores=False):
        """Ids (B, <= max_length), greedy or by beam search: the start token first, padding after </s>.

        With `return_scores` also the cross-attention scores (B, N) of the passages; the ids are the same.
        """
        memory = self.encode(input_ids, attention_mask)
        scores = self.crossattention_scores(memory, attention_mask) if return_scores else None
        if num_beams == 1:
            ids = self.greedy(memory, max_length)
        else:
            ids = self.t5.generate(encoder_outputs=BaseModelOutput(memory.states), attention_mask=memory.mask,
                                   max_length=max_length, num_beams=num_beams, do_sample=False,
                                   decoder_start_token_id=self.start_token)
        return (ids, scores) if return_scores else ids

    @property
    def start_token(self):
        """The id that every target begins with."""
        start = self.config.decoder_start_token_id
        return self.config.pad_token_id if start is None else start

    def greedy(self, memory, max_length):
        """The likeliest token at each step, (B, <= max_length); questions that have ended leave the batch."""
        B, device, pad = len(memory.mask), memory.mask.device, self.config.pad_token_id
        ids = torch.full((B, max_length), pad, device=device)
        ids[:, 0] = self.start_token
        active, cache = torch.arange(B, device=device), []
        memory = memory._replace(states=memory.states.to(compute_dtype(device)))  # once, not at each step
        for step in range(1, max_length):
            token = self.decode(ids[active, step - 1:step], memory, cache)[:, -1].argmax(-1)
            ids[active, step] = token
            alive = token != self.config.eos_token_id
            remaining = int(alive.sum())  # the one value per step that the host waits for
            if remaining == 0:
                return ids[:, :step + 1]
            if remaining < len(active):
                active, memory = active[alive], Memory(*(x[alive] for x in memory))
                cache = [(k[alive], v[alive]) for k, v in cache]
                if self.cross_bias is not None:
                    self.cross_bias.memory_places = memory.places
        return ids

    def crossattention_scores(self, memory, attention_mask):
        """(B, N) scores before the softmax of the FIRST decoded token, averaged over layers, heads and a passage's tokens.

        A passage without tokens gets -inf. Source: "Distilling Knowledge from Reader to Retriever", arXiv 2012.04584,
        section 3.2, and FiD's get_crossattention_scores.
        """
        B, N, L = attention_mask.shape
        layers = []                                                                           # of (B, H, 1, M)
        self.decode(torch.full((B, 1), self.start_token, device=memory.mask.device), memory, raw=layers)
        total = torch.stack(layers).mean((0, 2, 3))                                           # (B, M)
        if self.cross_bias is not None:
            total += self.cross_bias.place_bias(B, 1, 0).mean((1, 2))
        owner = memory.places // max(getattr(self.config, "passage_stride", None) or 0, L)    # (B, M) passage of each token
        sums = total.new_zeros(B, N).scatter_add(1, owner, total.masked_fill(~memory.mask, 0))
        counts = attention_mask.sum(2)
        return (sums / counts.clamp(min=1)).masked_fill(counts == 0, float("-inf"))

    # ------------------------------------------------------------------------------------------------ files

    @classmethod
    def from_pretrained(cls, path_or_name, dropout=None):
        """A reader from any of: a T5 folder or hub name, our folder, a released FiD reader, minFiD's file.

        `dropout` replaces the configuration's rate. A folder without weights gives random ones and says so.
        Raises InputError where nothing fits: unknown name, unreadable file, other architecture, other shapes.
        """
        folder, weights = find_model(path_or_name)
        config = read_config(folder)
        if config.model_type not in CLASSES:
            raise InputError(f"{folder}: is a {config.model_type} model; the reader needs T5, T5 v1.1, Flan-T5, mT5 or ByT5")
        if dropout is not None:
            config.dropout_rate = dropout
        separate_head = json.load(open(os.path.join(folder, "config.json"))).get("tie_word_embeddings") is False
        if weights is None:
            weights = read_weights(folder)
        if weights is None:
            if os.environ.get("RANK", "0") == "0":
                print(f"{path_or_name}: no weights there, starting from random initialisation", flush=True)
            t5 = CLASSES[config.model_type](config)
            if separate_head:
                t5.lm_head.weight = nn.Parameter(torch.randn_like(t5.lm_head.weight) * config.d_model ** -0.5)
            return cls(t5)
        return cls(build_t5(config, weights, path_or_name))

    def save_pretrained(self, folder):
        """Writes config.json, generation_config.json and model.safetensors with plain T5 names, as transformers does."""
        os.makedirs(folder, exist_ok=True)
        weights = {plain_key(key): value.detach().contiguous() for key, value in self.t5.state_dict().items()}
        tied = self.t5.lm_head.weight is self.t5.shared.weight
        for key in EMBEDDINGS[1:] + (("lm_head.weight",) if tied else ()):
            del weights[key]
        save_file(weights, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
        config = self.config.to_dict() | {"architectures": [type(self.t5).__name__], "tie_word_embeddings": tied}
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(config, file, indent=2, sort_keys=True)
        self.t5.generation_config.save_pretrained(folder)


def plain_key(key):
    """The T5 name of a weight in FiD's (`encoder.encoder`, `.module.`) or minFiD's (`t5.`, `.t5block.`) wrapping."""
    key = re.sub(r"^encoder\.encoder\.", "encoder.", key.removeprefix("t5."))
    return re.sub(r"\.(module|t5block)\.", ".", key)


def build_t5(config, weights, source):
    """The T5 of a configuration with these weights (any wrapping) in float32; InputError where names or shapes differ."""
    weights = {plain_key(key): value.float() for key, value in weights.items()}
    shared = next((weights[key] for key in EMBEDDINGS if key in weights), torch.empty(0))
    cross_bias = weights.pop(CROSS_BIAS, None)
    tied = "lm_head.weight" not in weights or torch.equal(weights["lm_head.weight"], shared)
    weights |= dict.fromkeys(EMBEDDINGS, shared) | ({"lm_head.weight": shared} if tied else {})
    with torch.device("meta"):  # no time goes into random weights
        t5 = CLASSES[config.model_type](config)
    check_shapes(t5, weights, source)
    t5.load_state_dict(weights, assign=True)
    t5.encoder.embed_tokens.weight = t5.decoder.embed_tokens.weight = t5.shared.weight
    if tied:
        t5.lm_head.weight = t5.shared.weight
    if cross_bias is not None:
        attention = t5.decoder.block[0].layer[1].EncDecAttention
        attention.__class__ = BiasedCrossAttention
        attention.relative_attention_bias = nn.Embedding.from_pretrained(cross_bias, freeze=False)
    return t5
