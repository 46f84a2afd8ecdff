r"""Trains a reader epoch by epoch and keeps the checkpoint with the best dev EM: Fusion-in-Decoder
(arXiv 2007.01282) from a T5, RA-DIT's reader (arXiv 2310.01352) from a causal language model.

    python train_epoch.py OUT train.json dev.json --t5_name t5-base --num_contexts 100 --gpus 0
    torchrun --standalone --nproc_per_node=8 train_epoch.py OUT train.json dev.json \
        --data_test test.json --num_contexts 100 --batch_size 2 --grad_accumulation 4 \
        --use_checkpoint --lr 1e-4 --gpus 0,1,2,3,4,5,6,7

With a frozen retriever the record's `passage`, the ground truth, and then retrieved passages are
trained on, and retrieved ones alone are evaluated with:

    python train_epoch.py OUT train.jsonl dev.jsonl --data_test test.jsonl --retriever DIR \
        --corpus documents.jsonl --num_retrieved 3

Written: OUT (the best reader, a folder of transformers), OUT.jsonl (one row per evaluation),
OUT.state (everything that --resume needs to end with the weights of a run that was never stopped)
and, with --retriever, OUT.retrieved (its passages).
"""
import math
import os
import time
from contextlib import nullcontext

import torch

from data import (
    TrainSet,
    check_targets,
    list_targets,
    note_long_passages,
    plan_epoch,
)
from reader.frozen import note_reach, put_gold_first, retrieve_once, retrieved_path
from reader.open import (
    add_prompt_flags,
    open_reader,
    open_reader_tokenizer,
    open_with_tokenizer,
)
from reader.predict import (
    ANSWER_MAXLENGTH,
    CHECKED,
    check_answers,
    note_too_long,
    note_unspelled,
    predict,
    summarize,
)
from records.hashes import model_files
from records.reader_records import note_files, note_unscored, read_records
from training.adapters import add_lora_flags, check_lora
from training.checkpoints import find_model
from training.cost import log_cost, measure_updates, note_cost
from training.loop import (
    BOTH_SETS,
    Progress,
    Run,
    RunLog,
    count_on_bar,
    count_trained,
    describe_machine,
    epoch_bar,
    freeze,
    make_optimizer,
    open_epoch,
    saved_note,
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
    LONG_PATIENCE,
    PATIENCE,
    InputError,
    Parser,
    check_at_least,
    check_positive,
    check_seed,
    gather_lists,
    run_script,
    shorten,
    start_processes,
    sum_over_processes,
)

# flags that may differ between a run and its resumption: they do not change the weights
FREE_FLAGS = {"resume", "overwrite", "num_workers", "save_every", "logging_steps", "gpus",
              "data_test", "batch_size_val", "tensorboard", "tqdm", "index", "plan"}

# the three arguments, and the flags that may take their place
PATH_FLAGS = {"model": "output_dir", "data_train": "train_file", "data_val": "eval_file"}
SET_PATHS = {"train": "data_train", "dev": "data_val"}


# ---------------------------------------------------------------- flags

