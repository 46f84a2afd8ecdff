"""What a client does with a message: it trains the global model on its own records, or makes its
own contexts and scores, and answers with weights and counts alone.

A client remembers nothing between rounds: the optimizer starts anew in each, and order and learning
rate follow from the round's number. So a client that was away, or killed, is a client like any
other when it is back.
"""
import argparse
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from federated.alternation import (
    CONTEXTS,
    ROOT,
    SCORED,
    corpus_of,
    find_contexts,
    last_error,
    save_model,
    score_contexts,
)
from federated.task import Task, name_party, total_rounds, trained_parameters
from federated.transport import (
    CLIENT_NAME,
    OpenError,
    check_same,
    digest_frozen,
    from_wire,
    load_weights,
    to_wire,
)
from training.loop import Progress, make_optimizer, open_epoch, set_seed
from utils import (
    InputError,
    progress_bar,
    run_script,
    shorten,
    split_shell_words,
    start_processes,
    sum_over_processes,
)

# A process opens its clients once, and those of the same flags share one model: each round
# loads its weights.
RUNS = {}    # {(client's name, mode): Run}
MODELS = {}  # {(a client's own flags, mode): model}


@dataclass
class Client:
    """One client's settings: flower-supernode's --node-config, or federate.py's --client."""
    name: str = "client"
    data: str = ""       # its records
    corpus: str = ""     # its own documents, where they are not the shared flags'
    index: str = ""      # folder of their vectors
    folder: str = ""     # for what it writes; not given: clients/NAME where it was started
    flags: str = ""      # further flags of the training script, behind the shared ones
    processes: int = 1   # more than one: its local step runs under torchrun

    def own_arguments(self, args, mode):
        """The training script's arguments that differ from client to client. Raises InputError."""
        if args.mode == "alternate":
            if self.flags:
                raise InputError(f"{self.name}: its flags would be for both training scripts; "
                                 "leave them out in --mode alternate")
            return ["--corpus", self.corpus] if self.corpus and mode == "retriever" else []
        arguments = split_shell_words(f"{self.name}: flags", self.flags)
        if self.corpus:
            arguments += ["--corpus", self.corpus]
        if self.index and mode == "generator":
            arguments += ["--index", self.index]
        return arguments

    def records(self, mode, args):
        """The file that is trained on: the given one or, in alternation, what was made of it."""
        if args.mode != "alternate":
            return self.data
        return os.path.join(self.folder, CONTEXTS if mode == "generator" else SCORED)


def read_client(settings):
    """The Client of {key: value}. Raises InputError for an unknown key or a wrong value."""
    kinds = {field.name: field.type for field in fields(Client)}
    unknown = sorted(settings.keys() - kinds.keys())
    if unknown:
        raise InputError(f"a client has no setting {unknown[0]!r}; it has {', '.join(kinds)}")
    client = Client(**{key: str(value) for key, value in settings.items()})
    if not str(client.processes).isdigit() or int(client.processes) < 1:
        raise InputError(f"{client.name}: processes must be 1 or more, it is {client.processes}")
    client.processes = int(client.processes)
    client.folder = client.folder or os.path.join("clients", client.name)
    if not re.fullmatch(CLIENT_NAME, client.name):
        raise InputError(f"a client is named {shorten(client.name)}; use letters, digits, dots, - "
                         "and _")
    if not client.data:
        raise InputError(f"{client.name}: has no data; set it, data=/path/to/records.json")
    return client


# ---------------------------------------------------------------- messages

def train(message, args, tasks, client):
    """The content of the answer to a message of training: the weights that this client has made of
    the global ones, and its counts. Raises InputError.
    """
    config = message.content["config"]
    task = tasks[config["mode"]]
    received = from_wire(message.content["arrays"], config["layout"])
    step = {"number": config["round"], "rounds": config["rounds"], "frozen": config["frozen"],
            "proximal_mu": config.get("proximal-mu", 0.0)}
    if client.processes > 1:
        trained, metrics = train_with_torchrun(task, args, client, step, received)
    else:
        run = open_run(task, args, client)
        trained, metrics = train_round(task, run, args, step, received)
    if args.transport == "bf16":
        trained = {name: tensor - received[name] for name, tensor in trained.items()}
    arrays, layout = to_wire(trained, args.transport)
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics),
                       "config": ConfigRecord({"name": client.name, "layout": layout})})


