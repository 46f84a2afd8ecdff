"""The resume state OUT.state: what a training run needs to end as if it had never been stopped."""
import os
import random
from dataclasses import asdict, fields

import torch

from checkpoints import load_torch_file
from files import new_file
from training import Progress
from utils import InputError, gather_lists

# ---------------------------------------------------------------- random states

def random_states(device):
    """This process's random states."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states, device):
    """Sets what random_states() returned."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


# ---------------------------------------------------------------- resume state

def save_state(run):
    """Writes OUT.state: weights, optimizer, schedule, every process's random states, progress.

    All processes call it.
    """
    states = gather_lists([random_states(run.world.device)], run.world)
    if run.world.is_main:
        with new_file(f"{run.out}.state", "wb") as file:
            torch.save({"model": run.unwrapped.state_dict(),
                        "optimizer": run.optimizer.state_dict(),
                        "scheduler": run.scheduler.state_dict(), "random": states,
                        "progress": asdict(run.progress), "args": vars(run.args),
                        "world_size": run.world.size}, file)


def load_state(out, args, world, free_flags):
    """The resume state of this command, or None where there is none or --resume is not given.

    Raises InputError if it is of a run with other flags; `free_flags` may differ, since they do not
    change the weights.
    """
    path = f"{out}.state"
    if not args.resume or not os.path.exists(path):
        return None
    state = load_torch_file(path)
    if set(state["progress"]) != {field.name for field in fields(Progress)}:
        raise InputError(f"{path} was written by another version of this code; leave out --resume "
                         "to start anew")
    now = vars(args) | {"number of processes": world.size}
    then = state["args"] | {"number of processes": state["world_size"]}
    changed = [name for name in now if name not in free_flags and then.get(name) != now[name]]
    if changed:
        flags = ", ".join(f"--{name} {then.get(name)} (now {now[name]})" for name in changed)
        raise InputError(f"{path} is of a run with {flags}; give the same flags, or leave out "
                         "--resume to start anew")
    return state


def restore_state(run, state):
    """Sets what save_state wrote, but for the progress; the random states come last, building a
    model draws from them.
    """
    try:
        run.unwrapped.load_state_dict(state["model"])
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise InputError(f"{run.out}.state holds the weights of another model ({reason}); leave "
                         "out --resume to start anew") from None
    run.optimizer.load_state_dict(state["optimizer"])
    run.scheduler.load_state_dict(state["scheduler"])
    restore_random_states(state["random"][run.world.rank], run.world.device)
