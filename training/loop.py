"""What the training loops of the reader and of the retriever share: the run, its progress, its log.

The loops themselves stand in train_epoch.py and train_dense.py, the resume state in resume.py.
"""
import argparse
import json
import math
import os
import random
import re
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch.nn.parallel import DistributedDataParallel

from records.files import new_file
from training.output_folder import versions
from utils import InputError, World, peak_bytes, progress_bar, refusing

# what a run reads; in a federation a client has no dev set, the server no training set
BOTH_SETS = ("train", "dev")


@dataclass
class Progress:
    """Where a run stands; everything in it is in the resume state."""
    epoch: int = 0
    update: int = 0            # updates done in this epoch
    total_updates: int = 0
    best: tuple = ()           # the best checkpoint's measures, the one that decides first
    best_at: str = ""
    rows: int = 0              # rows of the log that are written
    # since the last report:
    losses: list = field(default_factory=list)  # (loss summed, its weight) of each update
    examples: float = 0.0
    seconds: float = 0.0

    def count_update(self, loss_sum, weight, examples, seconds):
        """Adds one update over all processes; its loss is loss_sum / weight."""
        self.losses.append((loss_sum, weight))
        self.examples += examples
        self.seconds += seconds
        self.update += 1
        self.total_updates += 1

    @property
    def last_loss(self):
        loss_sum, weight = self.losses[-1]
        return loss_sum / weight

    def count_measures(self, *measures):
        """True if these measures, of which higher is better, are the best so far; ties go to the
        next measure, then to the later update: the first one has hardly been trained.
        """
        is_best = measures >= self.best
        if is_best:
            self.best = measures
        return is_best

    def summary(self):
        """{loss, examples_per_second, seconds, loss_curve} since the last report."""
        total_weight = sum(weight for _, weight in self.losses)
        return {"loss": sum(loss_sum for loss_sum, _ in self.losses) / max(total_weight, 1),
                "examples_per_second": self.examples / max(self.seconds, 1e-9),
                "seconds": self.seconds,
                "loss_curve": [round(loss_sum / weight, 5) for loss_sum, weight in self.losses]}

    def start_report(self):
        """Forgets what the last report has written."""
        self.losses, self.examples, self.seconds = [], 0.0, 0.0

    def start_epoch(self):
        self.epoch += 1
        self.update = 0


@dataclass
class Run:
    """What the functions of a training script share."""
    args: argparse.Namespace
    world: World
    out: str                   # path of the model; OUT.jsonl and OUT.state lie beside it
    model: torch.nn.Module     # inside DistributedDataParallel if there are several processes
    tokenizer: object
    train_set: torch.utils.data.Dataset
    dataset_sizes: list        # the number of training examples of each dataset
    dev: object                # what the best checkpoint is chosen on, or None
    collator: object
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    last_update: int           # the update that the run ends with
    log: "RunLog"
    progress: Progress
    # {path: size and hash} of the input files, see resume.hash_inputs
    inputs: dict = field(default_factory=dict, kw_only=True)
    # of this process's first updates, see training/cost.py
    first_seconds: list = field(default_factory=list, kw_only=True)

    @property
    def unwrapped(self):
        """The model itself, without DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def exchange_gradients(self, is_last):
        """Context of one micro-batch: processes exchange gradients at an update's last one only.
        """
        is_copied = isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync() if is_copied and not is_last else nullcontext()


# ---------------------------------------------------------------- setting up

def make_optimizer(model, lr, weight_decay, eps, warmup, updates, kind="adamw"):
    """(AdamW, or with kind "sgd" plain SGD, over the weights that are trained; linear warm-up and
    decay to 0 at the last update).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if kind == "sgd":
        optimizer = torch.optim.SGD(trained, lr=lr, weight_decay=weight_decay)
    else:
        optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, eps=eps,
                                      fused=True)
    # transformers' schedule is the same; importing it takes 7 s where peft and bitsandbytes are
    def share(update):
        if update < warmup:
            return update / max(warmup, 1)
        return max(0.0, (updates - update) / max(updates - warmup, 1))
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)


