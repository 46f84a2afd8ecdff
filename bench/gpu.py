"""Measure the reader and the retriever on a GPU in one command of at most eight minutes.

    python bench/gpu.py --gpus 0                     # t5-base, 100 contexts, batch 2, bfloat16
    python bench/gpu.py --gpus 0 --seconds 240 --rounds 3
    python bench/gpu.py --shape small --contexts 2 --rounds 1      # the same parts on a CPU

Each part has a time limit of its own, and a part that fails or takes too long is reported and
skipped. Every line is also appended to --output as soon as it is known, and every figure to
--output with the ending .jsonl, so that nothing is lost if the machine is taken away. The parts:

    machine      who else uses the GPU, its peak in matrix products and its bandwidth
    numbers      loss and gradients against plain_fid, plain and compiled; bfloat16's errors
    attention    the attention of one layer with rows aligned to 8, 16 and 32
    readers      training and evaluation: padded SDPA, the same compiled, ours, ours not compiled
    profile      kernels, launches, and the share of the time that the GPU is busy
    encoding     passages by a BERT-base encoder, padded and packed
    settings     activation checkpointing, twice the batch, 20 contexts

Shares are of the peak that the same command measured.
"""
import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import suppress

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import BertConfig, BertModel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from bench.reader import (
    BASELINE,
    COMPILED,
    NOT_COMPILED,
    Cell,
    gpu_peak,
    inputs_of,
    make_batch,
    make_reader,
    matmul_peak,
    replaced,
    run_once,
    useful_flops,
)
from bench.timing import time_calls, time_limit
from dense.text_encoder import TextEncoder
from layers import regions
from layers.packed_attention import make_groups, packed_attention
from layers.packing import pack_texts
from training.t5_folder import plain_key
from utils import Parser, first_line, run_script, start_processes

# {part: the most seconds it may take out of 480}
LIMITS = {"machine": 20, "numbers": 70, "attention": 30, "readers": 180, "profile": 40,
          "encoding": 60, "settings": 80}


class Report:
    """Print lines and figures, and append them to two files at once."""

    def __init__(self, path):
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        self.lines, self.rows = path, os.path.splitext(path)[0] + ".jsonl"

    def line(self, text):
        print(text, flush=True)
        with open(self.lines, "a") as file:
            file.write(text + "\n")

    def row(self, part, **figures):
        with open(self.rows, "a") as file:
            file.write(json.dumps({"part": part, **figures}) + "\n")


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--shape", choices=["small", "base", "large"], default="base", help="T5's shape")
    add("--contexts", type=int, default=100, help="contexts per question")
    add("--batch_size", type=int, default=2, help="questions per batch")
    add("--rounds", type=int, default=7, help="batches per reader, to show the median of")
    add("--parts", nargs="+", choices=LIMITS, default=list(LIMITS), help="parts to run")
    add("--seconds", type=int, default=480, help="time for everything; parts get their share of it")
    add("--output", default="out/gpu.txt", help="file of the lines; the figures are next to it")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    args = parser.parse_args()
    # what make_reader and make_batch of bench/reader.py read
    args.passage_tokens, args.dropout, args.use_checkpoint = None, 0.1, False
    return args


def precision_of(device):
    """Return what to measure in: bfloat16 is slow on many CPUs."""
    return "bfloat16" if device.type == "cuda" else "float32"


def share_of_peak(work, seconds, found):
    """Return the share of the measured peak at which so many operations took these seconds."""
    return work / seconds / found["peak"] if "peak" in found else math.nan


# ---------------------------------------------------------------- the parts

