"""Find, read and write checkpoints of readers, retrievers, rankers and language models, in all
their layouts.
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

# upper bounds for layers and other values in config.json; anything larger would exhaust memory
MOST_LAYERS, MOST = 1000, 10 ** 7
FILE_BYTES = 5 * 10 ** 9  # most bytes of weights in one file
# files to download from the hub besides the weights: settings, vocabularies, and the layers of
# sentence-transformers
HUB_FILES = ["*.json", "*.model", "vocab*", "merges.txt", "*_Dense/*", "*_LayerNorm/*",
             "0_Transformer/*"]

# names of files of weights, in the formats of all libraries, and names that only look like them
WEIGHT_NAMES = (r"(?i)\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx|npz|t7|ot|pkl|tflite|"
                r"distcp)(\.index(\.json)?)?$|\.ckpt[-.]|\.data-\d+-of-\d+$")
RUN_FILES = (r"^(optimizer|scheduler|scaler|trainer|rng_state|training_args|training_state|"
             r"random_states)[\w-]*\.")
REMEDIES = (
    ("^checkpoint[^/]*/", "give the folder that holds it"),
    ("^adapter_model", "merge the adapter into its base model (peft: merge_and_unload, then "
                       "save_pretrained) and give that folder"),
    (r"\.msgpack", "convert them with transformers 4: from_pretrained(FOLDER, from_flax=True), "
                   "then save_pretrained"),
    (r"\.h5|\.ckpt|\.data-|\.npz", "convert them with transformers 4: "
                                  "from_pretrained(FOLDER, from_tf=True), then save_pretrained"),
    (r"\.gguf", "convert them with transformers: from_pretrained(FOLDER, gguf_file=NAME), then "
                "save_pretrained"),
    (r"-\d+-of-\d+\.", "it is one of several parts whose .index.json is missing; fetch that, too"),
    ("", "rename the file if it is in that format, or save the model again with save_pretrained"),
)

# buffers that are the same in every model; older versions of transformers saved them as weights
CONSTANTS = r"rotary_emb\.inv_freq$|attn\.masked_bias$|(^|\.)position_ids$"


def find_model(path_or_name, with_weights=True):
    """Return (folder with the configuration, weights) of a folder, a file of minFiD, minDPR or DPR,
    or a hub name.

    The weights are None if they are in the folder. Without `with_weights`, the weights of a hub
    model are not downloaded. Raises InputError.
    """
    path = str(path_or_name)
    if os.path.isdir(path):
        return path, None
    if os.path.isfile(path):
        name, weights, _ = open_model_file(path)
        beside = os.path.join(os.path.dirname(path), name)
        if os.path.isdir(beside):
            return beside, weights
        if os.path.isfile(name):  # the file might name itself
            raise InputError(f"{path}: was trained from {shorten(name)}, which is a file; put "
                             "that model's folder next to it")
        return find_model(name, with_weights=False)[0], weights
    try:
        if not with_weights:
            return snapshot_download(path, allow_patterns=HUB_FILES), None
        folder = snapshot_download(path, allow_patterns=[*HUB_FILES, "*.safetensors"])
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            folder = snapshot_download(path, allow_patterns=[*HUB_FILES, "pytorch_model*"])
        return folder, None
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{path}: no such folder or file, and the hub has no such model or cannot "
                         f"be reached ({first_line(error)}); check the path, or download the model "
                         "elsewhere and give its folder") from None


def find_base(folder):
    """Return the folder of the base model of peft's adapters. A folder of a whole model is its own
    base.

    Raises InputError if the base model cannot be found, or consists of adapters itself.
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
    """Return True for a folder of peft's adapters without their base model."""
    return (os.path.exists(os.path.join(folder, "adapter_config.json"))
            and not os.path.exists(os.path.join(folder, "config.json")))


def refuse_adapters(folder):
    """Raise InputError for a folder of peft's adapters, naming their base model."""
    settings = read_settings(os.path.join(folder, "adapter_config.json"))
    raise InputError(f"{folder}: holds an adapter of "
                     f"{shorten(settings.get('base_model_name_or_path'))}, not a model; merge the "
                     "two (peft: merge_and_unload, then save_pretrained) and give that folder")


def refuse_gguf(path):
    """Raise InputError for a .gguf file of llama.cpp, or a folder of them."""
    names = [path] if os.path.isfile(path) else os.listdir(path) if os.path.isdir(path) else []
    found = [os.path.basename(name) for name in names if name.endswith(".gguf")]
    if found:
        raise InputError(f"{path}: holds llama.cpp's GGUF form ({found[0]}), which is not read; "
                         "give the folder that it was converted from, with config.json and "
                         "model.safetensors")


