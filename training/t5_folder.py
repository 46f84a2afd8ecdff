"""Read a T5 reader's folder: its tokenizer, the ids that begin, end and pad texts, the settings of
generation, and which of its weights share an embedding.

tokenizer.json is used unchanged, not through the class of transformers that would rebuild its
parts, and spiece.model is read without the sentencepiece package. The tokenizer decides which
ids end and pad texts: every target was made by it. config.json decides which id a target begins
with: the decoder was trained on it.
"""
import os
import re
import struct
from typing import NamedTuple

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import Unigram
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

from records.reading import read_settings
from training.checkpoints import check_words, has_tokenizer
from utils import InputError, refusing, shorten

SENTENCEPIECE_FILES = ("spiece.model", "sentencepiece.model", "tokenizer.model")
# classes that add nothing to their tokenizer.json or spiece.model
PLAIN_CLASSES = (None, "T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast",
                 "PreTrainedTokenizerFast", "TokenizersBackend")
STANDARD = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SENTINELS = 100  # <extra_id_0> to <extra_id_99>, which T5's tokenizer adds to its vocabulary
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of sentencepiece's pieces
UNIGRAM = 1                               # one of its model types

# settings of generation_config.json that change a greedy or a beam search's answers
GREEDY_SETTINGS = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length",
                   "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id",
                   "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
                   "exponential_decay_length_penalty", "remove_invalid_values")
BEAM_SETTINGS = ("length_penalty", "early_stopping")
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
              "lm_head.weight")


# ---------------------------------------------------------------- tokenizers

def open_t5_tokenizer(folder, vocab_size):
    """Return the tokenizer of a folder for a T5 with that many embeddings.

    Raise InputError if its files cannot be read.
    """
    settings = read_settings(os.path.join(folder, "tokenizer_config.json"))
    is_plain = settings.get("tokenizer_class") in PLAIN_CLASSES
    models = [os.path.join(folder, name) for name in SENTENCEPIECE_FILES
              if os.path.exists(os.path.join(folder, name))]
    with refusing(f"{folder}: no usable tokenizer", "name a model that has one with --tokenizer"):
        if is_plain and os.path.exists(os.path.join(folder, "tokenizer.json")):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False)
        elif is_plain and models:
            tokenizer = read_sentencepiece(models[0], settings, vocab_size)
        else:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        name_special_tokens(tokenizer)
        tokenizer(["a", "\N{BLACK CHESS KNIGHT}"])  # some wrong settings show only now
    check_words(tokenizer, folder)
    return tokenizer


def name_special_tokens(tokenizer):
    """Give a tokenizer T5's </s>, <pad> and <unk> where its files name none and its vocabulary has
    them.
    """
    vocabulary = tokenizer.get_vocab()
    for name, token in STANDARD.items():
        if getattr(tokenizer, name) is None and token in vocabulary:
            setattr(tokenizer, name, token)


def is_byt5(folder):
    """Return True for a folder whose config.json names ByT5's tokenizer, which needs no files."""
    config = read_settings(os.path.join(folder, "config.json"))
    return config.get("tokenizer_class") == "ByT5Tokenizer"


def carries_tokenizer(folder):
    """Return True for a folder that a T5's tokenizer can be opened from."""
    return has_tokenizer(folder) or os.path.isdir(folder) and (
        is_byt5(folder) or any(os.path.exists(os.path.join(folder, name))
                               for name in SENTENCEPIECE_FILES))


# ---------------------------------------------------------------- spiece.model

class Pieces(NamedTuple):
    """What a sentencepiece model holds."""
    pieces: list          # (text, score, type)
    model_type: int
    byte_fallback: bool
    charsmap: bytes       # of the normaliser
    add_prefix: bool      # a blank before the text


def read_sentencepiece(path, settings, vocab_size):
    """Return the tokenizer of a sentencepiece file, with the sentinels that T5's class adds, and
    the tokens that `settings`, tokenizer_config.json's, and added_tokens.json add.

    Its ids are those of transformers' T5Tokenizer. Raise InputError for a file that is no unigram
    model of sentencepiece.
    """
    with open(path, "rb") as file:
        model = parse_sentencepiece(file.read(), path)
    texts = {text for text, _, _ in model.pieces}
    vocabulary = [(text, score) for text, score, _ in model.pieces]
    count = settings.get("extra_ids")
    if count is None:  # mT5's vocabulary has them already
        has_sentinels = any("<extra_id_" in text for text in texts)
        is_full = len(vocabulary) + SENTINELS > vocab_size
        count = 0 if has_sentinels or is_full else SENTINELS
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in range(count - 1, -1, -1)]
    tokenizer = build_unigram(model, vocabulary)
    folder = os.path.dirname(path)
    named = read_settings(os.path.join(folder, "special_tokens_map.json")) | settings
    special = {name: token_text(named.get(name)) or default for name, default in STANDARD.items()}
    special = {name: token for name, token in special.items() if token in texts}
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROL)
                          for text, _, kind in model.pieces if kind in (CONTROL, USER_DEFINED)])
    sentinels = [f"<extra_id_{number}>" for number in range(count)]
    tokenizer.add_special_tokens([*special.values(), *sentinels])
    add_tokens(tokenizer, folder, settings)
    others = list_special(named.get("additional_special_tokens"))
    others += list_special(named.get("extra_special_tokens"))
    others = [token for token in dict.fromkeys(others) if token not in sentinels]
    tokenizer.add_special_tokens(others)
    if "eos_token" in special:
        end = special["eos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=["$A", end], pair=["$A", end, "$B", end],
            special_tokens=[(end, tokenizer.token_to_id(end))])
    limit = {name: settings[name] for name in ("model_max_length",) if name in settings}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, name_or_path=folder,
                                   extra_special_tokens=[*sentinels, *others], **special, **limit)


