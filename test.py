"""Evaluates a reader checkpoint: exact match, F1, predictions, cross-attention scores.

    python test.py OUT test.json
    python test.py OUT test.json --num_contexts 1 5 10 --pred predictions.tsv
    torchrun --standalone --nproc_per_node=8 test.py nq_reader_base test.json --num_contexts 100 --gpus 0,1,2,3,4,5,6,7

OUT is a folder written by train_epoch.py, any T5 folder or hub name, a released FiD reader or minFiD's file. The number of
contexts and the lengths default to those that the checkpoint was trained with.
"""
import argparse
import json
import os
import time

import torch
from tqdm import tqdm

from data import Collator, eval_loader, read_records
from metrics import exact_match, f1
from checkpoints import load_tokenizer, read_training_args
from model import FiDT5
from utils import HelpFormatter, InputError, gather_lists, new_file, run_script, start_processes

UNKNOWN = {"num_contexts": 5, "max_length": 200}  # minFiD's defaults, for checkpoints that do not say


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="checkpoint folder, minFiD file or hub name")
    parser.add_argument("data", help="records to answer: .json or .jsonl, may end in .gz")
    parser.add_argument("--num_contexts", type=int, nargs="+", metavar="N",
                        help="contexts per question, one table row each; 0 asks without any; not given: as trained, else 5")
    parser.add_argument("--max_length", type=int, help="tokens per question and passage; not given: as trained, else 200")
    parser.add_argument("--answer_maxlength", type=int, default=50, help="most tokens to generate")
    parser.add_argument("--num_beams", type=int, default=1, help="beams; 1 is greedy")
    parser.add_argument("--batch_size", type=int, default=16, help="questions per batch and process")
    parser.add_argument("--pred", metavar="FILE", help="write predictions: tab-separated index, prediction, golds, score as "
                        "minFiD does, or JSONL if FILE ends in .jsonl; with several --num_contexts one file each")
    parser.add_argument("--scores", metavar="FILE", help="write the records back with each context's cross-attention score "
                        "as 'score' (the given one is kept as 'retrieval_score'); .json or .jsonl")
    parser.add_argument("--t5_name", default="t5-base",
                        help="whose tokenizer to use if the checkpoint carries none")
    parser.add_argument("--bf16", action="store_true", help="bfloat16 autocast")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that tokenise")
    parser.add_argument("--gpus", default="", help="CUDA_VISIBLE_DEVICES; empty runs on the CPU")
    return parser.parse_args()


def predict(model, records, tokenizer, world, *, num_contexts, max_length, batch_size, num_workers=0, answer_maxlength=50,
            num_beams=1, bf16=False, with_scores=False):
    """[(place, prediction, em, f1, context scores)] of all records, in their order, on every process.

    em and f1 are None for a record without answers; the scores are None unless asked for. Every record is answered once,
    in the same batch for any number of processes.
    """
    collator = Collator(tokenizer, num_contexts, max_length)
    loader = eval_loader(records, batch_size, collator, num_workers, world.rank, world.size)
    model.eval()
    rows = []
    for batch in tqdm(loader, desc=f"answering, {num_contexts} contexts", leave=False, disable=None if world.is_main else True):
        ids, mask = batch["input_ids"].to(world.device), batch["attention_mask"].to(world.device)
        with torch.autocast(world.device.type, torch.bfloat16, enabled=bf16):
            output = model.generate(ids, mask, answer_maxlength, num_beams, return_scores=with_scores)
        generated, scores = output if with_scores else (output, None)
        scores = scores.tolist() if with_scores else [None] * len(generated)
        for place, text, own in zip(batch["places"], tokenizer.batch_decode(generated, skip_special_tokens=True), scores):
            golds = records[place]["answers"]
            rows.append((place, text, exact_match(text, golds) if golds else None, f1(text, golds) if golds else None, own))
    return sorted(gather_lists(rows, world), key=lambda row: row[0])


