"""A client under Flower: hands each message to a worker that stays from round to round.

Flower starts a program for every message. To import torch, open the model and read the records anew
would take that program longer than many a round, so that it imports none of this: a worker does the
work (federated/worker.py), and the first message of a run starts it.
"""
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from hashlib import blake2b
from multiprocessing.connection import Connection

from flwr.clientapp import ClientApp

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PATIENCE = 300  # seconds that a worker may take to start

client_app = ClientApp()


@client_app.train()
def train(message, context):
    """The answer to a message of training."""
    return ask_worker(message, context)


@client_app.query("retrieve")
def retrieve(message, context):
    """The answer to alternation's message to find contexts."""
    return ask_worker(message, context)


@client_app.query("score")
def score(message, context):
    """The answer to alternation's message to score contexts."""
    return ask_worker(message, context)


def ask_worker(message, context):
    """The worker's answer to a message. Raises EOFError if it ends meanwhile."""
    supernode = find_supernode()
    path = socket_path(context, supernode)
    connection = connect(path)
    if connection is None:
        end_earlier_workers(path)
        connection = start_worker(path, supernode)
    with connection:
        connection.send((message, context))
        return connection.recv()


def socket_path(context, supernode):
    """Where the worker of this client, run and supernode listens: in a folder that is its user's
    alone.
    """
    folder = os.path.join(tempfile.gettempdir(), f"federate-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    about = os.stat(folder)
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise PermissionError(f"{folder}: is not this user's alone; remove it")
    run = json.dumps([ROOT, context.run_id, context.run_config, supernode]).encode()
    return os.path.join(folder, f"{context.node_id}-{blake2b(run, digest_size=8).hexdigest()}")


def connect(path):
    """A connection to the worker that listens there, or None."""
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):  # there is none, or it was killed
        link.close()
        return None
    return Connection(link.detach())


def start_worker(path, supernode):
    """A connection to a new worker. Raises RuntimeError if it does not start."""
    # -P: the modules of this run, not those of the folder that the supernode was started in
    command = [sys.executable, "-P", "-m", "federated.worker", path, str(supernode)]
    worker = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT},
                              stdin=subprocess.DEVNULL, start_new_session=True)
    end = time.time() + PATIENCE
    while time.time() < end and worker.poll() is None:
        connection = connect(path)
        if connection is not None:
            return connection
        time.sleep(0.1)
    raise RuntimeError("the client's worker did not start; its output says why")


def end_earlier_workers(path):
    """Ends this client's workers of earlier runs, which would only hold memory."""
    folder, name = os.path.split(path)
    for other in os.listdir(folder):
        if other.split("-")[0] != name.split("-")[0]:
            continue
        other_path = os.path.join(folder, other)
        connection = connect(other_path)
        if connection is None:  # it was killed
            with suppress(FileNotFoundError):
                os.remove(other_path)
            continue
        with suppress(OSError), connection:
            connection.send(None)


def find_supernode():
    """The process of the flower-supernode that started this one, or 0 where that cannot be told."""
    process = os.getppid()
    while process > 1:
        try:
            with open(f"/proc/{process}/cmdline") as file:
                if "flower-supernode" in file.read():
                    return process
            with open(f"/proc/{process}/stat") as file:
                process = int(file.read().rsplit(")", 1)[1].split()[1])
        except OSError:
            break
    return 0
