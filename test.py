r"""Evaluate a reader checkpoint: exact match, F1, predictions, scores of the contexts.

    python test.py OUT test.json
    python test.py OUT test.json --num_contexts 1 5 10 --pred predictions.tsv
    torchrun --standalone --nproc_per_node=8 test.py nq_reader_base test.json --num_contexts 100 \
        --gpus 0,1,2,3,4,5,6,7

OUT is a folder written by train_epoch.py, a T5 or causal language model (folder or hub name), a
released FiD reader, or minFiD's file. The number of contexts and the lengths default to those of
the checkpoint's training.
"""
import os
import time

from data import note_long_passages
from layers.regions import compile_on_gpu
from pages.page import check_page
from reader.open import add_causal_flags, open_with_tokenizer
from reader.predict import (
    add_answer_flags,
    check_answers,
    choose_beams,
    choose_lengths,
    count_best_with_answer,
    is_json_lines,
    note_too_long,
    note_unspelled,
    predict,
    summarize,
    write_predictions,
    write_predictions_page,
    write_scores,
)
from records.files import check_paths, is_stream, write_json
from records.questions import TABLE_ENDINGS
from records.reader_records import count_unscored, note_contexts, read_facts, read_records
from retrieval.measures import note_patterns
from utils import GPUS, NO_COMPILE, InputError, Parser, check_at_least, run_script, start_processes

# ---------------------------------------------------------------- the evaluation

def evaluate_reader(args, model, tokenizer, records, context_counts, lengths, world):
    """Answer all records with each number of contexts. Log a table row and write --pred and
    --measures for each.

    Return (the Predictions of the last number of contexts, the table as rows of texts).
    """
    table = [["contexts", "EM", "F1", "correct"]]
    world.log(f"{'contexts':>8} {'EM':>6} {'F1':>6} {'correct':>13} {'questions/s':>12}")
    for num_contexts in context_counts:
        start = time.time()
        predictions = predict(model, records, tokenizer, world, num_contexts=num_contexts,
                              max_length=lengths.max_length, batch_size=args.batch_size,
                              num_workers=args.num_workers,
                              num_beams=choose_beams(args.num_beams, args.n_best),
                              answer_maxlength=lengths.answer_maxlength, bf16=args.bf16,
                              with_scores=choose_score_kind(args), n_best=args.n_best,
                              is_regex=args.match == "regex")
        summary = summarize(predictions)
        speed = len(records) / (time.time() - start)
        if summary.count:
            em, f1 = f"{summary.em:.2f}", f"{summary.f1:.2f}"
            bar = "█" * round(summary.em / 2.5)
            world.log(f"{num_contexts:8d} {em:>6} {f1:>6} {summary.correct:6d}/{summary.count:<6d} "
                      f"{speed:12.1f}  {bar}")
            table.append([str(num_contexts), em, f1, f"{summary.correct}/{summary.count}"])
        else:  # no record has answers to compare with: show the first predictions instead
            world.log(f"{num_contexts:8d} {'-':>6} {'-':>6} {'-':>13} {speed:12.1f}")
            for prediction in predictions[:3]:
                question = " ".join(records[prediction.index]["question"].split())
                world.log(f"         {question[:60]} -> {prediction.text!r}")
        if summary.cut:
            world.log(f"         {summary.cut} answers were cut at {lengths.answer_maxlength} "
                      "tokens (--answer_maxlength)")
        if args.pred and world.is_main:
            path = insert_count(args.pred, num_contexts, context_counts)
            write_predictions(path, predictions, records, args.scores is not None,
                              args.match == "regex")
            print(f"         predictions in {path}")
        if args.measures and world.is_main:
            path = insert_count(args.measures, num_contexts, context_counts)
            write_json(path, {"questions": summary.count, "num_contexts": num_contexts,
                              "em": summary.em / 100, "f1": summary.f1 / 100})
            print(f"         measures in {path}")
    return predictions, table


