"""Measure the page of a full test set: its size, and how long a browser opens and searches it.

    python bench/pages.py                         # NaturalQuestions' test set: 3,610 x 100
    python bench/pages.py --budget 1000000000     # the same with every passage in the page

The texts are random, with 100 words a passage. Needs chromium.
"""
import argparse
import os
import random
import string
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]
from browser import CHROMIUM, Browser
from pages import page as pages
from pages.page import Inspected, choose_depth, write_inspection
from utils import InputError, Parser, run_script


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--questions", type=int, default=3610)
    add("--passages", type=int, default=100, help="of a question")
    add("--budget", type=int, default=pages.BUDGET, help="characters of passages in the page")
    return parser.parse_args()


def draw_questions(args, words, rng):
    """Yield the Inspected of random questions; one passage in eight holds the answer."""
    def draw_text(count):
        return " ".join(rng.choices(words, k=count))
    for i in range(args.questions):
        answer, is_right = draw_text(2), i % 2
        contexts = []
        for rank in range(args.passages):
            holds = rng.random() < 1 / 8
            text = draw_text(98) + " " + (answer if holds else draw_text(2))
            contexts.append({"id": str(rng.randrange(21_015_324)), "title": draw_text(2),
                             "text": text, "score": 100 - rank, "reader": rng.random(),
                             "has_answer": holds})
        prediction = answer if is_right else draw_text(2)
        yield Inspected(i, draw_text(9), [answer], contexts, prediction, is_right, is_right)


def time_browser(path):
    """Print the seconds that Chromium takes to open the page and to search it."""
    browser = Browser()
    try:
        start = time.perf_counter()
        browser.open(path)
        browser.wait_for("document.querySelector('#status').textContent !== ''")
        print(f"opened in {time.perf_counter() - start:.2f} s")
        for name in ("first", "second"):
            start = time.perf_counter()
            browser.evaluate(f"setState({{q: '{name}'}}), show()")
            print(f"{name} search: {time.perf_counter() - start:.2f} s")
        size = browser.evaluate("performance.memory.usedJSHeapSize")
        print(f"memory of the script: {size / 2 ** 20:.0f} MiB")
    finally:
        browser.close()


def main(args):
    if CHROMIUM is None:
        raise InputError("no chromium on this machine; install it (apt-get install chromium)")
    rng = random.Random(0)
    words = ["".join(rng.choices(string.ascii_lowercase, k=rng.randint(2, 9)))
             for _ in range(20000)]
    samples = [question.contexts for question in draw_questions(
        argparse.Namespace(questions=20, passages=args.passages), words, rng)]
    pages.BUDGET = args.budget
    depth = choose_depth(samples, args.questions)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "page.html")
        write_inspection(path, "bench", "", [["contexts"]], draw_questions(args, words, rng),
                         args.questions, depth=depth, has_predictions=True)
        print(f"{args.questions:,} questions, {min(depth, args.passages)} of {args.passages} "
              f"passages: {os.path.getsize(path) / 2 ** 20:.0f} MiB")
        time_browser(path)


if __name__ == "__main__":
    run_script(main, parse_args())
