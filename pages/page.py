"""Pages: what test.py, retrieve.py and ask.py write as one HTML file that needs no other one."""
import base64
import hashlib
import html
import json
import math
import re
import time
import unicodedata
from pathlib import Path
from typing import NamedTuple

from metrics import find_answers
from records.files import is_stream, new_file
from utils import InputError, progress_bar

FOLDER = Path(__file__).resolve().parent
CONTROLS = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")  # blanks, and what would steer a terminal
HALVES = re.compile("[\ud800-\udfff]")             # of characters: UTF-8 has no place for them

# what is deep in the lists of a large file is left out: Chromium opened a page of 70 MiB in 2 s and
# searched it in 0.5 s, and took 6 s and 1 s for all of its 242 MiB (bench/pages.py)
BUDGET = 64 * 2 ** 20  # characters of passages in a page
LONGEST = 2000         # and of one passage
DEPTH_SAMPLE = 100           # questions by whose passages the depth is chosen
LEAST_DEPTH = 5

# the texts of a page have no control characters, so that these can stand for what separates them;
# a < in them might end the element that holds them
BETWEEN_FIELDS, BETWEEN_ANSWERS, LESS_THAN = "\t", "\x1f", "\x1e"


# ---------------------------------------------------------------- texts

def clean(text):
    """A text of someone else in one line, without characters that steer a terminal."""
    return CONTROLS.sub(" ", text).strip()


def plain(text):
    """A text in one line that UTF-8 can hold, in the one form (NFC) in which it is searched."""
    return unicodedata.normalize("NFC", HALVES.sub("\ufffd", clean(text)))


