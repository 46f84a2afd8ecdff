"""Every search as a function of a SearchSettings: BM25, dense retrieval, ranking, fusion.

faiss and bm25s take seconds to load, so only the functions that need one of them import it.
"""
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from dense.batches import GroupCollator, check_one_instruction
from dense.model import BiEncoder, CrossEncoder, limit_lengths
from dense.texts import TextSettings, describe_texts, settle_texts
from records.questions import own_ids
from retrieval.exact_search import merge_processes, part_range, search_vectors
from retrieval.fingerprint import fingerprint, remove_other_index
from retrieval.mining import check_candidates, key_texts, list_candidates
from retrieval.results import (
    CandidateResults,
    Results,
    drop_own,
    find_own,
    fuse,
    note_own,
    read_run,
    stack_rows,
)
from retrieval.vectors import encode_corpus
from utils import InputError, gather_lists, progress_bar, shorten

ENCODED_QUESTIONS = 512  # questions that are encoded at once


# ---------------------------------------------------------------- settings

@dataclass(frozen=True)
class BM25Settings:
    """Hold what a BM25 index depends on. Fields are named like the flags, which explain them."""
    k1: float = 0.9
    b: float = 0.4
    bm25_words: str = "auto"
    stopwords: str = "en"
    stemmer: str | None = None


@dataclass(frozen=True)
class DenseSettings:
    """Hold how an encoder or ranker is opened and how its vectors are made and searched.

    Fields are named like the flags, which explain them.
    """
    query_encoder: str
    key_encoder: str | None = None
    texts: TextSettings = TextSettings()  # lengths, templates, prompts, pooling, metric; ranker
    pair_types: bool = False
    truncate_dim: int | None = None
    dtype: str = "float16"
    bf16: bool = False
    num_workers: int = 0
    faiss_index_factory: str = "Flat"
    train_sample: int | None = None
    nprobe: int | None = None
    efSearch: int | None = None


@dataclass(frozen=True)
class SearchSettings:
    """Hold what a search depends on, besides the corpus and the questions."""
    method: str                    # a key of SEARCHES
    hits: int | None               # documents per question; None: all of an earlier result
    index: str | None = None       # folder of the vectors or the BM25 index
    overwrite_index: bool = False  # replace the index of another corpus, model or setting
    bm25: BM25Settings = BM25Settings()
    dense: DenseSettings | None = None  # for the methods dense and rank
    task: str = ""                 # instruction for documents if there are no questions
    exclude_self: bool = False     # remove the document that has the question's own id
    results: tuple = ()            # files of earlier results, to rank, fuse or measure
    fusion: str = "rrf"            # rrf or weighted
    fusion_weights: tuple = ()     # one per result; (): equal weights
    key_template: str = ""         # text of the records' own candidates
    needs_indices: bool = False    # rank: every candidate must have its index in the corpus
    scores_all: bool = False       # rank: score and keep all candidates of teacher_scores
    seed: int = 42                 # for random retrieval and faiss's training sample


# ---------------------------------------------------------------- any search

def search(settings, corpus, questions, world):
    """Return the Results of a search (rank without results: CandidateResults) on the main process.

    Without questions only the index is made, and None is returned. With exclude_self, each
    question's own document is removed. Logs which questions find too few documents.
    """
    excludes = settings.exclude_self and questions and not settings.scores_all
    method_settings = settings
    if excludes and settings.hits:  # one document more, as the question's own may be among them
        method_settings = replace(settings, hits=settings.hits + 1)
    results = SEARCHES[settings.method](method_settings, corpus, questions, world)
    if questions and world.is_main:
        if excludes:
            results = leave_out_own(corpus, questions, results, settings.hits, world.log)
        note_missing(settings, questions, results, len(corpus or ()) - bool(excludes), world.log)
    return results


def leave_out_own(corpus, questions, results, hits, log):
    """Return the results without the document, or candidate, that has the question's own id."""
    own = find_own(own_ids(questions), corpus)
    if isinstance(results, CandidateResults):
        for i, question in enumerate(questions):
            doc_indices = list_candidates(question.record)[1] or []
            own[i] = doc_indices.index(own[i]) if own[i] in doc_indices else -1
    found = [own_index in results.row(i)[0] for i, own_index in enumerate(own)]
    note_own(sum(found), len(questions), log)
    return drop_own(results, own, hits)


