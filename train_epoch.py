"""Trains a Fusion-in-Decoder reader (arXiv 2007.01282) epoch by epoch and keeps the checkpoint with the best dev EM.

    python train_epoch.py OUT train.json dev.json --t5_name t5-base --num_contexts 100 --gpus 0
    torchrun --standalone --nproc_per_node=8 train_epoch.py OUT train.json dev.json --data_test test.json \
        --num_contexts 100 --batch_size 2 --grad_accumulation 4 --use_checkpoint --lr 1e-4 --gpus 0,1,2,3,4,5,6,7

Written: OUT (the best reader, a T5 folder), OUT.jsonl (one row per evaluation) and OUT.state (everything that --resume
needs to end with the weights of a run that was never stopped).
"""
import argparse
import math
import os
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from checkpoints import load_state, load_tokenizer, restore_state, save_state, versions
from data import Collator, TrainSet, check_targets, plan_epoch, read_records, train_loader
from model import FiDT5
from test import predict, summarize
from utils import (HelpFormatter, InputError, RunLog, check_writable, gather_lists, run_script, save_folder, set_seed,
                   start_processes, sum_over_processes, write_json)

# flags that may differ between a run and its resumption: they do not change the weights
FREE_FLAGS = {"resume", "num_workers", "save_every", "gpus", "data_test", "batch_size_val", "tensorboard", "tqdm"}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("model", help="folder to write the best reader to; OUT.jsonl and OUT.state lie beside it")
    add("data_train", help="training records: .json or .jsonl, may end in .gz")
    add("data_val", help="dev records, which choose the best checkpoint")
    add = parser.add_argument_group("data").add_argument
    add("--data_test", help="records to evaluate the best checkpoint on at the end")
    add("--num_contexts", type=int, default=5, help="contexts per question")
    add("--max_length", type=int, default=250, help="tokens per question and passage, cut at the right")
    add("--answer_maxlength", type=int, default=-1, help="refuse targets of more tokens; -1 allows any length")
    add("--num_workers", type=int, default=0, help="processes that tokenise")
    add("--no_shuffle", action="store_true", help="keep the file's order and each record's first answer")
    add = parser.add_argument_group("model").add_argument
    add("--t5_name", default="t5-base", help="checkpoint to start from: hub name or folder")
    add("--dropout", type=float, default=0.1, help="dropout rate")
    add("--use_checkpoint", action="store_true", help="recompute the encoder's activations in the backward pass to save memory")
    add("--bf16", action="store_true", help="bfloat16 autocast; weights and optimizer stay float32")
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", type=int, default=1, help="questions per process and micro-batch")
    add("--batch_size_val", type=int, default=2, help="questions per process in evaluation")
    add("--grad_accumulation", type=int, default=1, help="micro-batches per update")
    add("--accumulate", choices=["mean", "sum"], default="mean", help="mean: an update's gradient is that of one large batch; sum: "
        "the micro-batches' mean gradients are added up, the scale of FiD and minFiD")
    add("--epochs", type=int, default=20, help="passes over the training records")
    add("--lr", type=float, default=1e-5, help="highest learning rate of the linear schedule")
    add("--num_warmup_steps", type=int, default=1000, help="updates of linear warm-up")
    add("--weight_decay", type=float, default=0.01, help="AdamW's weight decay, on all weights")
    add("--clip", type=float, default=1.0, help="largest gradient norm")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=42, help="seed of the order, the answers and (plus the rank) dropout")
    add("--eval_every", type=int, default=0, help="also evaluate every that many updates; 0: at the end of epochs only")
    add("--save_every", type=int, default=0, help="also save OUT.state every that many updates; 0: after evaluations only")
    add("--resume", action="store_true", help="go on from OUT.state; without such a file, start")
    add("--tensorboard", action="store_true", help="write to OUT.tensorboard as well (needs the package)")
    add("--tqdm", action="store_true", help="show progress bars even if the output is not a terminal")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES, for example 0,1; empty runs on the CPU")
    return parser.parse_args()


