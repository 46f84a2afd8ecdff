r"""Ask: from one question and a corpus to an answer, with the passages that it was read from.

    python ask.py OUT --corpus notes.jsonl --retrieval_method bm25 --question "Who has the key?"
    python ask.py OUT --corpus psgs_w100.tsv --query_encoder runs/dpr --index wiki.index
    python ask.py OUT --corpus notes.jsonl --retrieval_method bm25 --html page.html < questions.txt

Without --question, questions are read from a pipe, one per line, or typed at a prompt until an
empty line. The corpus is searched as in retrieve.py, with the same index, and the passages are read
as in test.py; index and reader are opened once. Passages are printed in the order of their share of
the reader's attention at the first token of the answer or, for a causal language model, of the
answer's likelihood.
"""
import time

START = time.perf_counter()  # importing the libraries is most of the loading time

import html
import json
import math
import os
import shutil
import sys
import textwrap
from contextlib import contextmanager, redirect_stdout
from statistics import median
from typing import NamedTuple

import torch
import transformers

from data import note_long_passages
from dense.flags import pick_flags
from pages.page import (
    END,
    begin_page,
    check_page,
    clean_text,
    cut_excerpt,
    normalize_text,
    split_at_answers,
)
from reader.open import add_causal_flags, open_with_tokenizer
from reader.predict import (
    add_answer_flags,
    choose_beams,
    choose_lengths,
    describe_best,
    predict,
)
from records.corpus import open_corpus
from records.files import check_paths, new_file
from records.questions import make_question
from records.reading import decode_line
from retrieval.flags import (
    add_corpus_flags,
    add_machine_flags,
    add_search_flags,
    check_search_flags,
    list_corpus_files,
    name_index,
    read_dense_settings,
    settle_templates,
)
from retrieval.results import read_contexts
from retrieval.search import (
    BM25Settings,
    SearchSettings,
    encode_questions,
    open_dense,
    search_query_vectors,
)
from utils import (
    InputError,
    Parser,
    check_at_least,
    read_number,
    run_script,
    shorten,
    start_processes,
)

PROMPT = "question: "
EMPTY = "(an empty answer)"
NOTHING_FOUND = "no passage was found; the question was read alone"
EXCERPT = 300        # characters of a passage on the terminal
LONG_EXCERPT = 1500  # and on the page
WIDEST = 100         # use at most this many columns of the terminal
BOLD, GREEN, DIM, PLAIN = "\033[1m", "\033[1;32m", "\033[2m", "\033[0m"


# ---------------------------------------------------------------- answering

class Answer(NamedTuple):
    """Hold the answer to a question, and the passages that it was read from."""
    question: str
    text: str
    contexts: list  # in the retriever's order: {id, title, text, score, share (per cent)}
    seconds: dict   # {part: seconds}
    n_best: object = None  # [(text, log probability)] of the best answers, or None


def answer_question(args, settings, lengths, text, corpus, index, model, tokenizer, world):
    """Return the Answer to a question's text. index: what open_search returns."""
    seconds = {}
    contexts = search_contexts(settings, text, corpus, index, world, seconds)
    # errors name a record by its id
    record = {"id": text, "question": text, "answers": [], "ctxs": contexts}
    with timed(seconds, "read"):
        prediction, = predict(model, [record], tokenizer, world, batch_size=1, **lengths._asdict(),
                              num_beams=choose_beams(args.num_beams, args.n_best),
                              with_scores="attention", n_best=args.n_best)
    # scores are logarithms of shares; a question without passages has one score, its own
    shares = 100 * torch.tensor(prediction.context_scores).softmax(0)
    for context, share in zip(contexts, shares.tolist()):
        context["share"] = share
    return Answer(text, prediction.text, contexts, seconds, prediction.n_best)


def search_contexts(settings, text, corpus, index, world, seconds):
    """Return the contexts {id, title, text, score} of a question, best first. Store the times in
    `seconds`.
    """
    questions = [make_question({"question": text}, "the question", 0, settings.task)]
    if settings.method == "dense":
        with timed(seconds, "encode"):
            query_vectors = encode_questions(index, questions, log)
        with timed(seconds, "search"):
            results = search_query_vectors(settings, index, query_vectors, world)
            return read_contexts(results, 0, corpus, None)
    from retrieval.bm25 import search_words
    with timed(seconds, "search"):
        results = search_words(settings, index, questions, world)
        return read_contexts(results, 0, corpus, None)


