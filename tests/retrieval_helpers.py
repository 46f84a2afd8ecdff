"""Files, questions and results made by hand, for the tests of retrieval."""
import json
from types import SimpleNamespace

import numpy as np

from records.questions import make_question
from retrieval.results import CandidateResults, Results


def write_rows(path, rows):
    """Write rows, texts or JSON objects, one per line. Return the path as text."""
    lines = [json.dumps(row) if isinstance(row, dict) else row for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return str(path)


def write_corpus(path):
    """Write a corpus of eight documents d0 .. d7, of which d0 has the title null."""
    rows = [{"_id": f"d{i}", "title": f"t{i}", "text": f"text {i}"} for i in range(8)]
    rows[0]["title"] = None
    return write_rows(path, rows)


def make_questions(*records):
    """Return Questions of records, with the text "who" unless a record has another."""
    return [make_question({"question": "who", **record}, f"f:{i}", i) for i,
            record in enumerate(records)]


def make_results(*rows):
    """Return Results of document indices by rank, with scores 0, -1, -2 ..."""
    scores = np.arange(0, -len(rows[0]), -1, dtype=np.float32)
    return Results(np.array(rows), np.tile(scores, (len(rows), 1)))


def rank_candidates(*rows):
    """Return CandidateResults of positions by rank, with scores 0, -1, -2 ..."""
    return CandidateResults(*make_results(*rows))


def make_flags(**changes):
    """Return the flags of retrieve.py that the outputs depend on."""
    defaults = {"max_neg_num": 9, "filter_answers": False, "metrics": [], "qrels": [],
                "trec": None, "html": None, "output": None, "results": [], "match": "string",
                "relevance_level": 1, "measures_per_query": None, "neg_ranks": None,
                "neg_max_score": None, "neg_margin": None, "neg_relative_margin": None,
                "data_root": "", "save_name": None, "retrieval_method": "bm25"}
    return SimpleNamespace(**defaults | changes)
