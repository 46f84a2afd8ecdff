"""What a client does with a message: it trains the global model on its own records, or makes its
own contexts and scores. Its answer holds weights and counts, and no record.

A client remembers nothing between rounds: each round starts with a new optimizer, and order and
learning rate follow from the round's number. So a client that was away or killed can join again.
"""
import glob
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields

import torch
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from federated import ROOT
from federated.alternation import (
    CONTEXTS_FILE,
    SCORED_FILE,
    last_error,
    retrieve_contexts,
    save_model,
    score_with_reader,
)
from federated.task import Settings, name_party, trained_parameters
from federated.transport import (
    CLIENT_NAME,
    OpenError,
    check_same,
    copy_weights,
    digest_frozen,
    from_wire,
    to_wire,
)
from training.loop import Progress, make_optimizer, open_epoch, set_seed
from utils import (
    InputError,
    progress_bar,
    shorten,
    split_shell_words,
    start_processes,
    sum_over_processes,
)

# A process opens each client once. Clients with the same flags share one model, into which each
# round loads its weights.
RUNS = {}           # {(client's name, mode): Run}
SHARED_MODELS = {}  # {(a client's own flags, mode): model}


@dataclass
class Client:
    """Hold one client's settings: flower-supernode's --node-config, or federate.py's --client."""
    name: str = "client"
    data: str = ""       # file of its records
    corpus: str = ""     # its own documents; default: those of the shared flags
    index: str = ""      # folder of the documents' vectors
    folder: str = ""     # where it writes; default: clients/NAME
    flags: str = ""      # further flags of the training script, after the shared ones
    processes: int = 1   # more than one: its local step runs under torchrun

    def own_values(self, task, settings):
        """Return the values of make_party_args that differ from client to client, as a dict.

        Raises InputError.
        """
        if settings.mode == "alternate":
            if self.flags:
                raise InputError(f"{self.name}: in --mode alternate its flags would be for both "
                                 "training scripts; leave them out")
            return {"corpus": self.corpus if task.mode == "retriever" else ""}
        return {"own_words": split_shell_words(f"{self.name}: flags", self.flags),
                "corpus": self.corpus, "index": self.index}

    def records(self, task, settings):
        """Return the file to train on: `data` or, in alternation, the file made from it."""
        if settings.mode != "alternate":
            return self.data
        return os.path.join(self.folder,
                            CONTEXTS_FILE if task.mode == "generator" else SCORED_FILE)


def read_client(values):
    """Return the Client of {key: value}. Raises InputError for an unknown key or a wrong value."""
    kinds = {field.name: field.type for field in fields(Client)}
    unknown = sorted(values.keys() - kinds.keys())
    if unknown:
        raise InputError(f"a client has no setting {unknown[0]!r}; it has {', '.join(kinds)}")
    client = Client(**{key: str(value) for key, value in values.items()})
    if not str(client.processes).isdigit() or int(client.processes) < 1:
        raise InputError(f"{client.name}: processes must be >= 1, got {client.processes}")
    client.processes = int(client.processes)
    client.folder = client.folder or os.path.join("clients", client.name)
    if not re.fullmatch(CLIENT_NAME, client.name):
        raise InputError(f"a client's name must have letters, digits, dots, - and _ only, got "
                         f"{shorten(client.name)}")
    if not client.data:
        raise InputError(f"{client.name}: has no data; set it, data=/path/to/records.json")
    return client


# ---------------------------------------------------------------- one round

def train_round(task, run, settings, step, received):
    """Train a client's Run on one round's updates. Return ({name: tensor}, counts).

    step: number (from 1), rounds, frozen (the server's digest_frozen) and proximal_mu. Raises
    InputError for weights of another model, and for a loss that is not finite.
    """
    parameters = trained_parameters(run)
    check_same(received, parameters, "the server", "this client")
    if digest_frozen(run) != step["frozen"]:
        raise OpenError("the weights that are not trained differ from the server's; start from "
                        "the same checkpoint")
    copy_weights(received, parameters)
    updates = start_round(task, run, settings, step["number"], step["rounds"])
    if step["proximal_mu"]:
        add_proximal_term(run, step["proximal_mu"])
    start = time.time()
    run.model.train()
    train_updates(task, run, updates, step["number"])
    metrics = {"num-examples": int(run.progress.examples),
               "num-targets": int(sum(weight for _, weight in run.progress.losses)),
               "uniform": 1, "train_loss": run.progress.summary()["loss"], "updates": updates,
               "seconds": time.time() - start}
    run.optimizer = run.scheduler = None  # the optimizers of all clients would fill the memory
    return {name: parameter.detach().to("cpu", copy=True)
            for name, parameter in parameters.items()}, metrics


