"""Checkpoints, what readers, retrievers and rankers share: finding and opening those of every
layout, and the folder that a run writes.
"""
import argparse
import math
import os
import re
import zipfile

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from records.files import write_json
from records.reading import read_args, read_settings
from utils import InputError, first_line, log_on_main, refusing, shorten

# what a configuration may say: a model of more layers, or of larger numbers, would take all memory
MOST_LAYERS, MOST = 1000, 10 ** 7
# at most this many bytes of weights go into one file
FILE_BYTES = 5 * 10 ** 9
# what is fetched of a model on the hub, beside its weights: settings, vocabularies, the layers of
# sentence-transformers
HUB_FILES = ["*.json", "*.model", "vocab*", "merges.txt", "*_Dense/*", "*_LayerNorm/*",
             "0_Transformer/*"]

# names of weights in the formats of other libraries, and files of a run that are none
WEIGHT_NAMES = (r"(?i)\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|npz|t7|ot|pkl|tflite|"
                r"distcp)(\.index(\.json)?)?$|\.ckpt[-.]|\.data-\d+-of-\d+$")
RUN_FILES = (r"^(optimizer|scheduler|scaler|trainer|rng_state|training_args|training_state|"
             r"random_states)[\w-]*\.")
REMEDIES = (
    ("^checkpoint[^/]*/", "give the folder in which it lies"),
    ("^adapter_model", "merge the adapter into its base model (peft: merge_and_unload, then "
                       "save_pretrained) and give that folder"),
    (r"\.msgpack", "convert them with transformers 4: from_pretrained(FOLDER, from_flax=True), "
                   "then save_pretrained"),
    (r"\.h5|\.ckpt|\.data-|\.npz", "convert them with transformers 4: "
                                  "from_pretrained(FOLDER, from_tf=True), then save_pretrained"),
    (r"\.gguf", "convert them with transformers: from_pretrained(FOLDER, gguf_file=NAME), then "
                "save_pretrained"),
    (r"-\d+-of-\d+\.", "it is a part of them whose .index.json is missing; fetch that, too"),
    ("", "name the file so if that is what it is, or save the model again with save_pretrained"),
)

# buffers, equal in every model, that older versions of transformers saved with the weights
CONSTANTS = r"rotary_emb\.inv_freq$|attn\.masked_bias$|(^|\.)position_ids$"


def find_model(path_or_name, with_weights=True):
    """Return (folder with the configuration, weights or None) of a folder, a file of minFiD, minDPR
    or DPR, or a hub name.

    The weights are None where the folder holds them; without `with_weights` those of a hub name are
    not fetched. Raise InputError.
    """
    path = str(path_or_name)
    if os.path.isdir(path):
        return path, None
    if os.path.isfile(path):
        name, weights, _ = open_model_file(path)
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.isdir(beside):
            return beside, weights
        if os.path.isfile(name):  # it might name itself
            raise InputError(f"{path}: says that it was trained from {shorten(name)}, which is a "
                             "file; put that model's folder beside it")
        return find_model(name, with_weights=False)[0], weights
    try:
        if not with_weights:
            return snapshot_download(path, allow_patterns=HUB_FILES), None
        folder = snapshot_download(path, allow_patterns=[*HUB_FILES, "*.safetensors"])
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            folder = snapshot_download(path, allow_patterns=[*HUB_FILES, "pytorch_model*"])
        return folder, None
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{path}: no such folder or file, and no such model could be fetched from "
                         f"the hub ({first_line(error)}); check the path, or fetch the model "
                         "where there is a network and give its folder") from None


