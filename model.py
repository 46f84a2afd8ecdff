"""Fusion-in-Decoder (Izacard & Grave 2021, arXiv 2007.01282) around a Hugging Face T5.

The encoder reads every passage by itself, the decoder attends to all of them at once:

    input_ids (B, N, L) -> EncoderWrapper -> memory (B, M, D) -> decoder -> logits (B, T, V)

B questions, N passages each, L tokens at most; M is the number of real tokens of the longest
question. plain_fid says it in a few lines; FiDT5 computes the same without padding.
"""
import json
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    MT5ForConditionalGeneration,
    T5ForConditionalGeneration,
    UMT5ForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention

from data import Collator
from layers.packed_attention import group_texts, split_by_length
from layers.t5 import decode, encode
from reader.base import Reader
from records.reading import read_settings
from training.checkpoints import (
    announce_random_start,
    check_fit,
    check_vocabulary,
    drop_wrapper,
    find_model,
    find_weights,
    fit_weights,
    log_on_main,
    read_config,
    read_weights,
    refuse_quantised,
    write_weights,
)
from training.t5_folder import (
    CROSS_BIAS,
    CROSS_BIAS_MARK,
    EMBEDDINGS,
    GREEDY_SETTINGS,
    has_cross_bias,
    list_settings,
    plain_key,
    read_generation,
    read_start,
    settle_ids,
    share_embeddings,
)
from utils import InputError, first_line, refusing, shorten

CHUNK_TOKENS = {"cpu": 4096, "cuda": 32768}  # encoded at a time, counted with padding
BY_BLOCK = {"cpu": False, "cuda": True}  # do all chunks pass one block before the next?
# a finite mask: a question without a token attends to all of its padding
LOWEST = torch.finfo(torch.float32).min
# v1.1, Flan and ByT5 are one of them
CLASSES = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration,
           "umt5": UMT5ForConditionalGeneration}
NEEDED = "the reader needs T5, T5 v1.1, Flan-T5, mT5, umT5 or ByT5"


def plain_fid(t5, input_ids, attention_mask, labels):
    """(loss, logits) of Fusion-in-Decoder on a plain T5, all padded; FiDT5 is tested against it."""
    B, N, L = input_ids.shape
    ids = input_ids.view(B * N, L)                                  # (B, N, L) -> (B * N, L)
    mask = attention_mask.view(B * N, L)
    states = t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # each by itself
    memory = states.view(B, N * L, -1)                              # (B * N, L, D) -> (B, N * L, D)
    memory_mask = mask.view(B, N * L)
    output = t5(encoder_outputs=(memory,), attention_mask=memory_mask, labels=labels)
    return output.loss, output.logits


# ---------------------------------------------------------------- encoder

class Memory(NamedTuple):
    """What the decoder attends to: the real tokens of each question's passages, side by side, in
    passage order.
    """
    states: torch.Tensor   # (B, M, D)
    mask: torch.Tensor     # (B, M) bool
    # (B, M) offset of each token in the originals' padded concatenation, n * stride + l
    offsets: torch.Tensor


class CheckpointWrapper(nn.Module):
    """The encoder's blocks on chunks of passages; with use_checkpoint a chunk's result alone is
    kept.

    The backward pass then computes the chunk again under the random state of the first pass, so
    that dropout drops the same units (arXiv 1604.06174). GPU kernels need larger chunks, and the
    activations of all blocks on such a chunk would not fit. There all chunks pass one block before
    the next, and the inputs of each block are kept.
    """

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.use_checkpoint = False

    def forward(self, chunks):
        """Return the states [(S, D)] of chunks [(ids, groups)], see layers.encode."""
        use_checkpoint = self.use_checkpoint and self.training
        if BY_BLOCK[self.module.embed_tokens.weight.device.type]:
            return encode(self.module, chunks, use_checkpoint)
        if use_checkpoint:
            return [checkpoint(encode, self.module, [chunk], use_reentrant=False)[0]
                    for chunk in chunks]
        return [encode(self.module, [chunk])[0] for chunk in chunks]


