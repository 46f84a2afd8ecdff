"""Measures of a retriever while it trains: on annotated documents, by average rank, or by searching a corpus.

All three give the same figures for any number of processes: each query is measured once, against the same documents.
"""
from typing import NamedTuple

import torch
from tqdm import tqdm

from corpus import format_key
from data import read_json
from dense_data import document_numbers
from metrics import has_answer, rank_documents, ranking_metrics, topk_accuracy
from retriever import gather_tensors
from utils import InputError, sum_over_processes

BLOCK = 2048  # texts tokenised and encoded at a time


class DevSet(NamedTuple):
    """What is measured: method annotated, rank or retrieval, and per query its text, task and labels, answers or pool."""
    method: str
    queries: list
    tasks: list
    labels: list   # {document number: relevance} per query, or None
    answers: list  # gold answers per query (metric nq)
    pools: list    # key texts per query, the positive first (rank)


def annotated_set(qrels, corpus, queries, group_size):
    """The annotated documents of each query, the group_size most relevant of them, as in Trove."""
    qrels = document_numbers(qrels, corpus, queries)
    labels = [dict(sorted(own.items(), key=lambda pair: -pair[1])[:group_size]) for own in qrels.values()]
    return DevSet("annotated", [queries[query] for query in qrels], [""] * len(labels), labels, [], [])


def read_dev_set(path, corpus, metrics, template):
    """DPR's records (average rank), or LLM-Embedder's with pos_index or answers (retrieval from the corpus). Raises InputError."""
    records = read_json(path)
    if not records:
        raise InputError(f"{path}: holds no records")
    if "positive_ctxs" in records[0][0]:
        return rank_set(records, template)
    if corpus is None:
        raise InputError(f"{path}: its queries are measured by retrieval, which needs --corpus")
    dev = DevSet("retrieval", [], [], [], [], [])
    for record, place in records:
        query, found = record.get("query", record.get("question")), record.get("pos_index")
        if not isinstance(query, str):
            raise InputError(f"{place}: no 'query' (or 'question') text")
        if found is None and set(metrics) != {"nq"} or "nq" in metrics and not record.get("answers"):
            raise InputError(f"{place}: metrics {' '.join(metrics)} need " + ("'answers'" if found is not None else "'pos_index'"))
        if any(not 0 <= number < len(corpus) for number in found or []):
            raise InputError(f"{place}: pos_index {found} lies outside the corpus of {len(corpus)} documents; is it another one's?")
        dev.queries.append(query)
        dev.tasks.append(record.get("task", ""))
        dev.labels.append({number: 1 for number in found or []})
        dev.answers.append(record.get("answers") or [])
    return dev


def rank_set(records, template, hard=30, other=30):
    """DPR's average-rank validation: each question's first positive, 30 hard and 30 other negatives, all pooled (its defaults)."""
    dev = DevSet("rank", [], [], [], [], [])
    for record, place in records:
        if record.get("positive_ctxs"):
            pool = record["positive_ctxs"][:1] + (record.get("hard_negative_ctxs") or [])[:hard]
            pool += (record.get("negative_ctxs") or [])[:other]
            dev.queries.append(record["question"])
            dev.tasks.append("")
            dev.pools.append([format_key(key, template) for key in pool])
    if not dev.queries:
        raise InputError(f"{records[0][1]}: no record has a positive, so no rank can be measured")
    return dev


@torch.no_grad()
def evaluate(model, dev, collator, corpus, metrics, cutoffs, world):
    """{metric: mean} of a model in evaluation mode; the same on all processes."""
    model.eval()
    own = range(world.rank, len(dev.queries), world.size)
    if dev.method == "rank":
        return {"rank": average_rank(model, dev, collator, own, world)}
    measure = annotated_metrics if dev.method == "annotated" else retrieval_metrics
    rows = measure(model, dev, collator, corpus, metrics, cutoffs, own, world)
    names = [f"{name}@{k}" for name in metrics for k in cutoffs]
    totals = sum_over_processes([sum(row[name] for row in rows) for name in names] + [len(rows)], world)
    return {name: total / totals[-1] for name, total in zip(names, totals)}


def encode_texts(model, rows, role, hidden=True, desc="encoding"):
    """Vectors (n, D) of token id lists, a block at a time."""
    bar = tqdm(range(0, len(rows), BLOCK), desc=desc, leave=False, disable=True if hidden else None)
    device = next(model.parameters()).device
    return torch.cat([torch.zeros(0, device=device)] + [model.encode(rows[i:i + BLOCK], role) for i in bar])