def measure_machine(args, report, device, found):
    """Report who else uses the GPU, the peak of matrix products, and the bandwidth of copies."""
    name = f"{platform.machine()} cpu"
    if device.type == "cuda":
        name = torch.cuda.get_device_name()
        with suppress(OSError, subprocess.SubprocessError):
            query = "memory.used,memory.total,utilization.gpu,clocks.sm,power.draw"
            use = subprocess.run(["nvidia-smi", f"--query-gpu={query}", "--format=csv"],
                                 capture_output=True, text=True, timeout=10).stdout
            report.line(f"before the first kernel: {' '.join(use.split())}")
    report.line(f"{time.strftime('%Y-%m-%d %H:%M')}, {name}, torch {torch.__version__}, "
                f"transformers {transformers.__version__}")
    dtype = getattr(torch, precision_of(device))
    peak = matmul_peak(device, dtype)
    a = torch.empty(2 ** (28 if device.type == "cuda" else 24), device=device)
    b = torch.empty_like(a)
    seconds = time_calls(lambda: b.copy_(a), device, 5)
    bandwidth = 2 * a.numel() * a.element_size() / seconds
    found["peak"] = peak
    report.line(f"peak in {dtype} {peak / 1e12:.1f} TFLOP/s, copies {bandwidth / 1e9:,.0f} GB/s "
                "(an H100 or H200 below 700 TFLOP/s is shared: mark the figures)")
    report.row("machine", name=name, peak=peak, bandwidth=bandwidth, torch=torch.__version__)


