"""The rounds of a federation, seen from the server: which clients it asks, which answers it
accepts, what the strategy makes of them, and how good the result is.

Flower's strategies have a loop of their own. This one also repeats a failed round, leaves out
answers that would spoil the average, resumes after a kill, and keeps the best model.
"""
import math
import os
import random
import re
import time
import zlib
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from flwr.app import ConfigRecord, RecordDict

from federated.strategies import count_replies, epsilon, restore_strategy, strategy_state
from federated.task import Settings, Task, trained_parameters
from federated.transport import (
    CLIENT_FAILED,
    CLIENT_NAME,
    check_same,
    copy_weights,
    count_bytes,
    digest_frozen,
    from_wire,
    is_finite,
    pack,
    to_wire,
    unpack,
)
from training.checkpoints import check_weights, load_torch_file
from training.loop import Progress, Run, RunLog
from training.resume import (
    START_ANEW,
    allow_no_inputs,
    check_form,
    refuse_other_flags,
    refuse_other_inputs,
    write_state,
)
from utils import InputError, first_line, format_seconds, refusing, shorten

# flags that may change when a run is resumed: the weights do not depend on them
FREE_FEDERATION_FLAGS = {"resume", "overwrite", "timeout", "patience", "attempts", "min_clients",
                         "num_clients", "verbose", "arguments", "script_flags"}
# {part of OUT.state: its type}
SERVER_STATE = {"weights": dict, "strategy": list, "progress": dict, "args": dict, "flags": dict,
                "inputs": dict}


@dataclass
class Server:
    """Hold what the rounds of one model share."""
    settings: Settings
    task: Task
    run: Run                   # the global model, and what it is measured on
    strategy: object
    grid: object
    simulated: bool            # True: the same command gives the same result
    noise_multiplier: float    # of --privacy
    flags: dict                # federate.py's, which a resumed run must have again
    inputs: dict = field(default_factory=dict)  # {path: size and hash}, see resume.hash_inputs
    names: dict = field(default_factory=dict)   # {node: the name that the client sent}
    has_started: bool = False  # --num_clients were online once

    @property
    def weights(self):
        """Return {name: tensor} of the global model's trained weights."""
        return {name: parameter.detach() for name, parameter
                in trained_parameters(self.run).items()}

    @property
    def log(self):
        return self.run.world.log

    def name(self, node):
        return self.names.get(node, f"node {node}")

    def name_sender(self, reply):
        return self.name(reply.metadata.src_node_id)

    def remember_name(self, node, name):
        """Keep the name that a client sends, unless another client has it."""
        others = [given for other, given in self.names.items() if other != node]
        if isinstance(name, str) and re.fullmatch(CLIENT_NAME, name) and name not in others:
            self.names[node] = name


# ---------------------------------------------------------------- rounds

def run_rounds(server, last):
    """Train up to round `last`, starting after the last completed round."""
    progress, first = server.run.progress, server.run.progress.total_updates + 1
    if not progress.rows:
        report_round(server, {"round": 0})
    while progress.total_updates < last:
        start = time.time()
        report_round(server, run_round(server, progress.total_updates + 1))
        save_server_state(server)
        if progress.total_updates == first < last:
            seconds, left = time.time() - start, last - first
            server.log(f"cost: {left} rounds at {format_seconds(seconds)}, evaluation included, "
                       f"{format_seconds(seconds * left)}")


def run_round(server, number):
    """Train the global model for one round. Return its row for the log.

    A round with too few answers is repeated. Raises InputError if it fails --attempts times, or if
    the strategy makes no model of the answers.
    """
    start = time.time()
    messages, replies, left_out = ask_clients(
        server, f"round {number}", lambda: make_messages(server, number), check_answer)
    bytes_down = sum(count_bytes(message.content["arrays"]) for message in messages)
    clients = {server.name_sender(reply): dict(reply.content["metrics"]) for reply in replies}
    aggregate(server, number, replies)
    examples = sum(client["num-examples"] for client in clients.values())
    loss = sum(client["train_loss"] * client["num-examples"] for client in clients.values())
    return {"round": number, "loss": loss / examples, "examples": examples, "clients": clients,
            "left_out": left_out, "bytes_down": bytes_down,
            "bytes_up": sum(client["bytes_up"] for client in clients.values()),
            "round_seconds": time.time() - start}


def make_messages(server, number):
    """Return the strategy's messages to the clients of a round, with the weights to send."""
    config = ConfigRecord({"mode": server.task.mode, "round": number,
                           "rounds": server.settings.total_rounds,
                           "frozen": digest_frozen(server.run)})
    weights = pack(server.weights)
    messages = list(server.strategy.configure_train(number, weights, config, server.grid))
    arrays, layout = to_wire(server.weights, server.settings.transport)
    for message in messages:
        own_config = ConfigRecord(dict(message.content["config"]) | {"layout": layout})
        message.content = RecordDict({"arrays": arrays, "config": own_config})
    return messages


