"""Score how likely a passage makes an answer, with three kinds of models.

    CausalScorer     a causal language model, on texts filled into a template
    Seq2SeqScorer    a sequence-to-sequence model such as T5, on the same texts
    ReaderScorer     a reader of train_epoch.py, on the prompts that it was trained with

Each has a `name`, a count `num_truncated` of the keys that it has truncated so far, and two
methods. texts(job) returns a Job's family: for each key, a list with one Text (prompt, answer) per
answer. score(families) takes the families of several jobs and returns log p(answer | prompt) of all
their Texts in order, summed over the answer's tokens.
"""
import math
from itertools import islice
from typing import NamedTuple

import torch

from data import Collator, encode_inputs, input_texts, pack_passages
from layers.causal import Text, log_likelihoods, score_answers, sum_by_text
from layers.packing import split_by_length
from model import FiDT5, Memory
from reader.borders import add_start, encode_pairs, start_tokens
from reader.causal import PromptCollator
from utils import InputError, copy_to_device, shorten

SEQ2SEQ_TOKENS = {"cpu": 4096, "cuda": 16384}  # tokens of prompts per batch, with padding


class Template(NamedTuple):
    """Hold the text that a key, a question and an answer are filled into."""
    text: str                  # {key} once, {query}, {context}, and {answer} at the end
    is_stripped: bool = True   # key, question and answer lose the whitespace around them
    joins_ids: bool = False    # for a causal language model, the ids of the fields are concatenated


KNOWLEDGE = Template("Knowledge: {key}\n\nQuestion: {query}\n\nAnswer: {answer}")
# {task: Template} of LLM-Embedder, which has no template for tool
TASK_TEMPLATES = {
    "qa": KNOWLEDGE,
    "convsearch": KNOWLEDGE,
    "icl": Template("{key}\n{query}\n{answer}", is_stripped=False),
    "chat": Template("{key}\nSpeaker 1: {query}\nSpeaker 2: {answer}", is_stripped=False),
    "lrlm": Template("{key}{context}{query}{answer}", is_stripped=False, joins_ids=True),
    "tool": Template("Tool: {key}\n\nRequest: {query}\n\nAnswer: {answer}"),
}


class Job(NamedTuple):
    """Hold a record's keys, and the answers by whose likelihood the keys are scored."""
    record: dict
    question: str
    keys: list          # texts, or passages {title, text} for a reader
    answers: list
    template: Template  # None for a reader
    location: str

    def strip(self, text):
        """Return the text of a field, stripped if the template requires it."""
        return text.strip() if self.template.is_stripped else text

    def context(self):
        """Return the text before an lrlm record's question. Raise InputError for anything else."""
        context = self.record.get("context") or ""
        if not isinstance(context, str):
            raise InputError(f"{self.location}: 'context' must be a text, got {shorten(context)}")
        return context

    def prompt(self, key):
        """Return the text before the answer, with this key."""
        before, after = self.template.text.removesuffix("{answer}").split("{key}")
        before, after = (part.replace("{context}", self.context())
                         .replace("{query}", self.strip(self.question)) for part in (before, after))
        return before + self.strip(key) + after


# ---------------------------------------------------------------- causal language models

class CausalScorer:
    """Score with a causal language model."""
    name = "causal language model"

    def __init__(self, model, tokenizer, limit, key_max_length, is_packed=True, frame=("", "")):
        """Set the model; `limit` is the most tokens of a text, `frame` the texts that a chat
        template puts before and after a prompt.
        """
        self.model, self.tokenizer, self.is_packed = model, tokenizer, is_packed
        self.limit, self.key_max_length, self.frame = limit, key_max_length, frame
        self.num_truncated = 0

    def texts(self, job):
        """Return the job's Texts. Raise InputError if a text does not fit."""
        if job.template.joins_ids and any(self.frame):
            raise InputError(f"{job.location}: the parts of an lrlm text continue each other and "
                             "form no conversation; leave --chat_template out, or give --template")
        return fit_keys(self, job)

    def score(self, families):
        """Return the log-likelihoods of the answers, from packed texts if the model takes them."""
        return score_answers(self.model, families, self.is_packed)

    def make_texts(self, job, keys):
        """Return for each key a list of Texts, one per answer."""
        answers = [job.strip(answer) for answer in job.answers]
        if job.template.joins_ids:
            return self.join_ids(job, keys, answers)
        prompts = [job.prompt(key) for key in keys]
        before, after = self.frame
        if before or after:
            prompts = [before + prompt.strip() + after for prompt in prompts]
        return make_causal_texts(self.tokenizer, prompts, answers, job.location)

    def join_ids(self, job, keys, answers):
        """Return for each key a list of Texts in LLM-Embedder's form for lrlm: the ids of key,
        context, question and answer, concatenated without special tokens.

        If a text is too long, the context loses its oldest tokens.
        """
        def encode(texts):
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

        key_rows, answer_rows = encode(keys), encode(answers)
        context, query = encode([job.context(), job.question])
        longest_answer = max(len(ids) for ids in answer_rows)
        family = []
        for key in key_rows:
            room = max(0, self.limit - len(key) - len(query) - longest_answer)
            prompt = key + context[max(0, len(context) - room):] + query
            family.append([make_text(self.tokenizer, prompt, answer, job.location)
                           for answer in answer_rows])
        return family

    def count_tokens(self, text):
        """Return how many tokens of a Text count towards the limit."""
        return len(text.prompt) + len(text.answer)


