"""utils.py: progress without a terminal, one-line errors, processes."""
import os
import socket
import time
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch

import utils
from utils import (
    InputError,
    Parser,
    call_main,
    format_seconds,
    peak_bytes,
    progress_bar,
    read_ranks,
    shorten,
    start_processes,
)


def test_lines_replace_a_bar(capsys):
    bar = progress_bar(desc="epoch 0", total=1237, unit=" updates", initial=40, steps=5)
    for _ in range(11):
        bar.set_postfix(loss="0.5", peak="5.3 GiB", refresh=False)
        bar.update()
    bar.close()
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[:2] for line in lines] == [["epoch 0: 45/1", "237 updates"],
                                                       ["epoch 0: 50/1", "237 updates"]]
    assert all(line.endswith(" left, loss=0.5, peak=5.3 GiB") for line in lines)


def test_a_line_a_minute(capsys, monkeypatch):
    monkeypatch.setattr("utils.LINE_SECONDS", 0.05)
    for is_main in (True, False):
        for _ in progress_bar(["a"] * 3, desc="encoding", unit=" documents", is_main=is_main):
            time.sleep(0.1)
    lines = capsys.readouterr().err.splitlines()
    assert 0 < len(lines) <= 3
    assert all(line.startswith("encoding: ") and "/3 documents, " in line for line in lines)


def test_short_work_prints_no_progress(capsys):
    for _ in progress_bar(range(10), desc="reading"):
        pass
    assert capsys.readouterr().err == ""


def test_units():
    times = [0.04, 3.14, 59, 60, 3600, 5400, 36000, 90000]
    assert [format_seconds(seconds) for seconds in times] == [
        "0.0 s", "3.1 s", "59 s", "1.0 min", "1.0 h", "1.5 h", "10 h", "1.0 d"]
    assert 0.05 < peak_bytes(torch.device("cpu")) / 2 ** 30 < 100


def test_a_full_gpu_is_one_line(capsys):
    def main(args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore")
    assert call_main(main, SimpleNamespace(resume=False)) == 1
    error = capsys.readouterr().err
    assert "the GPU's memory is full" in error and "2.00 GiB" in error and "More" not in error
    assert "the same command with --resume continues" in error


def test_what_a_message_quotes_is_one_line():
    assert "\n" not in shorten([torch.zeros(30, 5)]) and len(shorten([torch.zeros(30, 5)])) <= 80


def test_a_wrong_flag_is_one_line_that_names_the_likely_one(capsys):
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--num_contexts", type=int)
    for arguments, message in ((["--num_context", "3"], "unrecognized arguments: --num_context 3; "
                                "did you mean --num_contexts instead of --num_context?"),
                               (["--num_contexts", "x"], "argument --num_contexts: invalid int "
                                "value: 'x'")):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert end.value.code == 2
        assert capsys.readouterr().err == f"error: {message} (-h explains the flags)\n"


# ---------------------------------------------------------------- processes

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_LOCALID",
         "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
HERE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"}


@pytest.fixture
def environment(monkeypatch):
    """Return a function that sets the environment variables of processes, and unsets all others."""
    def replace(**names):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in names.items():
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # start_processes sets it
    return replace


@pytest.mark.parametrize("names, message", [
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set, but not RANK, MASTER_ADDR, MASTER_PORT; start the"),
    ({"WORLD_SIZE": "4", "RANK": "1"}, "WORLD_SIZE=4 is set, but not MASTER_ADDR, MASTER_PORT;"),
    ({"WORLD_SIZE": "2", "RANK": "2", **HERE}, "RANK=2 must be below WORLD_SIZE=2"),
    ({"RANK": "1"}, "RANK=1 must be below WORLD_SIZE=1"),
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two in the environment is not a number"),
    ({"WORLD_SIZE": "0"}, "RANK=0 must be below WORLD_SIZE=0"),
    ({"WORLD_SIZE": "2", "RANK": "0", **HERE, "MASTER_PORT": "x"}, "MASTER_PORT=x in the"),
    ({"WORLD_SIZE": "2", "RANK": "0", **HERE, "MASTER_PORT": "99999"},
     "MASTER_PORT must be between 1 and 65535, got 99999"),
    ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "nowhere.invalid", "MASTER_PORT": "29555"},
     "MASTER_ADDR=nowhere.invalid, MASTER_PORT=29555: this machine cannot find that address"),
])
def test_an_environment_that_is_not_torchruns_is_one_line(names, message, environment):
    environment(**names)
    with pytest.raises(InputError, match=message) as error:
        start_processes("")
    assert "\n" not in str(error.value)


def test_ranks_of_other_launchers(environment, capsys):
    """Use the launcher's local rank, and report processes that run alone."""
    environment(WORLD_SIZE="4", RANK="3", SLURM_LOCALID="1", **HERE)
    assert read_ranks() == (3, 1, 4)
    environment(WORLD_SIZE="4", RANK="3", OMPI_COMM_WORLD_LOCAL_RANK="2", **HERE)
    assert read_ranks() == (3, 2, 4)
    environment(WORLD_SIZE="4", RANK="3", **HERE)
    assert read_ranks() == (3, None, 4)
    environment(SLURM_LOCALID="1")
    assert read_ranks() == (0, 0, 1) and capsys.readouterr().err == ""
    environment(OMPI_COMM_WORLD_SIZE="2")
    assert read_ranks() == (0, 0, 1)
    assert "note: mpirun has started 2 processes" in capsys.readouterr().err


def test_the_rank_of_torch_distributed_launch_is_taken(environment, capsys):
    """torch.distributed.launch passes --local-rank=N."""
    environment()
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--lora", type=int)
    for flag in ("--local-rank=3", "--local_rank=3"):
        os.environ.pop("LOCAL_RANK", None)
        assert vars(parser.parse_args([flag, "--lora", "2"])) == {"lora": 2}
        assert os.environ["LOCAL_RANK"] == "3"
    with pytest.raises(SystemExit):
        parser.parse_args(["--local_rank", "3"])
    assert "start the processes with torchrun" in capsys.readouterr().err


@pytest.mark.parametrize("rank", [0, 1])
def test_missing_processes_are_reported_in_one_line(rank, environment, capfd, monkeypatch):
    monkeypatch.setattr(utils, "JOIN_PATIENCE", timedelta(seconds=1))
    monkeypatch.setattr(utils, "JOIN_NOTE", 0.1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment(WORLD_SIZE="4", RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with pytest.raises(InputError, match=f"process {rank} of 4 could not join the others at 127"):
        start_processes("")
    who = "waiting for 3 other processes" if rank == 0 else "process 1 is waiting for the others"
    assert f"{who} at 127.0.0.1:{port}" in capfd.readouterr().err


def test_a_port_in_use_is_one_line(environment):
    with socket.socket() as used:
        used.bind(("0.0.0.0", 0))
        used.listen()
        port = used.getsockname()[1]
        environment(WORLD_SIZE="2", RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with pytest.raises(InputError, match=f"MASTER_PORT={port} is in use"):
            start_processes("")
