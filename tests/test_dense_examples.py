"""Training examples and groups from files: LLM-Embedder's selection rules, DPR's records, qrels."""
import json
import random
from collections import Counter
from dataclasses import fields

import pytest

from dense.examples import (
    Example,
    ExamplesOnDisk,
    find_scored_contexts,
    graded_examples,
    qrels_examples,
    read_examples,
    read_outlines,
)
from dense.training_data import (
    DataSettings,
    GroupRule,
    Target,
    TaskSettings,
    choose_examples,
    choose_group,
    read_training,
)
from records import record_file
from records.corpus import Corpus
from records.qrels import select_qrels
from utils import InputError

EXAMPLE = Example("q", ["p0", "p1"], ["n0", "n1", "n2"], [0.1, 0.5, 0.9, 0.2, 0.4])


def lines(path, rows):
    path.write_text("\n".join(json.dumps(row) if isinstance(row, dict) else row for row in rows)
                    + "\n")
    return str(path)


def group(example, size=3, positive="first", negative="first", stable=False, seed=0):
    return choose_group(example, GroupRule(size, positive, negative, stable), random.Random(seed))


# ---------------------------------------------------------------- groups

@pytest.mark.parametrize("positive, expected", [("first", ("p0", 0.1)), ("teacher", ("n0", 0.9)),
                                                ("teacher-pos", ("p1", 0.5))])
def test_select_positive(positive, expected):
    keys, scores = group(EXAMPLE, 3, positive)
    assert (keys[0], scores[0]) == expected
    # a negative that became the positive is taken out
    assert keys[1:] == (["n1", "n2"] if positive == "teacher" else ["n0", "n1"])


@pytest.mark.parametrize("negative, expected", [("first", ["n0", "n1"]), ("teacher+", ["n0", "n2"]),
                                                ("teacher-", ["n1", "n2"])])
def test_select_negative(negative, expected):
    keys, scores = group(EXAMPLE, 3, negative=negative)
    assert keys[1:] == expected
    assert scores[1:] == [{"n0": 0.9, "n1": 0.2, "n2": 0.4}[key] for key in expected]


def test_random_selection_scarce_negatives_and_stable_order():
    seen = {group(EXAMPLE, 2, "random", "random", seed=seed)[0][i] for seed in range(40)
            for i in (0, 1)}
    assert seen == {"p0", "p1", "n0", "n1", "n2"}
    keys, _ = group(EXAMPLE._replace(scores=None), 9, negative="random")
    assert len(keys) == 9
    # three negatives, repeated thrice, eight of them
    assert set(Counter(keys[1:]).values()) <= {2, 3}
    keys, scores = group(EXAMPLE, 4, negative="random", stable=True)
    assert keys == ["p0", "n0", "n2", "n1"] and scores == [0.1, 0.9, 0.4, 0.2]


# ---------------------------------------------------------------- records

def test_chat_takes_its_positive_from_the_history(tmp_path):
    record = {"query": "q", "history": ["a", "b", "c"], "teacher_scores": [0.1, 0.7, 0.2],
              "task": "chat"}
    example = read_examples(lines(tmp_path / "chat.json", [record]))[0]
    assert example.task == "chat" and group(example, 3,
                                            "teacher") == (["b", "a", "c"], [0.7, 0.1, 0.2])


def test_dpr_records(tmp_path):
    passage = {"title": "T", "text": "x", "passage_id": "7"}
    rows = [{"question": "q", "answers": [], "positive_ctxs": [passage, {"title": "", "text": "z"}],
             "hard_negative_ctxs": [], "negative_ctxs": [{"title": "", "text": "y"}]},
            {"question": "r", "positive_ctxs": [], "hard_negative_ctxs": []}]
    path = tmp_path / "dpr.json"
    path.write_text(json.dumps(rows))
    kept, logged = keep(read_examples(path), 2)
    assert [example.pos for example in kept] == [[passage]] and kept[0].neg[0]["text"] == "y"
    assert logged == [f"1 records dropped: no positive, first {path}, record 1"]


