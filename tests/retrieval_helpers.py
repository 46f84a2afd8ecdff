"""What the tests of retrieval's modules share: files, questions and results made by hand."""
import json
from types import SimpleNamespace

import numpy as np

from records.questions import make_question
from retrieval.results import Results


def write_rows(path, rows):
    """Writes rows, texts or JSON objects, one per line; returns the path as text."""
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def write_corpus(path):
    """A corpus of eight documents d0 .. d7; the first one's title is null."""
    rows = [{"_id": f"d{i}", "title": f"t{i}", "text": f"text {i}"} for i in range(8)]
    rows[0]["title"] = None
    return write_rows(path, rows)


def make_questions(*records):
    return [make_question({"question": "who", **record}, f"f:{i}", i) for i,
            record in enumerate(records)]


def make_results(*rows):
    """Results of document indices by rank, with scores 0, -1, -2 ..."""
    scores = np.arange(0, -len(rows[0]), -1, dtype=np.float32)
    return Results(np.array(rows), np.tile(scores, (len(rows), 1)))


def make_flags(**changes):
    """The flags of retrieve.py that the outputs depend on."""
    defaults = {"key_template": "{title} {text}", "max_neg_num": 9, "filter_answers": False,
                "metrics": [], "qrels": [], "trec": None, "html": None, "results": [],
                "match": "string", "relevance_level": 1, "measures_per_query": None,
                "neg_ranks": None, "neg_max_score": None, "neg_margin": None,
                "neg_relative_margin": None}
    return SimpleNamespace(**defaults | changes)
