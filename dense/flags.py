"""The flags of train_dense.py and their checks. The names are those of LLM-Embedder's, Trove's and
minDPR's commands.
"""
from dataclasses import fields
from typing import NamedTuple

from dense.description import POOLING
from metrics import METRICS
from records.reading import LARGEST
from records.templates import INSTRUCTIONS, check_templates
from training.adapters import add_lora_flags, read_lora_flags
from training.loop import BOTH_SETS, check_rates
from utils import (
    GPUS,
    NO_COMPILE,
    OVERWRITE,
    RESUME,
    SWITCH,
    TQDM,
    InputError,
    Parser,
    check_at_least,
    check_positive,
    check_seed,
    find_files,
    resolve_path,
)


def parse_retriever_flags(description, arguments=None, needs_output=True):
    """Return the flags as a Namespace, of the command line or of a list of arguments.

    needs_output: whether --output_dir is required; federate.py sets the folder itself.
    """
    parser = Parser(description=description)
    add_data_flags(parser)
    add_evaluation_flags(parser)
    add_text_flags(parser)
    add_model_flags(parser)
    add_loss_flags(parser)
    add_optimisation_flags(parser)
    add_run_flags(parser, needs_output)
    return parser.parse_args(arguments)


def add_data_flags(parser):
    """Add the flags of the training data."""
    add = parser.add_argument_group("data").add_argument
    add("--train_data", nargs="+", default=[], metavar="FILE",
        help="records of LLM-Embedder, DPR, Tevatron or FlagEmbedding, triplets, tables of "
        "triples, or a reader's records with the scores of test.py --scores or lm_score.py; a "
        "file given twice counts twice")
    add("--corpus", nargs="+", metavar="FILE",
        help="documents: .tsv or .csv with a header, BEIR's .jsonl or JSON lines; .gz is read, too")
    add("--queries", nargs="+", default=[], metavar="FILE",
        help="texts of the queries that qrels or triples name by id: BEIR's .jsonl, or .tsv of id "
        "and text")
    add("--positives", action="append", default=[], metavar="qrels=FILE,min_score=1",
        help="positive documents, with Trove's filters min_score, max_score (exclusive), first_k, "
        "random_k, top_k, bottom_k, score=NUMBER|floor|ceil, query_subset; repeatable")
    add("--negatives", action="append", default=[], metavar="qrels=FILE,max_score=1",
        help="negative documents, with the same filters")
    add("--graded", action="append", default=[], metavar="qrels=FILE",
        help="documents with graded labels, with the same filters; trained by KL")
    add("--data_root", default="/data/llm-embedder",
        help="folder that llm-embedder:PATH is relative to")
    add("--max_sample_num", type=int,
        help="use at most this many examples of a dataset; default: all")
    add("--inbatch_same_dataset", choices=["epoch", "random"],
        help="draw each batch from one dataset: epoch uses every example once, random draws "
        "datasets by size; default: mix datasets")
    add("--num_workers", type=int, default=0,
        help="processes that tokenise, for each GPU; 2 or 3 keep up with a fast one")
    add("--no_shuffle", action="store_true", help="keep the order of the examples")


def add_evaluation_flags(parser):
    """Add the flags of the dev set and its measures."""
    add = parser.add_argument_group("evaluation").add_argument
    add("--eval_data", metavar="FILE",
        help="records to measure on: DPR's, or any with positives and negatives if there is no "
        "--corpus, are measured by average rank; all others by retrieval from --corpus")
    add("--eval_qrels", action="append", default=[], metavar="qrels=FILE",
        help="qrels to measure on; repeatable")
    add("--eval_method", choices=["annotated", "retrieval"], default="annotated",
        help="how to measure --eval_qrels: rank each query's annotated documents, or search the "
        "whole corpus")
    add("--eval_group_size", type=int, default=100,
        help="annotated documents per query; the most relevant ones are kept")
    add("--metrics", nargs="+", default=["mrr", "recall", "ndcg"], metavar="NAME",
        help=f"metrics to report: any of {', '.join(METRICS)}")
    add("--cutoffs", type=int, nargs="+", default=[1, 5, 10, 100], metavar="K",
        help="ranks at which to measure")
    add_measure_flags(add)
    add("--best_metric", metavar="NAME@K",
        help="metric that selects the checkpoint; default: the first metric at the first cutoff "
        "of 10 or more, or the average rank")