def parse_args(arguments=None):
    """Return the flags as a Namespace, of the command line or of a list of arguments."""
    # no abbreviations: --model would be taken for --model_name_or_path
    parser = Parser(description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("model", nargs="?",
        help="folder to write the best reader to; OUT.jsonl and OUT.state are written next to it")
    add("data_train", nargs="?", help="training records: .json or .jsonl, may end in .gz")
    add("data_val", nargs="?", help="dev records, which choose the best checkpoint")
    add = parser.add_argument_group("data").add_argument
    for name, flag in PATH_FLAGS.items():
        add(f"--{flag}", metavar="PATH",
            help=f"replaces the argument {name}; give all three as flags, or none")
    add("--data_test", "--test_file", metavar="FILE",
        help="records to evaluate the best checkpoint on at the end")
    add("--num_contexts", type=int,
        help="contexts per question; default: 5, or --num_retrieved + 1 with --retriever")
    add("--max_length", type=int, default=250,
        help="tokens per question and passage, truncated on the right")
    add("--answer_maxlength", type=int, default=-1,
        help="refuse training targets with more tokens; -1 allows any length")
    add("--eval_answer_maxlength", type=int, metavar="N",
        help="maximum number of tokens to generate for an answer in evaluation, also the default "
        f"of test.py and ask.py; default: {ANSWER_MAXLENGTH}")
    add("--num_workers", type=int, default=0, help="processes that tokenise")
    add("--no_shuffle", action="store_true",
        help="keep the file's order and each record's first answer")
    add = parser.add_argument_group("frozen retriever").add_argument
    add("--retriever", "--embedding_model", metavar="DIR",
        help="retrieve the passages with this retriever (folder, hub name, or bm25), once; they "
        "are kept in OUT.retrieved")
    add("--corpus", "--full_dataset_file_path", metavar="FILE",
        help="the retriever's documents: a .tsv or .csv with a header, or JSON lines, may end in "
        ".gz")
    add("--index", "--full_dataset_index_path", metavar="DIR",
        help="folder of the corpus's vectors, created or reused; default: next to the corpus")
    add("--num_retrieved", "--embedding_max_num_to_retrieve", type=int, metavar="N",
        help="passages to retrieve for a question; default: 3")
    add = parser.add_argument_group("model").add_argument
    add("--t5_name", "--model_name_or_path", default="t5-base",
        help="checkpoint to start from, a T5 or a causal language model: hub name or folder")
    add("--tokenizer", metavar="NAME",
        help="folder or hub name of the model whose tokenizer is used; default: that of --t5_name "
        "or, for a released FiD reader and minFiD's file, that of the model it was trained from")
    add("--dropout", type=float, default=0.1, help="dropout rate")
    add("--use_checkpoint", action="store_true",
        help="recompute the encoder's activations in the backward pass to save memory")
    add("--bf16", action="store_true", help="bfloat16 autocast; weights and optimizer stay float32")
    add_lora_flags(add)
    add("--save_adapters", action="store_true",
        help="save only the adapters of --lora, in peft's format, with the name of their base "
        "model; default: save the whole model with the adapters merged")
    add("--freeze", metavar="REGEX",
        help="do not train weights whose names match this regular expression")
    add_prompt_flags(parser)
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", "--per_device_train_batch_size", type=int, default=1,
        help="questions per process and micro-batch")
    add("--batch_size_val", "--per_device_eval_batch_size", type=int, default=2,
        help="questions per process in evaluation")
    add("--grad_accumulation", type=int, default=1, help="micro-batches per update")
    add("--accumulate", choices=["mean", "sum"], default="mean",
        help="mean: an update's gradient is that of one large batch; sum: the micro-batches' mean "
        "gradients are added up, the scale of FiD and minFiD")
    add("--epochs", type=int, default=20, help="passes over the training records")
    add("--lr", type=float, default=1e-5, help="peak learning rate of the linear schedule")
    add("--num_warmup_steps", type=int, default=1000, help="updates of linear warm-up")
    add("--warmup_ratio", type=float,
        help="fraction of the updates used for warm-up, replaces --num_warmup_steps")
    add("--weight_decay", type=float, default=0.01, help="AdamW's weight decay, on all weights")
    add("--clip", type=float, default=1.0, help="maximum gradient norm")
    add = parser.add_argument_group("run").add_argument
    add("--seed", type=int, default=42,
        help="seed of the order, the answers and (plus the rank) dropout")
    add("--eval_every", type=int, default=0,
        help="also evaluate every N updates; 0: only at the end of epochs")
    add("--save_every", type=int, default=0,
        help="also save OUT.state every N updates; 0: only after evaluations")
    add("--resume", action="store_true",
        help="continue from OUT.state; start from scratch if there is no such file")
    add("--overwrite", action="store_true",
        help="replace the OUT of an earlier run, and start from scratch")
    add("--logging_steps", type=int, metavar="N",
        help="print progress every N updates if the output is not a terminal; default: about "
        "every minute")
    add("--tensorboard", action="store_true",
        help="write to OUT.tensorboard as well (needs the package)")
    add("--plan", action="store_true",
        help="estimate the cost of the run (hours, memory, disk) from a few updates, and stop; "
        "writes only, with --retriever, OUT.retrieved and the index")
    add("--tqdm", action="store_true",
        help="show progress bars even if the output is not a terminal")
    add("--gpus", default="",
        help="CUDA_VISIBLE_DEVICES, for example 0,1; default: none, which runs on the CPU")
    args = parser.parse_intermixed_args(arguments)
    if args.retriever and args.num_retrieved is None:
        args.num_retrieved = 3
    if args.num_contexts is None:
        args.num_contexts = args.num_retrieved + 1 if args.retriever else 5
    return args


