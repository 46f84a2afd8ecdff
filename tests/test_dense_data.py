"""Files into training groups: LLM-Embedder's selection rules, DPR's records, qrels with filters, batches, corpora."""
import argparse
import gzip
import json
import random
from collections import Counter

import pytest

from conftest import make_bert
from corpus import Corpus, read_queries
from dense_data import (Example, GroupCollator, GroupSet, choose_group, filter_examples, plan_batches, qrels_examples, read_examples,
                        tokenize)
from qrels import read_qrels, select_qrels
from utils import InputError


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows) + "\n")
    return str(path)


def group(example, size=3, positive="first", negative="first", stable=False, seed=0):
    return choose_group(example, size, positive, negative, stable, random.Random(seed))


EXAMPLE = Example("q", ["p0", "p1"], ["n0", "n1", "n2"], [0.1, 0.5, 0.9, 0.2, 0.4])


@pytest.mark.parametrize("positive,want", [("first", ("p0", 0.1)), ("teacher", ("n0", 0.9)), ("teacher-pos", ("p1", 0.5))])
def test_select_positive(positive, want):
    keys, scores = group(EXAMPLE, 3, positive)
    assert (keys[0], scores[0]) == want
    assert keys[1:] == (["n1", "n2"] if positive == "teacher" else ["n0", "n1"])  # a negative that became the positive is taken out


@pytest.mark.parametrize("negative,want", [("first", ["n0", "n1"]), ("teacher+", ["n0", "n2"]), ("teacher-", ["n1", "n2"])])
def test_select_negative(negative, want):
    keys, scores = group(EXAMPLE, 3, negative=negative)
    assert keys[1:] == want
    assert scores[1:] == [{"n0": 0.9, "n1": 0.2, "n2": 0.4}[key] for key in want]


def test_random_selection_scarce_negatives_and_stable_order():
    seen = {group(EXAMPLE, 2, "random", "random", seed=seed)[0][i] for seed in range(40) for i in (0, 1)}
    assert seen == {"p0", "p1", "n0", "n1", "n2"}
    keys, _ = group(EXAMPLE._replace(scores=None), 9, negative="random")
    assert len(keys) == 9 and set(Counter(keys[1:]).values()) <= {2, 3}  # three negatives, repeated thrice, eight of them
    keys, scores = group(EXAMPLE, 4, negative="random", stable=True)
    assert keys == ["p0", "n0", "n2", "n1"] and scores == [0.1, 0.9, 0.4, 0.2]


def test_chat_takes_its_positive_from_the_history(tmp_path):
    path = lines(tmp_path / "chat.json", [{"query": "q", "history": ["a", "b", "c"], "teacher_scores": [0.1, 0.7, 0.2], "task": "chat"}])
    example = read_examples(path)[0]
    assert group(example, 3, "teacher") == (["b", "a", "c"], [0.7, 0.1, 0.2])


def test_dpr_records(tmp_path):
    passage = {"title": "T", "text": "x", "passage_id": "7"}
    rows = [{"question": "q", "answers": [], "positive_ctxs": [passage, {"title": "", "text": "z"}], "hard_negative_ctxs": [],
             "negative_ctxs": [{"title": "", "text": "y"}]}, {"question": "r", "positive_ctxs": [], "hard_negative_ctxs": []}]
    path = tmp_path / "dpr.json"
    path.write_text(json.dumps(rows))
    kept, dropped = filter_examples(read_examples(path), 2, "first")
    assert [example.pos for example in kept] == [[passage]] and kept[0].neg[0]["text"] == "y"
    assert dropped == {"no positive": (1, f"{path}, record 1")}


def test_filters_by_teacher_scores():
    examples = [EXAMPLE, EXAMPLE._replace(scores=[0.5] * 5), EXAMPLE._replace(scores=[-3, -4, -5, -6, -7.0]), EXAMPLE._replace(neg=[], scores=None)]
    kept, dropped = filter_examples(examples, 3, "first", margin=0.1, least=-1)
    assert kept == [EXAMPLE] and [count for count, _ in dropped.values()] == [1, 1, 1]
    assert len(filter_examples([EXAMPLE._replace(pos=[])], 3, "first")[0]) == 0
    assert len(filter_examples([EXAMPLE._replace(pos=[], scores=[1, 2, 3.0])], 3, "teacher")[0]) == 1


# ---------------------------------------------------------------------------------------------------- qrels

@pytest.fixture
def qrels_file(tmp_path):
    return lines(tmp_path / "qrels.tsv", ["query-id\tcorpus-id\tscore", "1\ta\t3", "1\tb\t1", "1\tc\t0", "1\td\t2", "2\ta\t0.5"])


@pytest.mark.parametrize("filters,want", [
    ("", {"1": "abcd", "2": "a"}), (",min_score=1", {"1": "abd"}), (",max_score=1", {"1": "c", "2": "a"}),
    (",min_score=1,max_score=3", {"1": "bd"}), (",top_k=2", {"1": "ad", "2": "a"}), (",bottom_k=2", {"1": "cb", "2": "a"}),
    (",first_k=3,min_score=1", {"1": "abd"}), (",random_k=1", {"1": 1, "2": 1})])
