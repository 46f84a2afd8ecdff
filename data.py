"""Question records in FiD's JSON forms, and the batches that the reader trains and predicts on.

A record is a JSON object per question: `question` (or `query`), `answers` (or `target`, or TriviaQA's `answer`) and
`ctxs`, a ranked list of {title, text, score}. Files: a `.json` list or `.jsonl`, either of them gzipped.
"""
import gzip
import json
import os
import random
import zlib

import torch

from utils import InputError


# ---------------------------------------------------------------------------------------------------- reading

def open_text(path):
    """A text file object, gunzipped where the name ends in .gz."""
    return (gzip.open if str(path).endswith(".gz") else open)(path, "rt", encoding="utf-8-sig")  # some begin with a mark of their encoding


def read_json(path):
    """[(object, place)] of a list of objects or of one object per line (.jsonl, or .json).

    A place is 'FILE:LINE' or 'FILE, record N'.

    Raises InputError for a missing, unreadable, empty or malformed file.
    """
    path, name = str(path), str(path).removesuffix(".gz")
    try:
        with open_text(path) as file:
            if name.endswith(".jsonl"):
                return parse_lines(file, path)
            text = file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: cannot be read ({error}); is it a whole .json or .jsonl file, or one gzipped?") from None
    if not text.strip():
        raise InputError(f"{path}: the file is empty; it must hold a list of records")
    if text.lstrip().startswith("{"):  # LLM-Embedder's .json files
        return parse_lines(text.split("\n"), path)  # splitlines would also split at U+2028
    objects = parse_json(text, path, 1)
    if not isinstance(objects, list):
        raise InputError(f"{path}: holds one {type(objects).__name__}, not a list of records or one record per line")
    return [(item, f"{path}, record {number}") for number, item in enumerate(objects)]


def parse_lines(lines, path):
    """[(object, 'FILE:LINE')] of JSON lines; empty ones are skipped."""
    return [(parse_json(line.rstrip("\n"), path, number), f"{path}:{number}")
            for number, line in enumerate(lines, 1) if line.strip()]


