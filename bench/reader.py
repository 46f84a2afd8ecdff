"""Speed and memory of our reader against the plain padded one, alternating in one process, on random text.

    python bench/reader.py                                     # t5-small shape, 20 and 100 contexts, float32 and bfloat16
    python bench/reader.py --contexts 10 20 50 100 --json bench.json --picture docs/reader.svg
    python bench/reader.py --gpus 0 --shapes base large --contexts 100 --batch_size 4

A question has N passages of 170 tokens on average (100 to 240, max_length 250) and a target of 6 tokens. A training step is the
forward and backward pass of a micro-batch; evaluation encodes and decodes 8 greedy tokens. Both readers run the same batches.
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

import torch
import torch.nn.functional as F
import transformers
from tqdm import tqdm
from transformers import T5Config, T5ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from checkpoints import load_tokenizer  # noqa: E402
from data import Collator  # noqa: E402
from dropout import drop_, keep_mask  # noqa: E402
from model import FiDT5  # noqa: E402
from utils import HelpFormatter, InputError, run_script, start_processes  # noqa: E402

SHAPES = {"small": {"d_model": 512, "d_ff": 2048, "num_layers": 6, "num_heads": 8},
          "base": {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12},
          "large": {"d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}}
READERS = ("padded eager", "padded SDPA", "ours")
LENGTH, TARGET, GENERATED = 250, 6, 8


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    add = parser.add_argument
    add("--shapes", nargs="+", choices=SHAPES, default=["small"], help="T5 shapes")
    add("--contexts", type=int, nargs="+", default=[20, 100], metavar="N", help="contexts per question")
    add("--batch_size", type=int, default=1, help="questions per batch")
    add("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"], help="bfloat16 is autocast")
    add("--modes", nargs="+", choices=["train", "eval"], default=["train", "eval"], help="what is timed")
    add("--readers", nargs="+", choices=READERS, default=list(READERS), help="who runs; ratios are against padded SDPA")
    add("--use_checkpoint", action="store_true", help="recompute activations in the backward pass (both readers)")
    add("--passage_tokens", type=int, help="tokens of every passage; not given: 100 to 240")
    add("--dropout", type=float, default=0.1, help="dropout rate in training")
    add("--rounds", type=int, default=3, help="batches per cell; the median is shown")
    add("--no_memory", action="store_true", help="leave out the peak memory (a process per cell and reader on a CPU)")
    add("--json", metavar="FILE", help="write the rows as JSON")
    add("--picture", metavar="FILE", help="draw questions per second and memory against contexts (needs matplotlib)")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    add("--peak_of", help=argparse.SUPPRESS)  # the process that measures one cell's memory
    return parser.parse_args()


def make_batch(args, num_contexts, seed, device):
    """(ids, mask (B, N, 250), labels) of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    shape = (args.batch_size, num_contexts)
    lengths = torch.randint(100, 241, shape, generator=generator)
    if args.passage_tokens:
        lengths[:] = args.passage_tokens
    mask = torch.arange(max(LENGTH, args.passage_tokens or 0)) < lengths[..., None]
    ids = torch.randint(3, 32000, mask.shape, generator=generator) * mask
    labels = torch.randint(3, 32000, (args.batch_size, TARGET), generator=generator)
    return ids.to(device), mask.to(device), labels.to(device)


def make_t5(shape, dropout, device):
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(vocab_size=32128, d_kv=64, decoder_start_token_id=0, dropout_rate=dropout,
                                               **SHAPES[shape])).to(device)


class Padded:
    """The plain reader: a Hugging Face T5 over passages padded to max_length, as FiD and minFiD have it."""

    def __init__(self, t5, use_checkpoint):
        self.t5 = t5
        t5.generation_config.eos_token_id = None  # no answer ends early
        if use_checkpoint:
            t5.encoder.gradient_checkpointing_enable()

    def encode(self, ids, mask):
        B, N, L = ids.shape
        states = self.t5.encoder(input_ids=ids.view(B * N, L), attention_mask=mask.view(B * N, L)).last_hidden_state
        return {"encoder_outputs": BaseModelOutput(states.view(B, N * L, -1)), "attention_mask": mask.view(B, N * L)}

    def loss(self, ids, mask, labels):
        return self.t5(**self.encode(ids, mask), labels=labels).loss

    @torch.no_grad()
    def generate(self, ids, mask):
        return self.t5.generate(**self.encode(ids, mask), max_new_tokens=GENERATED, do_sample=False)


