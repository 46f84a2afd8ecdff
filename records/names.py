"""List the names under which files store a field (ids, texts, positives ...), for all scripts.

Case, hyphens, underscores and blanks do not matter: `query-id`, `Query_ID` and `queryId` are one
name.
"""
from functools import lru_cache

# If a record has several of these names, the first one in the list is used. A passage's own id
# comes before the id of the document that it was cut from (MS MARCO v2 has both).
QUESTION_ID_NAMES = ("id", "_id", "query_id", "qid", "question_id", "uid")
DOCUMENT_ID_NAMES = ("_id", "id", "passage_id", "psg_id", "pid", "paragraph_id", "chunk_id",
                     "docid", "docno", "document_id", "corpus_id", "uid", "did")
QUESTION_NAMES = ("question", "query", "text", "query_text", "question_text", "anchor")
TEXT_NAMES = ("text", "contents", "content", "body", "passage", "segment", "passage_text",
              "paragraph", "page_content", "document", "document_text", "doc_text")
TITLE_NAMES = ("title", "page_title", "wikipedia_title", "doc_title", "document_title",
               "passage_title", "article_title")
ANSWER_NAMES = ("answers", "golden_answers", "gold_answers", "answer", "gold_answer", "response")
POSITIVE_NAMES = ("pos", "positive_ctxs", "positive_passages", "positives", "positive",
                  "positive_contexts", "positive_docs", "positive_documents")
HARD_NEGATIVE_NAMES = ("neg", "hard_negative_ctxs", "negative_passages", "hard_negative_passages",
                       "hard_negatives", "negatives", "negative", "hard_negative_contexts",
                       "negative_docs", "negative_documents")
OTHER_NEGATIVE_NAMES = ("negative_ctxs", "negative_contexts")  # used if there are no hard ones
POSITIVE_ID_NAMES = ("positive_document_ids", "positive_passage_ids", "positive_docids",
                     "positive_ids", "positive_pids")
NEGATIVE_ID_NAMES = ("negative_document_ids", "negative_passage_ids", "negative_docids",
                     "negative_ids", "negative_pids")
SCORE_NAMES = ("score", "label", "relevance", "relevancy", "rel", "grade", "rating", "judgment",
               "judgement", "relevance_label", "relevance_score")
CONTEXT_NAMES = ("ctxs", "contexts", "passages", "retrieved_passages")

# fields that affect training in other projects, and are ignored here
UNUSED_NAMES = ("type", "weight", "weights", "margin", "label", "labels", "score", "scores",
                "instruction", "query_instruction")

# columns of qrels and runs. Their rows name a query and a document, so `id` would be ambiguous.
PAIR_QUERY_NAMES = ("query_id", "qid", "question_id", "topic_id", "topic", "query")
PAIR_DOCUMENT_NAMES = ("corpus_id", "docid", "docno", "document_id", "passage_id", "psg_id", "pid",
                       "did", "doc", "document", "corpus")

# other fields of records that are used here
OTHER_FIELD_NAMES = ("target", "task", "passage", "gold_docs", "chat_history", "key", "key_index",
                     "history", "history_index", "pos_index", "neg_index", "teacher_scores",
                     "pos_scores", "neg_scores", "prompt", "context", "dataset")


@lru_cache(maxsize=4096)
def fold(name):
    """Return a name's letters and digits in lower case, by which names are compared."""
    return "".join(character for character in str(name).lower() if character.isalnum())


def find_name(fields, names):
    """Return the field that matches the earliest of the names, or None.

    A field spelled exactly like the name is preferred to other fields that match it.
    """
    by_fold = {}
    for field in fields:
        by_fold.setdefault(fold(field), field)
    for name in names:
        if name in fields:
            return name
        if fold(name) in by_fold:
            return by_fold[fold(name)]
    return None


def find_value(record, names):
    """Return the value of the first of these fields that is in the record and not None, or None."""
    value = next((record[name] for name in names if record.get(name) is not None), None)
    if value is not None or not record:
        return value
    given = drop_missing(record)
    name = find_name(given, names)
    return None if name is None else given[name]


def drop_missing(record):
    """Return the fields of a record that are not None."""
    return {name: value for name, value in record.items() if value is not None}


def spell_id(identifier):
    """Return an id as text. A whole float becomes an integer: pandas writes 3.0 for 3."""
    is_whole = isinstance(identifier, float) and identifier.is_integer()
    return str(int(identifier) if is_whole else identifier)


def list_unknown(fields, *lists):
    """Return the fields that no name in the lists matches, in their order."""
    known = {fold(name) for names in lists for name in names}
    return [field for field in fields if fold(field) not in known]


def may_hold_ids(values):
    """Return True if the values of one field, one per record, could be ids: single words or
    numbers that all differ.
    """
    is_word = all(type(value) in (str, int) and len(str(value).split()) == 1 for value in values)
    return is_word and len(set(values)) == len(values)