def settle_paths(args, sets):
    """Sets the three arguments where their flags are given. Raises InputError for both, or neither.

    sets: see set_up.
    """
    given = [name for name in PATH_FLAGS if getattr(args, name) is not None]
    given_flags = [name for name, flag in PATH_FLAGS.items() if getattr(args, flag) is not None]
    if given_flags and not given:
        for name in given_flags:
            setattr(args, name, getattr(args, PATH_FLAGS[name]))
    elif given_flags:
        raise InputError("OUT, the training and the dev records are given as three arguments or "
                         "as --output_dir, --train_file and --eval_file, and here as both")
    needed = {"model"} | {SET_PATHS[name] for name in sets}
    missing = [f"{name} (--{flag})" for name, flag in PATH_FLAGS.items()
               if name in needed and getattr(args, name) is None]
    if missing:
        raise InputError(f"missing: {', '.join(missing)}; give OUT train.json dev.json, or all "
                         "three as flags")
    for flag in PATH_FLAGS.values():
        delattr(args, flag)


def check_retriever(args):
    """Raise InputError for flags of the frozen retriever that do not fit together."""
    others = [name for name in ("corpus", "index", "num_retrieved") if getattr(args, name)]
    if not args.retriever:
        if others:
            raise InputError(f"--{others[0]} is for a frozen retriever: give --retriever, too")
        return
    if not args.corpus:
        raise InputError("--retriever needs --corpus, the documents that it searches")
    if args.num_contexts != args.num_retrieved + 1:
        raise InputError(f"--num_contexts {args.num_contexts}: a reader with --num_retrieved "
                         f"{args.num_retrieved} gets {args.num_retrieved + 1} contexts, the ground "
                         "truth being one; leave --num_contexts out")
    if not os.path.exists(args.corpus):
        raise InputError(f"--corpus {args.corpus}: no such file; check the path")
    if args.retriever != "bm25":
        find_model(args.retriever)
    # opened after retrieval, which may take hours
    open_reader_tokenizer(args.t5_name, args.tokenizer)


def check_args(args, sets=BOTH_SETS):
    """Reject wrong flags before anything is read. Raises InputError.

    sets: see set_up.
    """
    settle_paths(args, sets)
    args.model = args.model.rstrip("/")
    check_at_least(args, {"num_retrieved": 1, "num_contexts": 1, "max_length": 1, "batch_size": 1,
                          "batch_size_val": 1, "grad_accumulation": 1, "epochs": 1,
                          "num_workers": 0, "num_warmup_steps": 0, "eval_every": 0,
                          "save_every": 0, "logging_steps": 1, "weight_decay": 0,
                          "eval_answer_maxlength": 2})
    check_positive(args, ["lr", "clip"])
    check_seed(args)
    if not 0 <= args.dropout < 1:
        raise InputError(f"--dropout must be 0 or more and below 1, it is {args.dropout}")
    if args.warmup_ratio is not None and not 0 <= args.warmup_ratio <= 1:
        raise InputError(f"--warmup_ratio must be between 0 and 1, it is {args.warmup_ratio}")
    check_lora(args)
    check_retriever(args)


