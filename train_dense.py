"""Trains a dense retriever (or a ranker) from LLM-Embedder's, DPR's or qrels files, and measures it on the way.

    python train_dense.py --output_dir OUT --train_data train.json --query_encoder BAAI/bge-base-en --max_steps 2000
    torchrun --standalone --nproc_per_node=8 train_dense.py --output_dir OUT --corpus corpus.jsonl --queries queries.jsonl \
        --positives qrels=train.tsv,min_score=1 --negatives qrels=mined.tsv --group_size 8 --eval_qrels qrels=dev.tsv

Losses: InfoNCE over the keys of all processes (DPR, arXiv 2004.04906), distillation from teacher scores (LLM-Embedder, arXiv
2310.07554), graded labels. Written: OUT (a sentence-transformers folder), OUT.jsonl (a row per report), OUT.state (for --resume).
"""
import argparse
import math
import os
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field

import torch
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import losses
from checkpoints import load_state, load_tokenizer, restore_state, save_state, versions
from corpus import Corpus, open_corpus, read_queries
from data import train_loader
from dense_args import check_args, parse_args
from dense_data import INSTRUCTIONS, GroupCollator, GroupSet, plan_batches, read_training
from dense_eval import DevSet, annotated_set, evaluate, read_dev_set
from qrels import merge_qrels
from retriever import BiEncoder, CrossEncoder, gather_rows, limit_lengths
from utils import (InputError, RunLog, check_writable, gather_lists, run_script, save_folder, set_seed,
                   start_processes, write_json)

# flags that may differ between a run and its resumption: they do not change the weights
FREE_FLAGS = {"resume", "num_workers", "gpus", "tqdm", "logging_steps", "early_exit_steps", "stop_at"}


@dataclass
class Progress:
    """Where a run stands; everything in it is in the resume state."""
    epoch: int = 0
    update: int = 0            # updates done in this epoch
    total_updates: int = 0
    best: float = -math.inf    # of the chosen measure, negated where lower is better
    best_at: str = ""
    rows: int = 0              # rows of the log written
    losses: list = field(default_factory=list)  # of the updates since the last report
    queries: float = 0.0
    seconds: float = 0.0


@dataclass
class Run:
    """What the functions below share."""
    args: argparse.Namespace
    world: object
    model: torch.nn.Module     # BiEncoder or CrossEncoder, inside DistributedDataParallel if there are several processes
    tokenizer: object
    train_set: GroupSet
    sizes: list                # examples per dataset
    settings: dict             # of each task: the loss flags that hold for it
    dev: DevSet
    corpus: Corpus
    collator: GroupCollator
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    log: RunLog
    progress: Progress

    @property
    def retriever(self):
        return self.model.module if isinstance(self.model, DistributedDataParallel) else self.model


# ---------------------------------------------------------------------------------------------------- one update

def compute_loss(run, batch):
    """(loss of the queries of all processes, their number); every process computes it of all rows, see GatherRows.

    InfoNCE sees all keys, distillation each query's own group and only the queries that have teacher scores. As in LLM-Embedder
    a loss that stands alone is not weighted.
    """
    args, retriever, size = run.settings[batch["task"]], run.retriever, len(batch["places"]) if batch["counted"] else 0
    teacher = gather_rows(batch["teacher"][:size].to(run.world.device))
    count, group = teacher.shape
    columns = torch.arange(count * group, device=teacher.device).view(count, group)
    if args.ranker:
        own = gather_rows(run.model(batch["pairs"], args.chunk_size).view(-1, group)[:size])
        scores, positives, nothing = own, torch.zeros_like(columns[:, 0]), own.sum() * 0
        columns = torch.arange(group, device=teacher.device).expand(count, -1)
    else:
        queries, keys = run.model(batch["queries"], batch["keys"], args.chunk_size)
        nothing = (queries.sum() + keys.sum()) * 0  # a process whose queries do not count takes part in the exchange
        scores = retriever.score(gather_rows(queries[:size]), gather_rows(keys[:size * group]))
        positives, own = columns[:, 0], scores.gather(1, columns)
    taught = ~teacher.isnan().any(1) & bool(args.distill_weight or args.loss)
    parts = []
    if args.loss == "infonce" or not args.loss and args.contrastive_weight:
        masked = None
        if args.mask_duplicates and not args.ranker:
            masked = losses.duplicates(gather_rows(batch["identities"][:size * group].to(teacher.device)), positives)
        parts.append((args.contrastive_weight, losses.contrastive(scores, positives, masked)))
    if args.loss != "infonce" and taught.any():
        if args.loss == "fid-kd":
            loss = losses.fid_kd(own[taught], teacher[taught])
        elif args.stable_distill:
            loss = losses.stable_distillation(scores[taught], columns[taught], teacher[taught], args.teacher_temperature)
        else:
            loss = losses.distillation(own[taught], teacher[taught], args.teacher_temperature, args.student_temperature)
        parts.append((args.distill_weight, loss))
    loss = sum(weight * part for weight, part in parts) if len(parts) > 1 else parts[0][1] if parts else 0.0
    return loss + nothing, count


