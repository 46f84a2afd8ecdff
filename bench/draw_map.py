r"""Draw the loop as a diagram: what each script makes, and which script reads it.

    python bench/draw_map.py docs/map.svg

The picture is plain SVG in the page's light or dark colours.
"""
import html
import os
import sys
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from records.files import check_paths, new_file
from utils import Parser, run_script

WIDTH, HEIGHT = 860, 430
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1c1f23; }
  .small { font-size: 11.5px; fill: #5a6068; }
  .script { font-weight: 600; font-family: ui-monospace, monospace; }
  rect { fill: #ffffff; stroke: #8a9099; stroke-width: 1.2; }
  .work { fill: #e8f0fb; stroke: #1f5fa8; }
  .round { fill: none; stroke: #8a9099; stroke-dasharray: 5 4; }
  path { fill: none; stroke: #5a6068; stroke-width: 1.4; }
  .tip { fill: #5a6068; stroke: none; }
  .page { fill: #fcfcfa; stroke: none; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e4e4df; }
    .small { fill: #a4a9b0; }
    rect { fill: #202327; stroke: #7d838b; }
    .work { fill: #1d2d42; stroke: #6ea3ee; }
    .round { stroke: #7d838b; }
    path { stroke: #a4a9b0; }
    .tip { fill: #a4a9b0; }
    .page { fill: #17191c; }
  }
"""


class Box(NamedTuple):
    """Hold a script with what it does or, unless `is_work`, the files between scripts."""
    x: int
    y: int
    width: int
    title: str
    lines: tuple = ()
    is_work: bool = True

    @property
    def height(self):
        return 28 + 17 * len(self.lines)


BOXES = [
    Box(20, 40, 150, "corpus, questions", ("documents, answers,", "qrels"), is_work=False),
    Box(220, 40, 170, "retrieve.py", ("BM25, vectors, ranker", "runs, mined negatives")),
    Box(440, 40, 120, "contexts", ("passages of", "each question"), is_work=False),
    Box(610, 40, 220, "train_epoch.py",
        ("Fusion-in-Decoder from a T5,", "RA-DIT from a causal LM")),
    Box(610, 165, 220, "reader", ("a folder that transformers opens",), is_work=False),
    Box(220, 165, 170, "retriever, ranker", ("a sentence-", "transformers folder"), is_work=False),
    Box(220, 295, 170, "train_dense.py", ("contrast, distillation,", "graded labels")),
    Box(440, 270, 120, "teacher scores", ("of the passages",), is_work=False),
    Box(610, 255, 220, "test.py", ("exact match, F1; --scores:", "cross-attention (FiD-KD)")),
    Box(610, 345, 220, "lm_score.py", ("likelihood of the answer", "(LSR, LLM-Embedder)")),
    Box(440, 165, 120, "ask.py", ("answers one", "question"))]

# the points of a line, which ends in a tip; a label and its position
ARROWS = [
    ([(170, 71), (220, 71)], "", None),
    ([(390, 71), (440, 71)], "", None),
    ([(560, 71), (610, 71)], "", None),
    ([(720, 102), (720, 165)], "", None),
    ([(720, 210), (720, 255)], "", None),
    ([(830, 188), (845, 188), (845, 376), (830, 376)], "", None),
    ([(610, 286), (560, 286)], "", None),
    ([(610, 376), (500, 376), (500, 315)], "", None),
    ([(440, 300), (390, 318)], "", None),
    ([(305, 295), (305, 227)], "", None),
    ([(305, 165), (305, 102)], "searches and ranks", (313, 138)),
    ([(95, 102), (95, 340), (220, 340)], "labels", (110, 333)),
    ([(220, 92), (195, 92), (195, 312), (220, 312)], "hard negatives", (102, 200)),
    ([(390, 196), (440, 196)], "", None),
    ([(610, 196), (560, 196)], "", None)]
NOTE = "federate.py runs train_epoch.py's and train_dense.py's steps on many parties' own records"


def parse_args():
    parser = Parser(description=__doc__)
    parser.add_argument("picture", help="file to write, .svg")
    return parser.parse_args()


def draw_box(box):
    """Return the SVG of a box."""
    kind = ' class="work"' if box.is_work else ""
    title = ' class="script"' if box.is_work else ""
    centre = box.x + box.width // 2
    parts = [f'<rect{kind} x="{box.x}" y="{box.y}" width="{box.width}" height="{box.height}" '
             'rx="7"/>',
             f'<text{title} x="{centre}" y="{box.y + 20}" text-anchor="middle">'
             f"{html.escape(box.title)}</text>"]
    for number, line in enumerate(box.lines):
        parts.append(f'<text class="small" x="{centre}" y="{box.y + 38 + 16 * number}" '
                     f'text-anchor="middle">{html.escape(line)}</text>')
    return "\n".join(parts)


def draw_arrow(points, label, place):
    """Return the SVG of a line with its tip and label."""
    (x, y), (end_x, end_y) = points[-2:]
    length = ((end_x - x) ** 2 + (end_y - y) ** 2) ** 0.5
    dx, dy = (end_x - x) / length, (end_y - y) / length
    tip = [(end_x, end_y), (end_x - 9 * dx - 4.5 * dy, end_y - 9 * dy + 4.5 * dx),
           (end_x - 9 * dx + 4.5 * dy, end_y - 9 * dy - 4.5 * dx)]
    points = [*points[:-1], (end_x - 6 * dx, end_y - 6 * dy)]
    line = " L ".join(f"{px:g} {py:g}" for px, py in points)
    parts = [f'<path d="M {line}"/>',
             '<polygon class="tip" points="' + " ".join(f"{px:.1f},{py:.1f}" for px, py in tip)
             + '"/>']
    if label:
        parts.append(f'<text class="small" x="{place[0]}" y="{place[1]}">{label}</text>')
    return "\n".join(parts)


def main(args):
    check_paths([args.picture], [])
    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
             'aria-label="the loop between retriever and reader">',
             f"<style>{STYLE}</style>",
             f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
             *(draw_arrow(*arrow) for arrow in ARROWS), *(draw_box(box) for box in BOXES),
             f'<text class="small" x="20" y="{HEIGHT - 12}">{NOTE}</text>', "</svg>"]
    with new_file(args.picture) as file:
        file.write("\n".join(parts) + "\n")


if __name__ == "__main__":
    run_script(main, parse_args())
