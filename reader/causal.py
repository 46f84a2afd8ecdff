"""A causal language model as the reader: every passage gets a prompt of its own.

    question and N passages -> PromptCollator -> N prompts (B, N, L), log weights (B, N)
    training                -> -log p(answer | prompt n), weighted over n
    generation              -> next-token probabilities (K, V), averaged over n to (B, V)

B questions with N passages each, K prompts in all, L tokens per prompt, T tokens per answer, V in
the vocabulary. Training is RA-DIT's language model fine-tuning (Lin et al. 2023, arXiv 2310.01352,
section 2.3), which FedRAG calls RALT. Generation is REPLUG's ensemble (Shi et al. 2023, arXiv
2301.12652, eq. 2).

Both run the prompts packed (layers/causal.py): without padding, and what all prompts of a batch or
of a question begin with is computed once. Models that cannot be packed run padded prompts.
"""
import inspect
import math
import os
import re
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from data import list_targets, pad_labels
from layers.causal import (
    PackedPrompts,
    exceeds_window,
    pack_families,
    packed_logits,
    why_not_packed,
)
from reader.base import Reader
from reader.borders import add_start, chat_frame, encode_pairs, encode_prompts, start_tokens
from reader.causal_lm import differs, list_ids, open_lm, probe_ids
from records.fields import history_turns
from records.reader_records import read_facts, retrieval_score
from records.reading import to_number
from training.adapters import (
    copy_to_cpu,
    prepare_lora,
    save_adapters,
    unload_adapters,
)
from training.checkpoints import check_vocabulary, find_base, find_model
from utils import InputError, first_line, log_on_main, refusing, shorten

TEMPLATE = r"Background: {title} {text}\n\nQuestion: {question}\nAnswer:"
FIELDS = ("question", "title", "text")
ANCHOR = ":"  # replaces the prompt when an answer is tokenised, if the template ends in a field
PASSAGE_WEIGHTS = ("equal", "score")
ANSWER_LINES = ("first", "all")


# ---------------------------------------------------------------- prompts

class Prompts(NamedTuple):
    """Hold how a question and its passages become weighted prompts; saved in a reader's args.json.
    """
    prompt_template: str = TEMPLATE
    passage_weights: str = "equal"      # or score: the softmax of score / retriever_temperature
    retriever_temperature: float = 1.0
    chat_template: bool = False         # the prompt is the user's turn of the tokenizer's template
    answer_lines: str = "all"           # or first: an answer ends at its first line break


def choose_prompts(given, stated, source):
    """Return the Prompts of {name: value} of the flags, else of the checkpoint, else the defaults.

    given: the flags' values; stated: the values in the args.json of the checkpoint `source`.
    Raise InputError for a value that is out of range.
    """
    if not isinstance(stated, dict):
        raise InputError(f"{source}: 'prompts' in its args.json must be an object, got "
                         f"{shorten(stated)}; correct it")
    values = {}
    for name, default in Prompts._field_defaults.items():
        value, origin = stated.get(name, default), f"{source}: {name} in its args.json"
        if given.get(name) is not None:
            value, origin = given[name], f"--{name}"
        fault = find_fault(name, value)
        if fault:
            raise InputError(f"{origin} {fault}, got {shorten(value)}")
        values[name] = value
    return Prompts(**values)


def find_fault(name, value):
    """Return the rule that the value breaks for this field of Prompts, or None."""
    if name == "passage_weights" and value not in PASSAGE_WEIGHTS:
        return f"must be one of {', '.join(PASSAGE_WEIGHTS)}"
    if name == "answer_lines" and value not in ANSWER_LINES:
        return f"must be one of {', '.join(ANSWER_LINES)}"
    if name == "chat_template" and not isinstance(value, bool):
        return "must be true or false"
    if name == "retriever_temperature":
        is_right = type(value) in (int, float) and 0 < value < math.inf
        return None if is_right else "must be a number > 0"
    if name == "prompt_template":
        fields = re.findall(r"\{(\w*)\}", value) if isinstance(value, str) else []
        unknown = [field for field in fields if field not in FIELDS]
        if unknown:
            return f"must not contain {{{unknown[0]}}}, only {{question}}, {{title}} and {{text}}"
        if "question" not in fields or fields.count("text") != 1:
            return "must be a text with {question}, and with {text} once"
    return None


