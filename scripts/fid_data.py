"""Make FiD's data from its published parts: NaturalQuestions and TriviaQA, each question with the
100 passages that the released readers were trained on.

    scripts/get_data.sh fid-nq fid-tqa       # into data/
    python scripts/fid_data.py nq tqa        # data/NQ and data/TQA: train.json, dev.json, test.json

It follows the rules of FiD's src/preprocess.py, and the files are equal byte for byte:

- train and dev are the questions of the original training file that the index of splits lists, in
  its order; test has the questions of the original dev file;
- NaturalQuestions: `answers` is the original's list. TriviaQA: `target`, the text to train on, is
  the answer's value, in title case if it is all upper case; `answers` are all aliases;
- `ctxs` are passages of Wikipedia by their ids, in FiD's order and without scores. They were found
  by the retriever that FiD distilled from its reader (arXiv 2012.04584), not by DPR.

FiD holds Wikipedia in memory; here it stays on disk. Existing files are kept, so that an
interrupted run continues with the first missing file.
"""
import json
import os
import re
import sys
import zlib
from contextlib import contextmanager
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from records.corpus import Corpus
from records.fields import gold_answers, question_text
from records.files import new_file
from records.reading import open_text, read_json, read_settings
from utils import InputError, Parser, first_line, progress_bar, run_script, shorten

SPLITS = ("train", "dev", "test")

# limits for TriviaQA's files
CHUNK = 2 ** 20            # characters to read at a time
LONGEST_ITEM = 64 * CHUNK  # of a question with its search results; a longer one is broken JSON
BETWEEN_ITEMS = re.compile(r"[\s,]*")


class Original(NamedTuple):
    """Hold a question of an original file."""
    record: dict      # FiD's record of it, without contexts
    question_id: str  # TriviaQA's id, the key of its passages; None in NaturalQuestions


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("datasets", nargs="+", choices=list(DATASETS),
                        help="NaturalQuestions, TriviaQA")
    parser.add_argument("--data", default="data", help="folder that scripts/get_data.sh filled")
    parser.add_argument("--out", help="folder to write NQ/ and TQA/ to; default: --data")
    parser.add_argument("--passages", metavar="FILE",
                        help="Wikipedia's passages; default: psgs_w100.tsv.gz in --data (a .gz "
                        "is unpacked once, next to it)")
    return parser.parse_args()


# ---------------------------------------------------------------- reading

@contextmanager
def open_input(path):
    """Open a text file for reading. Raises InputError, also for errors in the block that reads."""
    try:
        with open_text(path) as file:
            yield file
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({first_line(error)}); fetch it again") from None


def read_items(path):
    """Yield (object, location) of the list "Data" in TriviaQA's files, one at a time.

    The files have search results and fill gigabytes. Raises InputError.
    """
    decoder = json.JSONDecoder()
    with open_input(path) as file:
        text = file.read(CHUNK)
        beginning = re.match(r'\s*\{\s*"Data"\s*:\s*\[', text)
        if not beginning:
            raise InputError(f'{path}: does not begin with {{"Data": [ as TriviaQA\'s files do; '
                             "fetch it again")
        offset = beginning.end()
        index = 0
        while True:
            offset = BETWEEN_ITEMS.match(text, offset).end()
            if text.startswith("]", offset):
                return
            try:
                item, offset = decoder.raw_decode(text, offset)
            except (ValueError, RecursionError):  # broken, unless it continues in the next chunk
                chunk = file.read(CHUNK)
                if not chunk or len(text) - offset > LONGEST_ITEM:
                    raise InputError(f"{path}, record {index}: not valid JSON; the file may be cut "
                                     "off there: fetch it again") from None
                text, offset = text[offset:] + chunk, 0
                continue
            yield item, f"{path}, record {index}"
            index += 1


def read_nq(path):
    """Return [Original] of NQ-open's lines {question, answer: [text]}. Raises InputError."""
    originals = []
    for item, location in read_json(path):
        question = question_text(item, location)
        answers, _ = gold_answers(item, location)
        if not answers:
            raise InputError(f"{location}: no 'answer', which NQ-open's lines have")
        originals.append(Original({"question": question, "answers": answers}, None))
    return originals


def read_tqa(path):
    """Return [Original] of TriviaQA's objects {Question, QuestionId, Answer}. Raises InputError."""
    originals = []
    for item, location in read_items(path):
        if not isinstance(item, dict):
            raise InputError(f"{location}: a {type(item).__name__}, not an object")
        question = question_text({"question": item.get("Question")}, location)
        answers, target = gold_answers({"answer": item.get("Answer")}, location)
        if target is None or not isinstance(item.get("QuestionId"), str):
            raise InputError(f"{location}: no 'QuestionId' or no 'Answer' with a 'Value', which "
                             f"TriviaQA's questions have; its fields are {shorten(sorted(item))}")
        # FiD's files have the aliases, and not the value
        aliases, _ = gold_answers({"answers": item["Answer"].get("Aliases")}, location)
        record = {"question": question, "answers": aliases or answers, "target": target}
        originals.append(Original(record, item["QuestionId"]))
    return originals