def add_text_flags(parser):
    """Add the flags of templates, prompts and lengths of texts."""
    add = parser.add_argument_group("texts").add_argument
    add("--query_template", default="{query}", help="the text of a query")
    add("--key_template", default="{title} {text}",
        help="the text of a document; DPR's pair is '{title} [SEP] {text}'")
    add("--pair_types", action="store_true",
        help="use token type 1 after a text's first [SEP], as minDPR does for pairs")
    add("--query_max_length", type=int,
        help="tokens per query; default: 256, or the checkpoint's value")
    add("--key_max_length", type=int,
        help="tokens per document; default: 256, or the checkpoint's value")
    add_encoder_prompt_flags(add)
    add("--add_instruction",
        help="put --version's instruction before the texts of records with a task; default: true, "
        "unless the checkpoint has prompts", **SWITCH)
    add("--version", choices=INSTRUCTIONS,
        help="whose instructions to use; default: bge, unless the checkpoint has prompts")


def add_model_flags(parser):
    """Add the flags of the model to start from, and of how it makes vectors."""
    add = parser.add_argument_group("model").add_argument
    add("--query_encoder", default="BAAI/bge-base-en",
        help="checkpoint to start from: hub name, folder, minDPR's or DPR's file; the default is "
        "an English model")
    add("--key_encoder",
        help="checkpoint of the second encoder, with --tie_encoders false; default: "
        "--query_encoder's")
    add("--tie_encoders", default=True, help="one encoder for queries and keys", **SWITCH)
    add("--pooling_method", choices=list(POOLING),
        help="how token states become one vector; default: the checkpoint's value, else mean, or "
        "last for a causal language model")
    add("--truncate_dim", type=int, metavar="N",
        help="train the first N numbers of each vector (Matryoshka); default: all, or the "
        "checkpoint's value")
    add("--dense_metric", choices=["ip", "cos", "l2"],
        help="similarity of vectors: inner product, cosine, or (negative) L2 distance; "
        "default: cos, or the checkpoint's value")
    add("--cos_temperature", type=float, default=0.01,
        help="divide cosines by this in training; for distillation see --student_temperature")
    add("--dropout", type=float, help="dropout rate; default: the checkpoint's value")
    add_lora_flags(add, SWITCH)
    add("--freeze", metavar="REGEX",
        help="do not train weights whose names match this regular expression")
    add("--ranker", action="store_true",
        help="train a cross-encoder that reads query and key together")


def add_loss_flags(parser):
    """Add the flags of the loss, and of the keys that it compares."""
    add = parser.add_argument_group("loss").add_argument
    add("--loss", choices=["infonce", "kl", "fid-kd", "emdr2"],
        help="train with only this loss; default: the weighted sum of InfoNCE and, for records "
        "with teacher scores, distillation")
    add("--contrastive_weight", type=float, default=0.2,
        help="weight of InfoNCE when combined with distillation")
    add("--distill_weight", type=float, default=1.0,
        help="weight of distillation when combined with InfoNCE")
    add("--teacher_temperature", type=float, default=1.0,
        help="divide teacher scores or labels by this")
    add("--student_temperature", type=float,
        help="divide the model's scores by this in distillation. With --loss kl, fid-kd or emdr2 "
        "it replaces --cos_temperature. Without --loss, cosines are divided by both, as in "
        "LLM-Embedder; default: --cos_temperature for cosines, else the checkpoint's value, else 1")
    add("--stable_distill", default=False,
        help="use LLM-Embedder's stabilized distillation", **SWITCH)
    add("--mask_duplicates", action="store_true",
        help="do not count copies of a query's positives as its negatives")
    add("--train_group_size", "--group_size", type=int, default=8,
        help="keys per query: a positive and its negatives")
    add("--select_positive", choices=["first", "random", "teacher", "teacher-pos"], default="first",
        help="which positive of a record to train on")
    add("--select_negative", choices=["first", "random", "teacher+", "teacher-"], default="random",
        help="which negatives of a record to train on, or which of its keys if it has no "
        "positives")
    add("--reader_scores", action="store_true",
        help="treat the 'score' of ctxs as a reader's score, in files without 'retrieval_score', "
        "such as FiD's own with cross-attention scores")
    add("--teacher_scores_margin", type=float, metavar="M",
        help="drop records whose highest and lowest teacher scores differ by less than M")
    add("--teacher_scores_min", type=float, metavar="S",
        help="drop records whose highest teacher score is below S")
    add("--use_train_config", default=False, help="use LLM-Embedder's settings for each task",
        **SWITCH)


