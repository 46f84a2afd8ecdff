"""A causal language model as the reader: every retrieved passage stands in a prompt of its own.

    question and N passages -> PromptCollator -> N prompts (B, N, L), log weights (B, N)
    training                -> -log p(answer | prompt n), weighted over n
    generation              -> next-token probabilities (K, V), averaged over n to (B, V)

B questions, N passages each, L tokens of a prompt at most; K prompts of all questions, T tokens of
an answer, V of the vocabulary. Training is RA-DIT's of the language model (Lin et al. 2023, arXiv
2310.01352, section 2.3), which FedRAG calls RALT; generation is REPLUG's ensemble (Shi et al. 2023,
arXiv 2301.12652, eq. 2).
"""
import inspect
import math
import os
import re
from bisect import bisect_left
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import list_targets, pad_labels, pad_passages
from reader.base import Reader
from reader.borders import add_start, chat_frame, encode_pairs, encode_prompts, start_tokens
from reader.causal_lm import differs, list_ids, open_lm, probe_ids
from records.fields import history_turns
from records.reader_records import retrieval_score
from records.reading import to_number
from training.adapters import (
    copy_to_cpu,
    prepare_lora,
    save_adapters,
    unload_adapters,
)
from training.checkpoints import check_vocabulary, find_base, find_model
from utils import InputError, first_line, refusing, shorten

TEMPLATE = r"Background: {title} {text}\n\nQuestion: {question}\nAnswer:"
FIELDS = ("question", "title", "text")
ANCHOR = ":"  # what an answer is tokenised after, if the template ends in a field
PASSAGE_WEIGHTS = ("equal", "score")
ANSWER_LINES = ("first", "all")


# ---------------------------------------------------------------- prompts

class Prompts(NamedTuple):
    """How a question and its passages become weighted prompts; kept in the args.json of a reader.
    """
    prompt_template: str = TEMPLATE
    passage_weights: str = "equal"      # or score: the softmax of score / retriever_temperature
    retriever_temperature: float = 1.0
    chat_template: bool = False         # the prompt is the user's turn of the tokenizer's template
    answer_lines: str = "all"           # or first: an answer ends at its first line end


def choose_prompts(given, stated, source):
    """Return the Prompts of the flags that are given, else of a checkpoint, else the defaults.

    Both are dictionaries. Raise InputError, which names `source` for what it stores, for a value
    that cannot be.
    """
    values = {}
    if not isinstance(stated, dict):
        raise InputError(f"{source}: its args.json says 'prompts' {shorten(stated)}, which must be "
                         "an object; mend it")
    for name, default in Prompts._field_defaults.items():
        value, origin = stated.get(name, default), f"{source}: its args.json says {name}"
        if given.get(name) is not None:
            value, origin = given[name], f"--{name}"
        fault = find_fault(name, value)
        if fault:
            raise InputError(f"{origin} {shorten(value)}: {fault}")
        values[name] = value
    return Prompts(**values)


def find_fault(name, value):
    """Return why the field of Prompts cannot have the value, or None."""
    if name == "passage_weights" and value not in PASSAGE_WEIGHTS:
        return f"must be one of {', '.join(PASSAGE_WEIGHTS)}"
    if name == "answer_lines" and value not in ANSWER_LINES:
        return f"must be one of {', '.join(ANSWER_LINES)}"
    if name == "chat_template" and not isinstance(value, bool):
        return "must be true or false"
    if name == "retriever_temperature":
        is_right = type(value) in (int, float) and 0 < value < math.inf
        return None if is_right else "must be a number above 0"
    if name == "prompt_template":
        fields = re.findall(r"\{(\w*)\}", value) if isinstance(value, str) else []
        unknown = [field for field in fields if field not in FIELDS]
        if unknown:
            return f"{{{unknown[0]}}} is none of {{question}}, {{title}} and {{text}}"
        if "question" not in fields or fields.count("text") != 1:
            return "must be a text with {question}, and with {text} once"
    return None