@dataclass
class Progress:
    """Where a run stands; everything in it is in the resume state."""
    epoch: int = 0
    update: int = 0            # updates done in this epoch
    total_updates: int = 0
    best_em: float = -1.0
    best_at: str = ""
    rows: int = 0              # rows of the log written
    loss: float = 0.0          # of this epoch: summed loss and what it is divided by
    weight: float = 0.0
    questions: float = 0.0
    seconds: float = 0.0
    curve: list = field(default_factory=list)  # loss of each update of this epoch


@dataclass
class Run:
    """What the functions below share."""
    args: argparse.Namespace
    world: object
    model: torch.nn.Module     # FiDT5, inside DistributedDataParallel if there are several processes
    tokenizer: object
    train_set: TrainSet
    dev: list
    collator: Collator
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    log: RunLog
    progress: Progress

    @property
    def reader(self):
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model


def check_args(args):
    """InputError for flags that cannot work."""
    args.model = args.model.rstrip("/")
    for name, least in (("num_contexts", 1), ("max_length", 1), ("batch_size", 1), ("batch_size_val", 1), ("grad_accumulation", 1),
                        ("epochs", 1), ("num_workers", 0), ("num_warmup_steps", 0), ("eval_every", 0), ("save_every", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name} must be {least} or more, it is {getattr(args, name)}")
    if not 0 <= args.dropout < 1 or args.lr <= 0 or args.clip <= 0:
        raise InputError("--dropout must be in [0, 1), --lr and --clip above 0")


def train_update(run, batches, count):
    """One optimizer step over `count` micro-batches; returns (summed loss, its weight, questions) over all processes.

    mean: the loss is summed over all target tokens of the update, on all processes, and divided by their number. sum: each
    micro-batch's mean loss counts whole, as in FiD and minFiD (processes are averaged by DDP in both).
    Raises InputError naming the records if the loss or the gradient is not finite; the weights are untouched then.
    """
    args, device, world = run.args, run.world.device, run.world
    by_token = args.accumulate == "mean"
    losses, weight, questions, places = [], 0, 0, []
    for i in range(count):
        batch = next(batches)
        counted = batch["labels"] is not None
        labels = batch["labels"] if counted else torch.full((len(batch["places"]), 1), -100)
        last = i == count - 1  # gradients are exchanged once per update
        with nullcontext() if last or world.size == 1 else run.model.no_sync():
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss, _ = run.model(batch["input_ids"].to(device), batch["attention_mask"].to(device), labels.to(device),
                                    reduction="sum" if by_token else "mean")
            loss.backward()
        losses.append(loss.detach())
        weight += int(labels.ne(-100).sum()) if by_token else int(counted)
        questions += len(batch["places"]) if counted else 0
        places.append(batch["places"])
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    losses = torch.stack(losses).tolist()
    total, weight, questions = sum_over_processes([sum(losses), weight, questions], world)
    if by_token:
        torch._foreach_mul_([p.grad for p in parameters], world.size / weight)  # DDP has divided by the number of processes
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
    if not (math.isfinite(total) and math.isfinite(norm)):
        own = [place for loss, batch in zip(losses, places) if math.isfinite(total) or not math.isfinite(loss) for place in batch]
        ids = [run.train_set.records[place]["id"] for place in sorted(gather_lists(own, world))]
        what = "gradient" if math.isfinite(total) else "loss"
        raise InputError(f"the {what} is not finite in update {run.progress.update + 1} of epoch {run.progress.epoch}, records "
                         f"{', '.join(map(repr, ids))} of {args.data_train}; look at them, or lower --lr; "
                         f"the best checkpoint so far is left in {args.model}")
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return total, weight, questions


def train_epoch(run):
    """The rest of the current epoch, with the evaluations and saves that fall into it."""
    args, world, progress = run.args, run.world, run.progress
    plan = plan_epoch(len(run.train_set.records), progress.epoch, args.seed, not args.no_shuffle, args.batch_size,
                      args.grad_accumulation, world.rank, world.size)
    run.train_set.epoch = progress.epoch
    batches = iter(train_loader(run.train_set, plan[progress.update:], run.collator, args.num_workers))
    hidden = not world.is_main or (None if not args.tqdm else False)
    bar = tqdm(plan, desc=f"epoch {progress.epoch}", initial=progress.update, leave=False, disable=hidden)
    for update in plan[progress.update:]:
        start = time.time()
        total, weight, questions = train_update(run, batches, len(update))
        progress.loss += total
        progress.weight += weight
        progress.questions += questions
        progress.seconds += time.time() - start
        progress.curve.append(round(total / weight, 5))
        progress.update += 1
        progress.total_updates += 1
        bar.update()
        bar.set_postfix(loss=f"{progress.curve[-1]:.3f}")
        ends = progress.update == len(plan)
        if ends or args.eval_every and progress.total_updates % args.eval_every == 0:
            evaluate(run, ends)
        elif args.save_every and progress.total_updates % args.save_every == 0:
            save_run(run)
    bar.close()


def evaluate(run, end_of_epoch):
    """Dev EM; a line and a log row; the best checkpoint if this is it; then the resume state."""
    args, progress, start = run.args, run.progress, time.time()
    rows = predict(run.reader, run.dev, run.tokenizer, run.world, num_contexts=args.num_contexts, max_length=args.max_length,
                   batch_size=args.batch_size_val, num_workers=args.num_workers, bf16=args.bf16)
    run.model.train()
    em, f1, correct, count = summarize(rows)
    is_best = em > progress.best_em
    row = {"epoch": progress.epoch, "update": progress.total_updates, "loss": progress.loss / progress.weight, "dev_em": em,
           "dev_f1": f1, "correct": correct, "count": count, "lr": run.scheduler.get_last_lr()[0],
           "questions_per_second": progress.questions / progress.seconds, "seconds": progress.seconds,
           "eval_seconds": time.time() - start, "best": is_best, "loss_curve": progress.curve}
    run.log.say(f"epoch {progress.epoch:3d} | update {progress.total_updates:6d} | loss {row['loss']:.4f} | dev EM {em:6.2f} "
                f"({correct}/{count}) | lr {row['lr']:.2e} | {row['questions_per_second']:.1f} questions/s | "
                f"{progress.seconds:.0f} s + {row['eval_seconds']:.0f} s" + (" | best" if is_best else ""))
    run.log.row(row, progress.total_updates)
    progress.rows += 1
    if is_best:
        progress.best_em, progress.best_at = em, f"epoch {progress.epoch}, update {progress.total_updates}"
        if run.world.is_main:
            save_best(run)
    if end_of_epoch:
        run.progress = Progress(progress.epoch + 1, total_updates=progress.total_updates, best_em=progress.best_em,
                                best_at=progress.best_at, rows=progress.rows)
    save_run(run)


def save_best(run):
    """The reader as a T5 folder with its tokenizer and args.json."""
    args, progress = run.args, run.progress
    info = {"dev_em": progress.best_em, "epoch": progress.epoch, "update": progress.total_updates,
            "num_contexts": args.num_contexts, "max_length": args.max_length, "answer_maxlength": args.answer_maxlength,
            "args": vars(args), "versions": versions()}
    save_folder(args.model, run.reader.save_pretrained, run.tokenizer.save_pretrained,
                lambda folder: write_json(os.path.join(folder, "args.json"), info))


def save_run(run):
    save_state(run.args.model + ".state", run.world, run.reader, run.optimizer, run.scheduler, asdict(run.progress), run.args)


def describe(run, updates_per_epoch):
    """The lines that a run starts with."""
    args, world = run.args, run.world
    say, found = run.log.say, ", ".join(f"{name} {version}" for name, version in versions().items())
    idle = args.gpus == "" and os.path.exists("/dev/nvidia0")
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    say(f"{world.size} process(es) on {name}; {found}" + ("; a GPU is here but unused: --gpus 0" if idle else ""))
    say(f"{len(run.train_set.records)} training and {len(run.dev)} dev questions, {args.num_contexts} contexts of at most "
        f"{args.max_length} tokens; {sum(p.numel() for p in run.reader.parameters()):,} parameters")
    say(f"effective batch {args.batch_size * args.grad_accumulation * world.size} = {args.batch_size} questions x "
        f"{args.grad_accumulation} micro-batches x {world.size} processes ({args.accumulate}); "
        f"{updates_per_epoch} updates per epoch, {updates_per_epoch * args.epochs} in all, {args.num_warmup_steps} of warm-up")
    if os.path.exists(args.model + ".state") and not args.resume:
        say(f"note: {args.model} is of an earlier run; this one replaces it (--resume would go on with it)")
    if args.num_warmup_steps >= updates_per_epoch * args.epochs:
        say(f"warning: --num_warmup_steps {args.num_warmup_steps} is not reached, the learning rate never gets to {args.lr:g}")


def set_up(args, world):
    """Everything read and built, from the start or from OUT.state: (Run, updates per epoch)."""
    train, dev = read_records(args.data_train, args.num_contexts), read_records(args.data_val, args.num_contexts)
    if not any(record["answers"] for record in dev):
        raise InputError(f"{args.data_val}: no record has 'answers', so no checkpoint can be chosen by it")
    if world.is_main:
        check_writable(args.model)
    state = load_state(args.model + ".state", args, world, FREE_FLAGS)
    tokenizer = load_tokenizer(args.t5_name, args.t5_name)
    check_targets(train, tokenizer, args.answer_maxlength, args.data_train)
    reader = FiDT5.from_pretrained(args.t5_name, dropout=args.dropout).to(world.device)
    reader.check_tokenizer(tokenizer)
    reader.config.passage_stride = args.max_length
    reader.set_checkpoint(args.use_checkpoint)
    reader.train()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    updates_per_epoch = math.ceil(len(train) / (args.batch_size * args.grad_accumulation * world.size))
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, args.num_warmup_steps, updates_per_epoch * args.epochs)
    progress = Progress()
    if state:
        progress = Progress(**state["progress"])
    model = reader
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        model = DistributedDataParallel(reader, devices, gradient_as_bucket_view=True)
    log = RunLog(args.model + ".jsonl", world.is_main, progress.rows, args.model + ".tensorboard" if args.tensorboard else None)
    run = Run(args, world, model, tokenizer, TrainSet(train, args.seed, not args.no_shuffle), dev,
              Collator(tokenizer, args.num_contexts, args.max_length), optimizer, scheduler, log, progress)
    if state:
        restore_state(state, args.model + ".state", world, reader, optimizer, scheduler)
    return run, updates_per_epoch


def main(args):
    check_args(args)
    world = start_processes(args.gpus)
    set_seed(args.seed, world.rank)
    run, updates_per_epoch = set_up(args, world)
    test_records = read_records(args.data_test, args.num_contexts) if args.data_test else None  # now, not after the training
    describe(run, updates_per_epoch)
    if run.progress.total_updates:
        run.log.say(f"resuming after {run.progress.total_updates} updates, in epoch {run.progress.epoch}")
    start = time.time()
    while run.progress.epoch < args.epochs:
        train_epoch(run)
    best = f"best dev EM {run.progress.best_em:.2f} ({run.progress.best_at})"
    run.log.say(f"done in {time.time() - start:.0f} s; {best} in {args.model}")
    if test_records:
        rows = predict(FiDT5.from_pretrained(args.model).to(world.device), test_records, run.tokenizer, world,
                       num_contexts=args.num_contexts, max_length=args.max_length, batch_size=args.batch_size_val,
                       num_workers=args.num_workers, bf16=args.bf16)
        em, f1, correct, count = summarize(rows)
        run.log.say(f"test EM {em:.2f} ({correct}/{count}), F1 {f1:.2f} with the best checkpoint on {args.data_test}")


if __name__ == "__main__":
    run_script(main, parse_args())
