"""Field names and formats of users' files: ids, texts, positives, negatives and scores under any of
their names, in every reader.
"""
import json

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from conftest import make_bert, run
from dense.examples import Source, read_examples
from lm_score import list_keys
from reader.frozen import find_passage
from records.corpus import Corpus
from records.names import DOCUMENT_ID_NAMES, QUESTION_ID_NAMES, find_name, find_value, list_unknown
from records.qrels import merge_qrels, read_qrels
from records.questions import make_question, read_queries, read_questions, require_ids
from records.reader_records import read_records
from records.reading import iterate_json
from retrieval.mining import NO_LIMITS, keep_negatives, put_negatives
from retrieval.results import read_run
from retrieval_helpers import make_questions, write_corpus, write_rows
from train_dense import list_columns
from utils import InputError

TEMPLATE = "{title} {text}"


def test_a_name_matches_in_any_spelling():
    for name in ("query-id", "query_id", "Query_ID", "queryId", "QUERY ID"):
        assert find_name([name, "text"], QUESTION_ID_NAMES) == name
    assert find_name(["docid", "pid"], DOCUMENT_ID_NAMES) == "pid"  # a passage's own id goes first
    assert find_name(["ID", "id"], QUESTION_ID_NAMES) == "id"
    assert find_value({"id": None, "qid": 0}, QUESTION_ID_NAMES) == 0
    assert find_name(["url", "text"], DOCUMENT_ID_NAMES) is None
    assert list_unknown(["url", "Text", "id"], ("text",), DOCUMENT_ID_NAMES) == ["url"]


# ---------------------------------------------------------------- A15: ids

@pytest.mark.parametrize("name", ["pid", "docno", "psg_id", "document_id", "corpus-id", "doc-id",
                                  "uid", "PassageID", "_id"])
def test_ids_of_documents_have_many_names(name, tmp_path):
    rows = [{name: "a", "text": "x"}, {name: "b", "text": "y"}]
    corpus = Corpus(write_rows(tmp_path / "c.jsonl", rows), "{text}")
    table = Corpus(write_rows(tmp_path / "c.tsv", [f"{name}\ttext", "a\tx", "b\ty"]), "{text}")
    assert corpus.indices(["b", "0"]) == table.indices(["b", "0"]) == [1, -1]
    passages = [{name: "a", "text": "x"}]
    assert find_passage({"id": "a", "text": "z"}, passages, by_id=True) == passages[0]


@pytest.mark.parametrize("name", ["query-id", "query_id", "qid", "Query_ID", "question_id", "uid"])
def test_ids_of_questions_have_many_names(name, tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [{name: 7, "text": "who"}])
    table = write_rows(tmp_path / "q.tsv", [f"{name}\tquery", "7\twho"])
    assert read_queries([path]) == read_queries([table]) == {"7": "who"}


def test_an_unknown_id_column_is_refused_where_ids_matter(tmp_path):
    """Qrels and runs need ids; elsewhere positions are used, and a line reports it."""
    path = write_rows(tmp_path / "c.tsv", ["number\ttext", "7\tx"])
    corpus, logged = Corpus(path, "{text}"), []
    with pytest.raises(InputError, match="c.tsv: --qrels needs documents' ids, and no column "
                                         ".*'number', 'text'.*rename the column with the ids to "
                                         "'id'"):
        corpus.require_ids("--qrels")
    corpus.note_columns(logged.append)
    assert "has no column of ids (its columns are number, text)" in logged[0]
    Corpus(write_rows(tmp_path / "t.tsv", ["text", "x"]), "{text}").require_ids("--qrels")
    make = make_questions
    with pytest.raises(InputError, match="f:0: --qrels needs the questions' ids, and no field .*"
                                         "'number', 'question'"):
        require_ids(make({"number": 3}, {"number": 4}), "--qrels", logged.append)
    require_ids(make({"dataset": "nq", "kind": "a"}, {"dataset": "nq", "kind": "a"}), "x", print)
    rows = [{"text": "x", "summary": "two words", "tags": ["a"]}]
    Corpus(write_rows(tmp_path / "s.jsonl", rows), "{text}").require_ids("--qrels")
    with pytest.raises(InputError, match="f:1: .*no field of this record is known to hold its id"):
        require_ids(make({"id": 3}, {"answers": ["a"]}), "--qrels", logged.append)
    require_ids(make({"answers": ["a"]}), "--qrels", logged.append)
    assert logged[-1].startswith("note: the questions have no ids")
    require_ids(make({"id": 3, "query_id": 7}), "--qrels", logged.append)
    assert logged[-1] == "note: f:0: 'id' is the question's id; 'query_id' is not used"


