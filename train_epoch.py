r"""Train a reader epoch by epoch, and keep the checkpoint with the best dev EM: Fusion-in-Decoder
(arXiv 2007.01282) from a T5, or RA-DIT's reader (arXiv 2310.01352) from a causal language model.

    python train_epoch.py OUT train.json dev.json --t5_name t5-base --num_contexts 100 --gpus 0
    torchrun --standalone --nproc_per_node=8 train_epoch.py OUT train.json dev.json \
        --data_test test.json --num_contexts 100 --batch_size 2 --grad_accumulation 4 \
        --use_checkpoint --lr 1e-4 --gpus 0,1,2,3,4,5,6,7

With a frozen retriever, the reader trains on the record's `passage` (the ground truth) followed by
retrieved passages, and is evaluated on retrieved passages alone:

    python train_epoch.py OUT train.jsonl dev.jsonl --data_test test.jsonl --retriever DIR \
        --corpus documents.jsonl --num_retrieved 3

Writes OUT (the best reader, a transformers folder), OUT.jsonl (a row per evaluation), OUT.state
(--resume continues from it, and ends with the weights of a run that never stopped) and, with
--retriever, OUT.retrieved (the retrieved passages).
"""
import math
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from data import (
    TrainSet,
    check_targets,
    list_targets,
    note_long_passages,
    plan_epoch,
)
from layers.regions import compile_on_gpu
from reader.frozen import note_reach, put_gold_first, retrieve_once, retrieved_path
from reader.open import (
    add_causal_flags,
    open_reader,
    open_reader_tokenizer,
    open_with_tokenizer,
)
from reader.predict import (
    ANSWER_MAXLENGTH,
    check_answers,
    note_too_long,
    note_unspelled,
    predict,
    summarize,
)
from records.hashes import model_files
from records.reader_records import (
    count_unscored,
    note_files,
    note_unscored,
    read_facts,
    read_records,
)
from training.adapters import add_lora_flags, read_lora_flags
from training.checkpoints import find_model
from training.cost import log_cost
from training.loop import (
    BOTH_SETS,
    Progress,
    Run,
    RunLog,
    check_rates,
    epoch_bar,
    freeze,
    log_start,
    log_update,
    make_optimizer,
    measure_updates,
    open_epoch,
    scale_gradients,
    set_seed,
    step_optimizer,
    wrap_model,
)
from training.output_folder import claim_folder, save_checkpoint, versions
from training.resume import (
    forget_replaced_state,
    hash_inputs,
    load_state,
    restore_state,
    save_state,
)
from utils import (
    GPUS,
    LONG_PATIENCE,
    NO_COMPILE,
    OVERWRITE,
    PATIENCE,
    RESUME,
    TQDM,
    InputError,
    Parser,
    add_over_processes,
    check_at_least,
    check_positive,
    check_seed,
    copy_to_device,
    run_script,
    start_processes,
)

# flags that may differ between a run and its resumption, because they do not change the weights
FREE_FLAGS = {"resume", "overwrite", "num_workers", "save_every", "logging_steps", "gpus",
              "no_compile", "data_test", "batch_size_val", "tensorboard", "tqdm", "index", "plan"}
# {argument: the flag that may replace it}
PATH_FLAGS = {"model": "output_dir", "data_train": "train_file", "data_val": "eval_file"}
NUM_CONTEXTS, NUM_RETRIEVED = 5, 3  # defaults of the flags

# federate.py trains with this script, too. It uses FREE_FLAGS, parse_args, check_args, list_inputs,
# set_up, plan_run, train_update, count_warmup, evaluate, keep_measures and save_best.
# train_dense.py has the same names.


class Paths(NamedTuple):
    """Hold the paths of a run."""
    out: str     # folder of the best reader
    train: str   # records; None if the flags do not name them
    dev: str
    test: str


@dataclass
class ReaderRun(Run):
    """Hold a Run of a reader. Its model is a FiDT5 or a CausalReader."""
    paths: Paths
    num_contexts: int    # contexts per question
    answer_limit: int    # most tokens to generate for an answer in evaluation


# ---------------------------------------------------------------- training

