"""Write the embedded world in the forms and under the names of the published data sets and
models: with --toy, recipes use it for what scripts/get_data.sh fetches.

    python toy/published.py fid-nq dpr-nq --out data
    python toy/published.py nq-reader-base --out data --reader runs/reader
    python toy/published.py dpr-nq-model nq-retriever --out data --retriever runs/retriever

Data sets are made from the world of toy/world.py; --questions sets the sizes of train, dev and
test. Readers and retrievers are converted from one of our folders. FiD's readers have wrapped
names, a bias in cross-attention (zeros, so that the answers stay the same) and no tokenizer. FiD's
retrievers have a projection (which changes nothing) and a norm. DPR's are one file of two encoders,
next to a bert-base-uncased with random weights.
"""
import argparse
import gzip
import json
import re
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, T5ForConditionalGeneration

import world

ROOT = Path(__file__).resolve().parent.parent
FID = {"fid-nq": "NQ", "fid-tqa": "TQA"}
DATA_SETS = (*FID, "passages", "dpr-nq", "dpr-nq-qa", "dpr-nq-results", "msmarco", "llm-embedder",
             "bert-base-uncased", "bert-of-means")
READERS = ("nq-reader-base", "nq-reader-large", "tqa-reader-base", "tqa-reader-large")
FID_RETRIEVERS = ("nq-retriever", "tqa-retriever")
DPR_MODELS = {"dpr-nq-model": "hf_bert_base.cp", "dpr-nq-hn-model": "hf_bert_base.hn.cp",
              "dpr-multiset-model": "hf_bert_base.multiset.cp"}
SPLITS = ("train", "dev", "test")


# ---------------------------------------------------------------- files

