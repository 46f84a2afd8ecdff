"""Questions and records in all file formats, and the original FiD's order of contexts."""
import gzip
import json

import pytest

from records import record_file
from records.fields import gold_passages, history_turns
from records.question_tables import make_record
from records.questions import make_question, own_ids, read_queries, read_questions
from records.reader_records import (
    check_record,
    note_contexts,
    note_files,
    note_unscored,
    read_records,
)
from utils import InputError

CONTEXT = {"title": "T", "text": "some text"}


@pytest.mark.parametrize("text", [b'{"question": "\xe9', b"\xff\xfe"])
@pytest.mark.parametrize("name", ["r.json.gz", "r.jsonl.gz"])
def test_a_truncated_gzip_file_that_is_not_utf8_is_one_line(tmp_path, name, text):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text * 100)[:-8])
    with pytest.raises(InputError, match=f"{name}.*UTF-8"):
        read_records(path)


@pytest.mark.parametrize("name", ["r.json", "r.jsonl", "r.json.gz", "r.jsonl.gz"])
def test_reads_all_forms(tmp_path, name):
    records = [{"question": "q0", "answers": ["a"], "ctxs": [CONTEXT], "extra": 7},
               {"query": "q1", "query_id": "x"}]
    text = json.dumps(records, indent=1)
    if "jsonl" in name:
        text = "\n".join(map(json.dumps, records)) + "\n\n"
    path = tmp_path / name
    if name.endswith(".gz"):
        with gzip.open(path, "wt") as file:
            file.write(text)
    else:
        path.write_text(text)
    first, second = read_records(path)
    assert first["extra"] == 7 and first["id"] == 0 and first["ctxs"] == [CONTEXT]
    assert (second["question"], second["id"], second["answers"],
            second["ctxs"]) == ("q1", "x", [], [])


@pytest.mark.parametrize("name, text, message", [("r.json", '[{"question": "q"},\n {"question": ',
                                                  "r.json:2: not valid JSON"),
                                                 ("r.jsonl",
                                                  '{"question": "q"}\n{"question": '
                                                  '"q"\n{"question": "q"}\n',
                                                  "r.jsonl:2: not valid JSON"),
                                                 ("r.json",
                                                  '[{"question": "q"}, {"answers": ["a"]}]',
                                                  "record 1: no 'question'"),
                                                 ("r.json", '[{"question": " "}]',
                                                  "record 0: no 'question'"),
                                                 ("r.json", "", "the file is empty"),
                                                 ("r.json", "[]", "holds no records"),
                                                 ("r.jsonl", "\n", "holds no records"),
                                                 ("r.json", '"q"', "not a list of records"),
                                                 ("r.json", '["q"]', "must be a JSON object"),
                                                 ("r.json", '[{"question": "q", "answers": "a"}]',
                                                  "'answers' must be a list of strings"),
                                                 ("r.json",
                                                  '[{"question": "q", "ctxs": [{"title": "t"}]}]',
                                                  "'text' string"),
                                                 ("r.json",
                                                  '[{"question": "q", "ctxs": [{"text": "t", '
                                                  '"score": "high"}]}]', "is not a number"),
                                                 ("r.json.gz", None, "cannot be read"),])
