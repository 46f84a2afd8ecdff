"""utils.py: what is said of progress where there is no terminal; errors in one line."""
import time
from types import SimpleNamespace

import pytest
import torch

from utils import Parser, call_main, format_seconds, peak_bytes, progress_bar, shorten


def test_lines_take_the_place_of_a_bar(capsys):
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


def test_nothing_is_said_of_short_work(capsys):
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
    assert "the same command with --resume goes on" in error


def test_what_a_message_quotes_is_one_line():
    assert "\n" not in shorten([torch.zeros(30, 5)]) and len(shorten([torch.zeros(30, 5)])) <= 80


def test_a_wrong_flag_is_one_line_that_names_the_likely_one(capsys):
    parser = Parser(allow_abbrev=False)
    parser.add_argument("--num_contexts", type=int)
    for arguments, message in ((["--num_context", "3"], "unrecognized arguments: --num_context 3; "
                                "for --num_context is --num_contexts meant?"),
                               (["--num_contexts", "x"], "argument --num_contexts: invalid int "
                                "value: 'x'")):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(arguments)
        assert end.value.code == 2
        assert capsys.readouterr().err == f"error: {message} (-h explains the flags)\n"