def start_round(task, run, settings, number, rounds):
    """Set optimizer, schedule, progress and seed to the start of a round. Return its number of
    updates.

    A client's updates of all rounds form one plan with one schedule. Round r starts where the
    client's round r - 1 ends, whether or not the client took part in that one.
    """
    updates_per_epoch = len(task.script.plan_run(run, 0))
    updates = settings.local_updates or updates_per_epoch * settings.local_epochs
    done, last_update = (number - 1) * updates, rounds * updates
    warmup = task.script.count_warmup(run.args, last_update)
    run.optimizer, run.scheduler = make_optimizer(
        run.unwrapped, run.args.lr, run.args.weight_decay, getattr(run.args, "adam_eps", 1e-8),
        warmup, last_update, settings.local_optimizer)
    run.optimizer.zero_grad()  # a refused update of any client leaves its gradient
    for group, lr, schedule in zip(run.optimizer.param_groups, run.scheduler.base_lrs,
                                   run.scheduler.lr_lambdas):
        group["lr"] = lr * schedule(done)
    run.scheduler.last_epoch = done
    epoch, update = divmod(done, updates_per_epoch)
    run.progress = Progress(epoch=epoch, update=update, total_updates=done)
    set_seed(run.args.seed + number - 1, run.world.rank)
    return updates


def add_proximal_term(run, mu):
    """Add the gradient of mu / 2 * |w - w_global|^2 before each step (FedProx, arXiv 1812.06127,
    equation 2). --clip applies to the loss's gradient alone.
    """
    starts = [(parameter, parameter.detach().clone())
              for parameter in trained_parameters(run).values()]

    def pull_back(*_):
        for parameter, start in starts:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=mu)

    run.optimizer.register_step_pre_hook(pull_back)


def train_updates(task, run, updates, number):
    """Train for `updates` updates, across the ends of epochs."""
    bar = progress_bar(desc=f"round {number}, {run.world.party}", total=updates, unit=" updates",
                       is_main=run.world.is_main, always=run.args.tqdm)
    last_update = run.progress.total_updates + updates
    while run.progress.total_updates < last_update:
        train_part(task, run, last_update, bar)
    bar.close()


def train_part(task, run, last_update, bar):
    """Train to the last update, or to the end of the current epoch if that comes first."""
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


# ---------------------------------------------------------------- messages

def answer_train(message, settings, tasks, client):
    """Return the content of the answer to a training message: the weights after this client's
    updates, and its counts. Raises InputError.
    """
    config = message.content["config"]
    task = tasks[config["mode"]]
    received = from_wire(message.content["arrays"], config["layout"])
    step = {"number": config["round"], "rounds": config["rounds"], "frozen": config["frozen"],
            "proximal_mu": config.get("proximal-mu", 0.0)}
    if client.processes > 1:
        trained, metrics = train_with_torchrun(task, settings, client, step, received)
    else:
        run = open_run(task, settings, client)
        trained, metrics = train_round(task, run, settings, step, received)
    if settings.transport == "bf16":
        trained = {name: tensor - received[name] for name, tensor in trained.items()}
    arrays, layout = to_wire(trained, settings.transport)
    return RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics),
                       "config": ConfigRecord({"name": client.name, "layout": layout})})


def answer_retrieve(message, settings, tasks, client):
    """Find contexts for the client's records with the global retriever.

    Returns an answer without weights. Raises InputError.
    """
    args, model = save_global_model(message, settings, tasks["retriever"], client)
    retrieve_contexts(settings, model, client.data, args.corpus, client.folder, client.index)
    RUNS.pop((client.name, "generator"), None)  # it holds the previous turn's records
    return RecordDict({"config": ConfigRecord({"name": client.name})})