def find_base(folder):
    """Return the folder of the model that a folder of peft's adapters belongs to; any other folder
    is its own base.

    Raise InputError for adapters whose model cannot be found, or is made of adapters itself.
    """
    if not holds_adapters(folder):
        return folder
    path = os.path.join(folder, "adapter_config.json")
    base = read_settings(path).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise InputError(f"{path}: does not name the model that the adapters belong to; set "
                         "base_model_name_or_path")
    if os.path.isfile(base):
        raise InputError(f"{path}: base_model_name_or_path must be a folder or a hub name, "
                         f"{shorten(base)} is a file")
    if not os.path.isdir(base):
        with refusing(f"{folder}: holds adapters of {shorten(base)}", "set base_model_name_or_path "
                      "in its adapter_config.json to that model's folder"):
            try:
                base = find_model(base)[0]
            except InputError as error:
                raise ValueError(str(error)) from None
    if holds_adapters(base):
        raise InputError(f"{path}: base_model_name_or_path must be a whole model, {shorten(base)} "
                         "holds adapters itself; merge those into their model first (peft: "
                         "merge_and_unload, then save_pretrained)")
    return base


def holds_adapters(folder):
    """Return True for a folder of peft's adapters without the model that they belong to."""
    return (os.path.exists(os.path.join(folder, "adapter_config.json"))
            and not os.path.exists(os.path.join(folder, "config.json")))


def refuse_gguf(path):
    """Raise InputError for llama.cpp's files: a .gguf file, or a folder of them."""
    names = [path] if os.path.isfile(path) else os.listdir(path) if os.path.isdir(path) else []
    found = [os.path.basename(name) for name in names if name.endswith(".gguf")]
    if found:
        raise InputError(f"{path}: holds llama.cpp's GGUF form ({found[0]}), which is not read; "
                         "give the folder that it was converted from, with config.json and "
                         "model.safetensors")


def find_args(path_or_name):
    """The folder in which a model's args.json lies, if it has one: of a hub name, that alone is
    fetched.
    """
    path = str(path_or_name)
    if os.path.exists(path):
        return path
    try:
        return os.path.dirname(hf_hub_download(path, "args.json"))
    except (OSError, ValueError, HfHubHTTPError):
        return path  # others' models have none; whoever opens the model tells what is wrong


def open_model_file(path):
    """Return (name of the model that it was trained from, weights, flags of its training) of a file
    of minFiD, minDPR or DPR.

    Raises InputError.
    """
    refuse_gguf(path)
    if path.removesuffix(".gz").endswith((".json", ".jsonl", ".csv", ".tsv", ".txt")):
        raise InputError(f"{path}: holds text (records, or a run's log), not a model; give the "
                         "model's folder")
    if path.endswith((".safetensors", ".h5", ".msgpack", "pytorch_model.bin")):
        raise InputError(f"{path}: holds weights alone; give its folder, with config.json")
    saved = load_torch_file(path, mmap=True)
    name, weights, flags = None, None, {}
    if isinstance(saved, dict) and {"optimizer", "progress"} <= saved.keys():
        raise InputError(f"{path}: is a run's resume state, from which --resume goes on; give the "
                         f"folder of its model, {path.removesuffix('.state')}")
    if isinstance(saved, dict) and {"sd", "args"} <= saved.keys():
        weights = saved["sd"]
        if isinstance(saved["args"], argparse.Namespace):
            flags = vars(saved["args"])
        name = flags.get("t5_name", "bert-base-uncased")
    elif isinstance(saved, dict) and "model_dict" in saved:
        weights = saved["model_dict"]
        encoder_params = saved.get("encoder_params")
        if not isinstance(encoder_params, dict):
            encoder_params = {}
        name = encoder_params.get("pretrained_model_cfg", "bert-base-uncased")
    if not isinstance(name, str):
        raise InputError(f"{path}: neither a model folder, nor minFiD's or minDPR's file ('sd', "
                         "'args'), nor DPR's ('model_dict')")
    check_weights(weights, path)
    return name, weights, flags


def load_torch_file(path, mmap=False):
    """torch.load without unpickling code; argparse.Namespace (minFiD's args) is the one class let
    through.

    mmap: tensors stay in the file till they are used, unless it is of torch's old format. Raises
    InputError.
    """
    with refusing(f"{path}: not a checkpoint that can be loaded safely", "it may be cut off"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True,
                              mmap=mmap and zipfile.is_zipfile(path))


