r"""Retrieve: from a corpus and questions to ranked contexts, measures and mined negatives.

    python retrieve.py --retrieval_method bm25 --corpus psgs_w100.tsv \
        --eval_data nq-dev.json --output dev.json --metrics nq
    torchrun --standalone --nproc_per_node=8 retrieve.py --corpus psgs_w100.tsv --index wiki.index \
        --query_encoder runs/dpr --eval_data nq-test.csv --hits 100 --output test.json \
        --metrics nq --gpus 0,1,2,3,4,5,6,7

Dense retrieval encodes the corpus into --index; after a kill, the same command continues. It
searches the memory-mapped vectors exactly (Flat), block by block, or the faiss index that
--faiss_index_factory names. Equal scores are ranked by the documents' order in the corpus. Without
questions only the index is made.
"""
import time

import transformers

from dense.flags import pick_flags
from layers.regions import compile_on_gpu
from records.corpus import open_corpus
from records.fields import gold_passages
from records.files import write_json
from records.qrels import merge_qrels
from records.questions import Question, read_questions, read_unique_questions, require_ids
from retrieval.flags import (
    check_retrieve_flags,
    choose_hits,
    list_corpus_files,
    list_measures,
    name_collated_files,
    name_index,
    parse_retrieve_flags,
    read_dense_settings,
    settle_templates,
)
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
    NegativeLimits,
    check_indices,
    key_texts,
    list_positives,
    to_documents,
    write_keys,
    write_negatives,
    write_positives,
    write_teacher_scores,
)
from retrieval.results import (
    CandidateResults,
    IdTable,
    write_contexts,
    write_results_page,
    write_run,
)
from retrieval.search import BM25Settings, SearchSettings, search
from utils import (
    LONG_PATIENCE,
    InputError,
    resolve_path,
    run_script,
    shorten,
    start_processes,
    wait_for_all,
)

# ---------------------------------------------------------------- the search and its outputs

def search_and_write(args, settings, cutoffs, corpus, questions, labels, world):
    """Search the corpus for the questions, and write everything that the flags name."""
    start = time.time()
    results = search(settings, corpus, questions, world)
    seconds = time.time() - start
    if not questions:
        world.log(f"{settings.index}: {len(corpus):,} documents, {settings.method}: "
                  f"{seconds:.1f} s")
    elif world.is_main:
        size = f"{len(corpus):,}" if corpus else "their own"
        world.log(f"{len(questions)} queries, {size} documents, {settings.method}: "
                  f"{seconds:.1f} s")
        write_outputs(args, settings, cutoffs, questions, results, corpus, labels, world.log)
    wait_for_all(world)


def write_outputs(args, settings, cutoffs, questions, results, corpus, labels, log):
    """Write the files of the flags from one result, and log the measures."""
    write_collated(args, settings.key_template, questions, results, corpus, labels, log)
    names = list_measures(args)
    if not (args.output or args.trec or args.html or names or "collate_pos" in args.metrics):
        return  # candidates may have no document index, which the other outputs need
    if isinstance(results, CandidateResults):
        results = to_documents(questions, results)
    marks = None
    if args.output or args.html or "nq" in names or "collate_pos" in args.metrics:
        marks = mark_answers(questions, results, corpus, args.match == "regex")
    if "collate_pos" in args.metrics:
        write_positives(name_collated_files(args)["collate_pos"], questions, results, corpus, marks,
                        read_limits(args), args.max_neg_num, log)
    if args.output:
        write_contexts(args.output, questions, results, corpus, marks)
        log(f"contexts: {args.output}")
    if names:
        write_measures(args, cutoffs, questions, results, corpus, labels, marks, log)
    if args.html:
        write_html(args, settings.hits, cutoffs, questions, results, corpus, labels, marks)
        log(f"page: {args.html}")
    if args.trec:
        write_run(args.trec, questions, results, corpus, settings.method)
        log(f"run: {args.trec}")