class EncoderWrapper(nn.Module):
    """Encodes (B, N, L) passages independently and concatenates their real tokens for the decoder
    (FiD section 3).

    Passages are sorted by length and encoded in chunks of at most CHUNK_TOKENS tokens, side by
    side and without padding. The result equals that of the padded batch, whose padding is masked.
    Two questions with passages of [3, 1] and [2, 0] tokens (B = 2, N = 2, L = 3):

        input_ids           packed, longest passage first       memory (M = 4)
        a1 a2 a3 | b1 - -
        c1 c2 -  | -  - -   a1 a2 a3  c1 c2  b1                 a1 a2 a3 b1
                            rows of the memory laid flat:       c1 c2 -  -
                            0  1  2   4  5   3
    """
    main_input_name = "input_ids"  # Hugging Face's generate() asks for it

    def __init__(self, encoder):
        super().__init__()
        self.encoder = CheckpointWrapper(encoder)

    def forward(self, input_ids, attention_mask, stride=None):
        """The Memory of the passages; `stride` is the padded length that the offsets count with, L
        at least.
        """
        B, N, L = input_ids.shape
        device, mask = input_ids.device, attention_mask.bool().contiguous()
        if not (mask[..., 1:] <= mask[..., :-1]).all():
            raise ValueError("attention_mask must have each passage's real tokens first and its "
                             "padding after them")

        # pack: the real tokens of all passages in one row, longest passage first
        lengths, order = mask.sum(2).flatten().sort(descending=True, stable=True)   # (B * N) both
        positions = torch.arange(B * N * L, device=device).view(B * N, L)
        packed = positions[order][mask.view(B * N, L)[order]]   # (S) positions of the real tokens

        # where each token goes: its question's row of the memory, after the real tokens before it
        question_lengths = mask.sum((1, 2))                                         # (B)
        M = max(1, int(question_lengths.max()))
        columns = mask.view(B, N * L).cumsum(1) - 1                                 # (B, N * L)
        rows = M * torch.arange(B, device=device)[:, None] + columns   # of the memory laid flat
        memory_rows = rows.flatten()[packed]                                        # (S)

        # encode, and put every token into its place; index_put keeps no second copy of the states
        ids = input_ids.flatten()[packed]                                           # (S)
        states = self.encode_chunks(ids, lengths[lengths > 0].tolist())             # (S, D)
        memory = states.new_zeros(B * M, states.shape[1]).index_put((memory_rows,), states)
        memory_mask = torch.arange(M, device=device) < question_lengths[:, None]    # (B, M)

        # the offset that the token has where every passage is padded to the stride
        passage, token = packed % (N * L) // L, packed % L                          # (S) both
        offsets = torch.zeros(B * M, dtype=torch.long, device=device)
        offsets[memory_rows] = passage * max(stride or 0, L) + token
        return Memory(memory.view(B, M, -1), memory_mask, offsets.view(B, M))

    def encode_chunks(self, ids, lengths):
        """States (S, D) of packed token ids (S) of passages of falling lengths, a chunk at a time.
        """
        chunks, start = [], 0
        for first, last in split_by_length(lengths, CHUNK_TOKENS[ids.device.type]):
            chunk_lengths = lengths[first:last]
            end = start + sum(chunk_lengths)
            chunks.append((ids[start:end], group_texts(chunk_lengths, ids.device)))
            start = end
        nothing = torch.zeros(0, self.encoder.module.config.d_model, device=ids.device)
        return torch.cat([nothing, *self.encoder(chunks)])


# ---------------------------------------------------------------- decoder

class BiasedCrossAttention(T5Attention):
    """Cross-attention with the relative position bias that transformers 3.0.2 applied there
    (removed later as a bug).

    The released FiD readers were trained with it. Target i sees the bias of bucket(max(i - offset,
    0)), so only the first tokens of the first passage differ from a constant. Used in decoder block
    0, whose bias all blocks share.
    """
    # (B, M) offsets of the memory during transformers' beam search, whose calls cannot pass them
    beam_offsets = None

    def forward(self, hidden_states, position_bias=None, past_key_values=None, **kwargs):
        """Attend with the position bias, as called by transformers' decoder in beam search."""
        if position_bias is None:
            batch_size, T = hidden_states.shape[:2]
            # block 0's self-attention has already added these targets to its cache
            past = past_key_values.get_seq_length() - T if past_key_values is not None else 0
            beams = batch_size // len(self.beam_offsets)
            offsets = self.beam_offsets.repeat_interleave(beams, dim=0)  # (B, M) -> (B * beams, M)
            position_bias = self.position_bias(offsets, T, past)
        return super().forward(hidden_states, position_bias=position_bias,
                               past_key_values=past_key_values, **kwargs)

    def position_bias(self, offsets, T, past):
        """Return the bias (B, H, T, M) of the targets past .. past + T - 1 at the memory's offsets
        (B, M).
        """
        targets = torch.arange(past, past + T, device=offsets.device)
        bucket = self._relative_position_bucket(offsets[:, None, :] - targets[:, None],
                                                bidirectional=False,
                                                num_buckets=self.relative_attention_num_buckets,
                                                max_distance=self.relative_attention_max_distance)
        # (., T, M, H) -> (., H, T, M)
        return self.relative_attention_bias(bucket).permute(0, 3, 1, 2)


