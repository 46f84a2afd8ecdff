"""Estimate a training run's hours, memory and disk space from its first updates."""
import os
import shutil
from statistics import median

from training.adapters import is_packed
from utils import format_seconds, gather_lists, peak_bytes

COUNTED_UPDATES = 5  # an estimate's updates; the first one is slower and left out


def log_cost(run, seconds, evaluations=0, eval_seconds=0.0):
    """Log three lines: the hours that are left, the memory of each process, and the disk space.

    seconds: the durations of some updates; evaluations: how many are left; eval_seconds: the
    duration of one.
    """
    counted = seconds[1:] or seconds
    update_seconds = median(counted)
    updates = run.last_update - run.progress.total_updates
    training = update_seconds * updates
    line = (f"cost: {updates:,} updates at {format_seconds(update_seconds)} (median of "
            f"{len(counted)}), {format_seconds(training)}")
    if evaluations:
        evaluating = evaluations * eval_seconds
        line += (f"; {evaluations} evaluations at about {format_seconds(eval_seconds)}, "
                 f"{format_seconds(evaluating)}; {format_seconds(training + evaluating)} in all")
    else:
        line += ", evaluations not counted"
    run.world.log(line)
    log_memory(run)
    log_disk(run)


def log_memory(run):
    """Log the peak memory of each process so far."""
    peaks = gather_lists([peak_bytes(run.world.device)], run.world)
    device = "GPU" if run.world.device.type == "cuda" else "machine"
    each = ", ".join(f"{peak / 2 ** 30:.1f}" for peak in peaks)
    run.world.log(f"cost: {each} GiB of the {device}'s memory in each process so far; longer texts "
                  "take more")


def log_disk(run):
    """Log the size of the model and of the resume state, and warn if the disk is too small."""
    if not run.world.is_main:
        return  # another machine may not have OUT's disk
    trained = 4 * count_trained(run.unwrapped)
    weights = 4 * sum(map(count_numbers, run.unwrapped.parameters()))
    state = trained if is_packed(run.unwrapped) else weights
    if run.optimizer.defaults.get("betas"):
        state += 2 * trained  # AdamW's moments
    # while a file is replaced, the old and the new one both take space
    needed = weights + state + max(weights, state)
    free = shutil.disk_usage(existing_folder(run.out)).free
    line = (f"cost: {run.out} takes {describe_bytes(weights)} on disk, its state "
            f"{describe_bytes(state)}, and the larger one once more while it is replaced; "
            f"{describe_bytes(free)} are free")
    # an earlier run's files will be replaced, so their space counts as free
    if free + size_on_disk(run.out) + size_on_disk(f"{run.out}.state") < needed:
        line = f"warning: too little space on disk; {line}"
    run.world.log(line)


def count_trained(model):
    """Return the number of weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_numbers(parameter):
    """Return how many numbers a weight represents; packed into 4 bits, a byte holds two."""
    packing = getattr(parameter, "quant_state", None)
    return packing.shape.numel() if packing else parameter.numel()


def size_on_disk(path):
    """Return the bytes of a file or of the files in a folder, 0 if there is neither."""
    if not os.path.isdir(path):
        return os.path.getsize(path) if os.path.exists(path) else 0
    return sum(os.path.getsize(os.path.join(folder, name))
               for folder, _, names in os.walk(path) for name in names)


def existing_folder(path):
    """Return the nearest folder above a path that exists."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder


def describe_bytes(count):
    """Return a number of bytes in GB, or in MB if it is less than 0.1 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 10 ** 8 else f"{count / 1e6:.1f} MB"