def keep(examples, group_size, select_positive="first", **settings):
    """Return (kept examples, logged lines) for a model that scores a query with its own keys only.
    """
    logged = []
    settings = TaskSettings(select_positive=select_positive, **settings)
    rule = GroupRule(group_size, select_positive, "random", False)
    kept = choose_examples(list(read_outlines(examples)), settings, Target.POSITIVES, rule, False,
                           logged.append)
    return [examples[index] for index in kept], logged


def test_examples_on_disk_are_those_in_memory(tmp_path, monkeypatch):
    passage = {"title": "T", "text": "x"}
    dpr = [{"question": "q", "positive_ctxs": [passage, passage], "hard_negative_ctxs": [passage],
            "negative_ctxs": [passage]}, {"question": "r", "positive_ctxs": []}]
    scored = [{"query": "q", "pos": ["a"], "neg": ["b", "c"], "teacher_scores": [0.25, 3, 1.5]},
              {"query": "s", "pos": ["a"], "neg": ["d"], "prompt": "find: ", "neg_scores": [1]},
              {"query": "r", "history": ["a", "b"], "teacher_scores": [0, 1], "task": "chat"}]
    paths = [lines(tmp_path / "scored.jsonl", scored), str(tmp_path / "dpr.json")]
    (tmp_path / "dpr.json").write_text(json.dumps(dpr))
    settings = {"select_positive": "teacher", "loss": "infonce"}
    logged, stored_logged = [], []
    listed = read_data(*paths, log=logged.append, **settings)
    monkeypatch.setattr(record_file, "LARGE", 0)
    for _ in range(2):  # with the tables and without them
        stored = read_data(*paths, log=stored_logged.append, **settings)
        assert isinstance(stored.examples.datasets[1][0], ExamplesOnDisk)
        assert list(stored.examples) == list(listed.examples)
        assert len(listed.examples) == 4
        assert list(stored.examples.outlines()) == list(listed.examples.outlines())
        assert stored[1:] == listed[1:]
    assert stored_logged == logged * 2
    with pytest.raises(InputError, match="r.jsonl:1: no column 'body' for --key_template"):
        read_data(lines(tmp_path / "r.jsonl", [{"query": "q", "pos": [passage], "neg": [passage]}]),
                  key_template="{body}")
    with pytest.raises(InputError, match="dpr.json, record 0: no column 'body'"):
        read_data(paths[1], key_template="{body}")  # another template needs another table


def test_filters_by_teacher_scores():
    examples = [EXAMPLE, EXAMPLE._replace(scores=[0.5] * 5),
                EXAMPLE._replace(scores=[-3, -4, -5, -6, -7.0]),
                EXAMPLE._replace(neg=[], scores=None)]
    kept, logged = keep(examples, 3, teacher_scores_margin=0.1, teacher_scores_min=-1)
    assert kept == [EXAMPLE] and [line.split(" records")[0] for line in logged] == ["1"] * 3
    assert len(keep([EXAMPLE._replace(pos=[])], 3)[0]) == 0
    assert len(keep([EXAMPLE._replace(pos=[], scores=[1, 2, 3.0])], 3, "teacher")[0]) == 1
    # the one negative that there is would become the positive
    one = EXAMPLE._replace(pos=["p"], neg=["n"], scores=[0.1, 0.9])
    assert not keep([one], 2, "teacher")[0] and keep([one], 2)[0]
    assert keep([one._replace(scores=[0.9, 0.1])], 2, "teacher")[0]


