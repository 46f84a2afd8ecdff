"""Predict the answers to all records over all processes, score them, and write them to files and a
page.
"""
import json
import math
import re
from typing import NamedTuple

import torch

from data import eval_loader
from metrics import exact_match, f1, has_answer, regex_match
from pages.page import DEPTH_SAMPLE, Inspected, choose_depth, write_inspection
from records.files import new_file
from records.reader_records import retrieval_score
from records.reading import to_number
from training.checkpoints import read_training_args
from utils import InputError, copy_to_device, gather_lists, progress_bar, shorten

# characters that some program reads as the end of a line or a cell, with the spaces around them
BREAKS = re.compile(r"\s*[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
ANSWER_MAXLENGTH = 50  # most tokens of an answer, unless a flag or the checkpoint sets it
# minFiD's defaults, for checkpoints that do not store the lengths of their training
DEFAULT_LENGTHS = {"num_contexts": 5, "max_length": 200}
CHECKED = 10_000  # most answers that check_answers looks at, in a second or two


def add_answer_flags(add):
    """Add the flags that a reader's answers depend on. add: add_argument of a group."""
    add_tokenizer_flags(add)
    add("--answer_maxlength", type=int,
        help="maximum number of tokens to generate; default: the value in the checkpoint's "
        f"training, or {ANSWER_MAXLENGTH}")
    add("--num_beams", type=int,
        help="beams of beam search; 1: greedy search; default: 1, or N with --n_best N")
    add("--n_best", type=int, metavar="N",
        help="also output the N best answers of beam search with their probabilities; 1: only the "
        "answer's probability; default: none")


def choose_beams(num_beams, n_best):
    """Return the number of beams: as given, else one for each of the n_best answers, else 1.

    Raise InputError for a number below 1, and for fewer beams than answers.
    """
    for name, value in (("num_beams", num_beams), ("n_best", n_best)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be >= 1, got {value}")
    if num_beams is None:
        return n_best or 1
    if n_best and n_best > num_beams:
        raise InputError(f"--n_best {n_best} needs as many beams, --num_beams is {num_beams}; "
                         "raise it, or leave it out")
    return num_beams


def add_tokenizer_flags(add):
    """Add the flags that choose a reader's tokenizer. add: add_argument of a group."""
    add("--tokenizer", metavar="NAME",
        help="folder or hub name of the model whose tokenizer is used; default: the checkpoint's "
        "own")
    add("--t5_name", metavar="NAME",
        help="model whose tokenizer is used if the checkpoint has none; default: the model in the "
        "checkpoint's args.json that it was trained from, or t5-base if the sizes fit")


class Lengths(NamedTuple):
    """Hold how much a reader reads and generates for a question."""
    num_contexts: object   # the number of passages, or the list of numbers that was given
    max_length: int        # most tokens of the question with one passage
    answer_maxlength: int  # most tokens of an answer


def choose_lengths(path, log, num_contexts=None, max_length=None, answer_maxlength=None):
    """Return the Lengths: as given, else as in the checkpoint's training, else minFiD's defaults.

    num_contexts may be a list. Log values that differ from training, and values that the
    checkpoint does not store. Raise InputError for a broken args.json.
    """
    trained_args = read_training_args(path)
    chosen = {}
    for name, given in (("num_contexts", num_contexts), ("max_length", max_length)):
        trained = trained_args.get(name)
        if given is None and trained is None:
            given = DEFAULT_LENGTHS[name]
            log(f"note: {path} does not store its {name}; using {given} (--{name} changes it)")
        elif given is None:
            given = trained
        elif trained is not None and given not in (trained, [trained]):
            log(f"warning: --{name} {str(given).strip('[]')}, but the checkpoint was trained with "
                f"{trained}")
        chosen[name] = given
    answer_maxlength = (answer_maxlength or trained_args.get("eval_answer_maxlength")
                        or ANSWER_MAXLENGTH)
    return Lengths(**chosen, answer_maxlength=answer_maxlength)


class Prediction(NamedTuple):
    """Hold a reader's answer to a record."""
    index: int              # the record's index
    text: str
    em: object              # exact match, or None for a record without answers
    f1: object              # F1, or None for a record without answers
    context_scores: object  # the reader's score of each context, or None if not computed
    is_cut: bool = False    # the answer reached the limit of tokens without an end token
    n_best: object = None   # [(text, log probability)] of the best answers, or None


class Summary(NamedTuple):
    """Hold the measures of the predictions for records with answers."""
    em: float     # mean exact match in per cent
    f1: float     # mean F1 in per cent
    correct: int  # predictions with an exact match
    count: int    # records with answers
    cut: int      # answers that were cut, of all records


def predict(model, records, tokenizer, world, *, num_contexts, max_length, batch_size,
            num_workers=0, answer_maxlength=ANSWER_MAXLENGTH, num_beams=1, bf16=False,
            with_scores=False, n_best=None, is_regex=False):
    """Return the Predictions for all records, in their order, on every process.

    Each record is answered once, in the same batch for any number of processes. with_scores: the
    kind of context scores that generate() returns, or False. is_regex: see score_prediction.
    """
    collator = model.make_collator(tokenizer, num_contexts, max_length)
    loader = eval_loader(records, batch_size, collator, num_workers, world.rank, world.size)
    model.eval()
    ends = torch.tensor(model.end_tokens, device=world.device)
    predictions = []
    for batch in progress_bar(loader, desc=f"answering, {num_contexts} contexts",
                              is_main=world.is_main):
        inputs = copy_to_device(batch["inputs"], world.device)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            outputs = model.generate(**inputs, max_length=answer_maxlength, num_beams=num_beams,
                                     return_scores=with_scores, n_best=n_best)
        ids, *others = outputs if with_scores or n_best else (outputs,)
        scores = best_answers = [None] * len(ids)
        if with_scores:
            # with num_contexts 0, this drops the score of the question alone
            scores = others[0][:, :num_contexts].tolist()
        if n_best:
            best_answers = list_best(tokenizer, ids, others[-1])
            ids = ids[:, 0]                                              # (B, n, T) -> (B, T)
        is_cut = ~torch.isin(ids, ends).any(1)                                           # (B)
        rows = zip(batch["indices"], decode_answers(tokenizer, ids), scores, is_cut.tolist(),
                   best_answers)
        for index, text, *others in rows:
            predictions.append(score_prediction(index, text, records[index]["answers"], *others,
                                                is_regex=is_regex))
    return sorted(gather_lists(predictions, world), key=lambda prediction: prediction.index)


def decode_answers(tokenizer, rows):
    """Return the texts of rows of generated ids, without special tokens and outer whitespace."""
    texts = tokenizer.batch_decode(rows, skip_special_tokens=True,
                                   clean_up_tokenization_spaces=False)
    return [text.strip() for text in texts]


def list_best(tokenizer, ids, log_probabilities):
    """Return [(text, log probability)] of each question's answers, from ids (B, n, T)."""
    texts = iter(decode_answers(tokenizer, ids.flatten(0, 1)))           # (B, n, T) -> (B * n, T)
    return [[(next(texts), value) for value in row] for row in log_probabilities.tolist()]


def score_prediction(index, text, answers, context_scores, is_cut, n_best, is_regex=False):
    """Return the Prediction with its exact match and F1, if there are answers.

    is_regex: the answers are regular expressions, and metrics.regex_match is both measures.
    """
    em = f1_score = None
    if answers:
        em = regex_match(text, answers) if is_regex else exact_match(text, answers)
        f1_score = em if is_regex else f1(text, answers)
    return Prediction(index, text, em, f1_score, context_scores, is_cut, n_best)


def summarize(predictions):
    """Return the Summary of predictions."""
    scored = [prediction for prediction in predictions if prediction.em is not None]
    count = len(scored)
    correct = sum(prediction.em for prediction in scored)
    f1_sum = sum(prediction.f1 for prediction in scored)
    return Summary(100 * correct / max(count, 1), 100 * f1_sum / max(count, 1), int(correct), count,
                   sum(prediction.is_cut for prediction in predictions))


# ---------------------------------------------------------------- answers out of reach

class AnswerCheck(NamedTuple):
    """Count the questions (or targets) that no prediction can answer."""
    checked: int       # questions that were looked at
    unspelled: int     # questions where the tokens of each answer decode to another answer
    example: tuple     # (such an answer, the text that its tokens decode to), or ()
    too_long: int      # questions where each answer has more tokens than are generated
    needed: int        # the most tokens of any question's shortest answer


def check_answers(answer_lists, collator, room):
    """Return the AnswerCheck of the first questions, up to about CHECKED answers.

    answer_lists: the answers of each question. room: the most tokens of an answer that are
    generated. A question can be answered if the tokens of some answer decode to an exact match.
    """
    looked_at, checked, unspelled, example, too_long, needed = 0, 0, 0, (), 0, 0
    for answers in filter(None, answer_lists):
        if looked_at >= CHECKED:
            break
        looked_at += len(answers)
        checked += 1
        rows = [collator.target_ids(answer) for answer in answers]
        texts = decode_answers(collator.tokenizer, rows)
        if not any(exact_match(text, [answer]) for text, answer in zip(texts, answers)):
            unspelled += 1
            example = example or (answers[0], texts[0])
        length = min(map(len, rows)) - 1  # without the end token
        too_long += length > room
        needed = max(needed, length)
    return AnswerCheck(checked, unspelled, example, too_long, needed)


def note_unspelled(check, what, log):
    """Log a warning if the tokens of answers decode to other answers. what: "targets of FILE" or
    "questions of FILE".
    """
    if not check.unspelled:
        return
    answer, text = map(shorten, check.example)
    why = f"the tokenizer turns {answer} into tokens that decode to {text}"
    if check.unspelled == check.checked:
        log(f"WARNING: NONE of the {check.checked} {what} can be answered right: {why}; EM will be "
            "0 however long the training: use a checkpoint whose vocabulary has these characters, "
            "such as mT5 or ByT5")
    else:
        log(f"warning: {check.unspelled} of {check.checked} {what} cannot be answered right: "
            f"{why}")


def note_too_long(check, what, limit, room, flag, log):
    """Log how many questions have only answers that are longer than the flag's limit."""
    if check.too_long:
        log(f"note: {check.too_long} of {check.checked} {what} have no answer of at most {room} "
            f"tokens: --{flag} {limit} cuts every right answer; --{flag} "
            f"{check.needed + limit - room + 1} is enough for all")


def is_json_lines(path):
    """Return True for a .jsonl or .jsonl.gz path."""
    return str(path).removesuffix(".gz").endswith(".jsonl")


def write_predictions(path, predictions, records, with_contexts, is_regex=False):
    """Write minFiD's tab-separated lines (index, prediction, answers, em), or JSON lines if the
    path ends in .jsonl.

    with_contexts: add the reader's scores of the contexts to the JSON lines. In tab-separated lines
    a space replaces line ends and tabs of a prediction, so that each question takes one line.
    """
    with new_file(path) as file:
        for prediction in predictions:
            record = records[prediction.index]
            if is_json_lines(path):
                row = {"index": prediction.index, "id": record["id"],
                       "question": record["question"], "prediction": prediction.text,
                       "answers": record["answers"], "em": prediction.em, "f1": prediction.f1}
                if prediction.n_best is not None:
                    row |= describe_best(prediction.n_best)
                if with_contexts:
                    row |= describe_contexts(record, prediction.context_scores, is_regex)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                em = "nan" if prediction.em is None else prediction.em
                text = BREAKS.sub(" ", prediction.text)
                file.write(f"{prediction.index}\t{text}\t{record['answers']}\t{em}\n")


def describe_best(n_best):
    """Return the fields {probability, n_best} of a prediction's best answers."""
    answers = [{"prediction": text, "probability": math.exp(log_probability)}
               for text, log_probability in n_best]
    return {"probability": answers[0]["probability"], "n_best": answers}


def describe_contexts(record, scores, is_regex=False):
    """Return the fields {best_context, contexts} of a prediction.

    best_context is the id of the context with the highest score of the reader. contexts holds each
    context's id (or index), its score and, if the record has answers, has_answer.
    """
    contexts = []
    for index, (context, score) in enumerate(zip(record["ctxs"], scores)):
        contexts.append({"id": context.get("id", index), "score": score})
        if record["answers"]:
            contexts[-1]["has_answer"] = has_answer(context["text"], record["answers"],
                                                    is_regex)
    best = max(contexts, key=lambda context: context["score"], default={"id": None})
    return {"best_context": best["id"], "contexts": contexts}


def count_best_with_answer(predictions, records, is_regex=False):
    """Return (number of questions whose context with the highest score holds an answer, number of
    questions with any such context).

    The ratio shows whether the reader's scores can teach a retriever.
    """
    best, answerable = 0, 0
    for prediction in predictions:
        record = records[prediction.index]
        marks = [has_answer(context["text"], record["answers"], is_regex)
                 for context, _ in zip(record["ctxs"], prediction.context_scores)]
        if any(marks):
            answerable += 1
            scores = prediction.context_scores[:len(marks)]
            best += marks[scores.index(max(scores))]
    return best, answerable


def write_scores(path, predictions, records):
    """Write the records with the reader's scores of their contexts, which keep their order.

    A context that was read gets the reader's score as `score` and the retriever's as
    `retrieval_score`. A context that was not read gets no `score`, so that sorting puts it last.
    """
    with new_file(path) as file:
        if is_json_lines(path):
            for prediction in predictions:
                record = replace_scores(records[prediction.index], prediction.context_scores)
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
            return
        for position, prediction in enumerate(predictions):
            record = replace_scores(records[prediction.index], prediction.context_scores)
            text = json.dumps(record, ensure_ascii=False, indent=1).replace("\n", "\n ")
            file.write(("[\n " if position == 0 else ",\n ") + text)
        file.write("\n]")


def replace_scores(record, reader_scores):
    """Return a record with the reader's scores of its first contexts, see write_scores."""
    contexts = []
    for context in record["ctxs"][:len(reader_scores)]:
        contexts.append(context | {"retrieval_score": retrieval_score(context)})
    for context, score in zip(contexts, reader_scores):
        context["score"] = score
    for context in record["ctxs"][len(reader_scores):]:
        if "score" in context:
            context = context | {"retrieval_score": retrieval_score(context)}
            del context["score"]
        contexts.append(context)
    return record | {"ctxs": contexts}


# ---------------------------------------------------------------- the page

def write_predictions_page(path, title, remark, table, predictions, records, num_contexts, is_share,
               is_regex=False):
    """Write the page of test.py --html.

    is_share: the scores of the contexts are logarithms of shares. is_regex: the answers are regular
    expressions.
    """
    samples = [record["ctxs"][:num_contexts] for record in records[:DEPTH_SAMPLE]]
    depth = choose_depth(samples, len(records))
    questions = (inspect_prediction(prediction, records[prediction.index], num_contexts, is_share,
                                    is_regex)
                 for prediction in predictions)
    write_inspection(path, title, remark, table, questions, len(records), depth=depth,
                     has_predictions=True, reader_is_share=is_share, is_regex=is_regex)


def inspect_prediction(prediction, record, num_contexts, is_share, is_regex):
    """Return the Inspected of a prediction, with the contexts that the reader read."""
    contexts = record["ctxs"][:num_contexts]
    scores = torch.tensor(prediction.context_scores[:len(contexts)])
    if is_share:
        scores = scores.softmax(0)
    shown = []
    for context, score in zip(contexts, scores.tolist()):
        given = retrieval_score(context)
        shown.append({"id": context.get("id", len(shown)), "title": context.get("title"),
                      "text": context["text"], "reader": score,
                      "score": None if given is None else to_number(given),
                      "has_answer": has_answer(context["text"], record["answers"], is_regex)})
    return Inspected(record["id"], record["question"], record["answers"], shown, prediction.text,
                     prediction.em, prediction.f1)
