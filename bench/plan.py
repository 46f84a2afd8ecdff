"""Measure training at published sizes: the scripts' own updates on random weights and texts.

    python bench/plan.py --gpus 0                      # every row, on one GPU
    python bench/plan.py --gpus 0 --rows "FiD base" "DPR" --bf16

A row has the batch of one of the recipe's 8 GPUs. So its time, times the number of updates, is the
time of the recipe, except for the traffic between GPUs. Passages have as many tokens as those of
NaturalQuestions on average: 170 for readers (100 to 240), 150 for retrievers.
"""
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from transformers import AutoTokenizer, BertConfig, LlamaConfig, T5Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train_dense
import train_epoch
from retrieval.dev_set import encode_texts
from training.loop import measure_updates
from utils import Parser, peak_bytes, run_script, start_processes

T5 = {"vocab_size": 32128, "d_kv": 64, "decoder_start_token_id": 0}
MODELS = {
    "t5-base": T5Config(**T5, d_model=768, d_ff=3072, num_layers=12, num_heads=12),
    "t5-large": T5Config(**T5, d_model=1024, d_ff=4096, num_layers=24, num_heads=16),
    "bert-base": BertConfig(),
    "llama-1b": LlamaConfig(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
                            num_attention_heads=32, num_key_value_heads=4)}
READER = "--num_contexts 100 --max_length 250 --use_checkpoint --lr 1e-4 --num_workers 3"
CAUSAL = "--num_contexts 3 --max_length 250 --lr 1e-4 --batch_size 8 --lora 16 --num_workers 3"
# sizes of NaturalQuestions and of minFiD's, FiD's and DPR's recipes
READER_UPDATES, LARGE_UPDATES = 15 * -(-79168 // 64), 15000
DPR_UPDATES, PASSAGES = 40 * -(-58880 // 128), 21015324


class Row(NamedTuple):
    """Hold a recipe: its script's flags and its updates (0: no number is published)."""
    script: object
    model: str
    flags: str
    updates: int


ROWS = {
    "FiD base": Row(train_epoch, "t5-base", f"{READER} --batch_size 2 --grad_accumulation 4",
                    READER_UPDATES),
    "FiD large": Row(train_epoch, "t5-large", f"{READER} --batch_size 1 --grad_accumulation 8",
                     LARGE_UPDATES),
    "DPR": Row(train_dense, "bert-base", "--batch_size 16 --group_size 2 --key_max_length 256 "
               "--tie_encoders false --dense_metric ip --num_workers 3", DPR_UPDATES),
    "RALT, 1.1 B, LoRA": Row(train_epoch, "llama-1b", CAUSAL, 0),
    "RALT, 1.1 B, LoRA, 4 bits": Row(train_epoch, "llama-1b", f"{CAUSAL} --load_in_4bit", 0)}


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="recipes to measure")
    add("--bf16", action="store_true", help="bfloat16 autocast instead of float32")
    add("--passages", type=int, default=8192, help="passages to encode; 0: none")
    add("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    return parser.parse_args()


# ---------------------------------------------------------------- models and texts

def make_model(name, folder):
    """Write a model folder without weights (scripts draw them at random); return its tokenizer."""
    config = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(
        ROOT / "toy" / ("bert-tiny" if name == "bert-base" else "t5-tiny"))
    if name == "llama-1b":
        config.eos_token_id, config.bos_token_id = tokenizer.eos_token_id, None
    config.architectures = None
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


def find_words(tokenizer):
    """Return words of one token each."""
    words = sorted({token.strip("▁") for token in tokenizer.get_vocab()
                    if token.strip("▁").isalpha()})
    return [word for word in words
            if len(tokenizer(f"a {word} a", add_special_tokens=False)["input_ids"]) == 3]


def make_reader_records(path, words, count):
    """Return records with 100 contexts of 80 to 220 words: 96 to 236 tokens with the question."""
    rng = random.Random(0)

    def text(length):
        return " ".join(rng.choices(words, k=length))
    records = [{"question": text(10), "answers": [text(4)],
                "ctxs": [{"title": text(3), "text": text(rng.randint(77, 217))}
                         for _ in range(100)]} for _ in range(count)]
    Path(path).write_text(json.dumps(records))


def make_pairs(path, words, count):
    """Return queries of 12 words with a positive and a negative of 145 words."""
    rng = random.Random(0)
    with open(path, "w") as file:
        for _ in range(count):
            query, positive, negative = (" ".join(rng.choices(words, k=k)) for k in (12, 145, 145))
            file.write(json.dumps({"query": query, "pos": [positive], "neg": [negative]}) + "\n")


# ---------------------------------------------------------------- measuring

def measure(name, args, world):
    """Print one row."""
    row = ROWS[name]
    with tempfile.TemporaryDirectory() as folder:
        words = find_words(make_model(row.model, folder))
        data = os.path.join(folder, "data.jsonl")
        flags = row.flags.split() + ["--gpus", args.gpus, *(["--bf16"] if args.bf16 else [])]
        if row.script is train_epoch:
            make_reader_records(data, words, 40)
            flags = [f"{folder}/out", data, data, "--t5_name", folder, *flags]
            run_args = train_epoch.parse_args(flags)
        else:
            make_pairs(data, words, 200)
            flags = ["--output_dir", f"{folder}/out", "--train_data", data, "--query_encoder",
                     folder, "--version", "none", *flags]
            run_args = train_dense.parse_args("", flags)
        row.script.check_args(run_args)
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        run = row.script.set_up(run_args, world)
        parameters = sum(parameter.numel() for parameter in run.unwrapped.parameters())
        seconds = measure_updates(run, row.script.plan_run(run, 0), row.script.train_update)
        update = statistics.median(seconds[1:])
        line = (f"{name}: {parameters / 1e6:,.0f} M parameters, an update {update:.2f} s, peak "
                f"{peak_bytes(world.device) / 2 ** 30:.1f} GiB")
        if row.updates:
            line += f"; {row.updates:,} updates {row.updates * update / 3600:.1f} h"
        print(line, flush=True)
        if name == "DPR" and args.passages:
            measure_encoding(run, words, args)


@torch.no_grad()
def measure_encoding(run, words, args):
    """Print how many passages a second the retriever encodes, including tokenising."""
    rng = random.Random(1)
    texts = [" ".join(rng.choices(words, k=145)) for _ in range(args.passages)]
    run.unwrapped.eval()
    with torch.autocast(run.world.device.type, torch.bfloat16, enabled=args.bf16):
        for part in (texts[:256], texts):  # a few passages, as warm-up
            start = time.time()
            encode_texts(run.unwrapped, run.collator, "key", part, [""] * len(part)).sum().item()
            seconds = time.time() - start
    rate = len(texts) / seconds
    print(f"encoding: {rate:,.0f} passages a second; {PASSAGES:,} in {PASSAGES / rate / 3600:.1f} "
          "h on one", flush=True)


def main(args):
    world = start_processes(args.gpus)
    transformers.utils.logging.disable_progress_bar()
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else "cpu"
    if world.device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        device += f" ({(total - free) / 2 ** 30:.1f} GiB of its memory in use by others)"
    print(f"{device}, torch {torch.__version__}, transformers {transformers.__version__}, "
          f"{time.strftime('%Y-%m-%d')}, {'bfloat16' if args.bf16 else 'float32'}", flush=True)
    for name in args.rows:
        try:
            measure(name, args, world)
        except torch.OutOfMemoryError:
            print(f"{name}: the GPU's memory does not suffice", flush=True)


if __name__ == "__main__":
    run_script(main, parse_args())
