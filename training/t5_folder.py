"""Read the folder of a T5 reader: tokenizer, special ids, generation settings, tied embeddings.

tokenizer.json is used unchanged, because transformers' T5Tokenizer would rebuild its parts.
spiece.model is read without the sentencepiece package. The ids that end and pad texts are the
tokenizer's, since it made all targets. The id that targets begin with is config.json's, since the
decoder was trained with it.
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
# tokenizer classes that tokenizer.json or spiece.model describe completely
PLAIN_CLASSES = (None, "T5Tokenizer", "T5TokenizerFast", "MT5Tokenizer", "MT5TokenizerFast",
                 "PreTrainedTokenizerFast", "TokenizersBackend")
STANDARD = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SENTINELS = 100  # <extra_id_0> to <extra_id_99>, which T5's tokenizer adds to its vocabulary
UNKNOWN_PIECE, CONTROL_PIECE, USER_DEFINED_PIECE = 2, 3, 4  # types of sentencepiece's pieces
UNIGRAM = 1                                                 # a model type of sentencepiece

# settings of generation_config.json that change the answers of a greedy or a beam search
GREEDY_SETTINGS = ("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "min_length",
                   "min_new_tokens", "forced_bos_token_id", "forced_eos_token_id",
                   "suppress_tokens", "begin_suppress_tokens", "sequence_bias",
                   "exponential_decay_length_penalty", "remove_invalid_values")
BEAM_SETTINGS = ("length_penalty", "early_stopping")
EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
              "lm_head.weight")


# ---------------------------------------------------------------- tokenizers

def open_t5_tokenizer(folder, vocab_size):
    """Return the tokenizer of a folder for a T5 with vocab_size embeddings.

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
        tokenizer(["a", "\N{BLACK CHESS KNIGHT}"])  # some wrong settings fail only here
    check_words(tokenizer, folder)
    return tokenizer


def name_special_tokens(tokenizer):
    """Set </s>, <pad> and <unk> if the tokenizer's vocabulary contains them and its files set no
    such token.
    """
    vocabulary = tokenizer.get_vocab()
    for name, token in STANDARD.items():
        if getattr(tokenizer, name) is None and token in vocabulary:
            setattr(tokenizer, name, token)


def is_byt5(folder):
    """Return True if config.json names ByT5's tokenizer, which needs no files."""
    config = read_settings(os.path.join(folder, "config.json"))
    return config.get("tokenizer_class") == "ByT5Tokenizer"


def carries_tokenizer(folder):
    """Return True if a T5's tokenizer can be opened from the folder."""
    return has_tokenizer(folder) or os.path.isdir(folder) and (
        is_byt5(folder) or any(os.path.exists(os.path.join(folder, name))
                               for name in SENTENCEPIECE_FILES))


# ---------------------------------------------------------------- spiece.model

class Pieces(NamedTuple):
    """Hold the content of a sentencepiece model."""
    pieces: list          # (text, score, type)
    model_type: int
    byte_fallback: bool
    charsmap: bytes       # the normaliser's character map
    add_prefix: bool      # put a space before the text


def read_sentencepiece(path, settings, vocab_size):
    """Return the tokenizer of a sentencepiece file, with the ids of transformers' T5Tokenizer.

    Sentinels are added as by T5Tokenizer, then the tokens of added_tokens.json and of `settings`,
    the content of tokenizer_config.json. Raise InputError if the file is not a
    unigram model of sentencepiece.
    """
    with open(path, "rb") as file:
        model = parse_sentencepiece(file.read(), path)
    texts = {text for text, _, _ in model.pieces}
    vocabulary = [(text, score) for text, score, _ in model.pieces]
    count = settings.get("extra_ids")
    if count is None:  # mT5's vocabulary contains the sentinels
        has_sentinels = any("<extra_id_" in text for text in texts)
        is_full = len(vocabulary) + SENTINELS > vocab_size
        count = 0 if has_sentinels or is_full else SENTINELS
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in range(count - 1, -1, -1)]
    tokenizer = build_unigram(model, vocabulary)
    folder = os.path.dirname(path)
    named = read_settings(os.path.join(folder, "special_tokens_map.json")) | settings
    special = {name: token_text(named.get(name)) or default for name, default in STANDARD.items()}
    special = {name: token for name, token in special.items() if token in texts}
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=kind == CONTROL_PIECE)
                          for text, _, kind in model.pieces
                          if kind in (CONTROL_PIECE, USER_DEFINED_PIECE)])
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
    unknown = next((index for index, (_, _, kind) in enumerate(model.pieces)
                    if kind == UNKNOWN_PIECE), None)
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
    """Return the texts of special tokens, which settings hold as a list, as {name: token}, or None.
    """
    tokens = tokens.values() if isinstance(tokens, dict) else tokens or []
    return [token_text(token) for token in tokens]


def token_text(token):
    """Return the text of a token, which settings hold as a text or as an object with `content`."""
    return token.get("content") if isinstance(token, dict) else token


def add_tokens(tokenizer, folder, settings):
    """Add the tokens of added_tokens.json, and of added_tokens_decoder in tokenizer_config.json.

    Raise InputError if a token would get another id than in the files.
    """
    path = os.path.join(folder, "added_tokens.json")
    added = {int(index): (text, False) for text, index in read_settings(path).items()}
    for index, token in (settings.get("added_tokens_decoder") or {}).items():
        added[int(index)] = (token_text(token), bool(token.get("special")))
    for index, (text, is_special) in sorted(added.items()):
        tokenizer.add_tokens([AddedToken(text, normalized=False, special=is_special)])
        if tokenizer.token_to_id(text) != index:
            raise InputError(f"{folder}: the added token {shorten(text)} would get the id "
                             f"{tokenizer.token_to_id(text)}, but its files give it {index}; save "
                             "the tokenizer as tokenizer.json")


