"""records/files.py: whole or absent files, leftovers of killed processes, links, streams."""
import os
import shutil
import signal
import subprocess
import sys

import pytest

from conftest import ROOT, command, run
from records.files import check_paths, new_file, remove_leftovers
from utils import InputError

# starts to write a file, prints a line, and waits to be killed
WRITER = f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from records.files import new_file
with new_file(sys.argv[1]) as file:
    file.write("half")
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""


def start_writers(path, count):
    """Return so many processes that have begun to write the file."""
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE)
               for _ in range(count)]
    for writer in writers:
        assert writer.stdout.readline() == b"writing\n"
    return writers


def write(path, text="new"):
    with new_file(str(path)) as file:
        file.write(text)


def test_what_a_killed_writer_left_is_removed_and_a_live_ones_file_is_not(tmp_path):
    path = tmp_path / "run.state"
    path.write_text("old")
    dead, live = start_writers(path, 2)
    dead.send_signal(signal.SIGKILL)
    dead.wait()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 3
    write(path)
    assert path.read_text() == "new"
    assert {file.name for file in tmp_path.iterdir()} == {"run.state",
                                                          f"run.state.{live.pid}.writing"}
    live.send_signal(signal.SIGKILL)
    live.wait()
    write(path)
    assert [file.name for file in tmp_path.iterdir()] == ["run.state"]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "far").mkdir()
    target, link = tmp_path / "far" / "target.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write(link)
    assert link.is_symlink() and target.read_text() == "new"
    assert len(list((tmp_path / "far").iterdir())) == 1


def test_a_pipe_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write(pipe)
    assert os.read(reader, 100) == b"new" and not os.path.isfile(pipe)
    os.close(reader)


def test_predictions_to_stdout(tiny, records_file):
    """Check that /dev/stdout, a pipe, is not replaced."""
    line = command("test.py", tiny, records_file, "--pred", "/dev/stdout", "--num_contexts", 1)
    process = subprocess.run(line, stdout=subprocess.PIPE, check=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    check_log(process.stdout.decode(), "/dev/stdout")


def test_predictions_to_a_redirected_stdout(tiny, records_file):
    """Check that a file that stdout is redirected to, as a shell's > does, keeps the log."""
    out, _ = run("test.py", tiny, records_file, "--pred", "/dev/fd/1", "--num_contexts", 1)
    check_log(out, "/dev/fd/1")


def check_log(text, path):
    """Fail unless the predictions of eleven records stand in a log, behind its first line."""
    assert text.index("11 questions") < text.index("\n0\t") < text.index("\n10\t")
    assert f"predictions in {path}" in text


def test_outputs_are_checked_before_the_work(tmp_path):
    data = tmp_path / "data.json"
    data.write_text("[]")
    check_paths([str(tmp_path / "new.json"), None, "/dev/stdout"], [str(data), None])
    for path in (data, tmp_path / "." / "data.json", tmp_path, tmp_path / "none" / "x"):
        with pytest.raises(InputError, match="choose another name"):
            check_paths([str(path)], [str(data)])


def test_an_output_in_a_folder_that_is_read(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(InputError, match="is in a folder that this command reads"):
        check_paths([str(tmp_path / "model" / "model.safetensors")], [str(tmp_path / "model")])
    check_paths([str(tmp_path / "model.tsv")], [str(tmp_path / "model")])


def test_a_reader_that_goes_away_is_no_error(tiny, records_file):
    test_py = " ".join(command("test.py", tiny, records_file, "--pred", "/dev/stdout"))
    process = subprocess.run(["bash", "-c", f"set -o pipefail; {test_py} | head -1"],
                             capture_output=True, text=True,
                             env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert "Traceback" not in process.stderr and "Exception" not in process.stderr
    assert len(process.stdout.splitlines()) == 1


def test_two_outputs_of_one_name(tmp_path):
    with pytest.raises(InputError, match="two outputs have this name"):
        check_paths([str(tmp_path / "a"), "/dev/stdout", "/dev/stdout", f"{tmp_path}/./a"], [])


def test_a_leftover_of_another_user_is_left(tmp_path, monkeypatch):
    (tmp_path / "run.77.writing").write_text("half")

    def refuse(*_):
        raise PermissionError("Permission denied")
    monkeypatch.setattr("records.files.take_lock", refuse)
    remove_leftovers(str(tmp_path / "run"))
    assert (tmp_path / "run.77.writing").exists()


def test_numbered_predictions_do_not_replace_the_input(tiny, records_file, tmp_path):
    shutil.copy(records_file, tmp_path / "p.2.json")
    _, error = run("test.py", tiny, tmp_path / "p.2.json", "--num_contexts", 1, 2, "--pred",
                   tmp_path / "p.json", code=1)
    assert "p.2.json: is also an input of this command" in error


def test_an_output_that_is_an_input_is_refused(tiny, records_file):
    with open(records_file) as file:
        before = file.read()
    _, error = run("test.py", tiny, records_file, "--pred", records_file, code=1)
    assert f"error: {records_file}: is also an input of this command" in error
    with open(records_file) as file:
        assert file.read() == before