def note_missing(settings, questions, results, total, log):
    """Log how many questions find no document or, in an approximate index, fewer than asked for.

    total: number of documents that a question could find.
    """
    counts = [len(results.row(i)[0]) for i in range(len(questions))]
    empty = [question for question, count in zip(questions, counts) if not count]
    if empty:
        is_bm25 = settings.method == "bm25"
        reason = "; no document contains any of their words" if is_bm25 else ""
        log(f"note: {len(empty)} of {len(questions)} queries find no document "
            f"(first: {shorten(empty[0].id)}, {shorten(empty[0].text)}){reason}")
    if settings.method != "dense" or settings.dense.faiss_index_factory == "Flat":
        return
    hits = min(settings.hits, total)
    few = sum(0 < count < hits for count in counts)
    if few:
        log(f"note: {few} of {len(questions)} queries find fewer than {hits} documents; raise "
            "--nprobe (IVF) or --efSearch (HNSW)")


# ---------------------------------------------------------------- BM25

def search_bm25(settings, corpus, questions, world):
    """Return the Results of BM25. Each process scores a strided share of the questions."""
    from retrieval.bm25 import open_bm25, search_words
    index = open_bm25(settings, corpus, world)
    return search_words(settings, index, questions, world) if questions else None


# ---------------------------------------------------------------- dense retrieval

class DenseIndex(NamedTuple):
    """Hold what dense retrieval opens once, before the first question."""
    name: str            # the query encoder's
    model: BiEncoder
    collator: GroupCollator
    vectors: np.ndarray  # (N, D), memory-mapped
    metric: str          # the search's: ip or l2
    parts: list          # the parts of a faiss index, see open_indices; None: the search is exact


def search_dense(settings, corpus, questions, world):
    """Return the Results of dense retrieval on the main process, None on the others.

    Every process searches its part of the corpus for all questions, and the main process merges.
    """
    tasks = sorted({question.task for question in questions}) or [settings.task]
    index = open_dense(settings, corpus, tasks, world)
    if not questions:
        return None
    query_vectors = encode_questions(index, questions, world.log, world.is_main)
    return search_query_vectors(settings, index, query_vectors, world)


def open_dense(settings, corpus, tasks, world):
    """Return the DenseIndex for questions of these tasks; missing vectors are encoded."""
    dense = settings.dense
    model, collator = open_search_model(dense, corpus, world)
    check_one_instruction(collator, tasks)
    log_instructions(collator.texts, tasks, world.log)

    # the documents' instruction is the same for all tasks, so the first task serves
    vectors = open_vectors(settings, corpus, model, collator, tasks[0], world)
    metric = "l2" if model.metric == "l2" else "ip"  # the vectors of cos have length 1
    parts = None
    if dense.faiss_index_factory != "Flat":
        from retrieval.faiss_index import describe_search, open_indices
        parts = open_indices(settings.index, vectors, dense.faiss_index_factory, metric,
                             dense.train_sample, settings.seed, world)
        how = describe_search(parts[0][1], settings.hits, faiss_settings(dense)) if parts else ""
        if how:
            world.log(f"{dense.faiss_index_factory}: {how}")
    return DenseIndex(dense.query_encoder, model, collator, vectors, metric, parts)


def faiss_settings(dense):
    """Return the parameters of an approximate search; None where no flag is given."""
    return {"nprobe": dense.nprobe, "efSearch": dense.efSearch}


def search_query_vectors(settings, index, query_vectors, world):
    """Return the Results of query vectors (Q, D) on the main process, None on the others."""
    if index.parts is None:
        first, last = part_range(len(index.vectors), world.rank, world.size)
        doc_indices, scores = search_vectors(index.vectors, query_vectors, first, last,
                                             settings.hits, index.metric, world.is_main)
    else:
        from retrieval.faiss_index import search_indices
        doc_indices, scores = search_indices(index.parts, query_vectors, settings.hits,
                                             index.metric, faiss_settings(settings.dense))
    doc_indices, scores = merge_processes(doc_indices, scores, settings.hits, world)
    return Results(doc_indices, scores) if world.is_main else None


