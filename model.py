"""Fusion-in-Decoder (Izacard & Grave 2021, arXiv 2007.01282) around a Hugging Face T5.

The encoder reads every passage by itself, the decoder attends to all of them at once:

    input_ids (B, N, L) -> EncoderWrapper -> memory (B, M, D) -> decoder -> logits (B, T, V)

B questions, N passages each, L tokens at most; M is the number of real tokens of the longest question.
"""
import argparse
import json
import os
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, MT5ForConditionalGeneration, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.t5.modeling_t5 import T5Attention

from utils import InputError, read_args

CHUNK_TOKENS = {"cpu": 4096, "cuda": 65536}  # encoded at a time: little padding, a CPU's cache or a GPU well used
CROSS_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
CLASSES = {"t5": T5ForConditionalGeneration, "mt5": MT5ForConditionalGeneration}  # v1.1, Flan and ByT5 are "t5" or "mt5"


class Memory(NamedTuple):
    """What the decoder attends to: the real tokens of each question's passages, side by side, in passage order."""
    states: torch.Tensor  # (B, M, D)
    mask: torch.Tensor    # (B, M) bool
    places: torch.Tensor  # (B, M) place of each token in the original's padded concatenation, n * stride + l


class CheckpointWrapper(nn.Module):
    """One encoder block that, with use_checkpoint, keeps its input only and is computed again in the backward pass.

    The random state of the first pass is replayed, so dropout drops the same units (arXiv 1604.06174).
    """

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.use_checkpoint = False

    def forward(self, *args, **kwargs):
        if self.use_checkpoint and self.training:
            return checkpoint(self.module, *args, use_reentrant=False, preserve_rng_state=True, **kwargs)
        return self.module(*args, **kwargs)


