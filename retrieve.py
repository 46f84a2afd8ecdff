r"""Retrieves: from a corpus and questions to ranked contexts, measures and mined negatives.

    python retrieve.py --retrieval_method bm25 --corpus psgs_w100.tsv \
        --eval_data nq-dev.json --output dev.json --metrics nq
    torchrun --standalone --nproc_per_node=8 retrieve.py --corpus psgs_w100.tsv --index wiki.index \
        --query_encoder runs/dpr --eval_data nq-test.csv --hits 100 --output test.json \
        --metrics nq --gpus 0,1,2,3,4,5,6,7

Dense retrieval encodes the corpus into --index, going on where a killed run stopped, and searches
it exactly (Flat), a block of the memory-mapped vectors at a time, or with the faiss index that
--faiss_index_factory names. Equal scores are ranked by the documents' order in the corpus. Without
questions only the index is made.
"""
import os
import time
from typing import NamedTuple

import numpy as np
import torch
import transformers

from dense.batches import GroupCollator, check_one_instruction
from dense.model import BiEncoder, CrossEncoder, limit_lengths
from dense.texts import describe_texts, settle_texts
from records.corpus import open_corpus
from records.files import lock, write_json
from records.qrels import merge_qrels
from records.questions import (
    Question,
    gold_passages,
    own_ids,
    read_questions,
    read_unique_questions,
    require_ids,
)
from retrieval import bm25
from retrieval.exact_search import merge_processes, part_range, search_vectors
from retrieval.faiss_index import describe_search, open_indices, search_indices
from retrieval.fingerprint import (
    await_index,
    check_fingerprint,
    fingerprint,
    remove_other_index,
)
from retrieval.flags import check_args, list_measures, parse_args, settle_defaults
from retrieval.measures import (
    average_measures,
    mark_answers,
    measure_queries,
    note_patterns,
    note_unjudged,
    read_labels,
    write_measures_per_query,
)
from retrieval.mining import (
    check_candidates,
    check_indices,
    collated_paths,
    key_texts,
    list_candidates,
    list_positives,
    read_limits,
    to_documents,
    write_collated,
    write_positives,
)
from retrieval.results import (
    IdTable,
    Results,
    drop_own,
    find_own,
    fuse,
    note_own,
    read_run,
    stack,
    write_contexts,
    write_page,
    write_run,
)
from retrieval.vectors import encode_corpus
from retrieval.words import choose_rule
from utils import (
    LONG_PATIENCE,
    InputError,
    gather_lists,
    progress_bar,
    refusing,
    run_script,
    shorten,
    start_processes,
    wait_for_all,
)

QUESTIONS = 512  # questions that are encoded at once


# ---------------------------------------------------------------- questions

def open_questions(args, qrels):
    """Return the Questions of --eval_data or --queries, [] without either. Raises InputError.

    A saved run is measured without their texts: the qrels name the queries then.
    """
    if args.eval_data:
        return read_questions(args.eval_data, args.task)
    if args.queries:
        return list(read_unique_questions(args.queries, args.task).values())
    if args.retrieval_method == "run" and qrels:
        return [Question({"id": query_id}, query_id, "", "", [], f"query {query_id}")
                for query_id in qrels]
    return []


def keep_judged(questions, qrels, log):
    """Return the questions that the qrels name, all if they name none: BEIR's file of queries
    holds those of all splits.
    """
    kept = [question for question in questions if question.id in qrels]
    if not kept:
        return questions  # read_labels refuses them
    if len(kept) < len(questions):
        log(f"note: {len(kept)} of {len(questions)} queries are named by the qrels; the others are "
            "not searched for")
    return kept


def check_records(questions, labels, corpus, args):
    """Raise InputError, before the search, for questions without what the outputs need."""
    for name in list_measures(args):
        if questions and name == "nq" and not any(question.answers for question in questions):
            raise InputError("nq cannot be measured: no query has 'answers'")
        if questions and name != "nq" and not any(labels):
            raise InputError(f"{name} cannot be measured: no query has qrels or 'pos_index'")
    if "collate_pos" in args.metrics and not any(question.answers for question in questions):
        raise InputError("collate_pos finds positives by their answers: no query has 'answers'")
    check_question_ids(questions, args)
    if args.trec:
        corpus.refuse_blanks(args.trec)
    mines = "collate_neg" in args.metrics
    by_pos_index = not args.qrels and any(name != "nq" for name in list_measures(args))
    for question in questions:
        if mines:
            key_texts(question, list_positives(question.record), args.key_template)
            gold_passages(question.record, question.location)
        if mines or by_pos_index:
            check_indices(question, question.record.get("pos_index") or [], corpus)