def write_collated(args, template, questions, results, corpus, labels, log):
    """Write LLM-Embedder's files, except collate_pos, which needs the answers to be marked."""
    paths = name_collated_files(args)
    if "collate_neg" in paths:
        write_negatives(paths["collate_neg"], questions, results, corpus, labels, template,
                        read_limits(args), args.max_neg_num, args.filter_answers,
                        args.match == "regex", log)
    if "collate_key" in paths:
        write_keys(paths["collate_key"], questions, results, corpus, template)
    if "collate_score" in paths:
        write_teacher_scores(paths["collate_score"], questions, results)
    for kind, path in paths.items():
        if kind != "collate_pos":
            log(f"{kind}: {path}")


def read_limits(args):
    """Return the NegativeLimits of the flags."""
    return NegativeLimits(args.neg_ranks, args.neg_max_score, args.neg_margin,
                          args.neg_relative_margin)


def write_measures(args, cutoffs, questions, results, corpus, labels, marks, log):
    """Log the measures of --metrics, and write --measures and --measures_per_query."""
    names = list_measures(args)
    rows = measure_queries(questions, results, labels, marks, corpus, names, cutoffs,
                           args.relevance_level)
    if any(name != "nq" for name in names):
        note_unjudged(labels, args.relevance_level, log)
    means, counts = average_measures(rows, names, cutoffs, log)
    columns = [f"@{k}" for k in cutoffs]
    log(" " * 10 + "".join(f"{column:>10}" for column in columns))
    for name in names:
        log(f"{name:10}" + "".join(f"{100 * means[name + column]:10.2f}" for column in columns))
    if args.measures:
        header = {"method": args.retrieval_method, "queries": len(questions),
                  "measured_queries": counts, "relevance_level": args.relevance_level}
        write_json(args.measures, header | means)
        log(f"measures: {args.measures}")
    if args.measures_per_query:
        write_measures_per_query(args.measures_per_query, questions, rows)
        log(f"measures per query: {args.measures_per_query}")


def write_html(args, hits, cutoffs, questions, results, corpus, labels, marks):
    """Write the page of --html, with the measures of --metrics or, without that flag, all that the
    questions' labels and answers allow.
    """
    names = list_measures(args)
    if not names:
        if any(labels):
            names.append("success")
        if any(question.answers for question in questions):
            names.append("nq")
        hits = hits or max(cutoffs)
        cutoffs = [k for k in cutoffs if k <= hits] or [hits]
    rows = measure_queries(questions, results, labels, marks, corpus, names, cutoffs,
                           args.relevance_level)
    means, _ = average_measures(rows, names, cutoffs, lambda note: None)
    table = [["", *(f"@{k}" for k in cutoffs)]] if names else []
    table += [[name, *(f"{100 * means[f'{name}@{k}']:.2f}" for k in cutoffs)] for name in names]
    method = args.retrieval_method
    searcher = args.query_encoder if method in ("dense", "rank") else method
    asked = resolve_path(args.eval_data, args.data_root) or ", ".join(args.queries)
    remark = (f"{len(questions):,} questions, {len(corpus):,} documents of "
              f"{', '.join(list_corpus_files(args))}")
    write_results_page(args.html, f"{searcher} on {asked}", remark, table, questions, results,
                       corpus, labels, marks, args.relevance_level, args.match == "regex")


# ---------------------------------------------------------------- questions

def open_questions(args, qrels):
    """Return the Questions of --eval_data or --queries, [] without either. Raises InputError.

    A saved run can be measured without texts: the qrels then list the queries.
    """
    if args.eval_data:
        return read_questions(resolve_path(args.eval_data, args.data_root), args.task)
    if args.queries:
        return list(read_unique_questions(args.queries, args.task).values())
    if args.retrieval_method == "run" and qrels:
        return [Question({"id": query_id}, query_id, "", "", [], f"query {query_id}")
                for query_id in qrels]
    return []


def keep_judged(questions, qrels, log):
    """Return the questions that the qrels judge: BEIR's file holds the queries of all splits. If
    the qrels judge no question, return all.
    """
    kept = [question for question in questions if question.id in qrels]
    if not kept:
        return questions  # read_labels refuses them
    if len(kept) < len(questions):
        log(f"note: {len(kept)} of {len(questions)} queries are named by the qrels; the others are "
            "not searched for")
    return kept