def test_right_figures_with_ids_by_other_names(tmp_path):
    """MRR was once 0 for a corpus with `pid`."""
    texts = ["The harbour office opens at seven.", "The baker sells rye bread.", "Copper bridges."]
    corpus = write_rows(tmp_path / "c.tsv", ["pid\ttext", *(f"{i + 5}\t{text}" for i, text
                                                            in enumerate(texts))])
    queries = write_rows(tmp_path / "q.jsonl", [{"query-id": 9, "text": "who sells rye bread"}])
    qrels = write_rows(tmp_path / "q.csv", ["query-id,corpus-id,score", "9,6,1"])
    common = ["--retrieval_method", "bm25", "--hits", "1", "--qrels", f"qrels={qrels}",
              "--metrics", "mrr", "--cutoffs", "1", "--index", tmp_path / "index"]
    stdout, _ = run("retrieve.py", "--corpus", corpus, "--queries", queries, *common, "--trec",
                    tmp_path / "run")
    assert "mrr           100.00" in stdout
    assert (tmp_path / "run").read_text().startswith("9 Q0 6 1 ")
    unknown = write_rows(tmp_path / "u.tsv", ["number\ttext", "5\tx", "6\trye bread"])
    _, stderr = run("retrieve.py", "--corpus", unknown, "--queries", queries, *common, code=1)
    assert "u.tsv: --qrels needs documents' ids" in stderr and stderr.count("\n") == 1


def test_titles_and_texts_by_other_spellings(tmp_path):
    rows = [{"docid": 1, "Title": "T", "TEXT": "x"}]
    assert Corpus(write_rows(tmp_path / "a.jsonl", rows), TEMPLATE).text(0) == "T x"
    rows = [{"docid": 1, "wikipedia_title": "T", "text": "x"}]
    corpus = Corpus(write_rows(tmp_path / "b.jsonl", rows), TEMPLATE)
    assert corpus.passage(0) == {"id": "1", "title": "T", "text": "x"}
    path = write_rows(tmp_path / "c.tsv", ["pid\tpassage title\ttext", "1\tT\tx"])
    assert Corpus(path, TEMPLATE).text(0) == "T x"


# ---------------------------------------------------------------- B4, B5: ids that are unusual

def test_a_blank_in_an_id_is_refused_before_the_search(tmp_path):
    """Refuse it at the start; it was once refused after hours of search."""
    for identifier in ("a b", "a\u3000b", "a\u00a0b", "b\t"):
        rows = [{"id": "é", "text": "x"}, {"id": identifier, "text": "y"}]
        corpus = Corpus(write_rows(tmp_path / "c.jsonl", rows), "{text}")
        with pytest.raises(InputError, match="out.trec: a TREC run cannot hold the blank"):
            corpus.refuse_blanks("out.trec")
    rows = [{"id": "é\u2100", "text": "x"}, {"id": "a-b", "text": "y"}]
    Corpus(write_rows(tmp_path / "c.jsonl", rows), "{text}").refuse_blanks("out.trec")


def test_one_long_id_costs_its_own_length(tmp_path):
    """In fixed-width arrays each document would take the longest id's length."""
    rows = [{"id": "x" * 6000 if i == 70 else f"d{i}", "text": "x"} for i in range(3000)]
    path = write_rows(tmp_path / "c.jsonl", rows)
    corpus = Corpus(path, "{text}")
    assert sum(array.nbytes for array in corpus.parts[0].ids) < 100_000
    assert corpus.ids(list(range(3000))) == [row["id"] for row in rows]
    assert corpus.indices(["x" * 6000, "x" * 5999, "d2999", ""]) == [70, -1, 2999, -1]
    other = write_rows(tmp_path / "d.jsonl", [{"id": "d7", "text": "x"}])
    with pytest.raises(InputError, match="the id 'd7' occurs twice in the corpus"):
        Corpus([path, other], "{text}")


