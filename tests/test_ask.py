"""ask.py as a user runs it: answers as test.py's, what is printed, the page, bad input."""
import json
import random
import re
from html.parser import HTMLParser

import pytest

import world
from ask import read_typed
from conftest import TOKENIZER, make_bert, run
from retrieval_helpers import write_rows

FLAGS = ["--num_contexts", 4, "--max_length", 100]  # of a reader that states none
HOSTILE = "<script>alert(1)</script> & \x1b[31m"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A corpus of the embedded world, questions about it, and a retriever."""
    folder = tmp_path_factory.mktemp("ask")
    rng = random.Random(0)
    entities, people = world.make_entities(rng, 12, 6, held_out=False)
    passages = []
    for entity in entities:
        passages += world.write_passages(rng, entity, people)
    for index, passage in enumerate(passages):
        passage["id"] = f"d{index}"
    ranker = world.OverlapRanker(passages, blur=0.1)
    records = world.make_records(rng, "q", entities, ranker, 3, top_k=1)
    documents = [{"id": p["id"], "title": p["title"], "text": p["text"]} for p in passages]
    hostile = {"id": "x", "title": HOSTILE, "text": f"Xyzzy {HOSTILE} plugh."}
    write_rows(folder / "corpus.jsonl", [*documents, hostile])
    write_rows(folder / "questions.jsonl", [{"question": r["question"]} for r in records])
    make_bert(folder / "bert")
    return folder


def search_flags(files, method):
    """The flags of a search of the corpus, for ask.py and retrieve.py."""
    flags = ["--corpus", files / "corpus.jsonl", "--index", files / method]
    if method == "bm25":
        return [*flags, "--retrieval_method", "bm25"]
    return [*flags, "--query_encoder", files / "bert"]


def ask(files, *flags, method="bm25", **more):
    return run("ask.py", TOKENIZER, *search_flags(files, method), *FLAGS, *flags, **more)


def read_questions(files):
    return [json.loads(line)["question"] for line in open(files / "questions.jsonl")]


@pytest.mark.parametrize("method", ["bm25", "dense"])
def test_answers_are_those_of_test_py_on_the_contexts_of_retrieve_py(files, method, tmp_path):
    run("retrieve.py", *search_flags(files, method), "--eval_data", files / "questions.jsonl",
        "--hits", 4, "--output", tmp_path / "contexts.jsonl")
    run("test.py", TOKENIZER, tmp_path / "contexts.jsonl", *FLAGS, "--pred", tmp_path / "p.jsonl")
    expected = [json.loads(line) for line in open(tmp_path / "contexts.jsonl")]
    predictions = [json.loads(line)["prediction"] for line in open(tmp_path / "p.jsonl")]

    questions = read_questions(files)
    stdout, stderr = ask(files, "--json", method=method, stdin="\n\n".join(questions))
    records = [json.loads(line) for line in stdout.splitlines()]
    assert [record["question"] for record in records] == questions
    assert [record["prediction"] for record in records] == predictions
    for record, wanted in zip(records, expected):
        shares = [context.pop("share") for context in record["ctxs"]]
        assert len(shares) == 4
        for context, wanted_context in zip(record["ctxs"], wanted["ctxs"]):
            # questions that are encoded together may differ in the last bit
            assert context.pop("score") == pytest.approx(wanted_context.pop("score"), abs=1e-5)
            assert context == wanted_context
        assert sum(shares) == pytest.approx(100, abs=1e-3) and min(shares) >= 0
    assert "encoding" not in stderr  # the index was there
    assert "3 questions: the first took" in stderr


def test_the_best_answers_have_probabilities(files):
    """D: --n_best N prints the N best, the answer first, and writes them with --json."""
    question = ["--question", read_questions(files)[0], "--n_best", 3]
    stdout, _ = ask(files, "--json", *question)
    record = json.loads(stdout)
    best = record["n_best"]
    assert len(best) == 3 and best[0] == {"prediction": record["prediction"],
                                          "probability": record["probability"]}
    assert sum(answer["probability"] for answer in best) <= 1
    stdout, _ = ask(files, *question)
    for answer in best:
        assert f"{100 * answer['probability']:5.1f} %  {answer['prediction']}" in stdout


def test_the_passage_of_the_highest_share_is_printed_first(files):
    question = read_questions(files)[0]
    stdout, _ = ask(files, "--question", question, "--json")
    record = json.loads(stdout)
    stdout, stderr = ask(files, "--question", question, "--show", 2)
    lines = stdout.splitlines()
    assert lines[:2] == [question, f"  {record['prediction']}"]
    rows = [line for line in lines if re.match(r" *\d+\.\d %  +\d", line)]
    ranks = sorted(range(4), key=lambda i: -record["ctxs"][i]["share"])[:2]
    for row, rank in zip(rows, ranks, strict=True):
        context = record["ctxs"][rank]
        assert row.split("%")[1].split()[:2] == [str(rank + 1), f"{context['score']:.3f}"]
        assert row.endswith(context["title"])
    assert "in 2 more" in stdout
    assert re.search(r"search \d+\.\d+ s, read \d+\.\d+ s", stdout)
    assert "loaded in" in stderr and "\x1b" not in stdout


def test_the_page_is_whole_and_escapes_what_it_shows(files, tmp_path):
    page = tmp_path / "page.html"
    _, stderr = ask(files, "--question", "xyzzy plugh <b>", "--question", "nosuchword", "--html",
                    page)
    assert f"page: {page}" in stderr
    text = page.read_text()
    assert "<script" not in text and "<b>" not in text and "\x1b" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in text
    assert text.count("<section>") == 2 and "no passage was found" in text
    assert not re.search(r"(src|href|url|@import)\s*[=(]", text)  # nothing from elsewhere
    assert "default-src 'none'" in text and "script-src" not in text

    open_tags = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag != "meta":
                open_tags.append(tag)

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag
    Checker().feed(text)
    assert not open_tags


@pytest.mark.parametrize("last", ["", EOFError, KeyboardInterrupt])
def test_the_prompt_ends_without_a_traceback(last, monkeypatch):
    typed = iter(["who wrote it ", last])

    def read_line(prompt=""):
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", read_line)
    assert list(read_typed()) == ["who wrote it"]


def test_a_question_longer_than_the_reader_reads_is_noted(files):
    _, stderr = ask(files, "--question", "who " * 300)
    assert "note: the question takes all of the 100 tokens" in stderr


@pytest.mark.parametrize("flags, message", [
    (["--question", " "], "--question: the question is empty"),
    ([], "stdin holds no question"),
    (["--query_encoder", "bert"], "--query_encoder is for dense retrieval and bm25 has no encoder"),
    (["--question", "who", "--html", "/nowhere/page.html"], "/nowhere/page.html: its folder does"),
    (["--question", "who", "--html", "page.txt"], "--html page.txt: the name must end in .html"),
    (["--question", "who", "--k1", 2], "bm25 holds an index of another k1"),
    (["--question", "who", "--corpus", "no.jsonl"], "no.jsonl: cannot be read"),
    (["--question", "who", "--num_contexts", 0], "--num_contexts must be >= 1, got 0"),
])
def test_bad_input_is_refused_in_one_line(files, flags, message):
    ask(files, "--question", "who")  # makes the index, if it is the first test
    _, stderr = ask(files, *flags, code=1)
    assert stderr.splitlines()[-1].startswith("error: ") and message in stderr
    assert "Traceback" not in stderr


def test_what_is_missing_is_refused_in_one_line(files):
    corpus = ["--corpus", files / "corpus.jsonl"]
    for flags, message in (
            ([TOKENIZER, *corpus], "nothing to search with: give --query_encoder DIR"),
            ([TOKENIZER, "--retrieval_method", "bm25"], "nothing to search in: give --corpus"),
            (["no/reader", *corpus, "--retrieval_method", "bm25"], "no/reader: no such folder")):
        _, stderr = run("ask.py", *flags, "--question", "who", code=1)
        assert message in stderr and len(stderr.splitlines()) == 1
