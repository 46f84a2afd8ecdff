"""What the training loops of the reader and of the retriever share: the run, its progress, its log.

The loops themselves stand in train_epoch.py and train_dense.py, the resume state in resume.py.
"""
import argparse
import json
import math
import os
import random
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel

from checkpoints import versions
from files import new_file
from utils import InputError, World, peak_memory, progress_bar


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
    dev: object                # what the best checkpoint is chosen on, or None
    collator: object
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    last_update: int           # the update that the run ends with
    log: "RunLog"
    progress: Progress

    @property
    def unwrapped(self):
        """The model itself, without DistributedDataParallel."""
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model

    def exchange_gradients(self, is_last):
        """Context of one micro-batch: processes exchange gradients at an update's last one only."""
        return nullcontext() if is_last or self.world.size == 1 else self.model.no_sync()


# ---------------------------------------------------------------- setting up

def make_optimizer(model, lr, weight_decay, eps, warmup, updates):
    """(AdamW over the weights that are trained, linear warm-up and decay to 0 at the last update).
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr, weight_decay=weight_decay, eps=eps, fused=True)
    return optimizer, transformers.get_linear_schedule_with_warmup(optimizer, warmup, updates)


def add_lora(transformer, rank):
    """The transformer, frozen, with LoRA adapters of that rank (arXiv 2106.09685).

    Raises InputError without peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise InputError("--lora needs the package peft: pip install peft") from None
    adapters = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    return get_peft_model(transformer, adapters)


def count_trained(model):
    """The number of weights that are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def wrap_model(model, world):
    """The model inside DistributedDataParallel if there are several processes."""
    if world.size == 1:
        return model
    devices = [world.device] if world.device.type == "cuda" else None
    return DistributedDataParallel(model, devices, gradient_as_bucket_view=True)


def describe_machine(world, gpus):
    """The line that a run starts with: processes, device, versions."""
    device = f"cpu, {torch.get_num_threads()} threads"
    if world.device.type == "cuda":
        device = torch.cuda.get_device_name(world.device)
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    line = f"{world.size} process(es) on {device}; {packages}"
    if gpus == "" and os.path.exists("/dev/nvidia0"):
        line += "; a GPU is here but unused: --gpus 0"
    return line


# ---------------------------------------------------------------- one update

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
    bar.set_postfix(loss=f"{run.progress.last_loss:.3f}", peak=peak_memory(run.world.device),
                    refresh=False)
    bar.update()


# ---------------------------------------------------------------- log

class RunLog:
    """Rows in a JSONL file and, if asked for, TensorBoard, written by the main process."""

    def __init__(self, path, is_main, keep_rows=0, tensorboard=None):
        """Keeps the first `keep_rows` rows of the file, those that a resumed run has already
        written.
        """
        self.path, self.is_main, self.board = path, is_main, None
        if not is_main:
            return
        rows = []
        if keep_rows and os.path.exists(path):
            with open(path, "rb") as file:
                rows = file.read().split(b"\n")[:keep_rows]
        with new_file(path, "wb") as file:
            file.writelines(row + b"\n" for row in rows)
        if tensorboard:
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
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        for name, value in row.items():
            if self.board and isinstance(value, (int, float)):
                self.board.add_scalar(name, value, step)


# ---------------------------------------------------------------- seeds

def set_seed(seed, rank=0):
    """Seeds dropout with seed + rank; the order of examples and the choice of answers have seeds of
    their own.
    """
    random.seed(seed + rank)
    torch.manual_seed(seed + rank)