def check_question_ids(questions, args):
    """Raises InputError for ids that repeat, where files go by ids, or do not fit a TREC run."""
    seen = set()
    for question in questions:
        if question.id in seen and (args.trec or args.results or args.qrels):
            raise InputError(f"{question.location}: the id {shorten(question.id)} is another "
                             "question's already, and runs and qrels go by ids; make ids unique")
        seen.add(question.id)
        if len(question.id.split()) != 1 and args.trec:
            raise InputError(f"{question.location}: a TREC run cannot hold the question id "
                             f"{shorten(question.id)}; take the blanks out, or use --output")


def require_all_ids(corpus, questions, args, log):
    """Raise InputError if qrels, runs or results go by ids that cannot be found in the files."""
    needed = {"the qrels go": args.qrels, "--trec writes a run": args.trec,
              "--results are read": args.results}
    purpose = next((purpose for purpose, is_given in needed.items() if is_given), None)
    if purpose and questions:
        corpus.require_ids(purpose)
        require_ids(questions, purpose, log)


def limit_hits(args, corpus, questions, log):
    """Lower --hits to the size of the corpus, and leave out the --cutoffs above --hits.

    All of a saved run is taken unless --hits is given.
    """
    if args.hits is None:
        return
    ranks_all = corpus and args.hits >= len(corpus)
    if list_measures(args) and args.hits < max(args.cutoffs) and not ranks_all:
        log(f"note: --cutoffs above --hits {args.hits} are left out")
        args.cutoffs = [k for k in args.cutoffs if k <= args.hits] or [args.hits]
    if corpus and questions and args.hits > len(corpus):
        args.hits = len(corpus)
        log(f"note: --hits is lowered to {args.hits}, the size of the corpus")


# ---------------------------------------------------------------- BM25

def search_bm25(args, corpus, questions, world):
    """Return the Results of BM25 by bm25s; each process scores a strided share of the questions."""
    index, words = open_bm25(args, corpus, world)
    if not questions:
        return None
    return search_words(args, index, words, questions, world)


def open_bm25(args, corpus, world):
    """Return (the BM25 index in --index, made if it is not there, and its bm25.Words)."""
    rule, share = args.bm25_words, None
    if rule == "auto":
        rule, share = choose_rule(corpus)
    words = bm25.open_words(args.stopwords, args.stemmer, rule)
    make_bm25_index(args, corpus, words, share, world)
    return bm25.load_index(args.index, len(corpus)), words


def search_words(args, index, words, questions, world):
    """Results of questions in an open BM25 index; `words` is what bm25.open_words returns."""
    share = range(world.rank, len(questions), world.size)
    token_lists = bm25.tokenize_texts([questions[i].text for i in share], words)
    rows = []
    for i, tokens in zip(progress_bar(share, desc="searching", is_main=world.is_main), token_lists):
        with refusing(f"{args.index}: the index is broken", "delete the folder"):
            doc_indices, scores = bm25.search_index(index, tokens, args.hits)
        rows.append((i, doc_indices, scores))
    return stack(gather_lists(rows, world))


def make_bm25_index(args, corpus, words, share, world):
    """Make the index in --index unless it is there. Raises InputError if another one is.

    share: what choose_rule found, or None if --bm25_words names the rule.
    """
    settings = {"model": "bm25", "k1": args.k1, "b": args.b, "stopwords": args.stopwords,
                "stemmer": args.stemmer, "template": corpus.template, "words": words.rule}
    expected = fingerprint(corpus, None, settings, world)
    if args.overwrite_index and world.is_main:
        remove_other_index(args.index, expected)
    if world.is_main and not check_fingerprint(args.index, expected):
        with lock(args.index):
            # another command may have made it meanwhile
            if not check_fingerprint(args.index, expected):
                log_words(args, words, share, world.log)
                bm25.build_index(args.index, corpus, words, args.k1, args.b)
                write_json(os.path.join(args.index, "index.json"), expected)
    await_index(args.index, expected, world)


def log_words(args, words, share, log):
    """Log how texts are split into words, and why."""
    kinds = {"bm25s": "two or more letters or digits",
             "unicode": "Unicode letters with their marks, in pairs for scripts without spaces"}
    reason = ""
    if share is not None:
        percent = float(f"{100 * share:.2g}")  # not 1e+02
        reason = f", chosen as {percent:g} % of the documents' characters need unicode"
    log(f"BM25: words are {kinds[words.rule]} (--bm25_words {words.rule}{reason}); stop words: "
        f"{args.stopwords} (--stopwords)")


