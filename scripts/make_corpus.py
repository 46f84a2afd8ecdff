#!/usr/bin/env python3
"""Make a corpus from a folder of documents: passages of at most --words words as JSON lines.

    python scripts/make_corpus.py notes                   # writes notes.jsonl
    python scripts/make_corpus.py notes --words 60 --output my/corpus.jsonl
    python retrieve.py --corpus my/corpus.jsonl ...

It reads .txt, .md, .html and, with the package pypdf, .pdf, in the folder and all folders below it;
names that begin with a dot are left out. A passage is {"id": "sub/file.txt#3", "title", "text"}. It
ends at the end of a sentence. Blanks separate words; in scripts without blanks each letter of
Chinese and Japanese counts as a word, or five letters of Thai and others. The title comes from
markdown's front matter, else from the first heading (in HTML <title> or <h1>), else from the file's
name. Headings stay in the text, with the sentence that follows them, and so does markdown's markup.
"""
import importlib.util
import json
import logging
import os
import re
import sys
from collections import Counter
from html.parser import HTMLParser

import regex

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from records.files import is_stream, new_file
from utils import InputError, Parser, check_at_least, run_script

# A word with the blank before it. In scripts without blanks between words, it is one letter of
# Chinese or Japanese, or up to five of Thai, Lao, Khmer and Burmese (lb=SA), with the punctuation
# that follows.
BY_LETTER = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\u30fc"
CUT_WORD = regex.compile(rf" ?(?:[{BY_LETTER}]\p{{M}}*[\p{{P}}\p{{S}}]*"
                         rf"|(?:\p{{lb=SA}}\p{{M}}*){{1,5}}[\p{{P}}\p{{S}}]*"
                         rf"|[^ {BY_LETTER}\p{{lb=SA}}]+)")

# Ends of sentences: after . ! ? and closing quotes unless a small letter follows ("e.g. this"),
# after the full stops of Chinese and Japanese, at blank lines, and before an item of a list.
SENTENCE_END = re.compile(r"""
    (?: (?<=[.!?…]) | (?<=[.!?…]["'”’»)\]]) ) \s+ (?![a-z\s])
    | (?<=[。！？])
    | \n\s*\n
    | \n (?= \s* (?: [-*+•] | \d+[.)] ) \s )
""", re.VERBOSE)
HEADING = re.compile(r"^ {0,3}#{1,6}[ \t]+(.+?)(?:[ \t]+#+)?[ \t]*$", re.MULTILINE)  # markdown's
FRONT_MATTER = re.compile(r"---\n(.*?\n)---\n", re.DOTALL)  # note programs' settings
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)  # blocks of code
UNDERLINED = re.compile(r"^(\S.*)\n=+[ \t]*$", re.MULTILINE)  # a heading's other form in markdown

HTML_HEADINGS = {"h1", "h2", "h3", "h4", "h5", "h6"}
HTML_UNREAD = {"script", "style", "template", "noscript", "svg"}
HTML_INLINE = {"a", "abbr", "b", "bdi", "bdo", "cite", "code", "data", "del", "dfn", "em", "font",
               "i", "img", "ins", "kbd", "mark", "q", "s", "samp", "small", "span", "strong", "sub",
               "sup", "time", "tt", "u", "var", "wbr"}


def parse_args():
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("folder", metavar="DIR", help="folder of documents")
    add("--words", type=int, default=100, help="most words of a passage")
    add("--output", metavar="FILE",
        help="where the passages go; default: DIR.jsonl, if there is no such file")
    return parser.parse_args()


# ---------------------------------------------------------------- files to sections

# A document is (title or None, [(heading or "", text)]): its sections.

def read_plain(path):
    """Return (None, sections) of a text file."""
    with open(path, encoding="utf-8-sig") as file:
        return None, [("", file.read())]


def read_markdown(path):
    """Return (title, sections) of a markdown file, with the title from its front matter or else its
    first heading.
    """
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    title = None
    front_matter = FRONT_MATTER.match(text)
    if front_matter:
        text = text[front_matter.end():]
        stated = re.search(r"^title:[ \t]*(.+)$", front_matter[1], re.MULTILINE)
        title = stated and stated[1].strip("\"' ")
    text = FENCED.sub(indent, text)  # a comment in code is not a heading
    text = UNDERLINED.sub(r"# \1", text)
    before, *parts = HEADING.split(text)  # text, heading, text, heading, text ...
    sections = [("", before), *zip(parts[::2], parts[1::2])]
    return title or next(iter(parts), None), sections


def indent(match):
    """Return code with its lines indented, so that none of them is read as a heading."""
    return match[0].replace("\n", "\n    ")


