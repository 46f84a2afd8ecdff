"""The worker of a deployed client (federated/deployed.py): answers its messages, one after another,
with the model open and the records read. It ends with its supernode, with the next run, or when it
has long had nothing to do.
"""
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection

IDLE = 1800  # seconds without a message after which a worker ends: the next one starts another


def work(path):
    """Answers the messages that come to a socket; None ends it."""
    from federate import client_app  # takes seconds, and the socket is there when it is done

    with suppress(FileNotFoundError):
        os.remove(path)  # of a worker that was killed
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        listener.settimeout(IDLE)
        with suppress(TimeoutError):
            while answer_one(listener, client_app):
                pass


def answer_one(listener, client_app):
    """Answers the next message; False if it was the last one. Raises TimeoutError."""
    link, _ = listener.accept()
    with suppress(EOFError, ConnectionError), Connection(link.detach()) as connection:
        # who asked may have been killed meanwhile
        request = connection.recv()
        if request is None:
            return False
        connection.send(client_app(*request))
    return True


def end_with(supernode):
    """Interrupts this process when another one, a process id, has ended."""
    while is_alive(supernode):
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def is_alive(process):
    """True for a process that runs."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def main(path, supernode):
    # also in the middle of a local step, whose processes are then ended as well
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if supernode:
        threading.Thread(target=end_with, args=[supernode], daemon=True).start()
    try:
        work(path)
    finally:
        with suppress(FileNotFoundError):
            os.remove(path)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
