"""Retrieval: from a corpus and questions to ranked contexts, measures and mined negatives.

    python retrieve.py --retrieval_method bm25 --corpus psgs_w100.tsv --eval_data nq-dev.json --output dev.json --metrics nq
    torchrun --standalone --nproc_per_node=8 retrieve.py --corpus psgs_w100.tsv --index wiki.index --query_encoder runs/dpr \
        --eval_data nq-test.csv --hits 100 --output test.json --metrics nq --gpus 0,1,2,3,4,5,6,7

Dense retrieval encodes the corpus into --index, resuming after a kill, and searches it exactly (Flat), a tile of the memory-mapped
vectors at a time, or with the faiss index that --faiss_index_factory names. Equal scores are ranked by place in the corpus. Without
questions the index is made, no more.
"""
import argparse
import os
import time
from datetime import timedelta

import bm25s
import numpy as np
import torch
import transformers
from tqdm import tqdm

from checkpoints import load_tokenizer
from collate import (COLLATED, candidates, check_candidates, check_outputs, collate, collated_paths, key_texts,
                     number_candidates)
from corpus import check_templates, open_corpus, read_queries
from dense_args import SWITCH, resolve_path
from dense_data import INSTRUCTIONS, GroupCollator, named_version
from embed import await_index, check_fingerprint, encode_corpus, fingerprint
from metrics import METRICS
from qrels import merge_qrels
from results import (Query, Results, fuse, mark_answers, measure, read_labels, read_questions, read_run, stack, write_contexts,
                     write_run)
from retriever import BiEncoder, CrossEncoder, limit_lengths
from search import (best_by_place, bm25_words, build_bm25, load_bm25, merge_processes, open_indices, part_range, search_exactly,
                    search_indices)
from utils import HelpFormatter, InputError, gather_lists, lock, read_args, run_script, start_processes, wait_for_all, write_json

