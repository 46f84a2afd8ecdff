"""Labels of results' documents, and measures as trec_eval computes them."""
import pytest

from records.corpus import Corpus
from retrieval.measures import (
    average_measures,
    mark_answers,
    measure_queries,
    read_labels,
)
from retrieval_helpers import make_questions, make_results, write_corpus
from utils import InputError


@pytest.fixture
def corpus(tmp_path):
    return Corpus(write_corpus(tmp_path / "corpus.jsonl"), "{title} {text}")


def test_labels_of_absent_documents_count_as_not_found(corpus):
    """As in trec_eval: recall's denominator and nDCG's ideal have them."""
    import pytrec_eval
    qrels = {"0": {"d1": 1, "gone": 2, "lost": 1}, "1": {"d2": 1}}
    questions, logged = make_questions({}, {}), []
    labels = read_labels(questions, qrels, corpus, logged.append)
    assert logged == ["note: 2 of 4 labelled documents are not in the corpus (first: 'gone'); "
                      "they count as not found"]
    results = make_results([1, 3, 4], [5, 2, -1])
    names = ["recall", "ndcg", "map"]
    rows = measure_queries(questions, results, labels, None, corpus, names, [3])
    given, counts = average_measures(rows, names, [3], print)
    assert counts == dict.fromkeys(names, 2)
    run = {}
    for i in range(2):
        run[str(i)] = {f"d{doc_index}": -rank for rank, doc_index in enumerate(results.row(i)[0])}
    whole_labels = {query: {d: int(s) for d, s in row.items()} for query, row in qrels.items()}
    evaluator = pytrec_eval.RelevanceEvaluator(whole_labels,
                                               {"recall.3", "ndcg_cut.3", "map_cut.3"})
    expected = evaluator.evaluate(run)
    names = {"recall@3": "recall_3", "ndcg@3": "ndcg_cut_3", "map@3": "map_cut_3"}
    for ours, theirs in names.items():
        assert given[ours] == pytest.approx(sum(row[theirs] for row in expected.values()) / 2,
                                            abs=1e-6)
    with pytest.raises(InputError, match="none of the qrels' documents .*'gone'"):
        read_labels(questions, {"0": {"gone": 1}}, corpus, print)
    with pytest.raises(InputError, match="no document for any of the questions .*'7'.*'0'"):
        read_labels(questions, {"7": {"d1": 1}}, corpus, print)
    with pytest.raises(InputError, match="no document for any of the questions .*None.*'0'"):
        read_labels(questions, {}, corpus, print)  # filters left nothing


def test_means_are_over_the_questions_that_have_labels_or_answers(corpus):
    questions = make_questions({"answers": ["text 1"]}, {"pos_index": [2]}, {"answers": ["none"]})
    results, logged = make_results([0, 1], [2, 3], [4, 5]), []
    labels, marks = read_labels(questions, None, corpus,
                                print), mark_answers(questions, results, corpus)
    assert labels == [{}, {2: 1}, {}] and marks == [[False, True], None, [False, False]]
    rows = measure_queries(questions, results, labels, marks, corpus, ["nq", "mrr"], [1, 2])
    values, _ = average_measures(rows, ["nq", "mrr"], [1, 2], logged.append)
    assert values == {"nq@1": 0, "nq@2": 0.5, "mrr@1": 1, "mrr@2": 1}
    assert logged == ["note: nq is the mean over the 2 of 3 questions that have answers",
                      "note: mrr is the mean over the 1 of 3 questions that have labels"]
