"""Measuring a retriever while it trains: on annotated documents, by average rank, or by searching a
corpus.

The figures do not depend on the number of processes: each query is measured once, by one process,
against the same documents.
"""
from typing import NamedTuple

import torch

from dense.batches import identity
from dense.gather import gather_tensors
from metrics import has_answer, ranking_metrics, topk_accuracy
from records.fields import labelled_keys
from records.questions import own_ids, read_questions
from records.templates import format_key
from retrieval.exact_search import merge_processes, part_range, search_blocks
from retrieval.measures import index_labels, note_absent_queries, trec_ranking
from retrieval.results import Results, drop_own, find_own
from utils import InputError, gather_lists, progress_bar, shorten, sum_over_processes

ENCODED_TEXTS = 2048    # texts that are tokenised and encoded at a time
ANNOTATED_QUERIES = 64  # queries whose annotated documents are scored at a time
RANKED_QUERIES = 256    # queries that are scored against all pooled passages at a time
DEPTH = 200             # fewest documents per query that a search ranks: retrieve.py's --hits


class DevSet(NamedTuple):
    """Hold the queries that a retriever is measured on; each list has one entry per query."""
    method: str    # annotated, rank or retrieval
    queries: list  # texts
    tasks: list    # "" for no instruction
    labels: list   # {doc index: label}, below -1 if not in the corpus; not for rank
    answers: list  # gold answers; for retrieval only
    pools: list    # key texts, the positive first; for rank only
    own: list = ()    # index of the query's own document, to leave out, or -1; (): leave none out
    level: int = 1    # lowest label that counts as relevant
    is_regex: bool = False  # answers are regular expressions


# ---------------------------------------------------------------- reading dev sets

def make_annotated_set(qrels, corpus, queries, group_size, source="the qrels", log=print,
                  exclude_self=False):
    """Return the DevSet of each query's annotated documents.

    As in Trove, only the group_size most relevant documents are kept; None keeps all. Judged
    queries that are not in `queries`, {id: text}, are left out, and documents that are not in the
    corpus count as not found. Both are logged. `source` names the qrels in messages. Raises
    InputError if no judged query, or no labelled document, is found.
    """
    query_ids = [query_id for query_id in qrels if query_id in queries]
    if not query_ids:
        raise InputError(f"{source}: none of the queries, such as {shorten(next(iter(qrels), ''))},"
                         " is in the query files; give their file with --queries")
    note_absent_queries(qrels, queries, log)
    rows = index_labels([qrels[query_id] for query_id in query_ids], corpus, log)
    dev = DevSet("annotated", [], [], [], [], [])
    for query_id, labels in zip(query_ids, rows):
        most_relevant = sorted(labels, key=lambda doc_index: -labels[doc_index])[:group_size]
        dev.queries.append(queries[query_id])
        dev.tasks.append("")
        dev.labels.append({doc_index: labels[doc_index] for doc_index in most_relevant})
    return dev._replace(own=find_own(query_ids, corpus)) if exclude_self else dev


def read_dev_set(path, corpus, metrics, template, log, exclude_self=False):
    """Return the DevSet of a file of records.

    DPR's records are measured by average rank. So are, if there is no corpus, records with
    positives and negatives but without pos_index and answers. Other records, such as
    LLM-Embedder's, are measured by retrieval from the corpus. Raises InputError.
    """
    questions = read_questions(path)
    first = questions[0].record
    is_retrieved = first.get("pos_index") is not None or questions[0].answers
    if "positive_ctxs" in first or not (corpus or is_retrieved) and all(labelled_keys(first)):
        return make_rank_set(questions, template, log)
    if corpus is None:
        raise InputError(f"{path}: its queries are measured by retrieval, which needs --corpus")
    dev = DevSet("retrieval", [], [], [], [], [])
    for question in questions:
        check_labels(question, metrics, len(corpus))
        dev.queries.append(question.text)
        dev.tasks.append(question.task)
        dev.labels.append({doc_index: 1 for doc_index in question.pos_index or []})
        dev.answers.append(question.answers)
    return dev._replace(own=find_own(own_ids(questions), corpus)) if exclude_self else dev