# ---------------------------------------------------------------- dense retrieval

class DenseIndex(NamedTuple):
    """What dense retrieval opens once, before any question."""
    model: BiEncoder
    collator: GroupCollator
    vectors: np.ndarray  # (N, D), memory-mapped
    metric: str          # that the vectors are searched with: ip or l2
    parts: list          # of a faiss index, as open_indices returns them; None: search is exact


def search_dense(args, corpus, questions, world):
    """Return the Results of dense retrieval, on the main process.

    Every process searches its part of the corpus for all questions; the main one merges them.
    """
    tasks = sorted({question.task for question in questions}) or [args.task]
    index = open_dense(args, corpus, tasks, world)
    if not questions:
        return None
    query_vectors = encode_questions(args, index.model, index.collator, questions, world, world.log)
    return search_query_vectors(args, index, query_vectors, world)


def open_dense(args, corpus, tasks, world):
    """Return the DenseIndex of the flags for questions of these tasks, encoded if need be."""
    model, collator = open_retriever(args, corpus, world)
    check_one_instruction(collator, tasks)
    log_instructions(args, collator, tasks, world.log)

    # any task will do for the documents: all have the same instruction before them
    vectors = open_vectors(args, corpus, model, collator, tasks[0], world)
    metric = "l2" if model.metric == "l2" else "ip"  # the vectors of cos have length 1
    parts = None
    if args.faiss_index_factory != "Flat":
        parts = open_indices(args.index, vectors, args.faiss_index_factory, metric,
                             args.train_sample, args.seed, world)
        how = describe_search(parts[0][1], args.hits, search_settings(args)) if parts else ""
        if how:
            world.log(f"{args.faiss_index_factory}: {how}")
    return DenseIndex(model, collator, vectors, metric, parts)


def search_settings(args):
    """Return the settings of an approximate search that flags give, None for the others."""
    return {"nprobe": args.nprobe, "efSearch": args.efSearch}


def search_query_vectors(args, index, query_vectors, world):
    """Return results of the questions' vectors (Q, D) on the main process, None on the others."""
    if index.parts is None:
        first, last = part_range(len(index.vectors), world.rank, world.size)
        doc_indices, scores = search_vectors(index.vectors, query_vectors, first, last, args.hits,
                                             index.metric, world.is_main)
    else:
        doc_indices, scores = search_indices(index.parts, query_vectors, args.hits, index.metric,
                                             search_settings(args))
    doc_indices, scores = merge_processes(doc_indices, scores, args.hits, world)
    return Results(doc_indices, scores) if world.is_main else None


def open_retriever(args, corpus, world):
    """Return (BiEncoder or CrossEncoder, collator); set lengths and pooling from the model."""
    texts = settle_texts(args, args.key_encoder, world.log)
    if args.ranker:
        model = CrossEncoder.open(args.query_encoder, trained=True)
        encoders = [model]
    else:
        model = BiEncoder.open(args.query_encoder, args.key_encoder, pooling=args.pooling_method,
                               metric=args.dense_metric, truncate_dim=args.truncate_dim,
                               trained=True)
        encoders = list(model.encoders.values())
    model.use_texts(texts)
    if args.pair_types and not args.ranker:
        for encoder in encoders:
            encoder.separator = texts.tokenizers["key"].sep_token_id
    limit_lengths(args, encoders, world.log)
    if args.ranker:
        activation = "none" if model.activation is None else type(model.activation).__name__
        world.log(f"{args.query_encoder}: {args.query_max_length + args.key_max_length} tokens per "
                  f"pair, activation of the scores: {activation}")
    else:
        world.log(describe_texts(args, model, texts))
    return model.to(world.device).eval(), GroupCollator(texts, args, corpus)


def log_instructions(args, collator, tasks, log):
    """Log whose instructions are used, or that none are though the model is known for them."""
    if collator.texts.prompts is not None:
        return  # describe_texts names them
    uses_instructions = any(any(collator.instruction(task)) for task in tasks)
    if uses_instructions:
        log(f"{args.version}'s instructions are put before the texts of {', '.join(tasks)}")
    elif args.expects_instructions and args.add_instruction and not any(tasks):
        log(f"note: no question names a task, so that {args.version}'s instructions are not used; "
            "give --task")