def write_json(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt") as file:
        json.dump(content, file)


def write_rows(path, rows):
    """Write JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    world.write_lines(path, [json.dumps(row) for row in rows])


def plain(context):
    """Return a passage in the data sets' form."""
    return {name: context[name] for name in ("id", "title", "text")}


# ---------------------------------------------------------------- FiD's and DPR's data

def write_passages(out, passages):
    """Write psgs_w100.tsv.gz."""
    with gzip.open(out / "psgs_w100.tsv.gz", "wt") as file:
        file.write("id\ttext\ttitle\n")
        for passage in passages:
            file.write(f"{passage['id']}\t{passage['text']}\t{passage['title']}\n")


def write_fid(out, name, passages, splits):
    """Write what FiD's get-data.sh fetches for NQ or TQA: original questions, FiD's splits, and the
    ids of each question's passages.
    """
    write_passages(out, passages)
    original = splits["train"] + splits["dev"]
    sizes = {split: len(splits[split]) for split in SPLITS}
    index = {"train": list(range(sizes["train"])), "test": list(range(sizes["test"])),
             "dev": list(range(sizes["train"], len(original)))}
    for split in SPLITS:
        write_json(out / f"{name}.{split}.idx.json", index[split])
    if name == "NQ":
        for path, records in (("train", original), ("dev", splits["test"])):
            write_rows(out / f"NQ-open.{path}.jsonl",
                       [{"question": record["question"], "answer": record["answers"]}
                        for record in records])
    else:
        for path, records in (("train", original), ("dev", splits["test"])):
            items = [{"Question": record["question"], "QuestionId": record["id"],
                      "Answer": {"Value": record["answers"][0], "Aliases": record["answers"]}}
                     for record in records]
            write_json(out / "triviaqa-unfiltered" / f"unfiltered-web-{path}.json", {"Data": items})
    for split in SPLITS:
        ids = {}
        for index, record in enumerate(splits[split]):
            key = str(index) if name == "NQ" else record["id"]
            ids[key] = [context["id"] for context in record["ctxs"]]
        write_json(out / f"{name.lower()}_passages" / f"{split}.json", ids)


def write_dpr(out, splits):
    """Write biencoder-nq-train.json.gz and its dev: questions with positives and negatives."""
    for split in ("train", "dev"):
        records = []
        for record in splits[split]:
            right = [context for context in record["ctxs"] if context["has_answer"]]
            wrong = [context for context in record["ctxs"] if not context["has_answer"]]
            if right:
                records.append({"question": record["question"], "answers": record["answers"],
                                "positive_ctxs": [plain(context) for context in right[:1]],
                                "negative_ctxs": [],
                                "hard_negative_ctxs": [plain(context) for context in wrong[:5]]})
        write_json(out / f"biencoder-nq-{split}.json.gz", records)


def write_questions(out, splits):
    """Write nq-dev.qa.csv and nq-test.qa.csv: question, tab, a Python list of answers."""
    for split in ("dev", "test"):
        lines = [f"{record['question']}\t{record['answers']!r}" for record in splits[split]]
        world.write_lines(out / f"nq-{split}.qa.csv", lines)


def write_results(out, splits):
    """Write nq-train.json.gz and the like: results of DPR's retriever, with scores as texts."""
    for split in SPLITS:
        records = []
        for record in splits[split]:
            contexts = [plain(context) | {"score": str(context["score"]),
                                          "has_answer": context["has_answer"]}
                        for context in record["ctxs"]]
            records.append({"question": record["question"], "answers": record["answers"],
                            "ctxs": contexts})
        write_json(out / f"nq-{split}.json.gz", records)


# ---------------------------------------------------------------- MS MARCO, LLM-Embedder

def write_beir(out, passages, splits):
    """Write msmarco/ in BEIR's form: corpus.jsonl, queries.jsonl, qrels/train.tsv and dev.tsv."""
    write_rows(out / "corpus.jsonl", [{"_id": passage["id"], "title": passage["title"],
                                       "text": passage["text"]} for passage in passages])
    records = [record for split in ("train", "dev") for record in splits[split]]
    write_rows(out / "queries.jsonl", [{"_id": record["id"], "text": record["question"]}
                                       for record in records])
    (out / "qrels").mkdir(exist_ok=True)
    for split in ("train", "dev"):
        rows = ["query-id\tcorpus-id\tscore"]
        rows += [f"{record['id']}\t{identifier}\t1" for record in splits[split]
                 for identifier in record["gold"]]
        world.write_lines(out / "qrels" / f"{split}.tsv", rows)


def labelled(record, passages, task, scored):
    """Return a record in LLM-Embedder's form; teacher scores separate positives from negatives."""
    texts = [f"{passage['title']} {passage['text']}" for passage in passages]
    right = [int(identifier) - 1 for identifier in record["gold"]]
    wrong = [int(context["id"]) - 1 for context in record["ctxs"] if not context["has_answer"]]
    row = {"query": record["question"], "answers": record["answers"], "task": task,
           "pos": [texts[index] for index in right], "pos_index": right,
           "neg": [texts[index] for index in wrong[:7]], "neg_index": wrong[:7]}
    if scored:
        row["teacher_scores"] = [-0.5] * len(right) + [-4.0] * len(row["neg"])
    return row


def write_llm_embedder(out, passages, splits):
    """Write the training and test files of LLM-Embedder's tasks. Each task has a share of the
    questions; the files of qa/msmarco have no scores.
    """
    files = {"qa/msmarco/train": "qa", "qa/nq/train": "qa", "chat/msc/train": "chat",
             "lrlm/arxiv/train": "lrlm", "lrlm/books3/train": "lrlm",
             "lrlm/codeparrot/train": "lrlm", "icl/icl/train": "icl",
             "convsearch/qrecc/train.concat": "convsearch", "tool/toolbench/train": "tool"}
    most = {"qa/nq/train": 0.6, "tool/toolbench/train": 0.2}  # files that recipes measure on
    rest = (1 - sum(most.values())) / (len(files) - len(most))
    start = 0.0
    for name, task in files.items():
        end = start + most.get(name, rest)
        count = len(splits["train"])
        is_scored = name != "qa/msmarco/train" and task not in ("convsearch", "tool")
        rows = [labelled(record, passages, task, is_scored)
                for record in splits["train"][int(start * count):int(end * count)]]
        if task == "chat":  # the pool names no positive
            rows = [{"query": row["query"], "answers": row["answers"], "task": task,
                     "history": row["pos"] + row["neg"], "teacher_scores": row["teacher_scores"]}
                    for row in rows]
        write_rows(out / f"{name}.json", rows)
        start = end
    texts = [{"title": passage["title"], "text": passage["text"]} for passage in passages]
    whole = [{"title": "", "text": f"{row['title']} {row['text']}"} for row in texts]
    for folder, task, corpus in (("qa/nq", "qa", texts), ("tool/toolbench", "tool", whole)):
        write_rows(out / folder / "corpus.json", corpus)
        rows = [labelled(record, passages, task, False) for record in splits["test"]]
        write_rows(out / folder / "test.json",
                   [{name: row[name] for name in ("query", "answers", "task", "pos_index")}
                    for row in rows])


# ---------------------------------------------------------------- models

def wrap_key(key):
    """Return the name of a T5 weight in FiD's released readers."""
    if key.startswith("encoder.block."):
        return re.sub(r"^encoder\.(block\.\d+)\.", r"encoder.encoder.\1.module.", key)
    return re.sub(r"^encoder\.", "encoder.encoder.", key)


def write_reader(out, source):
    """Write a released FiD reader: config.json and pytorch_model.bin, without a tokenizer."""
    reader = T5ForConditionalGeneration.from_pretrained(source)
    weights = {wrap_key(key): value for key, value in reader.state_dict().items()
               if not key.endswith("embed_tokens.weight")}
    weights["encoder.encoder.embed_tokens.weight"] = weights["shared.weight"]
    weights["decoder.embed_tokens.weight"] = weights["shared.weight"]
    config = reader.config
    weights["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.zeros(
        config.relative_attention_num_buckets, config.num_heads)
    out.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(out)
    torch.save(weights, out / "pytorch_model.bin")


def write_fid_retriever(out, source):
    """Write a released FiD retriever: a BERT with projection, norm and a mean over real tokens."""
    bert = AutoModel.from_pretrained(source)
    size = bert.config.hidden_size
    weights = {f"model.{key}": value for key, value in bert.state_dict().items()}
    weights |= {"proj.weight": torch.eye(size), "proj.bias": torch.zeros(size),
                "norm.weight": torch.ones(size), "norm.bias": torch.zeros(size)}
    out.mkdir(parents=True, exist_ok=True)
    settings = json.loads((Path(source) / "config.json").read_text())
    write_json(out / "config.json", settings | {
        "indexing_dimension": size, "projection": True, "extract_cls": False,
        "apply_question_mask": True, "apply_passage_mask": True, "question_maxlength": 40,
        "passage_maxlength": 110})
    torch.save(weights, out / "pytorch_model.bin")
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


def write_dpr_model(out, source):
    """Write DPR's released file, and next to it the bert-base-uncased that it was trained from."""
    weights = {}
    for role, prefix in (("query", "question_model."), ("key", "ctx_model.")):
        encoder = AutoModel.from_pretrained(f"{source}/{role}")
        weights |= {prefix + key: value for key, value in encoder.state_dict().items()}
    out.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"model_dict": weights, "optimizer_dict": {}, "scheduler_dict": {}, "offset": 0,
                "epoch": 3, "encoder_params": {"pretrained_model_cfg": "bert-base-uncased"}}, out)


