"""What a reader answers: predictions for all records over all processes, their scores, and the
files that hold them.
"""
import json
import re
from typing import NamedTuple

import torch

from checkpoints import read_training_args
from data import eval_loader
from files import new_file, to_number
from metrics import exact_match, f1, has_answer
from pages import SAMPLE, Inspected, choose_depth, write_inspection
from questions import retrieval_score
from sharding import is_sharded
from utils import gather_lists, progress_bar

# what ends a line or a cell of a table, for one program or another, with the blanks around it
BREAKS = re.compile(r"\s*[\t\n\r\v\f\x1c-\x1e\x85\u2028\u2029]\s*")
ANSWER_MAXLENGTH = 50  # most tokens of an answer, where no flag says otherwise
# minFiD's defaults, for checkpoints that do not say
UNKNOWN = {"num_contexts": 5, "max_length": 200}


def add_answer_flags(add):
    """Adds what the answers of a reader depend on, by the function of a group."""
    add_tokenizer_flags(add)
    add("--answer_maxlength", type=int, default=ANSWER_MAXLENGTH,
        help="most tokens to generate")
    add("--num_beams", type=int, default=1, help="beams; 1 is greedy")


def add_tokenizer_flags(add):
    """Add the flags that say whose tokenizer a reader has, by the function of a group."""
    add("--tokenizer", metavar="NAME",
        help="folder or hub name of the model whose tokenizer is used; default: the checkpoint's "
        "own")
    add("--t5_name", metavar="NAME",
        help="whose tokenizer is used if the checkpoint has none; default: that of the model that "
        "the checkpoint names as trained from, else t5-base's if the sizes fit")


def settle_lengths(args, log):
    """Sets args.num_contexts (a number, or a list of them) and args.max_length: as given, else as
    in the training of args.model, else minFiD's; logs where given and trained differ, or the
    checkpoint does not tell.

    Raises InputError for a broken args.json.
    """
    trained_args = read_training_args(args.model)
    for name, default in UNKNOWN.items():
        given, trained = getattr(args, name), trained_args.get(name)
        if given is None:
            setattr(args, name, trained or default)
            if trained is None:
                log(f"note: {args.model} does not tell its {name}; taking {default}, --{name} "
                    "changes it")
        elif trained is not None and given not in (trained, [trained]):
            log(f"warning: --{name} {str(given).strip('[]')}, but the checkpoint was trained with "
                f"{trained}")


class Prediction(NamedTuple):
    """A reader's answer to the record of this index; em and f1 are None for a record without
    answers.
    """
    index: int
    text: str
    em: object
    f1: object
    context_scores: object  # the reader's score of each context, or None if not asked for


class Summary(NamedTuple):
    """Means in per cent over the records that have answers."""
    em: float
    f1: float
    correct: int
    count: int


def predict(model, records, tokenizer, world, *, num_contexts, max_length, batch_size,
            num_workers=0, answer_maxlength=ANSWER_MAXLENGTH, num_beams=1, bf16=False,
            with_scores=False):
    """The Predictions for all records, in their order, on every process.

    Every record is answered once, in the same batch for any number of processes.
    """
    collator = model.make_collator(tokenizer, num_contexts, max_length)
    loader = eval_loader(records, batch_size, collator, num_workers, world.rank, world.size,
                         is_sharded(model))
    model.eval()
    predictions = []
    for batch in progress_bar(loader, desc=f"answering, {num_contexts} contexts",
                              is_main=world.is_main):
        inputs = {name: tensor.to(world.device) for name, tensor in batch["inputs"].items()}
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            output = model.generate(**inputs, max_length=answer_maxlength, num_beams=num_beams,
                                    return_scores=with_scores)
        if with_scores:
            # without contexts the question alone has a score
            generated, scores = output[0], output[1][:, :num_contexts].tolist()
        else:
            generated, scores = output, [None] * len(output)
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        for index, text, context_scores in zip(batch["indices"], texts, scores):
            predictions.append(score_prediction(index, text.strip(), records[index]["answers"],
                                                context_scores))
    # a batch that was answered twice, by a sharded model, counts once
    answered = {prediction.index: prediction for prediction in gather_lists(predictions, world)}
    return [answered[index] for index in sorted(answered)]


