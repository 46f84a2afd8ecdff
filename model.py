"""Fusion-in-Decoder (Izacard & Grave 2021, arXiv 2007.01282) around a Hugging Face T5.

The encoder reads each passage separately; the decoder attends to all passages at once:

    passages -> pack_passages -> EncoderWrapper -> memory (B, M, D) -> decoder -> logits (B, T, V)

There are B questions with N passages each, of at most L tokens. M is the largest number of real
tokens (no padding) that any question has in all its passages. plain_fid is the paper in a few
lines; FiDT5 computes the same result with hardly any padding.
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
from layers.packing import split_chunks
from layers.t5 import decode, encode, encode_block
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

# by model_type of config.json, which is "t5" for T5 v1.1, Flan-T5 and ByT5 too
CLASSES = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration,
           "umt5": UMT5ForConditionalGeneration}
NEEDED = "the reader needs T5, T5 v1.1, Flan-T5, mT5, umT5 or ByT5"


def plain_fid(t5, input_ids, attention_mask, labels):
    """Return (loss, logits) of Fusion-in-Decoder on a plain T5, with padding; FiDT5 is tested
    against it.
    """
    B, N, L = input_ids.shape
    ids = input_ids.view(B * N, L)                                  # (B, N, L) -> (B * N, L)
    mask = attention_mask.view(B * N, L)
    states = t5.encoder(input_ids=ids, attention_mask=mask).last_hidden_state  # (B * N, L, D)
    memory = states.view(B, N * L, -1)                              # -> (B, N * L, D)
    memory_mask = mask.view(B, N * L)
    output = t5(encoder_outputs=(memory,), attention_mask=memory_mask, labels=labels)
    return output.loss, output.logits


# ---------------------------------------------------------------- encoder

class Memory(NamedTuple):
    """Hold what the decoder attends to: the real tokens of each question's passages in a row, in
    passage order.
    """
    states: torch.Tensor    # (B, M, D)
    mask: torch.Tensor      # (B, M) bool, False at padding
    passages: torch.Tensor  # (B, M) index of each token's passage
    # (B, M) position of token l of passage n in FiD's padded concatenation: n * stride + l
    offsets: torch.Tensor


class CheckpointWrapper(nn.Module):
    """Run a block of the encoder; use_checkpoint turns activation checkpointing on.

    Checkpointing keeps only the block's input. The backward pass computes the block again with the
    same random state, so that dropout drops the same units (arXiv 1604.06174).
    """

    def __init__(self, block):
        super().__init__()
        self.module = block
        self.use_checkpoint = False

    def forward(self, x, groups, p):
        """Return the states (S, D) after the block, see encode_block in layers/t5.py."""
        if self.use_checkpoint and self.training:
            return checkpoint(encode_block, self.module, x, groups, p, use_reentrant=False)
        return encode_block(self.module, x, groups, p)


class EncoderWrapper(nn.Module):
    """Encode passages separately and concatenate their real tokens for the decoder (FiD section 3).

    The passages are packed (pack_passages in data.py). The result equals that of a batch that is
    padded, with its padding masked.
    """
    main_input_name = "input_ids"  # read by transformers' generate()

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        encoder.block = nn.ModuleList(CheckpointWrapper(block) for block in encoder.block)

    def forward(self, packed, stride=None):
        """Return the Memory of PackedPassages. The offsets count every passage as `stride` tokens,
        or as the longest passage if that is more.
        """
        B, M = packed.memory_rows.shape
        states = [encode(self.encoder, *chunk) for chunk in split_chunks(packed.texts)]
        D = self.encoder.config.d_model
        zeros = torch.zeros(1, D, device=packed.memory_rows.device)      # the row of padding
        states = torch.cat([*states, zeros])                             # (S + 1, D)
        memory = states.index_select(0, packed.memory_rows.flatten()).view(B, M, D)
        lengths = packed.counts.sum(1, keepdim=True)                     # (B, 1)
        mask = torch.arange(M, device=lengths.device) < lengths          # (B, M)
        offsets = packed.passages * max(stride or 0, packed.longest) + packed.positions
        return Memory(memory, mask, packed.passages, offsets)


# ---------------------------------------------------------------- decoder

class BiasedCrossAttention(T5Attention):
    """Compute cross-attention with the relative position bias of transformers 3.0.2, which later
    versions removed as a bug.

    FiD's released readers were trained with it. Between target i and the memory token at offset m,
    the bias is that of bucket(max(i - m, 0)). It is the same for all tokens with m >= i, so only
    the first tokens of the first passage get another bias. Decoder block 0 has this attention, and
    all blocks share its bias.
    """
    # (B, M) offsets of the memory, set only while transformers' generate() calls the decoder, which
    # cannot pass them on
    beam_offsets = None

    def forward(self, hidden_states, position_bias=None, past_key_values=None, **kwargs):
        """Attend with the position bias. Only transformers' generate() calls this."""
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
    """Read N passages per question with a T5; the module's docstring explains the shapes."""

    def __init__(self, t5, stated_start=None, ignored=()):
        """Wrap a T5 of transformers.

        stated_start: the decoder start id in the T5's files, or None. ignored: descriptions of the
        settings in these files that are not followed.
        """
        super().__init__()
        self.t5 = t5
        self.t5.encoder = EncoderWrapper(t5.encoder)
        self.config = t5.config
        self.stated_start, self.ignored = stated_start, list(ignored)
        self.id_notes = {}  # {"</s>": the id in config.json, if the tokenizer has another one}
        self.use_checkpoint = False
        # as in transformers, some kinds of T5 scale the states before the output layer
        is_scaled = self.config.model_type == "t5" and self.config.scale_decoder_outputs
        if self.config.model_type == "umt5":
            is_scaled = self.config.tie_word_embeddings
        self.output_scale = self.config.d_model ** -0.5 if is_scaled else 1.0

    @property
    def cross_bias(self):
        """Return the cross-attention with the position bias of FiD's released readers, or None."""
        attention = self.t5.decoder.block[0].layer[1].EncDecAttention
        return attention if isinstance(attention, BiasedCrossAttention) else None

    @property
    def start_token(self):
        """Return the id that every target begins with."""
        start = self.config.decoder_start_token_id
        return self.config.pad_token_id if start is None else start

    @property
    def end_tokens(self):
        """Return the ids that end an answer."""
        ends = self.config.eos_token_id
        return ends if isinstance(ends, list) else [ends]

    def count_answer_tokens(self, max_length):
        """Return how many tokens of an answer fit into max_length, which counts the start token."""
        return max_length - 1

    def set_checkpoint(self, use_checkpoint):
        """Turn activation checkpointing of all blocks on or off."""
        self.use_checkpoint = use_checkpoint
        for block in self.t5.encoder.encoder.block:
            block.use_checkpoint = use_checkpoint

    def check_tokenizer(self, tokenizer):
        """Take over the tokenizer's start, end and padding ids, see settle_ids.

        Raise InputError if the model has no embedding for some of the tokenizer's ids, or if the
        tokenizer has no end token.
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
        """Drop the settings of generation_config.json, and return them as {name: value}. Answers
        are greedy afterwards.
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
        """Return a Collator, which tokenises each passage with the question, and packs the passages
        for the device of the reader.
        """
        return Collator(tokenizer, num_contexts, max_length, self.t5.device.type)

    # ---------------------------------------------------------------- training

    def forward(self, passages, labels, reduction="mean"):
        """Return (loss, logits (B, T, V)) of labels (B, T), where -100 is padding, given
        PackedPassages.

        The loss is the cross-entropy of the labels, their mean or (reduction "sum") their sum.
        """
        memory = self.encode(passages)
        logits = self.decode(self.t5._shift_right(labels), memory)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100,
                               reduction="sum")
        if reduction == "mean":
            loss = loss / labels.ne(-100).sum().clamp(min=1)
        return loss, logits

    def encode(self, passages):
        """Return the Memory of PackedPassages."""
        memory = self.t5.encoder(passages, getattr(self.config, "passage_stride", None))
        device_type = memory.states.device.type
        if torch.is_autocast_enabled(device_type):  # once here, not in each decoder block
            dtype = torch.get_autocast_dtype(device_type)
            memory = memory._replace(states=memory.states.to(dtype))
        return memory

    def decode(self, ids, memory, cache=None, raw_scores=None):
        """Return the float32 logits (B, T, V) of the tokens that follow the target ids (B, T).

        cache, raw_scores: see decode in layers/t5.py.
        """
        # finite, because -inf would give NaN for a question without a real token
        lowest = torch.finfo(torch.float32).min
        bias = torch.zeros(memory.mask.shape, device=ids.device).masked_fill(~memory.mask, lowest)
        bias = bias[:, None, None]  # (B, M) -> (B, 1, 1, M)
        if self.cross_bias is not None:
            past = cache[0][0].shape[2] if cache else 0
            # (B, H, T, M)
            bias = bias + self.cross_bias.position_bias(memory.offsets, ids.shape[1], past)
        states = decode(self.t5.decoder, ids, memory.states, bias, cache, raw_scores,
                        self.training and self.use_checkpoint)
        # without autocast: bfloat16 would round the logits of likely tokens to equal values
        with torch.autocast(ids.device.type, enabled=False):
            return self.t5.lm_head(states * self.output_scale)

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, passages, max_length=50, num_beams=1, return_scores=False, n_best=None):
        """Return ids (B, <= max_length) by greedy or beam search, with the start token first and
        padding after </s>, given PackedPassages.

        return_scores: also return the passages' crossattention_scores (B, N) of this kind (True:
        logits). n_best: return ids (B, n_best, T) of the best answers in the order of beam search,
        and their log probabilities (B, n_best) last.
        """
        memory, others = self.encode(passages), []
        if return_scores:
            kind = "logits" if return_scores is True else return_scores
            others.append(self.crossattention_scores(memory, passages.counts, kind))
        if num_beams == 1 and not self.is_steered:
            ids = self.greedy(memory, max_length)
        else:
            ids = self.search_beams(memory, max_length, num_beams, n_best or 1)
        if n_best:
            ids = ids.unflatten(0, (-1, n_best))                         # (B * n, T) -> (B, n, T)
            others.append(self.log_probabilities(ids, memory))
        return (ids, *others) if others else ids

    def search_beams(self, memory, max_length, num_beams, count):
        """Return the ids (B * count, T) of transformers' generate(), which follows the settings of
        generation_config.json. Raise InputError for settings that fail.
        """
        cross_bias = self.cross_bias
        if cross_bias is not None:
            cross_bias.beam_offsets = memory.offsets
        try:  # float32 states, as from transformers' encoder
            return self.t5.generate(encoder_outputs=BaseModelOutput(memory.states.float()),
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
        """Return log p (B, n) of generated ids (B, n, T): the sum over the tokens from the second
        one to the first </s>.
        """
        ends = torch.tensor(self.end_tokens, device=ids.device)
        columns = []
        for answers in ids.unbind(1):                                                    # (B, T)
            log_p = self.decode(answers[:, :-1], memory).float().log_softmax(-1)  # (B, T - 1, V)
            targets = answers[:, 1:]
            is_end = torch.isin(targets, ends).long()
            is_padding = is_end.cumsum(1) > is_end  # after the first end
            log_p = log_p.gather(2, targets[..., None])[..., 0]                      # (B, T - 1)
            columns.append(log_p.masked_fill(is_padding, 0).double().sum(1))
        return torch.stack(columns, 1)

    @property
    def is_steered(self):
        """Return True if generation_config.json holds settings that change greedy answers."""
        return any(name in GREEDY_SETTINGS for name in list_settings(self.t5.generation_config))

    def greedy(self, memory, max_length):
        """Return the ids (B, <= max_length) of the likeliest token at each step. Questions whose
        answers have ended leave the batch.
        """
        ends = torch.tensor(self.end_tokens, device=memory.mask.device)
        B, device = len(memory.mask), memory.mask.device
        ids = torch.full((B, max_length), self.config.pad_token_id, device=device)
        ids[:, 0] = self.start_token
        active, cache = torch.arange(B, device=device), []
        for step in range(1, max_length):
            token = self.decode(ids[active, step - 1:step], memory, cache)[:, -1].argmax(-1)
            ids[active, step] = token

            # drop the questions that have ended; int() is the only wait for the device in a step
            alive = ~torch.isin(token, ends)
            remaining = int(alive.sum())
            if not remaining:
                return ids[:, :step + 1]
            if remaining < len(active):
                active = active[alive]
                memory = Memory(*(tensor[alive] for tensor in memory))
                cache = [(k[alive], v[alive]) for k, v in cache]
        return ids

    def crossattention_scores(self, memory, counts, kind="logits"):
        """Return scores (B, N) of the passages by the cross-attention of the FIRST decoded token,
        given the passages' numbers of tokens, counts (B, N).

            kind       score of a passage
            logits     mean over layers, heads and its tokens of the scores before the softmax
            attention  log of the attention to all its tokens, averaged over layers and heads

        A passage without tokens gets -inf. Sources: logits is "Distilling Knowledge from Reader to
        Retriever", arXiv 2012.04584, section 3.2, and FiD's get_crossattention_scores; attention
        follows Atlas (arXiv 2208.03299, section 2.2), without its norms of the values.
        """
        B, N = counts.shape
        start = torch.full((B, 1), self.start_token, device=memory.mask.device)
        layer_scores = []  # [(B, H, 1, M)]
        self.decode(start, memory, raw_scores=layer_scores)
        scores = torch.stack(layer_scores)                                   # (layers, B, H, 1, M)
        if self.cross_bias is not None:
            scores = scores + self.cross_bias.position_bias(memory.offsets, 1, 0)
        if kind == "attention":
            is_padding = ~memory.mask[:, None, None]                                 # (B, 1, 1, M)
            scores = torch.softmax(scores.masked_fill(is_padding, float("-inf")), -1)
        token_scores = scores.mean((0, 2, 3)).masked_fill(~memory.mask, 0)               # (B, M)
        sums = token_scores.new_zeros(B, N).scatter_add(1, memory.passages, token_scores)
        if kind == "attention":
            passage_scores = sums.clamp(min=1e-30).log()  # the log of 0 would be -inf
        else:
            passage_scores = sums / counts.clamp(min=1)
        return passage_scores.masked_fill(counts == 0, float("-inf"))

    # ---------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, path_or_name, dropout=None, trained=False):
        """Return the reader of a T5's folder or hub name, a folder written here, a released FiD
        reader or minFiD's file.

        `dropout` replaces the configuration's rate. For a folder without weights, log a note and
        return a reader with random weights, unless it must be `trained`. Raise InputError for an
        unknown name, an unreadable file, another architecture, or weights of other shapes.
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
            if generation.eos_token_id is not None:  # used by transformers' generate()
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
        """Return True if the output layer shares its weight with the embedding."""
        return self.t5.lm_head.weight is self.t5.shared.weight

    def plain_weights(self):
        """Return {plain T5 name: weight}, without the copies of the embedding."""
        weights = {plain_key(key): value
                   for key, value in self.t5.state_dict(keep_vars=True).items()}
        copies = [key for key in EMBEDDINGS[1:] if weights[key] is weights[EMBEDDINGS[0]]]
        return {key: value.detach() for key, value in weights.items() if key not in copies}

    def save_pretrained(self, folder):
        """Write config.json, generation_config.json and model.safetensors as transformers does."""
        os.makedirs(folder, exist_ok=True)
        write_weights(folder, self.plain_weights())
        config = self.config.to_dict() | {"architectures": [type(self.t5).__name__],
                                          "tie_word_embeddings": self.is_tied, "dtype": "float32"}
        if self.config.model_type == "t5":  # T5 reads it as "scale the states", see __init__
            config["tie_word_embeddings"] = self.config.scale_decoder_outputs
        if self.cross_bias is not None:
            config[CROSS_BIAS_MARK] = True
        else:
            config.pop("passage_stride", None)
            config.pop(CROSS_BIAS_MARK, None)
        with open(os.path.join(folder, "config.json"), "w") as file:
            json.dump(config, file, indent=2, sort_keys=True)
        self.t5.generation_config.save_pretrained(folder)


# ---------------------------------------------------------------- building a T5

def check_special_tokens(config, folder):
    """Raise InputError for a start, padding or end id that is not in the vocabulary."""
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
    """Return a T5 with random weights; its output layer is untied if config.json has
    tie_word_embeddings false.
    """
    t5 = CLASSES[config.model_type](config)
    settings = read_settings(os.path.join(folder, "config.json"))
    is_tied = settings.get("tie_word_embeddings") is not False
    if not is_tied:
        random_head = torch.randn_like(t5.lm_head.weight) * config.d_model ** -0.5
        t5.lm_head.weight = nn.Parameter(random_head)
    return t5


def build_t5(config, weights, source, settings=None):
    """Return the float32 T5 of a configuration with these weights, under plain or wrapped names.

    settings: the content of config.json. Raise InputError, which names `source`, for weights with
    other names or shapes.
    """
    with torch.device("meta"):  # the weights below replace all of these: no random numbers needed
        t5 = CLASSES[config.model_type](config)
    with_bias = has_cross_bias(weights, settings or {})
    weights = {plain_key(key): value.float() for key, value in weights.items()}
    weights = drop_wrapper(weights, t5.state_dict(), source)
    cross_bias = weights.pop(CROSS_BIAS, None)
    if cross_bias is None and (settings or {}).get(CROSS_BIAS_MARK):
        check_fit([CROSS_BIAS], [], [], source)
    if cross_bias is not None and not with_bias:
        log_on_main(f"note: {source}: {CROSS_BIAS} is left out, as in transformers; only FiD's "
                    "readers use this leftover of T5's first release")
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