def open_vectors(args, corpus, model, collator, task, world):
    """Return the corpus's vectors (N, D), in --index, after encoding the missing ones."""
    encoder = model.encoders.get("key", model.query_encoder)
    settings = {"template": corpus.template, "max_length": args.key_max_length,
                "metric": model.metric, "dtype": args.dtype, "bf16": args.bf16,
                "pooling": encoder.pooling, "separator": encoder.separator,
                "instruction": collator.instruction(task)[1]}
    if encoder.truncate_dim is not None:
        settings["truncate_dim"] = encoder.truncate_dim
    if encoder.pooling == "last":
        settings["end_token"] = collator.texts.appends_end
    expected = fingerprint(corpus, args.key_encoder or args.query_encoder, settings, world)
    if args.overwrite_index and world.is_main:
        remove_other_index(args.index, expected)

    def tokenize(texts):
        return collator.keys(texts, [task] * len(texts))
    return encode_corpus(model, corpus, tokenize, args.key_max_length, args.index, args.dtype,
                         world, expected, args.num_workers, args.bf16)


@torch.no_grad()
def encode_questions(args, model, collator, questions, world, log):
    """Return the questions' vectors (Q, D); logs how many questions are truncated.

    Raises InputError if a vector is not finite.
    """
    vectors, num_long = [], 0
    starts = range(0, len(questions), QUESTIONS)
    for start in progress_bar(starts, desc="encoding questions", is_main=world.is_main):
        chunk = questions[start:start + QUESTIONS]
        token_ids = collator.queries([question.text for question in chunk],
                                     [question.task for question in chunk])
        num_long += sum(len(ids) >= args.query_max_length for ids in token_ids)
        vectors.append(model.encode(token_ids, "query").float())
    if num_long:
        log(f"note: {num_long} of {len(questions)} queries have {args.query_max_length} tokens or "
            f"more; only the first {args.query_max_length} are encoded (--query_max_length)")
    query_vectors = torch.cat(vectors)
    is_finite = query_vectors.isfinite().all(dim=1)
    if not is_finite.all():
        question = questions[int(is_finite.int().argmin())]
        raise InputError(f"{args.query_encoder}: question {shorten(question.id)} gets a vector "
                         "that is not finite; the checkpoint is broken")
    return query_vectors


# ---------------------------------------------------------------- ranking candidates

def rank_candidates(args, corpus, questions, world):
    """Candidates in the model's order: an earlier result's documents, or those of the records.

    The Results of the latter hold indices among each record's candidates, not of documents.
    """
    scored = "collate_score" in args.metrics
    earlier = None
    if args.results:
        earlier = read_run(args.results[0], questions, corpus, world.log)
    else:
        need_indices = bool(args.output or args.trec or list_measures(args))
        check_candidates(questions, corpus, args.key_template, need_indices, scored)
    model, collator = open_retriever(args, corpus, world)
    if not args.ranker:
        tasks = sorted({question.task for question in questions})
        log_instructions(args, collator, tasks, world.log)

    share = range(world.rank, len(questions), world.size)
    rows = []
    for i in progress_bar(share, desc="ranking", is_main=world.is_main):
        if earlier is not None:
            indices, _ = earlier.row(i)
            texts = [corpus.text(doc_index) for doc_index in indices]
        else:
            keys, _ = list_candidates(questions[i].record, scored)
            texts = key_texts(questions[i], keys, args.key_template)
            indices = list(range(len(texts)))
        scores = score_texts(args, model, collator, questions[i], texts, world)
        order = np.lexsort((indices, -scores))
        if not scored:  # teacher scores are of every candidate
            order = order[:args.hits]
        rows.append((i, np.array(indices, int)[order], scores[order]))
    return stack(gather_lists(rows, world))


@torch.no_grad()
def score_texts(args, model, collator, question, texts, world):
    """Return the model's scores (n) of key texts for one question, a numpy array."""
    if not texts:
        return np.zeros(0, np.float32)
    with torch.autocast(world.device.type, torch.bfloat16, enabled=args.bf16):
        if args.ranker:
            scores = model.predict(collator.pairs([question.text] * len(texts), texts))
        else:
            query_ids = collator.queries([question.text], [question.task])
            key_ids = collator.keys(texts, [question.task] * len(texts))
            query_vectors = model.encode(query_ids, "query")
            key_vectors = model.encode(key_ids, "key")
            scores = model.score(query_vectors, key_vectors)[0]
    return scores.float().cpu().numpy()