def test_bad_files_are_one_clear_line(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_bytes(gzip.compress(b'[{"question": "q"}]')[:-9] if text is None else text.encode())
    with pytest.raises(InputError) as error:
        read_records(path)
    text = str(error.value)
    assert message in text and str(path) in text and "\n" not in text


def test_missing_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_records(tmp_path / "none.json")


def scored(*scores):
    return [{"text": str(i)} | ({} if s is None else {"score": s}) for i, s in enumerate(scores)]


def order(path, records):
    path.write_text(json.dumps(records))
    return ["".join(c["text"] for c in r["ctxs"]) for r in read_records(path)]


def test_contexts_are_sorted_by_score_if_the_first_has_one(tmp_path):
    records = [{"question": "q", "ctxs": scored(1, 3, 3, "2.5")},
               {"question": "q", "ctxs": scored(None, 0.5, None, 1)}]
    # ties keep their order, scoreless ones come last
    assert order(tmp_path / "a.json", records) == ["1230", "3102"]
    # the first context of the file has none
    assert order(tmp_path / "b.json", records[::-1]) == ["0123", "0123"]


def test_keep_contexts_is_after_sorting(tmp_path):
    path = tmp_path / "r.json"
    path.write_text(json.dumps([{"question": "q", "ctxs": scored(1, 2, 3)}]))
    assert [c["text"] for c in read_records(path, 2)[0]["ctxs"]] == ["2", "1"]


def test_contexts_that_are_missing_are_told(tmp_path):
    with_contexts = [{"ctxs": [CONTEXT]}]
    without = [{"ctxs": []}]
    logged = []
    note_contexts(without * 20, "q.json", 1, logged.append)
    note_contexts(with_contexts * 17 + without * 3, "r.json", 1, logged.append)
    note_contexts(with_contexts, "s.json", 1, logged.append)
    assert logged[0].startswith("warning: 0 of 20 records of q.json have contexts: run retrieve.py")
    assert logged[1:] == ["note: 3 of 20 records of r.json have no contexts"]
    note_contexts(with_contexts, "s.json", 5, logged.append)
    assert logged[-1] == ("note: no record of s.json has more than 1 contexts, fewer than "
                          "--num_contexts 5")


def test_dev_records_that_are_the_training_records_are_told(tmp_path):
    train, dev, link = tmp_path / "train.json", tmp_path / "dev.json", tmp_path / "link.json"
    train.write_text("[]")
    dev.write_text("[]")
    link.symlink_to(train)
    records = [{"ctxs": [CONTEXT]}]
    logged = []
    note_files([(train, records), (dev, records), (None, None)], 1, logged.append)
    assert not logged
    note_files([(train, records), (dev, records), (link, records)], 1, logged.append)
    line, = logged
    assert line.startswith(f"note: {link} is also the training file")


def test_a_table_of_questions_is_no_file_of_records(tmp_path):
    (tmp_path / "train.csv").write_text("question,answer\nwho,Bob\n")
    with pytest.raises(InputError, match="train.csv: a table of questions.*run retrieve.py first"):
        read_records(tmp_path / "train.csv")
    (tmp_path / "train.txt").write_text('{"question": "who"}\n')
    assert read_records(tmp_path / "train.txt")[0]["question"] == "who"


# ---------------------------------------------------------------- questions for retrieval

def test_answers_of_every_form():
    """The reader and retrieval read the same answers; a number is the index of a choice."""
    trivia = {"answer": {"Value": "ROME", "Aliases": ["Rome", "Roma"]}}
    for fields, answers in (({"answers": ["a"]}, ["a"]), ({"answer": "a"}, ["a"]),
                            ({"answer": ["a", "b"]}, ["a", "b"]), ({}, []),
                            (trivia, ["Rome", "Roma"]), ({"answers": None, "answer": "a"}, ["a"]),
                            ({"answer": 3}, []), ({"answer": True}, []),
                            ({"answers": ["a"], "answer": {}}, ["a"])):
        record = {"question": "who", **fields}
        assert make_question(record, "f:1", 0).answers == answers
        assert check_record(record, "f:1", 0)["answers"] == answers
    assert check_record({"question": "who", **trivia}, "f:1", 0)["target"] == "Rome"
    for bad in ({"answers": "a"}, {"answer": [3]}, {"answer": {"Aliases": ["x"]}}):
        for read in (make_question, check_record):
            with pytest.raises(InputError, match="answer"):
                read({"question": "who", **bad}, "f:1", 0)


@pytest.mark.parametrize("answer, answers, target", [
    ({"Value": "West Brask", "Aliases": ["Brask"]}, ["West Brask", "Brask"], "West Brask"),
    ({"Value": "WEST BRASK", "Aliases": ["west brask"]}, ["west brask"], "West Brask"),
    ({"Value": "Brask", "Aliases": [], "NormalizedAliases": ["brask", "old brask"]},
     ["Brask", "old brask"], "Brask"),
    ({"value": "Brask", "aliases": [], "normalized_value": "brask"}, ["Brask"], "Brask"),
    ({"value": "<unk>", "aliases": [], "normalized_value": "<unk>"}, [], None),
    ({"Value": "<unk>", "Aliases": ["Brask"]}, ["Brask"], None),
    ({"Value": "Brask", "Aliases": ["", " \u200b", "Old Brask"]}, ["Brask", "Old Brask"], "Brask"),
    ({"Value": " ", "Aliases": ["", "Old Brask"]}, ["Old Brask"], None),
    ({"text": ["Brask", "Brask"], "answer_start": [3, 9]}, ["Brask", "Brask"], None),
])
def test_value_of_trivia_qa_is_an_answer(answer, answers, target):
    """Targets are correct answers, and answers without text are dropped."""
    record = {"question": "where", "answer": answer}
    assert make_question(record, "f:1", 0).answers == answers
    checked = check_record(record, "f:1", 0)
    assert (checked["answers"], checked.get("target")) == (answers, target)


@pytest.mark.parametrize("text, answers", [
    ("['Paris' 'Lutetia']", ["Paris", "Lutetia"]),
    ("['Paris'\n \"Caesar's\" 'Lutetia']", ["Paris", "Caesar's", "Lutetia"]),
    ("array(['Paris', 'Lutetia'], dtype=object)", ["Paris", "Lutetia"]),
    ("['Paris', 'Lutetia']", ["Paris", "Lutetia"]),
    ('["Paris", "Lutetia"]', ["Paris", "Lutetia"]),
    ("[sic] Paris", ["[sic] Paris"]),
])
def test_lists_that_pandas_and_numpy_have_written(text, answers):
    """Lists are exported as text, numpy's without commas (datasets issue 6778, pandas 61474)."""
    for record in ({"answer": text}, make_record({"answers": text}, "f:1")
                   if not text.startswith("[sic") else {"answer": text}):
        assert make_question({"question": "q", **record}, "f:1", 0).answers == answers


def test_the_text_of_an_object_is_no_answer():
    text = "{'text': array(['Denver'], dtype=object), 'answer_start': array([177])}"
    for record in ({"answer": text}, make_record({"answers": text}, "f:1")):
        with pytest.raises(InputError, match="f:1: the answer .* is the text of an object"):
            make_question({"question": "q", **record}, "f:1", 0)


def test_blank_answers_are_none():
    """Blank answers and targets are dropped."""
    record = check_record({"question": "q", "answers": ["", "\t", "a"], "target": " "}, "f:1", 0)
    assert record["answers"] == ["a"] and "target" not in record
    assert check_record({"question": "q", "answers": ["\u200b"]}, "f:1", 0)["answers"] == []


def test_questions_of_every_form(tmp_path):
    (tmp_path / "nq.csv").write_text("who was it\t['a', \"b's\"]\nwhere\t['c']\n")
    questions = read_questions(tmp_path / "nq.csv")
    assert [question.id for question in questions] == ["0", "1"]
    assert [question.text for question in questions] == ["who was it", "where"]
    assert [question.answers for question in questions] == [["a", "b's"], ["c"]]
    (tmp_path / "q.tsv").write_text("7\twhat\n")
    question, = read_questions(tmp_path / "q.tsv", task="qa")
    assert (question.id, question.text, question.task) == ("7", "what", "qa")
    (tmp_path / "q.jsonl").write_text('{"_id": "8", "text": "what"}\n')
    assert read_queries([tmp_path / "q.tsv", tmp_path / "q.jsonl"]) == {"7": "what", "8": "what"}
    (tmp_path / "bad.csv").write_text("who\t['a'\n")
    with pytest.raises(InputError, match="bad.csv:1: .* is not a list of answers"):
        read_questions(tmp_path / "bad.csv")
    (tmp_path / "long.csv").write_text("q" * 200_000 + "\t['a']\n")
    assert len(read_questions(tmp_path / "long.csv")[0].text) == 200_000


@pytest.mark.parametrize("name, text, expected", [
    ("q.csv", "question,answer\nwho was it,Bob\nwhere,\n",
     [("0", "who was it", ["Bob"]), ("1", "where", [])]),
    ("q.csv", "question;answer\nwho, or what;Bob\n", [("0", "who, or what", ["Bob"])]),
    ("q.tsv", "Answers\tID\tQuery\n['a', \"b's\"]\t7\twho is it\n",
     [("7", "who is it", ["a", "b's"])]),
    ("q.txt", 'text,qid,answer,,topic\n"who, or ""what""",7,"[""\\u00e9"", 3]",9,x\n',
     [("7", 'who, or "what"', ["é", "3"])]),
    ("q", "question\nwho is it, then\n", [("0", "who is it, then", [])]),
    ("q.csv", "\nanswer, question\n\n,\nRome, \"where, then\"\n",
     [("0", "where, then", ["Rome"])]),
    ("q.csv", "question,answer,answers\nwho,Bob,Rob\n", [("0", "who", ["Rob"])])])
def test_a_header_names_the_columns(tmp_path, name, text, expected):
    (tmp_path / name).write_text(text)
    questions = read_questions(tmp_path / name)
    assert [(question.id, question.text, question.answers) for question in questions] == expected


def test_a_quoted_cell_may_hold_line_ends(tmp_path):
    text = 'question,answer,topic\r\n"who\r\nwas it",Bob,x\r\n\r\nwhere,Rome,\r\n'
    (tmp_path / "q.csv").write_bytes(text.encode())
    first, second = read_questions(tmp_path / "q.csv")
    assert first.text == "who\nwas it" and first.record["topic"] == "x"
    assert first.location.endswith("q.csv:2") and second.location.endswith("q.csv:5")
    assert "topic" not in second.record


@pytest.mark.parametrize("text, message", [
    (b"who was it\tBob\n", "1: the first of two columns must be an id, got 'who was it'; .*add "
                           "the header line question<TAB>answer"),
    (b"\twho\n", "1: the first of two columns must be an id"),
    (b"who was it,Bob\n", "1: neither a header, such as question,answer, nor .*: .who was it,Bob."),
    (b"id\tprompt\n7\twho\n", "1: the header has no column 'question'"),
    (b"question,answer,question\n", "1: the header has 'question' twice"),
    (b"question,answer\n\nwho,Bob,Rob\n", "3: 3 columns, but the header has 2"),
    (b'question,answer\nwho,"Bob" Ross\n', "2: a cell begins with a quote"),
    (b'question,answer\nwho,Bob\nwhat,"x\ny,z\n', "3: a cell begins with a quote"),
    (b'question\tanswer\n"who is\tBob\nwho said hi"\tyou\n', "2: a quote opens a cell"),
    (b"question\tanswer\nwho\t['a'\n", r"2: .* is not a list of answers; write it as"),
    (b"question\tanswer\nwho\t['a', ['b']]\n", "2: .* is not a list of answers"),
    (b"question,answer\n,Bob\n", "2: no 'question'"),
    (b"question,answer\rwho,Bob\r", "1: a carriage return inside the line"),
    (b"7\twho\n8\twhat\rnow\n", "2: a carriage return inside the line"),
    (b"question,answer\nwho,Andr\xe9\n", "2: byte 9 of the line is not UTF-8"),
    ("question,answer\n".encode("utf-16"), " is in UTF-16, which is not read; convert it to UTF-8"),
    (b"question,answer\n", " holds no questions"), (b"\n", " holds no questions")])
@pytest.mark.parametrize("name", ["q.csv", "q.tsv"])
def test_bad_tables_are_one_clear_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text)
    with pytest.raises(InputError, match=f"{name}:{message}") as error:
        read_questions(tmp_path / name)
    assert "\n" not in str(error.value)


