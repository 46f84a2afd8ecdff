"""The candidates that records bring along, LLM-Embedder's collated files (mined negatives, keys, teacher scores), what these need."""
import json
import os
from collections import Counter

from corpus import format_key
from data import check_types
from metrics import METRICS
from results import stack
from utils import InputError, new_file

COLLATED = ("collate_neg", "collate_key", "collate_score")


def candidates(record, scored=False):
    """(keys, numbers) of a record's candidates: its key, its history, or its pos and neg; numbers is None if not all have one.

    scored: those that teacher_scores belong to in training, so that a key comes last.
    """
    pools = any(record.get(name) for name in ("history", "pos", "neg"))
    name = next((name for name in ("key", "history") if record.get(name) is not None and not (name == "key" and scored and pools)), None)
    if name:
        keys, numbers = list(record[name] or []), list(record.get(f"{name}_index") or [])
    else:
        keys, numbers = ([*(record.get(f"pos{kind}") or []), *(record.get(f"neg{kind}") or [])] for kind in ("", "_index"))
    return keys, numbers if len(numbers) == len(keys) else None


def check_candidates(queries, corpus, template, numbered, scored=False):
    """InputError for a question whose candidates are no keys or, if they must be numbered, are not, or not by the corpus's numbers."""
    if queries and not any(record.get(name) for record in (query.record for query in queries) for name in ("key", "history", "pos", "neg")):
        raise InputError("no question has candidates, in 'key', 'history', or 'pos' and 'neg'; give some, or rank an earlier result with "
                         "--results")
    for query in queries:
        check_types(query.record, f"question {query.id!r}", ["key", "key_index", "history", "history_index"])
        keys, numbers = candidates(query.record, scored)
        key_texts(query, keys, template)
        if numbered and keys and numbers is None:
            raise InputError(f"question {query.id!r}: not every candidate has its number in 'key_index', or 'pos_index' and 'neg_index'; "
                             "only the collated files can do without, or rank an earlier result with --results")
        if numbered or corpus:
            check_numbers(query, numbers or [], corpus)


def check_numbers(query, numbers, corpus):
    """InputError for a number that is none of a document of the corpus."""
    wrong = [n for n in numbers if not isinstance(n, int) or n < 0 or corpus and n >= len(corpus)]
    if wrong:
        raise InputError(f"question {query.id!r}: {wrong[0]!r} is the number of no document of the corpus; is it the corpus of this file?")


def key_texts(query, keys, template):
    """The texts of keys. Raises InputError."""
    try:
        return [format_key(key, template) for key in keys]
    except (KeyError, AttributeError) as error:
        raise InputError(f"question {query.id!r}: a candidate or positive is neither a text nor an object with the columns of "
                         f"--key_template '{template}' ({error})") from None


def positives(record):
    """The keys that a record names as its positives, LLM-Embedder's or DPR's."""
    return [*(record.get("pos") or []), *(record.get("positive_ctxs") or [])]


def number_candidates(queries, results):
    """Results whose numbers are the documents', of results whose numbers are places among each record's candidates."""
    rows = []
    for i, query in enumerate(queries):
        (places, scores), numbers = results.row(i), candidates(query.record)[1]
        rows.append((i, [numbers[place] for place in places], scores))
    return stack(rows)


def collated_paths(args):
    """{kind of collated file: path}, LLM-Embedder's names: --eval_data records.json becomes records.FIELD.NAME.json."""
    stem, ending = os.path.splitext(str(args.eval_data).removesuffix(".gz"))
    name = args.save_name or args.retrieval_method
    return {kind: f"{stem}.{field}.{name}{ending}" for kind, field in zip(COLLATED, ("neg", "key", "scored"))}