def parse_sentencepiece(data, path):
    """Return the Pieces of a sentencepiece file's bytes (ModelProto of sentencepiece_model.proto).

    Raise InputError for other content, and for a model that is not a unigram model.
    """
    with refusing(f"{path}: not a sentencepiece model", "fetch it again"):
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
            raise InputError(f"{path}: is a sentencepiece model but not a unigram model; save it "
                             "as tokenizer.json with transformers and sentencepiece==0.2.1")
        return Pieces(pieces, trainer.get(3, UNIGRAM), bool(trainer.get(35, 0)),
                      normalizer.get(2, b""), bool(normalizer.get(3, 1)))


def read_fields(data):
    """Return [(number, value)] of the fields of a protocol buffer message, where values other than
    integers are bytes. Raise ValueError if the message is truncated.
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
                raise ValueError("it is truncated")
        fields.append((key >> 3, value))
    return fields


# ---------------------------------------------------------------- ids

class SpecialIds(NamedTuple):
    """Hold the ids that a reader's targets begin with, end with and are padded with."""
    start: int
    ends: list
    pad: int


def read_generation(folder, config):
    """Return (a GenerationConfig, [names of ignored settings]) of generation_config.json, or of
    config.json if there is no such file.

    The GenerationConfig holds the special ids, GREEDY_SETTINGS and BEAM_SETTINGS. Raise InputError
    for a file that transformers cannot read.
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
    """Return {name: value} of the settings, except ids, that differ from transformers' defaults."""
    defaults = generation._get_default_generation_params()
    settings = {name: getattr(generation, name) for name in (*GREEDY_SETTINGS, *BEAM_SETTINGS)}
    return {name: value for name, value in settings.items()
            if value is not None and value != defaults.get(name)}


def read_start(folder, config, generation):
    """Return the id that targets begin with: decoder_start_token_id, else the padding id of
    config.json, or None if the folder's files set neither.

    Raise InputError if config.json, which the decoder was trained with, and generation_config.json
    differ.
    """
    trained = getattr(config, "decoder_start_token_id", None)
    start = generation.decoder_start_token_id
    if None not in (trained, start) and trained != start:
        raise InputError(f"{folder}: decoder_start_token_id is {shorten(trained)} in config.json "
                         f"and {shorten(start)} in generation_config.json; set both to the same "
                         "id")
    if trained is None:
        trained = start
    if trained is None and "pad_token_id" in read_settings(os.path.join(folder, "config.json")):
        trained = config.pad_token_id
    return trained


def settle_ids(start, ends, pad, tokenizer):
    """Return the SpecialIds of a reader with its tokenizer, and set the tokenizer's missing tokens.

    start, ends, pad: the ids of config.json and generation_config.json. Targets end with the
    tokenizer's </s>, so answers end with it too, and with any id of `ends` that is a special token.
    The decoder begins with `start`, as in its training, or with the padding id if `start` is None.
    Raise InputError if there is no end token.
    """
    special = set(tokenizer.all_special_ids)
    if tokenizer.eos_token_id is None:
        named = [end for end in ends if end in special]
        if not named:
            raise InputError(f"{tokenizer.name_or_path}: the tokenizer has no end-of-sequence "
                             f"token, and eos_token_id {shorten(ends[0])} of config.json is not a "
                             "special token; set eos_token in tokenizer_config.json")
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(named[0])
    end = tokenizer.eos_token_id
    if tokenizer.pad_token_id is None:
        # any special token will do: padding is never attended to or decoded
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
# key in the config.json of a reader that was trained with that bias
CROSS_BIAS_MARK = "fid_cross_attention_bias"


def plain_key(key):
    """Return the T5 name of a weight, without the wrappers of FiD (`encoder.encoder.`, `.module.`)
    and minFiD (`t5.`, `.t5block.`).
    """
    key = re.sub(r"(^|\.)encoder\.encoder\.", r"\1encoder.", key.removeprefix("t5."))
    return re.sub(r"\.(module|t5block)\.", ".", key)


def has_cross_bias(names, settings):
    """Return True if a checkpoint's position bias of the cross-attention is to be applied.

    It is applied for FiD's own files, recognised by their weights' names, and for readers trained
    from them here, whose config.json (`settings`) has CROSS_BIAS_MARK or, in older ones,
    passage_stride. T5's first releases contain a weight of that name, too, but no T5 uses it.
    """
    if any(re.search(r"(^|\.)encoder\.encoder\.", name) for name in names):
        return True
    return bool(settings.get(CROSS_BIAS_MARK, "passage_stride" in settings))


def share_embeddings(weights):
    """Return {name: weight} with all four EMBEDDINGS. Missing ones, and copies of the first one,
    become the first one's tensor, so that they are tied as in transformers.
    """
    first = next((weights[name] for name in EMBEDDINGS if name in weights), torch.empty(0))

    def choose(name):
        own = weights.get(name, first)
        return first if own.shape == first.shape and torch.equal(own, first) else own
    return weights | {name: choose(name) for name in EMBEDDINGS}
