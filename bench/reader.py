"""Measure speed and memory of our reader against the plain padded one, in turns in one process.

    python bench/reader.py            # t5-small's shape, 20 and 100 contexts, float32 and bfloat16
    python bench/reader.py --contexts 10 20 50 100 --json bench.json --picture docs/reader.svg
    python bench/reader.py --gpus 0 --shapes base large --contexts 100 --batch_size 4
    python bench/reader.py --contexts 10 --modes train --readers ours "torch's dropout" \
        "plain cross-attention"      # what the two tricks gain
    python bench/reader.py --gpus 0 --shapes base --batch_size 2 --contexts 100 \
        --readers "padded SDPA" "padded SDPA, compiled" ours "ours, not compiled"

Texts are random: a question has N passages of 170 tokens on average (100 to 240, max_length 250)
and a target of 6 tokens. A training step is the forward and backward pass of a micro-batch;
evaluation encodes and decodes 8 greedy tokens. All readers run the same batches. The packing, which
the loader's workers do in a run, is not in the times; the last lines print it.
"""
import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from bench.timing import describe_machine, wait_for
from data import Collator, pack_padded
from layers import packed_attention, regions
from layers import t5 as layers
from layers.dropout import dropout
from model import FiDT5
from training.checkpoints import load_tokenizer
from utils import (
    InputError,
    Parser,
    copy_to_device,
    progress_bar,
    run_script,
    start_processes,
)

SHAPES = {"small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
          "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
          "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}}
VOCABULARY, D_KV = 32128, 64      # the same for every shape
READERS = ("padded eager", "padded SDPA", "ours")
COMPILED, NOT_COMPILED = "padded SDPA, compiled", "ours, not compiled"
# our reader with one trick replaced by the plain form: [(module, name, replacement)]
ABLATIONS = {"torch's dropout": [(layers, "dropout", F.dropout),
                                 (packed_attention, "dropout", F.dropout)],
             "plain cross-attention": [(layers, "cross_attention", layers.plain_cross_attention)],
             NOT_COMPILED: [(regions, "IS_COMPILED", {"cpu": False, "cuda": False})]}
BASELINE = "padded SDPA"          # the reader that our ratios compare with
MAX_LENGTH, TARGET, GENERATED = 250, 6, 8  # tokens: most of a passage, of a target, of an answer


class Cell(NamedTuple):
    """Hold the settings that a row of the table is measured for."""
    shape: str
    contexts: int
    mode: str
    precision: str


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["small"], help="T5 shapes")
    add("--contexts", type=int, nargs="+", default=[20, 100], metavar="N",
        help="contexts per question")
    add("--batch_size", type=int, default=1, help="questions per batch")
    add("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"],
        help="bfloat16 is autocast")
    add("--modes", nargs="+", choices=["train", "eval"], default=["train", "eval"],
        help="what to time")
    add("--readers", nargs="+", choices=[*READERS, COMPILED, *ABLATIONS], default=list(READERS),
        help=f"readers to run; ratios are against {BASELINE}, for the last {len(ABLATIONS)} ours "
        "against theirs")
    add("--use_checkpoint", action="store_true",
        help="recompute activations in the backward pass (all readers)")
    add("--passage_tokens", type=int, help="tokens of every passage; default: 100 to 240")
    add("--dropout", type=float, default=0.1, help="dropout rate in training")
    add("--rounds", type=int, default=3, help="batches per cell, to show the median of")
    add("--no_memory", action="store_true",
        help="leave out the peak memory (on a CPU, a process per cell and reader)")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add("--picture", metavar="FILE",
        help="draw questions per second and memory against contexts (needs matplotlib)")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    add("--peak_of", help=argparse.SUPPRESS)  # given to the process that measures one cell's memory
    return parser.parse_args()


# ---------------------------------------------------------------- batches

