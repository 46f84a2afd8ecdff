r"""Train one retriever or reader over many parties, each of which keeps its records, with the
training steps of train_dense.py or train_epoch.py and Flower (https://flower.ai).

    python federate.py OUT --mode retriever --simulate 4 --data train.json --split iid --rounds 10 \
        -- --query_encoder BAAI/bge-base-en --eval_data dev.json --corpus corpus.jsonl
    python federate.py OUT --mode generator --client 'name=a data=a.json' \
        --client 'name=b data=b.json' --strategy FedProx proximal_mu=0.1 \
        -- --t5_name t5-base --eval_file dev.json --num_contexts 20

All parties share the flags after `--`, which are those of train_dense.py (retriever) or
train_epoch.py (generator). On several hosts, give the same flags to `flwr run` (docs/federated.md).

Writes OUT (the best global model, as the training script writes it), OUT.jsonl (a row per round),
OUT.state (for --resume), and in a simulation OUT.clients (the clients' records).
"""
import argparse
import logging
import os
import shlex
import sys
import time
import traceback
from contextlib import ExitStack, suppress
from dataclasses import fields
from functools import partial

# must be set before Flower is imported, to stop it from sending telemetry
os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

try:
    from flwr.app import Error, Message
    from flwr.clientapp import ClientApp
    from flwr.clientapp.mod import adaptiveclipping_mod, fixedclipping_mod
    from flwr.serverapp import ServerApp
except ImportError as error:
    sys.exit(f"error: federate.py needs Flower ({error}); pip install -r "
             "requirements-federated.txt")

import transformers

import train_dense
import train_epoch
from federated.alternation import alternate
from federated.client import (
    answer_retrieve,
    answer_score,
    answer_train,
    open_run,
    read_client,
    run_local_step,
)
from federated.server import Server, restore_server_state, run_rounds
from federated.simulation import LocalGrid
from federated.split import split_file
from federated.strategies import AVERAGES, list_strategies, make_strategy
from federated.task import Settings, Task
from federated.transport import CLIENT_FAILED, OpenError
from federated.worker import run_worker
from training.output_folder import claim_folder
from training.resume import hash_inputs
from utils import (
    OVERWRITE,
    RESUME,
    InputError,
    Parser,
    call_main,
    check_at_least,
    check_positive,
    first_line,
    run_script,
    split_shell_words,
    start_processes,
)

SCRIPTS = {"retriever": train_dense, "generator": train_epoch}  # {mode: training script}
BAD_FLAGS = 2  # argparse's exit code
# the server gets this reason for a failure whose message may quote records
HIDDEN_REASON = "cannot train on its records; see the error in its own output"


# ---------------------------------------------------------------- server

def federate(args, grid=None):
    """Run the rounds of a federation over Flower's Grid or, without one, in a simulation.

    Raises InputError.
    """
    settings, tasks = make_settings(args), make_tasks(args)
    outs = {mode: settings.model for mode in tasks}
    if settings.mode == "alternate":
        outs = {mode: f"{settings.model}.{mode}" for mode in tasks}
    shared = next(iter(tasks.values())).make_args(settings.model)
    world = start_processes(shared.gpus)
    if world.size > 1:
        raise InputError("start federate.py without torchrun; processes=N in a client's settings "
                         "runs its local step under torchrun")
    start = time.time()
    with ExitStack() as claims:
        for out in outs.values():
            claims.enter_context(claim_folder(out, args.resume, args.overwrite, world))
        is_simulated = grid is None
        if is_simulated:
            grid = simulate(args, settings, tasks, shared.seed)
        if args.overwrite:
            for out in outs.values():  # a later --resume must not continue the replaced run
                with suppress(FileNotFoundError):
                    os.remove(f"{out}.state")

        def open_mode(mode, **values):
            party_args = tasks[mode].make_args(outs[mode], **values)
            return open_server(args, settings, tasks[mode], party_args, world, grid, is_simulated)

        if settings.mode == "alternate":
            servers = alternate(settings, tasks, open_mode)
        else:
            servers = [open_mode(settings.mode)]
            run_rounds(servers[0], settings.rounds)
    for server in servers:
        world.log(f"done in {time.time() - start:.0f} s; best: {server.run.progress.best_at}; in "
                  f"{server.run.out}")


