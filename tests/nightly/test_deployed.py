"""A client of a deployed federation that is killed: Flower needs a minute to notice it."""
import os
import signal

from conftest import run
from test_federate_deployed import (
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