METHODS = ("dense", "bm25", "rank", "random", "fuse")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument_group("data").add_argument
    add("--eval_data", metavar="FILE", help="questions: records, DPR's .csv of questions and answers, or id and text")
    add("--queries", nargs="+", default=[], metavar="FILE", help="queries in BEIR's form, in place of --eval_data")
    add("--qrels", action="append", default=[], metavar="qrels=FILE", help="labels to measure with, with train_dense.py's filters")
    add("--corpus", nargs="+", metavar="FILE", help="documents: psgs_w100.tsv, BEIR's .jsonl or JSON lines, may end in .gz")
    add("--key_template", help="the text of a document; not given: the checkpoint's, else '{title} {text}'")
    add("--task", default="", help="task (qa, chat ...) whose instruction questions that name none get, and the documents")
    add("--query_max_length", type=int, help="tokens per query; not given: the checkpoint's, else 256")
    add("--key_max_length", type=int, help="tokens per document; not given: the checkpoint's, else 256")
    add("--add_instruction", help="--version's instruction before texts whose query has a task; not given: as in training", **SWITCH)
    add("--version", choices=INSTRUCTIONS, help="whose instructions; not given: the checkpoint's, else by its name")
    add("--pair_types", action="store_true", help="token type 1 after a text's first [SEP], for minDPR's file; our folders know")
    add = parser.add_argument_group("method").add_argument
    add("--retrieval_method", choices=METHODS, default="dense", help="rank orders given candidates: the records' key, history, "
        "or pos and neg, or an earlier result; fuse merges earlier results")
    add("--results", nargs="+", default=[], metavar="FILE", help="earlier results to rank or fuse: TREC runs or records with ctxs")
    add("--hits", type=int, default=200, help="documents per query")
    add("--query_encoder", default="BAAI/bge-base-en", help="retriever (dense, rank) or, with --ranker, cross-encoder")
    add("--key_encoder", help="encoder of the documents, if it is a checkpoint of its own")
    add("--ranker", action="store_true", help="rank with a cross-encoder")
    add("--dense_metric", choices=["ip", "cos", "l2"], help="not given: the checkpoint's, else cos")
    add("--pooling_method", choices=["cls", "mean", "last"], help="not given: the checkpoint's, else cls")
    add("--index", metavar="DIR", help="folder of the corpus's vectors and index, made or reused; not given: beside the corpus")
    add("--dtype", choices=["float16", "float32"], default="float16", help="numbers of the stored vectors")
    add("--faiss_index_factory", default="Flat", help="Flat (exact) or a faiss factory string: IVF4096,PQ64, HNSW32, OPQ16,PQ16 ...")
    add("--train_sample", type=int, help="vectors that an index, or each process's part, is trained on at most; "
        "not given: 40 per list of an IVF index, 200,000 at least")
    add("--nprobe", type=int, help="lists that an IVF index searches")
    add("--efSearch", type=int, help="breadth of an HNSW search")
    add("--k1", type=float, default=0.9, help="BM25's k1")
    add("--b", type=float, default=0.4, help="BM25's b")
    add("--stopwords", default="en", help="words that BM25 leaves out: a language of bm25s, or none")
    add("--stemmer", help="language whose PyStemmer stemmer BM25 uses (needs the package PyStemmer)")
    add("--fusion", choices=["rrf", "weighted"], default="rrf", help="reciprocal rank, or sum of scores scaled to 0 .. 1")
    add("--fusion_weights", type=float, nargs="+", help="one per result; not given: equal")
    add = parser.add_argument_group("outputs").add_argument
    add("--output", metavar="FILE", help="reader records with ctxs, .json or .jsonl")
    add("--trec", metavar="FILE", help="TREC run")
    add("--metrics", nargs="+", default=[], metavar="NAME",
        help=f"{', '.join(METRICS)}; {', '.join(COLLATED)} write LLM-Embedder's files")
    add("--cutoffs", type=int, nargs="+", default=[1, 5, 10, 100], metavar="K", help="ranks that the metrics look at")
    add("--save_name", help="name in the collated files: train.json becomes train.neg.NAME.json")
    add("--max_neg_num", type=int, default=100, help="negatives per query that collate_neg keeps")
    add("--filter_answers", default=False, help="collate_neg leaves out passages that hold an answer", **SWITCH)
    add("--measures", metavar="FILE", help="write the measures as JSON")
    add("--data_root", default="/data/llm-embedder", help="what llm-embedder:PATH is relative to")
    add = parser.add_argument_group("run").add_argument
    add("--num_workers", type=int, default=0, help="processes that read and tokenise")
    add("--bf16", default=False, help="encode in bfloat16", **SWITCH)
    add("--seed", type=int, default=42, help="seed of random retrieval and of the training sample")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES, for example 0,1; empty runs on the CPU")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- searching

def search_bm25(args, corpus, queries, world):
    """BM25 by bm25s; each process scores a strided share of the queries."""
    wanted = fingerprint(corpus, None, {"model": "bm25", "k1": args.k1, "b": args.b, "stopwords": args.stopwords, "stemmer": args.stemmer,
                                        "template": corpus.template})
    words = bm25_words(None if args.stopwords == "none" else args.stopwords, args.stemmer)
    if world.is_main and not check_fingerprint(args.index, wanted):
        with lock(args.index):
            if not check_fingerprint(args.index, wanted):
                build_bm25(args.index, corpus, words, args.k1, args.b)
                write_json(os.path.join(args.index, "index.json"), wanted)
    await_index(args.index, wanted, world)
    if not queries:
        return None
    index, own, rows = load_bm25(args.index), range(world.rank, len(queries), world.size), []
    tokens = bm25s.tokenize([queries[i].text for i in own], return_ids=False, show_progress=False, **words)
    for i, query in zip(tqdm(own, desc="searching", leave=False, disable=None if world.is_main else True), tokens):
        numbers, scores = best_by_place(index.get_scores_from_ids(index.get_tokens_ids(query)), args.hits)
        rows.append((i, numbers[scores > 0], scores[scores > 0]))  # a document without a word of the query is no hit
    return stack(gather_lists(rows, world))


