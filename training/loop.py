"""What the training loops of train_epoch.py and train_dense.py share: the run, its progress and
log, the optimizer, and the bookkeeping of an update.

The loops themselves are in the two scripts, the resume state is in training/resume.py.
"""
import argparse
import json
import math
import os
import random
import re
import time
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from records.files import new_file
from training.cost import COUNTED_UPDATES, count_trained, log_cost
from training.output_folder import versions
from utils import InputError, World, gather_lists, peak_bytes, progress_bar, refusing

# the sets that a run reads; in a federation, clients have no dev set, the server no training set
BOTH_SETS = ("train", "dev")
MOST_NAMED = 8  # records that an error names


@dataclass
class Progress:
    """Hold how far a run is. OUT.state stores all of it."""
    epoch: int = 0
    update: int = 0            # updates done in this epoch
    total_updates: int = 0
    best: tuple = ()           # the measures of the best checkpoint, the most important one first
    best_at: str = ""          # when it was saved, in words
    rows: int = 0              # rows written to OUT.jsonl
    # since the last report:
    losses: list = field(default_factory=list)  # (summed loss, its weight) of each update
    examples: float = 0.0
    seconds: float = 0.0

    def count_update(self, loss_sum, weight, examples, seconds):
        """Add one update over all processes; its loss is loss_sum / weight."""
        self.losses.append((loss_sum, weight))
        self.examples += examples
        self.seconds += seconds
        self.update += 1
        self.total_updates += 1

    def keep_best(self, measures, best_at):
        """Return True, and remember the measures, if they are the best so far; higher is better.

        measures: a tuple, compared in order. Equal measures count as better: while no checkpoint
        answers anything right, the latest is the most trained.
        """
        is_best = measures >= self.best
        if is_best:
            self.best, self.best_at = measures, best_at
        return is_best

    def summary(self):
        """Return {loss, examples_per_second, seconds, loss_curve} since the last report."""
        total_weight = sum(weight for _, weight in self.losses)
        return {"loss": sum(loss_sum for loss_sum, _ in self.losses) / max(total_weight, 1),
                "examples_per_second": self.examples / max(self.seconds, 1e-9),
                "seconds": self.seconds,
                "loss_curve": [round(loss_sum / weight, 5) for loss_sum, weight in self.losses]}

    def start_report(self):
        """Reset the sums for the next report."""
        self.losses, self.examples, self.seconds = [], 0.0, 0.0

    def start_epoch(self):
        """Move on to the first update of the next epoch."""
        self.epoch += 1
        self.update = 0


