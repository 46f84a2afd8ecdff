"""docs/reading.md: every command runs, and prints what the page says, numbers apart."""
import os
import re
import subprocess
import sys
from pathlib import Path

from conftest import ENVIRONMENT, ROOT

PAGE = ROOT / "docs" / "reading.md"
MARK = "=== the end of a block"


def read_blocks():
    """[(commands, what the page says that they print)] of the page."""
    return re.findall(r"```sh\n(.*?)```\n(?:\n```\n(.*?)```\n)?", PAGE.read_text(), re.DOTALL)


def run_blocks(blocks, folder):
    """What each block prints, in a folder that sees the repository's files as its own."""
    for path in ROOT.iterdir():
        if path.name not in ("out", "toy", ".git", ".pytest_cache"):
            (folder / path.name).symlink_to(path)
    (folder / "toy").mkdir()
    for path in (ROOT / "toy").iterdir():
        if path.name != "data":
            (folder / "toy" / path.name).symlink_to(path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    script = f"\necho '{MARK}'\n".join(commands for commands, _ in blocks)
    process = subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, text=True,
                             env=os.environ | ENVIRONMENT | {"PATH": path}, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    assert process.returncode == 0, process.stdout[-3000:]
    return process.stdout.split(MARK)


def without_numbers(text):
    """The lines of a text, each number a #, without bars, runs of blanks and the mark of the best
    so far, which hangs on the numbers."""
    text = re.sub(r"[\d.,e-]*\d+|█+", "#", text.replace("| best", ""))
    return [re.sub(r"\s+", " ", line).strip() for line in text.splitlines()]


def test_the_commands_print_what_the_page_says(tmp_path):
    blocks = read_blocks()
    assert len(blocks) >= 10
    outputs = run_blocks(blocks, tmp_path)
    (tmp_path / "printed").write_text(MARK.join(outputs))  # the page's next figures
    for (commands, expected), printed in zip(blocks, outputs, strict=True):
        lines = without_numbers(printed)
        for line in without_numbers(expected):
            assert line in lines, f"{line!r} is not among what {commands} prints:\n{printed}"