def note_unread(lengths, answer, model, tokenizer, is_first):
    """Log a note if a question fills the reader's input or, at the first question, if long passages
    are truncated.
    """
    collator = model.make_collator(tokenizer, lengths.num_contexts, lengths.max_length)
    alone, = collator.texts({"question": answer.question, "ctxs": []})
    ids = tokenizer(alone, add_special_tokens=False, truncation=True,
                    max_length=lengths.max_length)["input_ids"]
    if len(ids) == lengths.max_length:
        log(f"note: the question takes all of the {lengths.max_length} tokens that are read per "
            "passage, so no passage is read; raise --max_length")
    elif is_first:
        record = {"question": answer.question, "ctxs": answer.contexts}
        note_long_passages([record], collator, log)


# ---------------------------------------------------------------- opening

@contextmanager
def timed(seconds, part):
    """Store the seconds that the block takes in `seconds`, {part: seconds}."""
    start = time.perf_counter()
    yield
    seconds[part] = time.perf_counter() - start


def load_reader(args, world):
    """Return (model, tokenizer, Lengths) of the reader."""
    model, tokenizer = open_with_tokenizer(args.model, world.log, args.tokenizer, args.t5_name,
                                           prompt_flags=vars(args), trained=True)
    model.to(world.device)
    lengths = choose_lengths(args.model, world.log, args.num_contexts, args.max_length,
                             args.answer_maxlength)
    model.set_lengths(lengths.max_length, lengths.answer_maxlength)
    return model, tokenizer, lengths


def open_search(settings, corpus, world):
    """Return the BM25Index or DenseIndex of the settings; create it if it is missing."""
    if settings.method == "dense":
        return open_dense(settings, corpus, [settings.task], world)
    from retrieval.bm25 import open_bm25  # only here: loading bm25s takes seconds
    return open_bm25(settings, corpus, world)


# ---------------------------------------------------------------- questions

def check_question(text, location):
    """Raise InputError for a question that is blank or not valid Unicode."""
    if not text.strip():
        raise InputError(f"{location}: the question is empty; write one")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{location}: {shorten(text)} is not in UTF-8; set the terminal to "
                         "it") from None


def read_piped():
    """Yield the lines of stdin that have text. Raises InputError if no line has."""
    count = 0
    for line_number, line in enumerate(sys.stdin.buffer, 1):
        # \ufeff starts text files of Windows
        text = decode_line(line, "stdin", line_number).strip("\ufeff \t\r\n")
        if text:
            check_question(text, f"stdin:{line_number}")
            count += 1
            yield text
    if not count:
        raise InputError("stdin holds no question; write one per line, or give --question TEXT")


def read_typed():
    """Yield the lines typed at a prompt, until an empty line, Ctrl-D or Ctrl-C."""
    import readline  # noqa: F401  gives input() editing and a history
    print("type a question; an empty line ends", file=sys.stderr)
    while True:
        try:
            if sys.stdout.isatty():
                text = input(PROMPT)
            else:  # input() would write the prompt to stdout, where the answers go
                print(PROMPT, end="", file=sys.stderr, flush=True)
                text = input()
        except (EOFError, KeyboardInterrupt):
            print(file=sys.stderr)
            return
        if not text.strip():
            return
        check_question(text, "the line")
        yield text.strip()


# ---------------------------------------------------------------- the terminal

class Shown(NamedTuple):
    """Hold a passage as it is shown."""
    rank: int  # in the retriever's order, from 1
    score: float
    share: float
    title: str
    excerpt: str


def choose_shown(answer, count, length):
    """Return ([Shown], by falling share, number of the other passages, their share)."""
    ranked = sorted(enumerate(answer.contexts, 1), key=lambda pair: -pair[1]["share"])
    shown = []
    for rank, context in ranked[:count]:
        excerpt = cut_excerpt(context["text"], [answer.text], length)
        title = clean_text(context["title"] or "") or context["id"]
        shown.append(Shown(rank, context["score"], context["share"], title, excerpt))
    others = [context["share"] for _, context in ranked[count:]]
    return shown, len(others), sum(others)


def describe_seconds(seconds, digits=3):
    """Return the times of the parts in one line."""
    return ", ".join(f"{part} {value:.{digits}f} s" for part, value in seconds.items())