def check_labels(question, metrics, corpus_size):
    """Raise InputError if a question lacks a field that the metrics need, or has an index outside
    the corpus.
    """
    needed = f"{question.location}: metrics {' '.join(metrics)} need "
    if question.pos_index is None and set(metrics) != {"nq"}:
        raise InputError(needed + "'pos_index'")
    if "nq" in metrics and not question.answers:
        raise InputError(needed + "'answers'")
    for doc_index in question.pos_index or []:
        if not (type(doc_index) is int and 0 <= doc_index < corpus_size):
            raise InputError(f"{question.location}: pos_index {shorten(doc_index)} lies outside "
                             f"the corpus of {corpus_size} documents; give the corpus of this file")


def make_rank_set(questions, template, log, hard=30, other=30):
    """Return the DevSet of DPR's average-rank validation: each question's first positive, 30 hard
    and 30 other negatives (DPR's defaults). Logs how many questions have no positive.
    """
    dev = DevSet("rank", [], [], [], [], [])
    for question in questions:
        record = question.record
        positives, negatives = labelled_keys(record)
        if not positives:
            continue
        pool = positives[:1]
        if record.get("positive_ctxs"):
            pool += (record.get("hard_negative_ctxs") or [])[:hard]
            pool += (record.get("negative_ctxs") or [])[:other]
        else:
            pool += negatives[:hard + other]
        dev.queries.append(question.text)
        dev.tasks.append(question.task)
        dev.pools.append([format_key(key, template, question.location) for key in pool])
    if not dev.queries:
        raise InputError(f"{questions[0].location}: no record has a positive, so no rank can be "
                         "measured")
    if len(dev.queries) < len(questions):
        log(f"note: {len(questions) - len(dev.queries)} of {len(questions)} dev records have no "
            "positive and are not measured")
    return dev


# ---------------------------------------------------------------- a part of a dev set

class FirstDocuments:
    """Show the first `count` documents of a corpus as a corpus of its own."""

    def __init__(self, corpus, count):
        self.corpus, self.count = corpus, count

    def __len__(self):
        return self.count

    def text(self, doc_index):
        return self.corpus.text(doc_index)

    def passage(self, doc_index):
        return self.corpus.passage(doc_index)

    def ids(self, doc_indices):
        return self.corpus.ids(doc_indices)


def sample_dev_set(dev, corpus, world):
    """Return (DevSet, corpus, share of the whole work) of a part, to estimate an evaluation's time.

    For retrieval, which mostly encodes the corpus, the part has fewer documents. For the other
    methods, it has fewer queries.
    """
    if dev.method == "retrieval":
        count = min(ENCODED_TEXTS * world.size, len(corpus))
        return dev, FirstDocuments(corpus, count), count / len(corpus)
    count = min(ANNOTATED_QUERIES * world.size, len(dev.queries))
    columns = {name: value[:count] for name, value in dev._asdict().items()
               if isinstance(value, (list, tuple))}
    return dev._replace(**columns), corpus, count / len(dev.queries)


# ---------------------------------------------------------------- measuring

@torch.no_grad()
def measure_retriever(model, dev, collator, corpus, metrics, cutoffs, world):
    """Return {metric@k: mean over all queries}, on every process; {"rank": mean} for average rank.

    Leaves the model in evaluation mode.
    """
    model.eval()
    if dev.method == "rank":
        return {"rank": average_rank(model, dev, collator, world)}
    share = range(world.rank, len(dev.queries), world.size)  # the queries of this process
    if dev.method == "annotated":
        rankings = rank_annotated(model, dev, collator, corpus, share)
    else:
        all_rankings = search_corpus(model, dev, collator, corpus, max(cutoffs), world)
        rankings = [all_rankings[query_index] for query_index in share]

    names = list(dict.fromkeys(f"{name}@{k}" for name in metrics for k in cutoffs))
    sums = dict.fromkeys(names, 0.0)
    for query_index, ranking in zip(share, rankings):
        values = measure_ranking(ranking, dev, query_index, corpus, metrics, cutoffs)
        for name in names:
            sums[name] += values[name]
    *totals, count = sum_over_processes([*sums.values(), len(share)], world)
    return {name: total / count for name, total in zip(names, totals)}