# ---------------------------------------------------------------- A20 and D: runs and qrels

@pytest.fixture
def corpus(tmp_path):
    return Corpus(write_corpus(tmp_path / "corpus.jsonl"), TEMPLATE)


def test_a_document_that_comes_twice_counts_once_by_its_best_score(corpus, tmp_path):
    """The last and lowest line was once the one that counted."""
    questions = make_questions({"id": "q1"}, {"id": "q2"})
    logged = []
    run_path = write_rows(tmp_path / "run", ["q1 Q0 d1 1 9.0 p", "q2 Q0 d4 1 1.0 p",
                                             "q1 Q0 d2 2 5.0 p", "q1 Q0 d1 3 1.0 p"])
    assert read_run(run_path, questions, corpus, logged.append).row(0) == ([1, 2], [9.0, 5.0])
    assert logged == [f"note: 1 lines of {run_path} name a document that their question already "
                      f"has (first: {run_path}:4); a document's best score counts"]
    for scores in (({"score": 9.0}, {"score": 5.0}, {"score": 1.0}), ({}, {}, {})):
        record = {"id": "q1", "question": "who", "ctxs": [
            {"docid": document, **score} for document, score in zip(("d1", "d2", "d1"), scores)]}
        path = write_rows(tmp_path / "run.jsonl", [record])
        assert read_run(path, questions, corpus, logged.append).row(0)[0] == [1, 2]


def test_a_judgment_may_come_twice_but_not_with_two_labels(tmp_path):
    """trec_eval also refuses different labels."""
    path = write_rows(tmp_path / "q", ["q1 0 d1 1", "q1 0 d1 1", "q2 0 d1 0"])
    assert read_qrels(path) == {"q1": {"d1": 1.0}, "q2": {"d1": 0.0}}
    path = write_rows(tmp_path / "q", ["q1 0 d1 1", "q1 0 d1 0"])
    with pytest.raises(InputError, match="q:2: document 'd1' of query 'q1' has the label 0 here"):
        read_qrels(path)


@pytest.mark.parametrize("rows", [
    [{"query-id": "q1", "corpus-id": "d1", "score": 1},
     {"query-id": 2, "corpus-id": 3, "score": 0}],
    [{"Query_ID": "q1", "docno": "d1", "rel": 1}, {"Query_ID": 2, "docno": 3, "rel": 0}],
    ["query-id,corpus-id,score", "q1,d1,1", "2,3,0"],
    ["corpus-id;rel;query-id", '"d1";1;q1', "3;0;2"],
    ["qid\titer\tdocno\tlabel", "q1\t0\td1\t1", "2\t0\t3\t0"],
    [{"q1": {"d1": 1}, "2": {"3": 0}}], ["{", '"q1": {"d1": 1}, "2": {"3": 0}}'],
    ["q1,0,d1,1", "2,0,3,0"], ["q1 0 d1 1", "2 0 3 0"], ["q1 d1 1", "2 3 0"]])
def test_qrels_of_every_form(rows, tmp_path):
    """Read Hugging Face's rows, csv, and columns in any order."""
    path = write_rows(tmp_path / "qrels", rows)
    assert read_qrels(path) == {"q1": {"d1": 1.0}, "2": {"3": 0.0}}
    assert set(merge_qrels([f"qrels={path},query_subset={path}"])) == {"q1", "2"}


@pytest.mark.parametrize("rows, message", [
    (["query-id,paper,score", "q1,d1,1"], "q:1: .*no column 'corpus-id'.*'query-id', 'paper'"),
    ([{"query-id": "q1", "corpus-id": "d1"}], "q:1: .*no column 'score'")])
def test_unknown_columns_of_qrels_are_listed(rows, message, tmp_path):
    with pytest.raises(InputError, match=message):
        read_qrels(write_rows(tmp_path / "q", rows))


