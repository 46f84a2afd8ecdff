"""A reader whose weights, gradients and optimizer state are spread over the processes
(train_epoch.py --fsdp), for models that do not fit one GPU: PyTorch's fully_shard (ZeRO 3, arXiv
1910.02054; FSDP, arXiv 2304.11277).

A process keeps its rows of every weight. The blocks of the model are its units: where a block is
computed, and again in the backward pass, all processes gather its weights, and drop them after it.
Gathering takes all processes, so they compute each block equally often: the training plan and the
batches of an evaluation have the same number on each process, the encoder computes a block for all
chunks of its passages before the next block, and generation ends when all processes have ended.
"""
import types

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from utils import InputError


def shard(reader, blocks, biases, world):
    """Spread a reader over the processes; `blocks` are the units, `biases` are modules within them
    that others use too.

    The weights may be of any type and lie in a file: a unit at a time becomes float32, and what
    other processes keep is dropped again.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    for block in blocks:
        block.run = types.MethodType(run_function, block)
    for unit in (*biases, *blocks, reader):
        fully_shard(unit.float(), mesh=mesh)
    for block in blocks:
        register_fsdp_forward_method(block, "run")
    for name in ("generate", "check_reading"):  # they gather the weights outside the blocks too
        if hasattr(reader, name):
            register_fsdp_forward_method(reader, name)


def run_function(block, function, *inputs):
    """What layers.run_block calls of a sharded block: its weights are gathered around it."""
    return function(block, *inputs)


def is_sharded(module):
    """True for a module that `shard` has spread."""
    return isinstance(module, FSDPModule)


def any_question(reader, remaining):
    """True if questions remain to be answered, with a sharded reader on any process."""
    if not is_sharded(reader):
        return remaining > 0
    count = torch.tensor(remaining, device=next(reader.parameters()).device)
    dist.all_reduce(count)
    return bool(count)


# ---------------------------------------------------------------- files

def gather_weight(weight):
    """The whole of a weight, as it is written into a file. If it is sharded, all processes call
    this, and the main one alone is given it.
    """
    if isinstance(weight, DTensor):
        weight = weight.full_tensor()
        if dist.get_rank() > 0:
            return None
        weight = weight.cpu()
    return weight.detach().contiguous()


def local_state(run):
    """{model, optimizer}: what this process keeps of the weights and of the optimizer's moments."""
    return {"model": map_tensors(run.unwrapped.state_dict(), keep_local),
            "optimizer": map_tensors(run.optimizer.state_dict(), keep_local)}


def keep_local(value):
    return value.to_local() if isinstance(value, DTensor) else value


def map_tensors(part, function):
    """A nested dictionary with function(tensor) in place of its tensors."""
    if isinstance(part, dict):
        return {name: map_tensors(value, function) for name, value in part.items()}
    return function(part) if isinstance(part, torch.Tensor) else part


def join_state(run, own):
    """What local_state has made, with the tensors as parts of the whole again.

    Raises ValueError for tensors of another shape than this process keeps.
    """
    weights = run.unwrapped.state_dict()
    model = {name: like(value, weights[name]) if name in weights else value
             for name, value in own["model"].items()}
    parameters = [parameter for group in run.optimizer.param_groups
                  for parameter in group["params"]]
    moments = {index: {name: like(value, parameters[index]) if value.dim() else value
                       for name, value in slots.items()}
               for index, slots in own["optimizer"]["state"].items()}
    return {"model": model, "optimizer": own["optimizer"] | {"state": moments}}


def like(value, whole):
    """A process's own rows as a part of a tensor that is spread as `whole` is."""
    if not isinstance(whole, DTensor):
        return value
    expected = whole.to_local().shape
    if value.shape != expected:
        raise ValueError(f"a part has the shape {tuple(value.shape)}, not {tuple(expected)}")
    return DTensor.from_local(value.to(whole.device), whole.device_mesh, whole.placements,
                              shape=whole.shape, stride=whole.stride())


def check_processes(world):
    """Raises InputError for a single process."""
    if world.size == 1:
        raise InputError("--fsdp spreads a model over several processes, and this is one; start it "
                         "with torchrun --nproc_per_node=N, or leave the flag out")
