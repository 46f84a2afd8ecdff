"""The resume state OUT.state: a resumed run ends with the weights of one that never stopped."""
import math
import os
import random
from dataclasses import asdict

import torch

from records.files import new_file
from records.hashes import CORPUS_WINDOWS, hash_windows
from records.record_file import hash_record_file
from training.adapters import is_packed
from training.checkpoints import check_weights, load_torch_file
from training.loop import Progress
from utils import InputError, gather_lists, refusing, shorten

START_ANEW = "give --overwrite instead of --resume to start from scratch"
# {part of a state: its type}
STATE_PARTS = {"model": dict, "optimizer": dict, "scheduler": dict, "random": list,
               "progress": dict,
               "args": dict, "world_size": int, "dataset_sizes": list, "inputs": dict}

# ---------------------------------------------------------------- random states

def random_states(device):
    """Return this process's random states."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states, device):
    """Set the random states that random_states() returned."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


# ---------------------------------------------------------------- resume state

def save_state(run):
    """Write OUT.state: weights, optimizer, schedule, progress, and every process's random states.

    All processes must call it.
    """
    world = run.world
    states = gather_lists([random_states(world.device)], world)
    if world.is_main:
        write_state(f"{run.out}.state", {
            "model": kept_weights(run.unwrapped), "optimizer": run.optimizer.state_dict(),
            "scheduler": run.scheduler.state_dict(), "random": states,
            "progress": asdict(run.progress), "args": run.flags, "world_size": world.size,
            "dataset_sizes": run.dataset_sizes, "inputs": run.inputs})


def kept_weights(model):
    """Return the {name: weight} to store in a state: all weights, or only the trained ones of a
    model that is packed into 4 bits, whose other weights are in the checkpoint it started from.
    """
    weights = model.state_dict()
    if not is_packed(model):
        return weights
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {name: weights[name] for name in trained}


def write_state(path, state):
    """Write a state, whole or not at all. Raises InputError if that fails; torch's own error would
    hide the reason, such as a full disk.
    """
    with refusing(f"{path}: cannot be written", "choose another path or make room"):
        with new_file(path, "wb") as file:
            torch.save(state, file)


def forget_replaced_state(out, overwrite, world):
    """Remove the state of the run that --overwrite replaces, so that a later --resume cannot
    continue from it.
    """
    path = f"{out}.state"
    if overwrite and world.is_main and os.path.exists(path):
        os.remove(path)


def load_state(out, flags, world, free_flags, inputs):
    """Return the resume state OUT.state, or None if there is none.

    flags: {name: value} of this run; free_flags: names of flags that may differ from the state's,
    because they do not change the weights; inputs: see hash_inputs. Raises InputError if the state
    is from a run with other flags, other input files or another number of processes.
    """
    path = f"{out}.state"
    exists = gather_lists([os.path.exists(path)], world)
    if any(exists) and not all(exists):
        raise InputError(f"{path}: only some of the processes find it; choose an OUT that "
                         "all of them share")
    if not any(exists):
        return None
    # with a GPU, map the file and copy weights to the GPU one by one: the host's memory could not
    # hold all weights once per process
    state = load_torch_file(path, mmap=world.device.type == "cuda")
    allow_no_inputs(state)
    check_form(state, STATE_PARTS, path)
    check_form(state["progress"], {name: type(value) for name, value in asdict(Progress()).items()},
               path)
    with refusing(f"{path}: its losses are not (sum, weight) of each update", START_ANEW):
        sum(loss_sum / weight for loss_sum, weight in state["progress"]["losses"])
    with refusing(f"{path}: its dataset_sizes are not numbers of examples", START_ANEW):
        state["dataset_sizes"] = [int(size) for size in state["dataset_sizes"]]
    if state["world_size"] != world.size:
        raise InputError(f"{path} is from a run of {state['world_size']} process(es), this one "
                         f"has {world.size}; start {state['world_size']} again, or {START_ANEW}")
    refuse_other_flags(path, flags, state["args"], free_flags)
    refuse_other_inputs(path, inputs, state["inputs"])
    return state


def refuse_other_flags(path, now, then, free_flags):
    """Raise InputError if a state is from a run with other flags; now, then: {name: value}.

    A flag that the state does not have must be off now.
    """
    with refusing(f"{path}: its flags cannot be compared", START_ANEW):
        changed = [name for name, value in now.items() if name not in free_flags
                   and (then[name] != value if name in then else value)]
    if changed:
        flags = ", ".join(f"--{name} {shorten(then.get(name))} (now {shorten(now[name])})"
                          for name in changed[:3])
        raise InputError(f"{path} is from a run with {flags}; give the same flags, or "
                         f"{START_ANEW}")