class EncoderWrapper(nn.Module):
    """Encodes (B, N, L) passages independently and concatenates their real tokens for the decoder (FiD section 3).

    Passages go through the T5 encoder in chunks of similar length, each cut to its longest: no time is spent on absent
    passages and little on padding. The result equals that of the padded batch, attention being masked there.
    """
    main_input_name = "input_ids"  # Hugging Face's generate() asks for it

    def __init__(self, encoder):
        super().__init__()
        encoder.block = nn.ModuleList([CheckpointWrapper(block) for block in encoder.block])
        self.encoder = encoder

    def forward(self, input_ids, attention_mask, stride=None):
        B, N, L = input_ids.shape
        stride = max(stride or 0, L)
        mask = attention_mask.bool()
        per_question = mask.view(B, N * L)
        widest = max(1, int(per_question.sum(1).max()))                                      # M
        column = (per_question.cumsum(1) - 1).view(B * N, L)                                 # target place in the memory
        row = torch.arange(B, device=mask.device).repeat_interleave(N)[:, None].expand(-1, L)
        place = (torch.arange(N, device=mask.device)[:, None] * stride + torch.arange(L, device=mask.device)).repeat(B, 1)
        input_ids, mask = input_ids.reshape(B * N, L), mask.view(B * N, L)                   # (B, N, L) -> (B*N, L)
        found = []                                                                           # (states, row, column, place)
        for chunk, length in self.chunks(mask):
            real = mask[chunk, :length]
            states = self.encoder(input_ids=input_ids[chunk, :length], attention_mask=real).last_hidden_state
            found.append((states[real], row[chunk, :length][real], column[chunk, :length][real], place[chunk, :length][real]))
        if not found:  # no question of the batch has a token: one blank place each, masked
            blank = torch.zeros(B, 1, self.encoder.config.d_model, device=mask.device)
            return Memory(blank, blank[..., 0].bool(), blank[..., 0].long())
        states, row, column, place = (torch.cat(parts) for parts in zip(*found))             # (all real tokens, ...)
        memory = states.new_zeros(B, widest, states.shape[-1]).index_put((row, column), states)
        places = place.new_zeros(B, widest).index_put((row, column), place)
        return Memory(memory, torch.zeros_like(places, dtype=torch.bool).index_put((row, column), real.new_ones(())), places)

    @staticmethod
    def chunks(mask):
        """(passage numbers, length) of each chunk: passages by length, at most CHUNK_TOKENS tokens, empty ones left out."""
        lengths = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).amax(1)
        lengths, order = lengths.sort(descending=True, stable=True)
        lengths, start = [n for n in lengths.tolist() if n > 0], 0
        while start < len(lengths):
            end = min(len(lengths), start + max(1, CHUNK_TOKENS[mask.device.type] // lengths[start]))
            yield order[start:end], lengths[start]
            start = end


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
        """Turns activation recomputation of the encoder on or off."""
        for block in self.t5.encoder.encoder.block:
            block.use_checkpoint = use_checkpoint

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
        logits = self.t5(encoder_outputs=BaseModelOutput(memory.states), attention_mask=memory.mask,
                         decoder_input_ids=self.t5._shift_right(labels), use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        return loss / labels.ne(-100).sum().clamp(min=1) if reduction == "mean" else loss, logits

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, max_length=50, num_beams=1, return_scores=False):
        """Ids (B, <= max_length), greedy or by beam search: the start token first, padding after </s>.

        With `return_scores` also the cross-attention scores (B, N) of the passages; the ids are the same.
        """
        memory = self.encode(input_ids, attention_mask)
        scores = self.crossattention_scores(memory, attention_mask) if return_scores else None
        start = self.config.decoder_start_token_id
        ids = self.t5.generate(encoder_outputs=BaseModelOutput(memory.states), attention_mask=memory.mask,
                               max_length=max_length, num_beams=num_beams, do_sample=False,
                               decoder_start_token_id=self.config.pad_token_id if start is None else start)
        return (ids, scores) if return_scores else ids

    def crossattention_scores(self, memory, attention_mask):
        """(B, N) scores before the softmax of the FIRST decoded token, averaged over layers, heads and a passage's tokens.

        A passage without tokens gets -inf. Source: "Distilling Knowledge from Reader to Retriever", arXiv 2012.04584,
        section 3.2, and FiD's get_crossattention_scores.
        """
        B, N, L = attention_mask.shape
        blocks, total = self.t5.decoder.block, torch.zeros(memory.mask.shape, device=memory.mask.device)

        def add_scores(attention, args, kwargs):
            query, key = attention.q(args[0]), attention.k(memory.states)  # (B, 1, inner), (B, M, inner)
            total.add_((key @ query.transpose(1, 2)).squeeze(2).float())   # the heads' dot products add up

        hooks = [block.layer[1].EncDecAttention.register_forward_pre_hook(add_scores, with_kwargs=True) for block in blocks]
        start = self.t5._shift_right(torch.full((B, 1), -100, device=total.device))
        try:
            self.t5.decoder(input_ids=start, encoder_hidden_states=memory.states, encoder_attention_mask=memory.mask)
        finally:
            for hook in hooks:
                hook.remove()
        if self.cross_bias is not None:
            total += len(blocks) * self.cross_bias.place_bias(B, 1, 0).sum(1).squeeze(1)
        total /= len(blocks) * self.config.num_heads
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


def find_model(path_or_name):
    """(folder with the configuration, weights or None): opens minFiD's file, fetches a name from the hub."""
    path = str(path_or_name)
    if os.path.isdir(path):
        return path, None
    if os.path.isfile(path):
        saved = load_torch_file(path)
        if not isinstance(saved, dict) or not {"sd", "args"} <= saved.keys():
            raise InputError(f"{path}: neither a model folder nor minFiD's file of 'sd' and 'args'")
        name = saved["args"].t5_name
        beside = os.path.join(os.path.dirname(path), name)
        return (beside if os.path.isdir(beside) else find_model(name)[0]), saved["sd"]
    try:
        folder = snapshot_download(path, allow_patterns=["*.json", "*.model", "*.safetensors"])
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            folder = snapshot_download(path, allow_patterns=["*.json", "*.model", "pytorch_model*"])
        return folder, None
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: no such folder or file, and no such model could be fetched from the hub ({reason}); check "
                         "the path, or fetch the model where there is a network and give its folder") from None


def read_config(folder):
    """The T5 configuration of a folder; InputError where there is none or it is another architecture's."""
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable config.json ({str(error).strip().splitlines()[0]}); "
                         "give a T5 model folder") from None
    if config.model_type not in CLASSES:
        raise InputError(f"{folder}: is a {config.model_type} model; the reader needs T5, T5 v1.1, Flan-T5, mT5 or ByT5")
    return config