# ---------------------------------------------------------------- training

def train_update(run, batches, micro_batches):
    """One optimizer step over that many micro-batches; returns (summed loss, its weight, questions)
    over all processes.

    mean: the loss is summed over all target tokens of the update, on all processes, and divided by
    their number. sum: each micro-batch's mean loss counts whole, as in FiD and minFiD (DDP averages
    over processes in both). Raises InputError naming the records if the loss or the gradient is not
    finite; the weights are untouched then.
    """
    args, world, device = run.args, run.world, run.world.device
    by_token = args.accumulate == "mean"
    losses, weight, questions, indices = [], 0, 0, []
    for i in range(micro_batches):
        batch = next(batches)
        inputs = {name: tensor.to(device) for name, tensor in batch["inputs"].items()}
        labels = batch["labels"]
        is_real = labels is not None  # else this process only takes part in the gradient exchange
        if not is_real:
            labels = torch.full((len(batch["indices"]), 1), -100)

        # forward and backward pass; gradients add up in the weights' .grad
        with run.exchange_gradients(is_last=i == micro_batches - 1):
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                loss, _ = run.model(**inputs, labels=labels.to(device),
                                    reduction="sum" if by_token else "mean")
            loss.backward()

        # what is added up over the micro-batches
        losses.append(loss.detach())
        indices.append(batch["indices"])
        if is_real:
            weight += int(labels.ne(-100).sum()) if by_token else 1
            questions += len(batch["indices"])

    losses = torch.stack(losses).tolist()
    total, weight, questions = sum_over_processes([sum(losses), weight, questions], world)

    # from DDP's mean over processes of summed losses to the mean over target tokens
    if by_token:
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(world.size / weight)

    not_finite = step_optimizer(run, total)
    if not_finite:
        refuse_update(run, not_finite, losses, indices)
    return total, weight, questions


def refuse_update(run, not_finite, losses, indices):
    """Raises InputError naming the records whose loss is not finite or, if only the gradient is
    not, all records of the update.
    """
    suspects = []
    for loss, batch_indices in zip(losses, indices):
        if not_finite == "gradient" or not math.isfinite(loss):
            suspects += batch_indices
    ids = [shorten(run.train_set.records[index]["id"])
           for index in sorted(gather_lists(suspects, run.world))]
    raise InputError(f"the {not_finite} is not finite in update {run.progress.update + 1} of epoch "
                     f"{run.progress.epoch}, records {', '.join(ids)} of {run.args.data_train}; "
                     f"look at them, or lower --lr{saved_note(run)}")


def plan_run(run, epoch):
    """This process's part of an epoch of the run: [update][micro-batch][(index, is_real)]."""
    args, world = run.args, run.world
    return plan_epoch(len(run.train_set.records), epoch, args.seed, not args.no_shuffle,
                      args.batch_size, args.grad_accumulation, world.rank, world.size)


def train_epoch(run):
    """Trains on the rest of the current epoch, with the evaluations and saves that fall into it."""
    args, progress = run.args, run.progress

    # who reads what is planned anew for each epoch, alike on all processes
    plan = plan_run(run, progress.epoch)
    remaining, batches = open_epoch(run, plan)
    bar = epoch_bar(run, args.logging_steps)
    for update in remaining:
        start = time.time()
        loss_sum, weight, questions = train_update(run, batches, len(update))
        seconds = time.time() - start
        progress.count_update(loss_sum, weight, questions, seconds)
        count_on_bar(bar, run)
        note_cost(run, seconds)

        # evaluate when it is due; save the state after it, and when --save_every says so
        is_end = progress.update == len(plan)
        eval_is_due = args.eval_every and progress.total_updates % args.eval_every == 0
        save_is_due = args.save_every and progress.total_updates % args.save_every == 0
        if is_end or eval_is_due:
            report(run, evaluate(run))
        if is_end:
            progress.start_epoch()
        if is_end or eval_is_due or save_is_due:
            save_state(run)
    bar.close()


