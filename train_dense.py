r"""Train a dense retriever, or a ranker, from LLM-Embedder's, DPR's or qrels files, and measure it
while it trains.

    python train_dense.py --output_dir OUT --train_data train.json --max_steps 2000 \
        --query_encoder BAAI/bge-base-en
    torchrun --standalone --nproc_per_node=8 train_dense.py --output_dir OUT --corpus corpus.jsonl \
        --queries queries.jsonl --positives qrels=train.tsv,min_score=1 \
        --negatives qrels=mined.tsv --group_size 8 --eval_qrels qrels=dev.tsv

    python train_dense.py --output_dir OUT --train_data scored.json --loss fid-kd \
        --query_encoder retriever    # scored.json: test.py READER FILE --scores scored.json

Losses: InfoNCE over the keys of all processes (DPR, arXiv 2004.04906); distillation from teacher
scores (LLM-Embedder, arXiv 2310.07554), from a reader's cross-attention (FiD-KD, arXiv 2012.04584)
or from a language model's likelihood (REPLUG, arXiv 2301.12652; EMDR2, arXiv 2106.05346); graded
labels.

Writes OUT (a sentence-transformers folder), OUT.jsonl (a row per report) and OUT.state (for
--resume).
"""
import math
import os
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import transformers

from dense import losses
from dense.batches import (
    GroupCollator,
    GroupSet,
    check_one_instruction,
    note_long_keys,
    plan_batches,
)
from dense.description import find_path, holds_pair
from dense.flags import check_retriever_flags as check_args
from dense.flags import find_data_files, pick_flags
from dense.flags import parse_retriever_flags as parse_args
from dense.gather import gather_rows
from dense.model import BiEncoder, CrossEncoder, limit_lengths
from dense.texts import TextSettings, describe_texts, settle_texts
from dense.training_data import DataSettings, TaskSettings, no_training_data, read_training
from layers.regions import compile_on_gpu
from records.corpus import Corpus, open_corpus
from records.qrels import list_qrels_files, merge_qrels
from records.questions import read_queries
from retrieval.dev_set import make_annotated_set, measure_retriever, read_dev_set, sample_dev_set
from retrieval.measures import note_patterns, note_unjudged
from retrieval.results import note_own
from training.adapters import copy_to_cpu, prepare_lora, read_lora_flags, unload_adapters
from training.cost import log_cost
from training.loop import (
    BOTH_SETS,
    Progress,
    Run,
    RunLog,
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
from utils import InputError, run_script, start_processes

# flags that may differ between a run and its resumption, because they do not change the weights
FREE_FLAGS = {"resume", "overwrite", "num_workers", "gpus", "no_compile", "tqdm", "logging_steps",
              "early_exit_steps", "plan"}

# federate.py trains with this script, too; train_epoch.py lists the names that it uses


@dataclass
class RetrieverRun(Run):
    """Hold a Run of a retriever or a ranker. Its model is a BiEncoder or a CrossEncoder."""
    corpus: Corpus
    task_settings: dict  # {task: the TaskSettings of its loss}
    updates: int         # updates in the schedule; --early_exit_steps may end the run earlier
    chunk_size: int      # texts to encode at a time (GradCache); 0: all at once


# ---------------------------------------------------------------- loss

def compute_loss(run, batch):
    """Return (loss over the queries of all processes, number of these queries). Every process
    computes the same loss, see dense/gather.py.

    Shapes: Q queries and K keys of all processes, groups of G keys.
    """
    settings = run.task_settings[batch["task"]]
    # a dummy batch adds no rows to what is gathered
    count = len(batch["indices"]) if batch["is_real"] else 0
    sizes = gather_sizes(batch["sizes"][:count], run.world)                              # (Q)
    teacher = gather_teacher(batch["teacher"][:count].to(run.world.device), sizes)       # (Q, G)
    if run.args.ranker:
        scores, groups, zero = score_with_ranker(run, batch, count)
    else:
        scores, groups, zero = score_with_retriever(run, batch, count, sizes)
    positives = groups[:, 0]

    weighted_losses = []
    if settings.contrasts:
        masked = None
        if run.args.mask_duplicates:
            masked = duplicate_mask(batch, count, positives)
        weighted_losses.append((settings.contrastive_weight,
                                losses.contrastive(scores, positives, masked)))
    has_teacher = ~teacher.isnan().any(1)                                                # (Q)
    if settings.distills and has_teacher.any():
        temperature = 1.0 if run.args.ranker else run.unwrapped.temperature
        loss = distillation_loss(settings, scores[has_teacher], groups[has_teacher],
                                 teacher[has_teacher], temperature)
        weighted_losses.append((settings.distill_weight, loss))
    return combine_losses(weighted_losses) + zero, len(teacher)


def gather_sizes(sizes, world):
    """Return the sizes (Q) of all processes' groups, on the CPU."""
    return gather_rows(sizes.to(world.device)).cpu() if world.size > 1 else sizes


def gather_teacher(teacher, sizes):
    """Return the teacher scores (Q, G) of all processes, padded with nan where a process has only
    groups smaller than G.
    """
    width = int(sizes.max()) if len(sizes) else teacher.shape[1]
    padding = teacher.new_full((len(teacher), max(width - teacher.shape[1], 0)), math.nan)
    return gather_rows(torch.cat([teacher[:, :width], padding], 1))


def score_with_retriever(run, batch, count, sizes):
    """Return (scores (Q, K) of all queries and keys, groups (Q, G), zero). groups has the columns
    of each query's own keys; the other queries' keys are its in-batch negatives. zero depends on
    all weights, so that DDP's all-reduce works with a dummy batch, too.

    sizes (Q): the sizes of the queries' groups, which add up to K.
    """
    queries, keys = run.model(batch["queries"], batch["keys"], run.chunk_size)
    all_queries = gather_rows(queries[:count])  # (Q, D)
    all_keys = gather_rows(keys[:int(batch["sizes"][:count].sum())])  # (K, D)
    scores = run.unwrapped.score(all_queries, all_keys)
    return scores, list_columns(sizes).to(scores.device), (queries.sum() + keys.sum()) * 0


def list_columns(sizes):
    """Return the columns (Q, G) of each query's own keys, if groups of these sizes (Q) are next to
    each other. A group smaller than G is filled up with copies of its first column.
    """
    first = (sizes.cumsum(0) - sizes)[:, None]                                           # (Q, 1)
    offsets = torch.arange(int(sizes.max()), device=sizes.device)[None]                  # (1, G)
    return first + offsets.where(offsets < sizes[:, None], 0)


def score_with_ranker(run, batch, count):
    """Return what score_with_retriever returns, but scores (Q, G), because a ranker scores a query
    with its own keys only.
    """
    # (B * G) -> (B, G)
    pair_scores = run.model(batch["pairs"], run.chunk_size).view(len(batch["indices"]), -1)
    scores = gather_rows(pair_scores[:count])
    groups = torch.arange(scores.shape[1], device=scores.device).expand(len(scores), -1)
    return scores, groups, pair_scores.sum() * 0


def duplicate_mask(batch, count, positives):
    """Return (Q, K) bool, True at copies of a query's positives, but not at the positive that it
    trains on.
    """
    own_keys = int(batch["sizes"][:count].sum())
    identities = gather_rows(batch["identities"][:own_keys].to(positives.device))        # (K)
    is_copy = losses.mark_copies(identities, batch["positives"][:count])                 # (B, K)
    is_copy = gather_rows(is_copy.to(torch.uint8)).bool()                                # (Q, K)
    return is_copy.scatter(1, positives[:, None], False)


def distillation_loss(settings, scores, groups, teacher, temperature):
    """Return the distillation loss of the queries that have teacher scores.

    scores (Q, K), groups (Q, G): see score_with_retriever; teacher (Q, G); temperature: what the
    scores have already been divided by.
    """
    own_scores = scores.gather(1, groups)                                                # (Q, G)
    student_temperature = distill_temperature(settings, temperature) / temperature
    teacher_temperature = settings.teacher_temperature
    if settings.loss == "fid-kd":
        return losses.fid_kd(own_scores, teacher, teacher_temperature, student_temperature)
    if settings.loss == "emdr2":
        return losses.emdr2(own_scores, teacher, teacher_temperature, student_temperature)
    if settings.stable_distill:
        return losses.stable_distillation(scores, groups, teacher, teacher_temperature)
    return losses.distillation(own_scores, teacher, teacher_temperature, student_temperature)


def distill_temperature(settings, temperature):
    """Return by how much distillation divides cosines, inner products or distances.

    temperature: the model's own. Distillation alone has one temperature (REPLUG, arXiv 2301.12652,
    section 4: 0.1). Together with InfoNCE, scores are divided by the model's temperature and then
    by --student_temperature, as in LLM-Embedder.
    """
    if settings.student_temperature is None or settings.stable_distill:
        return temperature
    if settings.loss:
        return settings.student_temperature
    return temperature * settings.student_temperature


def combine_losses(weighted_losses):
    """Return the weighted sum of losses, or 0 if there are none. A single loss is not weighted, as
    in LLM-Embedder.
    """
    if len(weighted_losses) == 1:
        _, loss = weighted_losses[0]
        return loss
    return sum(weight * loss for weight, loss in weighted_losses)


# ---------------------------------------------------------------- training

def train_update(run, batches, micro_batches):
    """Take an optimizer step over micro-batches. Return (mean loss, 1, queries of all processes).

    If the loss or the gradient is not finite, leaves the weights unchanged and raises InputError
    naming the records.
    """
    args, world = run.args, run.world
    losses, counts, indices = [], [], []
    for i in range(micro_batches):
        batch = next(batches)

        # forward and backward pass; gradients add up in the weights' .grad
        with run.sync_gradients(is_last=i == micro_batches - 1):
            with torch.autocast(world.device.type, torch.bfloat16, enabled=args.bf16):
                loss, count = compute_loss(run, batch)
            counts.append(count)
            # the last micro-batch of an epoch may have fewer queries than the first
            loss = loss * (count / counts[0])
            (loss / micro_batches).backward()
        losses.append(loss.detach())
        indices.append(batch["indices"])

    # turn the mean over micro-batches into the mean over their queries
    scale = micro_batches * counts[0] / sum(counts)
    if scale != 1:
        scale_gradients(run.model, scale)
    losses = torch.stack(losses).double()
    mean_loss, = step_optimizer(run, losses.mean()[None] * scale, losses, indices)
    return mean_loss, 1, sum(counts)


def plan_run(run, epoch):
    """Return this process's part of an epoch: [update][micro-batch][(index, is_real)]."""
    return plan_updates(run.args, run.dataset_sizes, epoch, run.world)


def plan_updates(args, dataset_sizes, epoch, world):
    """Return what plan_run returns; set_up needs it before there is a run."""
    return plan_batches(dataset_sizes, epoch, args.seed, not args.no_shuffle, args.batch_size,
                        args.grad_accumulation, args.inbatch_same_dataset, world.rank, world.size)


def train_epoch(run):
    """Train on the rest of the current epoch, with the reports, evaluations and saves that are due
    in it.
    """
    args, progress = run.args, run.progress
    plan = plan_run(run, progress.epoch)  # a pure function: all processes get parts of one plan
    remaining, batches = open_epoch(run, plan)
    bar = epoch_bar(run)
    for update in remaining:
        start = time.time()
        loss, weight, queries = train_update(run, batches, len(update))
        seconds = time.time() - start
        progress.count_update(loss, weight, queries, seconds)
        log_update(run, bar, seconds)

        # report, evaluate and save when it is due, and at the end of the run
        done, is_end = progress.total_updates, progress.total_updates >= run.last_update
        if progress.update == len(plan):
            progress.start_epoch()
        eval_is_due = run.dev is not None and (is_end
                                               or done % (args.eval_steps or args.save_steps) == 0)
        if eval_is_due:
            report_progress(run, evaluate(run))
        elif is_end or done % args.logging_steps == 0:
            report_progress(run)
        if is_end or eval_is_due or done % args.save_steps == 0:
            if run.dev is None:
                save_best(run)  # without a dev set, keep the latest
            save_state(run)
        if is_end:
            break
    bar.close()


# ---------------------------------------------------------------- evaluation

def evaluate(run):
    """Return {measure: value} of the retriever as it is now on the dev set, with eval_seconds. The
    model returns to training mode.
    """
    start = time.time()
    measures = measure_retriever(run.unwrapped, run.dev, make_dev_collator(run), run.corpus,
                                 run.args.metrics, run.args.cutoffs, run.world)
    run.model.train()
    return measures | {"eval_seconds": time.time() - start}


def make_dev_collator(run):
    """Return the GroupCollator of the dev set. If OUT will have prompts for all texts, they replace
    the instructions by task, as they do when retrieve.py measures OUT.
    """
    prompts = sentence_transformers_prompts(run)
    if not prompts:
        return run.collator
    prompts = {"query": prompts["query"], "key": prompts["document"]}
    return GroupCollator(replace(run.collator.texts, prompts=prompts), run.corpus)


def best_metric(args, dev):
    """Return the name of the measure that chooses the checkpoint. Raises InputError if it is not
    measured.
    """
    if dev.method == "rank":
        measured, default = ["rank"], "rank"
    else:
        measured = [f"{name}@{k}" for name in args.metrics for k in args.cutoffs]
        cutoff = next((k for k in args.cutoffs if k >= 10), args.cutoffs[-1])
        default = f"{args.metrics[0]}@{cutoff}"
    name = args.best_metric or default
    if name not in measured:
        raise InputError(f"--best_metric {name} is not measured; choose one of "
                         f"{', '.join(measured)}")
    return name


def report_progress(run, measures=None):
    """Log a line and a row about the updates since the last report. With measures, log them, too,
    and save the retriever if it is the best so far.
    """
    progress = run.progress
    summary = progress.summary()
    lr = run.scheduler.get_last_lr()[0]
    line = (f"update {progress.total_updates:6d} | loss {summary['loss']:.4f} | lr {lr:.2e} | "
            f"{summary['examples_per_second']:.1f} queries/s")
    row = {"update": progress.total_updates, "epoch": progress.epoch, "lr": lr, **summary}
    is_best = False
    if measures:
        is_best = keep_measures(run, measures)
        row |= measures | {"best": is_best}
        values = " ".join(f"{key} {measures[key]:.4f}" for key in measures if key != "eval_seconds")
        line += f" | {values} | {measures['eval_seconds']:.0f} s"
    run.world.log(line + " | best" if is_best else line)
    run.log.row(row, progress.total_updates)
    progress.rows += 1
    progress.start_report()
    if is_best:
        save_best(run)


def keep_measures(run, measures):
    """Keep the measures if they are the best so far by --best_metric; return whether they are."""
    name = best_metric(run.args, run.dev)
    value = -measures[name] if name == "rank" else measures[name]  # a lower rank is better
    return run.progress.keep_best((value,), f"{name} {measures[name]:.4f} at update "
                                  f"{run.progress.total_updates}")


# ---------------------------------------------------------------- saving

def save_best(run):
    """Write OUT: a sentence-transformers folder with the tokenizer and args.json."""
    args = run.args
    if not run.world.is_main:
        return
    model = merge_adapters(run.unwrapped, args) if args.lora else run.unwrapped
    roles = {"": "query"} if args.ranker else {role: role or "query" for role in model.encoders}
    max_length = max(run.collator.texts.max_lengths.values())
    info = describe_retriever(run)

    def save_model(folder):
        model.save_pretrained(folder, max_length, sentence_transformers_prompts(run))

    def save_tokenizers(folder):
        for folder_name, role in roles.items():
            run.collator.texts.tokenizers[role].save_pretrained(os.path.join(folder, folder_name))

    save_checkpoint(run.out, info, save_model, save_tokenizers)


def describe_retriever(run):
    """Return the content of args.json, from which retrieve.py reads how the retriever was trained.
    """
    args, model, texts = run.args, run.unwrapped, run.collator.texts
    used = used_instructions(run)
    # "none" if no example has a task that gets an instruction: retrieve.py must not add any then
    flags = run.flags | {"version": texts.version if used else "none"}
    info = {"best": run.progress.best_at, "update": run.progress.total_updates,
            "query_max_length": texts.max_lengths["query"],
            "key_max_length": texts.max_lengths["key"],
            "instructions": used, "args": flags, "versions": versions()}
    if args.ranker:
        return info | {"retriever": {}}
    return info | {"retriever": {"metric": model.metric, "temperature": model.temperature,
                                 "separator": model.query_encoder.separator,
                                 "end_token": texts.appends_end}}


def used_instructions(run):
    """Return {task: (before a query, before a key)} of the tasks whose texts get instructions."""
    if run.collator.texts.prompts is not None:
        return {}
    pairs = {task: run.collator.instruction(task) for task in run.task_settings}
    return {task: pair for task, pair in pairs.items() if any(pair)}


def sentence_transformers_prompts(run):
    """Return the prompts {query, document} for all texts, which sentence-transformers reads from
    OUT, or {} if they depend on the task. If records have different prompts of their own, queries
    get an empty one.
    """
    instructions = {run.collator.instruction(task) for task in run.task_settings}
    if len(instructions) != 1:
        return {}
    before_query, before_key = instructions.pop()
    own = set(run.train_set.examples.instructions)
    if own != {None}:
        before_query = own.pop() if len(own) == 1 else ""
    return {"query": before_query, "document": before_key}


def encoders_of(model, args):
    """Return the modules with a transformer as `.model`: the encoders, or the ranker itself."""
    return [model] if args.ranker else list(model.encoders.values())


def merge_adapters(model, args):
    """Return a copy of the model on the CPU, with its LoRA adapters merged into the weights."""
    model = copy_to_cpu(model)
    for module in encoders_of(model, args):
        module.model = unload_adapters(module.model).float()
    return model


# ---------------------------------------------------------------- setting up

def open_model(args, texts, device):
    """Return the retriever or ranker of the flags, with LoRA adapters if there is --lora."""
    if args.ranker:
        model = CrossEncoder.open(args.query_encoder, args.dropout)
    else:
        model = open_bi_encoder(args, texts)
    if args.lora:
        add_adapters(model, args, device)
    if args.freeze:
        freeze(model, args.freeze)
    return model.to(device).train()


def second_encoder(args):
    """Return the name of the checkpoint for a separate key encoder, or None if one encoder serves
    both or --query_encoder holds two.
    """
    if args.tie_encoders or not args.key_encoder and holds_pair(find_path(args.query_encoder)):
        return None
    return args.key_encoder or args.query_encoder


def open_bi_encoder(args, texts):
    """Return the BiEncoder of the flags."""
    model = BiEncoder.open(args.query_encoder, second_encoder(args), pooling=args.pooling_method,
                           metric=args.dense_metric, dropout=args.dropout,
                           truncate_dim=args.truncate_dim)
    has_cosines = model.metric == "ip" and all(encoder.is_normalised
                                               for encoder in model.encoders.values())
    if model.metric == "cos" or has_cosines:
        model.temperature = args.cos_temperature
    if args.pair_types:
        for encoder in model.encoders.values():
            encoder.separator = texts.tokenizers["key"].sep_token_id
    return model


def add_adapters(model, args, device):
    """Freeze the transformers, and add LoRA adapters of rank --lora; --load_in_4bit packs the
    frozen weights. Raises InputError.
    """
    lora = read_lora_flags(vars(args))
    for module in encoders_of(model, args):
        module.model = prepare_lora(module.model, lora, device, args.bf16)
        if not args.ranker:  # a pooler is not used, and DDP would wait for its gradient
            for name, parameter in module.model.named_parameters():
                if ".pooler." in name:
                    parameter.requires_grad_(False)


def read_dev(args, eval_file, corpus, queries, log):
    """Return the DevSet of the flags, or None. Raises InputError."""
    dev = None
    if args.eval_qrels:
        if "nq" in args.metrics:
            raise InputError("--metrics nq needs --eval_data with answers; qrels have none")
        group_size = args.eval_group_size if args.eval_method == "annotated" else None
        dev = make_annotated_set(merge_qrels(args.eval_qrels, args.seed), corpus, queries,
                                 group_size, " ".join(args.eval_qrels), log, args.exclude_self)
        dev = dev._replace(method=args.eval_method)
        note_unjudged(dev.labels, args.relevance_level, log)
    elif eval_file:
        dev = read_dev_set(eval_file, corpus, args.metrics, args.key_template, log,
                           args.exclude_self)
    if dev is None:
        return None
    if dev.own:
        note_own(sum(doc_index >= 0 for doc_index in dev.own), len(dev.own), log)
    if args.match == "regex":
        note_patterns(dev.answers, dev.queries, log)
    best_metric(args, dev)  # raises its error now, not at the first evaluation
    return dev._replace(level=args.relevance_level, is_regex=args.match == "regex")


def set_up(args, world, sets=BOTH_SETS):
    """Return the RetrieverRun of these flags with everything read and built, from the start or from
    OUT.state.

    sets: which of "train" and "dev" to read. Raises InputError.
    """
    out, files = args.output_dir.rstrip("/"), find_data_files(args)

    # data
    corpus = open_corpus(files.corpus, args.key_template, world)
    if args.positives or args.negatives or args.graded or args.eval_qrels:
        corpus.require_ids("training from qrels")
    queries = read_queries(args.queries)
    data = no_training_data()
    if "train" in sets:
        settings = replace(pick_flags(args, DataSettings), train_data=files.train_data)
        data = read_training(settings, pick_flags(args, TaskSettings), corpus, queries, world.log)
    check_lone_queries(data, args, world)
    dev = read_dev(args, files.eval_data, corpus, queries, world.log) if "dev" in sets else None

    # model
    texts = settle_texts(args.query_encoder, second_encoder(args), pick_flags(args, TextSettings),
                         world.log, is_training=True)
    check_own_prompts(data, texts)
    model = open_model(args, texts, world.device)
    compile_on_gpu(not args.no_compile)
    model.use_texts(texts)
    texts = replace(texts, max_lengths=limit_lengths(texts.max_lengths, model, world.log))
    inputs = hash_inputs(list_inputs(args), world)
    if not args.ranker:
        world.log(describe_texts(args.query_encoder, model, texts))
    flags = settle_retriever_flags(args, out, files, texts, model)
    state = load_state(out, flags, world, FREE_FLAGS, inputs) if args.resume else None

    # optimizer and schedule; --early_exit_steps ends the run before its schedule ends
    updates = count_updates(args, data.dataset_sizes, world)
    optimizer, scheduler = make_optimizer(model, args.lr, args.weight_decay, args.adam_eps,
                                          count_warmup(args, updates), updates)

    # the run, from its start or from the state
    progress = Progress(**state["progress"]) if state else Progress()
    log = RunLog(f"{out}.jsonl", world.is_main, progress.rows)
    run = RetrieverRun(args=args, flags=flags, world=world, out=out,
                       model=wrap_model(model, world), tokenizer=texts.tokenizers["query"],
                       dev=dev, corpus=corpus, chunk_size=flags["chunk_size"],
                       train_set=GroupSet(data.examples, data.group_rules, args.seed),
                       collator=GroupCollator(texts, corpus, args.mask_duplicates),
                       optimizer=optimizer, scheduler=scheduler,
                       last_update=min(updates, args.early_exit_steps or updates), log=log,
                       progress=progress, dataset_sizes=data.dataset_sizes,
                       task_settings=data.task_settings,
                       updates=updates, inputs=inputs)
    if dev:
        check_one_instruction(make_dev_collator(run), dev.tasks)
    if state:
        restore_state(run, state)
    return run


def check_lone_queries(data, args, world):
    """Raise InputError for examples without negatives in batches of one query: there is nothing to
    contrast them with.
    """
    if args.batch_size * world.size > 1 or args.train_group_size == 1:
        return
    for outline, rule in zip(data.examples.outlines(), data.group_rules):
        if outline.num_pos and not outline.num_neg and rule.group_size > 1:
            raise InputError(f"{outline.location}: has no negatives, and a batch of one query has "
                             "no in-batch negatives; give --batch_size 2 or more, or mine some")


def list_inputs(args):
    """Return {path: whether to hash the whole file} for the files that the weights depend on,
    except the checkpoint, whose weights are in OUT.state.
    """
    data = find_data_files(args)
    files = dict.fromkeys([*data.train_data, *args.queries], True)
    if data.eval_data:
        files[data.eval_data] = True
    for spec in [*args.positives, *args.negatives, *args.graded, *args.eval_qrels]:
        files |= dict.fromkeys(list_qrels_files(spec), True)
    return files | dict.fromkeys(data.corpus or [], False)


def check_own_prompts(data, texts):
    """Raise InputError for records with their own prompts if the model leaves its prompt out of the
    pooling, because it leaves out the same number of tokens in every text.
    """
    for outline in data.examples.outlines():
        if texts.skip and outline.instruction is not None:
            raise InputError(f"{outline.location}: has a 'prompt' of its own, but the model leaves "
                             "its one prompt out of the pooling (include_prompt); remove it from "
                             "the records, and give --query_prompt")


def settle_retriever_flags(args, out, files, texts, model):
    """Return {name: value} of the flags with derived values filled in, for args.json and OUT.state.
    """
    chunk_size = args.chunk_size or (32 if args.gradient_checkpointing else 0)
    flags = vars(args) | files._asdict() | {
        "output_dir": out, "chunk_size": chunk_size, "version": texts.version,
        "add_instruction": texts.add_instruction, "query_max_length": texts.max_lengths["query"],
        "key_max_length": texts.max_lengths["key"]}
    if texts.prompts is not None:
        flags |= {"query_prompt": texts.prompts["query"], "key_prompt": texts.prompts["key"]}
    if not args.ranker:
        flags |= {"pooling_method": model.query_encoder.pooling, "dense_metric": model.metric}
    return flags


def count_updates(args, dataset_sizes, world):
    """Return the updates of the schedule; 0 without training data."""
    if not dataset_sizes:
        return 0
    return args.max_steps or len(plan_updates(args, dataset_sizes, 0, world)) * args.epochs


def count_warmup(args, updates):
    """Return the updates of warm-up in a run of `updates` updates; --num_warmup_steps replaces
    --warmup_ratio.
    """
    if args.num_warmup_steps is None:
        return math.ceil(updates * args.warmup_ratio)
    return args.num_warmup_steps


def describe_retriever_run(run):
    """Log the lines that a run starts with."""
    args, texts, log = run.args, run.collator.texts, run.world.log
    data = (f"{len(run.train_set.examples)} training examples of {len(run.dataset_sizes)} "
            f"dataset(s), groups of {run.train_set.group_rules[0].group_size}; "
            f"{'ranker' if args.ranker else 'retriever'}")
    log_start(run, data, "queries", "mean", f"{run.updates} updates",
              count_warmup(args, run.updates))
    note_long_keys(run.train_set.examples, run.collator, log)
    note_prompts(run)
    note_temperature(run)
    tasks = list(used_instructions(run))
    if tasks:
        log(f"{texts.version}'s instructions are put before the texts of {', '.join(tasks)} "
            "(--version none leaves them out)")
    elif texts.settings.names_instructions and texts.version != "none" and texts.add_instruction:
        log(f"note: {texts.version}'s instructions are not used, because no example has a task")


def note_prompts(run):
    """Log how a `prompt` of the records is used."""
    counts = run.train_set.examples.instructions
    num_own = counts.total() - counts[None]
    if num_own and run.args.ranker:
        run.world.log(f"note: 'prompt' of {num_own} records is not used: a ranker has no prompts")
    elif num_own:
        saved = "it is saved as the retriever's prompt"
        if len(counts) > 1:
            saved = "it differs between records, so no prompt is saved with the retriever"
        run.world.log(f"'prompt' of {num_own} records is put before their queries; {saved}")


def note_temperature(run):
    """Log the temperature of the distillation, if it is not the model's own."""
    own = 1.0 if run.args.ranker else run.unwrapped.temperature
    for task, settings in run.task_settings.items():
        temperature = distill_temperature(settings, own)
        if settings.loss == "infonce" or temperature == own:
            continue
        origin = "--student_temperature"
        if not settings.loss:
            origin = f"{own:g} x --student_temperature {settings.student_temperature:g}"
        named = f" of {task}" if task else ""
        run.world.log(f"distillation{named} divides scores by {temperature:g} ({origin})")


def estimate_retriever_cost(run):
    """Log what the run will cost, from a few updates and an evaluation on a part of the dev set or
    of the corpus.
    """
    args, world = run.args, run.world
    seconds = measure_updates(run, plan_run(run, run.progress.epoch), train_update)
    evaluations, eval_seconds = 0, 0.0
    if run.dev is not None:
        dev, corpus, share = sample_dev_set(run.dev, run.corpus, world)
        start = time.time()
        measure_retriever(run.unwrapped, dev, make_dev_collator(run), corpus, args.metrics,
                          args.cutoffs, world)
        eval_seconds = (time.time() - start) / share
        interval = args.eval_steps or args.save_steps
        evaluations = math.ceil(run.last_update / interval) - run.progress.total_updates // interval
    log_cost(run, seconds, evaluations, eval_seconds)


def main(args):
    """Train a retriever with these flags."""
    check_args(args)
    world = start_processes(args.gpus)
    set_seed(args.seed, world.rank)
    transformers.utils.logging.disable_progress_bar()
    claim = claim_folder(args.output_dir.rstrip("/"), args.resume, args.overwrite, world)
    with nullcontext() if args.plan else claim:
        run = set_up(args, world)
        describe_retriever_run(run)
        if args.plan:
            estimate_retriever_cost(run)
            return
        forget_replaced_state(run.out, args.overwrite, world)
        start = time.time()
        while run.progress.total_updates < run.last_update:
            train_epoch(run)
    best = f"; best {run.progress.best_at}" if run.progress.best_at else ""
    world.log(f"done in {time.time() - start:.0f} s{best}; in {run.out}")


if __name__ == "__main__":
    run_script(main, parse_args(__doc__))
