"""Parse JSON values, one text or one long file at a time, with errors that name FILE:LINE."""
import codecs
import json
import re

from utils import InputError

# Matches every escape of a JSON text, from left to right. The group matches a lone surrogate, half
# of a character: no text file can hold it, and no tokenizer accepts it.
ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|(u[dD][89a-fA-F]..)|.)")
BLANKS = re.compile(r"[ \t\n\r]*")
DECODER = json.JSONDecoder()
CHUNK = 2 ** 22     # bytes that a stream reads at a time
LONGEST_TOKEN = 12  # at least the characters of \uXXXX and -Infinity, which a chunk may cut


def parse_json(text, path, line_number):
    """Return the object of a JSON text that begins at this line.

    Raises InputError, which names file, line and column, if the text is malformed, nested too
    deeply, or holds a number or an escape that cannot be used.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise name_json_error(error, text, path, line_number) from None
    check_escapes(text, path, line_number)
    return value


def name_json_error(error, text, path, line_number, column=1):
    """Return the InputError for the error of json in a text that begins at this line and column.
    """
    place = f"{path}:{line_number}: the JSON that begins here"
    if isinstance(error, RecursionError):
        return InputError(f"{place} is nested a thousand levels deep; fix it")
    if not isinstance(error, json.JSONDecodeError):  # Python's limit: 4,300 digits
        return InputError(f"{place} holds an integer of thousands of digits; fix it")
    line = line_number + error.lineno - 1
    if error.lineno == 1:
        column += error.colno - 1
    else:
        column = error.colno
    return InputError(f"{path}:{line}: not valid JSON at column {column} ({error.msg}); "
                      f"{choose_json_remedy(text, error)}")


def choose_json_remedy(text, error):
    """Return the remedy for a malformed JSON text, which is either truncated or wrong."""
    if is_cut_off(text, error):
        return "the file may be cut off there: download it again or correct the line"
    return ("correct the line: JSON needs double quotes around texts, and none around null, true "
            "and false")


def is_cut_off(text, error):
    """Return True if the error of json is at the end of a text, so that more text may follow."""
    return error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string")


def check_escapes(text, path, line_number):
    """Raise InputError if a JSON text escapes half of a character (a lone surrogate)."""
    if "\\ud" not in text and "\\uD" not in text:
        return  # as in most texts, which need no closer look
    for escape in ESCAPE.finditer(text):
        if escape[1]:
            line = line_number + text.count("\n", 0, escape.start())
            raise InputError(f"{path}:{line}: \\{escape[1]} is half of a character, a lone "
                             "surrogate; remove it, or write the whole character")


# ---------------------------------------------------------------- values of a long file

class JsonStream:
    """Read the values of a file one after another, and hold a few megabytes of it at a time."""

    def __init__(self, path, file, offset=0, line_number=1, beginning=b""):
        """Start at this byte and line of `path`.

        beginning: the bytes that come before the rest of `file`, an open binary file.
        """
        self.path, self.file = path, file
        self.offset, self.line_number, self.column = offset, line_number, 1  # of text[index]
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.index = self.decoder.decode(beginning), 0
        self.is_whole = False  # the text includes the end of the file

    def read_on(self):
        """Read more of the file: twice as much as is held, if a value is longer than a chunk."""
        content = self.file.read(max(CHUNK, len(self.text) - self.index))
        self.is_whole = not content
        self.text = self.text[self.index:] + self.decoder.decode(content, self.is_whole)
        self.index = 0

    def advance(self, end):
        """Move on to text[end], and return the text in between."""
        passed = self.text[self.index:end]
        self.offset += len(passed) if passed.isascii() else len(passed.encode())
        line_ends = passed.count("\n")
        self.line_number += line_ends
        self.column = len(passed) - passed.rfind("\n") if line_ends else self.column + len(passed)
        self.index = end
        return passed

    def peek(self):
        """Return the next character that is not a blank, "" at the end of the file."""
        while True:
            self.advance(BLANKS.match(self.text, self.index).end())
            if self.index < len(self.text) or self.is_whole:
                return self.text[self.index:self.index + 1]
            self.read_on()

    def take(self, expected):
        """Skip the next character that is not a blank if it is one of those that are expected, and
        return it. Raises InputError for another one.
        """
        character = self.peek()
        if not character or character not in expected:
            error = json.JSONDecodeError(f"Expecting '{expected[0]}' delimiter", self.text,
                                         self.index)
            raise self.refuse(error)
        self.advance(self.index + 1)
        return character

    def value(self):
        """Return (value, first byte, byte after it, its line) of the next value. Raises InputError.
        """
        self.peek()
        while True:
            try:
                value, end = DECODER.raw_decode(self.text, self.index)
            except (ValueError, RecursionError) as error:
                if self.is_whole or not self.may_continue(error):
                    raise self.refuse(error) from None
            else:
                if end < len(self.text) or self.is_whole:  # else a number may continue
                    break
            self.read_on()
        start, line_number = self.offset, self.line_number
        check_escapes(self.advance(end), self.path, line_number)
        return value, start, self.offset, line_number

    def may_continue(self, error):
        """Return True if an error of json may be due to a value that the text does not end."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        is_near_end = error.pos >= len(self.text) - LONGEST_TOKEN
        return is_near_end or error.msg.startswith("Unterminated string")

    def refuse(self, error):
        """Return the InputError for an error of json in the text that begins at text[index]."""
        rest = self.text[self.index:]
        if isinstance(error, json.JSONDecodeError):
            error = json.JSONDecodeError(error.msg, rest, error.pos - self.index)
        return name_json_error(error, rest, self.path, self.line_number, self.column)

    def items(self):
        """Yield what value() returns for each item of the list that comes next. Raises InputError,
        also if text follows the list.
        """
        self.take("[")
        if self.peek() == "]":
            self.advance(self.index + 1)
        else:
            delimiter = ","
            while delimiter == ",":
                yield self.value()
                delimiter = self.take(",]")
        if self.peek():
            raise self.refuse(json.JSONDecodeError("Extra data", self.text, self.index))