@dataclass
class Run:
    """Hold what the functions of a training script share.

    `args` are the script's flags as they were parsed. They stay together because the two scripts
    and a federation read some twenty of them during training; nothing writes to them.
    """
    args: argparse.Namespace
    flags: dict                # `args` with derived values filled in, for args.json and OUT.state
    world: World
    out: str                   # folder of the model; OUT.jsonl and OUT.state are next to it
    model: torch.nn.Module     # inside DistributedDataParallel if there are several processes
    tokenizer: object
    train_set: torch.utils.data.Dataset
    dataset_sizes: list        # the number of training examples of each dataset
    dev: object                # the dev set that chooses the best checkpoint, or None
    collator: object
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    last_update: int           # the update after which the run ends
    log: "RunLog"
    progress: Progress
    # {path: size and hash} of the input files, see resume.hash_inputs
    inputs: dict = field(default_factory=dict, kw_only=True)
    # seconds of this process's first updates, see log_update
    first_seconds: list = field(default_factory=list, kw_only=True)

    @property
    def unwrapped(self):
        """Return the model itself, without DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def sync_gradients(self, is_last):
        """Return the context manager for one micro-batch: DDP synchronises gradients only on the
        last micro-batch of an update.
        """
        is_wrapped = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if is_wrapped and not is_last else nullcontext()


# ---------------------------------------------------------------- one update

def open_epoch(run, plan):
    """Return (the remaining updates of the current epoch's plan, an iterator over their batches). A
    resumed run continues inside its epoch.
    """
    remaining = plan[run.progress.update:]
    run.train_set.epoch = run.progress.epoch
    batches = [batch for update in remaining for batch in update]
    return remaining, iter(make_loader(run.train_set, batches, run.collator, run.args.num_workers))


def scale_gradients(model, factor):
    """Multiply all gradients by a number or a tensor."""
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if isinstance(factor, torch.Tensor):
        factor = factor.to(gradients[0].dtype)
    torch._foreach_mul_(gradients, factor)


def step_optimizer(run, totals, losses, indices):
    """Clip the gradient, take an optimizer step, and return the totals as floats.

    totals: a tensor that begins with the update's loss over all processes; losses (micro-batches),
    indices: the loss and the records' indices of each of this process's micro-batches. If the loss
    or the gradient is not finite, leaves the weights unchanged and raises InputError naming the
    records.
    """
    parameters = [parameter for parameter in run.model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.args.clip)
    # all figures come in one copy, because each copy waits until the GPU has finished its work
    norm, *figures = torch.cat([norm.double()[None], totals, losses]).tolist()
    totals, losses = figures[:len(totals)], figures[len(totals):]
    if not math.isfinite(totals[0]):
        refuse_update(run, "loss", losses, indices)
    if not math.isfinite(norm):
        refuse_update(run, "gradient", losses, indices)
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return totals


def refuse_update(run, not_finite, losses, indices):
    """Raise InputError naming the records whose loss is not finite or, if only the gradient is not,
    all records of the update.

    not_finite: "loss" or "gradient"; losses, indices: see step_optimizer.
    """
    suspects = []
    for loss, batch_indices in zip(losses, indices):
        if not_finite == "gradient" or not math.isfinite(loss):
            suspects += batch_indices
    suspects = sorted(set(gather_lists(suspects, run.world)))
    names = run.train_set.name_examples(suspects[:MOST_NAMED])
    more = " ..." if len(suspects) > MOST_NAMED else ""
    saved = ""
    if os.path.exists(os.path.join(run.out, "args.json")):
        saved = f"; the best checkpoint so far is kept in {run.out}"
    raise InputError(f"the {not_finite} is not finite in update {run.progress.total_updates + 1}, "
                     f"{names}{more}; look at these records, or lower --lr{saved}")


def log_update(run, bar, seconds):
    """Move the progress bar by an update, with its loss and the peak memory. After this process's
    first few updates, log an estimate for the rest of the run.
    """
    loss_sum, weight = run.progress.losses[-1]
    peak = f"{peak_bytes(run.world.device) / 2 ** 30:.1f} GiB"
    bar.set_postfix(loss=f"{loss_sum / weight:.3f}", peak=peak, refresh=False)
    bar.update()
    run.first_seconds.append(seconds)
    if len(run.first_seconds) == COUNTED_UPDATES:
        log_cost(run, run.first_seconds)


def measure_updates(run, plan, train_update):
    """Train the model on the first few updates of an epoch's plan; return the seconds of each."""
    updates, batches = open_epoch(run, plan)
    seconds = []
    for update in progress_bar(updates[:COUNTED_UPDATES], desc="measuring", unit=" updates",
                               is_main=run.world.is_main):
        start = time.time()
        train_update(run, batches, len(update))
        seconds.append(time.time() - start)
    return seconds


def epoch_bar(run, steps=None):
    """Return a progress bar over the updates of the whole run, so that it shows the time left in
    the run, not in the epoch.

    steps: see progress_bar.
    """
    progress = run.progress
    return progress_bar(desc=f"epoch {progress.epoch}", total=run.last_update, unit=" updates",
                        initial=progress.total_updates, is_main=run.world.is_main,
                        always=run.args.tqdm, steps=steps)


def make_loader(dataset, batches, collator, num_workers):
    """Return a DataLoader over the listed batches of entries, in order. It draws nothing from the
    global random state.
    """
    if num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=collator,
                                       num_workers=num_workers, generator=torch.Generator())


# ---------------------------------------------------------------- setting up

def check_rates(dropout, warmup_ratio):
    """Raise InputError unless 0 <= dropout < 1 and 0 <= warmup_ratio <= 1; None means not given."""
    if dropout is not None and not 0 <= dropout < 1:
        raise InputError(f"--dropout must be >= 0 and < 1, got {dropout}")
    if warmup_ratio is not None and not 0 <= warmup_ratio <= 1:
        raise InputError(f"--warmup_ratio must be >= 0 and <= 1, got {warmup_ratio}")


def set_seed(seed, rank=0):
    """Seed dropout with seed + rank. The order of examples and the choice of answers have seeds of
    their own.
    """
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def freeze(model, pattern):
    """Freeze the weights whose names match a regular expression.

    Raises InputError if it is not a regular expression, matches nothing or leaves nothing to train.
    """
    with refusing(f"--freeze {pattern}: not a regular expression", "correct it"):
        expression = re.compile(pattern)
    found = [parameter for name, parameter in model.named_parameters() if expression.search(name)]
    if not found:
        name = next(iter(dict(model.named_parameters())))
        raise InputError(f"--freeze {pattern}: matches none of the model's weights, which have "
                         f"names like {name}")
    for parameter in found:
        parameter.requires_grad_(False)
    if not count_trained(model):
        raise InputError(f"--freeze {pattern}: leaves no weight to train; match fewer")