def make_batch(args, num_contexts, seed):
    """Return (input_ids (B, N, L), attention_mask (B, N, L) bool, labels (B, T)), random tokens on
    the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(100, 241, (args.batch_size, num_contexts), generator=generator)
    if args.passage_tokens:
        lengths[:] = args.passage_tokens
    L = max(MAX_LENGTH, args.passage_tokens or 0)
    mask = torch.arange(L) < lengths[..., None]  # (B, N, L)
    ids = torch.randint(3, 32000, mask.shape, generator=generator) * mask
    labels = torch.randint(3, 32000, (args.batch_size, TARGET), generator=generator)
    return ids, mask, labels


# ---------------------------------------------------------------- readers

class Padded:
    """Run the plain reader: transformers' T5 over passages padded to max_length, as in FiD."""
    replacements = ()

    def __init__(self, t5, use_checkpoint, attention, compiled=False):
        self.t5 = t5
        self.t5.set_attn_implementation(attention)
        self.encoder, self.train_decoder = t5.encoder, t5
        if compiled:
            self.encoder, self.train_decoder = torch.compile(t5.encoder), torch.compile(t5)
        self.t5.generation_config.eos_token_id = None  # no answer ends early
        if use_checkpoint:
            self.t5.encoder.gradient_checkpointing_enable()

    def prepare(self, ids, mask):
        """Return the passages as this reader gets them, on the CPU."""
        return {"ids": ids, "mask": mask}

    def encode(self, passages):
        """Return the decoder's input: the states of all passages of a question, concatenated."""
        ids, mask = passages["ids"], passages["mask"]
        B, N, L = ids.shape
        ids, mask = ids.view(B * N, L), mask.view(B * N, L)    # (B, N, L) -> (B * N, L)
        states = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        states = states.view(B, N * L, -1)                     # (B * N, L, D) -> (B, N * L, D)
        return {"encoder_outputs": BaseModelOutput(states), "attention_mask": mask.view(B, N * L)}

    def loss(self, passages, labels):
        return self.train_decoder(**self.encode(passages), labels=labels).loss

    @torch.no_grad()
    def generate(self, passages):
        return self.t5.generate(**self.encode(passages), max_new_tokens=GENERATED, do_sample=False)


class Ours:
    """Run FiDT5 by the methods of Padded; ABLATIONS has the replacements."""

    def __init__(self, t5, use_checkpoint, replacements=()):
        self.replacements = replacements
        self.t5 = FiDT5(t5)
        self.t5.set_checkpoint(use_checkpoint)
        self.t5.config.eos_token_id = -1  # no answer ends early

    def prepare(self, ids, mask):
        return pack_padded(ids, mask, self.t5.t5.device.type)

    def loss(self, passages, labels):
        return self.t5(passages, labels)[0]

    def generate(self, passages):
        return self.t5.generate(passages, 1 + GENERATED)


def make_reader(name, shape, args, device):
    """Return a reader of this name and shape; all have the same random weights."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=VOCABULARY, d_kv=D_KV, decoder_start_token_id=0,
                      dropout_rate=args.dropout, **SHAPES[shape])
    t5 = T5ForConditionalGeneration(config).to(device)
    if name == "ours" or name in ABLATIONS:
        return Ours(t5, args.use_checkpoint, ABLATIONS.get(name, ()))
    attention = "eager" if name == "padded eager" else "sdpa"
    return Padded(t5, args.use_checkpoint, attention, name == COMPILED)


def check_losses(readers, batch):
    """Return a line with the differences of the readers' losses and gradients, without dropout.

    Raises InputError if they disagree.
    """
    losses, gradients = [], []
    for reader in readers.values():
        reader.t5.eval().zero_grad()
        loss = reader.loss(*inputs_of(reader, batch))
        loss.backward()
        losses.append(loss.item())
        gradients.append(value_gradient(reader.t5))
    loss_difference = max(losses) - min(losses)
    first = gradients[0]
    gradient_difference = max(float((g - first).norm() / first.norm()) for g in gradients)
    if loss_difference > 1e-4 or gradient_difference > 1e-3:
        raise InputError(f"the readers disagree, losses {dict(zip(readers, losses))}, gradients by "
                         f"{gradient_difference}; their times cannot be compared")
    return (f"losses agree to {loss_difference:.0e}, "
            f"the first value projection's gradients to {gradient_difference:.0e}")


def value_gradient(t5):
    """Return the gradient of the encoder's first value projection."""
    for name, parameter in t5.named_parameters():
        if name.endswith("SelfAttention.v.weight"):
            return parameter.grad