@pytest.mark.parametrize("record, message", [({"query": "q", "pos": ["a"], "neg": ["b"],
                                               "teacher_scores": [1.0]},
                                              "1 teacher_scores for 1 positives and 1 negatives"),
                                             ({"query": "q", "pos": ["a"], "neg": ["b"],
                                               "teacher_scores": 1.0},
                                              "'teacher_scores' must be a list"),
                                             ({"query": "q", "history": "a"},
                                              "'history' must be a list"),
                                             ({"query": "q", "pos": {"a": 1}},
                                              "'pos' must be a list"),
                                             ({"pos": ["a"]}, "no 'question'"),
                                             ({"query": "q", "pos": [3]},
                                              "must be a text or an object"),])
def test_bad_records(tmp_path, record, message):
    with pytest.raises(InputError, match=message) as error:
        read_examples(lines(tmp_path / "r.jsonl", [record]))
    assert "r.jsonl:1" in str(error.value)


# ---------------------------------------------------------------- contexts with a reader's scores

def scored_record(scores, **fields):
    """Return a reader's record with a context per score; None: the reader has not read it."""
    contexts = []
    for index, score in enumerate(scores):
        context = {"id": str(index), "title": "T", "text": f"c{index}", "score": 9.0 - index}
        if score is not None:
            context |= {"retrieval_score": 9.0 - index, "score": score}
        contexts.append(context)
    return {"question": "q", "answers": ["a"], "ctxs": contexts} | fields


def test_contexts_that_were_not_read_are_left_out():
    """A22: a context with the retriever's score alone has not been read, nor with --reader_scores.
    """
    record = scored_record([-1.0, 2.0])
    record["ctxs"].append({"id": "2", "title": "T", "text": "c2", "retrieval_score": 7.0})
    for reader_scores in (False, True):
        contexts, scores = find_scored_contexts(record, "f:1", reader_scores)
        assert [context["id"] for context in contexts] == ["0", "1"] and scores == [-1.0, 2.0]


def read_scored(path, records, **changes):
    """Return (training data, logged lines) of a distillation from records, in groups of two."""
    logged = []
    changes = {"loss": "fid-kd"} | changes
    return read_data(lines(path, records), log=logged.append, **changes), logged


def test_contexts_that_a_reader_scored_are_a_group_as_they_are(tmp_path):
    record = scored_record([-1.0, 2.0, 0.5, None])
    data, logged = read_scored(tmp_path / "r.jsonl", [record])
    example, = data.examples
    assert not logged and example.pos == [] and example.scores == [-1.0, 2.0, 0.5]
    assert [context["text"] for context in example.neg] == ["c0", "c1", "c2"]

    # which of them a visit takes; none of them is a positive
    def texts(**changes):
        rule = data.group_rules[0]._replace(**changes)
        keys, scores = choose_group(example, rule, random.Random(0))
        assert scores == [example.scores[int(key["id"])] for key in keys]
        return [key["text"] for key in keys]
    assert texts(select_negative="first") == ["c0", "c1"]
    assert texts(select_negative="teacher+") == ["c1", "c2"]
    assert texts(select_negative="first", stable=True) == ["c1", "c0"]
    drawn = Counter()
    for seed in range(300):
        keys, _ = choose_group(example, data.group_rules[0], random.Random(seed))
        drawn.update(key["text"] for key in keys)
    assert sum(drawn.values()) == 600 and all(150 < count < 250 for count in drawn.values())

    # a positive is chosen by the teacher where a loss needs one
    data, _ = read_scored(tmp_path / "r.jsonl", [record], loss=None, select_positive="teacher")
    keys, scores = choose_group(data.examples[0], data.group_rules[0], random.Random(0))
    assert keys[0]["text"] == "c1" and scores[0] == 2.0


def test_scored_contexts_go_before_positives_without_scores(tmp_path):
    record = scored_record([1.0, 2.0], pos=["p"], neg=["n"])
    data, _ = read_scored(tmp_path / "r.jsonl", [record])
    assert [key["text"] for key in data.examples[0].neg] == ["c0", "c1"]
    for changes in ({"loss": "infonce"}, {}):
        if not changes:
            record["teacher_scores"] = [1.0, 0.0]
        data, _ = read_scored(tmp_path / "r.jsonl", [record], **changes)
        assert data.examples[0].pos == ["p"] and data.examples[0].neg == ["n"]