def print_answer(answer, count, in_colour):
    """Print an answer and the `count` passages with the highest shares."""
    def paint(text, colour):
        return f"{colour}{text}{PLAIN}" if in_colour else text
    width = min(shutil.get_terminal_size().columns, WIDEST)
    shown, num_others, others_share = choose_shown(answer, count, EXCERPT)
    lines = [paint(clean_text(answer.question), BOLD),
             f"  {paint(clean_text(answer.text) or EMPTY, GREEN)}",
             *(f"  {line}" for line in format_best_answers(answer)), ""]
    if shown:
        lines.append(paint("  share  rank      score", DIM))
    elif not answer.contexts:
        lines.append(f"  {NOTHING_FOUND}")
    for passage in shown:
        lines.append(f"{passage.share:5.1f} %  {passage.rank:4d}  {passage.score:9.3f}  "
                     f"{paint(passage.title, BOLD)}")
        # wrapped before it is coloured, because colour codes have no width
        excerpt = textwrap.fill(passage.excerpt, max(width - 9, 20))
        pieces = split_at_answers(excerpt, [answer.text])
        for i in range(1, len(pieces), 2):
            pieces[i] = paint(pieces[i], GREEN) if in_colour else f"**{pieces[i]}**"
        lines.append(textwrap.indent("".join(pieces), " " * 9))
    if num_others:
        lines.append(f"{others_share:5.1f} %  in {num_others} more")
    lines += ["", paint(f"  {describe_seconds(answer.seconds)}", DIM), ""]
    print("\n".join(lines), flush=True)


def format_best_answers(answer):
    """Return a line for each of the n best answers, with its probability."""
    return [f"{100 * math.exp(log_probability):5.1f} %  {clean_text(text) or EMPTY}"
            for text, log_probability in answer.n_best or []]


def print_record(answer, index):
    """Print an answer as one line of JSON, a record for other scripts."""
    record = {"id": index, "question": answer.question, "prediction": answer.text,
              "ctxs": answer.contexts, "seconds": answer.seconds}
    if answer.n_best:
        record |= describe_best(answer.n_best)
    print(json.dumps(record, ensure_ascii=False), flush=True)


def log(text):
    """Print on stderr, apart from the answers."""
    print(text, file=sys.stderr, flush=True)


def log_times(rows):
    """Log the time of the first answer, and the median times of all answers, in total and by part.

    rows: {part: seconds} per answer.
    """
    parts = {part: median(row[part] for row in rows) for part in rows[0]}
    total = median(sum(row.values()) for row in rows)
    log(f"{len(rows)} questions: the first took {sum(rows[0].values()):.3f} s, the median "
        f"{total:.3f} s ({describe_seconds(parts)})")


# ---------------------------------------------------------------- the page

SECTION = """<section>
<h1 dir="auto">{question}</h1>
<p class="answer" dir="auto">{answer}</p>
<ol class="passages">
{passages}
</ol>
<p class="quiet">{remarks}</p>
</section>"""
PASSAGE = """<li>
<h2 dir="auto">{title}</h2>
<div class="bar"><span style="width: {share:.1f}%"></span></div>
<div class="quiet">the reader's share {share:.1f} %; rank {rank} of the search, score
{score:.3f}</div>
<p dir="auto">{excerpt}</p>
</li>"""


def write_answers_page(path, answers, footer, count):
    """Write the answers, with `count` passages each, as one self-contained HTML page."""
    sections = "\n".join(make_section(answer, count) for answer in answers)
    today = time.strftime("%Y-%m-%d")
    with new_file(path) as file:
        file.write(begin_page(answers[0].question))
        footer = html.escape(normalize_text(footer))
        file.write(f"{sections}\n<footer>{footer}; {today}</footer>\n{END}")


def make_section(answer, count):
    """Return the HTML of a question, its answer and its passages."""
    shown, num_others, others_share = choose_shown(answer, count, LONG_EXCERPT)
    passages = []
    for passage in shown:
        pieces = split_at_answers(passage.excerpt, [answer.text])
        pieces = [html.escape(piece) for piece in pieces]
        pieces[1::2] = [f"<mark>{piece}</mark>" for piece in pieces[1::2]]
        passages.append(PASSAGE.format(title=html.escape(passage.title), share=passage.share,
                                       rank=passage.rank, score=passage.score,
                                       excerpt="".join(pieces)))
    remarks = describe_seconds(answer.seconds)
    if num_others:
        remarks = f"{others_share:.1f} % in {num_others} more; {remarks}"
    if not answer.contexts:
        remarks = f"{NOTHING_FOUND}; {remarks}"
    if answer.n_best:
        remarks = "<br>".join([*map(html.escape, format_best_answers(answer)), remarks])
    return SECTION.format(question=html.escape(clean_text(answer.question)),
                          answer=html.escape(clean_text(answer.text) or EMPTY),
                          passages="\n".join(passages), remarks=remarks)


# ---------------------------------------------------------------- flags