def cut_excerpt(text, answers, length):
    """About `length` characters of a text, whole words, with the first of the answers in it."""
    text = clean(text)
    if len(text) <= length:
        return text
    start, end = 0, len(text)
    places = find_answers(text, answers)
    if places and places[0][1] > length:
        start = text.rfind(" ", 0, max(places[0][0] - length // 2, 1)) + 1
    if end > start + length:
        end = start + length
        blank = text.rfind(" ", end - length // 4, end)  # some languages have none
        end = blank if blank > 0 else end
    return ("… " if start else "") + text[start:end] + (" …" if end < len(text) else "")


def split_at_answers(text, answers):
    """The pieces of a text; every second one, from the second on, is an answer."""
    pieces, end_before = [], 0
    for start, end in find_answers(text, answers):
        pieces += [text[end_before:start], text[start:end]]
        end_before = end
    return [*pieces, text[end_before:]]


# ---------------------------------------------------------------- every page

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
"""
END = "</body>\n</html>\n"


def check_page(path):
    """Raises InputError for a page whose name a browser would not open as one."""
    if path and not is_stream(path) and not path.lower().endswith((".html", ".htm")):
        raise InputError(f"--html {path}: a page's name ends in .html, so that a browser opens it "
                         "as one")


def begin_page(title, script=""):
    """The HTML up to the body's content. The page can load nothing, and run that script alone."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    return PAGE.format(policy=policy, title=html.escape(plain(title)), style=style)


# ---------------------------------------------------------------- a page of many questions

class Inspected(NamedTuple):
    """A question as it is shown, with its ranked passages."""
    id: object
    question: str
    answers: list
    # [{title, text, score, has_answer}], and `id`, the `reader`'s score, `label`, `is_relevant`
    # where they are
    contexts: list
    prediction: str = ""
    em: object = None
    f1: object = None
    is_labelled: bool = False  # whether some document is known to be relevant


CONTENT = """<header>
<h1>{title}</h1>
<p class="quiet">{remark}</p>
{table}
</header>
<noscript><p>This page needs JavaScript to show its questions.</p></noscript>
<form role="search">
<input id="q" type="search" placeholder="search questions, answers and passages"
 aria-label="search questions, answers and passages" autocomplete="off">
<select id="show" aria-label="which questions"></select>
<select id="order" aria-label="their order">
<option value="worst">worst first</option><option value="file">in the file's order</option>
</select>
</form>
<p class="quiet"><span id="status" role="status"></span>; marked in their passages:
<mark>an answer</mark> <mark class="found">the prediction</mark>
<mark class="sought">what is searched</mark></p>
<main id="questions"></main>
<nav aria-label="pages">
<button type="button" id="previous">previous</button>
<button type="button" id="next">next</button>
<span class="quiet" id="place"></span>
</nav>
"""


def write_inspection(path, title, remark, table, questions, count, *, depth, has_predictions=False,
                     reader_is_share=True, is_regex=False):
    """Write a page of many questions, which is filtered and searched by its script.

    `questions` yields `count` Inspected, whose passages below `depth` are left out (choose_kept);
    `table` is a list of rows of texts. is_regex: answers are regular expressions.
    """
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    title = f"{title}, {time.strftime('%Y-%m-%d')}"
    rows, lines = [], []
    content = CONTENT
    if not has_predictions:
        content = content.replace('<mark class="found">the prediction</mark>\n', "")
    with new_file(path) as file:
        file.write(begin_page(title, script))
        file.write(content.format(title=html.escape(plain(title)), table=make_table(table),
                                  remark=html.escape(plain(remark))))
        file.write('<script type="text/plain" id="texts">')
        bar = progress_bar(questions, desc="writing the page", total=count)
        for i, question in enumerate(bar):
            kept = choose_kept(question, depth)
            rows.append(list_row_numbers(question))
            lines.append(dump_json([describe_passage(question, passage, is_regex)
                                    for passage in kept]))
            file.write(("\n" if i else "") + join_texts(question, kept))
        about = {"rows": rows, "has_predictions": has_predictions,
                 "reader_is_share": reader_is_share, "less_than": LESS_THAN,
                 "between_answers": BETWEEN_ANSWERS}
        file.write('</script>\n<script type="text/plain" id="numbers">' + "\n".join(lines))
        file.write('</script>\n<script type="text/plain" id="about">' + dump_json(about))
        file.write(f"</script>\n<script>{script}</script>\n{END}")


def make_table(rows):
    """The HTML of a table of texts, its first row and column the headers."""
    lines = []
    for i, row in enumerate(rows):
        cells = [html.escape(cell) for cell in row]
        tag = "td" if i else "th"
        line = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells[1:])
        lines.append(f"<tr><th>{cells[0]}</th>{line}</tr>\n")
    return f"<table>\n{''.join(lines)}</table>"


def choose_depth(samples, count):
    """How many passages of each of `count` questions fit a page; `samples` are the [contexts] of
    some of them.
    """
    lengths = [min(len(context["text"]), LONGEST) for contexts in samples for context in contexts]
    if not lengths:
        return LEAST_DEPTH
    mean = max(1, sum(lengths) / len(lengths))
    return max(LEAST_DEPTH, int(BUDGET / mean / count))


class Kept(NamedTuple):
    """A passage that the page holds: its rank, from 1, the context, and its text as it is shown."""
    rank: int
    context: dict
    text: str


def choose_kept(question, depth):
    """Return the Kept passages of a question: the first ones, and of those below `depth` the first
    with an answer, the first that is relevant, and the reader's favourite.
    """
    ranks = set(range(1, min(depth, len(question.contexts)) + 1))
    ranks |= {find_rank(question, "has_answer"), find_rank(question, "is_relevant")} - {0}
    readers = [context.get("reader") for context in question.contexts]
    if readers and None not in readers:
        ranks.add(readers.index(max(readers)) + 1)
    kept = []
    for rank in sorted(ranks):
        context = question.contexts[rank - 1]
        answers = question.answers if context["has_answer"] else [question.prediction]
        kept.append(Kept(rank, context, plain(cut_excerpt(context["text"], answers, LONGEST))))
    return kept


def find_rank(question, name):
    """The rank, from 1, of the first context in which this is true, or 1 or more; 0 if none is."""
    ranks = (rank for rank, context in enumerate(question.contexts, 1)
             if (context.get(name) or 0) >= 1)
    return next(ranks, 0)


def list_row_numbers(question):
    """Return [em, f1, rank of the first answer, of the first relevant passage, passages, those with
    an answer]: by this pages/page.js filters. A rank is 0 where there is none, None where it is not
    known.
    """
    answer_rank = find_rank(question, "has_answer") if question.answers else None
    relevant_rank = find_rank(question, "is_relevant") if question.is_labelled else None
    holding = sum(bool(context["has_answer"]) for context in question.contexts)
    return [question.em, question.f1, answer_rank, relevant_rank, len(question.contexts), holding]


def describe_passage(question, kept, is_regex):
    """Return [rank, score, reader's score, holds an answer, label, places of answers, of the
    prediction] of a Kept passage; a place is its start and end, in characters.
    """
    rank, context, text = kept
    gold = find_answers(text, question.answers, is_regex) if context["has_answer"] else []
    predicted = find_answers(text, [question.prediction])
    return [rank, finite(context.get("score")), finite(context.get("reader")),
            int(context["has_answer"]), finite(context.get("label")),
            [end for place in gold for end in place],
            [end for place in predicted for end in place]]


def finite(value):
    """A number for JSON, rounded; None for one that it cannot hold."""
    return round(value, 6) if value is not None and math.isfinite(value) else None


def join_texts(question, kept):
    """What is searched of a question, in one line, as pages/page.js takes it apart."""
    answers = BETWEEN_ANSWERS.join(plain(answer) for answer in question.answers)
    fields = [plain(str(question.id)), plain(question.question), plain(question.prediction),
              answers]
    for rank, context, text in kept:
        fields += [plain(str(context.get("id", rank - 1))), plain(context.get("title") or ""), text]
    return BETWEEN_FIELDS.join(fields).replace("<", LESS_THAN)


def dump_json(value):
    """JSON that no browser takes for an element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
