"""Recall of BM25 and of a trained retriever on the embedded world's test questions, over its whole corpus.

    python toy/recall.py out/demo-dense --data toy/data
"""
import argparse
import os
import sys

import bm25s
import torch
import transformers

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from checkpoints import load_tokenizer  # noqa: E402
from corpus import Corpus, read_qrels, read_queries  # noqa: E402
from dense_data import GroupCollator  # noqa: E402
from dense_eval import annotated_set, evaluate  # noqa: E402
from metrics import ranking_metrics  # noqa: E402
from retriever import BiEncoder  # noqa: E402
from utils import HelpFormatter, World, read_args, run_script  # noqa: E402

CUTOFFS = [1, 5, 20]


def bm25_recall(dev, corpus, **settings):
    """{recall@k} of bm25s with its own tokenizer and English stop words."""
    index = bm25s.BM25(**settings)
    tokens = {"stopwords": "en", "show_progress": False}
    index.index(bm25s.tokenize([corpus.text(i) for i in range(len(corpus))], **tokens), show_progress=False)
    found, _ = index.retrieve(bm25s.tokenize(dev.queries, **tokens), k=max(CUTOFFS), show_progress=False)
    rows = [ranking_metrics(own.tolist(), labels, ["recall"], CUTOFFS) for own, labels in zip(found, dev.labels)]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def main(args):
    transformers.utils.logging.disable_progress_bar()
    corpus, world = Corpus(f"{args.data}/corpus.tsv", "{title} {text}"), World(0, 0, 1, torch.device("cpu"))
    qrels = read_qrels(f"{args.data}/qrels.{args.split}.tsv")
    dev = annotated_set(qrels, corpus, read_queries([f"{args.data}/queries.{args.split}.jsonl"]), None)._replace(method="retrieval")
    flags = argparse.Namespace(**read_args(args.model)["args"])
    collator = GroupCollator(load_tokenizer(args.model, args.model), flags, corpus)
    print(f"{len(dev.queries)} {args.split} questions, {len(corpus)} passages")
    results = {"BM25": bm25_recall(dev, corpus), "BM25, k1 0.9 b 0.4": bm25_recall(dev, corpus, k1=0.9, b=0.4),
               "trained retriever": evaluate(BiEncoder.open(args.model), dev, collator, corpus, ["recall"], CUTOFFS, world)}
    for name, values in results.items():
        print(f"{name:20}" + "".join(f"  {key} {100 * value:6.2f}" for key, value in values.items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="folder of a trained retriever")
    parser.add_argument("--data", default="toy/data", help="folder that toy/world.py wrote")
    parser.add_argument("--split", default="test", help="train, dev or test")
    run_script(main, parser.parse_args())
