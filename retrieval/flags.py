"""The flags of retrieve.py and of ask.py's search, their defaults, their checks, and the settings
that they make.
"""
import math
from dataclasses import replace

from dense.description import POOLING
from dense.flags import add_encoder_prompt_flags, add_measure_flags, pick_flags
from dense.texts import TEMPLATES, TextSettings, read_trained_flags
from metrics import METRICS
from pages.page import check_page
from records.files import check_paths
from records.templates import INSTRUCTIONS, check_templates
from retrieval.mining import COLLATED, collated_path
from retrieval.search import SEARCHES, BM25Settings, DenseSettings, SearchSettings
from retrieval.words import RULES
from utils import (
    GPUS,
    NO_COMPILE,
    SWITCH,
    InputError,
    Parser,
    check_at_least,
    check_seed,
    resolve_path,
)

HITS = 200  # documents per query


def parse_retrieve_flags(description, arguments=None):
    """Return the flags of retrieve.py from the command line, or from a list of arguments."""
    parser = Parser(description=description)
    add_question_flags(parser)
    add_method_flags(parser)
    add_output_flags(parser)
    add_machine_flags(parser)
    return parser.parse_args(arguments)


def add_question_flags(parser):
    """Add the flags of questions, labels and documents."""
    add = parser.add_argument_group("data").add_argument
    add("--eval_data", metavar="FILE",
        help="questions: JSON records, or a table in one of the forms of docs/formats.md")
    add("--queries", nargs="+", default=[], metavar="FILE",
        help="queries in BEIR's form, instead of --eval_data; with --qrels, only the judged ones "
        "are searched for")
    add("--qrels", action="append", default=[], metavar="qrels=FILE",
        help="labels to measure with, with train_dense.py's filters")
    add_corpus_flags(add)


def add_corpus_flags(add):
    """Add the flags of documents and texts; add: the add_argument of a group."""
    add("--corpus", nargs="+", metavar="FILE",
        help="documents: a .tsv or .csv with a header, such as psgs_w100.tsv, BEIR's .jsonl or "
             "JSON lines; may end in .gz. scripts/make_corpus.py makes one from text files")
    add("--key_template",
        help="the text of a document; default: '{title} {text}', or the checkpoint's value")
    add("--query_template",
        help="the text of a query; default: '{query}', or the checkpoint's value")
    add("--task", default="",
        help="task (qa, chat, ...) of questions without a task; chooses their instruction and the "
        "documents'")
    add("--query_max_length", type=int,
        help="tokens per query; default: 256, or the checkpoint's value")
    add("--key_max_length", type=int,
        help="tokens per document; default: 256, or the checkpoint's value")
    add_encoder_prompt_flags(add)
    add("--add_instruction", **SWITCH,
        help="put --version's instruction before the texts of queries with a task; default: as in "
        "training")
    add("--version", choices=INSTRUCTIONS,
        help="whose instructions to use; default: the checkpoint's, else chosen by its name")
    add("--pair_types", action="store_true",
        help="use token type 1 after a text's first [SEP], as minDPR does for pairs; only needed "
        "for minDPR's file")
    add("--data_root", default="/data/llm-embedder",
        help="folder that llm-embedder:PATH is relative to")


def add_method_flags(parser):
    """Add the flags of the retrieval method."""
    add = parser.add_argument_group("method").add_argument
    add("--retrieval_method", choices=list(SEARCHES), default="dense",
        help="rank: reorder candidates (the records' key, history, or pos and neg, or an earlier "
        "result); random: the baseline; fuse: merge earlier results; run: measure an earlier "
        "result as it is")
    add("--results", nargs="+", default=[], metavar="FILE",
        help="earlier results to rank, fuse or measure: TREC runs or records with ctxs")
    add("--hits", type=int, help="documents per query; default: 200, or all of a saved run")
    add("--query_encoder", default="BAAI/bge-base-en",
        help="retriever (dense, rank), or with --ranker a cross-encoder; the default is an "
        "English model")
    add("--ranker", action="store_true", help="rank with a cross-encoder")
    add("--fusion", choices=["rrf", "weighted"], default=SearchSettings.fusion,
        help="reciprocal rank fusion, or the weighted sum of scores scaled to 0 .. 1")
    add("--fusion_weights", type=float, nargs="+",
        help="one weight per result; default: equal weights")
    add_search_flags(add)