def find_weights(folder, required=False):
    """Return the paths of a folder's weights (.safetensors or .bin, whole or in shards), [] if it
    holds none.

    Raise InputError if it holds none and they are required, or if it holds weights under a name
    that is not read: a model must not start from random ones then.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return [path]
        if os.path.exists(path + ".index.json"):
            with refusing(f"{path}.index.json: names no shards", "fetch it again"):
                shards = set(read_settings(path + ".index.json")["weight_map"].values())
                return [os.path.join(folder, shard) for shard in sorted(shards)]
    refuse_other_weights(folder)
    if required:
        raise InputError(f"{folder}: has no model.safetensors or pytorch_model.bin; give the "
                         "folder of a trained model")
    return []


def refuse_other_weights(folder):
    """Raise InputError, with the way out, for a folder that holds weights under a name that is not
    read, and for a model of the hub without weights that are.
    """
    if not os.path.isdir(folder):
        return
    names = sorted(os.listdir(folder))
    for part in [name for name in names if name.startswith("checkpoint")]:  # transformers' Trainer
        if os.path.isdir(os.path.join(folder, part)):
            names += [f"{part}/{name}" for name in sorted(os.listdir(os.path.join(folder, part)))]
    others = [name for name in names if re.search(WEIGHT_NAMES, name)
              and not re.search(RUN_FILES, os.path.basename(name))]
    for name in others:
        remedy = next(text for pattern, text in REMEDIES if re.search(pattern, name))
        raise InputError(f"{os.path.join(folder, name)}: looks like weights, which are read from "
                         f"model.safetensors and pytorch_model.bin alone; {remedy}")
    if os.path.basename(os.path.dirname(os.path.abspath(folder))) == "snapshots":
        raise InputError(f"{folder}: the hub has no model.safetensors or pytorch_model.bin of this "
                         "model; convert its weights, and give the folder")


def read_weights(folder):
    """Return all weights of a folder, or None if it holds none. Raise InputError."""
    weights, paths = {}, find_weights(folder)
    for path in paths:
        if path.endswith(".safetensors"):
            with refusing(f"{path}: cannot be read", "the file may be cut off, fetch it again"):
                part = load_file(path)
        else:
            part = load_torch_file(path, mmap=True)
            check_weights(part, path)
        weights |= part
    if paths and not weights:
        raise InputError(f"{paths[0]}: holds no weights; fetch it again")
    return weights or None


def check_weights(weights, path):
    """Raises InputError for weights that are not {name: tensor}."""
    if not isinstance(weights, dict):
        raise InputError(f"{path}: holds no weights by their names, but a "
                         f"{type(weights).__name__}; fetch it again")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: {shorten(name)} is no weight, but a "
                             f"{type(value).__name__}; fetch the file again")


def write_weights(folder, weights):
    """Writes {name: weight} as model.safetensors; what does not go into one file goes into several,
    with an index, as transformers does.
    """
    parts = split_weights(weights)
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file_name = "model.safetensors"
        if len(parts) > 1:
            file_name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part = {name: weights[name].detach().contiguous() for name in names}
        save_file(part, os.path.join(folder, file_name), metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    if len(parts) > 1:
        total_size = sum(weight.numel() * weight.element_size() for weight in weights.values())
        write_json(os.path.join(folder, "model.safetensors.index.json"),
                   {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def split_weights(weights):
    """[names] of {name: weight}: those that go into one file, in their order."""
    parts, size = [[]], 0
    for name, weight in weights.items():
        weight_bytes = weight.numel() * weight.element_size()
        if parts[-1] and size + weight_bytes > FILE_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += weight_bytes
    return parts


def announce_random_start(name):
    """Print, on the main process, that a model starts from random weights."""
    log_on_main(f"WARNING: {name} holds no weights: starting from random initialisation; its "
                "outputs mean nothing before training")


def load_tokenizer(path_or_name, fallback):
    """Return the tokenizer that a model folder carries, else that of `fallback` (the released FiD
    readers and minFiD have none).

    Raises InputError.
    """
    folder = str(path_or_name)
    if os.path.isfile(folder):  # the model that it was trained from may lie beside it
        folder = os.path.join(os.path.dirname(folder), fallback)
    else:
        folder = find_model(folder)[0]
    query_folder = os.path.join(folder, "query")
    if os.path.isdir(query_folder):  # a retriever of two encoders
        folder = query_folder
    if not has_tokenizer(folder):
        base = find_base(folder)
        folder = base if base != folder else find_model(fallback)[0]
    remedy = "name a model that has one"
    if os.path.isdir(folder) and "tokenizer.json" not in os.listdir(folder):
        remedy += ("; a sentencepiece file (.model) alone needs the packages sentencepiece==0.2.1 "
                   "and protobuf")
    with refusing(f"{folder}: no usable tokenizer", remedy):
        # not given, transformers would ask on the terminal whether to run the folder's own code
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer(["a"])  # some wrong settings show only now
    check_words(tokenizer, folder)
    return tokenizer


def check_words(tokenizer, folder):
    """Raise InputError for a tokenizer without words: transformers opens a folder without a
    vocabulary, whose every word is unknown then.
    """
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:
        raise InputError(f"{folder}: its tokenizer knows no words; fetch the model's "
                         "tokenizer.json, vocab.txt or spiece.model")


def check_vocabulary(tokenizer, embeddings, remedy):
    """Raise InputError if the tokenizer has ids that a model has no embedding for."""
    count = getattr(embeddings, "weight", embeddings).shape[0]
    if len(tokenizer) > count:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has {len(tokenizer)} ids, the "
                         f"model embeds {count}; {remedy}")


def has_tokenizer(folder):
    """True for a folder with a tokenizer's files."""
    if not os.path.isdir(folder):
        return False
    return any("token" in name or name == "spiece.model" for name in os.listdir(folder))


