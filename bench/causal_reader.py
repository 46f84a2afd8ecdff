"""Measure how fast a causal language model answers questions and trains as a reader, against
transformers' own generation and against padded prompts, with the same weights in the same process.

    python bench/causal_reader.py                   # SmolLM2-135M's shape, random weights
    python bench/causal_reader.py --model FOLDER    # a causal language model

Prompts are random token ids, so nothing is tokenised: 27 that all prompts begin with, as many as in
the chat template of SmolLM2-135M-Instruct with "Background:", a passage of 100 tokens on average
(log-normal, as in bench/lm_score.py), a question of 8 to 20, and 14 at the end. Every answer has
the number of tokens that the table shows. Systems take turns, and ratios are medians of rounds.

    one prompt            transformers' generate on one prompt per question with all its passages,
                          padded on the left
    a prompt per passage  transformers' generate on one prompt per passage, padded on the left; each
                          prompt gets an answer of its own, nothing is averaged
    ours, padded          the reader's answers, averaged over a question's prompts, as for a model
                          that cannot be packed: padded prompts and transformers' cache
    ours                  the same answers from packed prompts

A training step is a forward and a backward pass without the optimizer's step.
"""
import math
import os
import random
import sys
import tempfile

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
from bench.timing import describe_machine, ratio, time_rounds, write_report
from made_up import lognormal_of
from reader.causal import CausalReader, pad_prompts
from utils import InputError, Parser, run_script, start_processes

SMOLLM2 = dict(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
               intermediate_size=1536, vocab_size=49152, max_position_embeddings=8192,
               tie_word_embeddings=True)
HEAD, TAIL = 27, 14   # tokens that all prompts begin and end with
TARGET = (2, 8)       # tokens of a target in training


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", help="causal language model; default: SmolLM2-135M's shape, random weights")
    add("--passages", type=int, default=3, help="passages per question")
    add("--passage_tokens", type=int, default=100, help="mean length of a passage")
    add("--spread", type=float, default=0.37,
        help="standard deviation of the lengths of passages, as a share of their mean")
    add("--questions", type=int, nargs="+", default=[1, 8], help="questions per batch")
    add("--answer_tokens", type=int, nargs="+", default=[4, 32], help="tokens per answer")
    add("--rounds", type=int, default=5, help="rounds to show the median of")
    add("--modes", nargs="+", choices=["answer", "train"], default=["answer", "train"],
        help="what to measure")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    return parser.parse_args()


# ---------------------------------------------------------------- prompts

class Batch:
    """Hold the padded inputs of a batch of questions, as the systems take them."""

    def __init__(self, args, num_questions, vocabulary, device, seed):
        frame, rng = random.Random(0), random.Random(seed)
        mu, sigma = lognormal_of(args.passage_tokens, args.spread)

        def draw(count, rng=rng):
            return [rng.randrange(vocabulary) for _ in range(count)]

        head, tail = draw(HEAD, frame), draw(TAIL, frame)
        prompts, joined, targets = [], [], []
        for _ in range(num_questions):
            passages = [draw(max(1, round(rng.lognormvariate(mu, sigma))))
                        for _ in range(args.passages)]
            question = draw(rng.randint(8, 20))
            prompts.append([head + passage + question + tail for passage in passages])
            joined.append([head + sum(passages, []) + question + tail])
            targets.append(torch.tensor(draw(rng.randint(*TARGET))))
        self.inputs = self.pad(prompts, device)
        self.joined = self.pad(joined, device)
        labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        self.labels = labels.to(device)

    def pad(self, prompts, device):
        """Return the reader's inputs of [question][prompt][token] ids, with equal weights."""
        ids, mask = (tensor.to(device) for tensor in pad_prompts(prompts, 0))
        weights = torch.full(mask.shape[:2], -math.log(len(prompts[0])), device=device)
        return {"input_ids": ids, "attention_mask": mask, "log_weights": weights}

    def count_tokens(self):
        """Return how many tokens the prompts have, without padding."""
        return int(self.inputs["attention_mask"].sum())


def make_batches(args, num_questions, vocabulary, device):
    """Return a Batch for each round, and one for the untimed round."""
    return [Batch(args, num_questions, vocabulary, device, seed)
            for seed in range(args.rounds + 1)]


# ---------------------------------------------------------------- systems

def open_models(args, device):
    """Return (transformers' model, our reader) of the same weights, whose answers never end early.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = args.model
        if path is None:
            path = folder
            torch.manual_seed(0)
            LlamaForCausalLM(LlamaConfig(**SMOLLM2)).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        reader = CausalReader.from_pretrained(path)
    if reader.why_padded:
        raise InputError(f"{path}: has {reader.why_padded}, so the reader pads its prompts")
    reader.is_noted = True  # no note about the padded prompts that are measured here
    reader.config.eos_token_id, reader.lm.generation_config.eos_token_id = -1, None
    theirs.generation_config = transformers.GenerationConfig(pad_token_id=0)
    return theirs.to(device).eval(), reader.to(device).eval()


def generate_theirs(model, inputs, num_tokens):
    """Return the ids (B * N, T) of transformers' greedy answers to each prompt of the inputs."""
    ids, mask = (inputs[name].flatten(0, 1) for name in ("input_ids", "attention_mask"))
    answers = model.generate(ids, attention_mask=mask.long(), max_new_tokens=num_tokens,
                             min_new_tokens=num_tokens, do_sample=False)
    return answers[:, ids.shape[1]:]