def add_search_flags(add):
    """Add the flags of encoders and indices; add: the add_argument of a group."""
    add("--key_encoder",
        help="separate checkpoint of the document encoder; default: as --query_encoder")
    add("--dense_metric", choices=["ip", "cos", "l2"],
        help="similarity of vectors: inner product, cosine, or (negative) L2 distance; "
        "default: cos, or the checkpoint's value")
    add("--pooling_method", choices=list(POOLING),
        help="how token states become one vector; default: the checkpoint's, else mean or, for "
        "a causal language model, last")
    add("--truncate_dim", type=int, metavar="N",
        help="keep the first N numbers of each vector (Matryoshka); default: all, or the "
        "checkpoint's value")
    add("--index", metavar="DIR",
        help="folder of the corpus's vectors and index, created or reused; default: next to the "
        "corpus")
    add("--overwrite_index", action="store_true",
        help="replace an index in --index that was made with another model, corpus or setting; "
        "without this flag such an index is an error")
    add("--dtype", choices=["float16", "float32"], default=DenseSettings.dtype,
        help="data type of the stored vectors")
    add("--faiss_index_factory", default=DenseSettings.faiss_index_factory,
        help="Flat (exact) or a faiss factory string: IVF4096,PQ64, HNSW32, OPQ16,PQ16 ...")
    add("--train_sample", type=int,
        help="maximum number of vectors to train an index on, per process; default: 40 per list "
        "of an IVF index, at least 200,000")
    add("--nprobe", type=int,
        help="lists to search in an IVF index; default: twice the square root of the number of "
        "lists, and at least as many as hold twice --hits documents")
    add("--efSearch", type=int,
        help="breadth of an HNSW search; default: --hits, at least 64")
    add("--k1", type=float, default=BM25Settings.k1, help="BM25's k1")
    add("--b", type=float, default=BM25Settings.b, help="BM25's b")
    add("--bm25_words", choices=RULES, default=BM25Settings.bm25_words,
        help="bm25s: words of two or more letters or digits, as in bm25s; unicode: words with "
        "combining marks, and pairs of letters in scripts without spaces (Chinese, Japanese, "
        "Korean, Thai, ...); auto: unicode if the corpus has combining marks or letters of such "
        "scripts, else bm25s; the choice is printed when the index is made")
    add("--stopwords", default=BM25Settings.stopwords,
        help="stop words that BM25 ignores: en (English), another language of bm25s (de, fr, es, "
        "...), or none")
    add("--stemmer",
        help="language of the stemmer that BM25 uses (needs the package PyStemmer)")


def add_output_flags(parser):
    """Add the flags of output files and measures."""
    add = parser.add_argument_group("outputs").add_argument
    add("--output", metavar="FILE", help="write reader records with ctxs (.json or .jsonl)")
    add("--trec", metavar="FILE", help="write a TREC run")
    add("--metrics", nargs="+", default=[], metavar="NAME",
        help=f"{', '.join(METRICS)}; {', '.join(COLLATED)} write files next to --eval_data")
    add("--cutoffs", type=int, nargs="+", default=[1, 5, 10, 100], metavar="K",
        help="ranks at which to measure")
    add("--save_name", help="name in the collated files: train.json becomes train.neg.NAME.json")
    add("--max_neg_num", type=int, default=100,
        help="negatives per query that collate_neg and collate_pos keep")
    add("--neg_ranks", type=int, nargs=2, metavar=("FIRST", "LAST"),
        help="take hard negatives from these ranks of the search, counted from 1; default: all")
    add("--neg_max_score", type=float, metavar="S",
        help="take hard negatives with at most this score; default: any")
    add("--neg_margin", type=float, metavar="M",
        help="take hard negatives that score at least M below the positive. If several positives "
        "are found, the lowest score counts; if none is found, the question gets no negatives "
        "(raise --hits)")
    add("--neg_relative_margin", type=float, metavar="R",
        help="like --neg_margin, with a margin of R times the positive's score; 0.05 is "
        "NV-Retriever's 95 per cent")
    add("--filter_answers", default=False, **SWITCH,
        help="leave passages that contain an answer out of collate_neg")
    add_measure_flags(add)
    add("--measures", metavar="FILE", help="write the measures as JSON")
    add("--measures_per_query", metavar="FILE",
        help="write each query's measures: as JSON lines if FILE ends in .jsonl, else as "
        "tab-separated query, measure and value")
    add("--html", metavar="FILE",
        help="write an HTML page with each question and its documents, marking those that contain "
        "an answer or are relevant")


def add_machine_flags(parser):
    """Add the flags of workers, precision, seed and GPUs."""
    add = parser.add_argument_group("run").add_argument
    add("--num_workers", type=int, default=0,
        help="processes that read and tokenise, for each GPU; 2 or 3 keep up with a fast one")
    add("--bf16", default=False, help="encode in bfloat16", **SWITCH)
    add("--seed", type=int, default=42, help="seed of random retrieval and of the training sample")
    add("--no_compile", **NO_COMPILE)
    add("--gpus", **GPUS)