def load_torch_file(path):
    """torch.load without unpickling code; argparse.Namespace (minFiD's args) is the one class let through."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off, is no checkpoint or holds code
        raise InputError(f"{path}: not a checkpoint that can be loaded safely ({str(error).splitlines()[0]})") from None


def read_weights(folder):
    """All weights of a folder (.safetensors or .bin, whole or in shards), or None if it holds none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            shards = [path]
        elif os.path.exists(path + ".index.json"):
            names = sorted(set(json.load(open(path + ".index.json"))["weight_map"].values()))
            shards = [os.path.join(folder, shard) for shard in names]
        else:
            continue
        weights = {}
        for shard in shards:
            try:
                weights |= load_file(shard) if shard.endswith(".safetensors") else load_torch_file(shard)
            except (OSError, SafetensorError) as error:
                raise InputError(f"{shard}: cannot be read ({error}); the file may be cut off, fetch it again") from None
        return weights
    return None


def build_t5(config, weights, source):
    """The T5 of a configuration with these weights (any wrapping) in float32; InputError where names or shapes differ."""
    weights = {plain_key(key): value.float() for key, value in weights.items()}
    shared = next((weights[key] for key in EMBEDDINGS if key in weights), torch.empty(0))
    cross_bias = weights.pop(CROSS_BIAS, None)
    tied = "lm_head.weight" not in weights or torch.equal(weights["lm_head.weight"], shared)
    weights |= dict.fromkeys(EMBEDDINGS, shared) | ({"lm_head.weight": shared} if tied else {})
    with torch.device("meta"):  # no time goes into random weights
        t5 = CLASSES[config.model_type](config)
    wanted = {key: tuple(value.shape) for key, value in t5.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items() if value.numel()}
    for key in sorted(wanted.keys() | given.keys()):
        if wanted.get(key) != given.get(key):
            raise InputError(f"{source}: weights do not match config.json: {key} is {given.get(key, 'missing')} in the file, "
                             f"{wanted.get(key, 'unknown')} by the configuration; give the folder that the weights came with")
    t5.load_state_dict(weights, assign=True)
    t5.encoder.embed_tokens.weight = t5.decoder.embed_tokens.weight = t5.shared.weight
    if tied:
        t5.lm_head.weight = t5.shared.weight
    if cross_bias is not None:
        attention = t5.decoder.block[0].layer[1].EncDecAttention
        attention.__class__ = BiasedCrossAttention
        attention.relative_attention_bias = nn.Embedding.from_pretrained(cross_bias, freeze=False)
    return t5


def read_training_args(path):
    """What a checkpoint says of its training (num_contexts, max_length, ...): our args.json or minFiD's args; {} if nothing."""
    return vars(load_torch_file(path)["args"]) if os.path.isfile(path) else read_args(path)


def load_tokenizer(path_or_name, fallback):
    """The tokenizer that a model folder carries, else that of `fallback` (the released FiD readers and minFiD have none)."""
    folder = str(path_or_name)
    if not (os.path.isdir(folder) and any("token" in name or name == "spiece.model" for name in os.listdir(folder))):
        folder = find_model(fallback)[0]
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable tokenizer ({str(error).strip().splitlines()[0]}); name a model that carries one "
                         "with --t5_name") from None