def answer_score(message, settings, tasks, client):
    """Score the client's contexts with the global reader.

    Returns an answer without weights. Raises InputError.
    """
    _, model = save_global_model(message, settings, tasks["generator"], client)
    score_with_reader(settings, model, client.folder)
    RUNS.pop((client.name, "retriever"), None)
    return RecordDict({"config": ConfigRecord({"name": client.name})})


def save_global_model(message, settings, task, client):
    """Write a message's model to the client's folder. Return (the model's flags, its path)."""
    args = task.make_args(os.path.join(client.folder, task.mode),
                          **client.own_values(task, settings))
    weights = from_wire(message.content["arrays"], message.content["config"]["layout"])
    return args, save_model(task, args, client.name, weights)


def open_run(task, settings, client):
    """Return the client's Run, which is kept from round to round."""
    key = client.name, task.mode
    if key not in RUNS:
        args = task.make_args(client.folder, data=client.records(task, settings),
                              **client.own_values(task, settings))
        world = name_party(start_processes(args.gpus), client.name)
        run = task.open(args, world, ["train"])
        run.model = SHARED_MODELS.setdefault((client.flags, task.mode), run.model)
        run.optimizer = run.scheduler = None  # each round has its own
        describe_client(run, task, settings)
        RUNS[key] = run
    return RUNS[key]


def describe_client(run, task, settings):
    """Log how much a client trains on."""
    plan = task.script.plan_run(run, 0)
    own = sum(is_real for update in plan for batch in update for _, is_real in batch)
    [examples] = sum_over_processes([own], run.world)
    run.world.log(f"{examples:.0f} examples, {len(plan)} updates an epoch")
    updates = settings.local_updates or len(plan) * settings.local_epochs
    last_update = settings.total_rounds * updates
    if task.script.count_warmup(run.args, last_update) >= last_update:
        run.world.log(f"warning: the warm-up outlasts the {last_update} updates of all rounds, so "
                      f"the learning rate never reaches {run.args.lr:g}; lower --num_warmup_steps")


# ---------------------------------------------------------------- a local step of several processes

def train_with_torchrun(task, settings, client, step, received):
    """Run train_round in processes of torchrun, which read their input from a folder and write the
    results there. Raises InputError with the processes' error.
    """
    for leftover in glob.glob(f"{glob.escape(client.folder)}.step-*"):
        shutil.rmtree(leftover)  # left by a client that was killed
    os.makedirs(os.path.dirname(client.folder) or ".", exist_ok=True)
    folder = tempfile.mkdtemp(prefix=f"{os.path.basename(client.folder)}.step-",
                              dir=os.path.dirname(client.folder) or ".")
    try:
        torch.save({"mode": task.mode, "words": task.words, "client": asdict(client),
                    "settings": asdict(settings), "step": step, "weights": received},
                   os.path.join(folder, "work.pt"))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                   f"--nproc_per_node={client.processes}", os.path.join(ROOT, "federate.py"),
                   "--local_step", folder]
        process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT},
                                   stderr=subprocess.PIPE, text=True)
        try:
            _, errors = process.communicate()
        finally:
            # If this process is ended, torchrun must end its own processes, which it can do after
            # SIGTERM, not after SIGKILL.
            process.terminate()
        if process.returncode:
            raise InputError(last_error(errors))
        results = torch.load(os.path.join(folder, "results.pt"), weights_only=True)
    finally:
        shutil.rmtree(folder)
    return results["weights"], results["metrics"]


def run_local_step(make_task, folder):
    """Run train_round as one of torchrun's processes; the main process writes the results.

    make_task: federate.py's function (mode, words) that returns a Task.
    """
    work = torch.load(os.path.join(folder, "work.pt"), weights_only=True)
    task, client = make_task(work["mode"], work["words"]), Client(**work["client"])
    settings = Settings(**work["settings"])
    run = open_run(task, settings, client)
    weights, metrics = train_round(task, run, settings, work["step"], work["weights"])
    if run.world.is_main:
        torch.save({"weights": weights, "metrics": metrics}, os.path.join(folder, "results.pt"))
