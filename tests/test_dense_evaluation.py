"""Measures of a retriever: minDPR's average rank, the search of a corpus, dev sets that are
refused.
"""
import json

import pytest
import torch
import torch.nn.functional as F

from conftest import make_bert
from dense.model import BiEncoder
from golden_retrievers import GOLDEN, Ids, mindpr_file, mindpr_passages, mindpr_queries
from retrieval import dev_set as evaluation
from retrieval.dev_set import DevSet, average_rank, make_annotated_set, read_dev_set, search_corpus
from utils import InputError, World

ALONE = World(0, 0, 1, torch.device("cpu"))


def test_mindpr_average_rank(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation, "RANKED_QUERIES", 3)
    model = BiEncoder.open(mindpr_file(tmp_path / "x")).eval()
    model.key_encoder.separator = 2
    passages = mindpr_passages()
    pools = [passages[i:i + 2] for i in range(0, 8, 2)]
    dev = DevSet("rank", mindpr_queries(), [""] * 4, [], [], pools)
    monkeypatch.setattr(evaluation, "identity", lambda ids: hash(tuple(ids)))
    with torch.no_grad():
        assert average_rank(model, dev, Ids(), ALONE) == GOLDEN["mindpr/rank_average"] == 3.25


def test_average_rank_of_equal_vectors_is_the_middle_one():
    """An encoder that gives all texts one vector is no perfect one; copies of a positive are not
    counted against it.
    """
    class Flat:
        def encode(self, texts, role):
            return torch.ones(len(texts), 4)

        def score(self, queries, keys):
            return queries @ keys.t()

    class Texts:
        def queries(self, texts, tasks):
            return texts
        keys = queries

    dev = DevSet("rank", ["q", "r"], ["", ""], [], [], [["a", "b", "c"], ["a", "d", "e"]])
    assert average_rank(Flat(), dev, Texts(), ALONE) == 4 / 2


def test_average_rank_is_measured_with_the_tasks_instructions(tmp_path):
    """unilm 1325, sentence-transformers 3394: what is put before texts in training is there, too,
    where they are measured.
    """
    record = {"question": "q", "task": "qa", "positive_ctxs": [{"title": "", "text": "a"}]}
    (tmp_path / "dev.json").write_text(json.dumps([record]))
    dev = read_dev_set(tmp_path / "dev.json", None, ["mrr"], "{text}", print)
    assert dev.tasks == ["qa"]
    seen = []

    class Texts:
        def queries(self, texts, tasks):
            seen.append(tasks)
            return texts
        keys = queries

    class Flat:
        def encode(self, texts, role):
            return torch.ones(len(texts), 4)

        def score(self, queries, keys):
            return queries @ keys.t()

    average_rank(Flat(), dev, Texts(), ALONE)
    assert seen == [["qa"], ["qa"]]


class ListCorpus(list):
    text = list.__getitem__

    def ids(self, doc_indices):
        return [f"{doc_index:02d}" for doc_index in doc_indices]


@pytest.mark.parametrize("metric", ["ip", "cos", "l2"])
def test_search_equals_sorted_scores(metric, tmp_path, monkeypatch):
    # both copies of a text are in the same column of a block, so their scores have the same bits
    monkeypatch.setattr(evaluation, "ENCODED_TEXTS", 6)
    model = BiEncoder.open(make_bert(tmp_path / "bert"), metric=metric, temperature=0.5).eval()
    texts = [torch.randint(6, 30, (n,)).tolist() for n in (5, 9, 3, 7, 7, 2)]
    dev = DevSet("retrieval", texts[:2], ["", ""], [], [], [])
    with torch.no_grad():
        queries, keys = model.encode(texts[:2], "query"), model.encode(texts, "key")
        expected = {"ip": queries @ keys.t(),
                    "cos": F.cosine_similarity(queries[:, None], keys[None], dim=-1),
                    "l2": -torch.cdist(queries, keys).square()}[metric]
        rankings = search_corpus(model, dev, Ids(), ListCorpus(texts + texts), 6, ALONE)
        everything = search_corpus(model, dev, Ids(), ListCorpus(texts), 100, ALONE)
    # every document is there twice: the one with the higher id comes first, as in trec_eval
    twice = torch.cat([expected, expected], 1).flip(1)
    order = 11 - twice.sort(dim=1, descending=True, stable=True).indices
    assert rankings == order[:, :6].tolist()
    assert everything == expected.sort(dim=1, descending=True).indices.tolist()


