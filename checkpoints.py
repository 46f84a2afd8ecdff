"""Finding, opening and writing checkpoints: what readers, retrievers and rankers share."""
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

from utils import InputError, gather_lists, new_file, random_states, read_args, restore_random_states


def find_model(path_or_name):
    """(folder with the configuration, weights or None): opens minFiD's, minDPR's and DPR's files, fetches a name from the hub."""
    path = str(path_or_name)
    if os.path.isdir(path):
        return path, None
    if os.path.isfile(path):
        saved = load_torch_file(path)
        if isinstance(saved, dict) and {"sd", "args"} <= saved.keys():
            name, weights = getattr(saved["args"], "t5_name", "bert-base-uncased"), saved["sd"]
        elif isinstance(saved, dict) and "model_dict" in saved:
            weights = saved["model_dict"]
            name = (saved.get("encoder_params") or {}).get("pretrained_model_cfg", "bert-base-uncased")
        else:
            raise InputError(f"{path}: neither a model folder, nor minFiD's or minDPR's file ('sd', 'args'), nor DPR's "
                             "('model_dict')")
        beside = os.path.join(os.path.dirname(path), name)
        return (beside if os.path.isdir(beside) else find_model(name)[0]), weights
    try:
        folder = snapshot_download(path, allow_patterns=["*.json", "*.model", "*.safetensors"])
        if not any(name.endswith(".safetensors") for name in os.listdir(folder)):
            folder = snapshot_download(path, allow_patterns=["*.json", "*.model", "pytorch_model*"])
        return folder, None
    except (OSError, ValueError, HfHubHTTPError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{path}: no such folder or file, and no such model could be fetched from the hub ({reason}); check "
                         "the path, or fetch the model where there is a network and give its folder") from None


def load_torch_file(path):
    """torch.load without unpickling code; argparse.Namespace (minFiD's args) is the one class let through."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a file that is cut off, is no checkpoint or holds code
        raise InputError(f"{path}: not a checkpoint that can be loaded safely ({str(error).splitlines()[0]})") from None


def find_weights(folder, required=False):
    """The paths of a folder's weights (.safetensors or .bin, whole or in shards); [], or if required InputError, if it holds none."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        path = os.path.join(folder, name)
        if os.path.exists(path):
            return [path]
        if os.path.exists(path + ".index.json"):
            with open(path + ".index.json", encoding="utf-8") as file:
                return [os.path.join(folder, shard) for shard in sorted(set(json.load(file)["weight_map"].values()))]
    if required:
        raise InputError(f"{folder}: has no model.safetensors or pytorch_model.bin; give the folder of a trained model")
    return []


def read_weights(folder):
    """All weights of a folder, or None if it holds none."""
    weights = {}
    for path in find_weights(folder):
        try:
            weights |= load_file(path) if path.endswith(".safetensors") else load_torch_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read ({error}); the file may be cut off, fetch it again") from None
    return weights or None


def load_tokenizer(path_or_name, fallback):
    """The tokenizer that a model folder carries, else that of `fallback` (the released FiD readers and minFiD have none)."""
    folder = str(path_or_name)
    if os.path.isdir(os.path.join(folder, "query")):  # a retriever of two encoders
        folder = os.path.join(folder, "query")
    if not (os.path.isdir(folder) and any("token" in name or name == "spiece.model" for name in os.listdir(folder))):
        folder = find_model(fallback)[0]
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable tokenizer ({str(error).strip().splitlines()[0]}); name a model that carries one "
                         "with --t5_name") from None


def read_training_args(path):
    """What a checkpoint says of its training (num_contexts, max_length, ...): our args.json or minFiD's args; {} if nothing."""
    return vars(load_torch_file(path)["args"]) if os.path.isfile(path) else read_args(path)


def read_config(folder, wanted="T5"):
    """The configuration of a model folder; InputError where there is none that transformers knows."""
    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no usable config.json ({str(error).strip().splitlines()[0]}); "
                         f"give a {wanted} model folder") from None


def check_shapes(model, weights, source):
    """InputError naming the first weight that is missing, unknown or of another shape than the model's."""
    wanted = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    given = {key: tuple(value.shape) for key, value in weights.items() if value.numel()}
    for key in sorted(wanted.keys() | given.keys()):
        if wanted.get(key) != given.get(key):
            raise InputError(f"{source}: weights do not match config.json: {key} is {given.get(key, 'missing')} in the file, "
                             f"{wanted.get(key, 'unknown')} by the configuration; give the folder that the weights came with")


def versions():
    """What a checkpoint was made with."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}


# ---------------------------------------------------------------------------------------------------- resuming

def save_state(path, world, model, optimizer, scheduler, progress, args):
    """Everything that --resume needs: weights, optimizer, schedule, every process's random states, the place in the run."""
    states = gather_lists([random_states(world.device)], world)
    if world.is_main:
        with new_file(path, "wb") as file:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(),
                        "random": states, "progress": progress, "args": vars(args), "world_size": world.size}, file)


def load_state(path, args, world, free_flags):
    """The resume state of this command, or None; InputError if it is of a run whose flags, but for the free ones, were others."""
    if not args.resume or not os.path.exists(path):
        return None
    state = load_torch_file(path)
    now = vars(args) | {"number of processes": world.size}
    then = state["args"] | {"number of processes": state["world_size"]}
    other = [f"--{name} {then.get(name)} (now {now[name]})" for name in now
             if name not in free_flags and then.get(name) != now[name]]
    if other:
        raise InputError(f"{path} is of a run with {', '.join(other)}; give the same flags, or leave out --resume to start anew")
    return state


def restore_state(state, path, world, model, optimizer, scheduler):
    """Sets what save_state wrote; the random states come last, building a model draws from them."""
    try:
        model.load_state_dict(state["model"])
    except RuntimeError as error:
        raise InputError(f"{path} holds the weights of another model ({str(error).splitlines()[1].strip()}); leave out --resume "
                         "to start anew") from None
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    restore_random_states(state["random"][world.rank], world.device)
