r"""Draw the results of make demo-federated: recall@5 and exact match on the dev questions by
round, for the federation, for each client alone and for one training on all records.

    make demo-federated
    python bench/draw_federated.py docs/federated.svg out/federated/1

The folder is one seed's, with the logs of federate.py and the training scripts. A training outside
the federation is drawn at the round with the same share of examples.
Needs matplotlib.
"""
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from records.files import check_paths, new_file
from records.reading import read_json
from utils import InputError, Parser, run_script

# {model: (the measure in its logs, the factor that gives per cent, the panel's title)}
PANELS = {"retriever": ("recall@5", 100, "retriever: recall@5, %"),
          "reader": ("dev_em", 1, "reader: exact match, %")}
FEDERATED, CENTRAL, ALONE = "#1f5fa8", "#4b7d2a", "#c4501b"


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("picture", help="file to write, .svg")
    parser.add_argument("folder", help="a seed's folder of make demo-federated: out/federated/1")
    return parser.parse_args()


# ---------------------------------------------------------------- reading

def read_curve(path, counter, measure, scale):
    """Return ([round or update], [per cent]) of the rows of a log that have the measure.

    Raises InputError.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; make demo-federated writes it")
    steps, values = [], []
    for row, location in read_json(path):
        if not isinstance(row, dict) or measure not in row:
            continue
        try:
            steps.append(int(row[counter]))
            values.append(scale * float(row[measure]))
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{location}: has no {counter}, or a {measure} that is not a number; "
                             "run make demo-federated") from None
    if not steps:
        raise InputError(f"{path}: no row has {measure}; run make demo-federated")
    return steps, values


def read_curves(folder, model):
    """Return {name: ([round], [per cent])} of the federation, "central" and the clients."""
    measure, scale, _ = PANELS[model]
    path = os.path.join(folder, model)
    rounds, values = read_curve(f"{path}.jsonl", "round", measure, scale)
    curves = {"federated": (rounds, values)}
    for name in ("central", *list_clients(path)):
        updates, measured = read_curve(f"{path}-{name}.jsonl", "update", measure, scale)
        # all start from the same weights
        shares = [rounds[-1] * update / updates[-1] for update in updates]
        curves[name] = ([rounds[0], *shares], [values[0], *measured])
    return curves


def list_clients(path):
    """Return the clients, client1, client2, ..., that have a log next to the federation's."""
    names = []
    while os.path.isfile(f"{path}-client{len(names) + 1}.jsonl"):
        names.append(f"client{len(names) + 1}")
    return names


# ---------------------------------------------------------------- drawing

def draw(curves_of_models, path):
    """Write the picture of {model: {name: ([round], [per cent])}}, legible on dark pages too."""
    import matplotlib
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "federated"  # equal logs give an equal file
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(7.6, 3.2), layout="constrained",
                                facecolor="white")
    for axis, (model, curves) in zip(axes, curves_of_models.items()):
        for name, (rounds, values) in curves.items():
            color, marker, width, label = style(name)
            axis.plot(rounds, values, color=color, marker=marker, markersize=4, linewidth=width,
                      label=label)
        axis.set(title=PANELS[model][2], xlabel="round")
        axis.title.set_fontsize(10)
        axis.set_xticks(curves["federated"][0])
        axis.grid(alpha=0.3)
        axis.margins(x=0.06)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False, fontsize=9)
    with new_file(path, "wb") as file:
        figure.savefig(file, format="svg", metadata={"Date": None})


def style(name):
    """Return (color, marker, line width, label) of a curve; all clients share one label."""
    if name == "federated":
        return FEDERATED, "o", 2, "federated"
    if name == "central":
        return CENTRAL, "s", 1.2, "all records at one place"
    return ALONE, ".", 0.8, "a client alone" if name == "client1" else None


def main(args):
    check_paths([args.picture], [])
    draw({model: read_curves(args.folder, model) for model in PANELS}, args.picture)


if __name__ == "__main__":
    run_script(main, parse_args())