# ---------------------------------------------------------------- evaluation

def evaluate(run):
    """Return {dev_em, dev_f1, correct, count, cut, eval_seconds} of the reader as it is, which is
    back in training mode then; cut: how many answers had no end within the limit of tokens.
    """
    start = time.time()
    summary = answer(run, run.unwrapped, run.dev)
    run.model.train()
    return {"dev_em": summary.em, "dev_f1": summary.f1, "correct": summary.correct,
            "count": summary.count, "cut": summary.cut, "eval_seconds": time.time() - start}


def plan_cost(run):
    """Logs what the run will cost, by a few updates and the answers to a few dev questions."""
    args = run.args
    seconds = measure_updates(run, plan_run(run, run.progress.epoch), train_update)
    sample = run.dev[:2 * args.batch_size_val * run.world.size]
    start = time.time()
    answer(run, run.unwrapped, sample)
    eval_seconds = (time.time() - start) * len(run.dev) / len(sample)
    updates_per_epoch = run.last_update // args.epochs
    every = args.eval_every or updates_per_epoch
    evaluations = sum(update % updates_per_epoch == 0 or update % every == 0
                      for update in range(run.progress.total_updates + 1, run.last_update + 1))
    log_cost(run, seconds, evaluations, eval_seconds)


def answer(run, reader, records):
    """Return the Summary of a reader's answers to records, with the run's lengths and contexts."""
    args = run.args
    predictions = predict(reader, records, run.tokenizer, run.world, num_contexts=args.num_contexts,
                          max_length=args.max_length, batch_size=args.batch_size_val,
                          num_workers=args.num_workers, bf16=args.bf16,
                          answer_maxlength=answer_limit(args))
    return summarize(predictions)


def answer_limit(args):
    """Return the most tokens that are generated for an answer in evaluation."""
    return args.eval_answer_maxlength or ANSWER_MAXLENGTH


def check_dev_answers(run):
    """Return the AnswerCheck of the dev questions."""
    room = run.unwrapped.count_answer_tokens(answer_limit(run.args))
    return check_answers([record["answers"] for record in run.dev], run.collator, room)


def note_answers(run):
    """Log which targets and answers the tokenizer or the limit of tokens makes unreachable."""
    args, log = run.args, run.world.log
    limit = answer_limit(args)
    room = run.unwrapped.count_answer_tokens(limit)
    targets = [[target] for record in run.train_set.records[:CHECKED]
               for target in list_targets(record)]
    note_unspelled(check_answers(targets, run.collator, room), f"targets of {args.data_train}", log)
    check, what = check_dev_answers(run), f"questions of {args.data_val}"
    note_unspelled(check, what, log)
    note_too_long(check, what, limit, room, "eval_answer_maxlength", log)


def explain_zero(run):
    """Return why no dev question may have been answered right, and what to do."""
    check = check_dev_answers(run)
    if check.unspelled == check.checked:
        return ("the tokenizer cannot spell any of their answers (see the first lines); take "
                "another --t5_name")
    if check.too_long == check.checked:
        return ("all of their answers are longer than --eval_answer_maxlength "
                f"{answer_limit(run.args)} allows; raise it")
    return "train longer or with a higher --lr, and look at what test.py --pred writes"