def build_unigram(model, vocabulary):
    """Return the tokenizers.Tokenizer of Pieces, with a vocabulary of (text, score)."""
    unknown = next((index for index, piece in enumerate(model.pieces) if piece[2] == UNKNOWN), None)
    tokenizer = Tokenizer(Unigram(vocabulary, unknown, byte_fallback=model.byte_fallback))
    if model.charsmap:
        tokenizer.normalizer = normalizers.Precompiled(model.charsmap)
    scheme = "always" if model.add_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace("▁", scheme)])
    steps = [decoders.ByteFallback()] if model.byte_fallback else []
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Metaspace("▁", scheme)])
    return tokenizer


def list_special(tokens):
    """Return the texts of further special tokens, a list or {name: token} of settings, or None."""
    tokens = tokens.values() if isinstance(tokens, dict) else tokens or []
    return [token_text(token) for token in tokens]


def token_text(token):
    """Return the text of a token as settings write it: a text, or an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def add_tokens(tokenizer, folder, settings):
    """Add the tokens of added_tokens.json and of tokenizer_config.json's added_tokens_decoder.

    Raise InputError if they cannot have the ids that the files give them.
    """
    path = os.path.join(folder, "added_tokens.json")
    added = {int(index): (text, False) for text, index in read_settings(path).items()}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        added[int(index)] = (token_text(token), bool(token.get("special")))
    for index, (text, is_special) in sorted(added.items()):
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=is_special)])
        if tokenizer.token_to_id(text) != index:
            raise InputError(f"{folder}: the added token {shorten(text)} would have the id "
                             f"{tokenizer.token_to_id(text)}, its files say {index}; save the "
                             "tokenizer as tokenizer.json")


def parse_sentencepiece(data, path):
    """Return the Pieces of a sentencepiece file's bytes, by its published form (ModelProto of
    sentencepiece_model.proto). Raise InputError.
    """
    with refusing(f"{path}: no sentencepiece model", "fetch it again"):
        fields = read_fields(data)
        pieces = []
        for number, value in fields:
            if number == 1:
                piece = dict(read_fields(value))
                pieces.append((piece[1].decode(), struct.unpack("<f", piece.get(2, bytes(4)))[0],
                               piece.get(3, 1)))
        trainer = dict(read_fields(dict(fields).get(2, b"")))
        normalizer = dict(read_fields(dict(fields).get(3, b"")))
        if not pieces:
            raise ValueError("it holds no pieces")
        if trainer.get(3, UNIGRAM) != UNIGRAM:
            raise InputError(f"{path}: is no unigram model but one of sentencepiece's other kinds; "
                             "save it as tokenizer.json with transformers and sentencepiece==0.2.1")
        return Pieces(pieces, trainer.get(3, UNIGRAM), bool(trainer.get(35, 0)),
                      normalizer.get(2, b""), bool(normalizer.get(3, 1)))


def read_fields(data):
    """Return [(number, value)] of the fields of a protocol buffer's message: integers, and the
    bytes of everything else. Raise ValueError if it is cut off.
    """
    def read_integer(start):
        value, shift = 0, 0
        while True:
            byte = data[start]
            value |= (byte & 127) << shift
            start, shift = start + 1, shift + 7
            if byte < 128:
                return value, start

    fields, start = [], 0
    while start < len(data):
        key, start = read_integer(start)
        kind = key & 7
        if kind == 0:
            value, start = read_integer(start)
        else:
            if kind == 2:
                length, start = read_integer(start)
            else:
                length = {1: 8, 5: 4}[kind]
            value, start = data[start:start + length], start + length
            if start > len(data):
                raise ValueError("it is cut off")
        fields.append((key >> 3, value))
    return fields


# ---------------------------------------------------------------- ids

class SpecialIds(NamedTuple):
    """The ids that a reader's texts begin, end and are padded with."""
    start: int
    ends: list
    pad: int


