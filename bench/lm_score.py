"""Measure how many keys per second lm_score.py's passes score, against padded batches; the systems
take turns in one process.

    python bench/lm_score.py       # GPT-2 small's shape with random weights, 20 keys a question
    python bench/lm_score.py --model MODEL --gpus 0 --questions 200

Texts are random token ids: keys of 100 tokens on average, questions of 8 to 20, answers of 2 to 8,
between the words of a template. Key lengths are log-normal with a standard deviation of 0.37 of
their mean (--spread), like MS MARCO's passages in LLM-Embedder's file for qa, which are in random
order; lengths spread evenly over 60 to 140 would have 0.23. "qa" is LLM-Embedder's template: the
key comes first, so that all texts share only the template's first words. "question first" puts the
question before the keys, so that they share it, too. Nothing is tokenised: all systems get the same
ids.

    LLM-Embedder's way    transformers' model on batches of 8 texts in the order of the file, padded
                          to the longest, with logits and loss at all positions; the model gets the
                          labels and computes its own loss as well
    answer logits only    the same batches, with logits at the answers' positions alone
    ours                  layers.causal.score_answers
"""
import os
import random
import sys
import tempfile

import torch
import torch.nn.functional as F
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
from bench.timing import describe_machine, ratio, time_rounds, write_report
from layers.causal import Text, score_answers
from made_up import lognormal_of
from reader.causal_lm import open_causal_lm
from utils import InputError, Parser, run_script, start_processes

THEIR_BATCH = 8  # texts
KEY_TOKENS = 100
HEADS = {"qa": 3, "question first": 3}  # tokens of the template before its first field
BETWEEN, TAIL = 4, 4  # tokens of the template between the fields, and before the answer


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", help="causal language model; default: GPT-2 small's shape, random weights")
    add("--questions", type=int, default=4, help="questions per round")
    add("--keys", type=int, default=20, help="keys per question")
    add("--spread", type=float, default=0.37,
        help="standard deviation of the lengths of keys, as a share of their mean")
    add("--precisions", nargs="+", choices=["float32", "bf16"], default=["float32", "bf16"],
        help="precisions to compute in")
    add("--rounds", type=int, default=5, help="rounds to show the median of")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    return parser.parse_args()


def make_families(order, args, vocabulary, seed):
    """Return a list of Texts, one per key, for each question.

    order: "qa" or "question first", the template.
    """
    mu, sigma = lognormal_of(KEY_TOKENS, args.spread)
    template = random.Random(0)  # all texts have the same words of the template
    head, between, tail = ([template.randrange(vocabulary) for _ in range(count)]
                           for count in (HEADS[order], BETWEEN, TAIL))
    rng = random.Random(seed)

    def draw(shortest, longest):
        return [rng.randrange(vocabulary) for _ in range(rng.randint(shortest, longest))]

    families = []
    for _ in range(args.questions):
        question, answer = draw(8, 20), draw(2, 8)
        family = []
        for _ in range(args.keys):
            length = max(1, round(rng.lognormvariate(mu, sigma)))
            fields = [draw(length, length), question]
            first, second = fields if order == "qa" else reversed(fields)
            family.append(Text(head + first + between + second + tail, answer))
        families.append(family)
    return families


@torch.inference_mode()
def score_padded_batches(model, families, answers_only):
    """Return the answers' log-likelihoods, from padded batches of THEIR_BATCH texts in order."""
    texts = [text for family in families for text in family]
    scores = []
    for first in range(0, len(texts), THEIR_BATCH):
        part = texts[first:first + THEIR_BATCH]
        longest = max(len(text.prompt) + len(text.answer) for text in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        labels = torch.full_like(ids, -100)
        for row, text in enumerate(part):
            start, end = len(text.prompt), len(text.prompt) + len(text.answer)
            ids[row, :end] = torch.tensor(text.prompt + text.answer)
            mask[row, :end] = 1
            labels[row, start:end] = torch.tensor(text.answer)
        ids, mask, labels = (tensor.to(model.device) for tensor in (ids, mask, labels[:, 1:]))
        losses = torch.zeros(labels.shape, device=model.device)
        if answers_only:
            places = F.pad(labels != -100, (0, 1))                              # (b, L)
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False,
                           logits_to_keep=places).logits                        # (R, V)
            losses[labels != -100] = F.cross_entropy(logits.float(), labels[labels != -100],
                                                     reduction="none")
        else:
            # with labels the model also computes its mean loss, which LLM-Embedder does not use
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False,
                           labels=F.pad(labels, (1, 0), value=-100)).logits
            logits = logits[:, :-1].contiguous()                                # (b, L - 1, V)
            losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            losses = losses.view(labels.shape).float()
        scores += (-losses.sum(1)).tolist()
    return scores


def open_systems(args, dtype, device):
    """Return ({name: a function of families} of one model, the size of its vocabulary)."""
    with tempfile.TemporaryDirectory() as folder:
        path = args.model
        if path is None:
            path = folder
            torch.manual_seed(0)
            GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        ours, reason = open_causal_lm(path, device, dtype)
    if reason:
        raise InputError(f"{path}: has {reason}, so lm_score.py computes it in padded batches")
    systems = {
        "LLM-Embedder's way": lambda families: score_padded_batches(theirs, families, False),
        "answer logits only": lambda families: score_padded_batches(theirs, families, True),
        "ours": lambda families: score_answers(ours, families)}
    return systems, ours.config.vocab_size


def check_agreement(systems, families, tolerance):
    """Raise InputError if the systems' scores differ."""
    scores = {name: torch.tensor(system(families)) for name, system in systems.items()}
    for name, values in scores.items():
        difference = (values - scores["ours"]).abs().max().item()
        if difference > tolerance:
            raise InputError(f"{name} differs from ours by {difference}")


def measure(args, device):
    """Print and return rows of (precision, template, name, keys per second, ratio)."""
    rows = []
    num_keys = args.questions * args.keys
    for precision in args.precisions:
        dtype = torch.float32 if precision == "float32" else torch.bfloat16
        systems, vocabulary = open_systems(args, dtype, device)
        for order in HEADS:
            rounds = [make_families(order, args, vocabulary, seed)
                      for seed in range(args.rounds + 1)]
            check_agreement(systems, rounds[0][:1], 1e-2 if precision == "float32" else 2)
            times = time_rounds(systems, args.rounds,
                                lambda system, index, rounds=rounds: system(rounds[index]))
            for name in systems:
                rate = num_keys / sorted(times[name])[len(times[name]) // 2]
                row = {"precision": precision, "template": order, "name": name,
                       "keys_per_second": rate, "ours": ratio(times, name, "ours")}
                rows.append(row)
                print(f"{precision:8} {order:15} {name:20} {rate:8.1f} keys per second   ours "
                      f"{row['ours']:.2f}x", flush=True)
    return rows


def main(args):
    device = start_processes(args.gpus).device
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    machine = describe_machine(device)
    rows = measure(args, device)
    write_report(args.json, machine, rows)


if __name__ == "__main__":
    run_script(main, parse_args())