class Ours:
    def __init__(self, t5, use_checkpoint):
        self.t5 = FiDT5(t5)
        self.t5.set_checkpoint(use_checkpoint)
        self.t5.config.eos_token_id = -1

    def loss(self, ids, mask, labels):
        return self.t5(ids, mask, labels)[0]

    def generate(self, ids, mask):
        return self.t5.generate(ids, mask, 1 + GENERATED)


def make_reader(name, shape, args, device):
    return (Ours if name == "ours" else Padded)(make_t5(shape, args.dropout, device), args.use_checkpoint)


def run_once(name, reader, batch, mode, precision):
    """One training step or one evaluation; seconds."""
    device = batch[0].device
    if name != "ours":
        reader.t5.set_attn_implementation(name.split()[1].lower())
    reader.t5.train(mode == "train").zero_grad(set_to_none=True)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        result = reader.loss(*batch) if mode == "train" else reader.generate(*batch[:2])
    if mode == "train":
        result.backward()
    wait()
    return time.perf_counter() - start


def check_losses(readers, batch):
    """Largest differences of the losses and, relatively, of a gradient, without dropout; InputError if the readers disagree."""
    losses, gradients = [], []
    for name, reader in readers.items():
        if name != "ours":
            reader.t5.set_attn_implementation(name.split()[1].lower())
        reader.t5.eval().zero_grad()
        loss = reader.loss(*batch)
        loss.backward()
        losses.append(loss.item())
        gradients.append(next(p.grad for key, p in reader.t5.named_parameters() if key.endswith("SelfAttention.v.weight")))
    apart = max(losses) - min(losses)
    turned = max(float((g - gradients[0]).norm() / gradients[0].norm()) for g in gradients)
    if apart > 1e-4 or turned > 1e-3:
        raise InputError(f"the readers disagree, losses {dict(zip(readers, losses))}, gradients by {turned}; their times mean "
                         "nothing")
    return f"losses agree to {apart:.0e}, the first value projection's gradients to {turned:.0e}"


def useful_flops(shape, mask, mode):
    """Floating-point operations that the real tokens need: 2 per multiplication, the backward pass twice the forward."""
    D, ff, layers, heads = (SHAPES[shape][key] for key in ("d_model", "d_ff", "num_layers", "num_heads"))
    inner, sizes = 64 * heads, mask.sum(2).double().cpu()
    tokens, steps = float(sizes.sum()), TARGET if mode == "train" else GENERATED
    encoder = layers * (2 * tokens * (4 * D * inner + 2 * D * ff) + 4 * inner * float(sizes.square().sum()))
    decoder = layers * 4 * heads * steps * D * tokens + 2 * len(mask) * steps * (D * 32128 + layers * (8 * D * inner + 2 * D * ff))
    return (encoder + decoder) * (3 if mode == "train" else 1)


