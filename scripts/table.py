#!/usr/bin/env python3
"""Print a table of measures in per cent, from files of retrieve.py --measures and test.py
--measures.

    python scripts/table.py --columns recall@1 recall@5 em \\
        "BM25=out/bm25.json,out/bm25.em.json" "mined negatives=out/mined.json,out/mined.em.json"
    python scripts/table.py --columns em --seeds 1 2 3 "FiD-KD=out/seed{seed}/em.json"

A row merges its files, which are JSON objects of fractions; a missing measure is a dash. A reader's
args.json with dev_em and dev_f1 (in per cent) will do as well. With --seeds, {seed} in a path is
replaced by each of them. The table then has the mean and, after ±, half the distance from the
lowest value to the highest.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from records.files import check_paths, write_json
from records.reading import read_settings, to_number
from utils import InputError, Parser, run_script, shorten

PER_CENT = ("dev_em", "dev_f1")


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("rows", nargs="*", metavar="NAME=FILE,FILE", help="a row and the files of its measures")
    add("--columns", nargs="+", required=True, metavar="NAME",
        help="measures to show: recall@5, em")
    add("--seeds", nargs="+", default=[], metavar="SEED", help="what {seed} in a path stands for")
    add("--best", metavar="NAME",
        help="instead of the table, print the name of the (first) row with the highest NAME")
    add("--json", metavar="FILE",
        help="write the same numbers as JSON, with the lowest and the highest of the seeds")
    args = parser.parse_args()

    # words after the last column or seed are rows
    for name in ("columns", "seeds"):
        words = getattr(args, name)
        args.rows += [word for word in words if "=" in word]
        setattr(args, name, [word for word in words if "=" not in word])
    return args


# ---------------------------------------------------------------- reading

def split_row(row, seeds):
    """Return (name, [paths of one seed, in the order of the files] per seed) of NAME=FILE,FILE.

    A row without {seed} has one list of paths. Raises InputError.
    """
    name, _, files = row.partition("=")
    paths = [path for path in files.split(",") if path]
    if not name or not paths:
        raise InputError(f"{shorten(row)}: a row is NAME=FILE, or NAME=FILE,FILE with several")
    if "{seed}" not in files:
        return name, [paths]
    if not seeds:
        raise InputError(f"{shorten(row)}: {{seed}} stands for nothing; give --seeds")
    return name, [[path.replace("{seed}", seed) for path in paths] for seed in seeds]


def read_measures(paths, columns):
    """Return {column: fraction} of the columns in the files.

    Raises InputError for a missing file, a value that is not a number, or two values of a column.
    """
    measures = {}
    for path in paths:
        if not os.path.isfile(path):
            raise InputError(f"{path}: no such file; the stage that writes it has not run, or the "
                             "path is wrong")
        content = read_settings(path)
        for column in columns:
            if column not in content:
                continue
            try:
                value = to_number(content[column])
            except ValueError:
                raise InputError(f"{path}: {column} is {shorten(content[column])}, which is not "
                                 "a number") from None
            if measures.setdefault(column, value) != value:
                raise InputError(f"{path}: {column} is {value}, and {measures[column]} in another "
                                 "file of the row; leave one of them out")
    return measures


def read_row(row, columns, seeds):
    """Return (name, {column: [per cent per seed]}) of a row. Raises InputError."""
    name, paths_of_seeds = split_row(row, seeds)
    per_seed = [read_measures(paths, columns) for paths in paths_of_seeds]
    values = {}
    for column in columns:
        scale = 1 if column in PER_CENT else 100
        measured = [scale * measures[column] for measures in per_seed if column in measures]
        if measured and len(measured) < len(per_seed):
            raise InputError(f"{shorten(row)}: {column} is in the files of some seeds, not of all")
        values[column] = measured
    return name, values


# ---------------------------------------------------------------- writing

def format_cell(values):
    """Return '83.21', '83.21 ±1.30' for several seeds, or '-' for no value."""
    if not values:
        return "-"
    mean = sum(values) / len(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} ±{(max(values) - min(values)) / 2:.2f}"


def print_table(rows, columns):
    """Print [(name, {column: [per cent per seed]})], with columns aligned on the right."""
    lines = [["", *columns]]
    for name, values in rows:
        lines.append([name, *(format_cell(values[column]) for column in columns)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for name, *cells in lines:
        aligned = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  ".join([name.ljust(widths[0]), *aligned]))


def choose_best(rows, column):
    """Return the name of the first row with the highest mean in a column. Raises InputError."""
    means = {name: sum(values[column]) / len(values[column]) for name, values in rows
             if values.get(column)}
    if not means:
        raise InputError(f"--best {shorten(column)}: no row has this measure, or it is none of "
                         "--columns")
    return max(means, key=means.get)


def summarize(values):
    """Return {mean, lowest, highest} of a cell in per cent, or None for an empty one."""
    if not values:
        return None
    numbers = {"mean": sum(values) / len(values), "lowest": min(values), "highest": max(values)}
    return {name: round(number, 2) for name, number in numbers.items()}


def main(args):
    if not args.rows:
        raise InputError("no row to print: name some, as NAME=FILE,FILE")
    if not args.columns:
        raise InputError("no measure to show: name some with --columns")
    check_paths([args.json], [])
    rows = [read_row(row, args.columns, args.seeds) for row in args.rows]
    if args.best:
        print(choose_best(rows, args.best))
        return
    print_table(rows, args.columns)
    if len(args.seeds) > 1:
        print(f"mean of the seeds {', '.join(args.seeds)} ± half the distance from the lowest to "
              "the highest")
    if args.json:
        summary = [{"name": name, "values": {column: summarize(values[column])
                                             for column in args.columns}} for name, values in rows]
        write_json(args.json, {"columns": args.columns, "seeds": args.seeds, "rows": summary})
        print(f"the table: {args.json}")


if __name__ == "__main__":
    run_script(main, parse_args())