def measure_ranking(ranking, dev, query_index, corpus, metrics, cutoffs):
    """Return {metric@k: value} of one query's ranked doc indices."""
    by_label = [name for name in metrics if name != "nq"]
    values = ranking_metrics(ranking, dev.labels[query_index], by_label, cutoffs, dev.level)
    if "nq" in metrics:
        answers = dev.answers[query_index]
        hits = [has_answer(corpus.passage(doc_index)["text"], answers, dev.is_regex)
                for doc_index in ranking]
        values |= topk_accuracy(hits, cutoffs)
    return values


# ---------------------------------------------------------------- texts to vectors

def encode_blocks(model, collator, role, texts, tasks, is_main=False, desc=""):
    """Yield (index of the first text, vectors (n, D)) of texts, a block at a time.

    role: query or key. texts: a list, or a CorpusTexts.
    """
    tokenize = collator.queries if role == "query" else collator.keys
    for first in progress_bar(range(0, len(texts), ENCODED_TEXTS), desc=desc, is_main=is_main):
        block = slice(first, first + ENCODED_TEXTS)
        token_ids = tokenize(texts[block], tasks[block])
        yield first, model.encode(token_ids, role)


def encode_texts(model, collator, role, texts, tasks, is_main=False, desc=""):
    """Return the vectors (n, D) of all texts."""
    blocks = [vectors for _, vectors in encode_blocks(model, collator, role, texts, tasks, is_main,
                                                      desc)]
    return torch.cat(blocks) if blocks else model.encode([], role)


# ---------------------------------------------------------------- annotated documents

def rank_annotated(model, dev, collator, corpus, share):
    """Return, for each query index of `share`, its annotated doc indices ranked by the model."""
    score_pools = score_pools_by_pairs if collator.settings.ranker else score_pools_by_vectors
    rankings = []
    for start in range(0, len(share), ANNOTATED_QUERIES):
        part = share[start:start + ANNOTATED_QUERIES]
        pools = [list_annotated(dev, query_index) for query_index in part]
        scored = score_pools(model, dev, collator, corpus, part, pools) if any(pools) else pools
        for pool, scores in zip(pools, scored):
            rankings.append(trec_ranking(pool, scores, corpus))
    return rankings


def list_annotated(dev, query_index):
    """Return a query's annotated doc indices that are in the corpus, without its own document if
    that is left out.
    """
    own = dev.own[query_index] if dev.own else -1
    return [doc_index for doc_index in dev.labels[query_index] if doc_index >= 0
            and doc_index != own]


def score_pools_by_pairs(model, dev, collator, corpus, part, pools):
    """Return, per query of `part`, a ranker's scores of the documents of its pool.

    pools: doc indices per query.
    """
    queries, texts = [], []
    for query_index, pool in zip(part, pools):
        queries += [dev.queries[query_index]] * len(pool)
        texts += [corpus.text(doc_index) for doc_index in pool]
    scores = iter(model(collator.pairs(queries, texts)).tolist())
    return [[next(scores) for _ in pool] for pool in pools]


def score_pools_by_vectors(model, dev, collator, corpus, part, pools):
    """Do as score_pools_by_pairs with a bi-encoder, which encodes each document once."""
    doc_indices = sorted({doc_index for pool in pools for doc_index in pool})
    columns = {doc_index: column for column, doc_index in enumerate(doc_indices)}
    texts = [corpus.text(doc_index) for doc_index in doc_indices]
    queries = [dev.queries[query_index] for query_index in part]
    tasks = [dev.tasks[query_index] for query_index in part]
    query_vectors = encode_texts(model, collator, "query", queries, tasks)
    key_vectors = encode_texts(model, collator, "key", texts, [""] * len(texts))
    rows = model.score(query_vectors, key_vectors).tolist()  # (queries, documents)
    return [[row[columns[doc_index]] for doc_index in pool] for row, pool in zip(rows, pools)]


