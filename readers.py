"""Which reader a checkpoint is: a T5 becomes a FiDT5, a causal language model a CausalReader."""
import os

import torch

from causal_lm import is_causal
from causal_reader import PASSAGE_WEIGHTS, TEMPLATE, CausalReader, Prompts, choose_prompts
from checkpoints import find_model, read_config, read_training_args
from model import CLASSES, FiDT5
from utils import InputError


def add_prompt_flags(parser):
    """The flags of causal language models; what is not given is as the checkpoint says, or else the
    default that the help tells.
    """
    add = parser.add_argument_group("causal language models").add_argument
    add("--prompt_template", metavar="TEXT",
        help="the prompt of one passage, with {question}, {title} and {text}; \\n is a new line; a "
        "line with the passage alone is left out for a question without contexts; the answer "
        f"follows after a space; not given: as trained, else '{TEMPLATE}'")
    add("--passage_weights", choices=PASSAGE_WEIGHTS,
        help="what a passage counts in the loss and in the answer: all the same, or the softmax of "
        "its retrieval score; not given: as trained, else equal")
    add("--retriever_temperature", type=float, metavar="T",
        help="the scores are divided by T before the softmax; not given: as trained, else 1")


def open_reader(path_or_name, dropout=None, args=None, spread=False):
    """The reader of a checkpoint, by its configuration: FiDT5 or CausalReader.

    `dropout` replaces the configuration's rates; `args` may hold the values of add_prompt_flags;
    the weights of one that will be spread over the processes stay in the file till place_reader.
    Raises InputError for any other model, and for what the readers refuse.
    """
    dtype = None if spread else torch.float32
    given = {name: getattr(args, name, None) for name in Prompts._fields}
    given = {name: value for name, value in given.items() if value is not None}
    if os.path.isfile(path_or_name):  # minFiD's
        return open_fid(path_or_name, dropout, given, dtype)
    folder, _ = find_model(path_or_name)
    config = read_config(folder, "T5 or causal language")
    if config.model_type in CLASSES:
        return open_fid(path_or_name, dropout, given, dtype)
    if not is_causal(config):
        raise InputError(f"{folder}: is a {config.model_type} model; the reader needs T5, T5 v1.1, "
                         "Flan-T5, mT5 or ByT5, or a causal language model (GPT-2, Llama, Qwen2, "
                         "...)")
    stated = read_training_args(path_or_name).get("prompts", {})
    prompts = choose_prompts(given, stated, path_or_name)
    return CausalReader.from_pretrained(path_or_name, dropout, prompts, dtype)


def open_fid(path_or_name, dropout, given, dtype):
    """A FiDT5. Raises InputError if flags of causal language models are given."""
    if given:
        raise InputError(f"--{min(given)} is for causal language models, {path_or_name} is a T5; "
                         "leave it out")
    return FiDT5.from_pretrained(path_or_name, dropout, dtype)


def place_reader(reader, world, spread):
    """Moves a reader to this process's device or, if it is to be `spread` over all processes, this
    one's part of it (sharding.py).
    """
    if spread:
        reader.shard(world)
    else:
        reader.to(world.device)