def add_optimisation_flags(parser):
    """Add the flags of batches, schedule and optimizer."""
    add = parser.add_argument_group("optimisation").add_argument
    add("--batch_size", "--per_device_train_batch_size", type=int, default=16,
        help="queries per process and micro-batch")
    add("--grad_accumulation", "--gradient_accumulation_steps", type=int, default=1, metavar="N",
        help="micro-batches per update; they do not share negatives")
    add("--chunk_size", type=int, default=0,
        help="GradCache: encode this many texts at a time, so that any batch fits in memory; 0: "
        "all at once")
    add("--gradient_checkpointing", default=False, help="the same as --chunk_size 32", **SWITCH)
    add("--epochs", "--num_train_epochs", type=int, default=3, help="passes over the examples")
    add("--max_steps", type=int, default=0,
        help="total updates, overrides --epochs; 0: train for --epochs")
    add("--early_exit_steps", type=int, default=0,
        help="stop after this many updates of the schedule; 0: never")
    add("--lr", "--learning_rate", type=float, default=5e-6,
        help="peak learning rate of the linear schedule")
    add("--warmup_ratio", type=float, default=0.1, help="fraction of the updates used for warm-up")
    add("--num_warmup_steps", type=int, help="updates of linear warm-up; replaces --warmup_ratio")
    add("--weight_decay", type=float, default=0.01, help="AdamW's weight decay, on all weights")
    add("--adam_eps", type=float, default=1e-8, help="AdamW's epsilon")
    add("--clip", "--max_grad_norm", type=float, default=1.0, help="maximum gradient norm")
    add("--bf16", default=False, help="bfloat16 autocast; weights and optimizer stay float32",
        **SWITCH)
    add("--deepspeed", metavar="FILE",
        help="ignored; accepted because LLM-Embedder's commands have it. Its stage 0 equals DDP")


def add_run_flags(parser, needs_output):
    add = parser.add_argument_group("run").add_argument
    add("--output_dir", required=needs_output,
        help="folder to write the best retriever to; OUT.jsonl and OUT.state are written next to "
        "it")
    add("--save_steps", type=int, default=2000,
        help="save OUT.state, and OUT if nothing is measured, every N updates")
    add("--eval_steps", type=int, default=0,
        help="measure every N updates; 0: every --save_steps")
    add("--logging_steps", type=int, default=100,
        help="print the loss every N updates; without a terminal, progress is printed about every "
        "minute, too")
    add("--seed", type=int, default=42,
        help="seed of the order and the groups; seed + rank is the seed of dropout")
    add("--resume", **RESUME)
    add("--overwrite", **OVERWRITE)
    add("--plan", action="store_true",
        help="estimate the cost of the run (hours, memory, disk) from a few updates, and stop; "
        "OUT is not touched")
    add("--tqdm", **TQDM)
    add("--no_compile", **NO_COMPILE)
    add("--gpus", **GPUS)


# ---------------------------------------------------------------- checks

def check_retriever_flags(args, sets=BOTH_SETS):
    """Raise InputError for flags that cannot work.

    sets: see set_up in train_dense.py.
    """
    check_numbers(args)
    check_templates(args.query_template, args.key_template)
    check_metrics(args)
    check_training_data(args, sets)
    check_unused(args)
    check_evaluation(args)
    find_data_files(args)


class DataFiles(NamedTuple):
    """Hold the files that the flags of the same names resolve to, from patterns and llm-embedder:
    paths.
    """
    train_data: list
    corpus: list | None
    eval_data: str | None


def find_data_files(args):
    """Return the DataFiles of the flags. Raises InputError for a file that does not exist."""
    root = args.data_root
    train_data = [file for path in args.train_data for file in find_files(path, root)]
    corpus = [file for path in args.corpus or [] for file in find_files(path, root)]
    return DataFiles(train_data, corpus or None, resolve_path(args.eval_data, root))