def open_run(task, args, client):
    """The client's Run, kept from round to round."""
    key = client.name, task.mode
    if key not in RUNS:
        own = client.own_arguments(args, task.mode)
        records = client.records(task.mode, args)
        world = name_party(start_processes(task.parse(client.folder, own).gpus), client.name)
        run = task.open(client.folder, own, world, ["train"], records)
        run.model = MODELS.setdefault((client.flags, task.mode), run.model)
        run.optimizer = run.scheduler = None  # each round has its own
        describe_run(run, task, args)
        RUNS[key] = run
    return RUNS[key]


def describe_run(run, task, args):
    """Logs what a client has to train on."""
    plan = task.script.plan_run(run, 0)
    own = sum(is_real for update in plan for batch in update for _, is_real in batch)
    [examples] = sum_over_processes([own], run.world)
    run.world.log(f"{examples:.0f} examples, {len(plan)} updates an epoch")
    last_update = total_rounds(args) * (args.local_updates or len(plan) * args.local_epochs)
    if task.script.count_warmup(run.args, last_update) >= last_update:
        run.world.log(f"warning: the warm-up outlasts the {last_update} updates of all rounds, the "
                      f"learning rate never reaches {run.args.lr:g}; lower --num_warmup_steps")


def retrieve(message, args, tasks, client):
    """The content of the answer, which has no weights, after the client has found contexts for its
    records with the global retriever. Raises InputError.
    """
    task = tasks["retriever"]
    own = client.own_arguments(args, "retriever")
    weights = from_wire(message.content["arrays"], message.content["config"]["layout"])
    model = save_model(task, client.folder, own, client.name, weights)
    corpus = corpus_of(task.parse(client.folder, own))
    find_contexts(args, model, client.data, corpus, client.folder, client.index)
    RUNS.pop((client.name, "generator"), None)  # its records are new
    return RecordDict({"config": ConfigRecord({"name": client.name})})


def score(message, args, tasks, client):
    """The same, after the client has scored its contexts with the global reader."""
    own = client.own_arguments(args, "generator")
    weights = from_wire(message.content["arrays"], message.content["config"]["layout"])
    model = save_model(tasks["generator"], client.folder, own, client.name, weights)
    score_contexts(args, model, client.folder)
    RUNS.pop((client.name, "retriever"), None)
    return RecordDict({"config": ConfigRecord({"name": client.name})})


# ---------------------------------------------------------------- one round

def train_round(task, run, args, step, received):
    """Trains a client's run on one round's updates; returns ({name: tensor}, counts).

    step: number (from 1), rounds, frozen (digest_frozen at the server) and proximal_mu. Raises
    InputError for weights of another model, or a loss that is not finite.
    """
    parameters = trained_parameters(run)
    check_same(received, parameters, "the server", "this client")
    if digest_frozen(run) != step["frozen"]:
        raise OpenError("the weights that are not trained differ from the server's; start from "
                        "the same checkpoint")
    load_weights(parameters, received)
    updates = start_round(task, run, args, step["number"], step["rounds"])
    if step["proximal_mu"]:
        add_proximal_term(run, step["proximal_mu"])
    start = time.time()
    run.model.train()
    train_updates(task, run, updates, step["number"])
    summary = run.progress.summary()
    metrics = {"num-examples": int(run.progress.examples),
               "num-targets": int(sum(weight for _, weight in run.progress.losses)),
               "uniform": 1, "train_loss": summary["loss"], "updates": updates,
               "seconds": time.time() - start}
    run.optimizer = run.scheduler = None  # of all clients, they would fill the memory
    return {name: parameter.detach().to("cpu", copy=True)
            for name, parameter in parameters.items()}, metrics