def require_all_ids(corpus, questions, args, log):
    """Raise InputError if a flag needs ids that the files do not have."""
    needed = {"--qrels": args.qrels, "--trec": args.trec, "--results": args.results}
    flag = next((flag for flag, is_given in needed.items() if is_given), None)
    if flag and questions:
        corpus.require_ids(flag)
        require_ids(questions, flag, log)


def check_records(questions, labels, corpus, args, template):
    """Raise InputError, before the search, for questions that lack what the outputs need.

    template: the key template.
    """
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
            question = question.read()
            key_texts(question, list_positives(question.record), template)
            gold_passages(question.record, question.location)
        if mines or by_pos_index:
            check_indices(question, question.pos_index or [], corpus)


def check_question_ids(questions, args):
    """Raise InputError for repeated ids if runs or qrels refer to them, and for ids that a TREC run
    cannot hold.
    """
    seen = set()
    for question in questions:
        if question.id in seen and (args.trec or args.results or args.qrels):
            raise InputError(f"{question.location}: the id {shorten(question.id)} is another "
                             "question's already, but runs and qrels refer to questions by id; "
                             "make ids unique")
        seen.add(question.id)
        if len(question.id.split()) != 1 and args.trec:
            raise InputError(f"{question.location}: a TREC run cannot hold the question id "
                             f"{shorten(question.id)}; remove the blanks, or use --output")


# ---------------------------------------------------------------- settings

def settle_hits(args, corpus, questions, log):
    """Return (hits, cutoffs) for this corpus.

    hits are lowered to the size of the corpus, and cutoffs above them are left out; hits None means
    all of a saved run.
    """
    hits, cutoffs = choose_hits(args), args.cutoffs
    if hits is None:
        return hits, cutoffs
    ranks_all = corpus and hits >= len(corpus)
    if list_measures(args) and hits < max(cutoffs) and not ranks_all:
        log(f"note: --cutoffs above --hits {hits} are left out")
        cutoffs = [k for k in cutoffs if k <= hits] or [hits]
    if corpus and questions and hits > len(corpus):
        hits = len(corpus)
        log(f"note: --hits is lowered to {hits}, the size of the corpus")
    return hits, cutoffs


def read_search_settings(args, hits, templates):
    """Return the SearchSettings of the flags."""
    method = args.retrieval_method
    needs_indices = bool(args.output or args.trec or args.html or list_measures(args))
    return SearchSettings(
        method=method, hits=hits, index=name_index(args, method),
        overwrite_index=args.overwrite_index, bm25=pick_flags(args, BM25Settings),
        dense=read_dense_settings(args, templates), task=args.task, exclude_self=args.exclude_self,
        results=args.results, fusion=args.fusion, fusion_weights=args.fusion_weights or (),
        key_template=templates["key_template"], needs_indices=needs_indices,
        scores_all="collate_score" in args.metrics, seed=args.seed)


def main(args):
    check_retrieve_flags(args)
    templates = settle_templates(args, args.retrieval_method)
    world = start_processes(args.gpus, LONG_PATIENCE)
    compile_on_gpu(not args.no_compile)
    transformers.utils.logging.disable_progress_bar()

    # bad questions, labels and corpora are rejected before the search starts
    corpus = open_corpus(list_corpus_files(args), templates["key_template"], world)
    if corpus is None and args.retrieval_method == "run":
        corpus = IdTable()  # measures only need the documents' ids
    qrels = merge_qrels(args.qrels) if args.qrels else None
    questions = open_questions(args, qrels)
    require_all_ids(corpus, questions, args, world.log)
    if args.queries and qrels:
        questions = keep_judged(questions, qrels, world.log)
    labels = read_labels(questions, qrels, corpus, world.log)
    check_records(questions, labels, corpus, args, templates["key_template"])
    if args.match == "regex":
        note_patterns([question.answers for question in questions],
                      [question.location for question in questions], world.log)

    hits, cutoffs = settle_hits(args, corpus, questions, world.log)
    settings = read_search_settings(args, hits, templates)
    search_and_write(args, settings, cutoffs, corpus, questions, labels, world)


if __name__ == "__main__":
    run_script(main, parse_retrieve_flags(__doc__))