def find_args(path_or_name):
    """Return the folder that may hold a model's args.json. For a hub name, only that file is
    downloaded.
    """
    path = str(path_or_name)
    if os.path.exists(path):
        return path
    try:
        return os.path.dirname(hf_hub_download(path, "args.json"))
    except (OSError, ValueError, HfHubHTTPError):
        return path  # a model that was not trained here; opening it reports errors


def open_model_file(path):
    """Return (name of the model that it was trained from, weights, training flags) of a file of
    minFiD, minDPR or DPR. Raises InputError.
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
        raise InputError(f"{path}: is a run's resume state, which is for --resume; give the "
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
                         "'args'), nor DPR's ('model_dict'); give one of these")
    check_weights(weights, path)
    return name, weights, flags


def load_torch_file(path, mmap=False):
    """Return what torch.load reads, without running code from the file; the only class it may
    contain is argparse.Namespace, for minFiD's args.

    mmap: leave tensors in the file until they are used, unless it has torch's old format. Raises
    InputError.
    """
    with refusing(f"{path}: not a checkpoint that can be loaded safely", "it may be cut off"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True,
                              mmap=mmap and zipfile.is_zipfile(path))


def find_weights(folder, required=False):
    """Return the paths of a folder's weights (.safetensors or .bin, one file or shards), [] if
    there are none.

    Raises InputError if weights are required and missing, or if the only weights are in a format
    that is not read, because the model would then start from random weights.
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
    """Raise InputError, with a remedy, for a folder or a hub model whose weights are all in formats
    that are not read.
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
        raise InputError(f"{os.path.join(folder, name)}: looks like weights, which are read only "
                         f"from model.safetensors and pytorch_model.bin; {remedy}")
    if os.path.basename(os.path.dirname(os.path.abspath(folder))) == "snapshots":
        raise InputError(f"{folder}: the hub has no model.safetensors or pytorch_model.bin of this "
                         "model; convert its weights, and give the folder")


def read_weights(folder):
    """Return all weights of a folder, or None if it has none. Raises InputError."""
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
    """Raise InputError for weights that are not {name: tensor}."""
    if not isinstance(weights, dict):
        raise InputError(f"{path}: must hold {{name: weight}}, got a "
                         f"{type(weights).__name__}; fetch it again")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise InputError(f"{path}: {shorten(name)} must be a weight, got a "
                             f"{type(value).__name__}; fetch the file again")


def write_weights(folder, weights):
    """Write {name: weight} as model.safetensors or, above FILE_BYTES, as several files with an
    index in transformers' form.
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
    """Return the names of {name: weight} as one list per file, in their order."""
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
    """Return a model's tokenizer or, if it has none (the released FiD readers and minFiD), the
    tokenizer of the model `fallback`.

    Raises InputError.
    """
    folder = str(path_or_name)
    if os.path.isfile(folder):  # its base model may be next to it
        folder = os.path.join(os.path.dirname(folder), fallback)
    else:
        folder = find_model(folder)[0]
    query_folder = os.path.join(folder, "query")
    if os.path.isdir(query_folder):  # a retriever of two encoders
        folder = query_folder
    if not has_tokenizer(folder):
        base = find_base(folder)
        folder = base if base != folder else find_model(fallback)[0]
    remedy = "choose a model that has one"
    if os.path.isdir(folder) and "tokenizer.json" not in os.listdir(folder):
        remedy += ("; a sentencepiece file (.model) alone needs the packages sentencepiece==0.2.1 "
                   "and protobuf")
    with refusing(f"{folder}: no usable tokenizer", remedy):
        # without this, transformers asks on the terminal whether to run code from the folder
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer(["a"])  # some errors show only in use
    check_words(tokenizer, folder)
    return tokenizer


def check_words(tokenizer, folder):
    """Raise InputError for a tokenizer without words. transformers also opens a folder without a
    vocabulary, but then every word is unknown.
    """
    if len(tokenizer) - len(set(tokenizer.all_special_ids)) < 2:
        raise InputError(f"{folder}: its tokenizer has no words; fetch the model's "
                         "tokenizer.json, vocab.txt or spiece.model")


def check_vocabulary(tokenizer, embeddings, remedy):
    """Raise InputError if the tokenizer has more ids than the model has embeddings."""
    count = getattr(embeddings, "weight", embeddings).shape[0]
    if len(tokenizer) > count:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has {len(tokenizer)} ids, the "
                         f"model embeds {count}; {remedy}")


def has_tokenizer(folder):
    """Return True for a folder with a tokenizer's files."""
    if not os.path.isdir(folder):
        return False
    return any("token" in name or name == "spiece.model" for name in os.listdir(folder))