def test_lines_are_cut_at_line_ends_only(tmp_path):
    """U+2028 and U+0085 are part of a text; a byte order mark at the start is not."""
    text = "\ufeff" + '{"question": "a\u2028b\u0085c"}\n{"question": "d"}\n'
    (tmp_path / "r.json").write_text(text)
    texts = [question.text for question in read_questions(tmp_path / "r.json")]
    assert texts == ["a\u2028b\u0085c", "d"]
    (tmp_path / "q.tsv").write_text("\ufeffqid\tquery\n7\twho\n")
    question, = read_questions(tmp_path / "q.tsv")
    assert (question.id, question.text) == ("7", "who")
    assert read_queries([tmp_path / "q.tsv"]) == {"7": "who"}
    (tmp_path / "q.csv").write_text("question\tanswers\nwho\t['a']\n")
    assert [question.answers for question in read_questions(tmp_path / "q.csv")] == [["a"]]
    (tmp_path / "q.tsv").write_text("7\twho\n7\twhat\n")
    with pytest.raises(InputError, match="q.tsv:2: the id '7' belongs to another query"):
        read_queries([tmp_path / "q.tsv"])


def test_the_text_of_a_query_stays_as_it_is(tmp_path):
    """Quotes, brackets and further tabs belong to the text; the content decides the format."""
    lines = ['1\t"brown bear" population', '2\t"unbalanced', "3\t[abc] meaning", "4\ta\tb",
             "   "]
    expected = {"1": '"brown bear" population', "2": '"unbalanced', "3": "[abc] meaning",
                "4": "a\tb"}
    for name in ("q.tsv", "queries.txt"):
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        assert read_queries([tmp_path / name]) == expected
    (tmp_path / "list.jsonl").write_text('[{"_id": "7", "question": null, "query": "who"}]')
    (tmp_path / "lines.tsv").write_text('{"_id": "8", "text": "what"}\n')
    paths = [tmp_path / "list.jsonl", tmp_path / "lines.tsv"]
    assert read_queries(paths) == {"7": "who", "8": "what"}