class FiDT5(Reader):
    """A T5 whose encoder reads N passages per question; see the module's docstring for shapes."""

    def __init__(self, t5, stated_start=None, ignored=()):
        """Wrap a T5 of transformers.

        stated_start: the id that targets begin with, if the T5's files name one.
        ignored: the settings of these files that are not followed, in words.
        """
        super().__init__()
        self.t5 = t5
        self.t5.encoder = EncoderWrapper(t5.encoder)
        self.config = t5.config
        self.stated_start, self.ignored = stated_start, list(ignored)
        self.id_notes = {}  # {"</s>", ...: what config.json says in place of the tokenizer's id}

    @property
    def cross_bias(self):
        """The cross-attention that holds the released readers' position bias, or None."""
        attention = self.t5.decoder.block[0].layer[1].EncDecAttention
        return attention if isinstance(attention, BiasedCrossAttention) else None

    @property
    def start_token(self):
        """The id that every target begins with."""
        start = self.config.decoder_start_token_id
        return self.config.pad_token_id if start is None else start

    @property
    def end_tokens(self):
        """Return the ids that end an answer."""
        ends = self.config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def count_answer_tokens(self, max_length):
        """Return how many tokens of an answer generate() can give: the start token is not one."""
        return max_length - 1

    @property
    def use_checkpoint(self):
        return self.t5.encoder.encoder.use_checkpoint

    def set_checkpoint(self, use_checkpoint):
        """Turns activation recomputation of the encoder and of the cross-attention on or off."""
        self.t5.encoder.encoder.use_checkpoint = use_checkpoint

    def check_tokenizer(self, tokenizer):
        """Make the ids of the reader those of its tokenizer, see settle_ids.

        Raise InputError if the tokenizer has ids that the model has no embedding for, or no end.
        """
        check_vocabulary(tokenizer, self.t5.shared, "name the model that the tokenizer belongs to "
                         "with --tokenizer")
        ends, pad = self.end_tokens, self.config.pad_token_id
        ids = settle_ids(self.stated_start, ends, pad, tokenizer)
        if tokenizer.eos_token_id not in ends:
            self.id_notes["</s>"] = ends[0]
        if ids.pad != pad:
            self.id_notes["<pad>"] = pad
        ends = ids.ends if len(ids.ends) > 1 else ids.ends[0]
        for config in (self.config, self.t5.generation_config):
            config.decoder_start_token_id, config.pad_token_id = ids.start, ids.pad
            config.eos_token_id = ends

    def forget_generation(self):
        """Return the settings of generation_config.json, {name: value}, and answer greedily without
        them from now on, as a reader that is trained here does.
        """
        generation = self.t5.generation_config
        settings = list_settings(generation)
        for name in settings:
            setattr(generation, name, None)
        return settings

    def set_lengths(self, max_length, answer_maxlength):
        """Set the length that FiD's code padded passages to; only the position bias of its released
        readers depends on it.
        """
        self.config.passage_stride = max_length

    def make_collator(self, tokenizer, num_contexts, max_length):
        """Return a Collator, which tokenises each passage with the question."""
        return Collator(tokenizer, num_contexts, max_length)

    # ---------------------------------------------------------------- training

    def forward(self, input_ids, attention_mask, labels, reduction="mean"):
        """(loss, logits (B, T, V)): cross-entropy over the labels (B, T) that are not -100, their
        mean or their sum.
        """
        memory = self.encode(input_ids, attention_mask)
        logits = self.decode(self.t5._shift_right(labels), memory)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100,
                               reduction="sum")
        if reduction == "mean":
            loss = loss / labels.ne(-100).sum().clamp(min=1)
        return loss, logits

    def encode(self, input_ids, attention_mask):
        """Return the Memory of (B, N, L) passages."""
        return self.t5.encoder(input_ids, attention_mask,
                               getattr(self.config, "passage_stride", None))

    def decode(self, ids, memory, cache=None, raw_scores=None):
        """Return logits (B, T, V), float32, after the target ids (B, T); see layers.decode for
        `cache` and `raw_scores`.
        """
        bias = torch.zeros(memory.mask.shape, device=ids.device).masked_fill(~memory.mask, LOWEST)
        bias = bias[:, None, None]  # (B, M) -> (B, 1, 1, M)
        if self.cross_bias is not None:
            past = cache[0][0].shape[2] if cache else 0
            # (B, H, T, M)
            bias = bias + self.cross_bias.position_bias(memory.offsets, ids.shape[1], past)
        use_checkpoint = self.training and self.use_checkpoint
        states = decode(self.t5.decoder, ids, in_product_dtype(memory.states), bias, cache,
                        raw_scores, use_checkpoint)
        if self.scales_states:
            states = states * self.config.d_model ** -0.5
        # rounding would make likely tokens equal
        with torch.autocast(ids.device.type, enabled=False):
            return self.t5.lm_head(states)

    @property
    def scales_states(self):
        """Return True if the decoder's states are scaled before the output layer, as in
        transformers.
        """
        config = self.config
        if config.model_type == "umt5":
            return config.tie_word_embeddings
        return config.model_type == "t5" and config.scale_decoder_outputs

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_length=50, num_beams=1, return_scores=False,
                 n_best=None):
        """Return ids (B, <= max_length), greedy or by beam search: the start token first, padding
        after </s>.

        With `return_scores`, the kind of crossattention_scores (True: logits), also return the
        scores (B, N) of the passages; the ids are the same. With `n_best` n the ids are (B, n, T),
        the n best answers in beam search's order, and their log probabilities (B, n) come last.
        """
        memory, others = self.encode(input_ids, attention_mask), []
        if return_scores:
            kind = "logits" if return_scores is True else return_scores
            others.append(self.crossattention_scores(memory, attention_mask, kind))
        if num_beams == 1 and not self.is_steered:
            ids = self.greedy(memory, max_length)
        else:
            ids = self.generate_as_set(memory, max_length, num_beams, n_best or 1)
        if n_best:
            ids = ids.view(len(input_ids), n_best, -1)                   # (B * n, T) -> (B, n, T)
            others.append(self.log_probabilities(ids, memory))
        return (ids, *others) if others else ids

    def generate_as_set(self, memory, max_length, num_beams, count):
        """Return the ids (B * count, T) of transformers' generate(), which follows the settings of
        generation_config.json. Raise InputError for settings that fail.
        """
        cross_bias = self.cross_bias
        if cross_bias is not None:
            cross_bias.beam_offsets = memory.offsets
        try:
            return self.t5.generate(encoder_outputs=BaseModelOutput(memory.states),
                                    attention_mask=memory.mask, max_length=max_length,
                                    num_beams=num_beams, do_sample=False,
                                    num_return_sequences=count,
                                    decoder_start_token_id=self.start_token,
                                    eos_token_id=self.end_tokens,
                                    pad_token_id=self.config.pad_token_id)
        except (ValueError, TypeError) as error:
            settings = list_settings(self.t5.generation_config)
            if not settings:
                raise
            raise InputError(f"generation_config.json has settings, among {', '.join(settings)}, "
                             f"that cannot be followed ({first_line(error)}); correct them, or "
                             "take them out of the file") from error
        finally:
            if cross_bias is not None:
                cross_bias.beam_offsets = None

    def log_probabilities(self, ids, memory):
        """Return log p (B, n) of generated ids (B, n, T): the sum over their tokens after the start
        token, the first </s> included.
        """
        ends = torch.tensor(self.end_tokens, device=ids.device)
        columns = []
        for answers in ids.unbind(1):                                                    # (B, T)
            log_p = self.decode(answers[:, :-1], memory).float().log_softmax(-1)  # (B, T - 1, V)
            targets = answers[:, 1:]
            is_end = torch.isin(targets, ends).long()
            is_padding = is_end.cumsum(1) > is_end  # what follows an end
            log_p = log_p.gather(2, targets[..., None])[..., 0]                      # (B, T - 1)
            columns.append(log_p.masked_fill(is_padding, 0).double().sum(1))
        return torch.stack(columns, 1)

    @property
    def is_steered(self):
        """Return True if generation_config.json holds settings that change greedy answers."""
        return any(name in GREEDY_SETTINGS for name in list_settings(self.t5.generation_config))

    def greedy(self, memory, max_length):
        """Return the likeliest token at each step, (B, <= max_length); questions that have ended
        leave the batch.
        """
        ends = torch.tensor(self.end_tokens, device=memory.mask.device)
        B, device = len(memory.mask), memory.mask.device
        ids = torch.full((B, max_length), self.config.pad_token_id, device=device)
        ids[:, 0] = self.start_token
        active, cache = torch.arange(B, device=device), []
        memory = memory._replace(states=in_product_dtype(memory.states))  # once, not at each step
        for step in range(1, max_length):
            token = self.decode(ids[active, step - 1:step], memory, cache)[:, -1].argmax(-1)
            ids[active, step] = token

            # questions that have ended leave; their number is the one value per step that the host
            # waits for
            alive = ~torch.isin(token, ends)
            remaining = int(alive.sum())
            if not remaining:
                return ids[:, :step + 1]
            if remaining < len(active):
                active = active[alive]
                memory = Memory(*(tensor[alive] for tensor in memory))
                cache = [(k[alive], v[alive]) for k, v in cache]
        return ids

    def crossattention_scores(self, memory, attention_mask, kind="logits"):
        """(B, N) scores of the passages by the cross-attention of the FIRST decoded token.

            kind       of a passage
            logits     the scores before the softmax, averaged over layers, heads and its tokens
            attention  the log of the attention that its tokens get together, averaged over layers
                       and heads

        A passage without tokens gets -inf. Sources: logits is "Distilling Knowledge from Reader to
        Retriever", arXiv 2012.04584, section 3.2, and FiD's get_crossattention_scores; attention
        follows Atlas (arXiv 2208.03299, section 2.2), without its norms of the values.
        """
        B, N, L = attention_mask.shape
        start = torch.full((B, 1), self.start_token, device=memory.mask.device)
        layer_scores = []  # of (B, H, 1, M)
        self.decode(start, memory, raw_scores=layer_scores)
        scores = torch.stack(layer_scores)                                   # (layers, B, H, 1, M)
        if self.cross_bias is not None:
            scores = scores + self.cross_bias.position_bias(memory.offsets, 1, 0)
        if kind == "attention":
            is_padding = ~memory.mask[:, None, None]                                 # (B, 1, 1, M)
            scores = torch.softmax(scores.masked_fill(is_padding, float("-inf")), -1)
        token_scores = scores.mean((0, 2, 3)).masked_fill(~memory.mask, 0)               # (B, M)
        stride = max(getattr(self.config, "passage_stride", None) or 0, L)
        passage = memory.offsets // stride  # (B, M) passage of each token
        sums = token_scores.new_zeros(B, N).scatter_add(1, passage, token_scores)
        counts = attention_mask.sum(2)                                                   # (B, N)
        if kind == "attention":
            passage_scores = sums.clamp(min=1e-30).log()  # a share of 0 has no finite logarithm
        else:
            passage_scores = sums / counts.clamp(min=1)
        return passage_scores.masked_fill(counts == 0, float("-inf"))

    # ---------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, path_or_name, dropout=None, trained=False):
        """Return a reader from any of: a T5 folder or hub name, our folder, a released FiD reader,
        minFiD's file.

        `dropout` replaces the configuration's rate. A folder without weights gives random ones and
        says so, or is refused if it must be `trained`. Raise InputError where nothing fits: unknown
        name, unreadable file, other architecture, other shapes.
        """
        folder, weights = find_model(path_or_name)
        config = read_config(folder)
        if config.model_type not in CLASSES:
            raise InputError(f"{folder}: is a {config.model_type} model; {NEEDED}")
        refuse_quantised(config, path_or_name)
        if dropout is not None:
            config.dropout_rate = dropout
        if weights is None:
            find_weights(folder, required=trained)
            weights = read_weights(folder)
        generation, ignored = read_generation(folder, config)
        stated_start = read_start(folder, config, generation)
        start = config.pad_token_id if stated_start is None else stated_start
        with refusing(f"{folder}: the ids of generation_config.json cannot be used",
                      "correct them"):
            config.decoder_start_token_id = generation.decoder_start_token_id = start
            if generation.eos_token_id is not None:  # which transformers' generate goes by
                config.eos_token_id = generation.eos_token_id
        check_special_tokens(config, folder)
        with refusing(f"{path_or_name}: no T5 can be built of its config.json and weights",
                      "give the folder of a trained model, or of a T5"):
            if weights is None:
                announce_random_start(path_or_name)
                t5 = build_random_t5(config, folder)
            else:
                settings = read_settings(os.path.join(folder, "config.json"))
                t5 = build_t5(config, weights, path_or_name, settings)
        t5.generation_config = generation
        return cls(t5, stated_start, ignored)

    @property
    def is_tied(self):
        """True if the output layer is the embedding."""
        return self.t5.lm_head.weight is self.t5.shared.weight

    def plain_weights(self):
        """Return {plain T5 name: weight}, each once."""
        weights = {plain_key(key): value
                   for key, value in self.t5.state_dict(keep_vars=True).items()}
        copies = [key for key in EMBEDDINGS[1:] if weights[key] is weights[EMBEDDINGS[0]]]
        return {key: value.detach() for key, value in weights.items() if key not in copies}

    def save_pretrained(self, folder):
        """Write config.json, generation_config.json and model.safetensors with plain T5 names, as
        transformers does.
        """
        os.makedirs(folder, exist_ok=True)
        write_weights(folder, self.plain_weights())
        config = self.config.to_dict() | {"architectures": [type(self.t5).__name__],
                                          "tie_word_embeddings": self.is_tied, "dtype": "float32"}
        if self.config.model_type == "t5":  # T5's name for scaling what goes into the output layer
            config["tie_word_embeddings"] = self.config.scale_decoder_outputs
        if self.cross_bias is not None:
            config[CROSS_BIAS_MARK] = True
        else:
            config.pop("passage_stride", None)
            config.pop(CROSS_BIAS_MARK, None)
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(config, file, indent=2, sort_keys=True)
        self.t5.generation_config.save_pretrained(folder)