# ---------------------------------------------------------------- settings

def list_corpus_files(args):
    """Return the files of --corpus."""
    return [resolve_path(path, args.data_root) for path in args.corpus or []]


def name_index(args, method):
    """Return --index, or else the folder next to the corpus that is named after the method."""
    if args.index is None and args.corpus:
        return f"{list_corpus_files(args)[0]}.{method}-index"
    return args.index


def choose_hits(args):
    """Return the number of documents per question; None: all of a saved run."""
    if args.hits is None and args.retrieval_method != "run":
        return HITS
    return args.hits


def settle_templates(args, method):
    """Return {query_template, key_template}: given by flags, else used in the encoder's training,
    else the defaults. Raises InputError for a broken args.json or a template that cannot be used.
    """
    given = {name: getattr(args, name) for name in TEMPLATES}
    trained = read_trained_flags(args.query_encoder) if method in ("dense", "rank") else {}
    templates = {name: trained.get(name, default) if given[name] is None else given[name]
                 for name, default in TEMPLATES.items()}
    check_templates(**templates)
    return templates


def read_dense_settings(args, templates):
    """Return the DenseSettings of the flags. templates: what settle_templates returns."""
    texts = replace(pick_flags(args, TextSettings), **templates)
    return replace(pick_flags(args, DenseSettings), texts=texts)


# ---------------------------------------------------------------- checks

def check_retrieve_flags(args):
    """Raise InputError for flags that do not fit together, before anything is read."""
    check_search_flags(args)
    check_at_least(args, {"hits": 1, "max_neg_num": 1, "relevance_level": 1})
    if not all(map(math.isfinite, args.fusion_weights or [])):
        raise InputError("--fusion_weights must be finite numbers, got "
                         f"{' '.join(map(str, args.fusion_weights))}")
    if min(args.cutoffs) < 1:
        raise InputError(f"--cutoffs must be >= 1, got {min(args.cutoffs)}")
    check_metric_names(args)
    check_questions(args)
    check_corpus(args)
    check_method(args)
    check_collated(args)
    check_page(args.html)
    if args.output and args.output.endswith((".csv", ".tsv", ".txt")):
        raise InputError(f"--output {args.output}: contexts are written as JSON lines if the name "
                         "ends in .jsonl, else as JSON; choose such a name")
    outputs = [args.output, args.trec, args.measures, args.measures_per_query, args.html,
               *name_collated_files(args).values()]
    check_paths(outputs, [resolve_path(args.eval_data, args.data_root), *args.queries,
                          *args.results, *list_corpus_files(args),
                          name_index(args, args.retrieval_method), args.query_encoder,
                          args.key_encoder])


def check_search_flags(args):
    """Raise InputError for flags of corpus and search that cannot be used."""
    check_at_least(args, dict.fromkeys(("train_sample", "nprobe", "efSearch", "truncate_dim"), 1))
    check_at_least(args, {"query_max_length": 3, "key_max_length": 3, "num_workers": 0, "k1": 0,
                          "b": 0})
    check_seed(args)
    if args.faiss_index_factory == "Flat" and (args.nprobe or args.efSearch):
        raise InputError("--nprobe and --efSearch are for approximate indices; name one with "
                         "--faiss_index_factory")


def list_measures(args):
    """Return the names in --metrics that are measures."""
    return [name for name in args.metrics if name in METRICS]


def name_collated_files(args):
    """Return {name in --metrics: path} of the collated files, which lie next to --eval_data."""
    eval_data = resolve_path(args.eval_data, args.data_root)
    name = args.save_name or args.retrieval_method
    return {kind: collated_path(eval_data, kind, name) for kind in COLLATED if kind in args.metrics}


def check_metric_names(args):
    """Raise InputError for an unknown name, or a file of measures without a measure."""
    for name in args.metrics:
        if name not in METRICS and name not in COLLATED:
            raise InputError(f"--metrics {name}: unknown, choose from "
                             f"{', '.join([*METRICS, *COLLATED])}")
    for flag in ("measures", "measures_per_query"):
        if getattr(args, flag) and not list_measures(args):
            raise InputError(f"--{flag} writes measures: give --metrics, from {', '.join(METRICS)}")


def check_questions(args):
    """Raise InputError for questions without outputs, or outputs without questions."""
    has_questions = bool(args.eval_data or args.queries
                         or args.retrieval_method == "run" and args.qrels)
    has_outputs = bool(args.output or args.trec or args.metrics or args.html)
    makes_index = args.retrieval_method in ("bm25", "dense")
    if args.eval_data and args.queries:
        raise InputError("--eval_data and --queries both name questions; give one of them")
    if not has_questions and (has_outputs or not makes_index):
        raise InputError("no questions: give --eval_data or --queries (bm25 and dense without "
                         "questions and outputs only make the index)")
    if has_questions and not has_outputs:
        raise InputError("nothing to do with the result: give --output, --trec, --metrics or "
                         "--html")