def choose_score_kind(args):
    """Return which scores of the contexts to compute, "logits" or "attention", or False for none.
    """
    if args.scores is not None:
        return args.score_kind or "logits"
    return args.html is not None and (args.score_kind or "attention")


def insert_count(path, num_contexts, context_counts):
    """Return where --pred or --measures of num_contexts goes: the path itself, or, if there are
    several context_counts, the path with the number before its ending.
    """
    if len(context_counts) == 1 or is_stream(path):
        return path
    ending = ".gz" if path.endswith(".gz") else ""
    stem, suffix = os.path.splitext(path.removesuffix(".gz"))
    return f"{stem}.{num_contexts}{suffix}{ending}"


# ---------------------------------------------------------------- setting up

def check_outputs(args, context_counts):
    """Raise InputError for an output that cannot be written, or that would stay empty."""
    paths = [insert_count(path, num_contexts, context_counts)
             for path in (args.pred, args.measures) if path for num_contexts in context_counts]
    check_paths([*paths, args.scores, args.html], [args.data, args.model])
    check_page(args.html)
    if (args.pred or "").removesuffix(".gz").endswith((".json", ".csv")):
        raise InputError(f"--pred {args.pred}: predictions are JSON lines (.jsonl) or separated by "
                         "tabs (.tsv)")
    if (args.scores or "").removesuffix(".gz").endswith(TABLE_ENDINGS):
        raise InputError(f"--scores {args.scores}: the records are JSON; give a name that ends in "
                         ".json or .jsonl")
    if args.scores == "" and not is_json_lines(args.pred):
        raise InputError("--scores: give a FILE for the records, or a --pred FILE.jsonl, which the "
                         "scores are added to")
    if args.n_best and not is_json_lines(args.pred):
        raise InputError(f"--n_best {args.n_best}: give a --pred FILE.jsonl, which the answers and "
                         "their probabilities are written to")


def note_unanswerable(path, records, model, collator, answer_maxlength, log):
    """Log how many questions cannot be answered correctly, because the tokenizer cannot spell their
    answers or --answer_maxlength cuts them.
    """
    room = model.count_answer_tokens(answer_maxlength)
    check = check_answers((facts["answers"] for facts in read_facts(records)), collator, room)
    what = f"questions of {path}"
    note_unspelled(check, what, log)
    note_too_long(check, what, answer_maxlength, room, "answer_maxlength", log)


# ---------------------------------------------------------------- flags

