"""Deployed federations on loopback: a superlink, a program per client, TLS and keys.

scripts/federate-loopback.sh starts and stops everything.
"""
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, ROOT, WORDS, make_bert, run

pytest.importorskip("flwr")

BIN = Path(sys.prefix) / "bin"
FLAGS = ["--lr", "1e-3", "--warmup_ratio", "0", "--query_max_length", "16", "--key_max_length",
         "24", "--batch_size", "4", "--group_size", "3", "--metrics", "recall", "--cutoffs", "1",
         "5"]
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a folder with a small BERT, records of the clients a and b and of a dev set, their
    corpus, and the clients' settings.
    """
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    make_bert(folder / "bert")
    documents = [" ".join(rng.choices(WORDS, k=rng.randint(5, 15))) for _ in range(40)]
    records = [{"query": " ".join(rng.sample(documents[i].split(), 4)), "pos": [documents[i]],
                "neg": rng.sample(documents[24:], 4), "pos_index": [i], "answers": ["baker"],
                "task": "qa"} for i in range(24)]
    parts = {"a": records[:8], "b": records[8:16], "dev": records[16:],
             "corpus": [{"_id": f"d{i}", "title": "", "text": document}
                        for i, document in enumerate(documents)]}
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    for name in "ab":
        (folder / f"{name}.toml").write_text(f'name = "{name}"\ndata = "{folder}/{name}.jsonl"\n')
    return folder


def task_flags(files):
    """Return the flags of train_dense.py that all clients share."""
    return ["--", "--query_encoder", files / "bert", "--eval_data", files / "dev.jsonl",
            "--corpus", files / "corpus.jsonl", *FLAGS]


def read_rows(path):
    """Return the rows of a log so far, none before the file exists."""
    return [json.loads(line) for line in open(path)] if path.exists() else []


def simulated_clients(files):
    """Return the flags of a simulation of the clients a and b."""
    return [word for name in "ab"
            for word in ("--client", f"name={name} data={files}/{name}.jsonl")]


def same_measures(simulated, deployed):
    """Fail if measures or losses in the logs of two runs differ."""
    rows = [read_rows(path.with_suffix(".jsonl")) for path in (simulated, deployed)]
    assert len(rows[0]) == len(rows[1])
    for own, other in zip(*rows):
        assert other["recall@5"] == own["recall@5"]
        if own["round"]:
            assert other["loss"] == pytest.approx(own["loss"], rel=1e-4)


# ---------------------------------------------------------------- processes

def processes_of(folder):
    """Return {id: command line} of the processes with a FLWR_HOME in the folder or below it."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().decode(errors="replace")
            home = re.search("^FLWR_HOME=(.*)$", environment.replace("\0", "\n"), re.MULTILINE)
            if home and Path(home[1]).is_relative_to(folder):
                found[int(path.name)] = (path / "cmdline").read_bytes().decode()
        except OSError:  # it has ended, or is another user's
            continue
    return {process: line for process, line in found.items() if line}


def programs_of(home):
    """Return the ids of the programs that Flower has started for a client's messages."""
    return {process for process, line in processes_of(home).items() if "flwr-clientapp" in line}


def wait_until(condition, seconds, what):
    """Return the first true value of condition(); fail the test after so many seconds."""
    end = time.time() + seconds
    while not (value := condition()):
        assert time.time() < end, f"{what}: not in {seconds} s"
        time.sleep(0.2)
    return value


@pytest.fixture
def federation(tmp_path):
    """Return a function(clients' files, command line) that starts the script and returns (process,
    FOLDER, port).

    All that is left of it is killed at the end, also if the test fails.
    """
    folder, started = tmp_path / "flower", []

    def start(clients, *flags):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        settings = {"PYTHON": sys.executable, "FOLDER": str(folder), "PORT": str(port),
                    "PAUSE": "1"}
        with open(tmp_path / "output", "w") as output:
            process = subprocess.Popen(
                [str(ROOT / "scripts" / "federate-loopback.sh"), *map(str, clients), "--",
                 *map(str, flags)],
                env=os.environ | ENVIRONMENT | settings, cwd=tmp_path, stdout=output, stderr=output)
        started.append(process)
        return process, folder, port
    yield start
    for process in started:
        process.terminate()
        process.wait(60)
    for process in processes_of(tmp_path):
        os.kill(process, signal.SIGKILL)


# ---------------------------------------------------------------- tests

def test_the_measures_are_those_of_a_simulation(files, tmp_path, federation):
    """Run one round; tests/nightly/test_deployed.py has more rounds, with clients that are killed,
    unknown or without a key, and a run that fails.
    """
    flags = ["--mode", "retriever", "--rounds", 1, "--min_clients", 2]
    process, folder, _ = federation([files / "a.toml", files / "b.toml"], tmp_path / "deployed",
                                    *flags, *task_flags(files))
    run("federate.py", tmp_path / "simulated", *flags, *simulated_clients(files),
        *task_flags(files))
    assert process.wait(250) == 0, (tmp_path / "output").read_text()
    same_measures(tmp_path / "simulated", tmp_path / "deployed")
    assert len(read_rows(tmp_path / "deployed.jsonl")) == 2 and not processes_of(folder)


def test_a_superlink_that_is_not_there_is_told_in_one_line(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "config.toml").write_text(
        f'[superlink.federation]\naddress = "127.0.0.1:{port}"\ninsecure = true\n')
    done = subprocess.run([str(BIN / "flwr"), "run", str(ROOT), "federation", "--stream"],
                          env=os.environ | QUIET | {"FLWR_HOME": str(tmp_path)},
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    told = " ".join(re.sub("[│╭╮╰╯─]", " ", done.stderr).split())  # Flower draws a box around it
    assert "Connection to the SuperLink is unavailable. Please check your network" in told
    assert "Traceback" not in done.stderr
