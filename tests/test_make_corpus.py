"""scripts/make_corpus.py: titles, headings and sentences of each kind of file, and the lines about
skipped files.
"""
import json
import os
from types import SimpleNamespace

import pytest

from conftest import run
from records.corpus import Corpus
from scripts import make_corpus
from scripts.make_corpus import cut_passages, list_sentences, read_html, read_markdown
from utils import InputError


def make(folder, words=100, output=None):
    """Return the passages that main writes for a folder."""
    output = output or f"{folder}.jsonl"
    make_corpus.main(SimpleNamespace(folder=str(folder), words=words, output=output))
    with open(output) as file:
        return [json.loads(line) for line in file]


def sentences(text):
    return ["".join(words).strip() for words in list_sentences([("", text)])]


# ---------------------------------------------------------------- sentences and passages

@pytest.mark.parametrize("text, expected", [
    ("One two. Three?  Four!\nFive", ["One two.", "Three?", "Four!", "Five"]),
    ('He said "no." Then left.', ['He said "no."', "Then left."]),
    ("e.g. this, at 3.5 km. 12 more", ["e.g. this, at 3.5 km.", "12 more"]),
    ("a line\nand its rest\n \nnew paragraph", ["a line and its rest", "new paragraph"]),
    ("To do:\n- milk\n- tea\n2) bread", ["To do:", "- milk", "- tea", "2) bread"]),
    ("一。二！三", ["一。", "二！", "三"]),
    (" \n\n ", [])])
def test_sentences(text, expected):
    assert sentences(text) == expected


def test_passages_end_with_sentences_and_keep_words_whole():
    words = [f"word{i}" for i in range(100)]
    text = " ".join(f"{word}." if i % 7 == 6 else word for i, word in enumerate(words))
    text = text.replace(". w", ". W")
    passages = cut_passages([("", text)], 20)
    assert " ".join(passages) == text
    assert [len(passage.split()) for passage in passages] == [14] * 6 + [16]
    assert all(passage.endswith(".") for passage in passages[:-1])

    text = "Before. W" + " ".join(words)[1:] + ". After."
    long_sentence = cut_passages([("", text)], 30)
    assert [len(passage.split()) for passage in long_sentence] == [1, 30, 30, 30, 11]
    assert " ".join(long_sentence) == text
    assert cut_passages([("", "x" * 500)], 1) == ["x" * 500]


def test_a_heading_stays_with_the_sentence_behind_it():
    sections = [("", "One two three."), ("Chapter", ""), ("When is it open?", "At seven. Daily."),
                ("The end", "")]
    assert cut_passages(sections, 7) == ["One two three.", "Chapter When is it open? At seven.",
                                         "Daily. The end"]


# ---------------------------------------------------------------- kinds of files

def test_markdown(tmp_path):
    (tmp_path / "a.md").write_text("\ufeffIntro.\n\n# In C# #\nText\n## Second\nMore\n")
    assert read_markdown(tmp_path / "a.md") == (
        "In C#", [("", "Intro.\n\n"), ("In C#", "\nText\n"), ("Second", "\nMore\n")])
    (tmp_path / "a.md").write_text("Harbour\n=======\nText #1\n#tag")
    assert read_markdown(tmp_path / "a.md") == (
        "Harbour", [("", ""), ("Harbour", "\nText #1\n#tag")])


def test_front_matter_gives_the_title_and_no_text(tmp_path):
    (tmp_path / "a.md").write_text("---\ntags: [x]\ntitle: 'The harbour'\n---\n# Hours\nSeven.\n")
    assert read_markdown(tmp_path / "a.md") == ("The harbour", [("", ""), ("Hours", "\nSeven.\n")])
    (tmp_path / "a.md").write_text("---\ntags: [x]\n---\nSeven.\n\n---\nEight.\n")
    assert read_markdown(tmp_path / "a.md") == (None, [("", "Seven.\n\n---\nEight.\n")])


def test_comments_in_code_are_no_headings(tmp_path):
    (tmp_path / "a.md").write_text("Run it:\n```sh\n# install\nmake\n```\n# Title\nText\n")
    title, sections = read_markdown(tmp_path / "a.md")
    assert title == "Title" and len(sections) == 2
    assert "# install" in sections[0][1]


def test_a_page_that_is_cut_off_in_what_is_not_read(tmp_path):
    (tmp_path / "a.html").write_text("<p>Before <noscript>lost? <p>all of this")
    with pytest.raises(ValueError, match="nothing ends its <noscript>"):
        read_html(tmp_path / "a.html")


