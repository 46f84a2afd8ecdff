"""The pages of test.py --html and retrieve.py --html: their content, and a browser's view."""
import json
import re

import pytest

from browser import CHROMIUM, Browser
from conftest import TOKENIZER, make_records, run
from pages import page as pages
from pages.page import (
    BETWEEN_FIELDS,
    LESS_THAN,
    Inspected,
    choose_depth,
    cut_excerpt,
    split_at_answers,
    write_inspection,
)
from retrieval_helpers import write_rows

FLAGS = ["--num_contexts", 3, "--max_length", 100]
HOSTILE = ("</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title"
           " = 'taken'\"> <!-- <script> & &lt; \x00\x1b[31m\t\x1e\u202e desrever \u2028 𝒳𝒴 '"
           " \\u003c")
SHOWN = re.sub(r"[\s\x00-\x1f]+", " ", HOSTILE)  # blanks and controls become one blank


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a page of test.py, one of retrieve.py, and the files that they are made from."""
    folder = tmp_path_factory.mktemp("pages")
    records = make_records(60)
    gold = {"title": "G", "text": f"It is «Zürich» {HOSTILE} of Zürich", "id": "g", "score": 1e9}
    records.append({"question": f"where {HOSTILE}", "answers": ["zürich", HOSTILE], "id": "<x>",
                    "ctxs": [gold, *records[0]["ctxs"]]})
    records.append({"question": "nothing is known", "answers": [], "ctxs": [], "id": "none"})
    write_rows(folder / "records.jsonl", records)
    run("test.py", TOKENIZER, folder / "records.jsonl", "--num_contexts", 1, 3, "--max_length", 100,
        "--html", folder / "reader.html", "--pred", folder / "p.jsonl")

    passages = {c["id"]: c for record in records for c in record["ctxs"]}.values()
    write_rows(folder / "corpus.jsonl", [{name: c[name] for name in ("id", "title", "text")}
                                         for c in passages])
    qrels = [f"{record['id']}\t0\t{record['ctxs'][1]['id']}\t1\n" for record in records[:20]]
    (folder / "qrels.tsv").write_text("".join(qrels))
    run("retrieve.py", "--retrieval_method", "bm25", "--corpus", folder / "corpus.jsonl",
        "--eval_data", folder / "records.jsonl", "--hits", 20, "--output", folder / "o.jsonl",
        "--qrels", f"qrels={folder / 'qrels.tsv'}", "--html", folder / "retriever.html")
    return folder


def take_apart(path):
    """Return ({about}, [fields of each question], [numbers of its passages]) of a page."""
    text = path.read_text()
    about, texts, numbers = (re.search(rf'id="{name}">(.*?)</script>', text, re.DOTALL)[1]
                             for name in ("about", "texts", "numbers"))
    return (json.loads(about), [line.split(BETWEEN_FIELDS) for line in texts.split("\n")],
            [json.loads(line) for line in numbers.split("\n")])


def read_rows(path):
    return [json.loads(line) for line in open(path)]


# ---------------------------------------------------------------- texts

def test_what_is_marked_and_what_is_cut():
    assert split_at_answers("in new york, Newyorker", ["New  York"]) == [
        "in ", "new york", ", Newyorker"]
    assert split_at_answers("any text", [""]) == ["any text"]
    text = "one two " * 100 + "the harbour opens " + "three four " * 100
    excerpt = cut_excerpt(text, ["Harbour"], 60)
    assert "the harbour opens" in excerpt and len(excerpt) < 70
    assert excerpt[:2] == "… " and excerpt[-2:] == " …"
    assert cut_excerpt("x" * 1000, ["y"], 60) == "x" * 60 + " …"


# ---------------------------------------------------------------- what is in a page

def test_the_page_of_a_reader_holds_what_was_predicted_and_read(files):
    about, texts, numbers = take_apart(files / "reader.html")
    records, predictions = read_rows(files / "records.jsonl"), read_rows(files / "p.3.jsonl")
    assert "contexts" not in predictions[0]  # --html does not change --pred
    assert len(about["rows"]) == len(texts) == len(numbers) == len(records) == 62
    for row, fields, passages, record, prediction in zip(about["rows"], texts, numbers, records,
                                                         predictions):
        assert row[:2] == [prediction["em"], prediction["f1"]]
        assert fields[2] == prediction["prediction"]
        assert len(passages) == min(3, len(record["ctxs"])) == row[4] == (len(fields) - 4) / 3
        if passages:
            assert sum(passage[2] for passage in passages) == pytest.approx(1, abs=1e-4)
    holding = [[passage[0] for passage in passages if passage[3]] for passages in numbers]
    assert [row[2] for row in about["rows"][:61]] == [(ranks or [0])[0] for ranks in holding[:61]]
    assert about["rows"][61][:6] == [None, None, None, None, 0, 0]

    # the spans are those of the answers
    assert texts[0][6][slice(*numbers[0][0][5][:2])] in records[0]["answers"] or not holding[0]
    text = texts[60][6].replace(LESS_THAN, "<")
    places = numbers[60][0][5]
    marked = [text[start:end] for start, end in zip(places[::2], places[1::2])]
    assert marked[0] == "Zürich" and marked[-1] == "Zürich"


def test_the_page_of_a_retriever_tells_the_first_relevant_and_the_first_answer(files):
    about, texts, _ = take_apart(files / "retriever.html")
    records = read_rows(files / "records.jsonl")
    for i, (row, found) in enumerate(zip(about["rows"], read_rows(files / "o.jsonl"))):
        marks = [context.get("has_answer") for context in found["ctxs"]]
        assert row[2] == (None if i == 61 else marks.index(True) + 1 if True in marks else 0)
        ids = [context["id"] for context in found["ctxs"]]
        relevant = records[i]["ctxs"][1]["id"] if i < 20 else None
        assert row[3] == (None if i >= 20 else ids.index(relevant) + 1 if relevant in ids else 0)
        assert texts[i][4::3] == ids
    page = (files / "retriever.html").read_text()
    assert "<th>nq</th>" in page and "<th>success</th>" in page  # the measures that can be computed


def test_a_page_carries_no_text_that_is_code_and_loads_nothing(files):
    for name in ("reader.html", "retriever.html"):
        page = (files / name).read_text()
        assert page.count("<script") == page.count("</script") == 4
        assert "<img" not in page and "<!--" not in page and "\0" not in page
        assert "default-src 'none'" in page and "'unsafe-inline'; script-src 'sha256-" in page
        code = page[:page.index('id="texts"')] + page[page.index('id="about"'):]
        assert not re.search(r"(src|href|url|@import)\s*[=(]|https?:", code)


def test_half_characters_and_endless_texts_do_no_harm(tmp_path):
    contexts = [{"title": "\ud800", "text": "\udfff " + "long " * 9000 + "gold", "has_answer": True,
                 "reader": float("-inf"), "score": float("nan")}]
    question = Inspected("\ud800", "\ud800?", ["gold"], contexts, "p", 0.0, 0.0)
    write_inspection(tmp_path / "p.html", "\ud800", "\ud800", [["a"]], [question], 1, depth=5,
                     has_predictions=True)
    _, texts, numbers = take_apart(tmp_path / "p.html")
    assert texts[0][1] == "\ufffd?" and len(texts[0][6]) < 2100
    assert texts[0][6].endswith("gold") and numbers[0][0][1:3] == [None, None]


def test_what_is_deep_in_long_lists_is_left_out(tmp_path):
    assert choose_depth([[{"text": "x" * 600}] * 100], 600) >= 100
    assert 20 <= choose_depth([[{"text": "x" * 600}] * 100], 3610) < 40
    assert choose_depth([[{"text": "x" * 10 ** 9}]], 10 ** 6) == pages.LEAST_DEPTH
    contexts = [{"id": i, "title": "", "text": "t", "has_answer": i in (6, 8), "reader": i == 7,
                 "label": int(i == 9), "is_relevant": i == 9} for i in range(20)]
    question = Inspected(0, "q", ["t"], contexts, is_labelled=True)
    write_inspection(tmp_path / "p.html", "t", "", [["a"]], [question], 1, depth=2)
    about, _, numbers = take_apart(tmp_path / "p.html")
    assert [passage[0] for passage in numbers[0]] == [1, 2, 7, 8, 10]
    assert about["rows"] == [[None, None, 7, 10, 20, 2]]


@pytest.mark.parametrize("name, message", [
    ("p.json", "--html p.json: the name must end in .html"),
    ("/nowhere/p.html", "/nowhere/p.html: its folder does not exist"),
    ("records.html", "is also an input of this command"),
])
def test_bad_names_are_refused_in_one_line(files, name, message, tmp_path):
    (tmp_path / "records.html").symlink_to(files / "records.jsonl")
    for command in (["test.py", TOKENIZER, files / "records.jsonl", *FLAGS],
                    ["retrieve.py", "--retrieval_method", "bm25", "--eval_data",
                     files / "records.jsonl", "--corpus", files / "corpus.jsonl"]):
        _, stderr = run(*command, "--html", name, cwd=tmp_path, code=1)
        assert message in stderr and len(stderr.splitlines()) == 1


def test_scores_before_the_softmax_are_no_shares(files, tmp_path):
    run("test.py", TOKENIZER, files / "records.jsonl", *FLAGS, "--scores", tmp_path / "s.jsonl",
        "--html", tmp_path / "p.html")
    about, _, numbers = take_apart(tmp_path / "p.html")
    assert not about["reader_is_share"]
    for passages, record in zip(numbers, read_rows(tmp_path / "s.jsonl")):
        for passage, context in zip(passages, record["ctxs"]):
            assert passage[2] == pytest.approx(context["score"], abs=1e-6)
            assert passage[1] == pytest.approx(context["retrieval_score"], abs=1e-6)


# ---------------------------------------------------------------- in a browser

@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine (apt-get install chromium)")
    browser = Browser()
    yield browser
    errors = [event for event in browser.events
              if event["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    browser.close()
    assert not errors


def status(browser):
    return browser.texts("#status")[0]


def test_questions_are_filtered_searched_and_opened(files, browser):
    about, _, _ = take_apart(files / "reader.html")
    wrong = [row for row in about["rows"] if row[0] == 0]
    browser.resize(1000)
    browser.open(files / "reader.html")
    assert status(browser) == "62 of 62 questions"
    assert len(browser.texts("details")) == 50 and browser.texts("#place") == ["page 1 of 2"]
    assert browser.texts(".mark")[0] == "✗"  # the worst first
    browser.click("#next")
    assert len(browser.texts("details")) == 12
    assert browser.texts(".mark")[-1] == "·"  # the one without answers

    browser.evaluate("choice.focus()")
    browser.press("w", 87)  # a list's choice by its first letter
    browser.wait_for(f"document.getElementById('status').innerText.startsWith('{len(wrong)} of')")
    assert "show=wrong" in browser.evaluate("location.hash")
    browser.evaluate("choice.value = 'all', choice.dispatchEvent(new Event('change'))")

    browser.click("#q")
    browser.type("«ZÜRICH» </SCRIPT>")
    browser.wait_for("document.getElementById('status').innerText.startsWith('1 of')")
    assert browser.texts("h2") == [f"where {SHOWN}".strip()]
    browser.press("Tab", 9)
    browser.press("Tab", 9)
    browser.press("Tab", 9)  # past the two lists, to the question
    browser.press("Enter", 13)
    browser.wait_for("document.querySelectorAll('.passages li').length === 3")
    assert browser.texts("mark.gold")[0] == "Zürich"
    assert browser.texts("mark.sought") and browser.evaluate("document.title !== 'taken'")
    assert SHOWN.split("\u2028")[0].strip() in browser.evaluate(
        "document.querySelector('.passages p').textContent")
    assert browser.evaluate("document.querySelectorAll('img').length") == 0
    assert "q=%C2%AB" in browser.evaluate("location.hash")


def test_an_address_is_a_view(files, browser):
    about, texts, _ = take_apart(files / "retriever.html")
    below = [i for i, row in enumerate(about["rows"]) if (row[3] or 0) > 1]
    browser.open(files / "retriever.html", f"show=relevant-below&order=file&open={below[1]}")
    assert status(browser) == f"{len(below)} of 62 questions"
    questions = [texts[i][1] for i in below]
    assert browser.texts("h2")[:len(below)] == questions
    browser.wait_for("document.querySelectorAll('.passages li').length > 0")
    rank = about["rows"][below[1]][3]
    opened = browser.texts("details[open] li")
    assert [line for line in opened if line.startswith(f"{rank}. ") and "relevant" in line]
    assert f"first relevant passage at rank {rank}" in browser.texts("details[open] summary")[0]
    if len(opened) < 20:
        browser.click("details[open] button")
        browser.wait_for("document.querySelectorAll('.passages li').length === 20")

    browser.evaluate("location.hash = 'q=nothing is known'")
    browser.wait_for("document.getElementById('status').innerText.startsWith('1 of')")
    assert browser.evaluate("search.value") == "nothing is known"


@pytest.mark.parametrize("name", ["reader.html", "retriever.html"])
def test_it_is_readable_on_a_phone_and_in_the_dark(files, browser, name):
    browser.resize(360, scheme="dark")
    browser.open(files / name, "q=zürich&open=60")
    browser.wait_for("document.querySelectorAll('.passages li').length > 0")
    assert browser.evaluate("document.documentElement.scrollWidth") == 360
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 25, 28)"
    browser.resize(360)
    assert browser.evaluate("getComputedStyle(document.body).backgroundColor") == (
        "rgb(252, 252, 250)")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_bench_opens_and_searches_a_page():
    stdout, _ = run("bench/pages.py", "--questions", 20, "--passages", 8, "--budget", 80000)
    assert "20 questions, 6 of 8 passages" in stdout and "second search: " in stdout
