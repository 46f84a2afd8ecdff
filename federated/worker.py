"""The worker of a deployed client (federated/deployed.py): it holds the model and the records, and
answers one message after another.

deployed.py starts it as `federate.py --worker`, which passes in the ClientApp. A worker ends with
its supernode, with the next run, or after half an hour without a message.
"""
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection

IDLE = 1800  # seconds without a message after which a worker ends; the next message starts another


def run_worker(client_app, path, supernode):
    """Answer messages at a socket until the worker's end; supernode: a process id, or 0."""
    # Also ends the processes of a local step: the exit runs the `finally` in train_with_torchrun.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if supernode:
        threading.Thread(target=end_with, args=[supernode], daemon=True).start()
    try:
        answer_messages(client_app, path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(path)


def answer_messages(client_app, path):
    """Answer the messages that come to a socket, until one is None or none comes for IDLE."""
    with suppress(FileNotFoundError):
        os.remove(path)  # left by a worker that was killed
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(IDLE)
        with suppress(TimeoutError):
            while answer_one(client_app, listener):
                pass


def answer_one(client_app, listener):
    """Answer the next message. Return False if it was the last one. Raises TimeoutError."""
    link, _ = listener.accept()
    # the program that connected may have been killed meanwhile
    with suppress(EOFError, ConnectionError), Connection(link.detach()) as connection:
        request = connection.recv()
        if request is None:
            return False
        connection.send(client_app(*request))
    return True


def end_with(supernode):
    """Interrupt this process when another process, given by its id, has ended."""
    while is_alive(supernode):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def is_alive(process):
    """Return True for the id of a process that runs."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
