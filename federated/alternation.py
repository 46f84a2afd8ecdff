"""Retriever and reader trained in turns, as in FedRAG and, on one machine, in scripts/alternate.sh.

Each client finds contexts in its own corpus with the global retriever, and the reader is trained on
them for some rounds. Then each client scores its contexts by the global reader's cross-attention,
and the retriever is trained on the scores (FiD-KD, arXiv 2012.04584).

Contexts and scores stay with the client. retrieve.py and test.py make them, in separate processes,
as if a user had called them.
"""
import os
import subprocess
import sys

from flwr.app import ConfigRecord, Message, RecordDict

from federated import ROOT
from federated.server import ask_clients, run_rounds
from federated.task import name_party, trained_parameters
from federated.transport import check_same, copy_weights, to_wire
from records.reader_records import read_records
from utils import InputError, split_shell_words, start_processes

# files in the folder of a client, or of the server
CONTEXTS_FILE, SCORED_FILE = "contexts.jsonl", "scored.jsonl"


# ---------------------------------------------------------------- turns

def alternate(settings, tasks, open_server):
    """Train both models for --turns turns, continuing from their states; return both Servers.

    open_server: a function (mode, **values of make_party_args) that returns a model's Server.
    """
    retriever = open_server("retriever")
    folder = f"{settings.model}.server"
    eval_file = tasks["generator"].make_args(folder).eval_file
    own_contexts = os.path.join(folder, CONTEXTS_FILE)
    reader = None
    for turn in range(1, settings.turns + 1):
        last = turn * settings.rounds
        if retriever.run.progress.total_updates >= last and turn < settings.turns:
            continue  # done before the run was resumed

        # A run that is resumed after the retriever's rounds of a turn have begun keeps this turn's
        # contexts and scores: the retriever that found them no longer exists.
        is_scored = retriever.run.progress.total_updates > last - settings.rounds
        if not is_scored:
            retriever.log(f"turn {turn}/{settings.turns}: finding contexts")
            if eval_file:
                find_own_contexts(settings, eval_file, retriever, folder)
            ask(retriever, turn, "retrieve")
        if reader is None:
            reader = open_server("generator", dev=own_contexts if eval_file else "")
        elif eval_file:
            reader.run.dev = read_records(own_contexts, reader.run.num_contexts)
        run_rounds(reader, last)

        if not is_scored:
            reader.log(f"turn {turn}/{settings.turns}: scoring contexts")
            ask(reader, turn, "score")
        run_rounds(retriever, last)
    return [retriever, reader]


def find_own_contexts(settings, eval_file, retriever, folder):
    """Write the reader's dev set with the global retriever's contexts to FOLDER."""
    args = retriever.task.make_args(os.path.join(folder, "retriever"))
    model = save_model(retriever.task, args, "the server", retriever.weights)
    retrieve_contexts(settings, model, eval_file, retriever.run.flags["corpus"], folder)


def ask(server, turn, query):
    """Ask all clients to run a query (retrieve or score) with the global model."""
    def make_messages():
        arrays, layout = to_wire(server.weights)
        config = ConfigRecord({"mode": server.task.mode, "layout": layout})
        content = RecordDict({"arrays": arrays, "config": config})
        return [Message(content, dst_node_id=node, message_type=f"query.{query}")
                for node in server.grid.get_node_ids()]

    ask_clients(server, f"turn {turn}, {query}", make_messages, lambda server, reply: None)


# ---------------------------------------------------------------- one party's files

def save_model(task, args, party, weights):
    """Write the global model with these weights {name: tensor} to the folder in args; return its
    path.

    Raises InputError if the weights belong to another model.
    """
    run = task.open(args, name_party(start_processes(args.gpus), party), [])
    parameters = trained_parameters(run)
    check_same(weights, parameters, "the server", party)
    copy_weights(weights, parameters)
    task.script.save_best(run)
    return run.out


def retrieve_contexts(settings, retriever, records, corpus, folder, index=""):
    """Write FOLDER/contexts.jsonl: the records with the contexts that a retriever finds.

    corpus: train_dense.py's --corpus. Raises InputError if it was not given.
    """
    if not corpus:
        raise InputError("--mode alternate searches a corpus: give --corpus among the retriever's "
                         "flags, or a corpus in each client's settings")
    flags = split_shell_words("--retrieve_flags", settings.retrieve_flags)
    run_script_alone("retrieve.py", "--query_encoder", retriever, "--corpus", *corpus, "--index",
                     index or os.path.join(folder, "index"), "--overwrite_index",
                     "--eval_data", records, "--output", os.path.join(folder, CONTEXTS_FILE),
                     *flags)


def score_with_reader(settings, reader, folder):
    """Write FOLDER/scored.jsonl: the contexts with a reader's scores."""
    flags = split_shell_words("--score_flags", settings.score_flags)
    run_script_alone("test.py", reader, os.path.join(folder, CONTEXTS_FILE), "--scores",
                     os.path.join(folder, SCORED_FILE), *flags)


def run_script_alone(script, *words):
    """Run a script in a separate process. Raises InputError with the script's error."""
    done = subprocess.run([sys.executable, os.path.join(ROOT, script), *words],
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise InputError(f"{script}: {last_error(done.stderr)}")


def last_error(text):
    """Return the first line of a process's output that begins with "error", without that word;
    else the last line.
    """
    lines = [line for line in text.splitlines() if line.strip()] or ["it ended without a message"]
    for line in lines:
        if line.startswith("error"):
            return line.split(": ", 1)[-1]
    return lines[-1]