# ---------------------------------------------------------------- time

def run_once(reader, batch, mode, precision):
    """Run one training step or one evaluation; return its seconds."""
    passages, labels = inputs_of(reader, batch)
    device = labels.device
    reader.t5.train(mode == "train").zero_grad(set_to_none=True)
    with replaced(reader):
        wait_for(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            if mode == "train":
                loss = reader.loss(passages, labels)
            else:
                reader.generate(passages)
        if mode == "train":
            loss.backward()
        wait_for(device)
        return time.perf_counter() - start


@contextmanager
def replaced(reader):
    """Apply the replacements of a reader; see ABLATIONS."""
    with ExitStack() as stack:
        for module, name, replacement in reader.replacements:
            stack.enter_context(mock.patch.object(module, name, replacement))
        yield


def inputs_of(reader, batch):
    """Return (passages, labels) of a batch on the reader's device."""
    ids, mask, labels = batch
    device = next(reader.t5.parameters()).device
    return copy_to_device((reader.prepare(ids, mask), labels), device)


def useful_flops(shape, mask, mode):
    """Return the floating-point operations that the real tokens need.

    A multiplication counts 2 (its addition too), a backward pass twice its forward pass.
    """
    D, ff = SHAPES[shape]["d_model"], SHAPES[shape]["d_ff"]
    layers, heads = SHAPES[shape]["num_layers"], SHAPES[shape]["num_heads"]
    inner = D_KV * heads
    lengths = mask.sum(2).double().cpu()                # (B, N)
    tokens = float(lengths.sum())
    pairs = float(lengths.square().sum())               # a token attends to its passage
    steps = TARGET if mode == "train" else GENERATED    # the decoder's, per question

    # weights per token: q, k, v, o and two in the feed-forward part; the decoder has two attentions
    encoder_linear = 2 * (4 * D * inner + 2 * D * ff)
    decoder_linear = 2 * (8 * D * inner + 2 * D * ff)
    encoder = layers * (encoder_linear * tokens + 4 * inner * pairs)
    # folded: each head's query meets the encoder's states (D wide), without keys and values
    cross_attention = layers * 4 * heads * D * steps * tokens
    decoder_layers = layers * decoder_linear * steps * len(mask)
    vocabulary = 2 * D * VOCABULARY * steps * len(mask)
    forward = encoder + cross_attention + decoder_layers + vocabulary
    return 3 * forward if mode == "train" else forward


def matmul_peak(device, dtype):
    """Return the floating-point operations per second of the best of some matrix products."""
    size = 2048 if device.type == "cpu" else 8192
    best = 0.0
    for m, k, n in ((size, size, size), (2 * size, size // 4, size), (2 * size, size, size // 4)):
        a = torch.randn(m, k, device=device, dtype=dtype)
        b = torch.randn(n, k, device=device, dtype=dtype)
        for _ in range(10):
            start = time.perf_counter()
            product = a @ b.t()
            product.view(-1)[0].item()  # waits for the product
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def pipeline_seconds(num_contexts):
    """Return the seconds to format, tokenise and pack a question with passages of 170 tokens."""
    tokenizer = load_tokenizer(os.path.join(ROOT, "toy", "t5-tiny"), "")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, len(tokenizer), (num_contexts, 140), generator=generator)
    contexts = [{"title": "A title", "text": text} for text in tokenizer.batch_decode(ids)]
    record = {"question": "who wrote it", "ctxs": contexts}
    collator = Collator(tokenizer, num_contexts, MAX_LENGTH)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        counts = collator([(0, record, "an answer")])["inputs"]["passages"].counts
        seconds = time.perf_counter() - start
        mean_tokens = int(counts.sum()) / num_contexts
        times.append(seconds * 170 / mean_tokens)
    return statistics.median(times)


def dropout_costs(device):
    """Return the nanoseconds of one unit's dropout, forward: (torch's, layers/dropout.py's)."""
    x = torch.randn(4096, 2048, device=device)
    times = {F.dropout: [], dropout: []}
    for _ in range(5):
        for function, seconds in times.items():
            start = time.perf_counter()
            function(x, 0.1)[0, 0].item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return [1e9 * statistics.median(seconds) / x.numel() for seconds in times.values()]


# ---------------------------------------------------------------- memory

def peak_memory(args, name, cell, device):
    """Return the bytes above the weights at the peak of one step.

    On a CPU it is the resident set, measured in a process of its own.
    """
    if device.type == "cuda":
        reader = make_reader(name, cell.shape, args, device)
        return gpu_peak(reader, make_batch(args, cell.contexts, 0), cell)
    flags = ["--peak_of", name, "--shapes", cell.shape, "--contexts", cell.contexts,
             "--modes", cell.mode, "--precisions", cell.precision,
             "--batch_size", args.batch_size, "--dropout", args.dropout]
    if args.use_checkpoint:
        flags.append("--use_checkpoint")
    if args.passage_tokens:
        flags += ["--passage_tokens", args.passage_tokens]
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # that process needs the memory that this one has freed
    process = subprocess.run([sys.executable, __file__, *map(str, flags)],
                             capture_output=True, text=True)
    if process.returncode:
        raise InputError(f"measuring the memory of {name} failed (killed because memory ran out?): "
                         f"{process.stderr.strip()[-200:]}")
    return int(process.stdout.split()[-1])


def gpu_peak(reader, batch, cell):
    """Return the bytes of the GPU above those in use before, at the peak of one step."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run_once(reader, batch, cell.mode, cell.precision)
    return torch.cuda.max_memory_allocated() - before


def print_peak(args, device):
    """Print the bytes that peak_memory reads, in its process."""
    reader = make_reader(args.peak_of, args.shapes[0], args, device)
    batch = make_batch(args, args.contexts[0], 0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets the peak
    before = resident("VmRSS")
    run_once(reader, batch, args.modes[0], args.precisions[0])
    print(resident("VmHWM") - before)


def resident(field):
    """Return the bytes of this process's memory now (VmRSS) or at its peak (VmHWM)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return 1024 * int(line.split()[1])


# ---------------------------------------------------------------- table

def measure(args, device):
    """Return ([row] of all cells and readers, {precision: peak of matrix products})."""
    peaks = {}
    for precision in args.precisions:
        peaks[precision] = matmul_peak(device, getattr(torch, precision))
    peak_texts = [f"{precision} {peak / 1e9:,.0f} GFLOP/s" for precision, peak in peaks.items()]
    print("measured matmul peak: " + ", ".join(peak_texts), flush=True)
    rows = []
    for shape in args.shapes:
        readers = {name: make_reader(name, shape, args, device) for name in args.readers}
        plain = {name: reader for name, reader in readers.items() if name != COMPILED}
        agreement = check_losses(plain, make_batch(args, 3, 0))
        print(f"{shape}: without dropout, float32, {agreement}", flush=True)
        cells = [Cell(shape, num_contexts, mode, precision) for num_contexts in args.contexts
                 for mode in args.modes for precision in args.precisions]
        for cell in cells:
            for row in measure_cell(args, readers, cell, peaks[cell.precision], device):
                rows.append(row)
                print_row(row)
    return rows, peaks


def measure_cell(args, readers, cell, peak, device):
    """Yield one cell's row of every reader; the readers take turns on each batch."""
    for reader in readers.values():  # warm up on a small batch
        run_once(reader, make_batch(args, 4, 0), cell.mode, cell.precision)
    batches = [make_batch(args, cell.contexts, seed) for seed in range(args.rounds)]
    times = {name: [] for name in readers}
    for batch in progress_bar(batches, desc=" ".join(map(str, cell))):
        for name, reader in readers.items():
            times[name].append(run_once(reader, batch, cell.mode, cell.precision))

    work = statistics.mean(useful_flops(cell.shape, mask, cell.mode) for _, mask, _ in batches)
    tokens = statistics.mean(int(mask.sum()) for _, mask, _ in batches)
    baseline_memory = None
    for name in readers:
        seconds = statistics.median(times[name])
        memory = None if args.no_memory else peak_memory(args, name, cell, device)
        row = cell._asdict() | {"reader": name, "seconds": seconds,
                                "questions_per_second": args.batch_size / seconds,
                                "tokens_per_second": tokens / seconds,
                                "share_of_peak": work / seconds / peak,
                                "memory": memory}
        if name == BASELINE:
            baseline_memory = memory
        if name == "ours" and BASELINE in readers:
            row["speed_ratio"] = statistics.median(
                theirs / ours for theirs, ours in zip(times[BASELINE], times["ours"]))
            if baseline_memory is not None:
                row["memory_ratio"] = memory / baseline_memory
        if name in ABLATIONS and "ours" in readers:
            row["gain"] = statistics.median(
                plain / ours for plain, ours in zip(times[name], times["ours"]))
        yield row


def print_row(row):
    line = (f"{row['shape']:6} {row['contexts']:5d} {row['mode']:5} {row['precision']:8} "
            f"{row['reader']:21} {row['questions_per_second']:8.3f} questions/s "
            f"{row['tokens_per_second']:9.0f} tokens/s {100 * row['share_of_peak']:5.1f} % ")
    if row["memory"] is not None:
        line += f"{row['memory'] / 2 ** 20:8.0f} MiB"
    if "speed_ratio" in row:
        line += f"  {row['speed_ratio']:.2f}x"
    if "gain" in row:
        line += f"  ours is {row['gain']:.2f}x as fast"
    if "memory_ratio" in row:
        line += f", memory {row['memory_ratio']:.2f}x"
    print(line, flush=True)


# ---------------------------------------------------------------- picture

def draw(rows, path):
    """Draw questions per second and peak memory against contexts: training, first shape."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    chosen = [row for row in rows if row["mode"] == "train" and row["shape"] == rows[0]["shape"]
              and row["reader"] != "padded eager"]
    figure, (speed_axis, memory_axis) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    draw_lines(speed_axis, chosen, "questions_per_second", 1, "training, questions per second")
    draw_lines(memory_axis, chosen, "memory", 2 ** -30, "peak memory above weights, GiB")
    speed_axis.legend(frameon=False, fontsize=8)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def draw_lines(axis, rows, key, scale, title):
    """Draw row[key] * scale against contexts, a line per reader and precision."""
    lines = {(row["reader"], row["precision"]) for row in rows}
    for reader, precision in sorted(lines, reverse=True):
        points = [row for row in rows if row["reader"] == reader
                  and row["precision"] == precision and row[key] is not None]
        color = "C3" if reader == "ours" else "C0"
        style = "-" if precision == "float32" else "--"
        axis.plot([row["contexts"] for row in points], [row[key] * scale for row in points],
                  marker="o", label=f"{reader}, {precision}", color=color, linestyle=style)
    ticks = sorted({row["contexts"] for row in rows})
    axis.set(xscale="log", yscale="log", xlabel="contexts", title=title)
    axis.set_xticks(ticks, map(str, ticks))
    axis.minorticks_off()
    axis.grid(alpha=0.3)


# ---------------------------------------------------------------- main

def main(args):
    device = start_processes(args.gpus).device
    if args.peak_of:
        print_peak(args, device)
        return
    if min(args.contexts) < 1 or args.rounds < 1 or args.batch_size < 1:
        raise InputError("--contexts, --rounds and --batch_size must be >= 1")
    machine = describe_machine(device, python=platform.python_version())
    regions.compile_on_gpu(True)
    rows, peaks = measure(args, device)
    for row in rows:
        if row["reader"] == "ours" and row["mode"] == "train":
            seconds = pipeline_seconds(row["contexts"]) * args.batch_size
            print(f"input pipeline, {row['contexts']} contexts: {1000 * seconds:.1f} ms per step, "
                  f"{100 * seconds / row['seconds']:.1f} % of ours in {row['precision']}")
    theirs, ours = dropout_costs(device)
    print(f"dropout of a float32 unit: torch {theirs:.2f} ns, ours {ours:.2f} ns")
    if args.json:
        with open(args.json, "w") as file:
            content = {"machine": machine, "flags": vars(args), "matmul_peak": peaks, "rows": rows}
            json.dump(content, file, indent=1)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    run_script(main, parse_args())
