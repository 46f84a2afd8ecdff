"""What people reported of other repositories, tried here: the right value of each; the names in the
docstrings are those of the repositories and the numbers of their issues.
"""
import json
import os
import time

import pytest

import train_dense
from conftest import make_bert
from dense.flags import parse_retriever_flags
from metrics import exact_match, f1, find_answers, has_answer
from records.corpus import Corpus
from records.questions import make_question
from records.reader_records import read_records
from retrieval.mining import NO_LIMITS, keep_negatives
from retrieval.results import read_run, scale_scores
from scripts import make_corpus
from scripts.make_corpus import cut_words, join_words
from utils import InputError


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert"))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(out, bert, *flags):
    """Return the loss of every update of a training without dropout."""
    given = ["--output_dir", str(out), "--query_encoder", bert, "--dropout", "0", "--version",
             "none", "--lr", "1e-3", "--warmup_ratio", "0", "--query_max_length", "16",
             "--key_max_length", "16", "--no_shuffle", "--save_steps", "9", *map(str, flags)]
    args = parse_retriever_flags("", given)
    train_dense.main(args)
    rows = [json.loads(line) for line in open(f"{out}.jsonl")]
    return [loss for row in rows for loss in row["loss_curve"]]


def test_a_smaller_last_micro_batch_counts_by_its_queries(bert, tmp_path):
    """keras 20241, transformers PR 35207: 4 + 1 queries are an update's mean over 5."""
    rows = [{"query": f"who wrote {letter}", "pos": [f"town {letter}"], "neg": ["animal baker"],
             "teacher_scores": [index - 2.0, 1.0]} for index, letter in enumerate("abcde")]
    path = write_lines(tmp_path / "train.jsonl", rows)
    losses = []
    for name, *flags in (("one", 5, 1), ("two", 4, 2), ("three", 2, 3)):
        batch, accumulation = flags
        losses.append(train(tmp_path / name, bert, "--train_data", path, "--loss", "kl",
                            "--group_size", 2, "--max_steps", 2, "--batch_size", batch,
                            "--grad_accumulation", accumulation))
    # the second loss is that of the weights which the first update has left
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)
    assert losses[2] == pytest.approx(losses[0], abs=1e-6)


def test_a_query_s_other_positives_are_no_negatives(bert, tmp_path):
    """sentence-transformers 3189: two visits of one query, each with another of its positives."""
    texts = ["town of it", "river in it"]
    rows = [{"query": "who wrote it", "pos": texts[::step], "neg": [f"animal {step}"]}
            for step in (1, -1)]
    alone = [dict(row, pos=row["pos"][:1]) for row in rows]
    flags = ["--group_size", 2, "--batch_size", 2, "--max_steps", 1, "--mask_duplicates"]
    masked, = train(tmp_path / "both", bert, "--train_data", write_lines(tmp_path / "b", rows),
                    *flags)
    other, = train(tmp_path / "one", bert, "--train_data", write_lines(tmp_path / "o", alone),
                   *flags)
    assert masked < other - 0.01


def test_dev_questions_of_several_tasks_are_refused(bert, tmp_path):
    """retrieve.py refuses them, too: the documents would get the first task's instruction. Of one
    task's training all texts get that instruction, in OUT as well.
    """
    dev = write_lines(tmp_path / "dev.jsonl", [
        {"query": "who", "task": task, "pos_index": [0]} for task in ("qa", "tool")])
    corpus = write_lines(tmp_path / "corpus.jsonl", [{"title": "", "text": "baker"}])
    data = write_lines(tmp_path / "train.jsonl", [
        {"query": "a", "pos": ["b"], "neg": ["c"], "task": task} for task in ("qa", "tool")])
    with pytest.raises(InputError, match="tasks qa, tool have different instructions for the doc"):
        train(tmp_path / "out", bert, "--train_data", data, "--eval_data", dev, "--corpus", corpus,
              "--metrics", "mrr", "--version", "llm-embedder", "--max_steps", 1)


