r"""Draw recall and exact match by round, for recipes with rounds (fid-kd.sh, lsr.sh).

    make demo-loop
    python bench/draw_rounds.py docs/rounds.svg --measure recall@5 \
        FiD-KD=out/loop/1/fid-kd LSR=out/loop/1/lsr

A line is LABEL=OUT, with the recipe's OUT. The files retrievalN.json and emN.json in it are read;
round 0 is BM25. Needs matplotlib.
"""
import itertools
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from records.files import check_paths, new_file
from records.reading import read_settings
from utils import InputError, Parser, run_script

COLORS = ("#1f5fa8", "#c4501b", "#4b7d2a", "#7a4a9e")


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("picture", help="file to write, .svg")
    add("lines", nargs="+", metavar="LABEL=OUT", help="a line's label and the OUT of its recipe")
    add("--measure", default="nq@5", help="the retriever's measure to draw")
    return parser.parse_args()


def read_rounds(folder, measure):
    """Return ({round: measure of the retriever}, {round: EM}), in per cent. Raises InputError."""
    recalls, ems = {}, {}
    for number in itertools.count():
        path = os.path.join(folder, f"retrieval{number}.json")
        if not os.path.exists(path):
            break
        recalls[number] = read_number(path, measure)
        path = os.path.join(folder, f"em{number}.json")
        if os.path.exists(path):
            ems[number] = read_number(path, "em")
    if not recalls:
        raise InputError(f"{folder}: has no retrieval0.json; give the OUT of a recipe with "
                         "rounds, such as scripts/fid-kd.sh")
    return recalls, ems


def read_number(path, name):
    """Return a measure of a file of measures in per cent. Raises InputError."""
    values = read_settings(path)
    if not isinstance(values.get(name), (int, float)):
        known = ", ".join(key for key, value in values.items() if isinstance(value, float))
        raise InputError(f"{path}: has no {name}; it has {known}")
    return 100 * values[name]


def draw(lines, measure, path):
    """Write the picture of {label: (recalls, EMs)}, legible on dark pages too."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rounds"  # equal figures give an equal file
    import matplotlib.pyplot as plt

    titles = (f"{measure} of the retriever, %", "exact match of its reader, %")
    figure, axes = plt.subplots(1, 2, figsize=(7.6, 3), layout="constrained", facecolor="white")
    for part, (axis, title) in enumerate(zip(axes, titles)):
        for (label, columns), color in zip(lines.items(), itertools.cycle(COLORS)):
            points = columns[part]
            if not points:
                continue
            axis.plot(list(points), list(points.values()), marker="o", color=color, label=label)
        write_values(axis, [columns[part] for columns in lines.values()])
        axis.set(title=title, xlabel="round (0: BM25)")
        axis.set_xticks(sorted({number for columns in lines.values() for number in columns[0]}))
        axis.margins(0.12, 0.2)
        axis.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    with new_file(path, "wb") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def write_values(axis, rows):
    """Write the values of each round next to the points: above the highest, below the others.

    lines: {round: value} of each line.
    """
    for number in sorted({number for row in rows for number in row}):
        values = {f"{row[number]:.1f}": (row[number], color)
                  for row, color in zip(rows, itertools.cycle(COLORS)) if number in row}
        highest = max(value for value, _ in values.values())
        for text, (value, color) in values.items():
            axis.annotate(text, (number, value), (0, 6 if value == highest else -14),
                          textcoords="offset points", ha="center", fontsize=8, color=color)


def main(args):
    folders = {}
    for line in args.lines:
        label, equals, folder = line.partition("=")
        if not equals:
            raise InputError(f"{line}: not LABEL=OUT")
        folders[label] = folder
    check_paths([args.picture], [])
    lines = {label: read_rounds(folder, args.measure) for label, folder in folders.items()}
    draw(lines, args.measure, args.picture)


if __name__ == "__main__":
    run_script(main, parse_args())
