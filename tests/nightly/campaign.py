"""What the nightly campaign shares: its seed, and the figures that it prints at its end.

    python tests/nightly/campaign.py     prints what the last `make test-all` has counted
"""
import hashlib
import json
import os
import random
import re
import time
from datetime import date
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parents[2] / "out"
PARTS = FOLDER / "campaign"
SEED = int(os.environ.get("CAMPAIGN_SEED", 16))
# what a part counts, in the words of the block that is printed
TITLES = {"kills": "kill -9", "mangled": "mangled inputs", "disk": "full disk, read-only outputs",
          "pickles": "hostile files", "recipes": "recipes with --toy"}


def generator(name):
    """The random generator of a part of the campaign; the seed is printed."""
    print(f"CAMPAIGN_SEED={SEED}: {name}")
    return random.Random(f"{SEED} {name}")


def note(title, name, start, **figures):
    """Keeps a part's figures, counts by their names, and the seconds since time.time() was start.
    """
    PARTS.mkdir(parents=True, exist_ok=True)
    figures["seconds"] = round(time.time() - start, 1)
    line = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in figures.items())
    print(f"{TITLES[title]}: {name}: {line}")
    (PARTS / f"{title}.{name}.json").write_text(json.dumps(figures))


def digest(value):
    """A hash of nested values with tensors, without the times that they hold."""
    sha = hashlib.sha256()

    def add(item):
        if isinstance(item, torch.Tensor):
            array = item.contiguous().view(torch.uint8) if item.dim() else item.reshape(1)
            sha.update(f"{item.dtype} {tuple(item.shape)}".encode() + array.numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                if "second" not in str(key):
                    sha.update(f"{key}: ".encode())
                    add(item[key])
        elif isinstance(item, (list, tuple)):
            sha.update(f"{len(item)} items".encode())
            for part in item:
                add(part)
        else:
            sha.update(f"{item!r};".encode())
    add(value)
    return sha.hexdigest()


def snapshot(folder):
    """{path: hash} of all files below a folder: of their bytes or, of a state, a log and a page, of
    what they hold but for times.
    """
    found = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir():
            continue
        name = str(path.relative_to(folder))
        if name.endswith(".state"):
            found[name] = digest(torch.load(path, weights_only=True))
        elif name.endswith(".html"):
            text = re.sub(r"[\d.]+ s\b", "", path.read_text())
            found[name] = digest(text)
        elif name.endswith(".jsonl") and b"second" in path.read_bytes():
            found[name] = digest([json.loads(line) for line in path.read_text().splitlines()])
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def describe_difference(expected, found):
    """The paths in which two snapshots differ, in words."""
    lines = [f"{path} is missing" for path in expected.keys() - found.keys()]
    lines += [f"{path} is left over" for path in found.keys() - expected.keys()]
    lines += [f"{path} is another" for path in expected.keys() & found.keys()
              if expected[path] != found[path]]
    return ", ".join(sorted(lines))


def add_up():
    """{title: {figure: sum over the parts}} of what note() kept."""
    totals = {}
    for path in sorted(PARTS.glob("*.json")):
        own = totals.setdefault(path.name.split(".")[0], {})
        for name, value in json.loads(path.read_text()).items():
            own[name] = round(own.get(name, 0) + value, 1)
    return totals


def main():
    """Prints the block of figures, and writes them to out/campaign.json."""
    totals = add_up()
    print(f"\nThe campaign of {date.today()}, CAMPAIGN_SEED={SEED}:")
    for title, figures in totals.items():
        words = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in figures.items())
        print(f"  {TITLES[title]}: {words}")
    content = {"date": str(date.today()), "seed": SEED, "figures": totals}
    (FOLDER / "campaign.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