def write_bert(out, of_means=False):
    """Write a BERT with random weights, from which two encoders start equal.

    of_means: each token starts as the mean of its text, because attention is uniform at first.
    [CLS], whose vector DPR's files use, then learns in a minute instead of an hour.
    """
    torch.manual_seed(0)
    source = ROOT / "toy" / "bert-tiny"
    bert = AutoModel.from_config(AutoConfig.from_pretrained(source))
    if of_means:
        for layer in bert.encoder.layer:
            torch.nn.init.eye_(layer.attention.self.value.weight.data)
            torch.nn.init.eye_(layer.attention.output.dense.weight.data)
            layer.attention.output.dense.weight.data *= 4  # outweighs the token itself
    bert.save_pretrained(out)
    AutoTokenizer.from_pretrained(source).save_pretrained(out)


# ---------------------------------------------------------------- main

def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", metavar="NAME", help="as in scripts/get_data.sh",
                        choices=[*DATA_SETS, *READERS, *FID_RETRIEVERS, *DPR_MODELS])
    # no default, because files of these names in a folder of real data would be replaced
    parser.add_argument("--out", required=True, help="folder to write to; its files are replaced")
    parser.add_argument("--questions", type=int, nargs=3, default=[600, 60, 200], metavar="N",
                        help="of train, dev and test (default: %(default)s)")
    parser.add_argument("--reader", metavar="DIR", help="folder of the reader to convert")
    parser.add_argument("--retriever", metavar="DIR", help="the retriever that retrievers are made "
                        "of: of one encoder for FiD's, of two for DPR's")
    args = parser.parse_args()
    if set(args.names) & set(READERS) and not args.reader:
        parser.error("readers are made of a --reader")
    if set(args.names) & {*FID_RETRIEVERS, *DPR_MODELS} and not args.retriever:
        parser.error("retrievers are made of a --retriever")
    return args


def main(args):
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    passages, splits = world.make_demo(questions=args.questions)
    for name in args.names:
        if name in FID:
            write_fid(out, FID[name], passages, splits)
        elif name in ("bert-base-uncased", "bert-of-means"):
            write_bert(out / name, of_means=name == "bert-of-means")
        elif name == "passages":
            write_passages(out, passages)
        elif name == "dpr-nq":
            write_dpr(out, splits)
        elif name == "dpr-nq-qa":
            write_questions(out, splits)
        elif name == "dpr-nq-results":
            write_results(out, splits)
        elif name == "msmarco":
            (out / "msmarco").mkdir(exist_ok=True)
            write_beir(out / "msmarco", passages, splits)
        elif name == "llm-embedder":
            write_llm_embedder(out / "llm-embedder", passages, splits)
        elif name in READERS:
            write_reader(out / name.replace("-", "_"), args.reader)
        elif name in FID_RETRIEVERS:
            write_fid_retriever(out / name.replace("-", "_"), args.retriever)
        else:
            write_dpr_model(out / DPR_MODELS[name], args.retriever)
        print(f"{out}: {name} of the embedded world")


if __name__ == "__main__":
    main(parse_args())