def annotated_metrics(model, dev, collator, corpus, metrics, cutoffs, own, world):
    """One {metric: value} per own query: its annotated documents in the model's order."""
    rows, own = [], list(own)
    for start in range(0, len(own), 64):
        part = own[start:start + 64]
        if collator.args.ranker:
            scores = iter(model(collator.pairs([dev.queries[q] for q in part for _ in dev.labels[q]],
                                               [corpus.text(d) for q in part for d in dev.labels[q]])).tolist())
            ranked = [rank_documents({d: next(scores) for d in dev.labels[q]}) for q in part]
        else:
            documents = sorted({d for q in part for d in dev.labels[q]})
            place = {d: i for i, d in enumerate(documents)}
            queries = encode_texts(model, collator.queries([dev.queries[q] for q in part], [dev.tasks[q] for q in part]), "query")
            texts = [corpus.text(d) for d in documents]
            table = model.score(queries, encode_texts(model, collator.keys(texts, [""] * len(texts)), "key")).tolist()
            ranked = [rank_documents({d: table[i][place[d]] for d in dev.labels[q]}) for i, q in enumerate(part)]
        rows += [ranking_metrics(ranking, dev.labels[q], metrics, cutoffs) for ranking, q in zip(ranked, part)]
    return rows


def average_rank(model, dev, collator, own, world):
    """Mean, over all questions, of the number of pooled passages, of all questions, that score above the own positive."""
    queries = encode_texts(model, collator.queries([dev.queries[q] for q in own], [""] * len(own)), "query")
    passages = [text for q in own for text in dev.pools[q]]
    keys = encode_texts(model, collator.keys(passages, [""] * len(passages)), "key", not world.is_main)
    starts = [sum(len(dev.pools[q]) for q in own[:i]) for i in range(len(own))]
    scores = model.score(queries, keys) if len(own) else queries.new_zeros(0, 0)
    positives = scores[torch.arange(len(own)), starts][:, None]
    total = int((scores > positives).sum())
    for rank, block in enumerate(gather_tensors(keys) if world.size > 1 else []):
        if rank != world.rank and len(own):
            total += int((model.score(queries, block) > positives).sum())
    total, count = sum_over_processes([total, len(own)], world)
    return total / count


def search(model, dev, collator, corpus, k, world):
    """The k best document numbers of every query, equal scores by number, (n, k) on every process."""
    task = dev.tasks[0]
    queries = encode_texts(model, collator.queries(dev.queries, dev.tasks), "query")
    first, last = (len(corpus) * part // world.size for part in (world.rank, world.rank + 1))
    best, numbers = queries.new_zeros(len(queries), 0), torch.zeros(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in tqdm(range(first, last, BLOCK), desc="encoding the corpus", leave=False, disable=None if world.is_main else True):
        block = range(start, min(start + BLOCK, last))
        scores = model.score(queries, model.encode(collator.keys([corpus.text(d) for d in block], [task] * len(block)), "key"))
        best, numbers = merge_best(torch.cat([best, scores], 1),
                                   torch.cat([numbers, torch.tensor(block, device=queries.device).expand(len(queries), -1)], 1), k)
    if world.size > 1:
        best, numbers = (torch.cat(gather_tensors(rows.t().contiguous())).t() for rows in (best, numbers))
        best, numbers = merge_best(best, numbers, k)
    return numbers


def merge_best(scores, numbers, k):
    """The k highest scores (n, K) and their numbers, in order; equal scores keep the order of their columns."""
    scores, order = scores.sort(dim=1, descending=True, stable=True)
    return scores[:, :k], numbers.gather(1, order[:, :k])


def retrieval_metrics(model, dev, collator, corpus, metrics, cutoffs, own, world):
    """One {metric: value} per own query, of the documents found in the whole corpus."""
    found = search(model, dev, collator, corpus, max(cutoffs), world).tolist()
    rows = []
    for q in own:
        row = ranking_metrics(found[q], dev.labels[q], [name for name in metrics if name != "nq"], cutoffs)
        if "nq" in metrics:
            row |= topk_accuracy([has_answer(corpus.passage(d)["text"], dev.answers[q]) for d in found[q]], cutoffs)
        rows.append(row)
    return rows
