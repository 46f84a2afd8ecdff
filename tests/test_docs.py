"""README.md and docs/: their links, the files and functions they name, and their picture."""
import importlib
import json
import re
import sys
from pathlib import Path

import pytest

import train_dense
import train_epoch
from conftest import ROOT, make_bert, run
from dense.flags import check_retriever_flags, parse_retriever_flags
from utils import start_processes

# of the product's modules; README.md has all of them on its map
FOLDERS = ("records", "layers", "training", "pages", "dense", "retrieval", "reader", "federated")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TABLE = """contexts     EM     F1       correct  questions/s
       0   0.00   0.00      0/600          2327.1
      10  90.67  91.17    544/600           140.9  ████████
"""


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_are_named_exist(page):
    for path in re.findall(r"`((?:[a-z_]+/)*[a-z_]+\.(?:py|sh|npz))`", page.read_text()):
        if path in ("run_dense.py", "run_lm_score.py", "get-model.sh", "eval_tool.py",
                    "options.py"):  # LLM-Embedder's, FiD's
            continue
        # the map names files in their folder
        folders = [ROOT, *(ROOT / name for name in FOLDERS)]
        assert any((folder / path).exists() for folder in folders), path


def called_functions(function, *args):
    """Return {file:function} of the project's functions that a call runs."""
    called = set()

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT):
            called.add(f"{path.relative_to(ROOT)}:{frame.f_code.co_qualname}")
    sys.setprofile(note)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return called


def test_the_reading_page_lists_what_a_training_step_calls(tiny, records_file, tmp_path):
    """Every function of the two lists is called by an epoch of its script."""
    text = (ROOT / "docs" / "reading.md").read_text()
    text = text[text.index("## How a training step runs"):text.index("## Encode")]
    listed = [re.findall(r"^\d+\. `([\w/]+\.py:[\w.]+)`", part, re.MULTILINE)
              for part in text.split("An update of the retriever:")]
    assert [len(part) for part in listed] == [10, 12]

    args = train_epoch.parse_args([
        str(tmp_path / "reader"), records_file, records_file, "--t5_name", tiny, "--num_contexts",
        "2", "--batch_size", "6"])
    train_epoch.check_args(args)
    run_ = train_epoch.set_up(args, start_processes(""))
    assert set(listed[0]) <= called_functions(train_epoch.train_epoch, run_)

    rows = [{"query": f"who {i}", "pos": [f"town {i}"], "neg": ["a river"],
             "teacher_scores": [1.0, 0.5]} for i in range(4)]
    (tmp_path / "rows.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = parse_retriever_flags("", [
        "--output_dir", str(tmp_path / "retriever"), "--train_data", str(tmp_path / "rows.json"),
        "--query_encoder", make_bert(tmp_path / "bert"), "--train_group_size", "2", "--batch_size",
        "2", "--key_template", "{text}"])
    check_retriever_flags(args)
    run_ = train_dense.set_up(args, start_processes(""))
    assert set(listed[1]) <= called_functions(train_dense.train_epoch, run_)


def test_functions_of_the_reading_page_exist():
    text = (ROOT / "docs" / "reading.md").read_text()
    found = re.findall(r"`([\w.]+)`(?: and `(\w+)`)?\s+in\s+`([\w/]+\.py)`", text)
    assert len(found) >= 9
    for *names, path in found:
        for name in filter(None, names):
            source = (ROOT / path).read_text()
            assert re.search(rf"\b(def|class) {name.split('.')[-1]}\b", source), f"{name} in {path}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_imports_of_the_pages_commands_work(page):
    for module, names in re.findall(r"^from ([\w.]+) import (.+)$", page.read_text(), re.MULTILINE):
        for name in names.split(", "):
            assert hasattr(importlib.import_module(module), name), f"from {module} import {name}"


def test_every_module_is_on_the_map():
    text = (ROOT / "README.md").read_text()
    for folder in (ROOT, *(ROOT / name for name in FOLDERS)):
        for path in folder.glob("[!_]*.py"):
            assert re.search(rf"^ *{path.name} ", text, re.MULTILINE), path