def make_optimizer(model, lr, weight_decay, eps, warmup, updates, kind="adamw"):
    """Return (optimizer of the trained weights, its schedule). The schedule is a linear warm-up,
    then a linear decay to 0 at the last update.

    kind: "adamw", or "sgd" for plain SGD.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "sgd":
        optimizer = torch.optim.SGD(trained, lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, eps=eps,
                                      fused=True)
    # equal to transformers' schedule, whose import takes 7 s with peft and bitsandbytes installed
    def share(update):
        if update < warmup:
            return update / max(warmup, 1)
        return max(0.0, (updates - update) / max(updates - warmup, 1))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def wrap_model(model, world):
    """Return the model, inside DistributedDataParallel if there are several processes."""
    if world.size == 1:
        return model
    # no device_ids, since the models move their inputs themselves; DDP would move lists one by one
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def log_start(run, data, unit, accumulate, updates, warmup):
    """Log the lines that every run starts with: machine, data and model, batch and schedule.

    data: the training data, in words; unit: what batches consist of, for example "questions";
    accumulate: mean or sum of micro-batches; updates: their number, in words; warmup: the number of
    warm-up updates.
    """
    args, world, log = run.args, run.world, run.world.log
    parameters = sum(parameter.numel() for parameter in run.unwrapped.parameters())
    trained = count_trained(run.unwrapped)
    share = f", {trained:,} of them trained" if trained < parameters else ""
    log(describe_machine(world, args.gpus))
    log(f"{data}; {parameters:,} parameters{share}")
    log(f"effective batch {args.batch_size * args.grad_accumulation * world.size} = "
        f"{args.batch_size} {unit} x {args.grad_accumulation} micro-batches x {world.size} "
        f"processes ({accumulate}); {updates}, {warmup} of warm-up")
    if warmup >= run.last_update:
        log(f"warning: the warm-up of {warmup} updates outlasts the run: the learning rate never "
            f"reaches {args.lr:g}; --warmup_ratio 0.1 would fit")
    if run.progress.total_updates:
        log(f"resuming after {run.progress.total_updates} updates, in epoch {run.progress.epoch}")


def describe_machine(world, gpus):
    """Return a line with the number of processes, the device and the versions of packages."""
    threads = torch.get_num_threads()
    device = f"cpu, {threads} threads"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    line = f"{world.size} process(es) on {device}; {packages}"
    if gpus == "" and os.path.exists("/dev/nvidia0"):
        line += "; there is an unused GPU: --gpus 0"
    if world.device.type == "cpu" and threads > 1 and os.getloadavg()[0] > os.cpu_count():
        # threads wait for each other in busy loops; if one of two is kept off its core, a step of
        # 0.1 s takes several seconds
        line += "; the machine is busy: OMP_NUM_THREADS=1 in front of the command may be faster"
    return line


# ---------------------------------------------------------------- log

class RunLog:
    """Write rows to a JSONL file and, optionally, to TensorBoard, from the main process."""

    def __init__(self, path, is_main, keep_rows=0, tensorboard=None):
        """Open the log of a run. The file's first `keep_rows` rows, written before a resume, are
        kept; all others are dropped when the first new row is written.

        tensorboard: a folder, or None. Raises InputError if the package is missing.
        """
        self.path, self.is_main, self.keep_rows, self.board = path, is_main, keep_rows, None
        self.is_open = False
        if is_main and tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("--tensorboard needs the package tensorboard: pip install "
                                 "tensorboard") from None
            self.board = SummaryWriter(tensorboard)

    def row(self, row, step):
        """Append a JSON row; its numbers go to TensorBoard at `step`."""
        if not self.is_main:
            return
        if not self.is_open:
            self.drop_rows()
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if self.board and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)

    def drop_rows(self):
        """Keep only the file's first `keep_rows` rows."""
        rows = []
        if self.keep_rows and os.path.exists(self.path):
            with open(self.path, "rb") as file:
                rows = file.read().split(b"\n")[:self.keep_rows]
        with new_file(self.path, "wb") as file:
            file.writelines(row + b"\n" for row in rows)
        self.is_open = True
