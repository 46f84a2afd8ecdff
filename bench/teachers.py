#!/usr/bin/env python3
"""Count how often a retriever, a language model's likelihood and their product rank a gold
document first.

    python bench/teachers.py FILE.scored.NAME.jsonl --qrels qrels.tsv

FILE.scored.NAME.jsonl is written by lm_score.py for records with `ctxs`. Only questions with a gold
document among their passages count, grouped by the record's field `kind`. The columns:

    retriever     the scores of the passages
    likelihood    the teacher scores, log p(answer | passage): the target of KL
    product       p(passage | question) p(answer | passage): the target of EMDR2

p(passage | question) is the softmax of the scores divided by --retriever_temperature.
"""
import os
import sys
from collections import Counter

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from records.qrels import read_qrels
from records.reading import iterate_json
from utils import InputError, Parser, run_script

TEACHERS = ("retriever", "likelihood", "product")


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("scored", metavar="FILE", help="records with ctxs and teacher_scores")
    add("--qrels", required=True, metavar="FILE", help="gold documents of the questions")
    add("--retriever_temperature", type=float, default=0.05,
        help="divides the scores of the passages")
    return parser.parse_args()


def count_first(path, qrels, temperature):
    """Return {kind: Counter}, with the number of "questions" and, for each of TEACHERS, of how many
    it ranks a gold document first.

    qrels: {question id: {document id: label}}. Raise InputError for a record without ctxs, ids or
    teacher_scores.
    """
    counts = {}
    for record, location in iterate_json(path):
        try:
            gold = {name for name, label in qrels[record["id"]].items() if label > 0}
            is_gold = [context["id"] in gold for context in record["ctxs"]]
            scores = [context["score"] / temperature for context in record["ctxs"]]
            likelihoods = record["teacher_scores"]
        except KeyError as error:
            raise InputError(f"{location}: {error} is missing; give the records that lm_score.py "
                             "wrote for retrieve.py --output, and the qrels of their questions"
                             ) from None
        if not any(is_gold):
            continue
        products = [a + b for a, b in zip(scores, likelihoods)]
        count = counts.setdefault(record.get("kind", "all"), Counter())
        count["questions"] += 1
        for teacher, values in zip(TEACHERS, (scores, likelihoods, products)):
            count[teacher] += is_gold[values.index(max(values))]
    return counts


def main(args):
    counts = count_first(args.scored, read_qrels(args.qrels), args.retriever_temperature)
    if not counts:
        raise InputError(f"{args.scored}: no question has a gold document among its passages")
    columns = ("questions", *TEACHERS)
    print(" " * 10 + "".join(f"{name:>16}" for name in columns))
    for kind, count in sorted(counts.items()):
        print(f"{kind:10}" + "".join(f"{count[name]:16}" for name in columns))


if __name__ == "__main__":
    run_script(main, parse_args())