def start_round(task, run, args, number, rounds):
    """Sets optimizer, schedule, progress and seed to where a round begins; returns its updates.

    The client's updates of all rounds are one plan and one schedule: round r goes on where round
    r - 1 of this client ended, whether it took part in that one or not.
    """
    updates_per_epoch = len(task.script.plan_run(run, 0))
    updates = args.local_updates or updates_per_epoch * args.local_epochs
    done, last_update = (number - 1) * updates, rounds * updates
    warmup = task.script.count_warmup(run.args, last_update)
    run.optimizer, run.scheduler = make_optimizer(
        run.unwrapped, run.args.lr, run.args.weight_decay, getattr(run.args, "adam_eps", 1e-8),
        warmup, last_update, args.local_optimizer)
    run.optimizer.zero_grad()  # of an update that was refused, maybe another client's
    for group, lr, schedule in zip(run.optimizer.param_groups, run.scheduler.base_lrs,
                                   run.scheduler.lr_lambdas):
        group["lr"] = lr * schedule(done)
    run.scheduler.last_epoch = done
    epoch, update = divmod(done, updates_per_epoch)
    run.progress = Progress(epoch=epoch, update=update, total_updates=done)
    set_seed(run.args.seed + number - 1, run.world.rank)
    return updates


def add_proximal_term(run, mu):
    """Adds the gradient of mu / 2 * |w - w_global|^2 before each step (FedProx, arXiv 1812.06127,
    equation 2); --clip is for the loss's own gradient.
    """
    starts = [(parameter, parameter.detach().clone())
              for parameter in trained_parameters(run).values()]

    def pull_back(*_):
        for parameter, start in starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=mu)

    run.optimizer.register_step_pre_hook(pull_back)


def train_updates(task, run, updates, number):
    """Trains on that many updates, over the ends of epochs."""
    bar = progress_bar(desc=f"round {number}, {run.world.party}", total=updates, unit=" updates",
                       is_main=run.world.is_main, always=run.args.tqdm)
    last_update = run.progress.total_updates + updates
    while run.progress.total_updates < last_update:
        train_part(task, run, last_update, bar)
    bar.close()


def train_part(task, run, last_update, bar):
    """Trains to the last update, or to the end of the current epoch if that comes first."""
    progress = run.progress
    plan = task.script.plan_run(run, progress.epoch)
    end = progress.update + last_update - progress.total_updates
    remaining, batches = open_epoch(run, plan[:end])
    for update in remaining:
        start = time.time()
        loss_sum, weight, examples = task.script.train_update(run, batches, len(update))
        progress.count_update(loss_sum, weight, examples, time.time() - start)
        bar.update()
    if progress.update == len(plan):
        progress.start_epoch()


# ---------------------------------------------------------------- a local step of several processes

def train_with_torchrun(task, args, client, step, received):
    """train_round in processes of torchrun, which find their work in a folder and leave the results
    there. Raises InputError with what the processes said.
    """
    for leftover in glob.glob(f"{glob.escape(client.folder)}.step-*"):
        shutil.rmtree(leftover)  # of a client that was killed
    os.makedirs(os.path.dirname(client.folder) or ".", exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f"{os.path.basename(client.folder)}.step-",
                              dir=os.path.dirname(client.folder) or ".")
    try:
        torch.save({"task": vars(task), "client": vars(client), "args": vars(args), "step": step,
                    "weights": received}, os.path.join(folder, "work.pt"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={client.processes}", "-m", "federated.client", folder]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT},
                                   stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate()
        finally:
            # if this process is asked to end: torchrun then ends the others, which it could not do
            # if it were killed
            process.terminate()
        if process.returncode:
            raise InputError(last_error(errors))
        results = torch.load(os.path.join(folder, "results.pt"), weights_only=True)
    finally:
        shutil.rmtree(folder)
    return results["weights"], results["metrics"]


def work_in(folder):
    """One of torchrun's processes: does the work of a folder; the main one writes the results."""
    work = torch.load(os.path.join(folder, "work.pt"), weights_only=True)
    task, client = Task(**work["task"]), Client(**work["client"])
    args = argparse.Namespace(**work["args"])
    run = open_run(task, args, client)
    weights, metrics = train_round(task, run, args, work["step"], work["weights"])
    if run.world.is_main:
        torch.save({"weights": weights, "metrics": metrics}, os.path.join(folder, "results.pt"))


if __name__ == "__main__":
    run_script(work_in, sys.argv[1])