def open_search_model(dense, corpus, world):
    """Return (BiEncoder or CrossEncoder, its collator) of DenseSettings."""
    name = dense.query_encoder
    texts = settle_texts(name, dense.key_encoder, dense.texts, world.log)
    if dense.texts.ranker:
        model = CrossEncoder.open(name, trained=True)
    else:
        model = BiEncoder.open(name, dense.key_encoder, pooling=dense.texts.pooling_method,
                               metric=dense.texts.dense_metric, truncate_dim=dense.truncate_dim,
                               trained=True)
    model.use_texts(texts)
    if dense.pair_types and not dense.texts.ranker:
        for encoder in model.encoders.values():
            encoder.separator = texts.tokenizers["key"].sep_token_id
    texts = replace(texts, max_lengths=limit_lengths(texts.max_lengths, model, world.log))
    if dense.texts.ranker:
        activation = "none" if model.activation is None else type(model.activation).__name__
        world.log(f"{name}: {sum(texts.max_lengths.values())} tokens per pair, activation of the "
                  f"scores: {activation}")
    else:
        world.log(describe_texts(name, model, texts))
    return model.to(world.device).eval(), GroupCollator(texts, corpus)


def log_instructions(texts, tasks, log):
    """Log whose instructions are used, or that an instruction-tuned model gets none."""
    if texts.prompts is not None:
        return  # describe_texts names them
    # a checkpoint that was trained without tasks needs no note
    is_expected = texts.version != "none" and texts.sources["version"] != "args.json"
    if any(any(texts.instruction(task)) for task in tasks):
        log(f"{texts.version}'s instructions are put before the texts of {', '.join(tasks)}")
    elif is_expected and texts.add_instruction and not any(tasks):
        log(f"note: no question names a task, so that {texts.version}'s instructions are not used; "
            "give --task")


def open_vectors(settings, corpus, model, collator, task, world):
    """Return the corpus's vectors (N, D) from the index folder, after encoding missing ones."""
    dense, encoder = settings.dense, model.encoders.get("key", model.query_encoder)
    max_length = collator.texts.max_lengths["key"]
    made_with = {"template": corpus.template, "max_length": max_length,
                 "metric": model.metric, "dtype": dense.dtype, "bf16": dense.bf16,
                 "pooling": encoder.pooling, "separator": encoder.separator,
                 "instruction": collator.instruction(task)[1]}
    if encoder.truncate_dim is not None:
        made_with["truncate_dim"] = encoder.truncate_dim
    if encoder.pooling == "last":
        made_with["end_token"] = collator.texts.appends_end
    expected = fingerprint(corpus, dense.key_encoder or dense.query_encoder, made_with, world)
    if settings.overwrite_index and world.is_main:
        remove_other_index(settings.index, expected)

    def tokenize(texts):
        return collator.keys(texts, [task] * len(texts))
    return encode_corpus(model, corpus, tokenize, max_length, settings.index, dense.dtype, world,
                         expected, dense.num_workers, dense.bf16)


@torch.no_grad()
def encode_questions(index, questions, log, is_main=True):
    """Return the questions' vectors (Q, D) by the query encoder of a DenseIndex.

    Logs how many questions are truncated. Raises InputError if a vector is not finite.
    """
    max_length = index.collator.texts.max_lengths["query"]
    vectors, num_long = [], 0
    starts = range(0, len(questions), ENCODED_QUESTIONS)
    for start in progress_bar(starts, desc="encoding questions", is_main=is_main):
        chunk = questions[start:start + ENCODED_QUESTIONS]
        token_ids = index.collator.queries([question.text for question in chunk],
                                           [question.task for question in chunk])
        num_long += sum(len(ids) >= max_length for ids in token_ids)
        vectors.append(index.model.encode(token_ids, "query").float())
    if num_long:
        log(f"note: {num_long} of {len(questions)} queries have {max_length} tokens or more; only "
            f"the first {max_length} are encoded (--query_max_length)")
    query_vectors = torch.cat(vectors)
    is_finite = query_vectors.isfinite().all(dim=1)
    if not is_finite.all():
        question = questions[int(is_finite.int().argmin())]
        raise InputError(f"{index.name}: the vector of question {shorten(question.id)} is not "
                         "finite; the checkpoint is broken, use another")
    return query_vectors