def train_update(run, batches, count):
    """One optimizer step over `count` micro-batches: (mean loss, queries). Raises InputError if loss or gradient is not finite."""
    args, world = run.args, run.world
    values, queries, places = [], 0, []
    for i in range(count):
        batch = next(batches)
        with nullcontext() if i == count - 1 or world.size == 1 else run.model.no_sync():
            with torch.autocast(world.device.type, torch.bfloat16, enabled=args.bf16):
                loss, seen = compute_loss(run, batch)
            (loss / count).backward()
        values.append(loss.detach())
        queries += seen
        places += batch["places"]
    value = torch.stack(values).mean().item()
    parameters = [p for p in run.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
    if not (math.isfinite(value) and math.isfinite(norm)):
        named = [run.train_set.examples[place].place for place in gather_lists(places, world)]
        raise InputError(f"the {'gradient' if math.isfinite(value) else 'loss'} is not finite in update "
                         f"{run.progress.total_updates + 1}, of {', '.join(named[:4])}{' ...' if len(named) > 4 else ''}; look at "
                         f"them, or lower --lr; the best checkpoint so far is left in {args.output_dir}")
    run.optimizer.step()
    run.scheduler.step()
    run.optimizer.zero_grad()
    return value, queries


def train_epoch(run, last_update):
    """The rest of the current epoch, with the reports, evaluations and saves that fall into it."""
    args, world, progress = run.args, run.world, run.progress
    plan = plan_epoch(run, progress.epoch)
    run.train_set.epoch = progress.epoch
    batches = iter(train_loader(run.train_set, plan[progress.update:], run.collator, args.num_workers))
    hidden = not world.is_main or (None if not args.tqdm else False)
    bar = tqdm(plan, desc=f"epoch {progress.epoch}", initial=progress.update, leave=False, disable=hidden)
    for update in plan[progress.update:]:
        start = time.time()
        value, queries = train_update(run, batches, len(update))
        progress.seconds += time.time() - start
        progress.losses.append(value)
        progress.queries += queries
        progress.update += 1
        progress.total_updates += 1
        bar.update()
        bar.set_postfix(loss=f"{value:.3f}")
        done, ends = progress.total_updates, progress.total_updates >= last_update
        if progress.update == len(plan):
            progress.epoch, progress.update = progress.epoch + 1, 0
        measures = run.dev is not None and (ends or done % (args.eval_steps or args.save_steps) == 0)
        if measures or done % args.logging_steps == 0 or ends:
            report(run, measures)
        if measures or done % args.save_steps == 0 or ends:
            if run.dev is None and world.is_main:
                save_best(run)
            save_state(args.output_dir + ".state", world, run.retriever, run.optimizer, run.scheduler, asdict(progress), args)
        if ends or progress.update == 0:
            break
    bar.close()


def plan_epoch(run, epoch):
    return plan_batches(run.sizes, epoch, run.args.seed, not run.args.no_shuffle, run.args.batch_size, run.args.grad_accumulation,
                        run.args.inbatch_same_dataset, run.world.rank, run.world.size)


def report(run, measures):
    """A line and a log row of the updates since the last one; with a dev set its measures, and the checkpoint if it is the best."""
    args, progress, start = run.args, run.progress, time.time()
    loss = sum(progress.losses) / max(1, len(progress.losses))
    row = {"update": progress.total_updates, "epoch": progress.epoch, "loss": loss, "lr": run.scheduler.get_last_lr()[0],
           "queries_per_second": progress.queries / max(progress.seconds, 1e-9),
           "loss_curve": [round(value, 5) for value in progress.losses]}
    line = f"update {row['update']:6d} | loss {loss:.4f} | lr {row['lr']:.2e} | {row['queries_per_second']:.1f} queries/s"
    best = False
    if measures:
        values = evaluate(run.retriever, run.dev, run.collator, run.corpus, args.metrics, args.cutoffs, run.world)
        run.model.train()
        name = best_metric(args, run.dev)
        value = -values[name] if name == "rank" else values[name]
        best = value > progress.best
        line += " | " + " ".join(f"{key} {values[key]:.4f}" for key in values) + f" | {time.time() - start:.0f} s"
        line += " | best" * best
        row |= values
        if best:
            progress.best, progress.best_at = value, f"{name} {values[name]:.4f} at update {progress.total_updates}"
    run.log.say(line)
    run.log.row(row, progress.total_updates)
    progress.rows, progress.losses, progress.queries, progress.seconds = progress.rows + 1, [], 0.0, 0.0
    if best and run.world.is_main:
        save_best(run)


def best_metric(args, dev):
    """The measure that chooses the checkpoint; InputError if it is not measured."""
    names = ["rank"] if dev.method == "rank" else [f"{name}@{k}" for name in args.metrics for k in args.cutoffs]
    cutoff = next((k for k in args.cutoffs if k >= 10), args.cutoffs[-1])
    name = args.best_metric or (names[0] if dev.method == "rank" else f"{args.metrics[0]}@{cutoff}")
    if name not in names:
        raise InputError(f"--best_metric {name} is not measured; one of {', '.join(names)} is")
    return name


def save_best(run):
    """The retriever as a sentence-transformers folder with its tokenizer and args.json."""
    args, model = run.args, run.retriever
    lengths = {"query_max_length": args.query_max_length, "key_max_length": args.key_max_length}
    info = {"best": run.progress.best_at, "update": run.progress.total_updates, **lengths,
            "retriever": {} if args.ranker else {"metric": model.metric, "temperature": model.temperature,
                                                 "separator": model.query_encoder.separator},
            "instructions": run.collator.instructions, "args": {**vars(args), "stop_at": None}, "versions": versions()}
    before = {run.collator.instruction(task) for task in run.settings}
    prompts = dict(zip(("query", "document"), *before)) if len(before) == 1 else {}
    save_folder(args.output_dir, lambda folder: merged(model, args).save_pretrained(folder, max(lengths.values()), prompts),
                *(lambda folder, role=role: run.tokenizer.save_pretrained(os.path.join(folder, role))
                  for role in getattr(model, "encoders", {"": None})),
                lambda folder: write_json(os.path.join(folder, "args.json"), info))
    one = "query" not in getattr(model, "encoders", ())
    for name in ("query", "key") if one else ("config.json", "modules.json", "model.safetensors"):  # of an earlier run's other kind
        path = os.path.join(args.output_dir, name)
        if os.path.isdir(path):
            shutil.rmtree(path)
        elif os.path.exists(path):
            os.remove(path)


def merged(model, args):
    """The model to save: with LoRA a copy whose adapters are merged into the weights."""
    if args.lora:
        from copy import deepcopy
        model = deepcopy(model)
        for encoder in [model] if args.ranker else model.encoders.values():
            encoder.model = encoder.model.merge_and_unload()
    return model


# ---------------------------------------------------------------------------------------------------- setting up

def open_model(args, tokenizer, device):
    """The retriever or ranker of the flags, with LoRA adapters if they are asked for."""
    if args.ranker:
        model = CrossEncoder.open(args.query_encoder, args.dropout)
    else:
        key_name = None if args.tie_encoders else args.key_encoder or args.query_encoder
        model = BiEncoder.open(args.query_encoder, key_name, pooling=args.pooling_method, metric=args.dense_metric,
                               dropout=args.dropout)
        if model.metric == "cos":
            model.temperature = args.cos_temperature
        for encoder in model.encoders.values():
            encoder.separator = tokenizer.sep_token_id if args.pair_types else encoder.separator
        args.pooling_method, args.dense_metric = model.query_encoder.pooling, model.metric
    if args.lora:
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError:
            raise InputError("--lora needs the package peft: pip install peft") from None
        for encoder in [model] if args.ranker else model.encoders.values():
            adapters = LoraConfig(r=args.lora, lora_alpha=2 * args.lora, target_modules="all-linear")
            encoder.model = get_peft_model(encoder.model, adapters)
    return model.to(device).train()


def read_dev(args, corpus, queries):
    """The DevSet of the flags, or None."""
    if args.eval_qrels:
        dev = annotated_set(merge_qrels(args.eval_qrels, args.seed), corpus, queries, args.eval_group_size
                            if args.eval_method == "annotated" else None)._replace(method=args.eval_method)
        if "nq" in args.metrics:
            raise InputError("--metrics nq needs --eval_data with answers; qrels have none")
    else:
        dev = read_dev_set(args.eval_data, corpus, args.metrics, args.key_template) if args.eval_data else None
    if dev:
        best_metric(args, dev)
    return dev


def set_up(args, world):
    """Everything read and built, from the start or from OUT.state: (Run, number of updates)."""
    say = (lambda text: print(text, flush=True)) if world.is_main else (lambda text: None)
    if world.is_main:
        check_writable(args.output_dir)
    corpus = open_corpus(args.corpus, args.key_template, world)
    queries = read_queries(args.queries)
    examples, settings, sizes, by_task = read_training(args, corpus, queries, say)
    dev = read_dev(args, corpus, queries)
    tokenizer = load_tokenizer(args.query_encoder, args.query_encoder)
    model = open_model(args, tokenizer, world.device)
    limit_lengths(args, [model] if args.ranker else model.encoders.values(), say)
    state = load_state(args.output_dir + ".state", args, world, FREE_FLAGS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.lr, weight_decay=args.weight_decay, eps=args.adam_eps, fused=True)
    progress = Progress(**state["progress"]) if state else Progress()
    log = RunLog(args.output_dir + ".jsonl", world.is_main, progress.rows)
    collator = GroupCollator(tokenizer, args, corpus, INSTRUCTIONS[args.version] if args.add_instruction else {})
    run = Run(args, world, model, tokenizer, GroupSet(examples, settings, args.seed), sizes, by_task, dev, corpus, collator,
              optimizer, None, log, progress)
    updates = args.max_steps or len(plan_epoch(run, 0)) * args.epochs
    warmup = math.ceil(updates * args.warmup_ratio) if args.num_warmup_steps is None else args.num_warmup_steps
    run.scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, updates)
    say(f"{world.size} process(es) on {world.device}; {', '.join(f'{k} {v}' for k, v in versions().items())}")
    kind = "ranker" if args.ranker else f"retriever, metric {args.dense_metric}, pooling {args.pooling_method}"
    say(f"{len(examples)} training examples of {len(sizes)} dataset(s), groups of {settings[0]['group_size']}; "
        f"{sum(p.numel() for p in trained):,} trained parameters; {kind}; batch {args.batch_size * world.size} x "
        f"{args.grad_accumulation}; {updates} updates, {warmup} of warm-up")
    if world.size > 1:
        devices = [world.device] if world.device.type == "cuda" else None
        run.model = DistributedDataParallel(model, devices, gradient_as_bucket_view=True)
    if state:
        restore_state(state, args.output_dir + ".state", world, model, optimizer, run.scheduler)
    return run, updates


def main(args):
    check_args(args)
    world = start_processes(args.gpus)
    set_seed(args.seed, world.rank)
    transformers.utils.logging.disable_progress_bar()
    run, updates = set_up(args, world)
    if run.progress.total_updates:
        run.log.say(f"resuming after {run.progress.total_updates} updates")
    start, last = time.time(), min(updates, args.stop_at)
    while run.progress.total_updates < last:
        train_epoch(run, last)
    best = f"; best {run.progress.best_at}" if run.progress.best_at else ""
    run.log.say(f"done in {time.time() - start:.0f} s{best}; in {args.output_dir}")


if __name__ == "__main__":
    run_script(main, parse_args(__doc__))