def test_ms_marcos_run_has_ranks(corpus, tmp_path):
    questions = make_questions({"id": "q1"}, {"id": "q2"})
    path = write_rows(tmp_path / "run", ["q1\td3\t2", "q1\td2\t1", "q2\td4\t1"])
    results = read_run(path, questions, corpus)
    assert [results.row(i)[0] for i in range(2)] == [[2, 3], [4]]
    path = write_rows(tmp_path / "run.json", [{"q1": {"d3": 0.5, "d2": 0.75}, "q2": {"d4": 1}}])
    assert read_run(path, questions, corpus).row(0) == ([2, 3], [0.75, 0.5])
    with pytest.raises(InputError, match="run:1: not a line of a TREC run .*nor of MS MARCO's"):
        read_run(write_rows(tmp_path / "run", ["q1 d3 0.5"]), questions, corpus)


# ---------------------------------------------------------------- D: tables without a header

def test_collections_without_a_header(tmp_path):
    """The first line of MS MARCO's collection.tsv and queries.tsv is not a header."""
    rows = ['0\tThe "first\tT', "7\tA second one\tU"]
    logged = []
    for columns in (2, 3):
        lines = ["\t".join(row.split("\t")[:columns]) for row in rows]
        corpus = Corpus(write_rows(tmp_path / f"{columns}.tsv", lines), TEMPLATE)
        corpus.note_columns(logged.append)
        assert corpus.ids([0, 1]) == ["0", "7"] and corpus.indices(["7"]) == [1]
        title = "T " if columns == 3 else ""
        assert corpus.text(0) == f'{title}The "first'
        assert corpus.row(1)[1].endswith(".tsv:2")
    assert logged[0].endswith("2.tsv has no header; its columns are read as id, text")
    path = write_rows(tmp_path / "q.tsv", ["1\tquestion", "2\tanswer"])
    assert read_queries([path]) == {"1": "question", "2": "answer"}


def test_queries_in_brackets_are_no_lists_of_answers(tmp_path):
    path = write_rows(tmp_path / "q.tsv", ["1\twho", "2\t[solved] who sells bread [2021]",
                                           "3\t['a']", "x4\t[abc]"])
    assert read_queries([path]) == {"1": "who", "2": "[solved] who sells bread [2021]",
                                    "3": "['a']", "x4": "[abc]"}


# ---------------------------------------------------------------- A16, A17: mining

@pytest.mark.parametrize("positive", [
    {"positive_ctxs": [{"text": "older", "id": "d3"}]},
    {"positive_ctxs": [{"text": "older", "docid": "d3"}]},
    {"positive_ctxs": [{"text": "older", "doc_id": "d3"}]},
    {"pos": [{"text": "older", "_id": "d3"}]}, {"positive_document_ids": ["d3"]},
    {"positive_passages": [{"text": "older", "docid": "d3"}]},
    {"pos": ["text  3"]}, {"positive": "T3 text 3"}])
def test_mining_knows_a_positive_by_any_name(positive, corpus):
    """Under `id`, `docid` or `doc_id` a positive once became a hard negative."""
    question, = make_questions(positive)
    hits = [(index, corpus.text(index)) for index in (1, 3, 5)]
    kept = keep_negatives(question, hits, [0, 0, 0], corpus, {}, TEMPLATE, NO_LIMITS, False, False)
    assert [index for index, _ in kept] == [1, 5]


def test_a_query_is_not_its_own_hard_negative(corpus):
    for text in ("text 3", "t3  text 3", "Text 3"):
        question = make_question({"question": text, "pos": ["x"]}, "f:1", 0)
        hits = [(index, corpus.text(index)) for index in (3, 4)]
        kept = keep_negatives(question, hits, [0, 0], corpus, {}, TEMPLATE, NO_LIMITS, False, False)
        assert [index for index, _ in kept] == [4]


def test_mined_negatives_replace_those_of_any_name(corpus):
    record = {"query": "q", "positive_passages": [{"docid": "d1", "title": "", "text": "x"}],
              "negative_passages": [{"docid": "d2", "title": "", "text": "y"}]}
    put_negatives(record, [(3, "t3 text 3")], corpus)
    assert record["negative_passages"] == [{"title": "t3", "text": "text 3", "docid": "d3"}]
    record = {"query": "q", "positive": "x", "negative": "y", "neg_scores": [1], "pos_scores": [2]}
    put_negatives(record, [(3, "t3 text 3")], corpus)
    assert record == {"query": "q", "positive": "x", "neg": ["t3 text 3"], "neg_index": [3]}


