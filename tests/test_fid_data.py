"""scripts/fid_data.py: FiD's rules, worked by hand on files of the published forms."""
import argparse
import gzip
import json

import pytest

import fid_data
from utils import InputError

PASSAGES = [  # id, text, title
    ("1", "Oslo is a city.", "Oslo"), ("2", 'a "quoted" word', "Quotes"),
    ("3", "\u00c6gir is a jötunn.", "Ægir"), ("4", "Four.", "4 (number)")]


def context(identifier):
    """Return the context that FiD makes of one of the PASSAGES."""
    _, text, title = PASSAGES[int(identifier) - 1]
    return {"id": identifier, "title": title, "text": text}


def write_wikipedia(folder):
    """Write psgs_w100.tsv.gz, with the quotes of DPR's file."""
    rows = ["id\ttext\ttitle\n"]
    for identifier, text, title in PASSAGES:
        quoted = text.replace('"', '""')
        rows.append(f'{identifier}\t"{quoted}"\t{title}\n')
    with gzip.open(folder / "psgs_w100.tsv.gz", "wt", encoding="utf-8") as file:
        file.writelines(rows)


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@pytest.fixture
def data(tmp_path):
    """Return a folder like that of get_data.sh fid-nq fid-tqa, with a few questions each."""
    write_wikipedia(tmp_path)
    # NQ-open: passages are found by the position in the split
    train = [{"question": f"train {i}", "answer": [f"a{i}", f"b{i}"]} for i in range(4)]
    dev = [{"question": "dev 0", "answer": ["x"]}, {"question": "dev 1", "answer": ["y", "z"]}]
    for name, lines in (("train", train), ("dev", dev)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"NQ-open.{name}.jsonl").write_text(text)
    nq = {"train": ([2, 0, 3], {"0": ["1", "4"], "1": ["2"], "2": []}),
          "dev": ([1], {"0": ["3", "1"]}), "test": ([1, 0], {"0": ["4"], "1": ["1"]})}
    # TriviaQA: passages are found by the question's id
    train = [trivia("q_1", "Who is A?", "OSLO", ["Oslo", "OSLO"]),
             trivia("q_2", "Who is B?", "Oslo Fjord", ["Oslo Fjord"]),
             trivia("q_3", "Who is C?", "R2-D2 OF ÅL", ["R2"])]
    dev = [trivia("q_4", "Who is D?", "1066", ["1066", "mlxvi"])]
    for name, items in (("train", train), ("dev", dev)):
        content = {"Data": items, "Domain": "Web", "Version": 1.0}
        path = tmp_path / "triviaqa-unfiltered" / f"unfiltered-web-{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=4))
    tqa = {"train": ([2, 0], {"q_1": ["2"], "q_3": ["3"]}), "dev": ([1], {"q_2": ["1", "2"]}),
           "test": ([0], {"q_4": ["4"]})}
    for name, folder, splits in (("NQ", "nq_passages", nq), ("TQA", "tqa_passages", tqa)):
        for split, (index, ids) in splits.items():
            write_json(tmp_path / f"{name}.{split}.idx.json", index)
            write_json(tmp_path / folder / f"{split}.json", ids)
    return tmp_path


def trivia(identifier, question, value, aliases):
    """Return a question in TriviaQA's form, with search results that are not used here."""
    answer = {"Aliases": aliases, "NormalizedAliases": [], "Type": "FreeForm", "Value": value}
    return {"Answer": answer, "Question": question, "QuestionId": identifier,
            "SearchResults": [{"Description": "]} long " * 20, "Rank": 0}]}


def run(data, *datasets, **more):
    flags = {"datasets": datasets, "data": str(data), "out": None, "passages": None}
    fid_data.main(argparse.Namespace(**flags | more))


def read(path):
    return json.loads(path.read_text())


def test_natural_questions(data, capsys):
    run(data, "nq")
    train = [{"question": "train 2", "answers": ["a2", "b2"], "ctxs": [context("1"), context("4")]},
             {"question": "train 0", "answers": ["a0", "b0"], "ctxs": [context("2")]},
             {"question": "train 3", "answers": ["a3", "b3"], "ctxs": []}]
    dev = [{"question": "train 1", "answers": ["a1", "b1"], "ctxs": [context("3"), context("1")]}]
    test = [{"question": "dev 1", "answers": ["y", "z"], "ctxs": [context("4")]},
            {"question": "dev 0", "answers": ["x"], "ctxs": [context("1")]}]
    for split, records in (("train", train), ("dev", dev), ("test", test)):
        # the bytes that FiD writes: json.dump(records, file, indent=4)
        assert (data / "NQ" / f"{split}.json").read_text() == json.dumps(records, indent=4)
    assert f"{data}/NQ/train.json: 3 questions, 1.0 contexts each" in capsys.readouterr().out