def read_training_args(path):
    """Return what a checkpoint says of its training (num_contexts, max_length, ...): our args.json
    or minFiD's args; else {}. Raises InputError.
    """
    trained = open_model_file(str(path))[2] if os.path.isfile(path) else read_args(path)
    for name in ("num_contexts", "max_length", "eval_answer_maxlength"):
        if type(trained.get(name, 1)) is not int or not 0 < trained.get(name, 1) < MOST:
            raise InputError(f"{path}: its args.json (or args) says {name} "
                             f"{shorten(trained[name])}, which is no count; mend it")
    return trained


def read_config(folder, kind="T5"):
    """Return the configuration of a model folder.

    Raises InputError where there is none that transformers knows, or one with absurd sizes.
    """
    if not os.path.exists(os.path.join(folder, "config.json")):
        refuse_gguf(folder)
    if holds_adapters(folder):
        settings = read_settings(os.path.join(folder, "adapter_config.json"))
        raise InputError(f"{folder}: holds an adapter of "
                         f"{shorten(settings.get('base_model_name_or_path'))}, not a model; merge "
                         "the two (peft: merge_and_unload, then save_pretrained) and give that "
                         "folder")
    with refusing(f"{folder}: no usable config.json", f"give a {kind} model folder"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name, value in config.to_dict().items():
        is_rate = type(value) is float and ("drop" in name or math.isnan(value))
        if type(value) is int and not is_size(name, value) or is_rate and not 0 <= value <= 1:
            raise InputError(f"{folder}: config.json says {name} {shorten(value)}, which no model "
                             f"has; give a {kind} model folder")
    return config


def refuse_quantised(config, source):
    """Raise InputError for weights in 4 or 8 bits (bitsandbytes, GPTQ, AWQ, FP8, MXFP4)."""
    settings = getattr(config, "quantization_config", None)
    if settings:
        method = settings.get("quant_method", "") if isinstance(settings, dict) else ""
        raise InputError(f"{source}: its weights are quantised ({shorten(str(method))}), and only "
                         "plain ones are read; give the folder that they were made from (training "
                         "with --lora --load_in_4bit packs those itself)")


def is_size(name, value):
    """True for an integer that a configuration's entry of this name can be."""
    least = -MOST  # -1, say, where there is no padding token
    if name.startswith(("num_", "d_")):
        least = 0
    elif name.startswith("relative_"):  # the buckets of T5's position bias, and their reach
        least = 1
    return least <= value <= (MOST_LAYERS if "layer" in name else MOST)


def check_shapes(model, weights, source):
    """Raise InputError that names the first weight that is missing, unknown or of another shape
    than the model's.
    """
    fit_weights(weights, model.state_dict(), source)


def fit_weights(weights, expected, source, optional="", unused_is_fine=False):
    """Return a file's {name: weight} under the names of the model, which `expected` {name: weight}
    lists.

    A prefix that a wrapper has put before all names (find_wrapper) is left out, and a line is
    printed. Raise InputError that names the first weight that the file lacks, holds in another
    shape, or that the model does not have. `optional` is a regular expression: a weight that it
    finds may be missing. With `unused_is_fine` weights that the model does not have are left out,
    and a line names the first.
    """
    given = {name: weight for name, weight in weights.items() if weight.numel()}
    given = drop_wrapper(given, expected, source)
    missing = [name for name, weight in expected.items() if name not in given and weight.numel()]
    mismatched = [(name, tuple(given[name].shape), tuple(weight.shape))
                  for name, weight in expected.items()
                  if name in given and weight.shape != given[name].shape]
    unused = [name for name in given if name not in expected]
    check_fit(missing, mismatched, unused, source, optional, unused_is_fine)
    return {name: weight for name, weight in given.items() if name in expected}


def drop_wrapper(weights, expected, source):
    """Return {name: weight} without the prefix that a wrapper has put before all names, which a
    line names (find_wrapper).
    """
    wrapper = find_wrapper(weights, expected)
    if not wrapper:
        return weights
    log_on_main(f"note: {source}: the prefix {wrapper!r} of its weights' names is left out")
    return {name.removeprefix(wrapper): weight for name, weight in weights.items()}


def find_wrapper(names, expected):
    """Return the prefix that a wrapper has put before the model's own names, "" if none has:
    DataParallel's `module.`, sentence-transformers' `0.auto_model.`, a class's `model.`.
    """
    prefixes = {""}
    for name in names:
        parts = name.split(".")
        prefixes |= {".".join(parts[:count]) + "." for count in range(1, 4)}

    def count_known(prefix):
        return sum(name.startswith(prefix) and name.removeprefix(prefix) in expected
                   for name in names)
    best = max(sorted(prefixes, key=len), key=count_known)
    covered = sum(name.startswith(best) for name in names)
    # otherwise it is a part of the model, whose weights have other names in the file
    is_wrapper = covered == len(names) or 2 * count_known(best) >= covered
    return best if is_wrapper else ""


def check_fit(missing, mismatched, unused, source, optional="", unused_is_fine=False):
    """Raise InputError for weights that a file lacks, holds in another shape, or that the model
    does not have.

    missing, unused: lists of names; mismatched: a list of (name, shape in the file, shape by the
    configuration), as transformers' loading info has them; the others are those of fit_weights.
    This is the one place that decides it, for readers, encoders, rankers and language models.
    """
    missing = [name for name in missing if not (optional and re.search(optional, name))]
    unused = [name for name in unused if not re.search(CONSTANTS, name)]
    problems = [(name, "is missing in the file") for name in sorted(missing)]
    problems += [(name, f"is {given} in the file, {expected} by the configuration")
                 for name, given, expected in sorted(mismatched)]
    if not unused_is_fine:
        problems += [(name, "is unknown by the configuration") for name in sorted(unused)]
    if problems:
        name, problem = problems[0]
        others = f" ({len(problems) - 1} others do not fit either)" if len(problems) > 1 else ""
        raise InputError(f"{source}: weights do not match config.json: {name} {problem}{others}; "
                         "give the folder that the weights came with")
    if unused:
        log_on_main(f"note: {source}: {len(unused)} weights of the file are not used "
                    f"(first: {min(unused)})")