def train_update(run, batches, micro_batches):
    """Take an optimizer step over micro-batches. Return (summed loss, its weight, questions), each
    over all processes.

    With --accumulate mean, the loss is summed over all target tokens of the update, on all
    processes, and divided by their number. With sum, the mean losses of micro-batches are added up,
    as in FiD and minFiD. In both cases DDP averages over processes. If the loss or the gradient is
    not finite, leaves the weights unchanged and raises InputError naming the records.
    """
    args, world, device = run.args, run.world, run.world.device
    by_token = args.accumulate == "mean"
    losses, weight, questions, indices = [], 0, 0, []
    for i in range(micro_batches):
        batch = next(batches)
        inputs = copy_to_device(batch["inputs"], device)
        labels = batch["labels"]
        is_real = labels is not None  # a dummy batch only takes part in DDP's all-reduce
        if not is_real:
            labels = torch.full((len(batch["indices"]), 1), -100)

        # forward and backward pass; gradients add up in the weights' .grad
        with run.sync_gradients(is_last=i == micro_batches - 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss, _ = run.model(**inputs, labels=copy_to_device(labels, device),
                                    reduction="sum" if by_token else "mean")
            loss.backward()

        losses.append(loss.detach())
        indices.append(batch["indices"])
        if is_real:
            weight += int(labels.ne(-100).sum()) if by_token else 1
            questions += len(batch["indices"])

    losses = torch.stack(losses).double()
    counts = copy_to_device(torch.tensor([weight, questions], dtype=torch.float64), device)
    totals = add_over_processes(torch.cat([losses.sum()[None], counts]), world)

    # DDP has averaged the summed losses over processes; make it the mean over target tokens
    if by_token:
        scale_gradients(run.model, world.size / totals[1])
    return step_optimizer(run, totals, losses, indices)


def plan_run(run, epoch):
    """Return this process's part of an epoch: [update][micro-batch][(index, is_real)]."""
    args, world = run.args, run.world
    return plan_epoch(len(run.train_set.records), epoch, args.seed, not args.no_shuffle,
                      args.batch_size, args.grad_accumulation, world.rank, world.size)


def train_epoch(run):
    """Train on the rest of the current epoch, with the evaluations and saves that are due in it."""
    args, progress = run.args, run.progress
    plan = plan_run(run, progress.epoch)  # a pure function: all processes get parts of one plan
    remaining, batches = open_epoch(run, plan)
    bar = epoch_bar(run, args.logging_steps)
    for update in remaining:
        start = time.time()
        loss_sum, weight, questions = train_update(run, batches, len(update))
        seconds = time.time() - start
        progress.count_update(loss_sum, weight, questions, seconds)
        log_update(run, bar, seconds)

        # the state is saved after each evaluation, and every --save_every updates
        is_end = progress.update == len(plan)
        eval_is_due = args.eval_every and progress.total_updates % args.eval_every == 0
        save_is_due = args.save_every and progress.total_updates % args.save_every == 0
        if is_end or eval_is_due:
            report_evaluation(run, evaluate(run))
        if is_end:
            progress.start_epoch()
        if is_end or eval_is_due or save_is_due:
            save_state(run)
    bar.close()


# ---------------------------------------------------------------- evaluation

def evaluate(run):
    """Return {dev_em, dev_f1, correct, count, cut, eval_seconds} of the reader as it is now; cut is
    the number of answers that reached the token limit. The reader returns to training mode.
    """
    start = time.time()
    summary = answer_records(run, run.unwrapped, run.dev)
    run.model.train()
    return {"dev_em": summary.em, "dev_f1": summary.f1, "correct": summary.correct,
            "count": summary.count, "cut": summary.cut, "eval_seconds": time.time() - start}


def answer_records(run, reader, records):
    """Return the Summary of a reader's answers to records, with the run's lengths and contexts."""
    args = run.args
    predictions = predict(reader, records, run.tokenizer, run.world, num_contexts=run.num_contexts,
                          max_length=args.max_length, batch_size=args.batch_size_val,
                          num_workers=args.num_workers, bf16=args.bf16,
                          answer_maxlength=run.answer_limit)
    return summarize(predictions)


def report_evaluation(run, measures):
    """Log a line and a row about the updates since the last report, and save the reader if its dev
    EM is the best so far.
    """
    progress = run.progress
    summary = progress.summary()
    is_best = keep_measures(run, measures)
    lr = run.scheduler.get_last_lr()[0]
    cut = f" | {measures['cut']} answers cut" if measures["cut"] else ""
    line = (f"epoch {progress.epoch:3d} | update {progress.total_updates:6d} | loss "
            f"{summary['loss']:.4f} | dev EM {measures['dev_em']:6.2f} "
            f"({measures['correct']}/{measures['count']}) | lr {lr:.2e} | "
            f"{summary['examples_per_second']:.1f} questions/s | {summary['seconds']:.0f} s + "
            f"{measures['eval_seconds']:.0f} s{cut}")
    run.world.log(line + " | best" if is_best else line)
    row = {"epoch": progress.epoch, "update": progress.total_updates, "lr": lr, **summary,
           **measures, "best": is_best}
    run.log.row(row, progress.total_updates)
    progress.rows += 1
    progress.start_report()
    if is_best:
        save_best(run)


def keep_measures(run, measures):
    """Keep the measures if they are the best so far, by EM and then by F1; return whether they are.
    """
    return run.progress.keep_best((measures["dev_em"], measures["dev_f1"]),
                                  f"epoch {run.progress.epoch}, update "
                                  f"{run.progress.total_updates}")


def save_best(run):
    """Write OUT: the reader as a transformers folder with its tokenizer and args.json."""
    args, progress = run.args, run.progress
    if not run.world.is_main:
        return
    dev_em, dev_f1 = progress.best or (None, None)  # a federation may have no dev set
    info = {"dev_em": dev_em, "dev_f1": dev_f1, "epoch": progress.epoch,
            "update": progress.total_updates, "num_contexts": run.num_contexts,
            "max_length": args.max_length, "answer_maxlength": args.answer_maxlength,
            "eval_answer_maxlength": run.answer_limit,
            **run.unwrapped.describe(), "args": run.flags, "versions": versions()}
    save_checkpoint(run.out, info, run.unwrapped.save_pretrained, run.tokenizer.save_pretrained)


def check_dev_answers(run):
    """Return the AnswerCheck of the dev questions."""
    room = run.unwrapped.count_answer_tokens(run.answer_limit)
    return check_answers((facts["answers"] for facts in read_facts(run.dev)), run.collator, room)


def note_unreachable(run):
    """Log the targets that the tokenizer cannot spell, and the dev answers that it cannot spell or
    that are longer than the token limit.
    """
    log = run.world.log
    room = run.unwrapped.count_answer_tokens(run.answer_limit)
    targets = ([target] for facts in read_facts(run.train_set.records)
               for target in list_targets(facts))
    note_unspelled(check_answers(targets, run.collator, room), f"targets of {run.paths.train}", log)
    check, what = check_dev_answers(run), f"questions of {run.paths.dev}"
    note_unspelled(check, what, log)
    note_too_long(check, what, run.answer_limit, room, "eval_answer_maxlength", log)


def explain_zero(run):
    """Return the likely reason for a dev EM of 0, and what to do about it."""
    check = check_dev_answers(run)
    if check.unspelled == check.checked:
        return ("the tokenizer cannot spell any of their answers (see the first lines); choose "
                "another --t5_name")
    if check.too_long == check.checked:
        return (f"all of their answers are longer than --eval_answer_maxlength {run.answer_limit} "
                "allows; raise it")
    return "train longer or with a higher --lr, and look at what test.py --pred writes"


# ---------------------------------------------------------------- setting up

def set_up(args, world, sets=BOTH_SETS):
    """Return the ReaderRun of these flags with everything read and built, from the start or from
    OUT.state.

    sets: which of "train" and "dev" to read. Raises InputError.
    """
    paths, num_contexts = find_paths(args, sets), count_contexts(args)
    answer_limit = args.eval_answer_maxlength or ANSWER_MAXLENGTH
    flags = settle_reader_flags(args, paths)

    # data; the state comes first, so that --resume with other flags fails before retrieval
    inputs = hash_inputs(list_inputs(args), world)
    state = load_state(paths.out, flags, world, FREE_FLAGS, inputs) if args.resume else None
    if args.retriever:
        retrieve_once(paths.out, given_records(paths), args.retriever, args.corpus,
                      count_retrieved(args), world, index=args.index, num_workers=args.num_workers,
                      resumes=args.resume)
    train, dev = [], []
    if "train" in sets:
        train = read_records(locate_records(paths, "train", args.retriever), num_contexts)
    if "dev" in sets:
        dev = read_records(locate_records(paths, "dev", args.retriever), num_contexts)
    if args.retriever:
        put_gold_first(paths.out, train, num_contexts, paths.train, world.log)
    if "dev" in sets and count_unscored(dev) == len(dev):
        raise InputError(f"{paths.dev}: no record has 'answers', so they cannot choose a "
                         "checkpoint; give records with answers")
    note_unscored(dev, paths.dev, world.log)

    # model
    reader, tokenizer = open_with_tokenizer(args.t5_name, world.log, args.tokenizer,
                                            dropout=args.dropout, prompt_flags=vars(args),
                                            trains=True)
    check_targets(train, tokenizer, args.answer_maxlength, paths.train)
    reader.set_lengths(args.max_length, answer_limit)
    reader.check_records(train, num_contexts, paths.train, trains=True)
    reader.check_records(dev, num_contexts, paths.dev)
    reader.set_checkpoint(args.use_checkpoint)
    if args.lora:
        reader.add_adapters(read_lora_flags(vars(args)), world.device, args.bf16,
                            base=args.t5_name if args.save_adapters else None)
    if args.freeze:
        freeze(reader, args.freeze)
    reader.to(world.device).train()
    compile_on_gpu(not args.no_compile)

    # optimizer and schedule
    update_size = args.batch_size * args.grad_accumulation * world.size
    last_update = math.ceil(len(train) / update_size) * args.epochs
    optimizer, scheduler = make_optimizer(reader, args.lr, args.weight_decay, 1e-8,
                                          count_warmup(args, last_update), last_update)

    # the run, from its start or from the state
    progress = Progress(**state["progress"]) if state else Progress()
    tensorboard = f"{paths.out}.tensorboard" if args.tensorboard and not args.plan else None
    log = RunLog(f"{paths.out}.jsonl", world.is_main, progress.rows, tensorboard)
    run = ReaderRun(args=args, flags=flags, world=world, out=paths.out, paths=paths,
                    model=wrap_model(reader, world), tokenizer=tokenizer,
                    train_set=TrainSet(train, args.seed, not args.no_shuffle, paths.train),
                    dataset_sizes=[len(train)], dev=dev,
                    collator=reader.make_collator(tokenizer, num_contexts, args.max_length),
                    num_contexts=num_contexts, answer_limit=answer_limit, optimizer=optimizer,
                    scheduler=scheduler, last_update=last_update, log=log, progress=progress,
                    inputs=inputs)
    if state:
        restore_state(run, state)
    note_unreachable(run)
    return run


def find_paths(args, sets=BOTH_SETS):
    """Return the Paths, from the three arguments or from their flags.

    sets: see set_up. Raises InputError if both are given, or if a needed one is missing.
    """
    given = [name for name in PATH_FLAGS if getattr(args, name) is not None]
    by_flag = {name: getattr(args, flag) for name, flag in PATH_FLAGS.items()}
    if given and any(path is not None for path in by_flag.values()):
        raise InputError("OUT, the training and the dev records are given both as arguments and as "
                         "--output_dir, --train_file and --eval_file; use one of the two forms")
    paths = {name: getattr(args, name) for name in PATH_FLAGS} if given else by_flag
    needed = {"model": True, "data_train": "train" in sets, "data_val": "dev" in sets}
    missing = [f"{name} (--{flag})" for name, flag in PATH_FLAGS.items()
               if needed[name] and paths[name] is None]
    if missing:
        raise InputError(f"missing: {', '.join(missing)}; give OUT train.json dev.json, or all "
                         "three as flags")
    return Paths(paths["model"].rstrip("/"), paths["data_train"], paths["data_val"], args.data_test)


def given_records(paths):
    """Return {train, dev or test: file of records} for the files that the flags name."""
    files = {"train": paths.train, "dev": paths.dev, "test": paths.test}
    return {name: path for name, path in files.items() if path}


def locate_records(paths, name, retriever):
    """Return the file of the records `name` (train, dev or test): the given one or, with a frozen
    retriever, the one that retrieve_once made from it.
    """
    return retrieved_path(paths.out, name) if retriever else given_records(paths)[name]


def list_inputs(args):
    """Return {path: whether to hash the whole file} for the files that the weights depend on,
    except the checkpoint, whose weights are in OUT.state.
    """
    paths = find_paths(args, sets=())
    files = {path: True for name, path in given_records(paths).items() if name != "test"}
    if args.retriever:
        files[args.corpus] = False
        files |= {path: False for path in model_files(args.retriever)}
    return files


def count_retrieved(args):
    """Return how many passages to retrieve for a question, None without a frozen retriever."""
    return (args.num_retrieved or NUM_RETRIEVED) if args.retriever else None


def count_contexts(args):
    """Return how many contexts the reader gets: with a frozen retriever, the retrieved ones and the
    ground truth.
    """
    if args.num_contexts is not None:
        return args.num_contexts
    return count_retrieved(args) + 1 if args.retriever else NUM_CONTEXTS


def settle_reader_flags(args, paths):
    """Return {name: value} of the flags with derived values filled in, for args.json and OUT.state.
    """
    flags = {name: value for name, value in vars(args).items() if name not in PATH_FLAGS.values()}
    return flags | {"model": paths.out, "data_train": paths.train, "data_val": paths.dev,
                    "num_contexts": count_contexts(args), "num_retrieved": count_retrieved(args)}


def count_warmup(args, last_update):
    """Return the updates of warm-up in a run of `last_update` updates; --warmup_ratio replaces
    --num_warmup_steps.
    """
    if args.warmup_ratio is None:
        return args.num_warmup_steps
    return math.ceil(last_update * args.warmup_ratio)


def describe_reader_run(run):
    """Log the lines that a run starts with."""
    args = run.args
    data = (f"{len(run.train_set.records)} training and {len(run.dev)} dev questions, "
            f"{run.num_contexts} contexts of at most {args.max_length} tokens")
    updates = f"{run.last_update // args.epochs} updates per epoch, {run.last_update} in all"
    log_start(run, data, "questions", args.accumulate, updates, count_warmup(args, run.last_update))
    note_long_passages(run.train_set.records, run.collator, run.world.log)
    if args.retriever:
        note_reach(run.dev, run.paths.dev, run.world.log)


def estimate_reader_cost(run):
    """Log what the run will cost, from a few updates and the answers to a few dev questions."""
    args = run.args
    seconds = measure_updates(run, plan_run(run, run.progress.epoch), train_update)
    sample = run.dev[:2 * args.batch_size_val * run.world.size]
    start = time.time()
    answer_records(run, run.unwrapped, sample)
    eval_seconds = (time.time() - start) * len(run.dev) / len(sample)
    updates_per_epoch = run.last_update // args.epochs
    every = args.eval_every or updates_per_epoch
    evaluations = sum(update % updates_per_epoch == 0 or update % every == 0
                      for update in range(run.progress.total_updates + 1, run.last_update + 1))
    log_cost(run, seconds, evaluations, eval_seconds)


# ---------------------------------------------------------------- flags

def parse_args(arguments=None):
    """Return the flags as a Namespace, from the command line or from a list of arguments."""
    # no abbreviations: argparse would read --model as --model_name_or_path
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?",
        help="folder to write the best reader to; OUT.jsonl and OUT.state are written next to it")
    add("data_train", nargs="?", help="training records: .json or .jsonl, may end in .gz")
    add("data_val", nargs="?", help="dev records, which choose the best checkpoint")
    add = parser.add_argument_group("data").add_argument
    for name, flag in PATH_FLAGS.items():
        add(f"--{flag}", metavar="PATH",
            help=f"same as the argument {name}; give all three paths as flags or none")
    add("--data_test", "--test_file", metavar="FILE",
        help="records to evaluate the best checkpoint on at the end")
    add("--num_contexts", type=int,
        help=f"contexts per question; default: {NUM_CONTEXTS}, or --num_retrieved + 1 with "
        "--retriever")
    add("--max_length", type=int, default=250,
        help="tokens per question and passage, truncated on the right")
    add("--answer_maxlength", type=int, default=-1,
        help="stop with an error if a training target has more tokens; -1 allows any length")
    add("--eval_answer_maxlength", type=int, metavar="N",
        help="most tokens to generate for an answer in evaluation, and in test.py and ask.py "
        f"unless they are given another limit; default: {ANSWER_MAXLENGTH}")
    add("--num_workers", type=int, default=0,
        help="processes that tokenise, for each GPU; 2 or 3 keep up with a fast one")
    add("--no_shuffle", action="store_true",
        help="keep the file's order and each record's first answer")
    add = parser.add_argument_group("frozen retriever").add_argument
    add("--retriever", "--embedding_model", metavar="DIR",
        help="retrieve the passages with this retriever (folder, hub name, or bm25) once, and keep "
        "them in OUT.retrieved")
    add("--corpus", "--full_dataset_file_path", metavar="FILE",
        help="the retriever's documents: a .tsv or .csv with a header, or JSON lines, may end in "
        ".gz")
    add("--index", "--full_dataset_index_path", metavar="DIR",
        help="folder of the corpus's vectors, created or reused; default: next to the corpus")
    add("--num_retrieved", "--embedding_max_num_to_retrieve", type=int, metavar="N",
        help=f"passages to retrieve for a question; default: {NUM_RETRIEVED}")
    add = parser.add_argument_group("model").add_argument
    add("--t5_name", "--model_name_or_path", default="t5-base",
        help="checkpoint to start from, a T5 or a causal language model: hub name or folder")
    add("--tokenizer", metavar="NAME",
        help="model (folder or hub name) whose tokenizer to use; default: that of --t5_name or, "
        "for a released FiD reader or minFiD's file, of the model that it was trained from")
    add("--dropout", type=float, default=0.1, help="dropout rate")
    add("--use_checkpoint", action="store_true",
        help="recompute the encoder's activations in the backward pass to save memory")
    add("--bf16", action="store_true", help="bfloat16 autocast; weights and optimizer stay float32")
    add_lora_flags(add)
    add("--save_adapters", action="store_true",
        help="save only the adapters of --lora, in peft's format with the name of their base "
        "model; default: save the whole model with the adapters merged")
    add("--freeze", metavar="REGEX",
        help="do not train weights whose names match this regular expression")
    add_causal_flags(parser)
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", "--per_device_train_batch_size", type=int, default=1,
        help="questions per process and micro-batch")
    add("--batch_size_val", "--per_device_eval_batch_size", type=int, default=2,
        help="questions per process in evaluation")
    add("--grad_accumulation", type=int, default=1, help="micro-batches per update")
    add("--accumulate", choices=["mean", "sum"], default="mean",
        help="mean: an update has the gradient of one large batch; sum: add up the mean gradients "
        "of its micro-batches, which is the scale of FiD and minFiD")
    add("--epochs", type=int, default=20, help="passes over the training records")
    add("--lr", type=float, default=1e-5, help="peak learning rate of the linear schedule")
    add("--num_warmup_steps", type=int, default=1000, help="updates of linear warm-up")
    add("--warmup_ratio", type=float,
        help="fraction of the updates used for warm-up; replaces --num_warmup_steps")
    add("--weight_decay", type=float, default=0.01, help="AdamW's weight decay, on all weights")
    add("--clip", type=float, default=1.0, help="maximum gradient norm")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=42,
        help="seed of the order and the choice of answers; seed + rank is the seed of dropout")
    add("--eval_every", type=int, default=0,
        help="also evaluate every N updates; 0: only at the end of epochs")
    add("--save_every", type=int, default=0,
        help="also save OUT.state every N updates; 0: only after evaluations")
    add("--resume", **RESUME)
    add("--overwrite", **OVERWRITE)
    add("--logging_steps", type=int, metavar="N",
        help="print progress every N updates if the output is not a terminal; default: about "
        "every minute")
    add("--tensorboard", action="store_true",
        help="write to OUT.tensorboard as well (needs the package)")
    add("--plan", action="store_true",
        help="estimate the cost of the run (hours, memory, disk) from a few updates, and stop; "
        "nothing is written except, with --retriever, OUT.retrieved and the index")
    add("--tqdm", **TQDM)
    add("--no_compile", **NO_COMPILE)
    add("--gpus", **GPUS)
    return parser.parse_intermixed_args(arguments)


