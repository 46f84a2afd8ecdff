"""Finding and opening checkpoints of every layout: what readers, retrievers and rankers share."""
import argparse
import os
import sys

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from files import read_args, read_settings
from utils import InputError, first_line, refusing, shorten

# what a configuration may say: a model of more layers, or of larger numbers, would take all memory
MOST_LAYERS, MOST = 1000, 10 ** 7


def find_model(path_or_name):
    """(folder with the configuration, weights or None) of a folder, a file of minFiD, minDPR or
    DPR, or a hub name.

    The weights are None where the folder holds them. Raises InputError.
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
        return find_model(name)[0], weights
    try:
        folder = snapshot_download(path, allow_patterns=["*.json", "*.model", "*.safetensors"])
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            folder = snapshot_download(path, allow_patterns=["*.json", "*.model", "pytorch_model*"])
        return folder, None
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise InputError(f"{path}: no such folder or file, and no such model could be fetched from "
                         f"the hub ({first_line(error)}); check the path, or fetch the model "
                         "where there is a network and give its folder") from None


def open_model_file(path):
    """(name of the model that it was trained from, weights, flags of its training) of a file of
    minFiD, minDPR or DPR.

    Raises InputError.
    """
    if path.removesuffix(".gz").endswith((".json", ".jsonl", ".csv", ".tsv", ".txt")):
        raise InputError(f"{path}: holds text (records, or a run's log), not a model; give the "
                         "model's folder")
    saved = load_torch_file(path)
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


def load_torch_file(path):
    """torch.load without unpickling code; argparse.Namespace (minFiD's args) is the one class let
    through.

    Raises InputError.
    """
    with refusing(f"{path}: not a checkpoint that can be loaded safely", "it may be cut off"):
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)


def find_weights(folder, required=False):
    """The paths of a folder's weights (.safetensors or .bin, whole or in shards), [] if it holds
    none.

    Raises InputError if it holds none and they are required.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return [path]
        if os.path.exists(path + ".index.json"):
            with refusing(f"{path}.index.json: names no shards", "fetch it again"):
                shards = set(read_settings(path + ".index.json")["weight_map"].values())
                return [os.path.join(folder, shard) for shard in sorted(shards)]
    if required:
        raise InputError(f"{folder}: has no model.safetensors or pytorch_model.bin; give the "
                         "folder of a trained model")
    return []


def read_weights(folder):
    """All weights of a folder, or None if it holds none. Raises InputError."""
    weights = {}
    for path in find_weights(folder):
        if path.endswith(".safetensors"):
            with refusing(f"{path}: cannot be read", "the file may be cut off, fetch it again"):
                part = load_file(path)
        else:
            part = load_torch_file(path)
            check_weights(part, path)
        weights |= part
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


def announce_random_start(name):
    """Says, on the main process, that a model starts from random weights."""
    if os.environ.get("RANK", "0") == "0":
        print(f"{name}: no weights there, starting from random initialisation", flush=True)


def load_tokenizer(path_or_name, fallback):
    """The tokenizer that a model folder carries, else that of `fallback` (the released FiD readers
    and minFiD have none).

    Raises InputError.
    """
    folder = str(path_or_name)
    if not os.path.isfile(folder):
        folder = find_model(folder)[0]
    query_folder = os.path.join(folder, "query")
    if os.path.isdir(query_folder):  # a retriever of two encoders
        folder = query_folder
    if not has_tokenizer(folder):
        folder = find_model(fallback)[0]
    with refusing(f"{folder}: no usable tokenizer", "name a model that carries one with --t5_name"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer(["a"])  # some wrong settings show only now
        return tokenizer


def check_vocabulary(tokenizer, embeddings, remedy):
    """Raises InputError if the tokenizer has ids that a model has no embedding for."""
    if len(tokenizer) > embeddings.num_embeddings:
        raise InputError(f"{tokenizer.name_or_path}: the tokenizer has {len(tokenizer)} ids, the "
                         f"model embeds {embeddings.num_embeddings}; {remedy}")


def has_tokenizer(folder):
    """True for a folder with a tokenizer's files."""
    if not os.path.isdir(folder):
        return False
    return any("token" in name or name == "spiece.model" for name in os.listdir(folder))


def read_training_args(path):
    """What a checkpoint says of its training (num_contexts, max_length, ...): our args.json or
    minFiD's args; else {}. Raises InputError.
    """
    trained = open_model_file(str(path))[2] if os.path.isfile(path) else read_args(path)
    for name in ("num_contexts", "max_length"):
        if type(trained.get(name, 1)) is not int or not 0 < trained.get(name, 1) < MOST:
            raise InputError(f"{path}: its args.json (or args) says {name} "
                             f"{shorten(trained[name])}, which is no count; mend it")
    return trained


def read_config(folder, kind="T5"):
    """The configuration of a model folder.

    Raises InputError where there is none that transformers knows, or one with absurd sizes.
    """
    with refusing(f"{folder}: no usable config.json", f"give a {kind} model folder"):
        config = AutoConfig.from_pretrained(folder)
    for name, value in config.to_dict().items():
        if type(value) is int and not is_size(name, value):
            raise InputError(f"{folder}: config.json says {name} {shorten(value)}, which no model "
                             f"has; give a {kind} model folder")
    return config


def is_size(name, value):
    """True for an integer that a configuration's entry of this name can be."""
    least = -MOST  # -1, say, where there is no padding token
    if name.startswith(("num_", "d_")):
        least = 0
    elif name.startswith("relative_"):  # the buckets of T5's position bias, and their reach
        least = 1
    return least <= value <= (MOST_LAYERS if "layers" in name else MOST)


def check_shapes(model, weights, source):
    """Raises InputError that names the first weight that is missing, unknown or of another shape
    than the model's.
    """
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items() if value.numel()}
    for key in sorted(expected.keys() | given.keys()):
        if expected.get(key) != given.get(key):
            raise InputError(f"{source}: weights do not match config.json: {key} is "
                             f"{given.get(key, 'missing')} in the file, "
                             f"{expected.get(key, 'unknown')} by the configuration; give the "
                             "folder that the weights came with")


def versions():
    """What a checkpoint was made with."""
    return {"python": sys.version.split()[0], "torch": torch.__version__,
            "transformers": transformers.__version__}