# ---------------------------------------------------------------- ranking

def search_ranked(settings, corpus, questions, world):
    """Return the documents of an earlier result in the model's order or, without one, each record's
    own candidates as CandidateResults.

    Each process ranks a strided share of the questions.
    """
    if settings.results:
        earlier = read_run(settings.results[0], questions, corpus, world.log)
    else:
        check_candidates(questions, corpus, settings.key_template, settings.needs_indices,
                         settings.scores_all)
    model, collator = open_search_model(settings.dense, corpus, world)
    if not settings.dense.texts.ranker:
        tasks = sorted({question.task for question in questions})
        log_instructions(collator.texts, tasks, world.log)

    share = range(world.rank, len(questions), world.size)
    rows = []
    for i in progress_bar(share, desc="ranking", is_main=world.is_main):
        if settings.results:
            indices, _ = earlier.row(i)
            texts = [corpus.text(doc_index) for doc_index in indices]
        else:
            keys, _ = list_candidates(questions[i].record, settings.scores_all)
            texts = key_texts(questions[i], keys, settings.key_template)
            indices = list(range(len(texts)))
        scores = score_keys(model, collator, questions[i], texts, settings.dense.bf16, world.device)
        order = np.lexsort((indices, -scores))
        if not settings.scores_all:
            order = order[:settings.hits]
        rows.append((i, np.array(indices, int)[order], scores[order]))
    num_long = sum(gather_lists([collator.num_long_pairs], world))
    if num_long:
        world.log(f"note: {num_long:,} pairs of a query and a document fill the ranker's tokens; "
                  "what exceeds them is not read (--key_max_length; scripts/make_corpus.py cuts "
                  "documents into passages)")
    results = stack_rows(gather_lists(rows, world))
    return results if settings.results else CandidateResults(*results)


@torch.no_grad()
def score_keys(model, collator, question, texts, bf16, device):
    """Return the model's scores (n) of key texts for one question, a numpy array."""
    if not texts:
        return np.zeros(0, np.float32)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        if isinstance(model, CrossEncoder):
            scores = model.predict(collator.pairs([question.text] * len(texts), texts))
        else:
            query_ids = collator.queries([question.text], [question.task])
            key_ids = collator.keys(texts, [question.task] * len(texts))
            query_vectors = model.encode(query_ids, "query")
            key_vectors = model.encode(key_ids, "key")
            scores = model.score(query_vectors, key_vectors)[0]
    return scores.float().cpu().numpy()


# ---------------------------------------------------------------- other methods

def search_random(settings, corpus, questions, world):
    """Return documents drawn at random by seed and question, a baseline for every measure."""
    count = min(settings.hits, len(corpus))
    rows = []
    for i in range(len(questions)):
        rng = np.random.default_rng([settings.seed, i])
        doc_indices = rng.choice(len(corpus), count, replace=False)
        rows.append((i, doc_indices, -np.arange(count, dtype=np.float32)))
    return stack_rows(rows)


def search_fused(settings, corpus, questions, world):
    """Return earlier results merged into one."""
    weights = settings.fusion_weights or [1.0] * len(settings.results)
    results = [read_run(path, questions, corpus, world.log) for path in settings.results]
    return fuse(results, settings.fusion, weights, settings.hits)


def search_saved(settings, corpus, questions, world):
    """Return an earlier result as it is."""
    return read_run(settings.results[0], questions, corpus, world.log, settings.hits)


# {--retrieval_method: function(settings, corpus, questions, world)}. On the main process a function
# returns Results or CandidateResults, or None if there are no questions
SEARCHES = {"dense": search_dense, "bm25": search_bm25, "rank": search_ranked,
            "random": search_random, "fuse": search_fused, "run": search_saved}
