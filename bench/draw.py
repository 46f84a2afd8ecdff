r"""Draw exact match against the number of contexts, from the tables that test.py prints.

    mkdir -p out; make demo | tee out/demo.txt
    python bench/draw.py docs/demo.svg "ranked by word overlap=out/demo.txt"

A line of the picture is LABEL=FILE; the last table in the file counts. Needs matplotlib.
"""
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from records.files import new_file
from utils import InputError, Parser, run_script

# a row of test.py: contexts, EM, F1, correct/count, questions per second
ROW = re.compile(r"\s*(\d+)\s+(\d+\.\d+)\s+\d+\.\d+\s+\d+/(\d+)\s+\d")
COLORS = ("#1f5fa8", "#c4501b", "#4b7d2a", "#7a4a9e")


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("picture", help="file to write, .svg")
    parser.add_argument("lines", nargs="+", metavar="LABEL=FILE",
                        help="a line's label and the file of its table")
    return parser.parse_args()


def read_table(path):
    """Return ([contexts], [EM], number of questions) of a file's last table. Raises InputError."""
    contexts, ems, count = [], [], None
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.readlines()
    except OSError as error:
        message = f"{path}: cannot be read ({error.strerror}); write test.py's output there"
        raise InputError(message) from None
    for line in lines:
        if line.split()[:2] == ["contexts", "EM"]:  # a new table starts
            contexts, ems = [], []
        row = ROW.match(line)
        if row:
            contexts.append(int(row[1]))
            ems.append(float(row[2]))
            count = int(row[3])
    if not contexts:
        raise InputError(f"{path}: holds no table of test.py; write its output there")
    return contexts, ems, count


def draw(tables, path):
    """Write the picture of {label: (contexts, EMs, questions)}, legible on dark pages too."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "demo"  # equal tables give an equal file
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6.4, 3.4), layout="constrained", facecolor="white")
    for (label, (contexts, ems, _)), color in zip(tables.items(), COLORS):
        axis.plot(contexts, ems, marker="o", color=color, label=label)
    # write the first line's figures below and to the right of its points
    contexts, ems, count = next(iter(tables.values()))
    for x, y in zip(contexts, ems):
        axis.annotate(f"{y:.1f}", (x, y), (5, -11), textcoords="offset points",
                      fontsize=8, color=COLORS[0])
    every_context = sorted({x for contexts, _, _ in tables.values() for x in contexts})
    axis.set(xlabel="contexts given to the reader", ylim=(-9, 105))
    axis.set_ylabel(f"exact match on {count} questions, %")
    axis.set_xticks(every_context)
    axis.margins(x=0.08)
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    with new_file(path, "wb") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def main(args):
    tables = {}
    for line in args.lines:
        label, separator, path = line.partition("=")
        if not separator:
            raise InputError(f"{line}: not LABEL=FILE; name the line, then the file of its table")
        tables[label] = read_table(path)
    if len(tables) > len(COLORS):
        raise InputError(f"{len(tables)} lines; at most {len(COLORS)} are drawn")
    draw(tables, args.picture)


if __name__ == "__main__":
    run_script(main, parse_args())