def read_html(path):
    """Return (title, sections) of a web page, with the title from <title> or the first <h1>."""
    parser = PageParser()
    with open(path, encoding="utf-8-sig") as file:
        text = file.read()
    try:
        parser.feed(text)
        parser.close()
    except AssertionError as error:  # raised by html.parser for an unknown declaration
        raise ValueError(f"not HTML: {error}") from None
    if parser.unread:
        raise ValueError(f"nothing ends its <{parser.unread[0]}>, which is not read")
    sections = [(heading, text) for _, heading, text in parser.sections]
    first_h1 = next((heading for tag, heading, _ in parser.sections if tag == "h1"), "")
    return parser.title.strip() or first_h1, sections


class PageParser(HTMLParser):
    """Collect a web page's title and sections, [tag of the heading, heading, text]."""

    def __init__(self):
        super().__init__()
        self.title = ""
        self.sections = [["", "", ""]]
        self.open_tag = ""  # title, or a heading, whose text is being read
        self.unread = []    # open tags whose text is skipped

    def handle_starttag(self, tag, attrs):
        if tag in HTML_UNREAD:
            self.unread.append(tag)
        elif tag == "br":
            self.add_text("\n")
        elif tag not in HTML_INLINE:
            self.start_block(tag)

    def handle_startendtag(self, tag, attrs):
        if tag not in HTML_UNREAD:  # <svg/> has no end tag
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        if tag in self.unread:
            self.unread.remove(tag)
        elif tag not in HTML_INLINE:
            self.start_block("")

    def handle_data(self, data):
        self.add_text(re.sub(r"\s+", " ", data))  # a blank line in HTML has no meaning

    def start_block(self, tag):
        """End the title, heading or sentence before a block element."""
        if self.unread:
            return
        self.open_tag = ""
        if tag == "title" and not self.title:
            self.open_tag = tag
        elif tag in HTML_HEADINGS:
            self.open_tag = tag
            self.sections.append([tag, "", ""])
        else:
            self.add_text("\n\n")

    def add_text(self, text):
        """Add text to the title, or to the last section's heading or text."""
        if self.unread:
            return
        if self.open_tag == "title":
            self.title += text
        elif self.open_tag:
            self.sections[-1][1] += text
        else:
            self.sections[-1][2] += text


def read_pdf(path):
    """Return (None, sections) of a PDF file. Raises ValueError if it is broken or locked."""
    import pypdf
    logging.getLogger("pypdf").setLevel(logging.ERROR)  # pypdf warns of each flaw that it repairs
    try:
        texts = [page.extract_text() for page in pypdf.PdfReader(path).pages]
    except Exception as error:  # pypdf raises errors of many kinds for broken and locked files
        raise ValueError(f"pypdf cannot read it: {error}") from None
    # a broken font may give halves of characters, which cannot be encoded
    text = "\n".join(texts).encode("utf-8", "replace").decode()
    return None, [("", text)]


READERS = {".txt": read_plain, ".md": read_markdown, ".html": read_html, ".htm": read_html,
           ".pdf": read_pdf}


# ---------------------------------------------------------------- sections to passages

def cut_passages(sections, max_words):
    """Return the passages of a document's sections: sentences, as many as fit into max_words."""
    passages, words = [], []
    for sentence in list_sentences(sections):
        if words and len(words) + len(sentence) > max_words:
            passages.append(join_words(words))
            words = []
        words += sentence
        last_start = (len(words) - 1) // max_words * max_words
        for start in range(0, last_start, max_words):  # a sentence that is longer than a passage
            passages.append(join_words(words[start:start + max_words]))
        words = words[last_start:]
    if words:
        passages.append(join_words(words))
    return passages


def list_sentences(sections):
    """Return the sentences of a document's sections, each a list of words as cut_words cuts them.

    A heading is the beginning of the sentence that follows it.
    """
    sentences, heading_words = [], []
    for heading, text in sections:
        heading_words += cut_words(heading)
        before = " "  # the character before a sentence
        for sentence in SENTENCE_END.split(text):
            is_joined = before in "。！？" and not sentence[:1].isspace()
            before = sentence[-1:] or " "
            words = cut_words(sentence, is_joined and not heading_words)
            if words:
                sentences.append(heading_words + words)
                heading_words = []
    if heading_words:  # no sentence follows the last heading
        sentences.append(heading_words)
    return sentences


def cut_words(text, is_joined=False):
    """Return the words of a text, each with the blank before it.

    Words are separated by blanks; in scripts without blanks, a few letters count as a word. If the
    text is_joined to an earlier one, its first word gets no blank.
    """
    words = CUT_WORD.findall(" ".join(text.split()))
    if words and not is_joined:
        words[0] = " " + words[0]
    return words