# ---------------------------------------------------------------- average rank

def average_rank(model, dev, collator, world):
    """Return the average rank of the positives (DPR's validation).

    The rank counts how many passages, of all questions' pools, score above the question's positive.
    Another passage with the same score counts half. Otherwise an encoder that maps all texts to one
    vector would get the best rank.
    """
    share = range(world.rank, len(dev.queries), world.size)
    queries = [dev.queries[query_index] for query_index in share]
    tasks = [dev.tasks[query_index] for query_index in share]
    passages, positives = [], []  # positives: position of each question's positive in passages
    for query_index in share:
        positives.append(len(passages))
        passages += dev.pools[query_index]
    query_vectors = encode_texts(model, collator, "query", queries, tasks)
    key_vectors = encode_texts(model, collator, "key", passages, dev.tasks[:1] * len(passages),
                               world.is_main, "encoding")
    identities = torch.tensor([identity(text) for text in passages], device=key_vectors.device)

    # the passages of all processes, in the order of their ranks
    pools = gather_tensors(key_vectors) if world.size > 1 else [key_vectors]
    all_identities = gather_tensors(identities) if world.size > 1 else [identities]
    all_keys, all_identities = torch.cat(pools), torch.cat(all_identities)
    first = sum(len(pool) for pool in pools[:world.rank])
    # (Q, 1)
    columns = torch.tensor(positives, dtype=torch.long, device=all_keys.device)[:, None] + first

    above = 0
    for start in range(0, len(queries), RANKED_QUERIES):
        part = slice(start, start + RANKED_QUERIES)
        scores = model.score(query_vectors[part], all_keys)  # (queries, passages)
        own = scores.gather(1, columns[part])
        is_tie = (scores == own) & (all_identities != all_identities[columns[part]])
        above += int((scores > own).sum()) + int(is_tie.sum()) / 2
    above, count = sum_over_processes([above, len(queries)], world)
    return above / count


# ---------------------------------------------------------------- search

class CorpusTexts:
    """Read the key texts of documents first .. last - 1 from the corpus, one slice at a time."""

    def __init__(self, corpus, first, last):
        self.corpus = corpus
        self.doc_indices = range(first, last)

    def __len__(self):
        return len(self.doc_indices)

    def __getitem__(self, block):
        return [self.corpus.text(doc_index) for doc_index in self.doc_indices[block]]


def search_corpus(model, dev, collator, corpus, k, world):
    """Return, on every process, the doc indices of the k best documents of every query.

    Each process encodes and searches its part of the corpus for all queries. Documents are ranked
    by trec_ranking, as retrieve.py measures a run. The search is at least DEPTH deep, as in
    retrieve.py, because documents that tie at the last rank are chosen by doc index.
    """
    query_vectors = encode_texts(model, collator, "query", dev.queries, dev.tasks)
    # whole blocks, so that the shapes of matrix products do not depend on the number of processes
    first, last = part_range(len(corpus), world.rank, world.size, ENCODED_TEXTS)
    texts = CorpusTexts(corpus, first, last)
    tasks = [dev.tasks[0]] * len(texts)
    blocks = encode_blocks(model, collator, "key", texts, tasks, world.is_main,
                           "encoding the corpus")
    blocks = ((first + start, vectors) for start, vectors in blocks)
    # the vectors of cos have length 1, so that inner products are cosines
    metric = "l2" if model.metric == "l2" else "ip"
    depth = max(k, DEPTH) + bool(dev.own)
    doc_indices, scores = search_blocks(query_vectors, blocks, depth, metric)
    found = Results(*merge_processes(doc_indices.cpu().numpy(), scores.cpu().numpy(), depth, world))

    rankings = []
    if world.is_main:  # gather_lists sends them to the others
        if dev.own:
            found = drop_own(found, dev.own, depth - 1)
        rankings = [trec_ranking(*found.row(i), corpus)[:k] for i in range(len(dev.queries))]
    return gather_lists(rankings, world)