def report(run, measures):
    """Log a line and a row of the updates since the last report, and keep the reader if its dev EM
    is the best.
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
    """True if the measures are the best so far, which the progress then remembers."""
    progress = run.progress
    # EM decides, then F1
    is_best = progress.count_measures(measures["dev_em"], measures["dev_f1"])
    if is_best:
        progress.best_at = f"epoch {progress.epoch}, update {progress.total_updates}"
    return is_best


def save_best(run):
    """Write OUT: the reader as a folder of transformers with its tokenizer and args.json."""
    args, progress = run.args, run.progress
    if not run.world.is_main:
        return
    dev_em, dev_f1 = progress.best or (None, None)  # a federation may have measured nothing
    info = {"dev_em": dev_em, "dev_f1": dev_f1, "epoch": progress.epoch,
            "update": progress.total_updates, "num_contexts": args.num_contexts,
            "max_length": args.max_length, "answer_maxlength": args.answer_maxlength,
            "eval_answer_maxlength": answer_limit(args),
            **run.unwrapped.describe(), "args": vars(args), "versions": versions()}
    save_checkpoint(run.out, info, run.unwrapped.save_pretrained, run.tokenizer.save_pretrained)


# ---------------------------------------------------------------- setting up

def set_up(args, world, sets=BOTH_SETS):
    """Return the Run of these flags: everything read and built, from the start or from OUT.state.

    sets: what is read, of "train" and "dev". Raises InputError.
    """
    # data; the state comes first: one of other flags is refused before anything is retrieved
    inputs = hash_inputs(list_inputs(args), world)
    state = load_state(args.model, args, world, FREE_FLAGS, inputs)
    if args.retriever:
        retrieve_once(args, given_paths(args), world)
    train, dev = [], []
    if "train" in sets:
        train = read_records(data_path(args, "train"), args.num_contexts)
    if "dev" in sets:
        dev = read_records(data_path(args, "dev"), args.num_contexts)
    if args.retriever:
        put_gold_first(args, train, world.log)
    if "dev" in sets and not any(record["answers"] for record in dev):
        raise InputError(f"{args.data_val}: no record has 'answers', so no checkpoint can be "
                         "chosen by it")
    note_unscored(dev, args.data_val, world.log)

    # model
    reader, tokenizer = open_with_tokenizer(args.t5_name, world.log, args.tokenizer,
                                            dropout=args.dropout, prompt_flags=vars(args),
                                            trains=True)
    check_targets(train, tokenizer, args.answer_maxlength, args.data_train)
    reader.set_lengths(args.max_length, answer_limit(args))
    reader.check_records(train, args.num_contexts, args.data_train, trains=True)
    reader.check_records(dev, args.num_contexts, args.data_val)
    reader.set_checkpoint(args.use_checkpoint)
    if args.lora:
        reader.add_adapters(args, world.device)
    if args.freeze:
        freeze(reader, args.freeze)
    reader.to(world.device).train()

    # optimizer and schedule
    update_size = args.batch_size * args.grad_accumulation * world.size
    updates_per_epoch = math.ceil(len(train) / update_size)
    last_update = updates_per_epoch * args.epochs
    optimizer, scheduler = make_optimizer(reader, args.lr, args.weight_decay, 1e-8,
                                          count_warmup(args, last_update), last_update)

    # the run, where it stands
    progress = Progress(**state["progress"]) if state else Progress()
    tensorboard = f"{args.model}.tensorboard" if args.tensorboard and not args.plan else None
    log = RunLog(f"{args.model}.jsonl", world.is_main, progress.rows, tensorboard)
    run = Run(args=args, world=world, out=args.model, model=wrap_model(reader, world),
              tokenizer=tokenizer, train_set=TrainSet(train, args.seed, not args.no_shuffle),
              dataset_sizes=[len(train)], dev=dev,
              collator=reader.make_collator(tokenizer, args.num_contexts, args.max_length),
              optimizer=optimizer, scheduler=scheduler, last_update=last_update, log=log,
              progress=progress, inputs=inputs)
    if state:
        restore_state(run, state)
    note_answers(run)
    return run


def given_paths(args):
    """{name: file} of the records that the flags name."""
    paths = {"train": args.data_train, "dev": args.data_val, "test": args.data_test}
    return {name: path for name, path in paths.items() if path}


def list_inputs(args):
    """Return {path: whether all of it is hashed} of the files that the weights depend on, but for
    the checkpoint, whose weights OUT.state holds.
    """
    files = {path: True for name, path in given_paths(args).items() if name != "test"}
    if args.retriever:
        files[args.corpus] = False
        files |= {path: False for path in model_files(args.retriever)}
    return files


def data_path(args, name):
    """The file that the records of this name are read from: the given one, or what retrieve_once
    has made of it.
    """
    return retrieved_path(args.model, name) if args.retriever else given_paths(args)[name]


def count_warmup(args, last_update):
    """The updates of warm-up in a run of that many."""
    if args.warmup_ratio is None:
        return args.num_warmup_steps
    return math.ceil(last_update * args.warmup_ratio)


def describe(run):
    """Logs the lines that a run starts with."""
    args, world, log = run.args, run.world, run.world.log
    parameters = sum(parameter.numel() for parameter in run.unwrapped.parameters())
    adapters = f", {count_trained(run.unwrapped):,} of them trained" if args.lora else ""
    warmup = count_warmup(args, run.last_update)
    log(describe_machine(world, args.gpus))
    log(f"{len(run.train_set.records)} training and {len(run.dev)} dev questions, "
        f"{args.num_contexts} contexts of at most {args.max_length} tokens; {parameters:,} "
        f"parameters{adapters}")
    log(f"effective batch {args.batch_size * args.grad_accumulation * world.size} = "
        f"{args.batch_size} questions x {args.grad_accumulation} micro-batches x {world.size} "
        f"processes ({args.accumulate}); {run.last_update // args.epochs} updates per epoch, "
        f"{run.last_update} in all, {warmup} of warm-up")
    note_long_passages(run.train_set.records, run.collator, log)
    if args.retriever:
        note_reach(run.dev, args.data_val, log)
    if warmup >= run.last_update:
        log(f"warning: the warm-up of {warmup} updates outlasts the run: the learning rate never "
            f"reaches {args.lr:g}; --warmup_ratio 0.1 would fit")
    if run.progress.total_updates:
        log(f"resuming after {run.progress.total_updates} updates, in epoch {run.progress.epoch}")


def main(args):
    check_args(args)
    world = start_processes(args.gpus, LONG_PATIENCE if args.retriever else PATIENCE)
    set_seed(args.seed, world.rank)
    claim = claim_folder(args.model, args.resume, args.overwrite, world)
    with nullcontext() if args.plan else claim:
        run = set_up(args, world)
        # now, not after the training
        test = read_records(data_path(args, "test"), args.num_contexts) if args.data_test else None
        if test:
            run.unwrapped.check_records(test, args.num_contexts, args.data_test)
            note_unscored(test, args.data_test, world.log)
        describe(run)
        note_files([(args.data_train, run.train_set.records), (args.data_val, run.dev),
                    (args.data_test, test)], args.num_contexts, world.log)
        if args.plan:
            plan_cost(run)
            return
        forget_replaced_state(run)
        start = time.time()
        while run.progress.total_updates < run.last_update:
            train_epoch(run)
    dev_em, _ = run.progress.best
    world.log(f"done in {time.time() - start:.0f} s; best dev EM {dev_em:.2f} "
              f"({run.progress.best_at}) in {run.out}")
    if dev_em == 0:
        world.log("warning: no dev question was answered right; the checkpoint was chosen by F1 or "
                  f"is the last one: {explain_zero(run)}")
    if test and any(record["answers"] for record in test):
        best_reader = open_reader(run.out, trained=True).to(world.device)
        best_reader.check_tokenizer(run.tokenizer)
        summary = answer(run, best_reader, test)
        world.log(f"test EM {summary.em:.2f} ({summary.correct}/{summary.count}), F1 "
                  f"{summary.f1:.2f} with the best checkpoint on {args.data_test}")


if __name__ == "__main__":
    run_script(main, parse_args())
