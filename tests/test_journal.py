"""records/journal.py: the finished parts of long work."""
import json

import torch

from records.journal import Journal, list_journals
from utils import World

ALONE = World(0, 0, 1, torch.device("cpu"))


def test_parts_survive_and_a_line_that_is_cut_off_is_done_again(tmp_path, capsys):
    output = str(tmp_path / "out[1].json")  # [1] must not be read as a pattern
    journal = Journal(output, {"model": "a"}, ALONE)
    assert journal.done == {} and list_journals(output) == []
    journal.add(0, [1.5])
    journal.add(7, [[2.5], []])
    journal.file.write(b'{"part": 8, "res')
    journal.file.close()

    journal = Journal(output, {"model": "a"}, ALONE)
    assert journal.done == {0: [1.5], 7: [[2.5], []]}
    journal.add(8, [3])
    journal.file.close()
    (path,) = list_journals(output)
    assert [json.loads(line) for line in open(path)][2:] == [{"part": 7, "result": [[2.5], []]},
                                                             {"part": 8, "result": [3]}]
    assert capsys.readouterr().out == ""
    other = Journal(output, {"model": "b"}, ALONE)
    assert other.done == {} and "starting from scratch" in capsys.readouterr().out
    other.add(0, [4])
    other.file.close()
    assert Journal(output, {"model": "b"}, ALONE).done == {0: [4]}
    journal.remove()
    assert list_journals(output) == []