def search_dense(args, corpus, queries, world):
    """Dense retrieval: the corpus's vectors, each process searching its part for all queries; the main one merges the best."""
    model, collator = open_retriever(args, corpus, world)
    tasks = sorted({query.task for query in queries} or {args.task})
    if len({collator.instruction(task)[1] for task in tasks}) > 1:
        raise InputError(f"questions of the tasks {', '.join(tasks)} want other instructions before the documents; one index has one: "
                         "search task by task, or leave instructions out with --add_instruction false")
    task = tasks[0]
    say_instructions(args, collator, tasks, world.say)
    wanted = fingerprint(corpus, args.key_encoder or args.query_encoder, {
        "template": corpus.template, "max_length": args.key_max_length, "metric": model.metric, "dtype": args.dtype, "bf16": args.bf16,
        "pooling": args.pooling_method, "separator": model.query_encoder.separator, "instruction": collator.instruction(task)[1]})
    vectors = encode_corpus(model, corpus, lambda texts: collator.keys(texts, [task] * len(texts)), args.index, args.dtype, world,
                            wanted, args.num_workers, args.bf16)
    metric, quiet = "l2" if model.metric == "l2" else "ip", not world.is_main
    if args.faiss_index_factory != "Flat":
        indices = open_indices(args.index, vectors, args.faiss_index_factory, metric, args.train_sample, args.seed, world)
    if not queries:
        return None
    parts = [queries[i:i + 512] for i in range(0, len(queries), 512)]
    with torch.no_grad():
        asked = torch.cat([model.encode(collator.queries([q.text for q in part], [q.task for q in part]), "query").float()
                           for part in tqdm(parts, desc="encoding questions", leave=False, disable=True if quiet else None)])
    if not asked.isfinite().all():
        raise InputError(f"{args.query_encoder}: question {int(asked.isfinite().all(1).int().argmin())} gets a vector that is not finite; "
                         "the checkpoint is broken")
    if args.faiss_index_factory == "Flat":
        found = search_exactly(vectors, asked, *part_range(len(vectors), world.rank, world.size), args.hits, metric, quiet)
    else:
        found = search_indices(indices, asked, args.hits, metric, {"nprobe": args.nprobe, "efSearch": args.efSearch})
    found = merge_processes(*found, args.hits, world)
    return Results(*found) if world.is_main else None


def open_retriever(args, corpus, world):
    """(BiEncoder or CrossEncoder, collator) of the flags."""
    if args.ranker:
        model = CrossEncoder.open(args.query_encoder, trained=True)
    else:
        model = BiEncoder.open(args.query_encoder, args.key_encoder, pooling=args.pooling_method, metric=args.dense_metric, trained=True)
        args.pooling_method = model.query_encoder.pooling
    fallback = "bert-base-uncased" if os.path.isfile(args.query_encoder) else args.query_encoder  # minDPR's and DPR's files
    tokenizer = load_tokenizer(args.query_encoder, fallback)
    for encoder in model.encoders.values() if args.pair_types and not args.ranker else ():
        encoder.separator = tokenizer.sep_token_id
    limit_lengths(args, [model] if args.ranker else model.encoders.values(), world.say)
    instructions = INSTRUCTIONS[args.version] if args.add_instruction else {}
    return model.to(world.device).eval(), GroupCollator(tokenizer, args, corpus, instructions)


def search_candidates(args, corpus, queries, world):
    """Candidates in the model's order: an earlier result's documents, or, by their places, the records' candidates."""
    earlier, scored = read_run(args.results[0], queries, corpus, world.say) if args.results else None, "collate_score" in args.metrics
    if not earlier:  # their own
        check_candidates(queries, corpus, args.key_template, bool(args.output or args.trec or set(args.metrics) & set(METRICS)), scored)
    model, collator = open_retriever(args, corpus, world)
    if not args.ranker:
        say_instructions(args, collator, sorted({query.task for query in queries}), world.say)
    rows = []
    for i in tqdm(range(world.rank, len(queries), world.size), desc="ranking", leave=False, disable=None if world.is_main else True):
        query = queries[i]
        if earlier:
            numbers = earlier.row(i)[0]
            texts = [corpus.text(number) for number in numbers]
        else:
            texts = key_texts(query, candidates(query.record, scored)[0], args.key_template)
            numbers = range(len(texts))
        if not numbers:
            rows.append((i, np.zeros(0, int), np.zeros(0)))
            continue
        with torch.no_grad(), torch.autocast(world.device.type, torch.bfloat16, enabled=args.bf16):
            if args.ranker:
                scores = model(collator.pairs([query.text] * len(texts), texts))
            else:
                asked = model.encode(collator.queries([query.text], [query.task]), "query")
                scores = model.score(asked, model.encode(collator.keys(texts, [query.task] * len(texts)), "key"))[0]
        scores = scores.float().cpu().numpy()
        order = np.lexsort((numbers, -scores))[:None if scored else args.hits]
        rows.append((i, np.array(numbers)[order], scores[order]))
    return stack(gather_lists(rows, world))