def summarize(rows):
    """(EM %, F1 %, number of exact matches, number of records with answers)."""
    scored = [(em, f) for _, _, em, f, _ in rows if em is not None]
    matches, count = sum(em for em, _ in scored), len(scored)
    return 100 * matches / max(count, 1), 100 * sum(f for _, f in scored) / max(count, 1), int(matches), count


def write_predictions(path, rows, records):
    """minFiD's tab-separated lines, or JSONL."""
    with new_file(path) as file:
        for place, text, em, f, _ in rows:
            golds = records[place]["answers"]
            if path.endswith(".jsonl"):
                row = {"index": place, "id": records[place]["id"], "prediction": text, "answers": golds, "em": em, "f1": f}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            else:
                file.write(f"{place}\t{text}\t{golds}\t{'nan' if em is None else em}\n")


def write_scores(path, rows, records):
    """The records with the cross-attention score of each context that was read; the order of contexts stays."""
    for place, _, _, _, scores in rows:
        for context, score in zip(records[place]["ctxs"], scores):
            context["retrieval_score"], context["score"] = context.get("score"), score
    with new_file(path) as file:
        if path.endswith(".jsonl"):
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        else:
            json.dump(records, file, ensure_ascii=False, indent=1)


def choose_lengths(args, say):
    """Numbers of contexts and the input length: as given, else as trained; says where they differ. InputError if absurd."""
    trained = read_training_args(args.model)
    for name in UNKNOWN:
        given, known = getattr(args, name), trained.get(name)
        if given is None:
            value = known or UNKNOWN[name]
            setattr(args, name, [value] if name == "num_contexts" else value)
            if known is None:
                say(f"note: {args.model} does not tell its {name}; taking {value}, --{name} changes it")
        elif known is not None and given not in (known, [known]):
            say(f"warning: --{name} {str(given).strip('[]')}, but the checkpoint was trained with {known}")
    if min(args.num_contexts) < 0 or args.max_length < 1 or args.batch_size < 1 or args.answer_maxlength < 2:
        raise InputError("--num_contexts must be 0 or more, --max_length and --batch_size 1 or more, --answer_maxlength 2 or more")


def main(args):
    world = start_processes(args.gpus)
    say = print if world.is_main else lambda *_: None
    choose_lengths(args, say)
    records = read_records(args.data)
    tokenizer = load_tokenizer(args.model, args.t5_name)
    model = FiDT5.from_pretrained(args.model).to(world.device)
    model.check_tokenizer(tokenizer)
    model.config.passage_stride = args.max_length  # the originals padded to it; only a released reader's bias sees it
    unscored = sum(not record["answers"] for record in records)
    say(f"{len(records)} questions" + (f", {unscored} of them without answers: predicted, not scored" if unscored else "")
        + f"; {sum(p.numel() for p in model.parameters()):,} parameters on {world.size} x {world.device.type}, "
        f"length {args.max_length}")
    say(f"{'contexts':>8} {'EM':>6} {'F1':>6} {'correct':>13} {'questions/s':>12}")
    for num_contexts in args.num_contexts:
        start = time.time()
        rows = predict(model, records, tokenizer, world, num_contexts=num_contexts, max_length=args.max_length,
                       batch_size=args.batch_size, num_workers=args.num_workers, answer_maxlength=args.answer_maxlength,
                       num_beams=args.num_beams, bf16=args.bf16, with_scores=args.scores is not None)
        em, f, correct, count = summarize(rows)
        speed = len(records) / (time.time() - start)
        say(f"{num_contexts:8d} {em:6.2f} {f:6.2f} {correct:6d}/{count:<6d} {speed:12.1f}  {'█' * round(em / 2.5)}")
        if args.pred and world.is_main:
            stem, suffix = os.path.splitext(args.pred)
            path = args.pred if len(args.num_contexts) == 1 else f"{stem}.{num_contexts}{suffix}"
            write_predictions(path, rows, records)
            say(f"         predictions in {path}")
    if args.scores and world.is_main:
        write_scores(args.scores, rows, records)
        say(f"cross-attention scores of {num_contexts} contexts in {args.scores}")


if __name__ == "__main__":
    run_script(main, parse_args())
