#!/usr/bin/env python3
"""Measure where a reader's attention goes: for how many of the questions answered right the
passage with the highest score holds the answer, by both kinds of scores (test.py --score_kind) and
by the order of the contexts.

    python bench/shares.py out/demo toy/data/test.json
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from metrics import has_answer
from model import FiDT5
from reader.predict import choose_lengths, predict
from records.reader_records import read_records
from training.checkpoints import load_tokenizer
from utils import Parser, run_script, start_processes


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("model", help="the reader's folder")
    add("data", help="records with answers and ctxs")
    add("--questions", type=int, default=300, help="how many records to read, from the first on")
    return parser.parse_args()


def count_holding(records, predictions):
    """Return (questions whose best-scored passage holds the answer, questions answered right)."""
    num_holding, num_right = 0, 0
    for record, prediction in zip(records, predictions):
        if not prediction.em or not record["ctxs"]:
            continue
        num_right += 1
        # a reader with fewer contexts than the record scores only the first ones
        scored = zip(prediction.context_scores, record["ctxs"])
        _, best = max(scored, key=lambda pair: pair[0])
        num_holding += has_answer(best["text"], record["answers"])
    return num_holding, num_right


def main(args):
    world = start_processes("")
    records = read_records(args.data)[:args.questions]
    model = FiDT5.from_pretrained(args.model)
    tokenizer = load_tokenizer(args.model, "t5-base")
    lengths = choose_lengths(args.model, print)
    model.set_lengths(lengths.max_length, lengths.answer_maxlength)
    for kind in ("attention", "logits"):
        predictions = predict(model, records, tokenizer, world, batch_size=16, with_scores=kind,
                              **lengths._asdict())
        num_holding, num_right = count_holding(records, predictions)
        print(f"{kind:17} {num_holding} of {num_right}")
    by_rank = [prediction._replace(context_scores=[0] * len(prediction.context_scores))
               for prediction in predictions]  # among equal scores the first passage counts
    num_holding, num_right = count_holding(records, by_rank)
    print(f"the first passage {num_holding} of {num_right}")


if __name__ == "__main__":
    run_script(main, parse_args())