def read_training_args(path):
    """Return what a checkpoint stores about its training (num_contexts, max_length, ...): its
    args.json, minFiD's args, or {}. Raises InputError.
    """
    trained = open_model_file(str(path))[2] if os.path.isfile(path) else read_args(path)
    for name in ("num_contexts", "max_length", "eval_answer_maxlength"):
        if type(trained.get(name, 1)) is not int or not 0 < trained.get(name, 1) < MOST:
            raise InputError(f"{path}: {name} in its args.json (or args) must be > 0 and < {MOST}, "
                             f"got {shorten(trained[name])}; correct it")
    return trained


def read_config(folder, kind="T5"):
    """Return the configuration of a model folder.

    Raises InputError if transformers cannot read it, or its sizes are absurd.
    """
    if not os.path.exists(os.path.join(folder, "config.json")):
        refuse_gguf(folder)
    if holds_adapters(folder):
        refuse_adapters(folder)
    with refusing(f"{folder}: no usable config.json", f"give a {kind} model folder"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name, value in config.to_dict().items():
        is_rate = type(value) is float and ("drop" in name or math.isnan(value))
        if type(value) is int and not is_size(name, value) or is_rate and not 0 <= value <= 1:
            raise InputError(f"{folder}: config.json sets {name} {shorten(value)}, which no model "
                             f"has; give a {kind} model folder")
    return config


def refuse_quantised(config, source):
    """Raise InputError for weights in 4 or 8 bits (bitsandbytes, GPTQ, AWQ, FP8, MXFP4)."""
    settings = getattr(config, "quantization_config", None)
    if settings:
        method = settings.get("quant_method", "") if isinstance(settings, dict) else ""
        raise InputError(f"{source}: its weights are quantised ({shorten(str(method))}), which is "
                         "not supported; give the folder of the original weights (training with "
                         "--lora --load_in_4bit packs those itself)")


def is_size(name, value):
    """Return True if an integer is a plausible value of a configuration's entry of this name."""
    least = -MOST  # for example -1 if there is no padding token
    if name.startswith(("num_", "d_")):
        least = 0
    elif name.startswith("relative_"):  # buckets and largest distance of T5's position bias
        least = 1
    return least <= value <= (MOST_LAYERS if "layer" in name else MOST)


def check_shapes(model, weights, source):
    """Raise InputError naming the first weight that is missing, unknown, or of the wrong shape."""
    fit_weights(weights, model.state_dict(), source)


def fit_weights(weights, expected, source, optional="", unused_is_fine=False):
    """Return a file's {name: weight} under the model's names.

    expected: the model's {name: weight}; optional: a regular expression for names that may be
    missing; unused_is_fine: weights that the model does not have are dropped with a printed note.
    A wrapper's prefix before all names is dropped with a note, too (find_wrapper). Raises
    InputError naming the first weight that is missing, unknown, or of the wrong shape.
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
    """Return {name: weight} without a wrapper's prefix before all names (find_wrapper), and print
    a note if there is one.
    """
    wrapper = find_wrapper(weights, expected)
    if not wrapper:
        return weights
    log_on_main(f"note: {source}: the prefix {wrapper!r} of its weights' names is left out")
    return {name.removeprefix(wrapper): weight for name, weight in weights.items()}


def find_wrapper(names, expected):
    """Return the prefix that a wrapper has put before the model's own names, or "": for example
    DataParallel's `module.`, sentence-transformers' `0.auto_model.`, or a class's `model.`.
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
    # otherwise the prefix belongs to one part of the model, whose names differ in the file
    is_wrapper = covered == len(names) or 2 * count_known(best) >= covered
    return best if is_wrapper else ""


def check_fit(missing, mismatched, unused, source, optional="", unused_is_fine=False):
    """Raise InputError if weights of a file are missing, unused, or of the wrong shape.

    missing, unused: names; mismatched: (name, shape in the file, shape by the configuration), as in
    transformers' loading info; for the other arguments see fit_weights.
    """
    missing = [name for name in missing if not (optional and re.search(optional, name))]
    unused = [name for name in unused if not re.search(CONSTANTS, name)]
    problems = [(name, "is missing in the file") for name in sorted(missing)]
    problems += [(name, f"is {given} in the file, {expected} by the configuration")
                 for name, given, expected in sorted(mismatched)]
    if not unused_is_fine:
        problems += [(name, "is unknown to the configuration") for name in sorted(unused)]
    if problems:
        name, problem = problems[0]
        others = f" ({len(problems) - 1} others do not fit either)" if len(problems) > 1 else ""
        raise InputError(f"{source}: weights do not match config.json: {name} {problem}{others}; "
                         "give the folder that the weights came with")
    if unused:
        log_on_main(f"note: {source}: {len(unused)} weights of the file are not used "
                    f"(first: {min(unused)})")