def check_numbers(args):
    """Raise InputError for a number out of its range."""
    check_at_least(args, {"train_group_size": 1, "batch_size": 1, "grad_accumulation": 1,
                          "epochs": 1, "save_steps": 1, "logging_steps": 1, "query_max_length": 3,
                          "key_max_length": 3, "eval_group_size": 1, "chunk_size": 0,
                          "relevance_level": 1, "max_steps": 0, "eval_steps": 0,
                          "early_exit_steps": 0, "num_workers": 0})
    check_at_least(args, {"max_sample_num": 0, "truncate_dim": 1, "num_warmup_steps": 0,
                          "weight_decay": 0, "adam_eps": 0, "contrastive_weight": 0,
                          "distill_weight": 0, "teacher_scores_margin": 0,
                          "teacher_scores_min": -LARGEST})
    check_positive(args, ["lr", "clip", "cos_temperature", "teacher_temperature"])
    if args.student_temperature is not None:
        check_positive(args, ["student_temperature"])
    check_seed(args)
    check_rates(args.dropout, args.warmup_ratio)
    read_lora_flags(vars(args))


def check_metrics(args):
    """Raise InputError for an unknown metric or an impossible cutoff."""
    for name in args.metrics:
        if name not in METRICS:
            raise InputError(f"--metrics must be any of {', '.join(METRICS)}, got {name}")
    if min(args.cutoffs) < 1:
        raise InputError(f"--cutoffs must be >= 1, got {min(args.cutoffs)}")


def check_training_data(args, sets):
    """Raise InputError for data flags that need another flag, or that exclude each other."""
    if "train" in sets and not (args.train_data or args.positives or args.graded):
        raise InputError("nothing to train on: give --train_data, or --corpus, --queries and "
                         "--positives or --graded")
    names_qrels = args.eval_qrels if "dev" in sets else None
    if "train" in sets:
        names_qrels = names_qrels or args.positives or args.graded
    if names_qrels and not (args.corpus and args.queries):
        raise InputError("qrels need --corpus and --queries, the files of the texts")
    if args.graded and (args.positives or args.train_data or args.loss == "infonce"):
        raise InputError("--graded trains by KL on its own labels; leave out --positives, "
                         "--train_data and --loss infonce")


def check_unused(args):
    """Raise InputError for flags that have no effect because of others."""
    if args.ranker and args.mask_duplicates:
        raise InputError("--mask_duplicates masks other queries' negatives, which a ranker does "
                         "not read; leave it out")
    if args.ranker and args.query_template != "{query}":
        raise InputError("--query_template is for encoders, and a ranker reads the query as it "
                         "is; leave it out")
    if args.ranker and (args.query_prompt or args.key_prompt or args.truncate_dim):
        raise InputError("--query_prompt, --key_prompt and --truncate_dim are for encoders, not "
                         "for a ranker; leave them out")
    if args.stable_distill and args.student_temperature not in (None, 1):
        raise InputError("--stable_distill does not use --student_temperature; leave one of them "
                         "out")


def check_evaluation(args):
    """Raise InputError for a dev set that a ranker cannot be measured on."""
    if args.ranker and (args.eval_data or args.eval_method == "retrieval"):
        raise InputError("a ranker is measured on annotated documents; give --eval_qrels without "
                         "--eval_method retrieval")


def pick_flags(args, settings):
    """Return an instance of a dataclass of settings, such as TextSettings, with each field set from
    the flag of its name. Fields without a flag in the script keep their default.
    """
    names = [field.name for field in fields(settings) if field.name in args]
    return settings(**{name: getattr(args, name) for name in names})


def add_encoder_prompt_flags(add):
    """Add the flags of the prompts; `add` is an argument group's add_argument."""
    add("--query_prompt", metavar="TEXT",
        help="put TEXT before every query ('' for nothing); default: the checkpoint's prompt, else "
        "--version's instruction")
    add("--key_prompt", metavar="TEXT",
        help="put TEXT before every document ('' for nothing); default: as for --query_prompt")


def add_measure_flags(add):
    """Add the flags that change what a measure counts; `add` is an argument group's add_argument.
    """
    add("--relevance_level", type=int, default=1, metavar="N",
        help="lowest label that counts as relevant (trec_eval's -l). nDCG still uses the labels "
        "as gains; a filter such as min_score=2 would remove them")
    add("--match", choices=["string", "regex"], default="string",
        help="how to find an answer in a passage: as a string, or as a regular expression "
        "(CuratedTREC; DPR's --match)")
    add("--exclude_self", action="store_true",
        help="remove the document with the query's own id from the ranking (ArguAna, Quora)")