def join_words(words):
    """Join the words of cut_words to a text."""
    return "".join(words).strip()


# ---------------------------------------------------------------- a folder

def list_documents(folder):
    """Return the paths of all files in and below the folder, relative to it and sorted."""
    paths = []
    for directory, folders, names in os.walk(folder, onerror=note_folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            if os.path.islink(os.path.join(directory, name)):
                note_skipped(os.path.join(directory, name), "a link to a folder")
        for name in names:
            if not name.startswith("."):
                paths.append(os.path.relpath(os.path.join(directory, name), folder))
    return sorted(paths)


def choose_files(paths):
    """Return the paths that READERS can read; print how many others there are."""
    others = Counter(find_ending(path) for path in paths if find_ending(path) not in READERS)
    if others:
        kinds = ", ".join(f"{count} {ending!r}" for ending, count in others.most_common(8))
        print(f"note: {others.total()} files of other kinds are skipped: {kinds}")
    chosen = [path for path in paths if find_ending(path) in READERS]
    without_pdfs = [path for path in chosen if find_ending(path) != ".pdf"]
    num_pdfs = len(chosen) - len(without_pdfs)
    if num_pdfs == 0 or importlib.util.find_spec("pypdf"):
        return chosen
    print(f"note: {num_pdfs} .pdf files are skipped; to read them: pip install pypdf")
    return without_pdfs


def find_ending(path):
    """Return the ending of a file's name, such as .txt."""
    return os.path.splitext(path)[1].lower()


def read_passages(folder, path, max_words):
    """Return the passages [{id, title, text}] of a file.

    Raises OSError or ValueError if it cannot be read or holds no text.
    """
    path.encode()  # an id is UTF-8
    full_path = os.path.join(folder, path)
    if not os.path.isfile(full_path):  # reading a pipe could wait for ever
        raise ValueError("no regular file")
    title, sections = READERS[find_ending(path)](full_path)
    title = " ".join((title or "").split()) or os.path.splitext(os.path.basename(path))[0]
    passages = []
    for number, text in enumerate(cut_passages(sections, max_words), 1):
        passages.append({"id": f"{path}#{number}", "title": title, "text": text})
    if not passages:
        raise ValueError("no text in it")
    return passages


# ---------------------------------------------------------------- notes

def note_skipped(path, reason):
    print(f"note: {path!r} is skipped: {reason}")  # !r: a name may hold any bytes


def note_folder(error):
    note_skipped(error.filename, describe(error))


def describe(error):
    """Return the reason why a file is not read, in words for a user."""
    if isinstance(error, UnicodeEncodeError):
        return "its name is not UTF-8"
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 ({error.reason} at byte {error.start + 1}); save it as UTF-8"
    if isinstance(error, OSError):
        return f"cannot be read ({error.strerror})"
    return " ".join(str(error).split())[:200]


# ---------------------------------------------------------------- main

def choose_output(args):
    """Return the path of the corpus.

    Raises InputError for a name without the ending of JSON lines, and for an existing DIR.jsonl.
    """
    if args.output:
        is_corpus = args.output.endswith((".jsonl", ".jsonl.gz")) or is_stream(args.output)
        if not is_corpus:  # --output may name a document by mistake
            raise InputError(f"--output {args.output}: a corpus of JSON lines must end in .jsonl")
        return args.output
    output = os.path.relpath(os.path.abspath(args.folder) + ".jsonl")
    if os.path.exists(output):
        raise InputError(f"{output}: exists already; --output {output} replaces it")
    return output


def main(args):
    check_at_least(args, {"words": 1})
    if not os.path.isdir(args.folder):
        raise InputError(f"{args.folder}: no such folder; give the one that holds the documents")
    output = choose_output(args)
    paths = list_documents(args.folder)
    num_files, num_passages = 0, 0
    with new_file(output) as file:
        for path in choose_files(paths):
            try:
                passages = read_passages(args.folder, path, args.words)
            except (OSError, ValueError) as error:
                note_skipped(path, describe(error))
                continue
            for passage in passages:
                file.write(json.dumps(passage, ensure_ascii=False) + "\n")
            num_files += 1
            num_passages += len(passages)
        if not num_passages:
            raise InputError(f"{args.folder}: no text in any of its {len(paths)} files; give "
                             f"documents that end in {', '.join(READERS)}")
    print(f"{output}: {num_passages} passages of {num_files} files")


if __name__ == "__main__":
    run_script(main, parse_args())