def test_a_file_of_the_same_date_is_another_one(tmp_path):
    """MSS 2123: archives give all their files one date; FILE.lines of the old file is not read."""
    path = tmp_path / "corpus.csv"
    for text in ("old", "new"):
        path.write_text(f"id,title,text\n1,T,{text}\n")
        os.utime(path, (10 ** 9, 10 ** 9))
        assert Corpus(str(path), "{text}").text(0) == text
        made = os.stat(f"{path}.lines").st_mtime
        time.sleep(0.02)  # st_ctime goes on in ticks of the kernel's clock
    Corpus(str(path), "{text}")
    assert os.stat(f"{path}.lines").st_mtime == made == 10 ** 9


def test_titles_in_the_contents_of_wikipedia_are_no_text(tmp_path):
    """pyserini 369: answers are looked for in the text behind the title's line."""
    rows = [{"id": "1", "contents": '"Paris"\nThe capital\nof France'},
            {"id": "2", "contents": "Paris\nThe capital"},
            {"id": "3", "title": "T", "contents": '"Paris"\nThe capital'}]
    corpus = Corpus(write_lines(tmp_path / "c.jsonl", rows), "{contents}")
    assert corpus.passage(0) == {"id": "1", "title": "Paris", "text": "The capital\nof France"}
    assert corpus.passage(1) == {"id": "2", "title": "", "text": "Paris\nThe capital"}
    assert corpus.passage(2) == {"id": "3", "title": "T", "text": '"Paris"\nThe capital'}
    assert corpus.text(0) == '"Paris"\nThe capital\nof France'


def test_a_lone_hit_is_not_as_if_it_was_not_found():
    """neural-search 299: where a run has one hit, or equal scores, there is nothing to scale by."""
    assert scale_scores([12.0]) == [1.0] and scale_scores([2.0, 2.0]) == [1.0, 1.0]
    assert scale_scores([3.0, 2.0, 1.0]) == [1.0, 0.5, 0.0] and scale_scores([]) == []


@pytest.mark.parametrize("record, labels", [
    ({"pos_index": [0]}, {}), ({}, {0: 1}),
    ({"positive_ctxs": [{"text": "another form", "passage_id": 3.0}]}, {})])
def test_copies_of_positives_are_not_mined(record, labels, tmp_path):
    """FlagEmbedding 464, sentence-transformers 1346: nor are positives whose ids pandas (57232) has
    made floats.
    """
    texts = {"3": "the river in London", "4": "The river in  London", "5": "a river"}
    corpus = Corpus(write_lines(tmp_path / "c.jsonl", [
        {"id": name, "title": "", "text": text} for name, text in texts.items()]), "{title} {text}")
    question = make_question({"question": "river", **record}, "f:1", 0)
    hits = [(doc_index, corpus.text(doc_index)) for doc_index in range(3)]
    scores = [0, 0, 0]
    kept = keep_negatives(question, hits, scores, corpus, labels, "{text}", NO_LIMITS, False, False)
    assert kept == [(2, "a river")]
    assert make_question({"question": "river", "id": 7.0}, "f:1", 0).id == "7"
    floats = Corpus(write_lines(tmp_path / "f.jsonl", [{"id": 3.0, "text": "a"}]), "{text}")
    assert floats.ids([0]) == ["3"]
    with pytest.raises(InputError, match="f.jsonl:1: 'id' must be a text or an integer, got 3.5"):
        Corpus(write_lines(tmp_path / "f.jsonl", [{"id": 3.5, "text": "a"}]), "{text}")


def test_words_of_scripts_without_blanks():
    """llama_index 19761, langchain PR 19295: such a document is not one word."""
    for text in ("Who wrote “it”, e.g. in 1999?", "한국어 문장", "  a\u3000b\nc ", ""):
        assert cut_words(text) == [f" {word}" for word in text.split()]
    for text, count in (("巴黎是法国的首都，位于塞纳河畔。", 14), ("東京は iPhone 17の国", 7),
                        ("กรุงเทพมหานครเป็นเมือง", 4), ("หนึ่ง สอง", 2)):
        assert len(cut_words(text)) == count, cut_words(text)
        assert join_words(cut_words(text)) == text