def parse_json(text, path, first_line):
    """The object that `text` spells; InputError with file, line and column where it does not."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{path}:{first_line + error.lineno - 1}: not valid JSON at column {error.colno} ({error.msg}); "
                        "the file may be cut off there: fetch it again or mend the line") from None


def read_records(path, keep_contexts=None):
    """The question records of a file, checked, their contexts in the reader's order.

    Every record gets `question`, `answers` (may be empty), `ctxs` and `id`; other fields are kept. Contexts are sorted by
    descending score, ties in file order, if the file's first context has one (FiD, src/data.py: sort_data); those without
    a score come last then. `keep_contexts` drops the contexts after that many, to save memory. Raises InputError.
    """
    records = [check_record(item, place, number) for number, (item, place) in enumerate(read_json(path))]
    if not records:
        raise InputError(f"{path}: holds no records")
    first = next((record["ctxs"][0] for record in records if record["ctxs"]), {})
    for record in records:
        if "score" in first:
            record["ctxs"].sort(key=lambda c: float("-inf") if c.get("score") is None else float(c["score"]), reverse=True)
        record["ctxs"] = record["ctxs"][:keep_contexts]
    return records


def check_record(record, place, number):
    """`record` with the fields that the reader uses, or InputError naming the field."""
    if not isinstance(record, dict):
        raise InputError(f"{place}: a record must be a JSON object, this is a {type(record).__name__}")
    record = dict(record)
    question = record.get("question", record.get("query"))
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{place}: no 'question' (or 'query') text; its fields are {sorted(record)}")
    record["question"] = question
    record.setdefault("id", record.get("query_id", record.get("qid", number)))
    record["answers"], target = gold_answers(record, place)
    if target is not None:
        record.setdefault("target", target)
    record["ctxs"] = list(record.get("ctxs") or [])
    for context in record["ctxs"]:
        if not isinstance(context, dict) or not isinstance(context.get("text"), str):
            raise InputError(f"{place}: every entry of 'ctxs' must be an object with a 'text' string")
        try:
            float(context.get("score") or 0)
        except (TypeError, ValueError):
            raise InputError(f"{place}: a context's score {context['score']!r} is not a number") from None
    return record


def check_types(record, place, names=("pos", "neg", "pos_index", "neg_index", "positive_ctxs", "negative_ctxs", "hard_negative_ctxs")):
    """InputError for a record whose lists of these names are none, or whose task is no text."""
    for name in names:
        if not isinstance(record.get(name) or [], list):
            raise InputError(f"{place}: '{name}' must be a list, it is {json.dumps(record[name])[:60]}")
    if not isinstance(record.get("task") or "", str):
        raise InputError(f"{place}: 'task' must be a text such as 'qa', it is {json.dumps(record['task'])[:60]}")


def gold_answers(record, place):
    """(answers, target or None) of `answers`, or of `answer`: one text, NQ-open's list or TriviaQA's object. Raises InputError."""
    answers, answer, target = record.get("answers"), record.get("answer"), None
    value = answer.get("Value", answer.get("value")) if isinstance(answer, dict) else None
    if isinstance(value, str):  # TriviaQA: the target is the value, any alias is right (FiD, src/preprocess.py)
        target, answer = value.title() if value.isupper() else value, answer.get("Aliases", answer.get("aliases", [value]))
    if answers is None:  # an answer that is a number or true is a choice's, no text to look for
        answers = [answer] if isinstance(answer, str) else answer if isinstance(answer, (list, dict)) else []
    if not isinstance(answers, list) or not all(isinstance(a, str) for a in answers):
        raise InputError(f"{place}: 'answers' must be a list of strings (or 'answer' one, or TriviaQA's object), it is "
                         f"{json.dumps(answers)[:80]}")
    return answers, target


# ---------------------------------------------------------------------------------------------------- texts

def format_passage(question, context):
    """The encoder's input for one passage (FiD section 3); a passage without a title gets no title part."""
    title = context.get("title")
    return f"question: {question} " + (f"title: {title} " if title is not None else "") + f"context: {context['text']}"


def input_texts(record, num_contexts):
    """One text per context; the question alone where there is none (FiD, src/data.py)."""
    contexts = record["ctxs"][:num_contexts]
    return [format_passage(record["question"], c) for c in contexts] or [f"question: {record['question']}"]


def choose_target(record, seed=None):
    """The training target: `target` if given, else an answer drawn by `seed`, or the first answer without a seed."""
    if record.get("target") is not None:
        return record["target"]
    return record["answers"][0] if seed is None else random.Random(seed).choice(record["answers"])


def check_targets(records, tokenizer, max_length, path):
    """Raises InputError for a training record without an answer or, with max_length > 0, with a longer one in tokens."""
    for record in records:
        targets = [record["target"]] if record.get("target") is not None else record["answers"]
        if not targets:
            raise InputError(f"{path}: record {record['id']!r} has neither 'target' nor 'answers'; drop it from the training file")
        for target, ids in zip(targets, tokenizer(targets)["input_ids"] if max_length > 0 else ()):
            if len(ids) > max_length:
                raise InputError(f"{path}: record {record['id']!r}: the answer {target[:60]!r} takes {len(ids)} tokens, "
                                f"--answer_maxlength allows {max_length}; raise it or shorten the answer")


# ---------------------------------------------------------------------------------------------------- batches