def fill_template(template, question, context):
    """(the prompt, start and end of the passage's text in it); a title that is missing goes with
    the space behind its place.
    """
    title = context.get("title")
    if not title:
        template = template.replace("{title} ", "").replace("{title}", "")
    values = {"question": question, "title": title, "text": context["text"]}
    prompt, span = "", (0, 0)
    for number, part in enumerate(re.split(r"\{(\w+)\}", template)):
        text = values[part] if number % 2 else part  # fields stand at the odd places
        if number % 2 and part == "text":
            span = (len(prompt), len(prompt) + len(text))
        prompt += text
    return prompt, span


def drop_passage(template):
    """Return the template of a question without a passage: without the passage's own lines."""
    whitespace = template[len(template.rstrip()):]  # it stands before the answer, and stays
    lines = [line for line in template.split("\n")
             if "{question}" in line or not ("{text}" in line or "{title}" in line)]
    return "\n".join(lines).strip() + whitespace


def cut_passage(ids, offsets, span, max_length):
    """The ids of a prompt, at most max_length as far as the passage's tokens, from the right, can
    be left out: those that end, by their (start, end) in the prompt, within the span.
    """
    excess = len(ids) - max_length
    if excess <= 0:
        return ids
    inside = [n for n, (_, end) in enumerate(offsets) if span[0] < end <= span[1]]
    dropped = set(inside[-excess:])
    return [token for n, token in enumerate(ids) if n not in dropped]