def test_draw_writes_the_picture_of_a_table(tmp_path):
    (tmp_path / "log.txt").write_text("epoch   0 | update 1\n" + TABLE)
    lines = [f"by overlap={tmp_path}/log.txt", f"again={tmp_path}/log.txt"]
    run("bench/draw.py", tmp_path / "demo.svg", *lines)
    assert "<svg" in (tmp_path / "demo.svg").read_text()


@pytest.mark.parametrize("line, message", [
    ("label", "label: not LABEL=FILE"),
    ("a={}/no.txt", "no.txt: cannot be read"),
    ("a={}/empty.txt", "empty.txt: holds no table of test.py"),
])
def test_draw_refuses_in_one_line(line, message, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    _, errors = run("bench/draw.py", tmp_path / "demo.svg", line.format(tmp_path), code=1)
    assert message in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "demo.svg").exists()


def test_draw_loop_writes_the_picture_of_a_table(tmp_path):
    cell = {"mean": 80.0, "lowest": 79.0, "highest": 81.5}
    rows = [{"name": "BM25", "values": {"recall@5": cell, "em": cell}},
            {"name": "gold", "values": {"recall@5": None, "em": cell}}]
    (tmp_path / "table.json").write_text(json.dumps({"rows": rows}))
    run("bench/draw_loop.py", tmp_path / "loop.svg", tmp_path / "table.json")
    picture = (tmp_path / "loop.svg").read_text()
    assert "<!-- 80.0 -->" in picture and "<!-- BM25 -->" in picture and "<!-- gold -->" in picture


@pytest.mark.parametrize("content, message", [
    ('{"rows": []}', "holds no rows"),
    ('{"rows": [{"name": "a", "values": {"em": {"mean": "x"}}}]}', "is no table of recall@5"),
    ('{"rows": 3}', "is no table of recall@5"),
    ("{", "table.json"),
])
def test_draw_loop_refuses_in_one_line(content, message, tmp_path):
    (tmp_path / "table.json").write_text(content)
    _, errors = run("bench/draw_loop.py", tmp_path / "loop.svg", tmp_path / "table.json", code=1)
    assert message in errors and len(errors.splitlines()) == 1
    assert not (tmp_path / "loop.svg").exists()


def test_draw_rounds_and_map(tmp_path):
    for number, (recall, em) in enumerate(((0.5, 0.25), (0.75, 0.5))):
        (tmp_path / f"retrieval{number}.json").write_text(json.dumps({"nq@5": recall}))
        (tmp_path / f"em{number}.json").write_text(json.dumps({"em": em}))
    run("bench/draw_rounds.py", tmp_path / "rounds.svg", f"kd={tmp_path}")
    picture = (tmp_path / "rounds.svg").read_text()
    assert all(f"<!-- {value} -->" in picture for value in ("50.0", "75.0", "25.0", "kd"))
    for line, message in (("kd", "kd: not LABEL=OUT"), (f"kd={tmp_path}/no", "has no retrieval0")):
        _, errors = run("bench/draw_rounds.py", tmp_path / "no.svg", line, code=1)
        assert message in errors and len(errors.splitlines()) == 1

    # the diagram in docs/ is what its command draws
    run("bench/draw_map.py", tmp_path / "map.svg")
    assert (tmp_path / "map.svg").read_text() == (ROOT / "docs" / "map.svg").read_text()


def test_functions_and_tests_of_the_replication_table_exist():
    text = (ROOT / "docs" / "replication.md").read_text()
    found = re.findall(r"`([\w/]+\.py):(\w+)`", text)
    assert len(found) > 40
    for path, name in found:
        source = (ROOT / path).read_text()
        assert re.search(rf"\b(def|class) {name}\b", source), f"{name} in {path}"


def test_every_recipe_is_in_the_replication_tables():
    text = (ROOT / "docs" / "replication.md").read_text()
    for path in (ROOT / "scripts").glob("*.sh"):
        if "compare\n" in path.read_text() and path.stat().st_mode & 0o100:
            assert f"scripts/{path.name}`" in text, path.name