def make_causal_texts(tokenizer, prompts, answers, location):
    """Return for each prompt a list of Texts, one per answer, split as reader/borders.py does.

    The tokenizer's start tokens come first; there is no end token (LLM-Embedder).
    """
    start = start_tokens(tokenizer)
    pairs = iter(encode_pairs(tokenizer, [prompt for prompt in prompts for _ in answers],
                              answers * len(prompts)))
    family = []
    for _ in prompts:
        family.append([make_text(tokenizer, add_start(start, pair.prompt), pair.answer, location)
                       for pair in islice(pairs, len(answers))])
    return family


def make_text(tokenizer, prompt, answer, location):
    """Return the Text of token ids. An empty prompt becomes the start token or, without one, the
    end token, because the first token of the answer needs one before it.

    Raise InputError for an answer without tokens, and if the tokenizer has neither token.
    """
    if not answer:
        raise InputError(f"{location}: an answer has no tokens of its own; drop the record")
    if not prompt:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        if start is None:
            raise InputError(f"{location}: no text before the answer, and the tokenizer has no "
                             "start token; begin --template with some text")
        prompt = [start]
    return Text(prompt, answer)


def fit_keys(scorer, job):
    """Return scorer.make_texts of a job's keys, truncated to key_max_length tokens and further
    until each text fits.

    Raise InputError if question and answer do not fit without a key.
    """
    tokenizer = scorer.tokenizer
    key_ids = tokenizer(job.keys, add_special_tokens=False, verbose=False)["input_ids"]
    keys, lengths = list(job.keys), [len(ids) for ids in key_ids]
    for i, ids in enumerate(key_ids):
        if len(ids) > scorer.key_max_length:
            key_ids[i] = ids[:scorer.key_max_length]
            keys[i] = decode_key(tokenizer, key_ids[i])
    family = scorer.make_texts(job, keys)
    for i, ids in enumerate(key_ids):
        while (excess := max(map(scorer.count_tokens, family[i])) - scorer.limit) > 0:
            if not ids:
                raise InputError(f"{job.location}: question and answer take {excess} tokens more "
                                 f"than the {scorer.limit} that a text may have; shorten them, or "
                                 "raise --context_max_length if the model has the positions")
            ids = key_ids[i] = ids[:max(0, len(ids) - excess)]
            family[i] = scorer.make_texts(job, [decode_key(tokenizer, ids)])[0]
    scorer.num_truncated += sum(len(ids) < length for ids, length in zip(key_ids, lengths))
    return family