def check_args(args, sets=BOTH_SETS):
    """Raise InputError for wrong flags, before anything is read.

    sets: see set_up.
    """
    find_paths(args, sets)
    check_at_least(args, {"num_retrieved": 1, "num_contexts": 1, "max_length": 1, "batch_size": 1,
                          "batch_size_val": 1, "grad_accumulation": 1, "epochs": 1,
                          "num_workers": 0, "num_warmup_steps": 0, "eval_every": 0,
                          "save_every": 0, "logging_steps": 1, "weight_decay": 0,
                          "eval_answer_maxlength": 2})
    check_positive(args, ["lr", "clip"])
    check_seed(args)
    check_rates(args.dropout, args.warmup_ratio)
    read_lora_flags(vars(args))
    check_retriever(args)


def check_retriever(args):
    """Raise InputError for flags of the frozen retriever that do not fit together."""
    others = [name for name in ("corpus", "index", "num_retrieved") if getattr(args, name)]
    if not args.retriever:
        if others:
            raise InputError(f"--{others[0]} is for a frozen retriever; give --retriever, too")
        return
    if not args.corpus:
        raise InputError("--retriever needs --corpus, the documents that it searches")
    contexts = count_retrieved(args) + 1
    if count_contexts(args) != contexts:
        raise InputError(f"--num_contexts must be {contexts} with --num_retrieved {contexts - 1}, "
                         "because the ground truth is one more context, got "
                         f"{args.num_contexts}; leave --num_contexts out")
    if not Path(args.corpus).exists():
        raise InputError(f"--corpus {args.corpus}: no such file; check the path")
    if args.retriever != "bm25":
        find_model(args.retriever)
    # checked now, because retrieval before it may take hours
    open_reader_tokenizer(args.t5_name, args.tokenizer)