def in_product_dtype(x):
    """x in the type that matrix products have now: autocast's where it is on."""
    device_type = x.device.type
    if torch.is_autocast_enabled(device_type):
        return x.to(torch.get_autocast_dtype(device_type))
    return x


# ---------------------------------------------------------------- building a T5

def check_special_tokens(config, folder):
    """Raise InputError for a start, padding or end token that is not in the vocabulary."""
    ends = config.eos_token_id
    named = [("decoder_start_token_id", config.decoder_start_token_id),
             ("pad_token_id", config.pad_token_id)]
    named += [("eos_token_id", end) for end in (ends if isinstance(ends, list) else [ends])]
    for name, token in named:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            raise InputError(f"{folder}: config.json or generation_config.json has {name} "
                             f"{shorten(token)}, which is no id of its vocabulary; give the folder "
                             "of a trained model, or of a T5")


def build_random_t5(config, folder):
    """A T5 of a configuration at random initialisation; its output layer is its own if config.json
    says so.
    """
    t5 = CLASSES[config.model_type](config)
    settings = read_settings(os.path.join(folder, "config.json"))
    is_tied = settings.get("tie_word_embeddings") is not False
    if not is_tied:
        random_head = torch.randn_like(t5.lm_head.weight) * config.d_model ** -0.5
        t5.lm_head.weight = nn.Parameter(random_head)
    return t5