# ---------------------------------------------------------------- other methods

def draw_random(args, corpus, questions, world):
    """Documents drawn at random, by seed and question: the baseline of every measure."""
    count = min(args.hits, len(corpus))
    rows = []
    for i in range(len(questions)):
        rng = np.random.default_rng([args.seed, i])
        doc_indices = rng.choice(len(corpus), count, replace=False)
        rows.append((i, doc_indices, -np.arange(count, dtype=np.float32)))
    return stack(rows)


def fuse_results(args, corpus, questions, world):
    """Earlier results merged into one."""
    weights = args.fusion_weights or [1.0] * len(args.results)
    results = [read_run(path, questions, corpus, world.log) for path in args.results]
    return fuse(results, args.fusion, weights, args.hits)


def measure_run(args, corpus, questions, world):
    """Return a saved run as it is."""
    return read_run(args.results[0], questions, corpus, world.log, args.hits)


# {--retrieval_method: function(args, corpus, questions, world)}; a function returns Results on the
# main process, or None if there are no questions
SEARCHES = {"dense": search_dense, "bm25": search_bm25, "rank": rank_candidates,
           "random": draw_random, "fuse": fuse_results, "run": measure_run}


def search(args, corpus, questions, world):
    """Return the Results of the flags on the main process, without each query's own document under
    --exclude_self; logs which queries find too little.
    """
    excludes = args.exclude_self and questions and "collate_score" not in args.metrics
    hits = args.hits
    if excludes and hits:
        args.hits += 1  # so that --hits documents are left
    results = SEARCHES[args.retrieval_method](args, corpus, questions, world)
    args.hits = hits
    if questions and world.is_main:
        if excludes:
            results = leave_out_own(args, corpus, questions, results, world.log)
        note_missing(args, questions, results, len(corpus or ()) - bool(excludes), world.log)
    return results


def leave_out_own(args, corpus, questions, results, log):
    """Return the Results without the document, or candidate, that has the question's own id."""
    own = find_own(own_ids(questions), corpus)
    if ranks_candidates(args):
        for i, question in enumerate(questions):
            doc_indices = list_candidates(question.record)[1] or []
            own[i] = doc_indices.index(own[i]) if own[i] in doc_indices else -1
    found = [own_index >= 0 and own_index in results.indices[i] for i, own_index in enumerate(own)]
    note_own(sum(found), len(questions), log)
    return drop_own(results, own, args.hits)


def ranks_candidates(args):
    """Return True if Results hold indices among each record's candidates, not of documents."""
    return args.retrieval_method == "rank" and not args.results


def note_missing(args, questions, results, total, log):
    """Log how many questions find no document or, by an approximate index, fewer than --hits.

    total: of the documents that a question could find.
    """
    counts = (results.indices >= 0).sum(axis=1)
    empty = [question for question, count in zip(questions, counts) if not count]
    if empty:
        is_bm25 = args.retrieval_method == "bm25"
        reason = "; no document contains any of their words" if is_bm25 else ""
        log(f"note: {len(empty)} of {len(questions)} queries find no document "
            f"(first: {shorten(empty[0].id)}, {shorten(empty[0].text)}){reason}")
    if args.retrieval_method != "dense" or args.faiss_index_factory == "Flat":
        return
    hits = min(args.hits, total)
    few = int(((counts > 0) & (counts < hits)).sum())
    if few:
        log(f"note: {few} of {len(questions)} queries find fewer than {hits} documents; raise "
            "--nprobe (of an HNSW index --efSearch)")


# ---------------------------------------------------------------- outputs

def write_outputs(args, questions, results, corpus, labels, log):
    """Write everything that the flags ask for, from one result."""
    are_candidates = ranks_candidates(args)
    paths = collated_paths(args)
    for kind, path in paths.items():
        if kind in args.metrics and kind != "collate_pos":
            write_collated(kind, path, questions, results, corpus, labels, args, are_candidates,
                           log)
            log(f"{kind}: {path}")
    names = list_measures(args)
    if are_candidates and (args.output or args.trec or args.html or names):
        results = to_documents(questions, results)
    marks = None
    if args.output or args.html or "nq" in names or "collate_pos" in args.metrics:
        marks = mark_answers(questions, results, corpus, args.match == "regex")
    if "collate_pos" in args.metrics:
        write_positives(paths["collate_pos"], questions, results, corpus, marks, args.max_neg_num,
                        log, read_limits(args))
    if args.output:
        write_contexts(args.output, questions, results, corpus, marks)
        log(f"contexts: {args.output}")
    if names:
        write_measures(args, questions, results, corpus, labels, marks, log)
    if args.html:
        inspect(args, questions, results, corpus, labels, marks, log)
    if args.trec:
        write_run(args.trec, questions, results, corpus, args.retrieval_method)
        log(f"run: {args.trec}")