def fill_template(template, question, context):
    """Return (prompt, span), where span is the start and end of the passage's text in the prompt.

    Without a title, {title} is removed with the space after it.
    """
    title = context.get("title")
    if not title:
        template = template.replace("{title} ", "").replace("{title}", "")
    values = {"question": question, "title": title, "text": context["text"]}
    prompt, span = "", (0, 0)
    for number, part in enumerate(re.split(r"\{(\w+)\}", template)):
        text = values[part] if number % 2 else part  # re.split returns the fields at odd indices
        if number % 2 and part == "text":
            span = (len(prompt), len(prompt) + len(text))
        prompt += text
    return prompt, span


def drop_passage(template):
    """Return the template for a question without contexts: remove the lines that hold only the
    passage.
    """
    whitespace = template[len(template.rstrip()):]  # before the answer, so it is kept
    lines = [line for line in template.split("\n")
             if "{question}" in line or not ("{text}" in line or "{title}" in line)]
    return "\n".join(lines).strip() + whitespace


def cut_passage(ids, offsets, span, max_length):
    """Return the ids of a prompt with the passage truncated on the right, so that at most
    max_length remain if the passage is long enough.

    offsets: (start, end) of each token; a token belongs to the passage if it ends within the span.
    """
    excess = len(ids) - max_length
    if excess <= 0:
        return ids
    inside = [n for n, (_, end) in enumerate(offsets) if span[0] < end <= span[1]]
    dropped = set(inside[-excess:])
    return [token for n, token in enumerate(ids) if n not in dropped]


def read_context_scores(contexts, prompts):
    """Return the retrieval scores of contexts, or zeros if all contexts have the same weight.

    Raise ValueError for a context without a finite score.
    """
    if prompts.passage_weights == "equal":
        return [0.0] * len(contexts)
    scores = [retrieval_score(context) for context in contexts]
    if None in scores:
        raise ValueError("a context has no score")
    scores = [to_number(score) for score in scores]
    if not all(math.isfinite(score) for score in scores):
        raise ValueError("a context has no finite score")
    return scores


