#!/usr/bin/env python3
"""Compare measures with published ones, a line for each; the recipes end with it.

    python scripts/compare.py --result "NQ test EM" runs/nq/em.json em 50.1 1.0 \\
        --result "federated, recall@5" runs/fed/shared.json recall@5 runs/fed/central.json 3.0

It prints `NQ test EM: published 50.10, here 49.83, difference -0.27` and so on, in per cent. Each
result is a name, a file of test.py --measures or retrieve.py --measures, a measure in it, what to
compare it with, and the largest difference that passes as noise. Compare it with a number in per
cent or with the same measure of another file; `none` prints it alone. The exit code is 0 if all
differences pass, else 2.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from records.reading import to_number
from table import PER_CENT, read_measures
from utils import InputError, Parser, run_script, shorten


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("--result", nargs=5, action="append", default=[],
                        metavar=("NAME", "FILE", "MEASURE", "OTHER", "TOLERANCE"),
                        help="a measure, the number or file to compare it with, and the largest "
                        "difference that passes, in per cent")
    parser.add_argument("--toy", action="store_true",
                        help="label numbers as expected of the embedded world, not as published")
    parser.add_argument("--other", default="central", metavar="WORD",
                        help="label of the files to compare with")
    return parser.parse_args()


def read_per_cent(path, measure):
    """Return a measure of a file in per cent. Raises InputError if the file does not have it."""
    measures = read_measures([path], [measure])
    if measure not in measures:
        raise InputError(f"{path}: has no measure {shorten(measure)}")
    return measures[measure] * (1 if measure in PER_CENT else 100)


def compare(name, path, measure, other, tolerance, args):
    """Return (line to print, True if the difference passes) of a result. Raises InputError."""
    here = read_per_cent(path, measure)
    if other == "none":
        return f"{name}: none published, here {here:.2f}", True
    word = "on the embedded world expected" if args.toy else "published"
    try:
        tolerance = to_number(tolerance)
    except ValueError:
        raise InputError(f"{shorten(name)}: the tolerance {shorten(tolerance)} is not a "
                         "number") from None
    try:
        expected = to_number(other)
    except ValueError:  # not a number: a file
        expected, word = read_per_cent(other, measure), args.other
    difference = here - expected
    passes = round(abs(difference), 2) <= tolerance
    line = f"{name}: {word} {expected:.2f}, here {here:.2f}, difference {difference:+.2f}"
    if not passes:
        line += f", more than {tolerance:g}"
    return line, passes


def main(args):
    if not args.result:
        raise InputError("nothing to compare: give --result")
    all_pass = True
    for result in args.result:
        line, passes = compare(*result, args)
        print(line)
        all_pass = all_pass and passes
    if not all_pass:
        sys.exit(2)


if __name__ == "__main__":
    run_script(main, parse_args())