def open_server(args, settings, task, party_args, world, grid, is_simulated):
    """Return the Server of one model, new or as OUT.state stores it. Raises InputError."""
    strategy, noise_multiplier = make_strategy(settings)
    run = task.open(party_args, world, ["dev"] if task.measures_on(party_args) else [])
    inputs = hash_inputs(task.list_inputs() | list_client_files(args), world)
    server = Server(settings, task, run, strategy, grid, is_simulated, noise_multiplier,
                    flags=vars(args), inputs=inputs)
    restore_server_state(server)
    describe_federation(server)
    return server


def list_client_files(args):
    """Return {path: True} of the records of simulated clients: they are hashed whole."""
    files = {args.data: True} if args.data else {}
    for text in args.client:
        client = dict(word.split("=", 1) for word in split_shell_words("--client", text))
        if client.get("data"):
            files[client["data"]] = True
    return files


def describe_federation(server):
    """Log the lines that a federation starts with."""
    settings, weights = server.settings, server.weights
    count = sum(weight.numel() for weight in weights.values())
    size = 4 if settings.transport == "float32" else 2
    turns = f"{settings.turns} turns of " if settings.mode == "alternate" else ""
    local = f"{settings.local_epochs} epochs"
    if settings.local_updates:
        local = f"{settings.local_updates} updates"
    strategy = " ".join(settings.strategy)
    if settings.privacy:
        strategy += f" in {' '.join(settings.privacy)}"
    server.log(f"{settings.num_clients} clients, {turns}{settings.rounds} rounds of {local}; "
               f"{count:,} weights travel as {settings.transport}, {count * size / 1e6:.1f} MB "
               f"each way; {strategy}")
    if settings.privacy and settings.strategy[0] not in AVERAGES:
        server.log(f"note: no epsilon is reported: the noise is calibrated for an average, "
                   f"and {settings.strategy[0]} does not average")
    if not server.run.dev:
        server.log("note: nothing is measured and the latest model is kept; give a held-out file "
                   "after --: --eval_data, --eval_qrels or --eval_file")


server_app = ServerApp()  # pyproject.toml names it


@server_app.main()
def serve(grid, context):
    """Run the server of a deployed federation, when Flower calls it.

    Raises RuntimeError if the run fails. Flower treats an exit as a killed process: it waits for a
    minute, and shows none of the output.
    """
    def start(_):
        args = read_run_config(context)
        check_command_line(args)
        if args.simulate or args.client:
            raise InputError("a deployed run has Flower's clients; leave out --simulate and "
                             "--client")
        silence_libraries(args)
        federate(args, grid)

    try:
        code = call_main(start, None)
    except SystemExit as end:
        if end.code != BAD_FLAGS:
            raise  # Flower's own exit, which stops the run
        code = end.code
    if code:
        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # the error is already printed
        raise RuntimeError(f"exit code {code}; see the line with 'error:'")


# ---------------------------------------------------------------- client

def make_client_app():
    """Return the ClientApp that does a client's work, in a simulation or in a worker."""
    app = ClientApp()
    app.train()(partial(answer_message, answer_train))
    app.query("retrieve")(partial(answer_message, answer_retrieve))
    app.query("score")(partial(answer_message, answer_score))
    return app