class Collator:
    """Turns (place, record, target) samples into tensors.

    Passages are cut at `max_length` tokens at the right and carry no </s> (replication of FiD under transformers 3.0.2, and
    of minFiD); they are padded to the longest of the batch only. Targets carry exactly one </s>.
    Returns {places, input_ids (B, N, L), attention_mask (B, N, L) bool, labels (B, T) with -100 as padding, or None}.
    """

    def __init__(self, tokenizer, num_contexts, max_length):
        self.tokenizer, self.num_contexts, self.max_length = tokenizer, num_contexts, max_length
        if tokenizer.pad_token_id is None:
            raise InputError("the tokenizer has no padding token; use the tokenizer of a T5 model")

    def __call__(self, samples):
        texts = [input_texts(record, self.num_contexts) for _, record, _ in samples]
        flat = self.tokenizer([t for passages in texts for t in passages], add_special_tokens=False, truncation=True,
                              max_length=self.max_length)["input_ids"]
        num_passages, longest = max(map(len, texts)), max(1, max(map(len, flat)))
        input_ids = torch.full((len(samples), num_passages, longest), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros(input_ids.shape, dtype=torch.bool)
        passages = iter(flat)
        for i, own in enumerate(texts):
            for j in range(len(own)):
                ids = next(passages)
                input_ids[i, j, :len(ids)] = torch.tensor(ids, dtype=torch.long)
                attention_mask[i, j, :len(ids)] = True
        return {"places": [place for place, _, _ in samples], "input_ids": input_ids, "attention_mask": attention_mask,
                "labels": self.labels([target for _, _, target in samples])}

    def labels(self, targets):
        """(B, T) ids ending in </s>, -100 after it; a target of None is all -100 (no loss); None if all of them are."""
        if all(target is None for target in targets):
            return None
        eos = self.tokenizer.eos_token_id
        rows = [[-100] if target is None else
                [i for i in self.tokenizer(target, add_special_tokens=False)["input_ids"] if i != eos] + [eos]
                for target in targets]
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)


class TrainSet(torch.utils.data.Dataset):
    """Records with their targets; an answer is drawn anew each epoch, the same one whatever the number of processes."""

    def __init__(self, records, seed, shuffle):
        self.records, self.seed, self.shuffle, self.epoch = records, seed, shuffle, 0

    def __getitem__(self, key):
        place, counted = key
        record = self.records[place]
        draw = f"{self.seed}/{self.epoch}/{place}" if self.shuffle else None
        return place, record, choose_target(record, draw) if counted else None


def plan_epoch(num_records, epoch, seed, shuffle, batch_size, accumulation, rank=0, world_size=1):
    """This process's part of an epoch: [update][micro-batch][(place, counted)].

    All processes shuffle alike; an update takes batch_size * accumulation * world_size records in that order, the last one of
    an epoch what remains. A process left without a record there joins with one that is not counted, so that the
    gradient exchange has all processes.
    """
    order = torch.arange(num_records)
    if shuffle:
        order = torch.randperm(num_records, generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
    updates = []
    for window in order.split(batch_size * accumulation * world_size):
        own = [(place, True) for place in window[rank::world_size].tolist()] or [(window[0].item(), False)]
        updates.append([own[i:i + batch_size] for i in range(0, len(own), batch_size)])
    return updates


def make_loader(samples, batches, collator, num_workers):
    """Batches of the listed places, in order; it draws nothing from the global random state."""
    if num_workers:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the workers are the parallelism
    return torch.utils.data.DataLoader(samples, batch_sampler=batches, collate_fn=collator, num_workers=num_workers,
                                       generator=torch.Generator())


def train_loader(dataset, updates, collator, num_workers):
    """The batches of planned updates, one after another."""
    return make_loader(dataset, [batch for update in updates for batch in update], collator, num_workers)


def eval_loader(records, batch_size, collator, num_workers, rank=0, world_size=1):
    """Batches of consecutive records, strided over the processes: each record once, in the same batch for any number of them."""
    batches = [list(range(i, min(i + batch_size, len(records)))) for i in range(0, len(records), batch_size)]
    samples = [(place, record, None) for place, record in enumerate(records)]
    return make_loader(samples, batches[rank::world_size], collator, num_workers)