def freeze(model, pattern):
    """Keeps the weights whose names a regular expression finds as they are.

    Raises InputError if it is none, finds none, or leaves nothing to train.
    """
    with refusing(f"--freeze {pattern}: not a regular expression", "mend it"):
        expression = re.compile(pattern)
    found = [parameter for name, parameter in model.named_parameters() if expression.search(name)]
    if not found:
        name = next(iter(dict(model.named_parameters())))
        raise InputError(f"--freeze {pattern}: finds none of the model's weights, which are named "
                         f"like {name}")
    for parameter in found:
        parameter.requires_grad_(False)
    if not count_trained(model):
        raise InputError(f"--freeze {pattern}: leaves no weight to train; name fewer")


def count_trained(model):
    """The number of weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def wrap_model(model, world):
    """Return the model, inside DistributedDataParallel if there are several processes."""
    if world.size == 1:
        return model
    # without device_ids: the models move their inputs, and DDP would look at each token id alone
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def describe_machine(world, gpus):
    """The line that a run starts with: processes, device, versions."""
    threads = torch.get_num_threads()
    device = f"cpu, {threads} threads"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    line = f"{world.size} process(es) on {device}; {packages}"
    if gpus == "" and os.path.exists("/dev/nvidia0"):
        line += "; a GPU is here but unused: --gpus 0"
    if world.device.type == "cpu" and threads > 1 and os.getloadavg()[0] > os.cpu_count():
        # threads wait for each other in busy loops; of two, one that is kept off its core costs
        # a step of 0.1 s several seconds
        line += "; the machine is busy: OMP_NUM_THREADS=1 in front of the command may be faster"
    return line


# ---------------------------------------------------------------- one update

def open_epoch(run, plan):
    """(the updates of the current epoch's plan that are left, an iterator of their batches)."""
    remaining = plan[run.progress.update:]  # a resumed run goes on inside the epoch
    run.train_set.epoch = run.progress.epoch
    loader = train_loader(run.train_set, remaining, run.collator, run.args.num_workers)
    return remaining, iter(loader)


def saved_note(run):
    """What an error says of the checkpoint that is saved; "" if there is none yet."""
    if not os.path.exists(os.path.join(run.out, "args.json")):
        return ""
    return f"; the best checkpoint so far is left in {run.out}"


def step_optimizer(run, loss):
    """Clips the gradient and steps; returns None, or what is not finite ("loss", "gradient"): the
    weights are untouched then.
    """
    parameters = [parameter for parameter in run.model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.args.clip)
    if not math.isfinite(loss):
        return "loss"
    if not math.isfinite(norm):
        return "gradient"
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return None


# ---------------------------------------------------------------- progress on the screen

def epoch_bar(run, steps=None):
    """A progress bar over the updates of the whole run: what it says is left is the run's time.

    steps: see progress_bar.
    """
    progress = run.progress
    return progress_bar(desc=f"epoch {progress.epoch}", total=run.last_update, unit=" updates",
                        initial=progress.total_updates, is_main=run.world.is_main,
                        always=run.args.tqdm, steps=steps)


def count_on_bar(bar, run):
    """Moves the bar by an update, with its loss and the most memory taken so far."""
    peak = f"{peak_bytes(run.world.device) / 2 ** 30:.1f} GiB"
    bar.set_postfix(loss=f"{run.progress.last_loss:.3f}", peak=peak, refresh=False)
    bar.update()


# ---------------------------------------------------------------- log

class RunLog:
    """Rows in a JSONL file and, if asked for, TensorBoard, written by the main process."""

    def __init__(self, path, is_main, keep_rows=0, tensorboard=None):
        """The first row that is written replaces all of the file but its first `keep_rows` rows,
        those that a resumed run has already written.
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
        """Appends a JSON row; its numbers go to TensorBoard at `step`."""
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
        """Leaves the file's first `keep_rows` rows."""
        rows = []
        if self.keep_rows and os.path.exists(self.path):
            with open(self.path, "rb") as file:
                rows = file.read().split(b"\n")[:self.keep_rows]
        with new_file(self.path, "wb") as file:
            file.writelines(row + b"\n" for row in rows)
        self.is_open = True


# ---------------------------------------------------------------- seeds

def set_seed(seed, rank=0):
    """Seeds dropout with seed + rank; the order of examples and the choice of answers have seeds of
    their own.
    """
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)


def make_loader(dataset, batches, collator, num_workers):
    """Batches of the listed entries, in order; draws nothing from the global random state."""
    if num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    return torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=collator,
                                       num_workers=num_workers, generator=torch.Generator())


def train_loader(dataset, updates, collator, num_workers):
    """The batches of planned updates, one after another."""
    batches = [batch for update in updates for batch in update]
    return make_loader(dataset, batches, collator, num_workers)