def parse_args():
    """Return the flags of the command line."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("data").add_argument
    add("model", help="checkpoint folder, minFiD file or hub name")
    add("data", help="records to answer: .json or .jsonl, may end in .gz")
    add("--num_contexts", type=int, nargs="+", metavar="N",
        help="contexts per question, one table row each; 0: answer without contexts; default: the "
        "checkpoint's value, or 5")
    add("--max_length", type=int,
        help="maximum tokens per question and passage; default: the checkpoint's value, or 200")
    add("--match", choices=["string", "regex"], default="string",
        help="string: answers are strings; regex: answers are regular expressions (CuratedTREC); a "
        "prediction is correct if its beginning matches one of them, as in DrQA, and F1 equals EM")
    add("--num_workers", type=int, default=0,
        help="processes that tokenise, for each GPU; 2 or 3 keep up with a fast one")
    add = parser.add_argument_group("model").add_argument
    add_answer_flags(add)
    add_causal_flags(parser)
    add = parser.add_argument_group("outputs").add_argument
    add("--pred", metavar="FILE",
        help="write predictions as JSON lines if FILE ends in .jsonl, else as in minFiD: index, "
        "prediction, answers and score, separated by tabs; one file for each of several "
        "--num_contexts")
    add("--scores", metavar="FILE", nargs="?", const="",
        help="add the reader's scores of the contexts to the .jsonl of --pred: cross-attention "
        "or, for a causal language model, log posteriors given the answer. With FILE (.json or "
        ".jsonl) also write the records with these scores as 'score' and the retrieval scores as "
        "'retrieval_score'")
    add("--measures", metavar="FILE",
        help="write EM and F1 (fractions) as JSON; one file for each of several --num_contexts")
    add("--score_kind", choices=["logits", "attention"],
        help="cross-attention score of a passage: logits, the mean of its tokens' scores before "
        "the softmax (FiD-KD), or attention, the log of the attention to them (Atlas); default: "
        "logits with --scores, attention with --html alone")
    add("--html", metavar="FILE",
        help="write an HTML page with each question, its prediction, its passages and the "
        "reader's attention to them, for the last of several --num_contexts")
    add = parser.add_argument_group("run").add_argument
    add("--batch_size", type=int, default=16, help="questions per batch and process")
    add("--bf16", action="store_true", help="compute in bfloat16 (autocast)")
    add("--no_compile", **NO_COMPILE)
    add("--gpus", **GPUS)
    return parser.parse_args()


def main(args):
    world = start_processes(args.gpus)
    compile_on_gpu(not args.no_compile)
    check_at_least(args, {"max_length": 1, "batch_size": 1, "num_workers": 0,
                          "answer_maxlength": 2})
    if args.num_contexts and min(args.num_contexts) < 0:
        raise InputError(f"--num_contexts must be >= 0, got {min(args.num_contexts)}")
    choose_beams(args.num_beams, args.n_best)  # raises InputError
    lengths = choose_lengths(args.model, world.log, args.num_contexts, args.max_length,
                             args.answer_maxlength)
    context_counts = args.num_contexts or [lengths.num_contexts]
    most_contexts = max(context_counts)
    check_outputs(args, context_counts)

    # the records
    records = read_records(args.data)
    is_regex = args.match == "regex"
    if is_regex:
        note_patterns([facts["answers"] for facts in read_facts(records)],
                      [f"record {index}" for index in range(len(records))], world.log)
    unscored = count_unscored(records)
    if args.measures and unscored == len(records):
        raise InputError(f"--measures: no record of {args.data} has answers to be measured by")

    # the reader
    model, tokenizer = open_with_tokenizer(args.model, world.log, args.tokenizer, args.t5_name,
                                           prompt_flags=vars(args), trained=True)
    model.to(world.device)
    model.set_lengths(lengths.max_length, lengths.answer_maxlength)
    model.check_records(records, most_contexts, args.data)
    note = f", {unscored} of them without answers: predicted, not scored" if unscored else ""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    world.log(f"{len(records)} questions{note}; {parameters:,} parameters on {world.size} x "
              f"{world.device.type}, length {lengths.max_length}")
    note_contexts(records, args.data, most_contexts, world.log)
    collator = model.make_collator(tokenizer, most_contexts, lengths.max_length)
    note_long_passages(records, collator, world.log)
    if not is_regex:
        note_unanswerable(args.data, records, model, collator, lengths.answer_maxlength, world.log)

    predictions, table = evaluate_reader(args, model, tokenizer, records, context_counts, lengths,
                                         world)
    num_contexts = context_counts[-1]
    if args.scores is not None:
        best, answerable = count_best_with_answer(predictions, records, is_regex)
        if answerable:
            world.log(f"the context with the highest score holds an answer for {best} of "
                      f"{answerable} questions that have such a context, "
                      f"{100 * best / answerable:.1f} %")
    if not world.is_main:
        return
    if args.html:
        remark = f"{len(records):,} questions{note}; at most {num_contexts} passages of each read"
        write_predictions_page(args.html, f"{args.model} on {args.data}", remark, table,
                               predictions, records, num_contexts,
                               is_share=choose_score_kind(args) == "attention", is_regex=is_regex)
        print(f"page: {args.html}")
    if args.scores:
        write_scores(args.scores, predictions, records)
        print(f"the reader's scores of {num_contexts} contexts in {args.scores}")


if __name__ == "__main__":
    run_script(main, parse_args())