def score_prediction(index, text, answers, context_scores):
    """The Prediction with its exact match and F1, where there are answers."""
    if not answers:
        return Prediction(index, text, None, None, context_scores)
    return Prediction(index, text, exact_match(text, answers), f1(text, answers), context_scores)


def summarize(predictions):
    """The Summary of predictions."""
    scored = [prediction for prediction in predictions if prediction.em is not None]
    count = len(scored)
    correct = sum(prediction.em for prediction in scored)
    f1_sum = sum(prediction.f1 for prediction in scored)
    return Summary(100 * correct / max(count, 1), 100 * f1_sum / max(count, 1), int(correct), count)


def write_predictions(path, predictions, records, with_contexts):
    """Write minFiD's tab-separated lines (index, prediction, answers, em), or JSONL if the path
    ends in .jsonl; `with_contexts`, with the reader's scores of the contexts that it read.

    A tab-separated line has a blank where a prediction has line ends or tabs, so that each question
    takes one line.
    """
    with new_file(path) as file:
        for prediction in predictions:
            record = records[prediction.index]
            if path.endswith(".jsonl"):
                row = {"index": prediction.index, "id": record["id"],
                       "question": record["question"], "prediction": prediction.text,
                       "answers": record["answers"], "em": prediction.em, "f1": prediction.f1}
                if with_contexts:
                    row |= describe_contexts(record, prediction.context_scores)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                em = "nan" if prediction.em is None else prediction.em
                text = BREAKS.sub(" ", prediction.text)
                file.write(f"{prediction.index}\t{text}\t{record['answers']}\t{em}\n")


def describe_contexts(record, scores):
    """{best_context, contexts} of a prediction: the id of the context with the highest score of the
    reader, and every context's id (or index), score and, where there are answers, whether it holds
    one.
    """
    contexts = []
    for index, (context, score) in enumerate(zip(record["ctxs"], scores)):
        contexts.append({"id": context.get("id", index), "score": score})
        if record["answers"]:
            contexts[-1]["has_answer"] = has_answer(context["text"], record["answers"])
    best = max(contexts, key=lambda context: context["score"], default={"id": None})
    return {"best_context": best["id"], "contexts": contexts}


def count_best_with_answer(predictions, records):
    """(questions whose highest-scored context holds an answer, questions with a context that does):
    whether cross-attention scores can teach a retriever.
    """
    best, answerable = 0, 0
    for prediction in predictions:
        record = records[prediction.index]
        marks = [has_answer(context["text"], record["answers"])
                 for context, _ in zip(record["ctxs"], prediction.context_scores)]
        if any(marks):
            answerable += 1
            scores = prediction.context_scores[:len(marks)]
            best += marks[scores.index(max(scores))]
    return best, answerable


def write_scores(path, predictions, records):
    """Write the records with the reader's scores of their contexts, which keep their order.

    A context that was read has the reader's score as `score` and the retriever's as
    `retrieval_score`. A context that was not read has no `score`, so that it stays behind those
    that were read wherever contexts are sorted.
    """
    for prediction in predictions:
        contexts = records[prediction.index]["ctxs"]
        scores = prediction.context_scores[:len(contexts)]
        for context, score in zip(contexts, scores):
            context["retrieval_score"] = retrieval_score(context)
            context["score"] = score
        for context in contexts[len(scores):]:
            if "score" in context:
                context["retrieval_score"] = retrieval_score(context)
                del context["score"]
    with new_file(path) as file:
        if path.endswith(".jsonl"):
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        else:
            json.dump(records, file, ensure_ascii=False, indent=1)


# ---------------------------------------------------------------- the page

def write_page(path, title, remark, table, predictions, records, num_contexts, is_share):
    """Writes the page of test.py --html; is_share: the scores of the contexts are logarithms of
    shares.
    """
    samples = [record["ctxs"][:num_contexts] for record in records[:SAMPLE]]
    depth = choose_depth(samples, len(records))
    questions = (inspect(prediction, records[prediction.index], num_contexts, is_share)
                 for prediction in predictions)
    write_inspection(path, title, remark, table, questions, len(records), depth=depth,
                     has_predictions=True, reader_is_share=is_share)


def inspect(prediction, record, num_contexts, is_share):
    """The Inspected of a prediction, with the contexts that were read."""
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
                      "has_answer": has_answer(context["text"], record["answers"])})
    return Inspected(record["id"], record["question"], record["answers"], shown, prediction.text,
                     prediction.em, prediction.f1)