def test_passages_of_scripts_without_blanks():
    sentence = "東京は日本の首都である。"
    cut = make_corpus.cut_passages([("", sentence * 5 + "\n" + sentence)], 25)
    assert cut == [sentence * 2] * 2 + [sentence + " " + sentence]
    long, = make_corpus.cut_passages([("Titel", "巴黎" * 30)], 61)
    assert long == "Titel " + "巴黎" * 30
    assert make_corpus.cut_passages([("", "巴黎" * 30)], 25) == ["巴黎" * 12 + "巴",
                                                               "黎" + "巴黎" * 12, "巴黎" * 5]


def test_quotes_of_a_tab_separated_table_are_letters(tmp_path):
    """filesql PR 286, pytext 747: unless all cells of a row are quoted as csv does."""
    rows = ['1\t"Hello" she said\t"The Wall" (song)', '2\t"a ""b"" c"\t5\'9" tall', "3\tplain\t"]
    (tmp_path / "c.tsv").write_text("id\ttext\ttitle\n" + "\n".join(rows) + "\n")
    corpus = Corpus(str(tmp_path / "c.tsv"), "{title} {text}")
    assert [(corpus.passage(i)["text"], corpus.passage(i)["title"]) for i in range(3)] == [
        ('"Hello" she said', '"The Wall" (song)'), ('a "b" c', '5\'9" tall'), ("plain", "")]


def test_scores_that_rise_are_distances(tmp_path):
    """langchain 2845: a vector store's `score` may be a distance, the best first; the reader and
    runs take the highest for the best.
    """
    def note(*rows):
        logged = []
        path = write_lines(tmp_path / "r.jsonl", [
            {"question": "q", "ctxs": [{"text": "t", "score": score} for score in scores]}
            for scores in rows])
        read_records(path, log=logged.append)
        return logged
    assert "the scores of every question rise" in note([0.1, 0.2, 0.3], [0.3, 0.4, 0.9], [1])[0]
    assert not note([0.1, 0.2, 0.3]) and not note([0.1, 0.2, 0.3], [3, 2, 1], [4, 5, 6])
    write_lines(tmp_path / "c.jsonl", [{"id": f"d{i}", "text": "t"} for i in range(3)])
    run, logged = tmp_path / "r.trec", []
    run.write_text("".join(f"{query} Q0 d{i} {i + 1} 0.{i} x\n" for query in (0, 1)
                           for i in range(3)))
    questions = [make_question({"question": "q"}, "f:1", index) for index in (0, 1)]
    read_run(run, questions, Corpus(str(tmp_path / "c.jsonl"), "{text}"), logged.append)
    assert len(logged) == 1 and "distances" in logged[0]


@pytest.mark.parametrize("text, answer, other", [
    ("巴黎是法国的首都，位于塞纳河畔。", "巴黎", "里昂"),
    ("東京は日本の首都である。", "日本の首都", "大阪"),
    ("กรุงเทพมหานครเป็นเมืองหลวง", "กรุงเทพมหานคร", "เชียงใหม่"), ("서울은 수도이다.", "서울", "서우"),
    ("Der iPhone手机 ist neu", "iPhone", "Phone")])
def test_answers_in_scripts_without_blanks(text, answer, other):
    """DrQA 29: a run of Chinese letters is a sentence and no word."""
    assert has_answer(text, [answer]) and not has_answer(text, [other])
    (start, end), = find_answers(text, [answer])
    assert text[start:end] == answer


def test_measures_of_answers_in_scripts_without_blanks():
    """xtreme 28, DRCD 6: F1 counts letters without full-width punctuation; EM stays FiD's."""
    assert f1("法国首都巴黎", ["首都巴黎"]) == pytest.approx(0.8) and f1("巴黎", ["里昂"]) == 0
    assert f1("「巴黎」。", ["巴黎"]) == 1
    assert exact_match("「巴黎」。", ["巴黎"]) == 0 and exact_match("巴黎!", ["巴黎"]) == 1
    assert exact_match("“Paris”", ["Paris"]) == 0  # as in SQuAD's script
    assert f1("é a1 b", ["b é"]) == pytest.approx(0.8)