def test_filters(qrels_file, filters, want):
    got = select_qrels(f"qrels={qrels_file}{filters}")
    assert {q: len(own) if isinstance(want[q], int) else "".join(own) for q, own in got.items()} == want


def test_transforms_subset_and_formats(qrels_file, tmp_path):
    assert select_qrels(f"qrels={qrels_file},score=7")["2"] == {"a": 7.0}
    assert select_qrels(f"qrels={qrels_file},score=ceil")["2"] == {"a": 1.0}
    assert select_qrels(f"qrels={qrels_file},score=floor")["2"] == {"a": 0.0}
    subset = lines(tmp_path / "subset", ["2"])
    assert set(select_qrels(f"qrels={qrels_file},query_subset={subset}")) == {"2"}
    trec = lines(tmp_path / "trec", ["1 0 a 3", "1 0 b 1"])
    jsonl = lines(tmp_path / "j.jsonl", [{"qid": 1, "docid": "a", "score": 3}, {"qid": "1", "docid": "b", "score": 1}])
    assert read_qrels(trec) == read_qrels(jsonl) == {"1": {"a": 3.0, "b": 1.0}}


@pytest.fixture
def corpus_file(tmp_path):
    return lines(tmp_path / "corpus.jsonl", [{"_id": id, "title": id.upper(), "text": f"text {id}"} for id in "abcd"])


def test_examples_from_merged_qrels(qrels_file, corpus_file):
    corpus, queries = Corpus([corpus_file], "{title} {text}"), {"1": "one", "2": "two"}
    positives, negatives = select_qrels(f"qrels={qrels_file},min_score=2"), select_qrels(f"qrels={qrels_file}")
    example, = qrels_examples(corpus, queries, positives, negatives, {}, 2)
    assert (example.query, example.pos, example.neg) == ("one", [0, 3], [1, 2])  # numbers; what is positive is no negative
    graded = qrels_examples(corpus, queries, {}, {}, select_qrels(f"qrels={qrels_file},min_score=0.1"), 1)
    assert graded[0].scores == [3, 1, 2] and graded[0].neg == [0, 1, 3]
    keys, labels = group(graded[0], 2, "graded", seed=1)
    assert [graded[0].scores[graded[0].neg.index(key)] for key in keys] == labels
    with pytest.raises(InputError, match="has 1 labelled documents, --group_size wants 2"):
        qrels_examples(corpus, queries, {}, {}, select_qrels(f"qrels={qrels_file},min_score=0.1"), 2)
    with pytest.raises(InputError, match="document 'zz'"):
        qrels_examples(corpus, queries, {"1": {"zz": 1}}, {}, {}, 2)
    with pytest.raises(InputError, match="query '9'"):
        qrels_examples(corpus, queries, {"9": {"a": 1}}, {}, {}, 2)


def test_corpora(tmp_path, corpus_file):
    corpus = Corpus(corpus_file, "{title}: {text}")
    assert corpus.text(2) == "C: text c" and corpus.numbers(["c", "x"]) == [2, -1] and corpus.passage(2)["text"] == "text c"
    packed = tmp_path / "corpus.jsonl.gz"
    packed.write_bytes(gzip.compress(open(corpus_file, "rb").read()))
    table = lines(tmp_path / "psgs.tsv", ["id\ttext\ttitle", '10\t"a ""quoted"" one"\tT', "11\tplain\tU"])
    both = Corpus([str(packed), table], "{title} {text}")
    assert [both.text(i) for i in (3, 4, 5)] == ["D text d", 'T a "quoted" one', "U plain"]
    assert both.ids([5, 0]) == ["11", "a"] and both.numbers(["11", "a"]) == [5, 0]
    numbered = Corpus(lines(tmp_path / "c.json", [{"content": "x"}, {"content": "y"}]), "{content}")
    assert numbered.ids([1]) == ["1"] and numbered.numbers(["1", "2", "x"]) == [1, -1, -1] and numbered.text(1) == "y"
    assert read_queries([lines(tmp_path / "q.tsv", ["7\twho"]), lines(tmp_path / "q.jsonl", [{"_id": "8", "text": "what"}])]) == {
        "7": "who", "8": "what"}


def test_large_corpora_are_read_once(tmp_path, monkeypatch):
    """The table of lines and the unpacked file are used again, and only for the file that they were made from."""
    monkeypatch.setattr("corpus.KEEP_TABLE", 10)
    path, scans, scan = tmp_path / "c.jsonl.gz", [], Corpus.scan
    monkeypatch.setattr(Corpus, "scan", lambda self, *args: scans.append(1) or scan(self, *args))
    for letters, count in (("abc", 1), ("abc", 1), ("bcd", 2)):
        if count > len(scans):
            with gzip.open(path, "wt") as file:
                file.writelines(f'{{"id": "{letter * 3}", "text": "{letter}é"}}\n' for letter in letters)
        corpus = Corpus(str(path), "{text}")
        assert [corpus.text(i) for i in range(3)] == [letter + "é" for letter in letters] and len(scans) == count
        assert corpus.numbers([letters[2] * 3, "zzz"]) == [2, -1] and corpus.ids([1]) == [letters[1] * 3]
    with pytest.raises(InputError, match="'bbb' occurs twice"):
        Corpus([str(path), lines(tmp_path / "more.jsonl", [{"id": "bbb", "text": "x"}])], "{text}")
    with pytest.raises(InputError, match="some files name ids"):
        Corpus([str(path), lines(tmp_path / "more.jsonl", [{"text": "x"}])], "{text}")