def test_teacher_scores_of_contexts(tmp_path):
    record = scored_record([None, None], teacher_scores=[-3.0, -1.0])
    data, _ = read_scored(tmp_path / "r.jsonl", [record], loss="kl")
    assert data.examples[0].scores == [-3.0, -1.0]
    with pytest.raises(InputError, match="r.jsonl:1: 1 teacher_scores for 0 .* or ctxs"):
        read_scored(tmp_path / "r.jsonl", [record | {"teacher_scores": [1.0]}])


@pytest.mark.parametrize("loss", ["fid-kd", "kl", "emdr2"])
def test_a_retriever_does_not_learn_from_its_own_scores(tmp_path, loss):
    retrieved = scored_record([None, None, None])
    with pytest.raises(InputError, match="r.jsonl: no record has teacher scores; test.py --scores"):
        read_scored(tmp_path / "r.jsonl", [retrieved], loss=loss)
    # FiD's own files hold the reader's scores without saying so
    data, _ = read_scored(tmp_path / "r.jsonl", [retrieved], loss=loss, reader_scores=True)
    assert data.examples[0].scores == [9.0, 8.0, 7.0]


def test_scored_records_that_cannot_be_distilled(tmp_path):
    records = [scored_record([1.0]), scored_record([1.0, 1.0]), scored_record([None, None]),
               scored_record([1.0, 2.0])]
    data, logged = read_scored(tmp_path / "r.jsonl", records, teacher_scores_margin=0.5)
    assert len(data.examples) == 1
    assert logged == [
        f"1 records dropped: fewer scored keys than --train_group_size, first {tmp_path}/r.jsonl:1",
        "1 records dropped: teacher scores closer than --teacher_scores_margin, first "
        f"{tmp_path}/r.jsonl:2",
        f"1 records dropped: no teacher scores, first {tmp_path}/r.jsonl:3"]
    with pytest.raises(InputError, match="no example is left"):
        read_scored(tmp_path / "r.jsonl", records, loss="infonce")
    broken = scored_record([1.0, "high"])
    with pytest.raises(InputError, match="r.jsonl:1: teacher scores must be finite numbers"):
        read_scored(tmp_path / "r.jsonl", [broken])
    broken["ctxs"] = [{"text": "a", "score": 1.0}, {"text": "b"}]
    with pytest.raises(InputError, match="r.jsonl:1: context 1 has no 'score' of a reader"):
        read_scored(tmp_path / "r.jsonl", [broken], reader_scores=True)


def read_data(*paths, log=print, **flags):
    """Return the TrainingData of files, in groups of two, with these flags."""
    names = {field.name for field in fields(TaskSettings)}
    task = TaskSettings(**{name: flags.pop(name) for name in names & flags.keys()})
    data = {"train_data": paths, "train_group_size": 2, "inbatch_same_dataset": "epoch"} | flags
    return read_training(DataSettings(**data), task, None, {}, log)


def test_training_data_of_several_tasks(tmp_path):
    qa = {"query": "q", "pos": ["a"], "neg": ["b"], "teacher_scores": [1.0, 0.0], "task": "qa"}
    chat = {"query": "r", "history": ["a", "b"], "teacher_scores": [0.0, 1.0], "task": "chat"}
    paths = [lines(tmp_path / "qa.json", [qa, qa, qa | {"pos": []} | {"teacher_scores": [1.0]}]),
             lines(tmp_path / "chat.json", [chat])]
    logged = []
    data = read_data(*paths, use_train_config=True, log=logged.append)
    assert data.dataset_sizes == [2, 1] and [example.task
                                             for example in data.examples] == ["qa", "qa", "chat"]
    assert data.group_rules[0] == GroupRule(2, "first", "random", True)
    assert data.group_rules[2] == GroupRule(2, "teacher", "random", False)
    assert data.task_settings["chat"].teacher_temperature == 0.1
    assert data.task_settings["qa"].contrastive_weight == 0
    assert logged == [f"1 records dropped: no positive, first {paths[0]}:3"]
    with pytest.raises(InputError, match="needs --inbatch_same_dataset epoch"):
        read_data(*paths, use_train_config=True, inbatch_same_dataset=None)


