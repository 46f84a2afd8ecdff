r"""Trains a retriever or a reader that many parties share, each on records that stay with it:
train_dense.py's and train_epoch.py's steps, federated by Flower (https://flower.ai).

    python federate.py OUT --mode retriever --simulate 4 --data train.json --split iid --rounds 10 \
        -- --query_encoder BAAI/bge-base-en --eval_data dev.json --corpus corpus.jsonl
    python federate.py OUT --mode generator --client 'name=a data=a.json' \
        --client 'name=b data=b.json' --strategy FedProx proximal_mu=0.1 \
        -- --t5_name t5-base --eval_file dev.json --num_contexts 20

Behind `--` stand the flags of train_dense.py (retriever) or train_epoch.py (generator), which all
parties share. Over several hosts the same flags are given to `flwr run`: docs/federated.md.

Written: OUT (the best global model, as the training script writes it), OUT.jsonl (a row per round),
OUT.state (for --resume), and in a simulation OUT.clients (the clients' records).
"""
import logging
import os
import shlex
import sys
import time
import traceback
from contextlib import ExitStack, suppress

# before Flower is imported: nothing is reported to its makers
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

from federated import client as client_side
from federated.alternation import alternate
from federated.client import read_client
from federated.server import Server, restore_state, run_rounds
from federated.simulation import LocalGrid
from federated.split import split_file
from federated.strategies import AVERAGES, list_strategies, make_strategy
from federated.task import check_mode
from federated.transport import CLIENT_FAILED, OpenError
from training.output_folder import claim_folder
from training.resume import hash_inputs
from utils import (
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

BAD_FLAGS = 2  # the exit code of argparse
UNTOLD = "cannot train on its records; its own output says why"  # what they hold stays there


# ---------------------------------------------------------------- flags

def parse_args(arguments=None):
    """federate.py's flags as a Namespace, with `script_flags`, the lists of the flags behind each
    `--`, and `arguments`, all of them as they were given.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    own, *script_flags = split_list(arguments, "--")
    parser = Parser(
        prog="federate.py", description=__doc__, allow_abbrev=False,
        usage="%(prog)s OUT [flags] -- FLAGS OF train_dense.py OR train_epoch.py")
    add = parser.add_argument
    add("model", metavar="OUT", help="folder to write the best global model to")
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
        help="clients that must be online for a round; default: all simulated ones, else 2")
    add("--min_clients", type=int,
        help="results that a round needs; default: half of the clients, at least one")
    add("--attempts", type=int, default=2, help="how many times to try a round")
    add("--timeout", type=float, default=3600, help="seconds that a round waits for results")
    add("--patience", type=float, default=600, help="seconds to wait for clients to be online")
    add = parser.add_argument_group("run").add_argument
    add("--resume", action="store_true",
        help="continue from OUT.state; start from scratch if there is no such file")
    add("--overwrite", action="store_true",
        help="replace the OUT of an earlier run, and start from scratch")
    add("--verbose", action="store_true", help="also show Flower's own messages")
    args = parser.parse_args(own)
    args.script_flags, args.arguments = script_flags, arguments
    return args


def split_list(items, separator):
    """The parts of a list between the separators."""
    parts = [[]]
    for item in items:
        if item == separator:
            parts.append([])
        else:
            parts[-1].append(item)
    return parts


def check_args(args):
    """Rejects wrong flags before anything is read; sets the numbers of clients.

    Raises InputError.
    """
    args.model = args.model.rstrip("/")
    if not args.model:
        raise InputError("the model's folder is '' or '/'; name one")
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
    simulated = args.simulate or len(args.client)
    args.num_clients = args.num_clients or simulated or 2
    if simulated and args.num_clients > simulated:
        raise InputError(f"--num_clients {args.num_clients}: there are {simulated} clients; "
                         "simulate more, or ask for fewer")
    args.min_clients = args.min_clients or max(args.num_clients // 2, 1)
    if args.min_clients > args.num_clients:
        raise InputError(f"--min_clients {args.min_clients} is more than the {args.num_clients} "
                         "clients that there are; lower it")


# ---------------------------------------------------------------- client

client_app = ClientApp()


@client_app.train()
def train(message, context):
    """Flower's entry to a client: the answer to a message of training."""
    return answer(message, context, client_side.train)


@client_app.query("retrieve")
def retrieve(message, context):
    """The answer to alternation's message to find contexts."""
    return answer(message, context, client_side.retrieve)


@client_app.query("score")
def score(message, context):
    """The answer to alternation's message to score contexts."""
    return answer(message, context, client_side.score)


def answer(message, context, action):
    """The message that answers: what the action returns or, where it fails, an error.

    The reason of a failure may quote records, and is printed here; the server is told it only if it
    speaks of weights alone.
    """
    name = str(context.node_config.get("name", "client"))
    try:
        args = read_run_config(context)
        check_args(args)
        silence_libraries(args)
        settings = read_client(context.node_config)
        tasks = check_mode(args.mode, args.script_flags)

        def act(message, _):
            return Message(action(message, args, tasks, settings), reply_to=message)

        clip = choose_clipping(args) if action is client_side.train else None
        return clip(message, context, act) if clip else act(message, context)
    except OpenError as error:
        reason = str(error)
    except InputError as error:
        print(f"error at {name}: {error}", file=sys.stderr, flush=True)
        reason = UNTOLD
    except Exception as error:  # whatever it is, it must not end the others' round
        traceback.print_exc()
        print(f"error at {name}: {first_line(error)}", file=sys.stderr, flush=True)
        reason = UNTOLD
    return Message(Error(CLIENT_FAILED, f"{name}: {reason}"), reply_to=message)


def choose_clipping(args):
    """Flower's function that clips a client's weights there, or None if the server does it."""
    wrapper = args.privacy[0] if args.privacy else ""
    if "ClientSideFixed" in wrapper:
        return fixedclipping_mod
    return adaptiveclipping_mod if "ClientSideAdaptive" in wrapper else None


def read_run_config(context):
    """federate.py's flags, from the run's one setting `flags`."""
    return parse_args(split_shell_words("flags", str(context.run_config.get("flags", ""))))


# ---------------------------------------------------------------- server

server_app = ServerApp()


@server_app.main()
def serve(grid, context):
    """Flower's entry to the server of a deployed run. Raises RuntimeError if the run fails.

    Flower calls a run failed whose server raises. One that exits is taken for killed: Flower waits
    for it for a minute, and none of its lines are shown.
    """
    def start(_):
        args = read_run_config(context)
        check_args(args)
        if args.simulate or args.client:
            raise InputError("a deployed run has Flower's clients; leave out --simulate and "
                             "--client")
        silence_libraries(args)
        federate(args, grid)

    try:
        code = call_main(start, None)
    except SystemExit as end:
        if end.code != BAD_FLAGS:
            raise  # Flower's own, which stops the run
        code = end.code
    if code:
        logging.getLogger("flwr").setLevel(logging.CRITICAL)  # the error is told, in one line
        raise RuntimeError(f"exit code {code}; the line with 'error:' says why")


def federate(args, grid=None):
    """Runs a federation's rounds over a grid, or over one of simulated clients.

    Raises InputError.
    """
    tasks = check_mode(args.mode, args.script_flags)
    outs = {mode: args.model for mode in tasks}
    if args.mode == "alternate":
        outs = {mode: f"{args.model}.{mode}" for mode in tasks}
    flags = next(iter(tasks.values())).parse(args.model, [])
    world = start_processes(flags.gpus)
    if world.size > 1:
        raise InputError("start federate.py without torchrun; processes=N in a client's settings "
                         "runs its local step under torchrun")
    start = time.time()
    with ExitStack() as claims:
        for out in outs.values():
            claims.enter_context(claim_folder(out, args.resume, args.overwrite, world))
        simulated = grid is None
        if simulated:
            grid = simulate(args, tasks, flags.seed)
        if args.overwrite:
            for out in outs.values():  # --resume must not go on with the run that is replaced
                with suppress(FileNotFoundError):
                    os.remove(f"{out}.state")

        def open_model(mode, arguments):
            return open_server(args, tasks[mode], outs[mode], arguments, world, grid, simulated)

        if args.mode == "alternate":
            servers = alternate(args, tasks, open_model)
        else:
            servers = [open_model(args.mode, [])]
            run_rounds(servers[0], args.rounds, args.rounds)
    for server in servers:
        world.log(f"done in {time.time() - start:.0f} s; best: {server.run.progress.best_at}; in "
                  f"{server.run.out}")


def open_server(args, task, out, arguments, world, grid, simulated):
    """Return the Server of one model, from the start or from OUT.state. Raises InputError."""
    strategy, noise_multiplier = make_strategy(args)
    sets = ["dev"] if task.measures_on(task.parse(out, arguments)) else []
    run = task.open(out, arguments, world, sets)
    server = Server(args, task, run, strategy, grid, simulated, noise_multiplier,
                    inputs=hash_inputs(list_inputs(args, task, out), world))
    restore_state(server)
    describe(server)
    return server


def list_inputs(args, task, out):
    """Return {path: whether all of it is hashed} of the server's files and of the records of
    simulated clients.
    """
    files = task.list_inputs(out)
    if args.data:
        files[args.data] = True
    for text in args.client or []:
        client = dict(word.split("=", 1) for word in split_shell_words("--client", text))
        files |= dict.fromkeys(filter(None, [client.get("data")]), True)
    return files


def describe(server):
    """Logs the lines that a federation starts with."""
    args, weights = server.args, server.weights
    count = sum(weight.numel() for weight in weights.values())
    size = 4 if args.transport == "float32" else 2
    privacy = " ".join(args.privacy or [])
    turns = f"{args.turns} turns of " if args.mode == "alternate" else ""
    local = f"{args.local_updates} updates" if args.local_updates else f"{args.local_epochs} epochs"
    server.log(f"{args.num_clients} clients, {turns}{args.rounds} rounds of {local}; {count:,} "
               f"weights travel as {args.transport}, {count * size / 1e6:.1f} MB each way; "
               f"{' in '.join([' '.join(args.strategy), *filter(None, [privacy])])}")
    if args.privacy and args.strategy[0] not in AVERAGES:
        server.log(f"note: no epsilon is reported: the noise is calibrated for an average, "
                   f"and {args.strategy[0]} does not average")
    if not server.run.dev:
        server.log("note: nothing is measured, the latest model is kept; --eval_data, --eval_qrels "
                   "or --eval_file behind -- name a held-out file")


# ---------------------------------------------------------------- simulation

def simulate(args, tasks, seed):
    """The LocalGrid of the clients of --simulate or --client, which are opened. Raises InputError.
    """
    settings = client_settings(args, seed)
    for number, client in enumerate(settings, 1):
        client.setdefault("name", f"client{number}")
    names = [client["name"] for client in settings]
    if len(set(names)) < len(names):
        raise InputError(f"two clients are named {max(names, key=names.count)}; give each a name "
                         "of its own")
    for client in settings:
        client.setdefault("folder", os.path.join(f"{args.model}.clients", client["name"]))
    folders = [os.path.realpath(client["folder"]) for client in settings]
    if len(set(folders)) < len(folders):
        raise InputError(f"two clients have the folder {max(folders, key=folders.count)}; give "
                         "each one of its own")
    for client in settings:
        client = read_client(client)
        if client.processes == 1 and args.mode != "alternate":
            # what is wrong with it shows now
            client_side.open_run(tasks[args.mode], args, client)
    return LocalGrid(client_app, settings, {"flags": shlex.join(args.arguments)})


def client_settings(args, seed):
    """[{key: value}] of the simulated clients; writes their parts of --data. Raises InputError."""
    if args.simulate:
        paths = split_file(args.data, args.split, args.simulate, f"{args.model}.clients",
                           args.topic_field, args.alpha, seed)
        return [{"data": path} for path in paths]
    settings = []
    for text in args.client:
        words = split_shell_words("--client", text)
        if not all("=" in word for word in words):
            raise InputError(f"--client {text}: must be KEY=VALUE ..., such as data=FILE name=a")
        settings.append(dict(word.split("=", 1) for word in words))
    return settings


def silence_libraries(args):
    """Keeps the progress bars and messages of libraries off the screen."""
    transformers.utils.logging.disable_progress_bar()
    if not args.verbose:
        logging.getLogger("flwr").setLevel(logging.ERROR)


def main(args):
    check_args(args)
    if not (args.simulate or args.client):
        raise InputError("give --simulate K --data FILE, or a --client for each; over several "
                         "hosts the run is started by `flwr run`, see docs/federated.md")
    silence_libraries(args)
    federate(args)


if __name__ == "__main__":
    run_script(main, parse_args())
