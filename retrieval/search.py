"""Every search as a function: BM25, dense retrieval, ranking of candidates, fusion of earlier
results.

faiss and bm25s take seconds to load, so a function that needs one of them imports it.
"""
import os
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from dense.batches import GroupCollator, check_one_instruction
from dense.flags import read_text_settings
from dense.model import BiEncoder, CrossEncoder, limit_lengths
from dense.texts import describe_texts, settle_texts
from records.files import lock, write_json
from records.questions import own_ids
from retrieval.exact_search import merge_processes, part_range, search_vectors
from retrieval.fingerprint import await_index, check_fingerprint, fingerprint, remove_other_index
from retrieval.flags import list_measures
from retrieval.mining import check_candidates, key_texts, list_candidates
from retrieval.results import Results, drop_own, find_own, fuse, note_own, read_run, stack
from retrieval.vectors import encode_corpus
from retrieval.words import choose_rule
from utils import InputError, gather_lists, progress_bar, refusing, shorten

QUESTIONS = 512  # questions that are encoded at once

# ---------------------------------------------------------------- BM25

def search_bm25(args, corpus, questions, world):
    """Return the Results of BM25 by bm25s; each process scores a strided share of the questions."""
    index, words = open_bm25(args, corpus, world)
    if not questions:
        return None
    return search_words(args, index, words, questions, world)


def open_bm25(args, corpus, world):
    """Return (the BM25 index in --index, made if it is not there, and its bm25.Words)."""
    from retrieval import bm25
    rule, share = args.bm25_words, None
    if rule == "auto":
        rule, share = choose_rule(corpus)
    words = bm25.open_words(args.stopwords, args.stemmer, rule)
    make_bm25_index(args, corpus, words, share, world)
    return bm25.load_bm25_index(args.index, len(corpus)), words


def search_words(args, index, words, questions, world):
    """Results of questions in an open BM25 index; `words` is what bm25.open_words returns."""
    from retrieval import bm25
    share = range(world.rank, len(questions), world.size)
    token_lists = bm25.tokenize_texts([questions[i].text for i in share], words)
    rows = []
    for i, tokens in zip(progress_bar(share, desc="searching", is_main=world.is_main), token_lists):
        with refusing(f"{args.index}: the index is broken", "delete the folder"):
            doc_indices, scores = bm25.search_bm25_index(index, tokens, args.hits)
        rows.append((i, doc_indices, scores))
    return stack(gather_lists(rows, world))


def make_bm25_index(args, corpus, words, share, world):
    """Make the index in --index unless it is there. Raises InputError if another one is.

    share: what choose_rule found, or None if --bm25_words names the rule.
    """
    from retrieval import bm25
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
                bm25.build_bm25_index(args.index, corpus, words, args.k1, args.b)
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
    log_instructions(collator.texts, tasks, world.log)

    # any task will do for the documents: all have the same instruction before them
    vectors = open_vectors(args, corpus, model, collator, tasks[0], world)
    metric = "l2" if model.metric == "l2" else "ip"  # the vectors of cos have length 1
    parts = None
    if args.faiss_index_factory != "Flat":
        from retrieval.faiss_index import describe_search, open_indices
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
        from retrieval.faiss_index import search_indices
        doc_indices, scores = search_indices(index.parts, query_vectors, args.hits, index.metric,
                                             search_settings(args))
    doc_indices, scores = merge_processes(doc_indices, scores, args.hits, world)
    return Results(doc_indices, scores) if world.is_main else None


def open_retriever(args, corpus, world):
    """Return (BiEncoder or CrossEncoder, collator)."""
    texts = settle_texts(args.query_encoder, args.key_encoder, read_text_settings(args), world.log)
    if args.ranker:
        model = CrossEncoder.open(args.query_encoder, trained=True)
    else:
        model = BiEncoder.open(args.query_encoder, args.key_encoder, pooling=args.pooling_method,
                               metric=args.dense_metric, truncate_dim=args.truncate_dim,
                               trained=True)
    model.use_texts(texts)
    if args.pair_types and not args.ranker:
        for encoder in model.encoders.values():
            encoder.separator = texts.tokenizers["key"].sep_token_id
    texts = replace(texts, max_lengths=limit_lengths(texts.max_lengths, model, world.log))
    if args.ranker:
        activation = "none" if model.activation is None else type(model.activation).__name__
        world.log(f"{args.query_encoder}: {sum(texts.max_lengths.values())} tokens per pair, "
                  f" activation of the scores: {activation}")
    else:
        world.log(describe_texts(args.query_encoder, model, texts))
    return model.to(world.device).eval(), GroupCollator(texts, corpus)


def log_instructions(texts, tasks, log):
    """Log whose instructions are used, or that none are though the model is known for them."""
    if texts.prompts is not None:
        return  # describe_texts names them
    # a checkpoint that was trained without tasks needs no note
    is_expected = texts.version != "none" and texts.sources["version"] != "args.json"
    if any(any(texts.instruction(task)) for task in tasks):
        log(f"{texts.version}'s instructions are put before the texts of {', '.join(tasks)}")
    elif is_expected and texts.add_instruction and not any(tasks):
        log(f"note: no question names a task, so that {texts.version}'s instructions are not used; "
            "give --task")


def open_vectors(args, corpus, model, collator, task, world):
    """Return the corpus's vectors (N, D), in --index, after encoding the missing ones."""
    encoder = model.encoders.get("key", model.query_encoder)
    max_length = collator.texts.max_lengths["key"]
    settings = {"template": corpus.template, "max_length": max_length,
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
    return encode_corpus(model, corpus, tokenize, max_length, args.index, args.dtype, world,
                         expected, args.num_workers, args.bf16)


@torch.no_grad()
def encode_questions(args, model, collator, questions, world, log):
    """Return the questions' vectors (Q, D); logs how many questions are truncated.

    Raises InputError if a vector is not finite.
    """
    max_length = collator.texts.max_lengths["query"]
    vectors, num_long = [], 0
    starts = range(0, len(questions), QUESTIONS)
    for start in progress_bar(starts, desc="encoding questions", is_main=world.is_main):
        chunk = questions[start:start + QUESTIONS]
        token_ids = collator.queries([question.text for question in chunk],
                                     [question.task for question in chunk])
        num_long += sum(len(ids) >= max_length for ids in token_ids)
        vectors.append(model.encode(token_ids, "query").float())
    if num_long:
        log(f"note: {num_long} of {len(questions)} queries have {max_length} tokens or more; only "
            f"the first {max_length} are encoded (--query_max_length)")
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
        log_instructions(collator.texts, tasks, world.log)

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