def aggregate(server, number, replies):
    """Aggregate the clients' weights with the strategy, and load the result into the global model.
    Raises InputError.
    """
    name = server.settings.strategy[0]
    count_replies(server.strategy, len(replies))
    with refusing(f"round {number}: {name} fails on {len(replies)} answers",
                  "correct its parameters, or use another --strategy"):
        arrays, _ = server.strategy.aggregate_train(number, replies)
    if not arrays:
        raise InputError(f"round {number}: {name} made no model of {len(replies)} answers; correct "
                         "its parameters, or ask more clients")
    tensors = unpack(arrays)
    for weight, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(f"round {number}: {name} made {weight} not finite; correct its "
                             f"parameters; --resume continues after round {number - 1}")
    copy_weights(tensors, trained_parameters(server.run))


# ---------------------------------------------------------------- asking the clients

def ask_clients(server, what, make_messages, check):
    """Return (messages, the replies that `check` accepts, a line for each client that is left out).

    Replies are in the order of the clients' names. Asks again if too few are accepted; raises
    InputError after --attempts.
    """
    settings = server.settings
    for attempt in range(1, settings.attempts + 1):
        wait_for_clients(server)
        # None seeds from the system, so that nobody can guess a deployed run's noise, or the choice
        # of clients
        seed = None
        if server.simulated:
            seed = zlib.crc32(f"{server.run.args.seed}/{what}/{attempt}".encode())
        random.seed(seed)
        np.random.seed(seed)
        messages = make_messages()
        for message in messages:
            # a client that was away must not work through the rounds that it missed
            message.metadata.ttl = settings.timeout
        replies = server.grid.send_and_receive(messages, timeout=settings.timeout)
        good, left_out = sort_replies(server, messages, list(replies), check)
        for line in left_out:
            server.log(f"{what}: left out {line}")
        if len(good) >= settings.min_clients:
            return messages, good, left_out
        server.log(f"{what}: {len(good)} of {len(messages)} clients answered, --min_clients "
                   f"{settings.min_clients}; attempt {attempt} of {settings.attempts}")
    why = f": {left_out[0]}" if left_out else ""
    raise InputError(f"{what} had {len(good)} of the {settings.min_clients} clients that it needs, "
                     f"in {settings.attempts} attempts{why}; repair the clients, or lower "
                     "--min_clients; --resume continues after the last complete round")


def wait_for_clients(server):
    """Wait until --num_clients are online or, if they have been before, until --min_clients are.

    Raises InputError after --patience.
    """
    settings = server.settings
    wanted = settings.min_clients if server.has_started else settings.num_clients
    deadline, is_logged = time.time() + settings.patience, False
    while (online := len(list(server.grid.get_node_ids()))) < wanted:
        if time.time() > deadline:
            raise InputError(f"{online} of {wanted} clients are online after "
                             f"{settings.patience:g} s; start more of them, or lower --num_clients "
                             "and --min_clients")
        if not is_logged:
            server.log(f"waiting for {wanted} clients, {online} online")
            is_logged = True
        time.sleep(1)
    server.has_started = True


def sort_replies(server, messages, replies, check):
    """Return (the replies that `check` accepts, by the client's name; a line for each client that
    is left out).
    """
    good, left_out = [], []
    waiting = {message.metadata.dst_node_id for message in messages}
    # Flower's server sends Flower's own errors, so the message that they answer gives the client
    asked = {message.metadata.message_id: message.metadata.dst_node_id for message in messages
             if message.metadata.message_id}
    for reply in replies:
        node = asked.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
        waiting.discard(node)
        if reply.has_error():
            left_out.append(describe_error(server, node, reply.error))
            continue
        try:
            server.remember_name(node, reply.content["config"]["name"])
            check(server, reply)
            good.append(reply)
        except InputError as error:
            left_out.append(f"{server.name(node)}: {error}")
        except (KeyError, TypeError) as error:  # the answer of another program
            left_out.append(f"{server.name(node)}: its answer lacks parts ({first_line(error)})")
    for node in sorted(waiting):
        left_out.append(f"{server.name(node)}: no answer in {server.settings.timeout:g} s")
    # replies arrive in any order, and sums depend on it
    good.sort(key=lambda reply: (server.name_sender(reply), reply.metadata.src_node_id))
    return good, left_out


def describe_error(server, node, error):
    """Return one line: which client did not answer, and why."""
    reason = (error.reason or "no reason given").strip().splitlines()[-1]
    if error.code != CLIENT_FAILED:  # Flower's own error, for example of a lost node
        return f"{server.name(node)}: {reason}"
    name, _, reason = reason.partition(": ")
    server.remember_name(node, name)
    return f"{server.name(node)}: {reason}"


