"""Deployed federations that go wrong: a client that is killed, which Flower needs a minute to
notice, clients without a key, and a run that fails.
"""
import os
import signal
import socket
import subprocess

from conftest import run
from test_federate_deployed import (
    BIN,
    QUIET,
    federation,  # noqa: F401 (a fixture)
    files,  # noqa: F401 (a fixture)
    processes_of,
    programs_of,
    read_rows,
    same_measures,
    simulated_clients,
    task_flags,
    wait_until,
)


def test_a_killed_client_comes_back_and_the_measures_are_those_of_a_simulation(
        files, tmp_path, federation):  # noqa: F811
    flags = ["--mode", "retriever", "--rounds", 2, "--min_clients", 2, "--attempts", 9,
             # a client that is back before Flower has missed it is noticed by this alone
             "--timeout", 60]
    process, folder, _ = federation([files / "a.toml", files / "b.toml"], tmp_path / "deployed",
                                    *flags, *task_flags(files))
    run("federate.py", tmp_path / "simulated", *flags, *simulated_clients(files),
        *task_flags(files))

    # in the middle of the second round
    rows = tmp_path / "deployed.jsonl"
    wait_until(lambda: len(read_rows(rows)) == 2, 200, "the first round")
    earlier = programs_of(folder / "b")  # those of the first round may not have ended yet
    wait_until(lambda: programs_of(folder / "b") - earlier, 60, "the client at work")
    os.kill(int((folder / "b.pid").read_text()), signal.SIGKILL)
    assert process.wait(300) == 0, (tmp_path / "output").read_text()

    output = (tmp_path / "output").read_text()
    assert "client b ended with code 137; it is started again" in output
    assert "round 2: left out b: " in output and "round 2: 1 of 2 clients answered" in output
    same_measures(tmp_path / "simulated", tmp_path / "deployed")
    assert len(read_rows(rows)) == 3 and not processes_of(folder)


def test_a_client_without_a_registered_key_is_turned_away_and_nothing_outlives_the_script(
        files, tmp_path, federation):  # noqa: F811
    process, folder, port = federation([files / "a.toml"], tmp_path / "out", "--mode", "retriever",
                                       *task_flags(files))
    wait_until(lambda: (folder / "a.key").exists() and processes_of(folder), 100, "the superlink")
    wait_until(lambda: "registered" in (folder / "superlink.log").read_text(), 100, "client a")
    subprocess.run(["ssh-keygen", "-q", "-t", "ecdsa", "-b", "384", "-N", "", "-f",
                    str(tmp_path / "stranger.key")], check=True)
    keys = {"unknown": ["--auth-supernode-private-key", str(tmp_path / "stranger.key")],
            "none": []}
    strangers = {name: start_supernode(port, folder, tmp_path / name, *flags)
                 for name, flags in keys.items()}
    reasons = {"unknown": "Failed to activate SuperNode",
               "none": "SuperNode authentication is enabled. All SuperNodes must be registered"}
    for name, stranger in strangers.items():
        assert stranger.wait(100) == 1
        assert reasons[name] in (tmp_path / f"{name}.log").read_text()

    # the server still waits for a second client
    wait_until(lambda: "waiting for 2 clients, 1 online" in (tmp_path / "output").read_text(),
               100, "the server")
    process.terminate()
    assert process.wait(60) == 143
    assert not processes_of(folder)
    wait_until(lambda: not processes_of(tmp_path), 30, "the end of what the strangers started")


def test_a_run_that_fails_is_told_and_fails_the_script(
        files, tmp_path, federation):  # noqa: F811
    process, folder, _ = federation([files / "a.toml"], tmp_path / "out", "--mode", "retriever",
                                    "--num_clients", "1", "--strategy", "FedBest",
                                    *task_flags(files))
    assert process.wait(150) == 1
    output = (tmp_path / "output").read_text()
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "FedBest" in errors[0], output  # the server's, and the script's
    assert errors[1].startswith("error: the run ended as finished:failed: ServerApp failed")
    assert "Traceback" not in output and not processes_of(folder)


def start_supernode(port, folder, home, *flags):
    """Start a flower-supernode that writes HOME.log; FOLDER holds the superlink's certificate."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        own = free.getsockname()[1]
    environment = os.environ | QUIET | {"FLWR_HOME": str(home),
                                        "PATH": f"{BIN}:{os.environ['PATH']}"}
    with open(f"{home}.log", "w") as log:
        return subprocess.Popen(
            [str(BIN / "flower-supernode"), "--superlink", f"127.0.0.1:{port}",
             "--root-certificates", str(folder / "ca.crt"), "--port", str(own), *flags],
            env=environment, stdout=log, stderr=log)