class PromptCollator:
    """Turn (index, record, target) samples into a batch of prompts and targets.

    A prompt begins with the tokenizer's <s>, if there is one. The turns of a record's chat_history
    come before the question, one per line. To fit a prompt into max_length tokens, the oldest turns
    are dropped first, then the passage is truncated on the right; the question is kept whole. A
    question without contexts gets one prompt without a passage. With prompts.chat_template a prompt
    is the user's turn of a conversation. The answer follows the whitespace at the template's end,
    else one space. It is tokenised in that position (reader/borders.py) and ends with exactly one
    </s>.

    A batch is {indices, inputs, labels (B, T) with -100 as padding, or None}. inputs holds
    input_ids (B, N, L), padded on the left, attention_mask (B, N, L) bool, and log_weights (B, N),
    the logarithms of the passages' weights, -inf where there is no passage.
    """

    def __init__(self, tokenizer, num_contexts, max_length, prompts, longest=None):
        """Set the options; longest is the most tokens of prompt and target, None for no limit."""
        self.tokenizer, self.num_contexts, self.max_length = tokenizer, num_contexts, max_length
        self.prompts, self.longest = prompts, longest
        self.template = prompts.prompt_template.replace(r"\n", "\n")
        self.before, self.after = "", ""  # texts of the chat template around the user's turn
        if prompts.chat_template:
            self.before, self.after = chat_frame(tokenizer)
            self.template = self.template.strip()
        elif not self.template[-1:].isspace():
            self.template += " "
        self.start = start_tokens(tokenizer)

    def __call__(self, samples):
        records = [record for _, record, _ in samples]
        prompts = self.prompt_ids(records)
        labels = pad_labels([target for _, _, target in samples], self.target_ids)
        self.check_lengths(records, prompts, labels)
        input_ids, attention_mask = pad_prompts(prompts, self.tokenizer.eos_token_id)
        weights = [self.log_weights(record) for record in records]
        weights = nn.utils.rnn.pad_sequence(weights, batch_first=True, padding_value=-torch.inf)
        return {"indices": [index for index, _, _ in samples],
                "inputs": {"input_ids": input_ids, "attention_mask": attention_mask,
                           "log_weights": weights},
                "labels": labels}

    def prompt_texts(self, record):
        """Return [(prompt, span of the passage's text)], one per context, or one for the question
        alone.

        The prompts contain as many of the newest turns of the chat_history as fit in each of them.
        """
        turns, separator = history_turns(record), "\n"
        if len(turns) == 1:  # a single turn is shortened word by word
            turns, separator = turns[0].split(), " "
        histories = [separator.join(turns[first:]) + "\n" for first in range(len(turns))]
        fitting = bisect_left(histories, True, key=lambda history: self.fits(record, history))
        return self.fill_prompts(record, (*histories, "")[fitting])

    def fits(self, record, history):
        """Return True if all prompts with this history have at most max_length tokens."""
        texts = [text for text, _ in self.fill_prompts(record, history)]
        pairs = encode_prompts(self.tokenizer, texts)
        return max(len(add_start(self.start, pair.prompt)) for pair in pairs) <= self.max_length

    def fill_prompts(self, record, history):
        """Return prompt_texts with this history, a text before the question."""
        question = history + record["question"]
        contexts = record["ctxs"][:self.num_contexts]
        if contexts:
            filled = [fill_template(self.template, question, context) for context in contexts]
        else:
            filled = [fill_template(drop_passage(self.template), question, {"text": ""})]
        shift = len(self.before)
        return [(self.before + text + self.after, (start + shift, end + shift))
                for text, (start, end) in filled]

    def texts(self, record):
        """Return the texts of a record's prompts."""
        return [text for text, _ in self.prompt_texts(record)]

    def prompt_ids(self, records):
        """Return the token ids of each record's prompts."""
        prompts = [self.prompt_texts(record) for record in records]
        texts = [text for record_prompts in prompts for text, _ in record_prompts]
        pairs = iter(encode_prompts(self.tokenizer, texts))
        return [[self.cut_prompt(next(pairs), span) for _, span in record_prompts]
                for record_prompts in prompts]

    def cut_prompt(self, pair, span):
        """Return the ids of a prompt with start tokens; `span` is truncated, see cut_passage."""
        num_start = len(add_start(self.start, pair.prompt)) - len(pair.prompt)
        ids = cut_passage(pair.prompt, pair.offsets, span, self.max_length - num_start)
        return self.start[:num_start] + ids

    def count_fixed_bytes(self, num_bytes):
        """Return the most bytes that a prompt can have besides a passage's text, with this number
        of bytes in the question and the title.
        """
        texts = [self.before, self.template, self.after]
        return sum(len(text.encode()) for text in texts) + num_bytes + len(self.start) + 8

    def check_lengths(self, records, prompts, labels):
        """Raise InputError if a prompt with its target has more tokens than the model can read."""
        for number, (record, record_prompts) in enumerate(zip(records, prompts)):
            target = 0 if labels is None else int(labels[number].ne(-100).sum())
            tokens = max(map(len, record_prompts)) + target
            if self.longest and tokens > self.longest:
                raise InputError(f"record {shorten(record['id'])}: prompt and answer take {tokens} "
                                 f"tokens, but the model reads {self.longest}; shorten the "
                                 "question, lower --max_length, or drop the record")

    def log_weights(self, record):
        """Return the logarithms (n) of the weights of a record's n contexts, which sum to one; a
        question without contexts has the weight one.
        """
        scores = read_context_scores(record["ctxs"][:self.num_contexts], self.prompts) or [0.0]
        scores = torch.tensor(scores, dtype=torch.float64) / self.prompts.retriever_temperature
        return scores.log_softmax(0).float()

    def target_ids(self, target):
        """Return the ids of a target after a prompt, with exactly one </s> at the end."""
        eos = self.tokenizer.eos_token_id
        pair, = encode_pairs(self.tokenizer, [self.prompt_end()], [target])
        return [token for token in pair.answer if token != eos] + [eos]

    def prompt_end(self):
        """Return the end that all prompts share, on which the tokens of an answer depend."""
        if self.after:
            return self.after
        end = re.split(r"\{\w+\}", self.template)[-1]
        return end if end.strip() else ANCHOR + end


