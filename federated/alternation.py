"""Retriever and reader trained in turns, as FedRAG has it and scripts/alternate.sh does on one
machine: each client finds contexts with the global retriever in its own corpus, the reader is
trained on them for some rounds, each client scores them by the global reader's cross-attention, and
the retriever is trained on the scores (FiD-KD, arXiv 2012.04584).

Contexts and scores stay with the client. Finding and scoring are retrieve.py and test.py, run as a
user would.
"""
import os
import subprocess
import sys

from flwr.app import ConfigRecord, Message, RecordDict

from federated.server import ask_clients, run_rounds
from federated.task import name_party, total_rounds, trained_parameters
from federated.transport import check_same, load_weights, to_wire
from records.reader_records import read_records
from utils import InputError, split_shell_words, start_processes

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONTEXTS, SCORED = "contexts.jsonl", "scored.jsonl"  # in the folder of a client, or the server's


# ---------------------------------------------------------------- one party's files

def save_model(task, folder, own_arguments, party, weights):
    """Writes the global model of {name: tensor} to FOLDER/MODE; returns its path.

    Raises InputError.
    """
    out = os.path.join(folder, task.mode)
    world = name_party(start_processes(task.parse(out, own_arguments).gpus), party)
    run = task.open(out, own_arguments, world, [])
    parameters = trained_parameters(run)
    check_same(weights, parameters, "the server", party)
    load_weights(parameters, weights)
    task.script.save_best(run)
    return out


def find_contexts(args, retriever, records, corpus, folder, index=""):
    """Writes FOLDER/contexts.jsonl, the records with what a retriever finds for them."""
    flags = split_shell_words("--retrieve_flags", args.retrieve_flags)
    run_command("retrieve.py", "--query_encoder", retriever, "--corpus", *corpus, "--index",
                index or os.path.join(folder, "index"), "--overwrite_index", "--eval_data", records,
                "--output", os.path.join(folder, CONTEXTS), *flags)


def score_contexts(args, reader, folder):
    """Writes FOLDER/scored.jsonl, the contexts with a reader's scores."""
    flags = split_shell_words("--score_flags", args.score_flags)
    run_command("test.py", reader, os.path.join(folder, CONTEXTS), "--scores",
                os.path.join(folder, SCORED), *flags)


def run_command(script, *arguments):
    """Runs one of the repository's scripts. Raises InputError with the line that it ends with."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *arguments],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{script}: {last_error(done.stderr)}")


def last_error(text):
    """The first line of a process's output that begins with "error", without the word; else the
    last line.
    """
    lines = [line for line in text.splitlines() if line.strip()] or ["it ended without a word"]
    for line in lines:
        if line.startswith("error"):
            return line.split(": ", 1)[-1]
    return lines[-1]


# ---------------------------------------------------------------- the server's turns

def alternate(args, tasks, open_server):
    """Runs --turns turns of --rounds rounds of each model, from wherever the states stand; returns
    the Servers of both.

    open_server: a function of (mode, further arguments) that returns the Server of a model.
    """
    rounds = total_rounds(args)
    retriever = open_server("retriever", [])
    folder = f"{args.model}.server"
    eval_file = tasks["generator"].parse(folder, []).eval_file
    own_contexts = os.path.join(folder, CONTEXTS)
    reader = None
    for turn in range(1, args.turns + 1):
        last = turn * args.rounds
        if retriever.run.progress.total_updates >= last and turn < args.turns:
            continue  # a resumed run has done this turn

        # in a turn whose retriever's rounds have begun, a resumed run goes on with the contexts and
        # scores that there are: the retriever that found them is no more
        is_scored = retriever.run.progress.total_updates > last - args.rounds
        if not is_scored:
            retriever.log(f"turn {turn}/{args.turns}: finding contexts")
            if eval_file:
                find_own_contexts(args, eval_file, retriever, folder)
            ask(retriever, turn, "retrieve")
        if reader is None:
            reader = open_server("generator", ["--eval_file", own_contexts] if eval_file else [])
        elif eval_file:
            reader.run.dev = read_records(own_contexts, reader.run.num_contexts)
        run_rounds(reader, last, rounds)

        if not is_scored:
            reader.log(f"turn {turn}/{args.turns}: scoring contexts")
            ask(reader, turn, "score")
        run_rounds(retriever, last, rounds)
    return [retriever, reader]


def find_own_contexts(args, eval_file, retriever, folder):
    """Writes the reader's dev set, with the contexts of the global retriever, to FOLDER."""
    model = save_model(retriever.task, folder, [], "the server", retriever.weights)
    find_contexts(args, model, eval_file, corpus_of(retriever.run.args), folder)


def corpus_of(flags):
    """The files of train_dense.py's --corpus. Raises InputError if there are none."""
    if not flags.corpus:
        raise InputError("--mode alternate needs --corpus among the retriever's flags, or a corpus "
                         "in each client's settings: what contexts are found in")
    return flags.corpus


def ask(server, turn, query):
    """Has all clients do what a query says, retrieve or score, with the global model."""
    def make_messages():
        arrays, layout = to_wire(server.weights)
        config = ConfigRecord({"mode": server.task.mode, "layout": layout})
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, dst_node_id=node, message_type=f"query.{query}")
                for node in server.grid.get_node_ids()]

    ask_clients(server, f"turn {turn}, {query}", make_messages, lambda server, reply: None)
