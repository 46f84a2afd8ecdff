"""Qrels in every format, and Trove's filters."""
import pytest

from records.qrels import merge_qrels, read_qrels, select_qrels
from retrieval_helpers import write_rows
from utils import InputError


@pytest.fixture
def qrels_file(tmp_path):
    rows = ["query-id\tcorpus-id\tscore", "1\ta\t3", "1\tb\t1", "1\tc\t0", "1\td\t2", "2\ta\t0.5"]
    return write_rows(tmp_path / "qrels.tsv", rows)


@pytest.mark.parametrize("filters,expected", [
    ("", {"1": "abcd", "2": "a"}), (",min_score=1", {"1": "abd"}),
    (",max_score=1", {"1": "c", "2": "a"}),
    (",min_score=1,max_score=3", {"1": "bd"}), (",top_k=2", {"1": "ad", "2": "a"}),
    (",bottom_k=2", {"1": "cb", "2": "a"}), (",first_k=3,min_score=1", {"1": "abd"}),
    (",random_k=1", {"1": 1, "2": 1}), (",top_k=1,first_k=2", {"1": "a", "2": "a"})])
def test_filters(qrels_file, filters, expected):
    selected = select_qrels(f"qrels={qrels_file}{filters}")
    given = {}
    for query, labels in selected.items():
        given[query] = len(labels) if isinstance(expected[query], int) else "".join(labels)
    assert given == expected


def test_transforms_subset_and_formats(qrels_file, tmp_path):
    assert select_qrels(f"qrels={qrels_file},score=7")["2"] == {"a": 7.0}
    assert select_qrels(f"qrels={qrels_file},score=ceil")["2"] == {"a": 1.0}
    assert select_qrels(f"qrels={qrels_file},score=floor")["2"] == {"a": 0.0}
    subset = write_rows(tmp_path / "subset", ["2"])
    assert set(select_qrels(f"qrels={qrels_file},query_subset={subset}")) == {"2"}
    trec = write_rows(tmp_path / "trec", ["1 0 a 3", "", "1 0 b 1"])
    rows = [{"qid": 1, "docid": "a", "score": 3}, {"qid": "1", "docid": "b", "score": 1}]
    jsonl = write_rows(tmp_path / "j.jsonl", rows)
    assert read_qrels(trec) == read_qrels(jsonl) == {"1": {"a": 3.0, "b": 1.0}}


def test_the_later_flag_holds(qrels_file, tmp_path):
    other = write_rows(tmp_path / "other", ["2 0 a 9", "2 0 b 1"])
    assert merge_qrels([f"qrels={qrels_file}", f"qrels={other}"])["2"] == {"a": 9.0, "b": 1.0}


@pytest.mark.parametrize("spec,message", [
    ("F,top=3", "unknown filter top"), ("F,top_k=x", "with numbers"),
    ("F,random_k=-1", "random_k must be >= 0, got -1"),
    ("top_k=3", "qrels=FILE is missing"),
    ("F,score=high", "must be a number, floor or ceil")])
def test_bad_filters(qrels_file, spec, message):
    with pytest.raises(InputError, match=message):
        select_qrels(spec.replace("F", f"qrels={qrels_file}"))


@pytest.mark.parametrize("rows,message", [
    (["1 0 a 3", "1 0 b"], "q:2: not a qrel"), (['{"qid": 1, "docid": "a"}'], "q:1: not a qrel"),
    ([], "holds no qrels")])
def test_bad_qrels(tmp_path, rows, message):
    path = write_rows(tmp_path / "q", rows)
    with pytest.raises(InputError, match=message):
        read_qrels(path)