def test_html(tmp_path):
    page = """<!DOCTYPE html><html><head><title>The &amp;
        harbour</title><style>p {color: red}</style></head><body><nav>Home<svg><title>icon</title>
        </svg></nav><h1>Opening<svg><path></svg> <b>hours</b></h1><p>It opens at <i>se</i>ven.

        Daily<br>from Monday<p>Open paragraph<script>if (a < b) alert("no")</script>
        <ul><li>one<li>two</ul><h2/>&lt;end&gt;"""
    (tmp_path / "a.html").write_text(page)
    title, sections = read_html(tmp_path / "a.html")
    assert title.split() == ["The", "&", "harbour"]
    assert ["".join(words).strip() for words in list_sentences(sections)] == [
        "Home", "Opening hours It opens at seven.", "Daily from Monday", "Open paragraph", "one",
        "two", "<end>"]
    (tmp_path / "a.html").write_text("<p>Before</p><h2>Second</h2><h1> First </h1>")
    assert read_html(tmp_path / "a.html")[0].strip() == "First"


def test_pdf(tmp_path, monkeypatch, capsys):
    """Use a stand-in with pypdf's three names, because the tests do not require pypdf."""
    (tmp_path / "d").mkdir()
    for name in ("good.pdf", "bad.PDF"):
        (tmp_path / "d" / name).write_text("%PDF")
    (tmp_path / "d" / "a.txt").write_text("plain")
    monkeypatch.setattr(make_corpus.importlib.util, "find_spec", lambda name: None)
    assert [row["id"] for row in make(tmp_path / "d")] == ["a.txt#1"]
    said = capsys.readouterr().out
    assert said.count("note: 2 .pdf files are skipped; to read them: pip install pypdf") == 1

    class PdfReader:
        def __init__(self, path):
            if path.endswith("bad.PDF"):
                raise KeyError("/Root")
            self.pages = [SimpleNamespace(extract_text=lambda: "Page\ud800 one."),
                          SimpleNamespace(extract_text=lambda: "Page two.")]

    monkeypatch.setattr(make_corpus.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setitem(make_corpus.sys.modules, "pypdf", SimpleNamespace(PdfReader=PdfReader))
    rows = make(tmp_path / "d")
    assert rows[1] == {"id": "good.pdf#1", "title": "good", "text": "Page? one. Page two."}
    assert "'bad.PDF' is skipped: pypdf cannot read it: '/Root'" in capsys.readouterr().out


# ---------------------------------------------------------------- folders

def test_a_folder_becomes_a_corpus(tmp_path, capsys):
    folder = tmp_path / "notes"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    (folder / ".git" / "hidden.txt").write_text("hidden")
    (folder / "b.txt").write_text("First one here. Second one here.")
    (folder / "sub" / "a.MD").write_text("# Harbour\nIt opens at seven.")
    (folder / "empty.txt").write_text(" \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    (folder / "odd.html").write_text("<![odd[x")
    (folder / "gone.txt").symlink_to("nowhere")
    (folder / "link").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe.txt")
    with open(os.fsencode(folder) + b"/\xff.txt", "w") as file:
        file.write("text")
    rows = make(folder, words=3)
    assert rows == [{"id": "b.txt#1", "title": "b", "text": "First one here."},
                    {"id": "b.txt#2", "title": "b", "text": "Second one here."},
                    {"id": "sub/a.MD#1", "title": "Harbour", "text": "Harbour It opens"},
                    {"id": "sub/a.MD#2", "title": "Harbour", "text": "at seven."}]
    said = capsys.readouterr().out
    for line in ("note: 1 files of other kinds are skipped: 1 '.png'",
                 "'empty.txt' is skipped: no text in it",
                 "'latin.txt' is skipped: not UTF-8 (unexpected end of data at byte 4)",
                 "'odd.html' is skipped: not HTML", "'gone.txt' is skipped: no regular file",
                 "link' is skipped: a link to a folder", "'pipe.txt' is skipped: no regular file",
                 r"'\udcff.txt' is skipped: its name is not UTF-8",
                 "notes.jsonl: 4 passages of 2 files"):
        assert line in said
    corpus = Corpus(f"{folder}.jsonl", "{title} {text}")
    assert corpus.text(corpus.indices(["sub/a.MD#2"])[0]) == "Harbour at seven."


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        make(tmp_path / "nowhere")
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "a.txt").write_text(" ")
    with pytest.raises(InputError, match="no text in any of its 1 files"):
        make(folder)
    assert sorted(os.listdir(tmp_path)) == ["notes"]  # nothing half-written
    with pytest.raises(InputError, match="must end in .jsonl"):
        make(folder, output=str(folder / "a.txt"))
    with pytest.raises(InputError, match="--words must be >= 1, got 0"):
        make(folder, words=0)


def test_a_file_of_the_default_name_is_the_users(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("A text.")
    (tmp_path / "notes.jsonl").write_text("mine")
    _, errors = run("scripts/make_corpus.py", "notes/", code=1, cwd=tmp_path)
    assert errors == "error: notes.jsonl: exists already; --output notes.jsonl replaces it\n"
    assert (tmp_path / "notes.jsonl").read_text() == "mine"