def check_answer(server, reply):
    """Check a client's answer. Convert its weights to the form that strategies take, and add the
    number of bytes received to its metrics.

    Raises InputError for weights of another model, and for any number that is not finite.
    """
    name = server.name_sender(reply)
    metrics = reply.content["metrics"]
    if "train_loss" not in metrics:
        raise KeyError("train_loss")
    metrics["bytes_up"] = count_bytes(reply.content["arrays"])
    tensors = from_wire(reply.content["arrays"], reply.content["config"]["layout"])
    own = server.weights
    check_same(tensors, own, name, "the server")
    for weight, tensor in tensors.items():
        if not is_finite(tensor):
            raise InputError(f"{weight} is not finite there; look at its records, or lower --lr")
    if server.settings.privacy and all(torch.equal(tensors[weight], own[weight].cpu())
                                       for weight in own):
        raise InputError("it sent the global weights back, which cannot be clipped")
    if server.settings.transport == "bf16":
        tensors = {weight: own[weight].cpu() + tensors[weight] for weight in own}
    if not all(math.isfinite(value) for value in metrics.values()):
        raise InputError(f"its metrics are not finite: {shorten(dict(metrics))}")
    if not metrics["num-examples"] > 0:
        raise InputError("it has trained on no example; give it records")
    reply.content["arrays"] = pack({weight: tensors[weight] for weight in own})


# ---------------------------------------------------------------- measuring and reporting

def report_round(server, row):
    """Measure the global model, keep it if it is the best so far, and log a line and a row."""
    run, task, progress = server.run, server.task, server.run.progress
    progress.epoch = progress.total_updates = row["round"]
    measures, is_best = {}, True  # without a dev set the latest model is kept
    if run.dev:
        measures = task.script.evaluate(run)
        is_best = task.script.keep_measures(run, measures)
    if is_best:
        words = f"{task.describe_measures(measures)} in " if measures else ""
        progress.best_at = f"{words}round {row['round']}"
    row |= measures | {"mode": task.mode, "best": is_best}
    if server.settings.privacy:
        bound = epsilon(server.noise_multiplier, row["round"])
        row["epsilon"] = bound if math.isfinite(bound) else None  # JSON has no infinity
    server.log(describe_round(server, row, measures))
    run.log.row(row, row["round"])
    progress.rows += 1
    if is_best:
        task.script.save_best(run)


def describe_round(server, row, measures):
    """Return the log line of a round."""
    parts = [f"round {row['round']:3d}/{server.settings.total_rounds}"]
    if "loss" in row:
        losses = [f"{name} {client['train_loss']:.3f}" for name, client in row["clients"].items()]
        more = ", ..." if len(losses) > 6 else ""
        parts.append(f"loss {row['loss']:.4f} ({', '.join(losses[:6])}{more})")
    if measures:
        parts.append(server.task.describe_measures(measures))
    if row.get("epsilon") is not None:
        parts.append(f"epsilon {row['epsilon']:.1f}")
    if "loss" in row:
        parts.append(f"{row['bytes_down'] / 1e6:.1f} MB down, {row['bytes_up'] / 1e6:.1f} MB up")
    seconds = f"{row.get('round_seconds', 0):.1f} s"
    if measures:
        seconds += f" + {measures['eval_seconds']:.1f} s"
    parts.append(seconds)
    return " | ".join(parts) + (" | best" if row["best"] else "")


# ---------------------------------------------------------------- resuming

def save_server_state(server):
    """Write OUT.state: what the next round depends on, and the best measures so far."""
    write_state(f"{server.run.out}.state", {
        "weights": {name: weight.cpu() for name, weight in server.weights.items()},
        "strategy": strategy_state(server.strategy), "progress": asdict(server.run.progress),
        "args": server.flags, "flags": server.run.flags, "inputs": server.inputs})


def restore_server_state(server):
    """Restore what save_server_state wrote, if --resume is given and OUT.state exists.

    Raises InputError for a state of other flags or of another model, and for a damaged one.
    """
    run, path = server.run, f"{server.run.out}.state"
    if not server.settings.resume or not os.path.exists(path):
        return
    state = load_torch_file(path)
    allow_no_inputs(state)
    check_form(state, SERVER_STATE, path)
    check_form(state["progress"], {name: type(value) for name, value in asdict(Progress()).items()},
               path)
    refuse_other_flags(path, server.flags, state["args"], FREE_FEDERATION_FLAGS)
    refuse_other_flags(path, run.flags, state["flags"], server.task.script.FREE_FLAGS)
    refuse_other_inputs(path, server.inputs, state["inputs"])
    check_weights(state["weights"], path)
    check_same(state["weights"], server.weights, path, "the model of these flags")
    done = state["progress"]["total_updates"]
    if (not 0 <= done <= server.settings.total_rounds
            or not all(map(is_finite, state["weights"].values()))):
        raise InputError(f"{path}: it ends after round {done}, or its weights are not finite; "
                         f"{START_ANEW}")
    with refusing(f"{path}: the strategy's state is damaged", START_ANEW):
        restore_strategy(server.strategy, state["strategy"])
    copy_weights(state["weights"], trained_parameters(run))
    run.progress = Progress(**state["progress"])
    run.log = RunLog(f"{run.out}.jsonl", run.world.is_main, run.progress.rows)
    server.log(f"resuming after round {run.progress.total_updates}")
