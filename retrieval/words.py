"""Split texts into words for BM25, as bm25s does or by Unicode's character classes."""
import re
import unicodedata

import regex

from metrics import UNSPACED

RULES = ("auto", "bm25s", "unicode")
RULE_SAMPLE = 10_000  # documents, evenly spaced, that `auto` examines
THRESHOLD = 0.001     # `auto` chooses `unicode` if this share of their characters needs it

# bm25s's words: at least two letters, digits or underscores, but no combining marks
PLAIN_WORD = re.compile(r"(?u)\b\w\w+\b")
# replaces what is no part of a word by blanks; splitting a text of ASCII at them takes 0.4 of the
# time of PLAIN_WORD, with the same words
BLANKS = {code: " " for code in range(128) if not PLAIN_WORD.match(2 * chr(code))}
FIRST = rf"[[\p{{L}}\p{{N}}_]--[{UNSPACED}]]"       # first characters of words between spaces
OTHER = rf"[[\p{{L}}\p{{N}}\p{{M}}_]--[{UNSPACED}]]"
WORD = regex.compile(rf"(?P<run>[{UNSPACED}][{UNSPACED}\p{{M}}]*)|{FIRST}{OTHER}+",
                     regex.VERSION1)
GRAPHEME = regex.compile(r"\X")
# Characters that may be left out of a word: vowel points of Hebrew and Arabic, the tatweel
# (an Arabic letter stretcher), soft hyphens and joiners, and the dot that lower() leaves of "İ".
OPTIONAL = ("[\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0640\u064b-\u0652\u0670"
            "\u00ad\u200c\u200d\u2060\ufeff]|(?<=i)\u0307")
OPTIONAL_SIGN = re.compile(OPTIONAL)
WIDE = re.compile("[\uff01-\uffee]+")  # letters in full or half width
# the characters of a text in NFC that the two rules treat differently
SPECIAL = regex.compile(rf"[{UNSPACED}\p{{M}}\u0130\uff01-\uffee]|{OPTIONAL}")
ASCII = re.compile(r"[\x00-\x7f]+")


def split_words(text, rule, stopwords=()):
    """Return the words of a lower-case text, by a rule.

    bm25s     two or more letters, digits or underscores, as in bm25s
    unicode   as bm25s, and with combining marks. In scripts without spaces, the words are the
              pairs of adjacent letters of a run, or its single letter; a run that is a stop word is
              left out.

    The text is first normalised to NFC. For Latin, Greek and Cyrillic letters without combining
    marks in NFC, both rules give the same words.
    """
    if text.isascii():
        return [word for word in text.translate(BLANKS).split() if len(word) > 1]
    text = unicodedata.normalize("NFC", text)
    if rule == "bm25s":
        return PLAIN_WORD.findall(text)
    text = WIDE.sub(lambda match: unicodedata.normalize("NFKC", match[0]), text)
    words = []
    for match in WORD.finditer(OPTIONAL_SIGN.sub("", text)):
        if not match["run"]:
            words.append(match[0])
        elif match[0] not in stopwords:
            words += pair_letters(match[0])
    return words


def pair_letters(run):
    """Return the pairs of adjacent letters in a run, with their marks, or the run's only letter."""
    letters = GRAPHEME.findall(run)
    if len(letters) == 1:
        return letters
    return [first + second for first, second in zip(letters, letters[1:])]


def choose_rule(corpus):
    """Return (rule, share) for a corpus.

    `share` is the share of a sample's characters at which bm25s would split words wrongly. The rule
    is `unicode` if the share is at least THRESHOLD, else `bm25s`.
    """
    count, num_special, total = min(RULE_SAMPLE, len(corpus)), 0, 0
    for i in range(count):
        text = corpus.text(i * len(corpus) // count)
        total += len(text)
        if not text.isascii():
            letters = ASCII.sub("", unicodedata.normalize("NFC", text))
            num_special += len(SPECIAL.findall(letters))
    share = num_special / max(total, 1)
    return "unicode" if share >= THRESHOLD else "bm25s", share