def collate(kind, path, queries, results, corpus, own, labels, args):
    """Writes LLM-Embedder's files: negatives mined from the hits, hits as keys, or scores as teacher_scores.

    own: the hits are places among the record's own candidates. collate_neg drops old teacher_scores and queries without hits; a record in
    DPR's form gets them as hard_negative_ctxs. args: key_template, max_neg_num, filter_answers.
    """
    with new_file(path) as file:
        for i, query in enumerate(queries):
            record, (numbers, scores) = dict(query.record), results.row(i)
            if kind == "collate_score":
                record["teacher_scores"] = [score for _, score in sorted(zip(numbers, scores))]  # of every candidate, by place
            else:
                hits = read_hits(query, numbers, corpus, own, args.key_template)
                if kind == "collate_key":
                    put_hits(record, "key", hits)
                elif not hits:
                    continue
                else:
                    hits = keep_negatives(query, hits, corpus, labels[i], args.key_template, args.filter_answers)[:args.max_neg_num]
                    record.pop("teacher_scores", None)
                    if "positive_ctxs" in record:
                        record["hard_negative_ctxs"] = [dpr_context(number, text, corpus) for number, text in hits]
                    else:
                        put_hits(record, "neg", hits)
            file.write(json.dumps(record, ensure_ascii=False) + "\n")


def read_hits(query, numbers, corpus, own, template):
    """[(number or None, text)] of hits: documents of the corpus or places among the record's own candidates."""
    if not own:
        return [(number, corpus.text(number)) for number in numbers]
    keys, known = candidates(query.record)
    return [(known[place] if known else None, text) for place, text in zip(numbers, key_texts(query, [keys[n] for n in numbers], template))]


def put_hits(record, field, hits):
    """Sets a record's neg or key, and their numbers if they have some."""
    record.pop(f"{field}_index", None)
    record[field] = [text for _, text in hits]
    if all(number is not None for number, _ in hits):
        record[f"{field}_index"] = [number for number, _ in hits]


def dpr_context(number, text, corpus):
    """A hit as DPR's files have it."""
    if number is None or not corpus:
        return {"title": "", "text": text}
    passage = corpus.passage(number)
    return {"title": passage["title"], "text": passage["text"], "passage_id": passage["id"]}


def keep_negatives(query, hits, corpus, labels, template, filter_answers):
    """The hits [(number, text)] that are no positive, by text, number, passage id or qrels, and, if asked, hold no answer.

    An answer is held as in LLM-Embedder: it is a substring, in lower case.
    """
    texts = set(key_texts(query, positives(query.record), template))
    numbers = {number for number, label in labels.items() if label > 0} | set(query.record.get("pos_index") or [])
    if corpus:
        ids = [context.get("passage_id", context.get("psg_id")) for context in query.record.get("positive_ctxs") or []]
        numbers.update(corpus.numbers([str(id) for id in ids if id is not None]))
    held = [answer.lower() for answer in query.answers] if filter_answers else []
    return [(number, text) for number, text in hits
            if number not in numbers and text not in texts and not any(answer in text.lower() for answer in held)]


def check_outputs(queries, labels, corpus, args):
    """InputError, before the search, for records without what the metrics asked for need."""
    for name in [name for name in args.metrics if name in METRICS and queries]:
        if name == "nq" and not any(query.answers for query in queries):
            raise InputError("nq cannot be measured: no query has 'answers'")
        if name != "nq" and not any(labels):
            raise InputError(f"{name} cannot be measured: no query has qrels or 'pos_index'")
    ids = Counter(query.id for query in queries)
    twice = next((id for id, count in ids.items() if count > 1), None)
    if twice is not None and (args.trec or args.results or args.qrels):
        raise InputError(f"two questions have the id {twice!r}, and runs and qrels go by ids; make them unique")
    blank = next((id for id in ids if len(id.split()) != 1), None)
    if args.trec and blank is not None:
        raise InputError(f"a TREC run cannot hold the question id {blank!r}; take the blanks out, or use --output")
    for query in queries:
        if "collate_neg" in args.metrics:
            key_texts(query, positives(query.record), args.key_template)
        if "collate_neg" in args.metrics or set(args.metrics) & set(METRICS) - {"nq"} and not args.qrels:
            check_numbers(query, query.record.get("pos_index") or [], corpus)