def say_instructions(args, collator, tasks, say):
    """Says whose instructions are put before the texts, or that none are though the model is known for them."""
    if any(map(any, map(collator.instruction, tasks))):
        say(f"{args.version}'s instructions are put before the texts of {', '.join(tasks)}")
    elif args.instructed and args.add_instruction and not any(tasks):
        say(f"note: no question names a task, so that {args.version}'s instructions are not used; give --task")


def search_random(args, corpus, queries, world):
    """Documents drawn at random, by seed and query, the same for any number of processes: the baseline of every measure."""
    count = min(args.hits, len(corpus))
    rows = [np.random.default_rng([args.seed, i]).choice(len(corpus), count, replace=False) for i in range(len(queries))]
    return Results(np.stack(rows), np.tile(-np.arange(count, dtype=np.float32), (len(queries), 1)))


def search_fused(args, corpus, queries, world):
    """Earlier results merged into one."""
    weights = args.fusion_weights or [1.0] * len(args.results)
    if len(args.results) < 2 or len(weights) != len(args.results):
        raise InputError("--retrieval_method fuse needs two or more --results, and one of --fusion_weights for each")
    return fuse([read_run(path, queries, corpus, world.say) for path in args.results], args.fusion, weights, args.hits)


SEARCHES = dict(zip(METHODS, (search_dense, search_bm25, search_candidates, search_random, search_fused)))


# ---------------------------------------------------------------------------------------------------- main

def check_args(args):
    """InputError for flags that cannot work; what no flag says is what the checkpoint was trained with; paths settled."""
    kept = read_args(args.query_encoder).get("args", {}) if args.retrieval_method in ("dense", "rank") else {}
    version = named_version(args.query_encoder)
    args.instructed = (args.version or kept.get("version") and "none" or version) != "none"  # by a flag or the name
    for name, default in (("query_max_length", 256), ("key_max_length", 256), ("query_template", "{query}"),
                          ("key_template", "{title} {text}"), ("add_instruction", True), ("version", version)):
        if getattr(args, name, None) is None:
            setattr(args, name, kept.get(name, default))
    args.eval_data = resolve_path(args.eval_data, args.data_root)
    args.corpus = [resolve_path(path, args.data_root) for path in args.corpus or []]
    check_templates(args)
    unknown = sorted(set(args.metrics) - set(METRICS) - set(COLLATED))
    if unknown:
        raise InputError(f"--metrics {unknown[0]}: unknown, choose of {', '.join(METRICS + COLLATED)}")
    asked, outputs, method = bool(args.eval_data or args.queries), bool(args.output or args.trec or args.metrics), args.retrieval_method
    scored, measures, collated = "collate_score" in args.metrics, set(args.metrics) & set(METRICS), set(args.metrics) & set(COLLATED)
    counts = {name: getattr(args, name) for name in ("hits", "max_neg_num", "train_sample", "nprobe", "efSearch")}
    low = [name for name, value in (counts | {"cutoffs": min(args.cutoffs)}).items() if value is not None and value < 1]
    for wrong, message in (
            (low, f"--{''.join(low[:1])} must be 1 or more"),
            (not asked and (outputs or method not in ("bm25", "dense")), "no questions: give --eval_data, or --queries; without them "
             "and without outputs bm25 and dense make the index, no more"),
            (asked and not outputs, "nothing to do with the result: give --output, --trec or --metrics"),
            (args.eval_data and args.queries, "--eval_data and --queries both name questions; give one of them"),
            (not args.corpus and (method != "rank" or args.results), f"--retrieval_method {method} needs --corpus"),
            (not args.corpus and (args.output or args.trec or args.qrels or "nq" in measures),
             "--output, --trec, --qrels and the metric nq need the passages: give --corpus"),
            (args.faiss_index_factory == "Flat" and (args.nprobe or args.efSearch),
             "--nprobe and --efSearch are for approximate indices; name one with --faiss_index_factory"),
            (args.results and method not in ("rank", "fuse") or method == "rank" and len(args.results) > 1,
             "--results are for --retrieval_method rank (one) and fuse (two or more)"),
            (args.ranker and method != "rank", "--ranker scores given candidates: use --retrieval_method rank"),
            (args.measures and not measures, f"--measures writes measures, and none is asked for: give --metrics, of {', '.join(METRICS)}"),
            (collated and not args.eval_data, "collated files are written beside --eval_data, which is missing"),
            (scored and (method != "rank" or args.results),
             "collate_score scores the records' own candidates: use --retrieval_method rank without --results"),
            (scored and (args.output or args.trec or len(args.metrics) > 1),
             "collate_score may score other candidates than are ranked; ask for it alone")):
        if wrong:
            raise InputError(message)
    if args.index is None and args.corpus:
        args.index = f"{args.corpus[0]}.{args.retrieval_method}-index"
    for path in (args.output, args.trec, args.measures, *(collated_paths(args)[kind] for kind in collated)):
        if path and not os.access(os.path.dirname(os.path.abspath(path)), os.W_OK):
            raise InputError(f"{path}: its folder does not exist or cannot be written; make it first, or choose another")