# ---------------------------------------------------------------- A19, D: training records

TEVATRON = {"query_id": "0", "query": "q", "positive_passages": [{"docid": "1", "text": "p"}],
            "negative_passages": [{"docid": "2", "text": "n"}, {"docid": "3", "text": "m"}]}


@pytest.mark.parametrize("record, pos, neg", [
    ({"anchor": "q", "positive": "p", "negative": "n"}, ["p"], ["n"]),
    ({"query": "q", "pos": "p", "neg": "n"}, ["p"], ["n"]),
    ({"question": "q", "positive": "p", "negative_1": "n", "negative_2": "m"}, ["p"], ["n", "m"]),
    ({"query": "q", "Positives": ["p"], "hard-negatives": ["n"]}, ["p"], ["n"]),
    ({"query": "q", "positive": "p"}, ["p"], []),
    (TEVATRON, TEVATRON["positive_passages"], TEVATRON["negative_passages"])])
def test_training_records_of_other_formats(record, pos, neg, tmp_path):
    """Read sentence-transformers' triplets and Tevatron's records."""
    path = write_rows(tmp_path / "r.jsonl", [record])
    example, = read_examples(path)
    assert (example.query, example.pos, example.neg) == ("q", pos, neg)
    question, = read_questions(path)
    assert list_keys(question, None) == pos + neg


def test_records_may_name_documents(corpus, tmp_path):
    """Read the records of newer Tevatron."""
    record = {"query_text": "q", "positive_document_ids": ["d3"], "negative_document_ids": ["d5"]}
    path = write_rows(tmp_path / "r.jsonl", [record])
    example, = read_examples(path, Source(corpus=corpus))
    assert (example.query, example.pos, example.neg) == ("q", [3], [5])
    with pytest.raises(InputError, match="r.jsonl:1: 'positive_document_ids' names documents"):
        read_examples(path)


def test_tables_of_triples(corpus, tmp_path):
    """Read MS MARCO's triples, of texts and of ids."""
    texts = write_rows(tmp_path / "t.tsv", ['who is "it\tp\tn', "what\tp\tm"])
    examples = read_examples(texts)
    assert [(e.query, e.pos, e.neg) for e in examples] == [('who is "it', ["p"], ["n"]),
                                                           ("what", ["p"], ["m"])]
    named = write_rows(tmp_path / "n.csv", ["negative,query,positive", "n,who,p"])
    example, = read_examples(named)
    assert (example.query, example.pos, example.neg) == ("who", ["p"], ["n"])
    numbers = Corpus(write_rows(tmp_path / "c.tsv", ["11\tone", "12\ttwo"]), "{text}")
    ids = write_rows(tmp_path / "i.tsv", ["7\t12\t11"])
    example, = read_examples(ids, Source(corpus=numbers, queries={"7": "who"}))
    assert (example.query, example.pos, example.neg) == ("who", [1], [0])
    with pytest.raises(InputError, match="i.tsv:1: is a triple of ids; give the texts with --que"):
        read_examples(ids)
    with pytest.raises(InputError, match="i.tsv:1: document '12' is not in the corpus"):
        read_examples(ids, Source(corpus=corpus, queries={"7": "who"}))
    passages = write_rows(tmp_path / "p.tsv", ["id\ttext\ttitle", "1\tx\tT"])
    with pytest.raises(InputError, match="p.tsv: a table of questions, but JSON records are"):
        read_examples(passages)
    broken = write_rows(tmp_path / "b.tsv", ["a\tp\tn", "a\tp"])
    with pytest.raises(InputError, match="b.tsv:2: is not a triple"):
        read_examples(broken)