def answer_message(action, message, context):
    """Return the answer to a message: the content that the action makes or, if it fails, an error.

    A failure's reason may quote records. So it is printed here, and the server gets it only if it
    is about weights alone.
    """
    name = str(context.node_config.get("name", "client"))
    try:
        args = read_run_config(context)
        check_command_line(args)
        silence_libraries(args)
        settings, tasks = make_settings(args), make_tasks(args)
        client = read_client(context.node_config)

        def act(message, _):
            return Message(action(message, settings, tasks, client), reply_to=message)

        clip = choose_clipping(settings) if action is answer_train else None
        return clip(message, context, act) if clip else act(message, context)
    except OpenError as error:
        reason = str(error)
    except InputError as error:
        print(f"error at {name}: {error}", file=sys.stderr, flush=True)
        reason = HIDDEN_REASON
    except Exception as error:  # whatever it is, the other clients' round continues
        traceback.print_exc()
        print(f"error at {name}: {first_line(error)}", file=sys.stderr, flush=True)
        reason = HIDDEN_REASON
    return Message(Error(CLIENT_FAILED, f"{name}: {reason}"), reply_to=message)


def choose_clipping(settings):
    """Return Flower's function that clips at the client, or None if the server clips."""
    wrapper = settings.privacy[0] if settings.privacy else ""
    if "ClientSideFixed" in wrapper:
        return fixedclipping_mod
    return adaptiveclipping_mod if "ClientSideAdaptive" in wrapper else None


# ---------------------------------------------------------------- what is trained

def make_tasks(args):
    """Return {mode: Task} of the models to train. Raises InputError if flags after -- are missing.
    """
    modes = ["retriever", "generator"] if args.mode == "alternate" else [args.mode]
    if len(args.script_flags) != len(modes):
        wanted = " ".join(f"-- FLAGS OF {SCRIPTS[mode].__name__}.py" for mode in modes)
        raise InputError(f"--mode {args.mode} needs the training script's flags after its own: "
                         f"{wanted}")
    return {mode: make_task(mode, words) for mode, words in zip(modes, args.script_flags)}


def make_task(mode, words):
    """Return the Task of a mode and the flags after --."""
    return Task(mode, SCRIPTS[mode], words, partial(make_party_args, mode, words))


def make_party_args(mode, words, out, own_words=(), data="", corpus="", index="", dev=""):
    """Return the training script's flags of one party, as its parser would return them.

    Parses the user's words, shared ones first. Then sets the party's own values: the path of its
    model and, unless they are "", its records (data), corpus, index and dev set. Raises InputError
    for words that are not the script's flags.
    """
    words = [*words, *own_words]
    try:
        if mode == "retriever":
            args = train_dense.parse_args(train_dense.__doc__, words, needs_output=False)
        else:
            args = train_epoch.parse_args(words)
    except SystemExit as error:  # argparse has printed the reason, or the help
        if not error.code:
            raise
        raise InputError(f"{SCRIPTS[mode].__name__}.py does not take these flags: "
                         f"{' '.join(words)}") from None
    if args.plan:
        raise InputError("--plan is not offered in a federation; leave it out")
    if mode == "retriever":
        own = {"train_data": [data] if data else None, "corpus": [corpus] if corpus else None}
    else:
        own = {"train_file": data, "corpus": corpus, "index": index, "eval_file": dev}
    own = {name: value for name, value in own.items() if value}
    # the federation has its own state, so a party's script neither resumes nor replaces a run
    return argparse.Namespace(**vars(args) | own | {"output_dir": out, "resume": False,
                                                    "overwrite": False})


# ---------------------------------------------------------------- simulation

def simulate(args, settings, tasks, seed):
    """Open the clients of --simulate or --client. Return their LocalGrid. Raises InputError."""
    clients = list_clients(args, seed)
    for number, client in enumerate(clients, 1):
        client.setdefault("name", f"client{number}")
        client.setdefault("folder", os.path.join(f"{settings.model}.clients", client["name"]))
    names = [client["name"] for client in clients]
    if len(set(names)) < len(names):
        raise InputError(f"two clients are named {max(names, key=names.count)}; give each a name "
                         "of its own")
    folders = [os.path.realpath(client["folder"]) for client in clients]
    if len(set(folders)) < len(folders):
        raise InputError(f"two clients have the folder {max(folders, key=folders.count)}; give "
                         "each one of its own")
    for client in map(read_client, clients):
        if client.processes == 1 and settings.mode != "alternate":
            open_run(tasks[settings.mode], settings, client)  # refuses bad records before round 1
    return LocalGrid(make_client_app(), clients, {"flags": shlex.join(args.arguments)})