def read_generation(folder, config):
    """Return (the settings to follow, a GenerationConfig; names of the settings that are ignored).

    They come from generation_config.json, else from config.json. The ids, GREEDY_SETTINGS and
    BEAM_SETTINGS are followed.

    Raise InputError for a file that transformers cannot read.
    """
    path = os.path.join(folder, "generation_config.json")
    with refusing(f"{path}: cannot be read", "correct it, or remove the file"):
        if os.path.exists(path):
            given = GenerationConfig.from_dict(read_settings(path))
        else:
            given = GenerationConfig.from_model_config(config)
        names = ("decoder_start_token_id", "eos_token_id", "pad_token_id", *GREEDY_SETTINGS,
                 *BEAM_SETTINGS)
        ignored = [f"num_beams {given.num_beams}"] if (given.num_beams or 1) > 1 else []
        ignored += ["do_sample"] if given.do_sample else []
        return GenerationConfig(**{name: getattr(given, name, None) for name in names}), ignored


def list_settings(generation):
    """Return {name: value} of the settings, ids aside, that a GenerationConfig changes."""
    defaults = generation._get_default_generation_params()
    settings = {name: getattr(generation, name) for name in (*GREEDY_SETTINGS, *BEAM_SETTINGS)}
    return {name: value for name, value in settings.items()
            if value is not None and value != defaults.get(name)}


def read_start(folder, config, generation):
    """Return the id that the targets begin with, None if the files of the folder name none: the
    padding id then, as config.json has it.

    Raise InputError if config.json, by which the decoder was trained, and generation_config.json
    disagree.
    """
    trained = getattr(config, "decoder_start_token_id", None)
    start = generation.decoder_start_token_id
    if None not in (trained, start) and trained != start:
        raise InputError(f"{folder}: config.json begins targets with the id {shorten(trained)}, "
                         f"generation_config.json answers with {shorten(start)}; set "
                         "decoder_start_token_id alike in both")
    if trained is None:
        trained = start
    if trained is None and "pad_token_id" in read_settings(os.path.join(folder, "config.json")):
        trained = config.pad_token_id
    return trained


def settle_ids(start, ends, pad, tokenizer):
    """Return the SpecialIds that a reader and its tokenizer share, given the ids of its config.json
    and generation_config.json; the tokenizer is given the tokens that its files do not name.

    Targets end in the tokenizer's </s>, so answers end there too, and at any id of `ends` that is
    a special token. The decoder begins with `start`, on which it was trained. Raise InputError if
    no id can be the end.
    """
    special = set(tokenizer.all_special_ids)
    if tokenizer.eos_token_id is None:
        named = [end for end in ends if end in special]
        if not named:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence "
                             f"token, and the id {shorten(ends[0])} of config.json is no special "
                             "token of it; set eos_token in tokenizer_config.json")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(named[0])
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        # nothing attends to padding, and special tokens are not decoded
        is_known = pad in special - {tokenizer.unk_token_id}
        tokenizer.pad_token = (tokenizer.convert_ids_to_tokens(pad) if is_known
                               else tokenizer.eos_token)
    if end not in ends:
        others = special - {tokenizer.pad_token_id, tokenizer.unk_token_id}
        ends = [end, *(other for other in ends if other in others)]
    pad = tokenizer.pad_token_id
    return SpecialIds(pad if start is None else start, ends, pad)


# ---------------------------------------------------------------- weights

CROSS_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
# in config.json, where the reader was trained with that bias
CROSS_BIAS_MARK = "fid_cross_attention_bias"


def plain_key(key):
    """Return the T5 name of a weight in FiD's (`encoder.encoder`, `.module.`) or minFiD's (`t5.`,
    `.t5block.`) wrapping.
    """
    key = re.sub(r"(^|\.)encoder\.encoder\.", r"\1encoder.", key.removeprefix("t5."))
    return re.sub(r"\.(module|t5block)\.", ".", key)


def has_cross_bias(names, settings):
    """Return True if a checkpoint's position bias of the cross-attention is meant to be applied:
    FiD's own files, known by their names, and readers that were trained from them here, which
    `settings`, config.json's, say (`passage_stride` in older ones).

    T5's first releases hold a weight of that name, too, which no version of T5 since has used.
    """
    if any(re.search(r"(^|\.)encoder\.encoder\.", name) for name in names):
        return True
    return bool(settings.get(CROSS_BIAS_MARK, "passage_stride" in settings))


def share_embeddings(weights):
    """Return {name: weight} with all four of EMBEDDINGS: those that the file lacks, or holds as
    copies, are the first that it has, as transformers ties them.
    """
    first = next((weights[name] for name in EMBEDDINGS if name in weights), torch.empty(0))

    def choose(name):
        own = weights.get(name, first)
        return first if own.shape == first.shape and torch.equal(own, first) else own
    return weights | {name: choose(name) for name in EMBEDDINGS}
