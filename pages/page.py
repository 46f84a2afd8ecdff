"""Write the HTML pages of test.py, retrieve.py and ask.py, each as one self-contained file."""
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
CONTROLS = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")  # blanks, and characters that control a terminal
HALVES = re.compile("[\ud800-\udfff]")             # half characters, which UTF-8 cannot encode

# Passages at low ranks are left out of large pages. Chromium opened a page of 70 MiB in 2 s and
# searched it in 0.5 s; with all 242 MiB it took 6 s and 1 s (bench/pages.py).
BUDGET = 64 * 2 ** 20  # characters of all passages in a page
LONGEST = 2000         # characters of one passage
DEPTH_SAMPLE = 100     # questions that choose_depth gets as samples
LEAST_DEPTH = 5

# The texts of a page have no control characters, so these can be used as separators. LESS_THAN
# replaces a <, which could end the element that holds the texts.
BETWEEN_FIELDS, BETWEEN_ANSWERS, LESS_THAN = "\t", "\x1f", "\x1e"


# ---------------------------------------------------------------- texts

def clean_text(text):
    """Return a text in one line, without characters that control a terminal."""
    return CONTROLS.sub(" ", text).strip()


def normalize_text(text):
    """Return a text on one line, encodable in UTF-8 and in NFC, as a page's search needs it."""
    return unicodedata.normalize("NFC", HALVES.sub("\ufffd", clean_text(text)))


def cut_excerpt(text, answers, length):
    """Return about `length` characters of a text, in whole words, including its first answer."""
    text = clean_text(text)
    if len(text) <= length:
        return text
    start, end = 0, len(text)
    places = find_answers(text, answers)
    if places and places[0][1] > length:
        start = text.rfind(" ", 0, max(places[0][0] - length // 2, 1)) + 1
    if end > start + length:
        end = start + length
        blank = text.rfind(" ", end - length // 4, end)  # some languages have no blanks
        end = blank if blank > 0 else end
    return ("… " if start else "") + text[start:end] + (" …" if end < len(text) else "")


def split_at_answers(text, answers):
    """Split a text into pieces; the second, fourth, ... piece is an answer."""
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
    """Raise InputError for a page whose name does not end in .html or .htm."""
    if path and not is_stream(path) and not path.lower().endswith((".html", ".htm")):
        raise InputError(f"--html {path}: the name must end in .html, so that a browser opens it "
                         "as a page")


def begin_page(title, script=""):
    """Return the HTML up to the body's content. The page can load nothing and run only `script`."""
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    if script:
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        policy += f"; script-src 'sha256-{digest}'"
    style = (FOLDER / "page.css").read_text(encoding="utf-8")
    return PAGE.format(policy=policy, title=html.escape(normalize_text(title)), style=style)


# ---------------------------------------------------------------- a page of many questions

class Inspected(NamedTuple):
    """Hold a question as it is shown, with its ranked passages."""
    id: object
    question: str
    answers: list
    # [{title, text, score, has_answer}], with `id`, `reader` (the reader's score), `label` and
    # `is_relevant` if they are known
    contexts: list
    prediction: str = ""
    em: object = None          # None if the question has no answers
    f1: object = None
    is_labelled: bool = False  # whether a document is known to be relevant


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
    """Write a page of many questions, with a script that filters and searches them.

    `questions` yields `count` Inspected; of their passages below rank `depth`, only some are kept
    (choose_kept). `table` is a list of rows of texts. is_regex: answers are regular expressions.
    """
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    title = f"{title}, {time.strftime('%Y-%m-%d')}"
    rows, lines = [], []
    content = CONTENT
    if not has_predictions:
        content = content.replace('<mark class="found">the prediction</mark>\n', "")
    with new_file(path) as file:
        file.write(begin_page(title, script))
        file.write(content.format(title=html.escape(normalize_text(title)),
                                  table=make_table(table),
                                  remark=html.escape(normalize_text(remark))))
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
    """Return the HTML of a table of texts, whose first row and column are headers."""
    lines = []
    for i, row in enumerate(rows):
        cells = [html.escape(cell) for cell in row]
        tag = "td" if i else "th"
        line = "".join(f"<{tag}>{cell}</{tag}>" for cell in cells[1:])
        lines.append(f"<tr><th>{cells[0]}</th>{line}</tr>\n")
    return f"<table>\n{''.join(lines)}</table>"


def choose_depth(samples, count):
    """Return how many passages of each of `count` questions fit a page.

    samples: the contexts of some questions, a list of lists.
    """
    lengths = [min(len(context["text"]), LONGEST) for contexts in samples for context in contexts]
    if not lengths:
        return LEAST_DEPTH
    mean = max(1, sum(lengths) / len(lengths))
    return max(LEAST_DEPTH, int(BUDGET / mean / count))


class Kept(NamedTuple):
    """Hold a passage that is in the page."""
    rank: int      # from 1
    context: dict
    text: str      # as it is shown


def choose_kept(question, depth):
    """Return the Kept passages of a question.

    They are the first `depth` ones and, from lower ranks, the first passage with an answer, the
    first relevant one, and the one with the reader's highest score.
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
        excerpt = cut_excerpt(context["text"], answers, LONGEST)
        kept.append(Kept(rank, context, normalize_text(excerpt)))
    return kept


def find_rank(question, name):
    """Return the rank, from 1, of the first context whose field `name` is True or >= 1, else 0."""
    ranks = (rank for rank, context in enumerate(question.contexts, 1)
             if (context.get(name) or 0) >= 1)
    return next(ranks, 0)


def list_row_numbers(question):
    """Return the numbers of a question that pages/page.js filters by.

    They are [em, f1, rank of the first passage with an answer, rank of the first relevant passage,
    number of passages, number of passages with an answer]. A rank is 0 if there is no such passage,
    and None if that is unknown.
    """
    answer_rank = find_rank(question, "has_answer") if question.answers else None
    relevant_rank = find_rank(question, "is_relevant") if question.is_labelled else None
    holding = sum(bool(context["has_answer"]) for context in question.contexts)
    return [question.em, question.f1, answer_rank, relevant_rank, len(question.contexts), holding]


def describe_passage(question, kept, is_regex):
    """Return a Kept passage's numbers.

    They are [rank, score, reader's score, 1 if it has an answer, label, spans of answers, spans of
    the prediction]. Spans are a flat list of starts and ends, in characters.
    """
    rank, context, text = kept
    gold = find_answers(text, question.answers, is_regex) if context["has_answer"] else []
    predicted = find_answers(text, [question.prediction])
    return [rank, round_finite(context.get("score")), round_finite(context.get("reader")),
            int(context["has_answer"]), round_finite(context.get("label")),
            [end for span in gold for end in span],
            [end for span in predicted for end in span]]


def round_finite(value):
    """Return a rounded number for JSON, or None for None and for a number that is not finite."""
    return round(value, 6) if value is not None and math.isfinite(value) else None


def join_texts(question, kept):
    """Return a question's searchable texts in one line, which pages/page.js splits again."""
    answers = BETWEEN_ANSWERS.join(normalize_text(answer) for answer in question.answers)
    fields = [normalize_text(str(question.id)), normalize_text(question.question),
              normalize_text(question.prediction), answers]
    for rank, context, text in kept:
        fields += [normalize_text(str(context.get("id", rank - 1))),
                   normalize_text(context.get("title") or ""), text]
    return BETWEEN_FIELDS.join(fields).replace("<", LESS_THAN)


def dump_json(value):
    """Return JSON without <, so that it cannot begin or end an HTML element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