def matmul_peak(device, dtype):
    """Floating-point operations per second of the best of some large matrix products."""
    best, size = 0.0, 2048 if device.type == "cpu" else 8192
    for m, k, n in ((size, size, size), (2 * size, size // 4, size), (2 * size, size, size // 4)):
        a, b = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        for _ in range(10):
            start = time.perf_counter()
            c = a @ b.t()
            c.view(-1)[0].item()  # waits for the product
            best = max(best, 2 * m * k * n / (time.perf_counter() - start))
    return best


def peak_memory(args, name, shape, num_contexts, mode, precision, device):
    """Bytes above the weights at the peak of one step; on a CPU the resident set of a process of its own."""
    if device.type == "cuda":
        reader, batch = make_reader(name, shape, args, device), make_batch(args, num_contexts, 0, device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run_once(name, reader, batch, mode, precision)
        return torch.cuda.max_memory_allocated() - before
    flags = ["--shapes", shape, "--contexts", num_contexts, "--modes", mode, "--precisions", precision, "--peak_of", name,
             "--batch_size", args.batch_size, "--dropout", args.dropout] + ["--use_checkpoint"] * args.use_checkpoint
    flags += ["--passage_tokens", args.passage_tokens] if args.passage_tokens else []
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what this process has freed is needed there
    done = subprocess.run([sys.executable, __file__, *map(str, flags)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(f"measuring the memory of {name} failed (killed for want of memory?): {done.stderr.strip()[-200:]}")
    return int(done.stdout.split()[-1])


def print_peak(args, device):
    """What the process of peak_memory does."""
    reader, batch = make_reader(args.peak_of, args.shapes[0], args, device), make_batch(args, args.contexts[0], 0, device)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forgets the peak so far
    before = resident("VmRSS")
    run_once(args.peak_of, reader, batch, args.modes[0], args.precisions[0])
    print(resident("VmHWM") - before)


def resident(field):
    """Bytes of this process's memory now (VmRSS) or at its peak (VmHWM)."""
    with open("/proc/self/status") as file:
        return 1024 * int(next(line for line in file if line.startswith(field)).split()[1])


def pipeline_seconds(num_contexts):
    """Seconds to format, tokenise and pad one question whose passages have about 170 tokens."""
    tokenizer = load_tokenizer(os.path.join(ROOT, "toy", "t5-tiny"), "")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, len(tokenizer), (num_contexts, 140), generator=generator)
    record = {"question": "who wrote it", "ctxs": [{"title": "A title", "text": text} for text in tokenizer.batch_decode(ids)]}
    collator, times = Collator(tokenizer, num_contexts, LENGTH), []
    for _ in range(5):
        start = time.perf_counter()
        mask = collator([(0, record, "an answer")])["attention_mask"]
        times.append((time.perf_counter() - start) / (int(mask.sum()) / num_contexts / 170))
    return statistics.median(times)


def dropout_costs(device):
    """Nanoseconds that one unit's dropout takes, forward: torch's, and that of dropout.py."""
    x, times = torch.randn(4096, 2048, device=device), {F.dropout: [], own_dropout: []}
    for _ in range(5):
        for function, own in times.items():
            start = time.perf_counter()
            function(x, 0.1)[0, 0].item()
            own.append(time.perf_counter() - start)
    return [1e9 * statistics.median(own) / x.numel() for own in times.values()]


def own_dropout(x, p):
    return drop_(x, keep_mask(x.shape, p, x.device))


def measure(args, device):
    """One row per shape, number of contexts, mode, precision and reader."""
    rows, peaks = [], {p: matmul_peak(device, getattr(torch, p)) for p in args.precisions}
    print("measured matmul peak: " + ", ".join(f"{p} {peak / 1e9:,.0f} GFLOP/s" for p, peak in peaks.items()), flush=True)
    cells = [(shape, n, mode, precision) for shape in args.shapes for n in args.contexts for mode in args.modes
             for precision in args.precisions]
    bar = tqdm(total=len(cells) * args.rounds * len(args.readers), leave=False)
    for shape in args.shapes:
        readers = {name: make_reader(name, shape, args, device) for name in args.readers}
        print(f"{shape}: without dropout, float32, {check_losses(readers, make_batch(args, 3, 0, device))}", flush=True)
        for _, n, mode, precision in (cell for cell in cells if cell[0] == shape):
            times = {name: [] for name in readers}
            for name, reader in readers.items():  # warm up on little
                run_once(name, reader, make_batch(args, 4, 0, device), mode, precision)
            batches = [make_batch(args, n, seed, device) for seed in range(args.rounds)]
            for batch in batches:
                for name, reader in readers.items():
                    times[name].append(run_once(name, reader, batch, mode, precision))
                    bar.update()
            work = statistics.mean(useful_flops(shape, batch[1], mode) for batch in batches)
            tokens = statistics.mean(int(batch[1].sum()) for batch in batches)
            for name in readers:
                seconds = statistics.median(times[name])
                row = {"shape": shape, "contexts": n, "mode": mode, "precision": precision, "reader": name, "seconds": seconds,
                       "questions_per_second": args.batch_size / seconds, "tokens_per_second": tokens / seconds,
                       "share_of_peak": work / seconds / peaks[precision],
                       "memory": None if args.no_memory else peak_memory(args, name, shape, n, mode, precision, device)}
                base = next((r for r in rows if r["reader"] == "padded SDPA" and (shape, n, mode, precision)
                             == (r["shape"], r["contexts"], r["mode"], r["precision"])), None)
                if name == "ours" and base:
                    row["speed_ratio"] = statistics.median(a / b for a, b in zip(times["padded SDPA"], times["ours"]))
                    row["memory_ratio"] = None if args.no_memory else row["memory"] / base["memory"]
                rows.append(row)
                print_row(row)
    bar.close()
    return rows, peaks


def print_row(row):
    memory = "" if row["memory"] is None else f"{row['memory'] / 2 ** 20:8.0f} MiB"
    ratio = f"  {row['speed_ratio']:.2f}x" if "speed_ratio" in row else ""
    ratio += f", memory {row['memory_ratio']:.2f}x" if row.get("memory_ratio") else ""
    tqdm.write(f"{row['shape']:6} {row['contexts']:5d} {row['mode']:5} {row['precision']:8} {row['reader']:13} "
               f"{row['questions_per_second']:8.3f} questions/s {row['tokens_per_second']:9.0f} tokens/s "
               f"{100 * row['share_of_peak']:5.1f} % {memory}{ratio}")
    sys.stdout.flush()


def draw(rows, path):
    """Questions per second (training) and peak memory against contexts, first shape."""
    import matplotlib
    matplotlib.use("svg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    chosen = [r for r in rows if r["mode"] == "train" and r["shape"] == rows[0]["shape"] and r["reader"] != "padded eager"]
    for key, axis, scale, label in (("questions_per_second", axes[0], 1, "training, questions per second"),
                                    ("memory", axes[1], 2 ** -30, "peak memory above weights, GiB")):
        for name in dict.fromkeys(r["reader"] for r in chosen):
            for precision in dict.fromkeys(r["precision"] for r in chosen):
                own = [r for r in chosen if (r["reader"], r["precision"]) == (name, precision) and r[key] is not None]
                axis.plot([r["contexts"] for r in own], [r[key] * scale for r in own], marker="o", label=f"{name}, {precision}",
                          color="C3" if name == "ours" else "C0", linestyle="-" if precision == "float32" else "--")
        axis.set(xscale="log", yscale="log", xlabel="contexts", title=label)
        axis.set_xticks(ticks := sorted({r["contexts"] for r in chosen}), map(str, ticks))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False, fontsize=8)
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(args):
    device = start_processes(args.gpus).device
    if args.peak_of:
        return print_peak(args, device)
    if min(args.contexts) < 1 or args.rounds < 1 or args.batch_size < 1:
        raise InputError("--contexts, --rounds and --batch_size must be 1 or more")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} cpu"
    machine = {"device": name, "threads": torch.get_num_threads(), "date": time.strftime("%Y-%m-%d"), "torch": torch.__version__,
               "transformers": transformers.__version__, "python": platform.python_version()}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    rows, peaks = measure(args, device)
    for row in rows:
        if row["reader"] == "ours" and row["mode"] == "train":
            seconds = pipeline_seconds(row["contexts"]) * args.batch_size
            print(f"input pipeline, {row['contexts']} contexts: {1000 * seconds:.1f} ms per step, "
                  f"{100 * seconds / row['seconds']:.1f} % of ours in {row['precision']}")
    print("dropout of a float32 unit: torch {:.2f} ns, ours {:.2f} ns".format(*dropout_costs(device)))
    if args.json:
        with open(args.json, "w") as file:
            json.dump({"machine": machine, "flags": vars(args), "matmul_peak": peaks, "rows": rows}, file, indent=1)
    if args.picture:
        draw(rows, args.picture)


if __name__ == "__main__":
    run_script(main, parse_args())