def write_measures(args, questions, results, corpus, labels, marks, log):
    """Log the measures of --metrics, and write the files of them that the flags ask for."""
    names = list_measures(args)
    rows = measure_queries(questions, results, labels, marks, corpus, names, args.cutoffs,
                           args.relevance_level)
    if any(name != "nq" for name in names):
        note_unjudged(labels, args.relevance_level, log)
    means, counts = average_measures(rows, names, args.cutoffs, log)
    log_table(means, names, args.cutoffs, log)
    if args.measures:
        settings = {"method": args.retrieval_method, "queries": len(questions),
                    "measured_queries": counts, "relevance_level": args.relevance_level}
        write_json(args.measures, settings | means)
        log(f"measures: {args.measures}")
    if args.measures_per_query:
        write_measures_per_query(args.measures_per_query, questions, rows)
        log(f"measures per query: {args.measures_per_query}")


def inspect(args, questions, results, corpus, labels, marks, log):
    """Write the page of --html, with the measures of --metrics, else those that can be taken."""
    names = list_measures(args)
    cutoffs = args.cutoffs
    if not names:
        if any(labels):
            names.append("success")
        if any(question.answers for question in questions):
            names.append("nq")
        hits = args.hits or max(cutoffs)
        cutoffs = [k for k in cutoffs if k <= hits] or [hits]
    rows = measure_queries(questions, results, labels, marks, corpus, names, cutoffs,
                           args.relevance_level)
    values, _ = average_measures(rows, names, cutoffs, lambda note: None)
    table = [["", *(f"@{k}" for k in cutoffs)]] if names else []
    table += [[name, *(f"{100 * values[f'{name}@{k}']:.2f}" for k in cutoffs)] for name in names]
    method = args.retrieval_method
    searcher = args.query_encoder if method in ("dense", "rank") else method
    asked = args.eval_data or ", ".join(args.queries)
    remark = f"{len(questions):,} questions, {len(corpus):,} documents of {', '.join(args.corpus)}"
    write_page(args.html, f"{searcher} on {asked}", remark, table, questions, results, corpus,
               labels, marks, args.relevance_level, args.match == "regex")
    log(f"page: {args.html}")


def log_table(values, names, cutoffs, log):
    """Logs {metric@k: value} as percentages, a row per metric and a column per cutoff."""
    columns = [f"@{k}" for k in cutoffs]
    log(" " * 10 + "".join(f"{column:>10}" for column in columns))
    for name in names:
        log(f"{name:10}" + "".join(f"{100 * values[name + column]:10.2f}" for column in columns))


def main(args):
    settle_defaults(args)
    check_args(args)
    world = start_processes(args.gpus, LONG_PATIENCE)
    transformers.utils.logging.disable_progress_bar()

    # bad questions, labels and corpora are rejected before the search starts
    corpus = open_corpus(args.corpus, args.key_template, world)
    if corpus is None and args.retrieval_method == "run":
        corpus = IdTable()  # measures need no more than the documents' ids
    qrels = merge_qrels(args.qrels) if args.qrels else None
    questions = open_questions(args, qrels)
    require_all_ids(corpus, questions, args, world.log)
    if args.queries and qrels:
        questions = keep_judged(questions, qrels, world.log)
    labels = read_labels(questions, qrels, corpus, world.log)
    check_records(questions, labels, corpus, args)
    if args.match == "regex":
        note_patterns([question.answers for question in questions],
                      [question.location for question in questions], world.log)
    limit_hits(args, corpus, questions, world.log)

    start = time.time()
    results = search(args, corpus, questions, world)
    seconds = time.time() - start
    if not questions:
        world.log(f"{args.index}: {len(corpus):,} documents, {args.retrieval_method}: "
                  f"{seconds:.1f} s")
    elif world.is_main:
        size = f"{len(corpus):,}" if corpus else "their own"
        world.log(f"{len(questions)} queries, {size} documents, {args.retrieval_method}: "
                  f"{seconds:.1f} s")
        write_outputs(args, questions, results, corpus, labels, world.log)
    wait_for_all(world)


if __name__ == "__main__":
    run_script(main, parse_args(__doc__))
