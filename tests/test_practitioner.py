"""A practitioner's day: the README's commands for own documents and questions, as they stand there,
on a folder of text files and tables of questions about the embedded world.
"""
import csv
import json
import os
import random
import re
import subprocess

import world
from conftest import ENVIRONMENT, ROOT

SECTION = "## Your own documents and questions"


def read_commands():
    """The shell commands of the README's section: its blocks behind the one that shows files."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index(SECTION):].split("\n## ")[0]
    return "".join(re.findall(r"```\n(.*?)```", section, re.DOTALL)[1:])


def write_world(folder):
    """Writes notes/, a text file per passage, and train.csv, dev.csv and test.csv."""
    rng = random.Random(0)
    entities, people = world.make_entities(rng, 60, 10, held_out=False)
    passages = []
    for entity in entities:
        passages += world.write_passages(rng, entity, people)
    (folder / "notes").mkdir()
    for index, passage in enumerate(passages):
        passage["id"] = str(index)
        (folder / "notes" / f"{index}.txt").write_text(f"{passage['title']}: {passage['text']}")
    ranker = world.OverlapRanker(passages, blur=0.1)
    records = world.make_records(rng, "r", entities, ranker, 200, top_k=1)
    for name, part in (("train", records[:120]), ("dev", records[120:160]),
                       ("test", records[160:])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["question", "answer"])
            writer.writerows([record["question"], record["answers"][0]] for record in part)


def run_shell(commands, folder, python):
    """The output of shell commands in the folder, which sees the repository's files as its own;
    `python` is the program of that name there.
    """
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "my":
            (folder / path.name).symlink_to(path)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(python)
    path = f"{folder}/bin:{os.environ['PATH']}"
    process = subprocess.run(["bash", "-euc", commands], cwd=folder, text=True, timeout=300,
                             env=os.environ | ENVIRONMENT | {"PATH": path},
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.returncode == 0, process.stdout
    return process.stdout


def test_the_commands_for_own_documents(tmp_path, launcher):
    (tmp_path / "my").mkdir()
    write_world(tmp_path / "my")
    commands = read_commands()
    for given, small in (("t5-base", "toy/t5-tiny"), ("--epochs 5", "--epochs 2"),
                         ("--lr 1e-4", "--lr 5e-4 --batch_size 2 --dropout 0 --max_length 100")):
        assert given in commands
        commands = commands.replace(given, small)
    output = run_shell(commands, tmp_path, launcher)

    # what is said on the way names every file
    for name in ("my/corpus.jsonl", "my/train.jsonl", "my/dev.jsonl", "my/test.jsonl", "my/reader",
                 "my/answers.jsonl"):
        assert name in output, output
    assert "When does the office open?" in output  # ask.py repeats it
    for unwanted in ("Traceback", "Warning", "warning"):
        assert unwanted not in output, output

    rows = [json.loads(line) for line in open(tmp_path / "my" / "answers.jsonl")]
    corpus = [json.loads(line) for line in open(tmp_path / "my" / "corpus.jsonl")]
    ids = {document["id"] for document in corpus}
    assert len(rows) == 40
    for row in rows:
        assert row["best_context"] in ids
        assert {context["id"] for context in row["contexts"]} <= ids
    # the reader was pre-trained on such texts: it answers, from the passages
    assert sum(row["em"] for row in rows) >= 10, output
    assert sum(row["contexts"] != [] for row in rows) == 40