def hash_inputs(files, world):
    """Return {path: size and hash} of a run's input files, on every process. Pipes and missing
    files are left out.

    files: {path: whether to hash all of it}. Files of records are hashed whole, large ones only in
    the first run. A corpus or a model may have many gigabytes, so 256 windows of
    64 KiB are hashed, as for an index.
    """
    hashes = []
    if world.is_main:
        for path, is_whole in files.items():
            if os.path.isfile(path):
                digest = hash_record_file(path) if is_whole else hash_windows(path, CORPUS_WINDOWS)
                hashes.append((path, f"{os.path.getsize(path)}:{digest}"))
    return dict(gather_lists(hashes, world))


def allow_no_inputs(state):
    """Add an empty dict to a state of an earlier version, which has no hashes of its inputs."""
    if isinstance(state, dict):
        state.setdefault("inputs", {})


def refuse_other_inputs(path, now, then):
    """Raise InputError if a state is from a run on other input files; now, then: hash_inputs()."""
    changed = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    if then and changed:
        raise InputError(f"{path} is from a run in which {shorten(changed[0])} had another "
                         f"content; restore the file, or {START_ANEW}")


def check_form(part, form, path):
    """Raise InputError unless a part of a state holds exactly these entries, {name: type}."""
    if not isinstance(part, dict) or set(part) != set(form):
        raise InputError(f"{path} was written by another version of this code; {START_ANEW}")
    for name, kind in form.items():
        is_right = isinstance(part[name], (int, float) if kind is float else kind)
        if not is_right:
            raise InputError(f"{path}: its {name} is a {type(part[name]).__name__}, not a "
                             f"{kind.__name__}; {START_ANEW}")


def restore_state(run, state):
    """Set everything that save_state wrote except the progress. The random states come last,
    because building a model draws random numbers.

    Raises InputError if the state is from another model or other data, or has missing or wrong
    parts.
    """
    path = f"{run.out}.state"
    if state["dataset_sizes"] != run.dataset_sizes:
        raise InputError(f"{path} is from a run on {describe_sizes(state['dataset_sizes'])} "
                         f"training examples, now there are {describe_sizes(run.dataset_sizes)}; "
                         f"give the same data, or {START_ANEW}")
    check_weights(state["model"], path)
    try:
        is_whole = state["model"].keys() == kept_weights(run.unwrapped).keys()
        run.unwrapped.load_state_dict(state["model"], strict=not is_whole)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()[:120]
        raise InputError(f"{path} holds the weights of another model ({reason}); "
                         f"{START_ANEW}") from None
    with refusing(f"{path}: its optimizer, schedule or random states are incomplete",
                  START_ANEW):
        load_optimizer(run.optimizer, state["optimizer"])
        load_scheduler(run.scheduler, state["scheduler"], state["progress"]["total_updates"])
        restore_random_states(state["random"][run.world.rank], run.world.device)


def describe_sizes(sizes):
    """Return the numbers of examples of datasets, in words."""
    return " + ".join(map(str, sizes))


def load_optimizer(optimizer, saved):
    """Load AdamW's state. Raises ValueError if it does not fit this optimizer's weights."""
    settings = [dict(group, params=None, lr=None) for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    if settings != [dict(group, params=None, lr=None) for group in optimizer.param_groups]:
        raise ValueError("the optimizer has other settings")
    for group in optimizer.param_groups:
        if not 0 <= group["lr"] < math.inf:
            raise ValueError(f"the learning rate is {group['lr']}")
        for parameter in group["params"]:
            moments = optimizer.state.get(parameter)
            if not moments:
                continue  # a weight that no loss depends on
            shapes = [moments[name].shape for name in ("step", "exp_avg", "exp_avg_sq")]
            if shapes != [torch.Size(), parameter.shape, parameter.shape]:
                raise ValueError(f"a weight {tuple(parameter.shape)} has other moments")


def load_scheduler(scheduler, saved, updates):
    """Load the schedule. Raises ValueError if it is at another number of updates."""
    own = scheduler.state_dict()
    if {name: type(value) for name, value in own.items()} != {name: type(value) for name, value
                                                              in saved.items()}:
        raise ValueError("the schedule has other parts")
    scheduler.load_state_dict(saved)
    if saved["last_epoch"] != updates or saved["base_lrs"] != own["base_lrs"]:
        raise ValueError("the schedule is at another update")