def write_outputs(args, queries, results, corpus, labels):
    """Everything that the flags ask for, from one result."""
    own = args.retrieval_method == "rank" and not args.results  # places among the record's own candidates
    for kind, path in collated_paths(args).items():
        if kind in args.metrics:
            collate(kind, path, queries, results, corpus, own, labels, args)
            print(f"{kind}: {path}")
    names = [name for name in args.metrics if name in METRICS]
    if own and (args.output or args.trec or names):
        results = number_candidates(queries, results)
    marks = mark_answers(queries, results, corpus) if args.output or "nq" in names else None
    if args.output:
        write_contexts(args.output, queries, results, corpus, marks)
    if names:
        values = measure(queries, results, labels, marks, names, args.cutoffs)
        print(" " * 10 + "".join(f"{'@' + str(k):>10}" for k in args.cutoffs))
        for name in names:
            print(f"{name:10}" + "".join(f"{100 * values[f'{name}@{k}']:10.2f}" for k in args.cutoffs))
        if args.measures:
            write_json(args.measures, {"method": args.retrieval_method, "queries": len(queries), **values})
    if args.trec:
        write_run(args.trec, queries, results, corpus, args.retrieval_method)


def main(args):
    check_args(args)
    world = start_processes(args.gpus, timedelta(days=2))  # a large BM25 index is made by one process while the others wait
    transformers.utils.logging.disable_progress_bar()
    corpus = open_corpus(args.corpus, args.key_template, world)
    queries = read_questions(args.eval_data, args.task) if args.eval_data else [
        Query({"id": id, "question": text}, id, text, args.task, []) for id, text in read_queries(args.queries).items()]
    if not queries and (args.eval_data or args.queries):
        raise InputError(f"{args.eval_data or ', '.join(args.queries)}: holds no queries")
    labels = read_labels(queries, merge_qrels(args.qrels) if args.qrels else None, corpus, world.say)
    check_outputs(queries, labels, corpus, args)
    if args.hits < max(args.cutoffs) and not (corpus and args.hits >= len(corpus)) and set(args.metrics) & set(METRICS):
        world.say(f"note: --hits {args.hits} leaves out the --cutoffs above it")
        args.cutoffs = [k for k in args.cutoffs if k <= args.hits] or [args.hits]
    if corpus and queries and args.hits > len(corpus):
        args.hits = len(corpus)
        world.say(f"note: --hits is more than the corpus has; {args.hits} are taken")
    start = time.time()
    results = SEARCHES[args.retrieval_method](args, corpus, queries, world)
    if world.is_main and results is None:
        print(f"{args.index}: {len(corpus):,} documents, {args.retrieval_method}: {time.time() - start:.1f} s")
    elif world.is_main:
        size = f"{len(corpus):,}" if corpus else "their own"
        print(f"{len(queries)} queries, {size} documents, {args.retrieval_method}: {time.time() - start:.1f} s")
        write_outputs(args, queries, results, corpus, labels)
    wait_for_all(world)


if __name__ == "__main__":
    run_script(main, parse_args())
