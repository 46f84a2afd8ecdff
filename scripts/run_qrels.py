#!/usr/bin/env python3
"""Make qrels from a run: the documents that a search found become negatives of train_dense.py.

    python retrieve.py --corpus corpus.jsonl --queries queries.jsonl --qrels qrels=train.tsv \\
        --query_encoder MODEL --hits 15 --trec mined.trec
    python scripts/run_qrels.py mined.trec --output mined.tsv
    python train_dense.py --positives qrels=train.tsv,min_score=1 --negatives qrels=mined.tsv ...

Every document of the run gets the label 0. Positives among them do no harm: in training a document
that is both counts as a positive; in --eval_qrels give the positives' file after this one.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from records.files import check_paths, new_file
from retrieval.results import run_lines
from utils import InputError, Parser, progress_bar, run_script


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("run", metavar="RUN",
                        help="a TREC run, as retrieve.py --trec writes it, or MS MARCO's of query, "
                        "document and rank")
    parser.add_argument("--output", required=True, metavar="FILE", help="qrels in BEIR's form")
    return parser.parse_args()


def main(args):
    check_paths([args.output], [args.run])
    count = 0
    with new_file(args.output) as file:
        file.write("query-id\tcorpus-id\tscore\n")
        for line in progress_bar(run_lines(args.run), desc="run"):
            file.write(f"{line.query_id}\t{line.document_id}\t0\n")
            count += 1
    if not count:
        raise InputError(f"{args.run}: holds no results")
    print(f"{args.output}: {count:,} documents with the label 0")


if __name__ == "__main__":
    run_script(main, parse_args())
