"""Finding and opening checkpoints of every layout: what readers, retrievers and rankers share."""
import argparse
import json
import os
import sys

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer

from files import read_args
from utils import InputError


def find_model(path_or_name):
    """(folder with the configuration, weights or None) of a folder, a file of minFiD, minDPR or
    DPR, or a hub name.

    The weights are None where the folder holds them. Raises InputError.
    """
    path = str(path_or_name)
    if os.path.isdir(path):
        return path, None
    if os.path.isfile(path):
        name, weights = open_model_file(path)
        beside = os.path.join(os.path.dirname(path), name)
        folder = beside if os.path.isdir(beside) else find_model(name)[0]
        return folder, weights
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
    """(name of the model that it was trained from, weights) of a file of minFiD, minDPR or DPR.

    Raises InputError.
    """
    saved = load_torch_file(path)
    if isinstance(saved, dict) and {"sd", "args"} <= saved.keys():
        return getattr(saved["args"], "t5_name", "bert-base-uncased"), saved["sd"]
    if isinstance(saved, dict) and "model_dict" in saved:
        encoder_params = saved.get("encoder_params") or {}
        return encoder_params.get("pretrained_model_cfg", "bert-base-uncased"), saved["model_dict"]
    raise InputError(f"{path}: neither a model folder, nor minFiD's or minDPR's file ('sd', "
                     "'args'), nor DPR's ('model_dict')")


def first_line(error):
    """The first line of an error's message."""
    return str(error).strip().split("\n")[0]


def load_torch_file(path):
    """torch.load without unpickling code; argparse.Namespace (minFiD's args) is the one class let
    through.

    Raises InputError.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises many kinds for a file that is cut off, is no checkpoint or holds code
    except Exception as error:
        raise InputError(f"{path}: not a checkpoint that can be loaded safely "
                         f"({first_line(error)})") from None


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
            with open(path + ".index.json", encoding="utf-8") as file:
                shards = set(json.load(file)["weight_map"].values())
            return [os.path.join(folder, shard) for shard in sorted(shards)]
    if required:
        raise InputError(f"{folder}: has no model.safetensors or pytorch_model.bin; give the "
                         "folder of a trained model")
    return []


def read_weights(folder):
    """All weights of a folder, or None if it holds none. Raises InputError."""
    weights = {}
    for path in find_weights(folder):
        try:
            weights |= load_file(path) if path.endswith(".safetensors") else load_torch_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error}); the file may be cut off, fetch it "
                             "again") from None
    return weights or None


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
    query_folder = os.path.join(folder, "query")
    if os.path.isdir(query_folder):  # a retriever of two encoders
        folder = query_folder
    if not has_tokenizer(folder):
        folder = find_model(fallback)[0]
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable tokenizer ({first_line(error)}); name a model that "
                         "carries one with --t5_name") from None


def has_tokenizer(folder):
    """True for a folder with a tokenizer's files."""
    if not os.path.isdir(folder):
        return False
    return any("token" in name or name == "spiece.model" for name in os.listdir(folder))


def read_training_args(path):
    """What a checkpoint says of its training (num_contexts, max_length, ...): our args.json or
    minFiD's args; else {}.
    """
    return vars(load_torch_file(path)["args"]) if os.path.isfile(path) else read_args(path)


def read_config(folder, kind="T5"):
    """The configuration of a model folder.

    Raises InputError where there is none that transformers knows.
    """
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable config.json ({first_line(error)}); give a {kind} "
                         "model folder") from None


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