def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("reader").add_argument
    add("model", help="the reader: checkpoint folder, minFiD file or hub name")
    add("--num_contexts", type=int,
        help="passages to read; default: 5, or the checkpoint's value")
    add("--max_length", type=int,
        help="tokens per question and passage; default: 200, or the checkpoint's value")
    add_answer_flags(add)
    add_causal_flags(parser)
    add = parser.add_argument_group("questions and answers").add_argument
    add("--question", action="append", metavar="TEXT",
        help="a question, in quotes; may be repeated; default: read questions from a pipe, one per "
        "line, or at a prompt")
    add("--show", type=int, default=5, metavar="N",
        help="how many of the passages that were read to show")
    add("--html", metavar="FILE", help="write questions, answers and passages to an HTML page")
    add("--json", action="store_true",
        help="print a JSON record per question, with all passages as ctxs, instead of text")
    add_corpus_flags(parser.add_argument_group("documents").add_argument)
    add = parser.add_argument_group("retrieval").add_argument
    add("--retrieval_method", choices=["dense", "bm25"],
        help="how to find passages; default: dense if --query_encoder is given")
    add("--query_encoder", default="",
        help="retriever: checkpoint folder or hub name; needed for dense retrieval")
    add_search_flags(add)
    add_machine_flags(parser)
    return parser.parse_args()


def check_ask_flags(args, method):
    """Raise InputError for flags that do not fit together."""
    if read_number("WORLD_SIZE", 1) > 1:
        raise InputError("ask.py runs in one process: start it without torchrun")
    for name in ("query_encoder", "key_encoder"):
        if args.retrieval_method == "bm25" and getattr(args, name):
            raise InputError(f"--{name} is for dense retrieval and bm25 has no encoder; leave out "
                             "one of the two flags")
    if args.retrieval_method != "bm25" and not args.query_encoder:
        raise InputError("nothing to search with: give --query_encoder DIR, or --retrieval_method "
                         "bm25")
    if not args.corpus:
        raise InputError("nothing to search in: give --corpus FILE (scripts/make_corpus.py makes "
                         "one from a folder of texts)")
    for question in args.question or []:
        check_question(question, "--question")
    check_search_flags(args)
    check_at_least(args, {"num_contexts": 1, "max_length": 1, "answer_maxlength": 2, "show": 0})
    choose_beams(args.num_beams, args.n_best)  # raises InputError
    check_page(args.html)
    check_paths([args.html], [*list_corpus_files(args), name_index(args, method), args.model,
                              args.query_encoder, args.key_encoder])


def read_ask_settings(args, method, templates, hits):
    """Return the SearchSettings of the flags."""
    dense = read_dense_settings(args, templates) if method == "dense" else None
    return SearchSettings(method=method, hits=hits, index=name_index(args, method),
                          overwrite_index=args.overwrite_index, bm25=pick_flags(args, BM25Settings),
                          dense=dense, task=args.task, seed=args.seed)


# ---------------------------------------------------------------- main

def main(args):
    seconds = {"libraries": time.perf_counter() - START}
    method = args.retrieval_method or "dense"
    check_ask_flags(args, method)
    templates = settle_templates(args, method)
    sys.stdout.reconfigure(errors="replace")  # the terminal may lack some letters
    transformers.utils.logging.disable_progress_bar()
    with redirect_stdout(sys.stderr):  # only answers go to stdout
        world = start_processes(args.gpus)
        with timed(seconds, "reader"):
            model, tokenizer, lengths = load_reader(args, world)
        settings = read_ask_settings(args, method, templates, lengths.num_contexts)
        with timed(seconds, "corpus and index"):
            corpus = open_corpus(list_corpus_files(args), templates["key_template"], world)
            index = open_search(settings, corpus, world)
    sources = (f"{len(corpus):,} documents of {', '.join(list_corpus_files(args))}, "
               f"{args.query_encoder or 'BM25'}; {args.model} reads {lengths.num_contexts}, "
               f"{lengths.max_length} tokens each")
    log(f"{sources}; loaded in {sum(seconds.values()):.1f} s ({describe_seconds(seconds, 1)})")

    is_typed = not args.question and sys.stdin.isatty()
    questions = args.question or (read_typed() if is_typed else read_piped())
    in_colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    answers = []
    try:
        for i, text in enumerate(questions):
            try:
                answer = answer_question(args, settings, lengths, text, corpus, index, model,
                                         tokenizer, world)
            except InputError as error:
                if not is_typed:
                    raise
                log(f"error: {error}")  # the next question may work
                continue
            answers.append(answer)
            note_unread(lengths, answer, model, tokenizer, is_first=len(answers) == 1)
            if args.json:
                print_record(answer, i)
            else:
                print_answer(answer, args.show, in_colour)
            if args.html and is_typed:  # the page can be viewed between two questions
                write_answers_page(args.html, answers, sources, args.show)
    finally:
        if args.html and answers:
            write_answers_page(args.html, answers, sources, args.show)
            log(f"page: {args.html}")
    if len(answers) > 1:
        log_times([answer.seconds for answer in answers])


if __name__ == "__main__":
    run_script(main, parse_args())