def test_flag_embeddings_scores_and_prompt_are_used(tmp_path):
    """These fields were once ignored silently; fields that are still unused are reported."""
    record = {"query": "q", "pos": ["p"], "neg": ["n", "m"], "pos_scores": [0.9],
              "neg_scores": [0.4, 0.1], "prompt": "Find: ", "type": "normal"}
    logged = []
    example, = read_examples(write_rows(tmp_path / "r.jsonl", [record]), log=logged.append)
    assert example.scores == [0.9, 0.4, 0.1] and example.instruction == "Find: "
    assert logged == [f"note: {tmp_path}/r.jsonl: fields that training does not use, and the "
                      "records that have them: 'type' (1)"]
    records = [record | {"pos_scores": None, "margin": 0.3},
               {"query": "q", "positive_ctxs": [{"text": "p"}], "hard_negative_ctxs":
                [{"text": "n"}], "negative_ctxs": [{"text": "m"}], "hard_negatives": ["o"]}]
    examples = read_examples(write_rows(tmp_path / "r.jsonl", records), log=logged.append)
    assert examples[0].scores is None
    assert logged[1].endswith("'type' (1), 'margin' (1), 'neg_scores' (1), 'negative_ctxs' (1), "
                              "'hard_negatives' (1)")
    # negative_ctxs are not reported if they replace missing hard negatives
    plain = {"query": "q", "positive_ctxs": [{"text": "p"}], "negative_ctxs": [{"text": "m"}]}
    example, = read_examples(write_rows(tmp_path / "r.jsonl", [plain]), log=logged.append)
    assert example.neg == [{"text": "m"}] and len(logged) == 2
    record["neg_scores"] = [0.4]
    with pytest.raises(InputError, match="r.jsonl:1: 2 teacher_scores for 1 positives and 2 neg"):
        read_examples(write_rows(tmp_path / "r.jsonl", [record]))


# ---------------------------------------------------------------- B2: no negatives

@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"), hidden_dropout_prob=0.0,
                     attention_probs_dropout_prob=0.0)


def test_columns_of_groups_of_different_sizes():
    assert list_columns(torch.tensor([2, 1, 3])).tolist() == [[0, 1, 0], [2, 2, 2], [3, 4, 5]]
    assert list_columns(torch.tensor([2, 2])).tolist() == [[0, 1], [2, 3]]


def test_records_without_negatives_train_on_others_passages(bert, tmp_path):
    """Compare the loss with a plain softmax over all keys, in one process and in two (GradCache).

    In the latter case one process's queries have no negatives at all.
    """
    people = ["tom", "ann", "river", "baker", "bridge", "house", "town", "market"]
    records = []
    for i, name in enumerate(people):
        negatives = [{"title": "", "text": f"{people[i - 1]} of it"}] if i % 2 else []
        records.append({"question": f"who is {name}", "positive_ctxs": [
            {"title": name, "text": f"the {name} in it"}], "hard_negative_ctxs": negatives,
            "negative_ctxs": []})
    path = write_rows(tmp_path / "r.json", records)
    flags = ["--train_data", path, "--query_encoder", bert, "--train_group_size", "2",
             "--no_shuffle", "--epochs", "1", "--lr", "1e-3", "--warmup_ratio", "0", "--version",
             "none", "--pooling_method", "cls", "--dense_metric", "cos", "--cos_temperature", "0.1",
             "--logging_steps", "1"]
    runs = {}
    for name, processes, more in (("one", 1, ["--batch_size", "4"]),
                                  ("two", 2, ["--batch_size", "2", "--chunk_size", "1"])):
        stdout, _ = run("train_dense.py", "--output_dir", tmp_path / name, *flags, *more,
                        processes=processes)
        assert "8 training examples" in stdout and "records without negatives: 4 of 8" in stdout
        rows = [json.loads(line) for line in open(f"{tmp_path / name}.jsonl")]
        runs[name] = [loss for row in rows for loss in row["loss_curve"]]
    assert len(runs["one"]) == 2
    torch.testing.assert_close(runs["one"], runs["two"], atol=1e-5, rtol=1e-5)
    assert runs["one"][0] == pytest.approx(plain_loss(bert, records[:4]), abs=1e-4)


