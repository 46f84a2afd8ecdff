"""Imports run one way: each folder imports only from those above it on README.md's tree."""
import ast
import subprocess
import sys

import pytest

from conftest import ROOT

# reader/base.py, the interface of all readers, comes before model.py, whose FiDT5 is one of them
LEVELS = [("utils", "metrics"), ("records",), ("layers",), ("training",), ("pages",), ("dense",),
          ("retrieval",), ("data",), ("reader.base",), ("model",), ("reader",), ("federated",),
          ("train_epoch", "test", "train_dense", "retrieve", "lm_score", "ask"), ("federate",)]
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
FILES = {path for name in LEVEL for path in (*ROOT.glob(f"{name}.py"), *ROOT.glob(f"{name}/*.py"))}


def find_part(module):
    """Return the entry of LEVEL that a module such as reader.base.Reader belongs to."""
    pair = ".".join(module.split(".")[:2])
    return pair if pair in LEVEL else module.split(".")[0]


@pytest.mark.parametrize("path", sorted(FILES), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = find_part(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            other = find_part(name)
            assert other == own or LEVEL.get(other, -1) < LEVEL[own], f"line {node.lineno}: {name}"


def test_scripts_load_no_search_engine_before_a_search():
    """Check it one import after another: what one has not loaded is there for none behind it."""
    code = """
import importlib, sys
for script in ("train_epoch", "test", "train_dense", "ask"):
    importlib.import_module(script)
    print(script, *{"faiss", "bm25s", "flwr"} & {name.split(".")[0] for name in sys.modules})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["train_epoch", "test", "train_dense", "ask"]
