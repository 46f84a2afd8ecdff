"""What a training run will cost: hours, memory and disk, by its first updates (--plan)."""
import os
import shutil
import time
from statistics import median

from training.adapters import is_packed
from training.loop import count_trained, open_epoch
from utils import format_seconds, gather_lists, peak_bytes, progress_bar

COUNTED = 5  # updates that an estimate is made from; the first, which takes longer, is left out


def measure_updates(run, plan, train_update):
    """The seconds of the first COUNTED updates of an epoch's plan, which train the model."""
    updates, batches = open_epoch(run, plan)
    seconds = []
    for update in progress_bar(updates[:COUNTED], desc="measuring", unit=" updates",
                               is_main=run.world.is_main):
        start = time.time()
        train_update(run, batches, len(update))
        seconds.append(time.time() - start)
    return seconds


def note_cost(run, update_seconds):
    """Adds the seconds of an update; once COUNTED of this process are known, logs the cost of what
    is left.
    """
    run.first_seconds.append(update_seconds)
    if len(run.first_seconds) == COUNTED:
        log_cost(run, run.first_seconds)


def log_cost(run, seconds, evaluations=0, eval_seconds=0.0):
    """Logs three lines: the hours that are left, each process's memory, the room on disk.

    seconds: of some updates; eval_seconds: of one evaluation, of which there will be so many.
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
    """Logs the most memory that each process has taken so far."""
    peaks = gather_lists([peak_bytes(run.world.device)], run.world)
    place = "GPU" if run.world.device.type == "cuda" else "machine"
    each = ", ".join(f"{peak / 2 ** 30:.1f}" for peak in peaks)
    run.world.log(f"cost: {each} GiB of the {place}'s memory in each process so far; longer texts "
                  "take more")


def log_disk(run):
    """Logs the size of the model and of the resume state, and warns if there is too little room."""
    if not run.world.is_main:
        return  # on another machine OUT's disk may be missing
    trained = 4 * count_trained(run.unwrapped)
    weights = 4 * sum(map(count_numbers, run.unwrapped.parameters()))
    state = trained if is_packed(run.unwrapped) else weights
    if run.optimizer.defaults.get("betas"):
        state += 2 * trained  # AdamW's moments
    # the larger one is there twice while it is replaced; what an earlier run has left counts
    needed = weights + state + max(weights, state)
    free = shutil.disk_usage(existing_folder(run.out)).free
    line = (f"cost: {run.out} takes {describe_bytes(weights)} on disk, its state "
            f"{describe_bytes(state)}, and the larger one once more while it is replaced; "
            f"{describe_bytes(free)} are free")
    if free + size_on_disk(run.out) + size_on_disk(f"{run.out}.state") < needed:
        line = f"warning: too little room on disk; {line}"
    run.world.log(line)


def count_numbers(parameter):
    """How many numbers a weight stands for; a byte of one that is packed into 4 bits holds two."""
    packing = getattr(parameter, "quant_state", None)
    return packing.shape.numel() if packing else parameter.numel()


def size_on_disk(path):
    """The bytes of a file, or of the files of a folder; 0 where there is none."""
    if not os.path.isdir(path):
        return os.path.getsize(path) if os.path.exists(path) else 0
    return sum(os.path.getsize(os.path.join(folder, name))
               for folder, _, names in os.walk(path) for name in names)


def existing_folder(path):
    """The folder in which a path lies or, as long as there is none, would be made."""
    folder = os.path.dirname(os.path.abspath(path))
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    return folder


def describe_bytes(count):
    """A number of bytes in GB, of less than 0.1 GB in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 10 ** 8 else f"{count / 1e6:.1f} MB"
