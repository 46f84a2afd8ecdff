#!/usr/bin/env python3
"""Make training records from a corpus alone: crops of documents are the queries for them.

    python scripts/make_crops.py corpus.tsv --output crops.jsonl
    python train_dense.py --output_dir OUT --train_data crops.jsonl --group_size 1 \
        --query_encoder bert-base-uncased

An untrained retriever learns from them to match words and names, without questions or labels, and
distillation can start from it. This is Contriever's cropping (arXiv 2112.09118, section 3.1), but
the whole document is the key. Half of the crops begin at the document's start, with its title.
"""
import json
import os
import random
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from make_corpus import cut_words, join_words
from records.corpus import Corpus
from records.files import check_paths, new_file
from utils import (
    InputError,
    Parser,
    check_at_least,
    check_seed,
    progress_bar,
    run_script,
)


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("corpus", nargs="+", help="documents: .tsv or .csv with a header, or JSON lines")
    add("--output", required=True, metavar="FILE", help="records to write, .json or .jsonl, one a "
        "line")
    add("--key_template", default="{title} {text}", help="the text of a document")
    add("--crops", type=int, default=1, help="crops per document")
    add("--min_words", type=int, default=3, help="words of the shortest crop")
    add("--max_words", type=int, default=8, help="words of the longest crop")
    add("--seed", type=int, default=42, help="seed of the crops")
    return parser.parse_args()


def draw_crop(rng, words, min_words, max_words):
    """Return a run of a document's words; half of the runs begin at the document's start."""
    length = rng.randint(min_words, max_words)
    first = 0
    if rng.random() < 0.5:
        first = rng.randrange(max(1, len(words) - length + 1))
    return words[first:first + length]


def main(args):
    check_at_least(args, {"crops": 1, "min_words": 1, "max_words": args.min_words})
    check_seed(args)
    check_paths([args.output], args.corpus)
    corpus = Corpus(args.corpus, args.key_template)
    corpus.note_columns(print)
    rng = random.Random(args.seed)
    count = 0
    with new_file(args.output) as file:
        for doc_index in progress_bar(range(len(corpus)), desc="cropping"):
            text = corpus.text(doc_index)
            words = cut_words(text)
            if not words:
                continue
            for _ in range(args.crops):
                crop = draw_crop(rng, words, args.min_words, args.max_words)
                record = {"query": join_words(crop), "pos": [text], "pos_index": [doc_index]}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
    if not count:
        raise InputError(f"{args.corpus[0]}: no document has a text")
    print(f"{count} crops of {len(corpus)} documents in {args.output}")


if __name__ == "__main__":
    run_script(main, parse_args())