def read_scores(contexts, prompts):
    """Return the retriever's scores of contexts, or all 0 where they weigh the same.

    Raises ValueError for a context without a finite score.
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
    """Turns (index, record, target) samples into a batch of prompts and targets.

    A prompt begins with the tokenizer's <s>, where it has one, and takes max_length tokens: of a
    record's chat_history, which goes before the question with a line per turn, the oldest turns
    are left out, then the passage is cut on the right, so that the question and the words after the
    passage stay; a question that is longer by itself is not cut. A question without contexts is
    asked alone. With prompts.chat_template all of this is the user's turn of a conversation.
    The answer follows after the whitespace that the template ends with, else after one space. Its
    tokens are those that it has in that place (reader/borders.py), and exactly one </s> at the end.

    Returns {indices, inputs, labels (B, T) with -100 as padding, or None}; the inputs are input_ids
    (B, N, L), padded on the left, attention_mask (B, N, L) bool, and log_weights (B, N): the
    logarithms of the passages' weights, -inf where there is none.
    """

    def __init__(self, tokenizer, num_contexts, max_length, prompts, longest=None):
        """Set what is read; longest is the most tokens of prompt and target, None for no limit."""
        self.tokenizer, self.num_contexts, self.max_length = tokenizer, num_contexts, max_length
        self.prompts, self.longest = prompts, longest
        self.template = prompts.prompt_template.replace(r"\n", "\n")
        self.before, self.after = "", ""  # of the user's turn
        if prompts.chat_template:
            self.before, self.after = chat_frame(tokenizer)
            self.template = self.template.strip()
        elif not self.template[-1:].isspace():
            self.template += " "
        self.start = start_tokens(tokenizer)

    def __call__(self, samples):
        records = [record for _, record, _ in samples]
        questions = self.prompt_ids(records)
        labels = self.labels([target for _, _, target in samples])
        self.check_lengths(records, questions, labels)
        input_ids, attention_mask = pad_passages(questions, self.tokenizer.eos_token_id, "left")
        weights = [self.log_weights(record) for record in records]
        weights = nn.utils.rnn.pad_sequence(weights, batch_first=True, padding_value=-torch.inf)
        return {"indices": [index for index, _, _ in samples],
                "inputs": {"input_ids": input_ids, "attention_mask": attention_mask,
                           "log_weights": weights},
                "labels": labels}

    def prompt_texts(self, record):
        """[(prompt, span of the passage's text)] of a record's contexts, or of the question alone,
        with the newest turns of its chat_history that all of the prompts have room for.
        """
        turns, separator = history_turns(record), "\n"
        if len(turns) == 1:  # a single one loses its oldest words
            turns, separator = turns[0].split(), " "
        histories = [separator.join(turns[first:]) + "\n" for first in range(len(turns))]
        fitting = bisect_left(histories, True, key=lambda history: self.fits(record, history))
        return self.fill_prompts(record, (*histories, "")[fitting])

    def fits(self, record, history):
        """Return True if a record's prompts, with this history, have at most max_length tokens."""
        texts = [text for text, _ in self.fill_prompts(record, history)]
        pairs = encode_prompts(self.tokenizer, texts)
        return max(len(add_start(self.start, pair.prompt)) for pair in pairs) <= self.max_length

    def fill_prompts(self, record, history):
        """Return prompt_texts with this history, a text that goes before the question."""
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
        """The texts that are read of a record."""
        return [text for text, _ in self.prompt_texts(record)]

    def prompt_ids(self, records):
        """Return the token ids of each record's prompts."""
        prompts = [self.prompt_texts(record) for record in records]
        texts = [text for record_prompts in prompts for text, _ in record_prompts]
        pairs = iter(encode_prompts(self.tokenizer, texts))
        return [[self.cut_prompt(next(pairs), span) for _, span in record_prompts]
                for record_prompts in prompts]

    def cut_prompt(self, pair, span):
        """Return the ids of a prompt, at most max_length of them if the passage can be cut so far.

        span: start and end of the passage in the text.
        """
        num_start = len(add_start(self.start, pair.prompt)) - len(pair.prompt)
        ids = cut_passage(pair.prompt, pair.offsets, span, self.max_length - num_start)
        return self.start[:num_start] + ids

    def count_fixed_bytes(self, record):
        """Return the bytes of the longest prompt of a record without the passage's text."""
        titles = [context.get("title") or "" for context in record["ctxs"][:self.num_contexts]]
        texts = [self.before, self.template, self.after, record["question"],
                 max(titles, key=len, default="")]
        return sum(len(text.encode()) for text in texts) + len(self.start) + 8

    def check_lengths(self, records, questions, labels):
        """Raise InputError for a prompt that, with its target, is longer than the model reads."""
        for number, (record, prompts) in enumerate(zip(records, questions)):
            target = 0 if labels is None else int(labels[number].ne(-100).sum())
            tokens = max(map(len, prompts)) + target
            if self.longest and tokens > self.longest:
                raise InputError(f"record {shorten(record['id'])} takes {tokens} tokens, passage "
                                 f"and answer together, the model reads {self.longest}; "
                                 "shorten its question, lower --max_length, or drop the record")

    def log_weights(self, record):
        """(n) logarithms of the weights of a record's n contexts, which sum to one; a question
        alone weighs one.
        """
        scores = read_scores(record["ctxs"][:self.num_contexts], self.prompts) or [0.0]
        scores = torch.tensor(scores, dtype=torch.float64) / self.prompts.retriever_temperature
        return scores.log_softmax(0).float()

    def labels(self, targets):
        """(B, T) ids ending in </s>, as data.Collator.labels."""
        return pad_labels(targets, self.target_ids)

    def target_ids(self, target):
        """Return the target's token ids after a prompt, with exactly one </s>, at the end."""
        eos = self.tokenizer.eos_token_id
        pair, = encode_pairs(self.tokenizer, [self.prompt_end()], [target])
        return [token for token in pair.answer if token != eos] + [eos]

    def prompt_end(self):
        """Return the text that all prompts end with; an answer's tokens depend on no more."""
        if self.after:
            return self.after
        end = re.split(r"\{\w+\}", self.template)[-1]
        return end if end.strip() else ANCHOR + end


# ---------------------------------------------------------------- the reader

class CausalReader(Reader):
    """A causal language model that reads N prompts per question; see the module's docstring."""

    def __init__(self, lm, prompts=None):
        super().__init__()
        self.lm = lm
        self.prompts = prompts or Prompts()
        self.config = lm.config
        self.base = None  # the model that adapters belong to, if they are saved alone
        self.tokenizer = None  # check_tokenizer sets it
        self.max_length = self.answer_maxlength = None  # set_lengths sets them
        # models with relative positions alone take none; some give the logits of all places
        parameters = inspect.signature(lm.forward).parameters
        self.takes_positions = "position_ids" in parameters
        self.takes_count = "logits_to_keep" in parameters

    @property
    def longest(self):
        """Return the most tokens that the model reads, or None where its configuration sets no
        limit.
        """
        return getattr(self.config.get_text_config(), "max_position_embeddings", None)

    def describe(self):
        """What args.json says of the reader, for those that open it later."""
        return {"prompts": self.prompts._asdict()}

    def set_checkpoint(self, use_checkpoint):
        """Turns activation recomputation of the layers on or off."""
        if not use_checkpoint:
            self.lm.activation_checkpointing_disable()
            return
        with refusing("--use_checkpoint is not offered with this model", "leave it out"):
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
        """Raise InputError for a tokenizer that does not fit the model, or that lacks an end of
        sequence; answers then end with its end of sequence too.
        """
        name, eos = tokenizer.name_or_path, tokenizer.eos_token_id
        check_vocabulary(tokenizer, self.lm.get_input_embeddings(), "name the model that the "
                         "tokenizer belongs to with --tokenizer")
        if eos is None:
            raise InputError(f"{name}: the tokenizer has no end-of-sequence token, which every "
                             "answer ends with; set eos_token in its tokenizer_config.json")
        if not tokenizer.is_fast:
            raise InputError(f"{name}: the tokenizer does not tell where its tokens stand in the "
                             "text, by which passages are cut; save it with a tokenizer.json")
        ends = [end for end in self.end_tokens if end != eos] + [eos]
        ends = ends if len(ends) > 1 else eos
        self.config.eos_token_id = self.lm.generation_config.eos_token_id = ends
        self.tokenizer = tokenizer
        if self.prompts.chat_template:
            chat_frame(tokenizer)

    @property
    def end_tokens(self):
        """Return the ids that end an answer: those of config.json, of generation_config.json (chat
        models have several) and, as the last one, the tokenizer's.
        """
        ends = [*list_ids(self.config.get_text_config().eos_token_id),
                *list_ids(self.config.eos_token_id),
                *list_ids(self.lm.generation_config.eos_token_id)]
        last = list_ids(None if self.tokenizer is None else self.tokenizer.eos_token_id)
        return [end for end in dict.fromkeys(ends) if end not in last] + last

    def set_lengths(self, max_length, answer_maxlength):
        """Set the lengths that check_records goes by. Raise InputError if prompts and answers of
        these lengths are more than the model reads.
        """
        if self.longest and max_length + answer_maxlength > self.longest:
            raise InputError(f"--max_length {max_length} and answers of {answer_maxlength} tokens "
                             f"are more than the {self.longest} that the model reads; lower "
                             "--max_length")
        self.max_length, self.answer_maxlength = max_length, answer_maxlength

    def check_records(self, records, num_contexts, path, trains=False):
        """Raise InputError for a record whose contexts cannot be weighted or, after set_lengths,
        whose question and answer are more than the model reads.

        trains: the answers are the records' own, not yet to be generated.
        """
        for record in records:
            try:
                read_scores(record["ctxs"][:num_contexts], self.prompts)
            except ValueError:
                raise InputError(f"{path}: record {shorten(record['id'])} has a context without a "
                                 "finite 'score', which --passage_weights score needs; retrieve.py "
                                 "writes them, --passage_weights equal does without") from None
        if self.longest and self.max_length:
            collator = self.make_collator(self.tokenizer, num_contexts, self.max_length)
            for record in records:
                self.check_length(record, collator, path, trains)

    def check_length(self, record, collator, path, trains):
        """Raise InputError for a record that takes more tokens than the model reads."""
        targets = list_targets(record) if trains else []
        # no text has more tokens than bytes; counting tokens takes longer
        most = max((len(target.encode()) + 8 for target in targets), default=self.answer_maxlength)
        if max(self.max_length, collator.count_fixed_bytes(record)) + most <= self.longest:
            return
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
            reserved = "its answer" if targets else "an answer may take"
            raise InputError(f"{place}: its question takes {fixed} tokens without a passage, "
                             f"{reserved} {answer}, the model reads {self.longest}; shorten the "
                             "question, or drop the record")
        raise InputError(f"{place}: passage and answer take {tokens + answer} tokens, the model "
                         f"reads {self.longest}; lower --max_length to {self.longest - answer}")

    def make_collator(self, tokenizer, num_contexts, max_length):
        """What turns samples into this reader's batches."""
        return PromptCollator(tokenizer, num_contexts, max_length, self.prompts, self.longest)

    # ---------------------------------------------------------------- training

    def forward(self, input_ids, attention_mask, log_weights, labels, reduction="mean"):
        """(loss, logits (K, T, V) of the answers behind each prompt).

        The loss of a question is sum_n w_n sum_t -log p(y_t | prompt n, y_<t): over its N passages,
        whose weights w sum to one, and the T tokens of its answer, </s> included. `sum` adds up the
        questions, `mean` divides that by the number of answer tokens, each counted once however
        many passages there are. So with train_epoch.py's --accumulate mean every answer token of an
        update counts alike, as with FiDT5; with sum the means of its micro-batches add up. With
        equal weights a question's loss is RA-DIT's (arXiv 2310.01352, section 2.3) divided by N:
        there a question counts by the number of its passages.
        """
        is_real = attention_mask.any(2)                                                  # (B, N)
        question = is_real.nonzero()[:, 0]      # (K) the question that each prompt is of
        targets = labels[question]                                                       # (K, T)
        ids = torch.cat([input_ids[is_real], targets[:, :-1].clamp(min=0)], 1)   # (K, L + T - 1)
        mask = torch.cat([attention_mask[is_real], targets[:, :-1] != -100], 1)

        # prompts end in the same column, so that the last T columns predict the answers
        logits = self.run(ids, mask, labels.shape[1]).logits.float()                  # (K, T, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100,
                                 reduction="none")                                       # (K * T)
        losses = losses.view(targets.shape).sum(1)                              # (K * T) -> (K)
        loss = (log_weights[is_real].exp() * losses).sum()
        if reduction == "mean":
            loss = loss / labels.ne(-100).sum().clamp(min=1)
        return loss, logits

    def run(self, ids, mask, count, cache=None, use_cache=False):
        """Return the model's output for ids (K, n), the last of each row's tokens in mask (K, past
        + n); logits (K, count, V) of the last `count` ids only.
        """
        inputs = {"input_ids": ids, "attention_mask": mask.long(), "past_key_values": cache,
                  "use_cache": use_cache}
        if self.takes_count:
            inputs["logits_to_keep"] = count
        if self.takes_positions:
            positions = mask.long().cumsum(1).clamp(min=1) - 1  # padding counts for nothing
            inputs["position_ids"] = positions[:, -ids.shape[1]:]
        output = self.lm(**inputs)
        output.logits = output.logits[:, -count:]
        return output

    # ---------------------------------------------------------------- generation

    @torch.no_grad()
    def generate(self, input_ids, attention_mask, log_weights, max_length=50, num_beams=1,
                 return_scores=False, n_best=None):
        """Return ids (B, <= max_length) of the answers, greedy, then </s> up to the longest one.

        The token is the likeliest under sum_n w_n p(. | prompt n, tokens before), an average of
        probabilities, not of logits (REPLUG, arXiv 2301.12652, eq. 2). Each prompt is run once,
        then one token a step; questions that have ended leave the batch. With `return_scores` also
        scores (B, N): log of w_n p(answer | prompt n), normalised over n, which is the posterior of
        the passage given the answer; -inf where there is no passage. With `n_best` 1 the ids are
        (B, 1, T), and the answers' log probabilities (B, 1) under that average come last. With
        prompts.answer_lines "first" the first line end after some text ends an answer, too. Raise
        InputError for more than one beam.
        """
        if num_beams > 1:
            raise InputError(f"--num_beams {num_beams}: a causal language model answers greedily "
                             "only, leave the flag out (--n_best 1 is offered)")
        B, device = len(input_ids), input_ids.device
        is_real = attention_mask.any(2)                                                  # (B, N)
        prompts, mask, weights = input_ids[is_real], attention_mask[is_real], log_weights[is_real]
        if self.longest and prompts.shape[1] + max_length > self.longest:
            raise InputError(f"a prompt of {prompts.shape[1]} tokens and an answer of {max_length} "
                             f"are more than the {self.longest} that the model reads; "
                             "shorten the question, or lower --max_length or --answer_maxlength")
        ends = torch.tensor(self.end_tokens, device=device)
        answers = torch.full((B, max_length), ends[-1], device=device)
        likelihoods = torch.zeros_like(weights)  # (K) log p(tokens so far | prompt)
        log_probabilities = torch.zeros(B, dtype=torch.float64, device=device)  # of the average
        # of the questions (b) and the prompts (k) that are still at it: their numbers
        questions, rows = torch.arange(B, device=device), torch.arange(len(prompts), device=device)
        owner = is_real.nonzero()[:, 0]          # (k) each prompt's place in `questions`

        output = self.run(prompts, mask, 1, use_cache=True)
        for step in range(max_length):
            log_p = output.logits[:, -1].float().log_softmax(-1)                         # (k, V)
            # (b, k) x (k, V): a product adds in the same order each time; in bfloat16 likely tokens
            # would come out equal
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
                keep_rows(output.past_key_values, kept)
                owner = (alive.cumsum(0) - 1)[owner[kept]]
                questions, token = questions[alive], token[alive]
                rows, mask = rows[kept], mask[kept]
            mask = F.pad(mask, (0, 1), value=True)
            output = self.run(token[owner, None], mask, 1, output.past_key_values, True)

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
        """Return (b) bool: True for the answers (b, t) that hold a line end after some text."""
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        ended = ["\n" in text.lstrip() for text in texts]
        return torch.tensor(ended, device=answers.device)

    def trim_answers(self, answers):
        """Return answers (B, T) without what is no text of theirs: the end token, whatever it is,
        becomes the tokenizer's, and so does a token that goes on after a line end.
        """
        ends, last = set(self.end_tokens), self.end_tokens[-1]
        rows = []
        for row in answers.tolist():
            length = next((place for place, token in enumerate(row) if token in ends), len(row))
            if self.prompts.answer_lines == "first":
                text = self.tokenizer.decode(row[:length], skip_special_tokens=True).strip()
                if "\n" in text:
                    length -= 1
            rows.append(row[:length] + [last] * (len(row) - length))
        return torch.tensor(rows, device=answers.device)

    # ---------------------------------------------------------------- files

    @classmethod
    def from_pretrained(cls, path_or_name, dropout=None, prompts=None):
        """Return a reader from a causal language model's folder or hub name; see open_lm."""
        reader = cls(open_lm(path_or_name, dropout), prompts)
        reader.check_reading(path_or_name)
        return reader

    @torch.no_grad()
    def check_reading(self, source):
        """Raise InputError for a model that cannot be read with: padding before a prompt must leave
        its logits as they are, and rows must be able to leave its cache.

        It takes three passes of at most 12 tokens.
        """
        problem = "padding before a prompt changes its logits, or its cache cannot drop rows"
        was_training = self.lm.training
        self.lm.eval()
        try:
            if not self.differs_when_padded():
                return
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever such a model raises
            problem = f"with padded prompts and a cache: {first_line(error)}"
        finally:
            self.lm.train(was_training)
        raise InputError(f"{source}: a {self.config.model_type} model of transformers cannot be a "
                         f"reader here ({problem}); choose another model, such as GPT-2, Llama or "
                         "Qwen2")

    def differs_when_padded(self):
        """Return True if a short text's logits next to a longer one, and after that one has left
        the cache, are not those of a pass of its own.
        """
        device = next(self.lm.parameters()).device
        ids = torch.tensor([probe_ids(self.config)], device=device)                      # (1, 8)
        expected = self.run(ids, torch.ones_like(ids).bool(), 8).logits[0]
        rows = torch.stack([ids[0, :6], F.pad(ids[0, :3], (3, 0), value=int(ids[0, 0]))])
        mask = torch.ones_like(rows).bool()
        mask[1, :3] = False
        output = self.run(rows, mask, 1, use_cache=True)
        if differs(output.logits[:, 0], expected[[5, 2]]):
            return True
        keep_rows(output.past_key_values, torch.tensor([False, True], device=device))
        mask = F.pad(mask[1:], (0, 1), value=True)
        output = self.run(ids[:, 3:4], mask, 1, output.past_key_values, True)
        return differs(output.logits[0, 0], expected[3])

    def save_pretrained(self, folder):
        """Write a folder of transformers' AutoModelForCausalLM, with adapters merged in."""
        lm = self.lm
        os.makedirs(folder, exist_ok=True)
        if self.base:
            save_adapters(lm, folder, self.base)
            return
        if hasattr(lm, "merge_and_unload"):
            lm = unload_adapters(copy_to_cpu(lm)).float()
        lm.save_pretrained(folder)


def keep_rows(cache, kept):
    """Drop the rows of a cache that the mask `kept` does not name, in layers of any kind."""
    cache.reorder_cache(kept.nonzero()[:, 0])
