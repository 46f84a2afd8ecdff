"""A client under Flower: it passes each message on to a worker that stays from round to round.

Flower starts a program for every message. Importing torch, opening the model and reading the
records takes longer than many rounds do. So this module leaves them to a worker
(federated/worker.py), which the first message of a run starts.
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

from federated import ROOT

WORKER_PATIENCE = 300  # seconds that a worker may take to start

client_app = ClientApp()  # pyproject.toml names it


@client_app.train()
@client_app.query("retrieve")
@client_app.query("score")
def ask_worker(message, context):
    """Return the worker's answer to a message. Raises EOFError if the worker ends meanwhile."""
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
    """Return the path of the socket of the worker for this client, run and supernode.

    Its folder belongs to this user alone. Raises PermissionError if others can enter it.
    """
    folder = os.path.join(tempfile.gettempdir(), f"federate-{os.getuid()}")
    os.makedirs(folder, mode=0o700, exist_ok=True)
    about = os.stat(folder)
    if about.st_uid != os.getuid() or about.st_mode & 0o077:
        raise PermissionError(f"{folder}: other users can enter it; remove it")
    run = json.dumps([ROOT, context.run_id, context.run_config, supernode]).encode()
    return os.path.join(folder, f"{context.node_id}-{blake2b(run, digest_size=8).hexdigest()}")


def connect(path):
    """Return a connection to the worker that listens there, or None."""
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(path)
    except (FileNotFoundError, ConnectionRefusedError):  # no worker, or it was killed
        link.close()
        return None
    return Connection(link.detach())


def start_worker(path, supernode):
    """Start a worker. Return a connection to it. Raises RuntimeError if it does not start."""
    # -P: import this run's modules, not those in the folder that the supernode was started in
    command = [sys.executable, "-P", os.path.join(ROOT, "federate.py"), "--worker", path,
               str(supernode)]
    worker = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": ROOT},
                              stdin=subprocess.DEVNULL, start_new_session=True)
    end = time.time() + WORKER_PATIENCE
    while time.time() < end and worker.poll() is None:
        connection = connect(path)
        if connection is not None:
            return connection
        time.sleep(0.1)
    raise RuntimeError("the client's worker did not start; read its output for the reason")


def end_earlier_workers(path):
    """End this client's workers of earlier runs, which only hold memory."""
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
    """Return the id of the flower-supernode that started this process, or 0 if /proc is not
    readable.
    """
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