class FiveDocuments(list):
    def indices(self, ids):
        return [int(document_id[1:]) for document_id in ids]


def test_annotated_sets_keep_the_most_relevant_documents():
    qrels = {"a": {"d0": 1.0, "d4": 3.0, "d2": 1.0}, "b": {"d1": 0.0}}
    dev = make_annotated_set(qrels, FiveDocuments(range(5)), {"a": "who", "b": "what"}, 2)
    assert dev.queries == ["who", "what"] and dev.labels == [{4: 3.0, 0: 1.0}, {1: 0.0}]
    assert len(make_annotated_set(qrels, FiveDocuments(range(5)), {"a": "who", "b": "what"},
                             None).labels[0]) == 3


@pytest.mark.parametrize("record, metrics, message", [
    ({"query": "q", "answers": ["a"]}, ["mrr"], "need 'pos_index'"),
    ({"query": "q", "pos_index": [1]}, ["mrr", "nq"], "need 'answers'"),
    ({"query": "q", "pos_index": [1, 5]}, ["mrr"], "lies outside the corpus of 5 documents"),
    ({"query": "q", "pos_index": ["d1"]}, ["mrr"], "lies outside the corpus of 5 documents"),
    ({"pos_index": [1]}, ["mrr"], "no 'question'"),
    ({"question": "q", "positive_ctxs": []}, ["mrr"], "no record has a positive"),
])
def test_dev_sets_that_cannot_be_measured(record, metrics, message, tmp_path):
    path = tmp_path / "dev.jsonl"
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(InputError, match=message) as error:
        read_dev_set(path, FiveDocuments(range(5)), metrics, "{title} {text}", print)
    assert f"{path}:1" in str(error.value)
    if "positive_ctxs" not in record:
        with pytest.raises(InputError):
            read_dev_set(path, None, metrics, "{title} {text}", print)


def test_average_rank_pools_a_positive_and_thirty_of_each_kind(tmp_path):
    passages = [{"title": "", "text": str(i)} for i in range(80)]
    record = {"question": "q", "positive_ctxs": passages[:2], "hard_negative_ctxs": passages[2:40],
              "negative_ctxs": passages[40:]}
    (tmp_path / "dev.json").write_text(json.dumps([record, {"question": "r", "positive_ctxs": []}]))
    dev = read_dev_set(tmp_path / "dev.json", None, ["mrr"], "{text}", print)
    assert dev.queries == ["q"]
    assert dev.pools == [["0"] + [str(i) for i in (*range(2, 32), *range(40, 70))]]


def test_repeated_metrics_and_cutoffs_change_nothing(monkeypatch):
    """Named twice, a measure is computed once."""
    dev = DevSet("annotated", ["q"], [""], [{0: 1, 1: 0}], [], [])
    monkeypatch.setattr(evaluation, "rank_annotated", lambda *_: [[1, 0]])
    model = torch.nn.Linear(1, 1)
    once = evaluation.measure_retriever(model, dev, None, None, ["mrr", "recall"], [1, 2], ALONE)
    twice = evaluation.measure_retriever(model, dev, None, None, ["mrr", "recall", "mrr"],
                                         [1, 2, 2], ALONE)
    assert once == twice == {"mrr@1": 0.0, "mrr@2": 0.5, "recall@1": 0.0, "recall@2": 1.0}