@pytest.mark.parametrize("name,content,message", [
    ("c.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "a", "text": "y"}\n', "'a' occurs twice"),
    ("c.jsonl", '{"_id": "a", "text": "x"}\n{"_id": "b", "te', "c.jsonl:2: not valid JSON"),
    ("c.jsonl", '{"_id": "a", "content": "x"}\n', "no column 'text' for --key_template"),
    ("c.jsonl", '{"_id": "a", "text": "x"}\n\n{"text": "y"}\n', "c.jsonl:3: no '_id'"), ("c.jsonl", '{"_id": "a", "text": "x"}\n[1]\n', "a list"),
    ("c.tsv", "id\ttext\ttitle\n1\tx\n", "c.tsv:2: 2 columns, the header names 3"), ("c.tsv", "a\tb\n", "neither JSON lines nor a table"),
    ("c.tsv", "id\ttext\n", "holds no documents")])
def test_bad_corpora(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        Corpus(str(tmp_path / name), "{title} {text}")


@pytest.mark.parametrize("spec,message", [("F,top=3", "unknown filter top"), ("F,top_k=x", "with numbers"), ("top_k=3", "qrels=FILE is missing"),
                                          ("F,score=high", "must be a number, floor or ceil")])
def test_bad_filters(qrels_file, spec, message):
    with pytest.raises(InputError, match=message):
        select_qrels(spec.replace("F", f"qrels={qrels_file}"))


@pytest.mark.parametrize("record,message", [
    ({"query": "q", "pos": ["a"], "neg": ["b"], "teacher_scores": [1.0]}, "1 teacher_scores for 1 positives and 1 negatives"),
    ({"pos": ["a"]}, "no 'query'"), ({"query": "q", "pos": [3]}, "must be a text or an object")])
def test_bad_records(tmp_path, record, message):
    with pytest.raises(InputError, match=message):
        read_examples(lines(tmp_path / "r.jsonl", [record]))


# ---------------------------------------------------------------------------------------------------- batches

@pytest.mark.parametrize("same", [None, "epoch", "random"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_plan_batches(same, world_size):
    sizes = [10, 3, 7]
    plans = [plan_batches(sizes, 1, 42, True, 2, 2, same, rank, world_size) for rank in range(world_size)]
    counted = [place for plan in plans for update in plan for batch in update for place, counted in batch if counted]
    if same != "random":
        assert sorted(counted) == list(range(20))  # each once, whatever the number of processes
    if same:
        dataset = [0] * 10 + [1] * 3 + [2] * 7
        for updates in zip(*plans):
            for batches in zip(*updates):
                assert len({dataset[place] for batch in batches for place, _ in batch}) == 1
    assert all(len(update) == len(plans[0][i]) for plan in plans for i, update in enumerate(plan))
    assert plans[0] != plan_batches(sizes, 2, 42, True, 2, 2, same, 0, world_size)
    assert plan_batches(sizes, 0, 1, False, 4, 1)[0] == [[(0, True), (1, True), (2, True), (3, True)]]


def test_collator(tmp_path):
    from checkpoints import load_tokenizer
    tokenizer = load_tokenizer(make_bert(tmp_path / "b"), "")
    args = argparse.Namespace(query_template="{query}", key_template="{title} [SEP] {text}", query_max_length=20, key_max_length=6,
                              pooling_method="cls", ranker=False)
    examples = [Example("who", [{"title": "a", "text": "town in the river of it", "passage_id": "1"}], ["it", "it"], None, "qa"),
                Example("what", ["it"], ["in", "of"], [3.0, 2.0, 1.0])]
    settings = {"group_size": 3, "select_positive": "first", "select_negative": "first", "stable": False}
    groups = GroupSet(examples, [settings, settings], 0)
    batch = GroupCollator(tokenizer, args, None, {"qa": ("who wrote ", "the ")})([groups[(0, True)], groups[(1, True)]])
    words = [tokenizer.decode(ids) for ids in batch["queries"] + batch["keys"]]
    assert words[0] == "[CLS] who wrote who [SEP]" and words[3] == "[CLS] the it [SEP]"
    assert words[2] == "[CLS] the a [SEP] town [SEP]"  # title and text as a pair, cut at the right
    assert batch["teacher"][0].isnan().all() and batch["teacher"][1].tolist() == [3, 2, 1]
    same = batch["identities"].tolist()
    assert same[1] == same[2] == same[3] and len(set(same)) == 4
    assert tokenize(tokenizer, ["who " * 9], 5, append_eos=True)[0][-1] == tokenizer.sep_token_id
