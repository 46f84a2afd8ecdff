r"""Draw a table of make demo-loop or make demo-real, a panel for each of its columns.

    SEEDS="1 2 3" make demo-loop
    python bench/draw_loop.py docs/loop.svg out/loop/table.json
    python bench/draw_loop.py docs/real.svg out/real/retrieval.test.json --columns recall@1 recall@5

A dot is the mean of the seeds, and the line through it runs from the lowest to the highest.
scripts/table.py --json writes the file. Needs matplotlib.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from records.files import check_paths, new_file
from records.reading import read_settings
from utils import InputError, Parser, run_script

LABELS = {"em": "exact match of the reader", "f1": "F1 of the reader"}
COLOR, FAINT = "#1f5fa8", "#9a9a9a"


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("picture", help="file to write, .svg")
    parser.add_argument("table", help="file of scripts/table.py --json")
    parser.add_argument("--columns", nargs="+", default=["recall@5", "em"], help="columns to draw")
    return parser.parse_args()


def read_rows(path, columns):
    """Return [(name, {column: {mean, lowest, highest} or None})] of a table. Raises InputError."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; make demo-loop and make demo-real write one")
    try:
        rows = []
        for row in read_settings(path)["rows"]:
            values = {name: row["values"][name] for name in columns}
            for cell in values.values():
                if cell is not None:
                    float(cell["mean"]), float(cell["lowest"]), float(cell["highest"])
            rows.append((row["name"], values))
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{path}: is no table of {' and '.join(columns)} as scripts/table.py "
                         "--json writes it") from None
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def draw(rows, columns, path):
    """Write the picture, a panel per column, legible on dark pages too."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "loop"  # equal tables give an equal file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(columns), figsize=(7.6, 0.5 + 0.36 * len(rows)),
                                sharey=True, squeeze=False, layout="constrained",
                                facecolor="white")
    for axis, column in zip(axes[0], columns):
        baseline = rows[0][1][column]
        if baseline is not None:
            axis.axvline(baseline["mean"], color=FAINT, linewidth=0.8, linestyle=":")
        for y, (_, values) in enumerate(rows):
            cell = values[column]
            if cell is None:
                continue
            axis.plot([cell["lowest"], cell["highest"]], [y, y], color=COLOR, linewidth=2)
            axis.plot([cell["mean"]], [y], marker="o", markersize=5, color=COLOR)
            axis.annotate(f"{cell['mean']:.1f}", (cell["highest"], y), (6, -3),
                          textcoords="offset points", fontsize=8, color=COLOR)
        axis.set_xlabel(f"{LABELS.get(column, column)}, %")
        axis.grid(axis="x", alpha=0.3)
        axis.margins(x=0.2, y=0.08)
    axes[0, 0].set_yticks(range(len(rows)), [name for name, _ in rows])
    axes[0, 0].invert_yaxis()
    with new_file(path, "wb") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def main(args):
    check_paths([args.picture], [args.table])
    draw(read_rows(args.table, args.columns), args.columns, args.picture)


if __name__ == "__main__":
    run_script(main, parse_args())