def plain_loss(bert, records):
    """Return InfoNCE over all keys of the records, without any of the training code."""
    tokenizer, model = AutoTokenizer.from_pretrained(bert), AutoModel.from_pretrained(bert).eval()

    def encode(text):
        ids = tokenizer(text, return_tensors="pt")
        return torch.nn.functional.normalize(model(**ids).last_hidden_state[0, 0], dim=0)
    keys, positives = [], []
    for record in records:
        positives.append(len(keys))
        for key in record["positive_ctxs"] + record["hard_negative_ctxs"]:
            keys.append(f"{key['title']} {key['text']}".strip())
    with torch.no_grad():
        queries = torch.stack([encode(record["question"]) for record in records])
        scores = queries @ torch.stack([encode(key) for key in keys]).t() / 0.1
    return torch.nn.functional.cross_entropy(scores, torch.tensor(positives)).item()


def test_a_lone_query_has_nothing_to_contrast_with(bert, tmp_path):
    path = write_rows(tmp_path / "r.json", [{"query": "who", "pos": ["it"]}])
    _, stderr = run("train_dense.py", "--output_dir", tmp_path / "out", "--train_data", path,
                    "--query_encoder", bert, "--batch_size", "1", code=1)
    assert ("r.json:1: has no negatives, and a batch of one query has no in-batch "
            "negatives") in stderr


# ---------------------------------------------------------------- C: what a file is

def test_json_of_several_lines_is_read(tmp_path):
    """Name the wrong line of a file that is not cut off."""
    record = {"question": "who", "answers": ["a"], "ctxs": [{"id": "1", "text": "x"}]}
    path = tmp_path / "r.jsonl"
    path.write_text("\n\n".join(json.dumps(record, indent=2) for _ in range(3)))
    rows = list(iterate_json(path))
    assert [row for row, _ in rows] == [record] * 3 and rows[1][1] == f"{path}:14"
    path.write_text(json.dumps(record) + "\n" + json.dumps(record, indent=1) + "\n{\n")
    with pytest.raises(InputError, match=r"r.jsonl:1\d: not valid JSON"):
        list(iterate_json(path))
    documents = [{"id": f"d{i}", "text": "x"} for i in range(2)]
    path.write_text("\n".join(json.dumps(document, indent=2) for document in documents))
    assert Corpus(str(path), "{text}").ids([1]) == ["d1"]


def test_pyserinis_run_is_read(tmp_path):
    run_of = {"7": {"question": "who", "answers": "['a', 'b']", "contexts": [
        {"docid": "d1", "score": 9.1, "text": "x"}]}}
    for indent in (None, 4):
        (tmp_path / "r.json").write_text(json.dumps(run_of, indent=indent))
        record, = read_records(tmp_path / "r.json")
        assert record["id"] == "7" and record["answers"] == ["a", "b"]
        assert record["ctxs"][0]["id"] == "d1"
    (tmp_path / "r.json").write_text(json.dumps({"version": 1, "data": [{"question": "who"}]}))
    assert len(read_records(tmp_path / "r.json")) == 1


@pytest.mark.parametrize("content, message", [
    (b'{"question": "who"}\n{"question": "\xe9t\xe9"}\n', "r.jsonl:2: byte 15 of the line is not "
                                                          "UTF-8"),
    (b'[{"question": 5}]', "record 0: 'question' must be a text, got 5"),
    (b"{'question': 'who'}\n", "r.jsonl:1: not valid JSON .*JSON needs double quotes around texts"),
    (b'{"question": "wh', "r.jsonl:1: .*may be cut off there"),
    (b"PAR1\x15\x04", "a parquet file.*python -c .*pyarrow.*r.jsonl > .*r.jsonl.jsonl"),
    (b"\xff\xfe{\x00", "in UTF-16.*iconv .*r.jsonl > .*r.utf8.jsonl"),
    (b"\x1f\x8b\x08\x00", "is gzipped.*its name must end in .gz"),
    (b"PK\x03\x04", "is a zip file or a spreadsheet")])
def test_messages_name_the_trouble(content, message, tmp_path):
    (tmp_path / "r.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_records(tmp_path / "r.jsonl")


def test_every_reader_names_a_parquet_file(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1abc")
    for read in (read_records, read_questions, read_qrels, read_examples,
                 lambda file: Corpus(str(file), TEMPLATE)):
        with pytest.raises(InputError, match="x.parquet: is a parquet file"):
            read(path)