def test_records_without_positives_are_told_the_way(tmp_path):
    records = lines(tmp_path / "q.json", [{"question": "q", "answers": ["a"]},
                                          {"question": "r", "answers": ["b"], "neg": ["c"]}])
    with pytest.raises(InputError, match="q.json: no record has a positive.*--metrics collate_pos"):
        read_data(records)
    table = lines(tmp_path / "q.csv", ["question,answer", "who,Bob"])
    with pytest.raises(InputError, match="q.csv: a table of questions.*--metrics collate_pos"):
        read_data(table)
    few = lines(tmp_path / "few.json", [{"question": "q", "pos": ["a"]}])
    with pytest.raises(InputError, match="few.json: no example is left to train on"):
        read_data(few, ranker=True)


def test_flags_without_llm_embedders_settings_are_those_given(tmp_path):
    chat = {"query": "q", "pos": ["a"], "neg": ["b"], "task": "chat"}
    data = read_data(lines(tmp_path / "chat.json", [chat]), select_positive="random")
    assert data.task_settings == {"chat": TaskSettings(select_positive="random")}


# ---------------------------------------------------------------- qrels

def test_examples_from_merged_qrels(tmp_path):
    qrels_file = lines(tmp_path / "qrels.tsv", ["query-id\tcorpus-id\tscore", "1\ta\t3", "1\tb\t1",
                                                "1\tc\t0", "1\td\t2", "2\ta\t0.5"])
    documents = [{"_id": name, "title": name.upper(), "text": f"text {name}"} for name in "abcd"]
    corpus = Corpus([lines(tmp_path / "corpus.jsonl", documents)], "{title} {text}")
    queries = {"1": "one", "2": "two"}
    positives = select_qrels(f"qrels={qrels_file},min_score=2")
    negatives = select_qrels(f"qrels={qrels_file}")
    example, = qrels_examples(corpus, queries, positives, negatives)
    # doc indices; what is positive is no negative
    assert (example.query, example.pos, example.neg) == ("one", [0, 3], [1, 2])
    labelled = select_qrels(f"qrels={qrels_file},min_score=0.1")
    graded = graded_examples(corpus, queries, labelled, 1)
    assert graded[0].scores == [3, 1, 2] and graded[0].neg == [0, 1, 3]
    keys, labels = group(graded[0], 2, "none", "random", seed=1)
    assert [graded[0].scores[graded[0].neg.index(key)] for key in keys] == labels
    trained = read_training(DataSettings(graded=[f"qrels={qrels_file},min_score=0.1"],
                                         train_group_size=1),
                            TaskSettings(select_positive="random"), corpus, queries, print)
    assert [example.scores for example in trained.examples] == [[3, 1, 2], [0.5]]
    assert trained.group_rules == [GroupRule(1, "none", "random", False)] * 2
    assert trained.task_settings == {"": TaskSettings(select_positive="random", loss="kl")}
    with pytest.raises(InputError, match="has 1 labelled documents, fewer than --group_size 2"):
        graded_examples(corpus, queries, labelled, 2)
    with pytest.raises(InputError, match="none of the documents, such as 'zz', is in"):
        qrels_examples(corpus, queries, {"1": {"zz": 1}}, {})
    with pytest.raises(InputError, match="none of the queries, such as '9', is in"):
        qrels_examples(corpus, queries, {"9": {"a": 1}}, {})