@pytest.mark.parametrize("chunk", [fid_data.CHUNK, 40])  # 40: every question spans many chunks
def test_trivia_qa(data, chunk, monkeypatch):
    monkeypatch.setattr(fid_data, "CHUNK", chunk)
    run(data, "tqa", out=str(data / "out"))
    train = [{"question": "Who is C?", "answers": ["R2"], "target": "R2-D2 Of Ål",
              "ctxs": [context("3")]},
             {"question": "Who is A?", "answers": ["Oslo", "OSLO"], "target": "Oslo",
              "ctxs": [context("2")]}]
    dev = [{"question": "Who is B?", "answers": ["Oslo Fjord"], "target": "Oslo Fjord",
            "ctxs": [context("1"), context("2")]}]
    test = [{"question": "Who is D?", "answers": ["1066", "mlxvi"], "target": "1066",
             "ctxs": [context("4")]}]
    for split, records in (("train", train), ("dev", dev), ("test", test)):
        assert (data / "out" / "TQA" / f"{split}.json").read_text() == json.dumps(records, indent=4)


def test_what_exists_is_kept_and_the_rest_is_made(data, capsys):
    (data / "NQ").mkdir()
    (data / "NQ" / "train.json").write_text("mine")
    run(data, "nq", "tqa", "nq")
    assert (data / "NQ" / "train.json").read_text() == "mine"
    assert len(read(data / "NQ" / "test.json")) == 2 and len(read(data / "TQA" / "dev.json")) == 1
    assert "train.json: exists, kept" in capsys.readouterr().out
    (data / "NQ-open.train.jsonl").unlink()  # no longer needed
    run(data, "nq")


TRAIN = "triviaqa-unfiltered/unfiltered-web-train.json"


@pytest.mark.parametrize("dataset, path, content, message", [
    ("nq", "NQ-open.dev.jsonl", None, "no such file; scripts/get_data.sh fid-nq fetches it"),
    ("tqa", "tqa_passages/test.json", None, "no such file; scripts/get_data.sh fid-tqa fetches it"),
    ("nq", "psgs_w100.tsv.gz", None, "no such file; scripts/get_data.sh fid-nq fetches it"),
    ("nq", "NQ-open.train.jsonl", '{"question": "q"}', "no 'answer'"),
    ("nq", "NQ-open.train.jsonl", '{"answer": ["a"]}', "no 'question'"),
    ("nq", "NQ.train.idx.json", "[0, 4]", "entry 1: 4 is not an index of the 4 questions"),
    ("nq", "NQ.train.idx.json", "[-1]", "entry 0: -1 is not an index"),
    ("nq", "NQ.train.idx.json", "[true]", "entry 0: True is not an index"),
    ("nq", "NQ.train.idx.json", "[]", "names no question"),
    ("nq", "NQ.train.idx.json", "[1, 2", "not valid JSON"),
    ("nq", "NQ.train.idx.json", '{"a": 1}', "must hold a JSON list, got a dict"),
    ("nq", "nq_passages/train.json", "[]", "must hold a JSON object, got a list"),
    ("nq", "nq_passages/train.json", '{"1": []}', "question '0': has no list of passages' ids"),
    ("nq", "nq_passages/train.json", '{"0": [7]}', "question '0': has no list of passages' ids"),
    ("nq", "nq_passages/train.json", r'{"0": ["\ud800"]}', "is half of a character"),
    ("nq", "nq_passages/train.json", '{"0": ["1", "99"]}', "no passage has the id '99'"),
    ("tqa", TRAIN, "[]", 'does not begin with {"Data": ['),
    ("tqa", TRAIN, '{"Data": [1]}', "record 0: a int, not an object"),
    ("tqa", TRAIN, '{"Data": [{"Question": "q", "QuestionId": "1"}]}', "record 0: no 'QuestionId'"),
    ("tqa", TRAIN, '{"Data": [{"Question": "q", ', "record 0: not valid JSON"),
    ("tqa", TRAIN, '{"Data": ' + "[" * 99999, "record 0: not valid JSON"),
])
def test_wrong_inputs_are_named_in_one_line(data, dataset, path, content, message):
    if content is None:
        (data / path).unlink()
    else:
        (data / path).write_text(content)
    with pytest.raises(InputError) as error:
        run(data, dataset)
    text = str(error.value)
    assert path.split("/")[-1] in text
    assert message in text and "\n" not in text
    assert not list(data.rglob("*.writing"))
    assert not (data / "NQ" / "train.json").exists()


def test_wikipedia_that_is_cut_off(data):
    packed = (data / "psgs_w100.tsv.gz").read_bytes()
    (data / "psgs_w100.tsv.gz").write_bytes(packed[:-20])
    with pytest.raises(InputError, match=r"psgs_w100.tsv.gz: cannot be read"):
        run(data, "nq")