def build_t5(config, weights, source, settings=None):
    """Return the float32 T5 of a configuration with these weights (any wrapping); `settings` are
    config.json's.

    Raise InputError, which names `source`, where names or shapes differ.
    """
    with torch.device("meta"):  # no time goes into random weights
        t5 = CLASSES[config.model_type](config)
    with_bias = has_cross_bias(weights, settings or {})
    weights = {plain_key(key): value.float() for key, value in weights.items()}
    weights = drop_wrapper(weights, t5.state_dict(), source)
    cross_bias = weights.pop(CROSS_BIAS, None)
    if cross_bias is None and (settings or {}).get(CROSS_BIAS_MARK):
        check_fit([CROSS_BIAS], [], [], source)
    if cross_bias is not None and not with_bias:
        log_on_main(f"note: {source}: {CROSS_BIAS} is left out, as in transformers: it is a "
                    "leftover of T5's first release, which only FiD's readers use")
        cross_bias = None
    weights = fit_weights(share_embeddings(weights), t5.state_dict(), source)
    t5.load_state_dict(weights, assign=True)
    for name in EMBEDDINGS[1:]:
        if weights[name] is weights[EMBEDDINGS[0]]:
            t5.get_submodule(name.removesuffix(".weight")).weight = t5.shared.weight
    if cross_bias is not None:
        attention = t5.decoder.block[0].layer[1].EncDecAttention
        attention.__class__ = BiasedCrossAttention
        attention.relative_attention_bias = nn.Embedding.from_pretrained(cross_bias, freeze=False)
    return t5