def pad_prompts(prompts, padding_id):
    """Return (input_ids, attention_mask), both (B, N, L), of [question][prompt][token] ids, padded
    on the left.
    """
    B, N = len(prompts), max(map(len, prompts))
    L = max(1, max(len(ids) for question in prompts for ids in question))
    input_ids = torch.full((B, N, L), padding_id)
    attention_mask = torch.zeros((B, N, L), dtype=torch.bool)
    for b, question in enumerate(prompts):
        for n, ids in enumerate(question):
            input_ids[b, n, L - len(ids):] = torch.tensor(ids, dtype=torch.long)
            attention_mask[b, n, L - len(ids):] = True
    return input_ids, attention_mask


# ---------------------------------------------------------------- the reader

class CausalReader(Reader):
    """Read N prompts per question with a causal language model; see the module's docstring."""

    def __init__(self, lm, prompts=None):
        super().__init__()
        self.lm = lm
        self.prompts = prompts or Prompts()
        self.config = lm.config
        self.base = None  # name of the adapters' model, if only the adapters are saved
        self.tokenizer = None  # check_tokenizer sets it
        self.max_length = self.answer_maxlength = None  # set_lengths sets them
        # models with relative positions take no position_ids, and some always compute all logits
        parameters = inspect.signature(lm.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.takes_count = "logits_to_keep" in parameters
        # why prompts are padded, or None if they are packed; from_pretrained sets it
        self.why_padded = "an attention that was not checked"
        self.is_noted = False  # the reason was logged

    @property
    def longest(self):
        """Return how many tokens the model can read, or None if its configuration sets no limit."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def describe(self):
        """Return the entries that the reader adds to args.json."""
        return {"prompts": self.prompts._asdict()}

    def set_checkpoint(self, use_checkpoint):
        """Turn activation checkpointing on or off. Raise InputError if the model lacks it."""
        if not use_checkpoint:
            self.lm.activation_checkpointing_disable()
            return
        with refusing("--use_checkpoint does not work with this model", "leave it out"):
            self.lm.activation_checkpointing_enable()

    def add_adapters(self, lora, device, bf16=False, base=None):
        """Freeze the weights and add adapters (training/adapters.py, prepare_lora).

        base: the name of the model that this reader was opened from, if only the adapters are to be
        saved. Raise InputError if that model holds adapters itself.
        """
        folder = None if base is None else find_model(base)[0]
        if base is not None and find_base(folder) != folder:
            raise InputError(f"--save_adapters: {base} holds adapters itself, but adapters must "
                             "belong to a whole model; leave the flag out")
        self.lm = prepare_lora(self.lm, lora, device, bf16)
        self.base = base

    def check_tokenizer(self, tokenizer):
        """Add the tokenizer's end-of-sequence token to the tokens that end an answer.

        Raise InputError for a tokenizer that does not fit the model, is slow, or has no such token.
        """
        name, eos = tokenizer.name_or_path, tokenizer.eos_token_id
        check_vocabulary(tokenizer, self.lm.get_input_embeddings(), "name the model that the "
                         "tokenizer belongs to with --tokenizer")
        if eos is None:
            raise InputError(f"{name}: the tokenizer has no end-of-sequence token, which every "
                             "answer ends with; set eos_token in its tokenizer_config.json")
        if not tokenizer.is_fast:
            raise InputError(f"{name}: the tokenizer is a slow one, without the offsets of tokens "
                             "by which passages are truncated; save it with a tokenizer.json")
        ends = [end for end in self.end_tokens if end != eos] + [eos]
        ends = ends if len(ends) > 1 else eos
        self.config.eos_token_id = self.lm.generation_config.eos_token_id = ends
        self.tokenizer = tokenizer
        if self.prompts.chat_template:
            chat_frame(tokenizer)

    @property
    def end_tokens(self):
        """Return the ids that end an answer: the end ids of config.json and generation_config.json
        (chat models have several), then the tokenizer's.
        """
        ends = [*list_ids(self.config.get_text_config().eos_token_id),
                *list_ids(self.config.eos_token_id),
                *list_ids(self.lm.generation_config.eos_token_id)]
        last = list_ids(None if self.tokenizer is None else self.tokenizer.eos_token_id)
        return [end for end in dict.fromkeys(ends) if end not in last] + last

    def set_lengths(self, max_length, answer_maxlength):
        """Set the lengths that check_records uses. Raise InputError if the model cannot read a
        prompt and an answer of these lengths.
        """
        if self.longest and max_length + answer_maxlength > self.longest:
            raise InputError(f"--max_length {max_length} and answers of {answer_maxlength} tokens "
                             f"exceed the {self.longest} tokens that the model reads; lower "
                             "--max_length")
        self.max_length, self.answer_maxlength = max_length, answer_maxlength

    def check_records(self, records, num_contexts, path, trains=False):
        """Raise InputError for a record whose contexts cannot be weighted or, after set_lengths,
        whose question and answer are longer than the model reads.

        trains: the lengths of the records' own answers count, instead of answer_maxlength.
        """
        collator = None
        if self.longest and self.max_length:
            collator = self.make_collator(self.tokenizer, num_contexts, self.max_length)
        for index, facts in enumerate(read_facts(records)):
            if self.prompts.passage_weights == "score" and facts["num_unscored"]:
                self.check_scores(records[index], num_contexts, path)
            if collator and not self.is_short(facts, collator, trains):
                self.check_length(records[index], collator, path, trains)

    def check_scores(self, record, num_contexts, path):
        """Raise InputError for a record with a context that cannot be weighted by its score."""
        try:
            read_context_scores(record["ctxs"][:num_contexts], self.prompts)
        except ValueError:
            raise InputError(f"{path}: record {shorten(record['id'])} has a context without a "
                             "finite 'score', which --passage_weights score needs; retrieve.py "
                             "writes scores, --passage_weights equal needs none") from None

    def is_short(self, facts, collator, trains):
        """Return True if the facts about a record show that the model reads all its tokens: a text
        has at most as many tokens as bytes.
        """
        targets = list_targets(facts) if trains else []
        most = max((len(target.encode()) + 8 for target in targets), default=self.answer_maxlength)
        fixed = collator.count_fixed_bytes(facts["num_bytes"])
        return max(self.max_length, fixed) + most <= self.longest

    def check_length(self, record, collator, path, trains):
        """Raise InputError for a record that takes more tokens than the model reads."""
        targets = list_targets(record) if trains else []
        answer = max((len(collator.target_ids(target)) for target in targets),
                     default=self.answer_maxlength)
        tokens = max(map(len, collator.prompt_ids([record])[0]))
        if tokens + answer <= self.longest:
            return
        bare = {"question": record["question"],
                "ctxs": [context | {"text": ""} for context in record["ctxs"]]}
        fixed = max(map(len, collator.prompt_ids([bare])[0]))
        place = f"{path}: record {shorten(record['id'])}"
        if fixed + answer > self.longest:
            reserved = "its answer takes" if targets else "an answer may take"
            raise InputError(f"{place}: its question takes {fixed} tokens without a passage and "
                             f"{reserved} {answer}, but the model reads {self.longest}; shorten "
                             "the question, or drop the record")
        raise InputError(f"{place}: prompt and answer take {tokens + answer} tokens, but the model "
                         f"reads {self.longest}; lower --max_length to {self.longest - answer}")

    def make_collator(self, tokenizer, num_contexts, max_length):
        """Return a PromptCollator."""
        return PromptCollator(tokenizer, num_contexts, max_length, self.prompts, self.longest)

    # ---------------------------------------------------------------- training

    def forward(self, input_ids, attention_mask, log_weights, labels, reduction="mean"):
        """Return (loss, logits (R, V) of the R answer tokens after each prompt).

        The loss of a question is sum_n w_n sum_t -log p(y_t | prompt n, y_<t), where the weights w
        of its N passages sum to one, and y are the T tokens of its answer with </s>. `sum` adds the
        losses of questions; `mean` divides their sum by the number of answer tokens, each counted
        once whatever N is. So with train_epoch.py's --accumulate mean all answer tokens of an
        update have the same weight, as with FiDT5; with sum the means of micro-batches are added.
        With equal weights the loss is RA-DIT's (arXiv 2310.01352, section 2.3) divided by N. RA-DIT
        itself weights a question by the number of its passages.
        """
        is_real = attention_mask.any(2)                                                  # (B, N)
        targets = labels[is_real.nonzero()[:, 0]]                                        # (K, T)
        is_answer = targets != -100
        is_packed = self.packs(input_ids.shape[2] + labels.shape[1])
        run = self.run_packed if is_packed else self.run_padded
        logits = run(input_ids, attention_mask, labels)                                  # (R, V)
        losses = F.cross_entropy(logits.float(), targets[is_answer], reduction="none")   # (R)
        weights = log_weights[is_real].exp()[is_answer.nonzero()[:, 0]]                  # (R)
        loss = (weights * losses).sum()
        if reduction == "mean":
            loss = loss / labels.ne(-100).sum().clamp(min=1)
        return loss, logits

    def packs(self, longest):
        """Return True if texts of at most `longest` tokens are packed. If not, log why, once."""
        reason = self.why_padded
        if reason is None and exceeds_window(self.config, longest):
            reason = f"attention to {self.config.get_text_config().sliding_window} tokens only"
        if reason and not self.is_noted:
            log_on_main(f"note: the {self.config.model_type} model has {reason}: its prompts are "
                        "padded, which takes longer")
            self.is_noted = True
        return reason is None

    def run_packed(self, input_ids, attention_mask, labels):
        """Return the logits (R, V) of the R answer tokens after each prompt, from packed texts."""
        answers = [row[row != -100].tolist() for row in labels.cpu()]
        families = [[prompt + answer[:-1] for prompt in prompts] for prompts, answer
                    in zip(list_prompts(input_ids, attention_mask), answers)]
        packed = pack_families([families], input_ids.device)
        counts = [len(answer) for prompts, answer in zip(families, answers) for _ in prompts]
        rows = [rows[len(rows) - count:] for rows, count in zip(packed.rows, counts)]
        return packed_logits(self.lm, packed, np.concatenate(rows))

    def run_padded(self, input_ids, attention_mask, labels):
        """Return what run_packed returns, from padded prompts and answers."""
        is_real = attention_mask.any(2)
        targets = labels[is_real.nonzero()[:, 0]]                                        # (K, T)
        ids = torch.cat([input_ids[is_real], targets[:, :-1].clamp(min=0)], 1)   # (K, L + T - 1)
        mask = torch.cat([attention_mask[is_real], targets[:, :-1] != -100], 1)
        # all prompts end in the same column, so the last T columns predict the answers
        logits = self.run(ids, mask, labels.shape[1]).logits                          # (K, T, V)
        return logits[targets != -100]

    def run(self, ids, mask, count, cache=None, use_cache=False):
        """Return the model's output, with logits (K, count, V) of the last `count` ids only.

        The ids (K, n) follow the cached tokens; mask (K, past + n) covers both.
        """
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "past_key_values": cache,
                  "use_cache": use_cache}
        if self.takes_count:
            inputs["logits_to_keep"] = count
        if self.takes_positions:
            positions = mask.long().cumsum(1).clamp(min=1) - 1  # counted without padding
            inputs["position_ids"] = positions[:, -ids.shape[1]:]
        output = self.lm(**inputs)
        output.logits = output.logits[:, -count:]
        return output

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, log_weights, max_length=50, num_beams=1,
                 return_scores=False, n_best=None):
        """Return the ids (B, <= max_length) of greedy answers, padded with </s>.

        Each token is the likeliest under sum_n w_n p(. | prompt n, earlier tokens), an average of
        probabilities, not of logits (REPLUG, arXiv 2301.12652, eq. 2). Each prompt is run once,
        then one token per step; questions whose answer has ended leave the batch. With
        prompts.answer_lines "first" an answer also ends at the first line break after some text.

        With `return_scores` also return scores (B, N), log w_n p(answer | prompt n) normalised over
        n: the log posterior of the passage given the answer, -inf where there is no passage.
        With `n_best` 1 the ids are (B, 1, T), and the log probabilities (B, 1) of the answers under
        the average are returned last. Raise InputError for more than one beam.
        """
        if num_beams > 1:
            raise InputError(f"--num_beams {num_beams}: a causal language model only answers "
                             "greedily; leave the flag out (--n_best 1 is possible)")
        (B, _, L), device = input_ids.shape, input_ids.device
        is_real = attention_mask.any(2)                                                  # (B, N)
        if self.longest and L + max_length > self.longest:
            raise InputError(f"a prompt of {L} tokens and an answer of {max_length} "
                             f"exceed the {self.longest} that the model reads; shorten the "
                             "question, or lower --max_length or --answer_maxlength")
        if self.packs(L + max_length):
            families = list_prompts(input_ids, attention_mask)
            prompts = PackedPrompts(self.lm, [families], max_length - 1, device)
        else:
            prompts = PaddedPrompts(self, input_ids[is_real], attention_mask[is_real])
        ends = torch.tensor(self.end_tokens, device=device)
        weights = log_weights[is_real]                                                   # (K)
        answers = torch.full((B, max_length), ends[-1], device=device)
        likelihoods = torch.zeros_like(weights)  # (K) log p(tokens so far | prompt)
        log_probabilities = torch.zeros(B, dtype=torch.float64, device=device)  # under the average
        # indices of the questions (b) and prompts (k) that are still generating
        questions, rows = torch.arange(B, device=device), prompts.order
        owner = is_real.nonzero()[rows, 0]       # (k) each prompt's index in `questions`

        logits = prompts.start()
        for step in range(max_length):
            log_p = logits.float().log_softmax(-1)                                       # (k, V)
            # (b, k) x (k, V): a matrix product always adds in the same order. In bfloat16 it would
            # round the probabilities of likely tokens to the same number.
            shares = F.one_hot(owner, len(questions)).T * weights[rows].exp()
            with torch.autocast(device.type, enabled=False):
                average = shares @ log_p.exp()                                           # (b, V)
                token = average.argmax(-1)                                               # (b)
            if n_best:
                chosen = average.gather(1, token[:, None])[:, 0]                         # (b)
                log_probabilities[questions] += chosen.double().log()
            answers[questions, step] = token
            likelihoods[rows] += log_p[torch.arange(len(rows), device=device), token[owner]]

            alive = ~torch.isin(token, ends)
            if self.prompts.answer_lines == "first":
                alive &= ~self.find_line_ends(answers[questions, :step + 1])
            if step == max_length - 1 or not alive.any():
                break
            kept = alive[owner]                                                          # (k)
            if not alive.all():
                prompts.keep(kept)
                owner = (alive.cumsum(0) - 1)[owner[kept]]
                questions, token, rows = questions[alive], token[alive], rows[kept]
            logits = prompts.step(token[owner])

        answers, others = self.trim_answers(answers[:, :step + 1]), []
        if return_scores:
            scores = torch.full(is_real.shape, -torch.inf, device=device)
            scores[is_real] = weights + likelihoods
            others.append(scores.log_softmax(1))
        if n_best:
            answers = answers[:, None]                                   # (B, T) -> (B, 1, T)
            others.append(log_probabilities[:, None])
        return (answers, *others) if others else answers

    def find_line_ends(self, answers):
        """Return (b) bool: True for answers (b, t) with a line break after some text."""
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        ended = ["\n" in text.lstrip() for text in texts]
        return torch.tensor(ended, device=answers.device)

    def trim_answers(self, answers):
        """Return answers (B, T) with the tokenizer's end token from their first end token on. With
        answer_lines "first", it also replaces a last token that has text after a line break.
        """
        ends, last = set(self.end_tokens), self.end_tokens[-1]
        rows = []
        for row in answers.tolist():
            length = next((i for i, token in enumerate(row) if token in ends), len(row))
            if self.prompts.answer_lines == "first":
                text = self.tokenizer.decode(row[:length], skip_special_tokens=True).strip()
                if "\n" in text:
                    length -= 1
            rows.append(row[:length] + [last] * (len(row) - length))
        return torch.tensor(rows, device=answers.device)

    # ---------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, path_or_name, dropout=None, prompts=None):
        """Return the reader of a causal language model's folder or hub name; see open_lm."""
        reader = cls(open_lm(path_or_name, dropout), prompts)
        was_training = reader.lm.training
        reader.lm.eval()
        reader.check_reading(path_or_name)
        reader.why_padded = why_not_packed(reader.lm, longest=0)  # packs checks the window
        reader.lm.train(was_training)
        return reader

    @torch.no_grad()
    def check_reading(self, source):
        """Raise InputError for a model that cannot be a reader, because padding before a prompt
        changes its logits, or because rows cannot be removed from its cache.

        The check takes three forward passes of at most 12 tokens.
        """
        problem = "padding before a prompt changes its logits, or its cache cannot drop rows"
        try:
            if not self.differs_when_padded():
                return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # unsupported models raise many kinds
            problem = f"with padded prompts and a cache: {first_line(error)}"
        raise InputError(f"{source}: a {self.config.model_type} model of transformers cannot be a "
                         f"reader here ({problem}); choose another model, such as GPT-2, Llama or "
                         "Qwen2")

    def differs_when_padded(self):
        """Return True if the logits of a short text change when it is padded to a longer one, or
        when the longer one is removed from the cache.
        """
        device = next(self.lm.parameters()).device
        ids = torch.tensor([probe_ids(self.config)], device=device)                      # (1, 8)
        expected = self.run(ids, torch.ones_like(ids).bool(), 8).logits[0]
        rows = torch.stack([ids[0, :6], F.pad(ids[0, :3], (3, 0), value=int(ids[0, 0]))])
        mask = torch.ones_like(rows).bool()
        mask[1, :3] = False
        prompts = PaddedPrompts(self, rows, mask)
        if differs(prompts.start(), expected[[5, 2]]):
            return True
        prompts.keep(torch.tensor([False, True], device=device))
        return differs(prompts.step(ids[0, 3:4])[0], expected[3])

    def save_pretrained(self, folder):
        """Write a folder for AutoModelForCausalLM, with adapters merged in, or, if `base` is set, a
        folder of the adapters alone.
        """
        lm = self.lm
        os.makedirs(folder, exist_ok=True)
        if self.base:
            save_adapters(lm, folder, self.base)
            return
        if hasattr(lm, "merge_and_unload"):
            lm = unload_adapters(copy_to_cpu(lm)).float()
        lm.save_pretrained(folder)


# ---------------------------------------------------------------- prompts as packed or padded texts

def list_prompts(input_ids, attention_mask):
    """Return [question][prompt][token] ids of padded prompts (B, N, L)."""
    questions = zip(input_ids.cpu(), attention_mask.cpu())
    return [[row[is_token].tolist() for row, is_token in zip(rows, mask) if is_token.any()]
            for rows, mask in questions]


class PaddedPrompts:
    """Generate as PackedPrompts does, in plain form, for models that do not take packed texts."""

    def __init__(self, reader, ids, mask):
        """Set the ids and the mask (K, L) of K prompts, padded on the left."""
        self.reader, self.ids, self.mask, self.cache = reader, ids, mask, None
        self.order = torch.arange(len(ids), device=ids.device)

    def start(self):
        """Run the prompts; return the logits (K, V) of the next tokens."""
        output = self.reader.run(self.ids, self.mask, 1, use_cache=True)
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def step(self, tokens):
        """Run the next tokens (K) of the prompts; return the logits (K, V) of those after them."""
        self.mask = F.pad(self.mask, (0, 1), value=True)
        return self.reader.run(tokens[:, None], self.mask, 1, self.cache, True).logits[:, -1]

    def keep(self, kept):
        """Drop the prompts where the mask kept (K) is False."""
        self.mask = self.mask[kept]
        self.cache.reorder_cache(kept.nonzero()[:, 0])  # works for layers of any kind