def generate_ours(reader, inputs, num_tokens, is_packed):
    """Return the ids (B, T) of the reader's answers."""
    reader.why_padded = None if is_packed else "no packed prompts in this system"
    return reader.generate(**inputs, max_length=num_tokens)


def list_systems(theirs, reader, num_tokens):
    """Return {name: a function of a Batch} of what answers questions."""
    return {
        "one prompt": lambda batch: generate_theirs(theirs, batch.joined, num_tokens),
        "a prompt per passage": lambda batch: generate_theirs(theirs, batch.inputs, num_tokens),
        "ours, padded": lambda batch: generate_ours(reader, batch.inputs, num_tokens, False),
        "ours": lambda batch: generate_ours(reader, batch.inputs, num_tokens, True)}


def check_answers(theirs, reader, batch):
    """Raise InputError if packed and padded prompts have different answers, or if the reader's
    answer to a single prompt is not that of transformers.
    """
    answers = [generate_ours(reader, batch.inputs, 8, is_packed) for is_packed in (True, False)]
    alone = [generate_ours(reader, batch.joined, 8, True),
             generate_theirs(theirs, batch.joined, 8)]
    if not torch.equal(*answers) or not torch.equal(*alone):
        raise InputError("the answers differ, so their times cannot be compared")
    print("answers agree", flush=True)


def train_step(reader, batch, is_packed):
    """Compute the loss and the gradients; return the loss."""
    reader.why_padded = None if is_packed else "no packed prompts in this system"
    reader.zero_grad()
    loss, _ = reader(**batch.inputs, labels=batch.labels)
    loss.backward()
    return loss.item()


# ---------------------------------------------------------------- measuring

def measure_answers(args, theirs, reader, device):
    """Print and return rows of (questions per batch, tokens per answer, name, speed, ratio)."""
    rows, vocabulary = [], reader.config.vocab_size
    check_answers(theirs, reader, Batch(args, 2, vocabulary, device, args.rounds + 1))
    for num_questions in args.questions:
        batches = make_batches(args, num_questions, vocabulary, device)
        tokens = sum(batch.count_tokens() for batch in batches[1:]) / args.rounds
        print(f"{args.passages} passages per question, {num_questions} questions per batch, "
              f"{tokens / num_questions:.0f} prompt tokens per question", flush=True)
        for num_tokens in args.answer_tokens:
            systems = list_systems(theirs, reader, num_tokens)
            times = time_rounds(systems, args.rounds,
                                lambda system, index, batches=batches: system(batches[index]))
            for name in systems:
                seconds = sorted(times[name])[args.rounds // 2]
                row = {"mode": "answer", "questions": num_questions, "answer_tokens": num_tokens,
                       "name": name, "seconds_per_question": seconds / num_questions,
                       "tokens_per_second": num_questions * num_tokens / seconds,
                       "ours": ratio(times, name, "ours")}
                rows.append(row)
                print(f"  answers of {num_tokens:2} tokens  {name:20} "
                      f"{row['seconds_per_question']:6.2f} s per question, "
                      f"{row['tokens_per_second']:6.1f} answer tokens per second   ours "
                      f"{row['ours']:.2f}x", flush=True)
    return rows


def measure_training(args, reader, device):
    """Print and return the rows of a training step."""
    rows, vocabulary = [], reader.config.vocab_size
    systems = {"ours, padded": False, "ours": True}
    for num_questions in args.questions:
        batches = make_batches(args, num_questions, vocabulary, device)
        losses = [train_step(reader, batches[0], is_packed) for is_packed in systems.values()]
        if abs(losses[0] - losses[1]) > 1e-3:
            raise InputError(f"the losses differ: {losses}")
        times = time_rounds(systems, args.rounds, lambda is_packed, index, batches=batches:
                            train_step(reader, batches[index], is_packed))
        for name in systems:
            seconds = sorted(times[name])[args.rounds // 2]
            row = {"mode": "train", "questions": num_questions, "name": name,
                   "questions_per_second": num_questions / seconds,
                   "ours": ratio(times, name, "ours")}
            rows.append(row)
            print(f"training step of {num_questions} questions  {name:20} "
                  f"{row['questions_per_second']:6.3f} questions per second   ours "
                  f"{row['ours']:.2f}x", flush=True)
    return rows


def main(args):
    device = start_processes(args.gpus).device
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    machine = describe_machine(device)
    theirs, reader = open_models(args, device)
    rows = []
    if "answer" in args.modes:
        rows += measure_answers(args, theirs, reader, device)
    del theirs
    if "train" in args.modes:
        rows += measure_training(args, reader, device)
    write_report(args.json, machine, rows)


if __name__ == "__main__":
    run_script(main, parse_args())