def check_corpus(args):
    """Raise InputError if the documents are needed and --corpus is missing."""
    if args.corpus:
        return
    if args.retrieval_method == "run":
        needs_texts = args.output or args.html or {"nq", *COLLATED} & {*args.metrics}
        if not args.qrels or needs_texts:
            raise InputError("a run is measured by --qrels; --output, --html, collated files and "
                             "the metric nq need the passages: give --corpus")
        return
    if args.retrieval_method != "rank" or args.results:
        raise InputError(f"--retrieval_method {args.retrieval_method} needs --corpus")
    needs_texts = args.output or args.html or "nq" in args.metrics
    excludes = args.exclude_self and "collate_score" not in args.metrics
    if needs_texts or args.trec or args.qrels or excludes:
        raise InputError("--output, --trec, --html, --qrels, --exclude_self and the metric nq need "
                         "the passages: give --corpus")


def check_method(args):
    """Raise InputError for flags that belong to another --retrieval_method."""
    method = args.retrieval_method
    if args.ranker and (args.query_prompt or args.key_prompt or args.truncate_dim):
        raise InputError("--query_prompt, --key_prompt and --truncate_dim are for encoders, not "
                         "for a ranker: leave them out")
    if args.ranker and method != "rank":
        raise InputError("--ranker scores given candidates: use --retrieval_method rank")
    if args.results and method not in ("rank", "fuse", "run"):
        raise InputError("--results are for --retrieval_method rank or run (one) and fuse (two or "
                         "more)")
    if method == "rank" and len(args.results) > 1:
        raise InputError("--retrieval_method rank orders one file of --results; fuse merges two or "
                         "more")
    if method == "run" and len(args.results) != 1:
        raise InputError("--retrieval_method run takes one file of --results")
    if method == "fuse":
        has_other_weights = args.fusion_weights and len(args.fusion_weights) != len(args.results)
        if len(args.results) < 2 or has_other_weights:
            raise InputError("--retrieval_method fuse needs two or more --results, and as many "
                             "--fusion_weights if given")


def check_collated(args):
    """Raise InputError for collated files that cannot be made with these flags."""
    if {*COLLATED} & {*args.metrics} and not args.eval_data:
        raise InputError("collated files are written next to --eval_data: give it")
    check_negatives(args)
    if "collate_pos" in args.metrics:
        check_collate_pos(args)
    if "collate_score" not in args.metrics:
        return
    if args.retrieval_method != "rank" or args.results:
        raise InputError("collate_score scores the records' own candidates: use --retrieval_method "
                         "rank without --results")
    if args.output or args.trec or args.html or len(args.metrics) > 1:
        raise InputError("collate_score may score other candidates than are ranked: give it as the "
                         "only output")


def check_negatives(args):
    """Raise InputError for limits of hard negatives that are unused or that no hit can meet."""
    given = [name for name in ("neg_ranks", "neg_max_score", "neg_margin", "neg_relative_margin")
             if getattr(args, name) is not None]
    if given and not {"collate_neg", "collate_pos"} & set(args.metrics):
        raise InputError(f"--{given[0]} is for mined negatives: give --metrics collate_neg or "
                         "collate_pos")
    if args.neg_max_score is not None and not math.isfinite(args.neg_max_score):
        raise InputError(f"--neg_max_score must be a finite number, got {args.neg_max_score}")
    check_at_least(args, {"neg_margin": 0, "neg_relative_margin": 0})
    if args.neg_ranks is None:
        return
    first, last = args.neg_ranks
    if not 1 <= first <= last:
        raise InputError("--neg_ranks must be two ranks >= 1, the lower one first, got "
                         f"{first} {last}")
    hits = choose_hits(args)
    if hits is not None and first > hits:
        raise InputError(f"--neg_ranks {first} {last} are beyond the {hits} documents that are "
                         "searched for: raise --hits")


def check_collate_pos(args):
    """Raise InputError if positives would not be found in the corpus, or be mined as negatives."""
    if args.retrieval_method == "rank" and not args.results:
        raise InputError("collate_pos looks for answers in documents of the corpus: search it, or "
                         "rank an earlier result with --results")
    if "collate_neg" in args.metrics:
        raise InputError("collate_pos mines negatives too, and collate_neg would mine its "
                         "positives as negatives: leave collate_neg out, or mine more with the "
                         f"file {name_collated_files(args)['collate_pos']} as --eval_data")