def test_queries_that_qrels_name_need_ids(tmp_path):
    (tmp_path / "nq.csv").write_text("who was it\t['a']\n")
    (tmp_path / "one.tsv").write_text("who was it\n")
    with pytest.raises(InputError, match="nq.csv:1: a query of the qrels needs an id"):
        read_queries([tmp_path / "nq.csv"])
    with pytest.raises(InputError, match="one.tsv:1: neither a header"):
        read_queries([tmp_path / "one.tsv"])


# ---------------------------------------------------------------- ground truth and earlier turns

def test_ground_truth_passages_of_every_form(tmp_path):
    forms = [
        (None, []), ("", []), ([], []), ("a text", [{"text": "a text"}]),
        ({"title": "T", "text": "x", "id": 7}, [{"title": "T", "text": "x", "id": 7}]),
        (["a", {"text": "b"}], [{"text": "a"}, {"text": "b"}])]
    for value, expected in forms:
        assert gold_passages({"passage": value}) == expected
    documents = [{"page_content": "a", "fmt_content": "f", "metadata": {"title": "T"}},
                 {"page_content": "b"}]
    assert gold_passages({"gold_docs": documents}) == [{"title": "T", "text": "a"},
                                                       {"title": None, "text": "b"}]
    path = tmp_path / "r.jsonl"  # a record of LocalRQA
    path.write_text(json.dumps({"question": "q", "gold_answer": "yes", "gold_docs": documents,
                                "chat_history": [{"speaker": "USER", "message": "hi"}]}))
    record, = read_records(path)
    assert record["answers"] == ["yes"] and history_turns(record) == ["USER: hi"]