# ---------------------------------------------------------------- the two datasets

class Dataset(NamedTuple):
    """Hold the paths of a dataset's parts in the folder that get_data.sh fills."""
    name: str            # FiD's name of the folder that it writes, and of the index of splits
    passages: str        # folder of the passages' ids
    train: str           # the original training file; FiD splits it into train and dev
    dev: str             # the original dev file, FiD's test
    read: callable       # (path) -> [Original]


DATASETS = {
    "nq": Dataset("NQ", "nq_passages", "NQ-open.train.jsonl", "NQ-open.dev.jsonl", read_nq),
    "tqa": Dataset("TQA", "tqa_passages", "triviaqa-unfiltered/unfiltered-web-train.json",
                   "triviaqa-unfiltered/unfiltered-web-dev.json", read_tqa),
}


def input_paths(dataset, split, folder):
    """Return the paths of a split's index, of its passages' ids and of the original file."""
    original = dataset.dev if split == "test" else dataset.train
    names = (f"{dataset.name}.{split}.idx.json", f"{dataset.passages}/{split}.json", original)
    return [os.path.join(folder, name) for name in names]


# ---------------------------------------------------------------- records

def make_records(dataset, split, originals, corpus, folder):
    """Yield FiD's records of a split, in the order of its index.

    Raises InputError if index, ids of passages, originals and corpus do not fit together.
    """
    index_path, ids_path, original_path = input_paths(dataset, split, folder)
    index = read_settings(index_path, list)
    if not index:
        raise InputError(f"{index_path}: names no question; fetch it again")
    passage_ids = read_settings(ids_path)
    for position, original_index in enumerate(progress_bar(index, desc=f"{dataset.name} {split}")):
        location = f"{index_path}, entry {position}"
        # not isinstance: true is an int too
        if type(original_index) is not int or not 0 <= original_index < len(originals):
            raise InputError(f"{location}: {str(original_index)[:40]} is not an index of the "
                             f"{len(originals)} questions of {original_path}; fetch both again")
        original = originals[original_index]
        key = original.question_id or str(position)
        contexts = find_passages(passage_ids.get(key), corpus, f"{ids_path}, question '{key[:40]}'")
        yield {**original.record, "ctxs": contexts}


def find_passages(ids, corpus, location):
    """Return [{id, title, text}] of a question's passages. Raises InputError if one is missing."""
    if not isinstance(ids, list) or not all(isinstance(i, str) and i.isascii() for i in ids):
        raise InputError(f"{location}: has no list of passages' ids; fetch the file again")
    indices = corpus.indices(ids)
    if -1 in indices:
        raise InputError(f"{location}: no passage has the id {ids[indices.index(-1)][:40]!r} in "
                         f"{corpus.parts[0].path}; --passages must be DPR's whole psgs_w100.tsv")
    return [corpus.passage(index) for index in indices]


def write_records(records, path):
    """Write records like json.dump(records, file, indent=4), with one in memory at a time.

    Returns (records, contexts) written.
    """
    count = contexts = 0
    with new_file(path) as file:
        for record in records:
            file.write(",\n    " if count else "[\n    ")
            file.write(json.dumps(record, indent=4).replace("\n", "\n    "))
            count += 1
            contexts += len(record["ctxs"])
        file.write("\n]")
    return count, contexts


# ---------------------------------------------------------------- main

def check_inputs(todo, args):
    """Raise InputError for a missing input, before any is read."""
    for name, split, _ in todo:
        for path in (*input_paths(DATASETS[name], split, args.data), args.passages):
            if not os.path.exists(path):
                raise InputError(f"{path}: no such file; scripts/get_data.sh fid-{name} fetches "
                                 "it (see --data and --passages)")


def main(args):
    args.out = args.out or args.data
    args.passages = args.passages or os.path.join(args.data, "psgs_w100.tsv.gz")
    todo = []
    for name in dict.fromkeys(args.datasets):
        for split in SPLITS:
            path = os.path.join(args.out, DATASETS[name].name, f"{split}.json")
            if os.path.exists(path):
                print(f"{path}: exists, kept; delete it to make it again")
            else:
                todo.append((name, split, path))
    check_inputs(todo, args)

    corpus = Corpus(args.passages, "{title} {text}") if todo else None
    if corpus is not None and not corpus.has_ids:
        raise InputError(f"{args.passages}: no column of ids, by which passages are found; "
                         "--passages must be DPR's whole psgs_w100.tsv")
    originals_path, originals = None, None
    for name, split, path in todo:
        dataset = DATASETS[name]
        *_, original_path = input_paths(dataset, split, args.data)
        if original_path != originals_path:  # train and dev share an original file
            originals_path, originals = original_path, dataset.read(original_path)
        records = make_records(dataset, split, originals, corpus, args.data)
        count, contexts = write_records(records, path)
        print(f"{path}: {count:,} questions, {contexts / count:.1f} contexts each", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args())
