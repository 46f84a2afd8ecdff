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
import time

import transformers

from records.corpus import open_corpus
from records.fields import gold_passages
from records.files import write_json
from records.qrels import merge_qrels
from records.questions import Question, read_questions, read_unique_questions, require_ids
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
    check_indices,
    collated_paths,
    key_texts,
    list_positives,
    read_limits,
    to_documents,
    write_collated,
    write_positives,
)
from retrieval.results import (
    IdTable,
    write_contexts,
    write_page,
    write_run,
)
from retrieval.search import ranks_candidates, search
from utils import (
    LONG_PATIENCE,
    InputError,
    run_script,
    shorten,
    start_processes,
    wait_for_all,
)

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
    needed = {"--qrels": args.qrels, "--trec": args.trec, "--results": args.results}
    flag = next((flag for flag, is_given in needed.items() if is_given), None)
    if flag and questions:
        corpus.require_ids(flag)
        require_ids(questions, flag, log)


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