@pytest.mark.parametrize("name, values", [
    ("passage", [7, True, [None], {"title": "T"}, {"text": 3}, {"title": 3, "text": "x"}, [["x"]]]),
    ("gold_docs", [[{"page_content": 3}], 2.5]),
    ("chat_history", [7, {"a": 1}, [["x"]], [None], [{"role": "user"}],
                      [{"role": "user", "content": 3}]]),
])
def test_wrong_ground_truth_and_history_are_refused_with_file_and_line(tmp_path, name, values):
    path = tmp_path / "r.jsonl"
    for value in values:
        path.write_text('{"question": "q"}\n' + json.dumps({"question": "q", name: value}))
        with pytest.raises(InputError, match=f"r.jsonl:2: '{name}' must be a text") as error:
            read_records(path)
        assert "\n" not in str(error.value)


def test_records_without_answers_are_counted():
    """Records that are left out of the mean are reported."""
    logged = []
    for answers in ([["a"], ["b"]], [["a"], []], [[], []]):
        note_unscored([{"answers": answer} for answer in answers], "f.json", logged.append)
    assert len(logged) == 2 and "1 of 2 records of f.json have no answers" in logged[0]
    assert "no record of f.json has answers" in logged[1]


def test_questions_on_disk_are_those_in_memory(tmp_path, monkeypatch):
    rows = [{"id": 7, "question": "who", "answers": ["x"], "pos_index": [3], "task": "qa"},
            {"query": "what", "answer": "y", "ctxs": [{"text": "long"}]}]
    path = tmp_path / "q.json"
    path.write_text(json.dumps(rows))
    listed = read_questions(path, "chat")
    monkeypatch.setattr(record_file, "LARGE", 0)
    for _ in range(2):  # without the table and with it
        stored = read_questions(path, "chat")
        assert [question.record for question in stored] == rows
        assert [question[1:] for question in stored] == [question[1:] for question in listed]
    assert [question.has_id for question in stored] == [True, False]
    assert own_ids(stored) == ["7", None]