def decode_key(tokenizer, ids):
    """Return the text of a truncated key, without half a character at its end."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return text.rstrip("\N{REPLACEMENT CHARACTER}")


# ---------------------------------------------------------------- sequence-to-sequence models

class Seq2SeqScorer:
    """Score with a T5, opened as a FiDT5, or another sequence-to-sequence model of transformers."""

    def __init__(self, model, tokenizer, device, limit, key_max_length, bf16=False):
        """Set the model; `limit` is the most tokens of an input."""
        self.model, self.tokenizer, self.device, self.bf16 = model, tokenizer, device, bf16
        self.limit, self.key_max_length = limit, key_max_length
        self.num_truncated = 0
        self.name = "T5" if isinstance(model, FiDT5) else "sequence-to-sequence model"

    def texts(self, job):
        """Return the job's Texts. Raise InputError if a text does not fit."""
        return fit_keys(self, job)

    @torch.inference_mode()
    def score(self, families):
        """Return the log-likelihoods of the answers; a T5 encodes each prompt once."""
        keys = [texts for family in families for texts in family]  # each list shares a prompt
        order = sorted(range(len(keys)), key=lambda i: -len(keys[i][0].prompt))
        lengths = [len(keys[i][0].prompt) for i in order]
        values = [None] * len(keys)
        for first, last in split_by_length(lengths, SEQ2SEQ_TOKENS[self.device.type]):
            part = [keys[i] for i in order[first:last]]
            texts = [text for key in part for text in key]
            owners = [i for i, key in enumerate(part) for _ in key]  # index of each answer's prompt
            prompts = [key[0].prompt for key in part]
            labels = self.pad([text.answer for text in texts], -100)                   # (B, T)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                logits = self.answer_logits(prompts, labels, owners)                   # (B, T, V)
            targets = [token for text in texts for token in text.answer]
            sums = iter(sum_by_text(log_likelihoods(logits[labels != -100], targets), texts))
            for i, key in zip(order[first:last], part):
                values[i] = [next(sums) for _ in key]
        return [value for key_values in values for value in key_values]

    def pad(self, rows, padding):
        """Return lists of integers as one tensor on the device, padded on the right."""
        rows = [torch.tensor(row) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True,
                                               padding_value=padding).to(self.device)

    def answer_logits(self, prompts, labels, owners):
        """Return the logits (B, T, V) of labels (B, T), given lists of token ids; owners (B) holds
        the index of each label's prompt.
        """
        model = self.model
        if isinstance(model, FiDT5):
            passages = pack_passages([[prompt] for prompt in prompts], 0, self.device.type)
            memory = model.encode(copy_to_device(passages, self.device))
            memory = Memory(*(tensor[owners] for tensor in memory))    # each prompt is encoded once
            return model.decode(model.t5._shift_right(labels), memory)
        ids = self.pad(prompts, 0)[owners]                                             # (B, L)
        is_real = self.pad([[1] * len(prompt) for prompt in prompts], 0)[owners]       # (B, L)
        return model(input_ids=ids, attention_mask=is_real, labels=labels).logits

    def make_texts(self, job, keys):
        """Return for each key a list of Texts, one per answer."""
        prompts = [job.prompt(key).rstrip() for key in keys]
        answers = [job.strip(answer) for answer in job.answers]
        prompt_ids = self.tokenizer(prompts, verbose=False)["input_ids"]
        answer_ids = self.tokenizer(text_target=answers, verbose=False)["input_ids"]
        return [[Text(ids, answer) for answer in answer_ids] for ids in prompt_ids]

    def count_tokens(self, text):
        """Return how many tokens of a Text count towards the limit."""
        return len(text.prompt)


# ---------------------------------------------------------------- readers

class ReaderScorer:
    """Score with a reader, which reads one passage at a time in its own prompt.

    The likelihoods are those of `scorer`, a CausalScorer or a T5's Seq2SeqScorer.
    """

    def __init__(self, scorer, max_length, prompts=None, num_positions=math.inf):
        """Set the most tokens of a prompt and, for a causal language model, its Prompts and the
        number of its positions.
        """
        self.name, self.score = f"reader ({scorer.name})", scorer.score
        self.tokenizer, self.max_length = scorer.tokenizer, max_length
        self.prompts, self.num_positions = prompts, num_positions
        self.num_truncated = 0

    def texts(self, job):
        """Return for each passage a list of Texts as in training: with the record's chat_history,
        the passage truncated on the right, and </s> after the answer.

        Raise InputError if question and answer do not fit.
        """
        tokenizer, count, room = self.tokenizer, len(job.keys), self.max_length
        record = job.record | {"question": job.question, "ctxs": job.keys}
        if self.prompts is None:
            collator = Collator(tokenizer, count, room)
            answers = [collator.target_ids(answer) for answer in job.answers]
            prompts, = encode_inputs(tokenizer, [record], count, room)
            bare = input_texts({"question": job.question, "ctxs": [{"text": ""}]}, 1)
            bare_ids, = tokenizer(bare, add_special_tokens=False, verbose=False)["input_ids"]
            longest = len(bare_ids)
        else:
            collator = PromptCollator(tokenizer, count, room, self.prompts)
            answers = [collator.target_ids(answer) for answer in job.answers]
            room = self.num_positions - max(len(ids) for ids in answers)
            collator.max_length = min(self.max_length, room)
            prompts, = collator.prompt_ids([record])
            longest = max(len(ids) for ids in prompts)  # the question and titles are not truncated
        if longest > room:
            raise InputError(f"{job.location}: the question takes {longest} tokens, the reader has "
                             f"room for {room}; shorten it")
        self.num_truncated += sum(len(ids) >= collator.max_length for ids in prompts)
        return [[Text(ids, answer) for answer in answers] for ids in prompts]