def check_numbers(args, report, device, found):
    """Report the differences of loss and gradients from the padded reader's, and bfloat16's errors.

    If the compiled reader is wrong or fails, turn compilation off for the other parts.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    batch = make_batch(args, 3, 0)
    exact = gradients_of(make_reader(BASELINE, "small", args, device), batch)
    for name in (NOT_COMPILED, "ours"):
        gradients = gradients_of(make_reader(name, "small", args, device), batch)
        worst = worst_error(gradients, exact)
        report.line(f"float32, {name}: largest error of a gradient {worst:.1e} of its norm")
        report.row("numbers", reader=name, precision="float32", worst=worst)
        if name == "ours" and worst > 1e-3:
            report.line("the compiled reader is wrong here; the other parts run without it")
            regions.compile_on_gpu(False)
    for name in (BASELINE, "ours") if device.type == "cuda" else ():
        rounded = gradients_of(make_reader(name, "small", args, device), batch, bf16=True)
        worst = worst_error(rounded, exact)
        report.line(f"bfloat16, {name}: largest error of a gradient {worst:.1e} of its norm")
        report.row("numbers", reader=name, precision="bfloat16", worst=worst)
    for length in (64, 192):
        args.passage_tokens = length
        reader = make_reader("ours", "small", args, device)
        gradients = gradients_of(reader, make_batch(args, 3, 0), device.type == "cuda")
        args.passage_tokens = None
        are_finite = all(gradient.isfinite().all() for gradient in gradients.values())
        report.line(f"passages of {length} tokens: gradients finite: {are_finite}")


def gradients_of(reader, batch, bf16=False):
    """Return {T5's name of a weight: gradient} of the loss without dropout."""
    reader.t5.eval().zero_grad()
    passages, labels = inputs_of(reader, batch)
    with torch.autocast(labels.device.type, torch.bfloat16, enabled=bf16), replaced(reader):
        loss = reader.loss(passages, labels)
        loss.backward()
    t5 = getattr(reader.t5, "t5", reader.t5)
    return {plain_key(name): weight.grad
            for name, weight in t5.named_parameters() if weight.grad is not None}


def worst_error(gradients, exact):
    """Return the largest relative error of a gradient by its norm."""
    if gradients.keys() != exact.keys():
        raise ValueError(f"gradients of {sorted(gradients.keys() ^ exact.keys())[:3]} are missing")
    return max(float((gradients[name] - want).norm() / want.norm().clamp(min=1e-12))
               for name, want in exact.items())


def measure_attention(args, report, device, found):
    """Report the seconds of the attention of one layer, forward and backward, by alignment."""
    reader = make_reader("ours", args.shape, args, device)
    config = reader.t5.config
    lengths = make_batch(args, args.contexts, 0)[1].sum(2).flatten().tolist()
    heads, width = config.num_heads, config.d_kv
    dtype = getattr(torch, precision_of(device))
    for align in (8, 16, 32):
        packed = pack_texts([[5] * length for length in lengths], 0, device.type, align)
        bias = torch.randn(heads, 256, 256, device=device, requires_grad=True)
        qkv = torch.randn(len(packed.ids), 3, heads, width, device=device, dtype=dtype,
                          requires_grad=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            groups = make_groups(packed.shapes, packed.is_real.to(device), bias)
        groups = [group._replace(bias=group.bias.detach().requires_grad_()) for group in groups]

        def step(qkv=qkv, groups=groups):
            packed_attention(qkv, groups, args.dropout).sum().backward()
        seconds = time_calls(step, device, args.rounds)
        report.line(f"attention of a layer, rows aligned to {align}: {1000 * seconds:.2f} ms, "
                    f"{len(groups)} groups, {len(packed.ids)} rows of {sum(lengths)} tokens")
        report.row("attention", align=align, seconds=seconds, groups=len(groups))


def measure_readers(args, report, device, found):
    """Report the speed and memory of all readers, in turns, in training and evaluation."""
    names = [BASELINE, "ours"]
    if device.type == "cuda":
        names += [COMPILED, NOT_COMPILED]
    for mode in ("train", "eval"):
        compare_readers(args, report, device, found, names, mode)


def compare_readers(args, report, device, found, names, mode, note=""):
    """Report a row for each reader of `names`."""
    precision = precision_of(device)
    cell = Cell(args.shape, args.contexts, mode, precision)
    readers, times, memory = {}, {}, {}
    batches = [make_batch(args, args.contexts, seed) for seed in range(args.rounds)]
    for name in names:
        reader = make_reader(name, args.shape, args, device)
        try:
            for batch in (make_batch(args, args.contexts, 1000), batches[0]):
                run_once(reader, batch, mode, precision)
            memory[name] = gpu_peak(reader, batches[0], cell) if device.type == "cuda" else math.nan
            readers[name], times[name] = reader, []
        except (RuntimeError, torch.OutOfMemoryError) as error:
            report.line(f"{mode} {name}: {first_line(error)}")
    for batch in batches:
        for name, reader in readers.items():
            times[name].append(run_once(reader, batch, mode, precision))
    for name, seconds in times.items():
        work = statistics.mean(useful_flops(args.shape, mask, mode) for _, mask, _ in batches)
        median = statistics.median(seconds)
        share = share_of_peak(work, median, found)
        ratios = {other: statistics.median(a / b for a, b in zip(times[other], seconds))
                  for other in times if other != name}
        against = ", ".join(f"{value:.2f}x {other}" for other, value in ratios.items())
        report.line(f"{' '.join(map(str, cell))} batch {args.batch_size}{note} {name}: "
                    f"{1000 * median:.1f} ms, {args.batch_size / median:.2f} questions/s, "
                    f"{100 * share:.1f} % of the peak, {memory[name] / 2 ** 20:,.0f} MiB"
                    + (f"; {against}" if against else ""))
        report.row("readers", **cell._asdict(), reader=name, batch_size=args.batch_size, note=note,
                   seconds=seconds, share=share, memory=memory[name], ratios=ratios)


def measure_profile(args, report, device, found):
    """Report the kernels of two training steps of the padded reader and of ours."""
    precision = precision_of(device)
    batch = make_batch(args, args.contexts, 0)
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for name in (BASELINE, "ours"):
        reader = make_reader(name, args.shape, args, device)
        run_once(reader, batch, "train", precision)
        run_once(reader, batch, "train", precision)
        with profile(activities=activities) as profiler:
            seconds = sum(run_once(reader, batch, "train", precision) for _ in range(2))
        key = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        events = [event for event in profiler.key_averages()
                  if device.type == "cpu" or event.device_type == torch.autograd.DeviceType.CUDA]
        busy = sum(getattr(event, key) for event in events) / 1e6
        launches = sum(event.count for event in events)
        report.line(f"profile of two steps, {name}: {1000 * seconds:.1f} ms, {launches} kernels, "
                    f"the device is busy for {100 * busy / seconds:.0f} % of the time")
        for event in sorted(events, key=lambda event: -getattr(event, key))[:25]:
            report.line(f"    {getattr(event, key) / 1000:9.2f} ms {event.count:6d} x "
                        f"{event.key[:90]}")
        report.row("profile", reader=name, seconds=seconds, kernels=launches, busy=busy)


def measure_encoding(args, report, device, found):
    """Report how many passages a second a BERT-base encoder with random weights encodes."""
    torch.manual_seed(0)
    layers = 12 if device.type == "cuda" else 2
    config = BertConfig(num_hidden_layers=layers, attn_implementation="sdpa")
    encoder = TextEncoder(BertModel(config), "mean").to(device).eval()
    count = 2000 if device.type == "cuda" else 20
    lengths = torch.randint(100, 241, (count,)).tolist()
    texts = [torch.randint(1000, 30000, (length,)).tolist() for length in lengths]
    order = sorted(range(count), key=lambda i: -lengths[i])
    batches = [order[first:first + 128] for first in range(0, count, 128)]

    @torch.no_grad()
    def encode_padded():
        for batch in batches:  # sorted by length, as sentence-transformers does
            rows = [torch.tensor(texts[i]) for i in batch]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
            mask = (ids > 0).long()
            states = encoder.model(input_ids=ids, attention_mask=mask).last_hidden_state
            (states * mask[..., None]).sum(1)

    @torch.no_grad()
    def encode_packed():
        encoder(texts, "key")
    work = sum(layers * (24 * 768 ** 2 * length + 4 * 768 * length ** 2) for length in lengths)
    for name, call in (("padded", encode_padded), ("ours", encode_packed)):
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            seconds = time_calls(call, device, 3)
        share = share_of_peak(work, seconds, found)
        report.line(f"encoding, BERT-base, {name}: {count / seconds:,.0f} passages/s, "
                    f"{100 * share:.1f} % of the peak")
        report.row("encoding", name=name, passages_per_second=count / seconds, share=share)


def measure_settings(args, report, device, found):
    """Report training with activation checkpointing, with twice the batch, and on 20 contexts."""
    names = [BASELINE, "ours"]
    for note, changes in ((" --use_checkpoint", {"use_checkpoint": True}),
                          ("", {"contexts": min(20, args.contexts)}),
                          ("", {"batch_size": 2 * args.batch_size})):
        changed = argparse.Namespace(**vars(args) | changes)
        changed.rounds = min(args.rounds, 3)
        compare_readers(changed, report, device, found, names, "train", note)


PARTS = {"machine": measure_machine, "numbers": check_numbers, "attention": measure_attention,
         "readers": measure_readers, "profile": measure_profile, "encoding": measure_encoding,
         "settings": measure_settings}


def main(args):
    device = start_processes(args.gpus).device
    regions.compile_on_gpu(True)
    report, found = Report(args.output), {}
    begin = time.time()
    for name in args.parts:
        start = time.time()
        left = begin + args.seconds - start
        limit = min(LIMITS[name] * args.seconds / sum(LIMITS.values()), left)
        try:
            if left < 1:
                raise TimeoutError("no time is left")
            with time_limit(limit):
                PARTS[name](args, report, device, found)
        # a part that fails must not end the others: the machine may not come back
        except Exception as error:
            report.line(f"{name}: {type(error).__name__}: {str(error).strip()[:300]}")
        report.line(f"-- {name}: {time.time() - start:.0f} s")
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    run_script(main, parse_args())