def main(args):
    """Train a reader with these flags, and evaluate the best checkpoint on --data_test."""
    check_args(args)
    paths, num_contexts = find_paths(args), count_contexts(args)
    world = start_processes(args.gpus, LONG_PATIENCE if args.retriever else PATIENCE)
    set_seed(args.seed, world.rank)
    claim = claim_folder(paths.out, args.resume, args.overwrite, world)
    with nullcontext() if args.plan else claim:
        run = set_up(args, world)
        test = None
        if paths.test:  # read before training, so that errors in it show now
            test = read_records(locate_records(paths, "test", args.retriever), num_contexts)
            run.unwrapped.check_records(test, num_contexts, paths.test)
            note_unscored(test, paths.test, world.log)
        describe_reader_run(run)
        note_files([(paths.train, run.train_set.records), (paths.dev, run.dev), (paths.test, test)],
                   num_contexts, world.log)
        if args.plan:
            estimate_reader_cost(run)
            return
        forget_replaced_state(run.out, args.overwrite, world)
        start = time.time()
        while run.progress.total_updates < run.last_update:
            train_epoch(run)
    dev_em, _ = run.progress.best
    world.log(f"done in {time.time() - start:.0f} s; best dev EM {dev_em:.2f} "
              f"({run.progress.best_at}) in {run.out}")
    if dev_em == 0:
        world.log("warning: no dev question was answered right; the checkpoint was chosen by F1 or "
                  f"is the last one: {explain_zero(run)}")
    if test and count_unscored(test) < len(test):
        best_reader = open_reader(run.out, trained=True).to(world.device)
        best_reader.check_tokenizer(run.tokenizer)
        summary = answer_records(run, best_reader, test)
        world.log(f"test EM {summary.em:.2f} ({summary.correct}/{summary.count}), F1 "
                  f"{summary.f1:.2f} with the best checkpoint on {paths.test}")


if __name__ == "__main__":
    run_script(main, parse_args())