def list_clients(args, seed):
    """Return the simulated clients' settings, [{key: value}]; --data is split into files.

    Raises InputError.
    """
    if args.simulate:
        paths = split_file(args.data, args.split, args.simulate, f"{args.model}.clients",
                           args.topic_field, args.alpha, seed)
        return [{"data": path} for path in paths]
    clients = []
    for text in args.client:
        words = split_shell_words("--client", text)
        if not all("=" in word for word in words):
            raise InputError(f"--client {text}: must be KEY=VALUE ..., such as data=FILE name=a")
        clients.append(dict(word.split("=", 1) for word in words))
    return clients


# ---------------------------------------------------------------- flags

def parse_command_line(arguments=None):
    """Return federate.py's flags as a Namespace.

    Its `arguments` holds all words of the command line, its `script_flags` a list of words for each
    --.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    own, *script_flags = split_list(arguments, "--")
    parser = Parser(
        prog="federate.py", description=__doc__, allow_abbrev=False,
        usage="%(prog)s OUT [flags] -- FLAGS OF train_dense.py OR train_epoch.py")
    parser.set_defaults(arguments=arguments, script_flags=script_flags)
    add = parser.add_argument
    add("model", metavar="OUT", type=lambda path: path.rstrip("/"),
        help="folder to write the best global model to")
    add("--mode", choices=["retriever", "generator", "alternate"], required=True,
        help="what to train: a retriever, the reader (generator), or both in turns (alternate), "
        "with contexts found and scored by the global models. alternate writes OUT.retriever and "
        "OUT.generator, and takes the flags of both scripts, each after a --")
    add = parser.add_argument_group("rounds").add_argument
    add("--rounds", type=int, default=10, help="rounds of training")
    add("--local_epochs", type=int, default=1,
        help="passes of each client over its records in a round")
    add("--local_updates", type=int, default=0,
        help="updates of each client in a round; 0: given by --local_epochs")
    add("--local_optimizer", choices=["adamw", "sgd"], default="adamw",
        help="the clients' optimizer; its state is reset in each round")
    add("--transport", choices=["float32", "bf16"], default="float32",
        help="data type of the weights in transit; bf16 halves the bytes")
    add = parser.add_argument_group("alternation").add_argument
    add("--turns", type=int, default=2, help="turns of both models, each of --rounds rounds")
    add("--retrieve_flags", default="", metavar="FLAGS",
        help="further flags of retrieve.py, which finds contexts, such as '--hits 20'")
    add("--score_flags", default="", metavar="FLAGS",
        help="further flags of test.py, which scores them, such as '--batch_size 4'")
    add = parser.add_argument_group("strategy").add_argument
    add("--strategy", nargs="+", default=["FedAvg"], metavar="NAME PARAMETER=VALUE",
        help=f"how to aggregate the clients' weights: {', '.join(list_strategies(False))}, with "
        "Flower's names of the parameters, such as FedAdam eta=0.01 fraction_train=0.5")
    add("--privacy", nargs="+", metavar="NAME PARAMETER=VALUE",
        help="differential privacy around the strategy, with equal weights for all clients: "
        f"{', '.join(list_strategies(True))}, such as noise_multiplier=1 clipping_norm=0.5")
    add = parser.add_argument_group("clients").add_argument
    add("--simulate", type=int, metavar="K", help="simulate K clients in this process")
    add("--data", metavar="FILE", help="records that --split deals out to the simulated clients")
    add("--split", choices=["iid", "topic", "dirichlet"], default="iid",
        help="how to assign records to clients: at random, by whole topics, or by shares of each "
        "topic drawn from Dirichlet(--alpha)")
    add("--alpha", type=float, default=0.5,
        help="parameter of the Dirichlet split: the smaller, the more the clients differ")
    add("--topic_field", default="topic", metavar="FIELD", help="field that holds a record's topic")
    add("--client", action="append", default=[], metavar="'data=FILE name=NAME ...'",
        help="a simulated client with its own file; repeat for each client. Further options: "
        "corpus, index, folder, flags, and processes (run its local step under torchrun)")
    add("--num_clients", type=int,
        help="clients that must be online for a round; default: all simulated clients, else 2")
    add("--min_clients", type=int,
        help="results that a round needs; default: half of the clients, at least one")
    add("--attempts", type=int, default=2, help="how many times to try a round")
    add("--timeout", type=float, default=3600, help="seconds that a round waits for results")
    add("--patience", type=float, default=600, help="seconds to wait for clients to be online")
    add = parser.add_argument_group("run").add_argument
    add("--resume", **RESUME)
    add("--overwrite", **OVERWRITE)
    add("--verbose", action="store_true", help="also show Flower's own messages")
    return parser.parse_args(own)


def split_list(items, separator):
    """Return the parts of a list between the separators."""
    parts = [[]]
    for item in items:
        if item == separator:
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


def read_run_config(context):
    """Return the flags of a run that Flower started, from its one setting `flags`."""
    return parse_command_line(split_shell_words("flags", str(context.run_config.get("flags", ""))))


def check_command_line(args):
    """Raise InputError for flags that cannot work, before anything is read."""
    if not args.model:
        raise InputError("OUT must be a folder other than '' and '/'")
    check_at_least(args, {"turns": 1, "rounds": 1, "local_epochs": 1, "local_updates": 0,
                          "simulate": 1, "num_clients": 1, "min_clients": 1, "attempts": 1,
                          "patience": 0})
    check_positive(args, ["timeout", "alpha"])
    if args.client and (args.simulate or args.data):
        raise InputError("--client gives each client a file, --simulate and --data split one; "
                         "leave out one of the two")
    if args.simulate and not args.data:
        raise InputError("--simulate needs --data, the records to split, or a --client for each")
    if args.data and not args.simulate:
        raise InputError("--data needs --simulate K, the number of clients that share it")
    num_clients, min_clients = count_clients(args)
    simulated = args.simulate or len(args.client)
    if simulated and num_clients > simulated:
        raise InputError(f"--num_clients {num_clients}: only {simulated} clients are simulated; "
                         "simulate more, or lower it")
    if min_clients > num_clients:
        raise InputError(f"--min_clients must be <= the {num_clients} clients, got {min_clients}")


def count_clients(args):
    """Return --num_clients and --min_clients, or their defaults."""
    num_clients = args.num_clients or args.simulate or len(args.client) or 2
    return num_clients, args.min_clients or max(num_clients // 2, 1)


def make_settings(args):
    """Return the Settings of federate.py's flags."""
    num_clients, min_clients = count_clients(args)
    flags = {setting.name: getattr(args, setting.name) for setting in fields(Settings)}
    return Settings(**flags | {"num_clients": num_clients, "min_clients": min_clients})


def silence_libraries(args):
    """Hide the libraries' progress bars and, without --verbose, Flower's messages."""
    transformers.utils.logging.disable_progress_bar()
    if not args.verbose:
        logging.getLogger("flwr").setLevel(logging.ERROR)


def main(args):
    check_command_line(args)
    if not (args.simulate or args.client):
        raise InputError("give --simulate K --data FILE, or a --client for each; over several "
                         "hosts `flwr run` starts the run, see docs/federated.md")
    silence_libraries(args)
    federate(args)


if __name__ == "__main__":
    # besides users, two modules start this script: federated/deployed.py starts a client's worker,
    # and federated/client.py runs a local step under torchrun
    if sys.argv[1:2] == ["--worker"]:
        run_worker(make_client_app(), path=sys.argv[2], supernode=int(sys.argv[3]))
    elif sys.argv[1:2] == ["--local_step"]:
        run_script(partial(run_local_step, make_task), sys.argv[2])
    else:
        run_script(main, parse_command_line())
