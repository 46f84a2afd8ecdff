"""Split the tokens of a text into those of its prompt and those of its answer.

Prompt and answer are tokenised as one text, because a tokenizer may join characters across words:
":" and a line end are one token of Llama-3's tokenizer, a space and the word after it of most.

    the text         Answer : \n P a r i s
    its tokens       [Answer] [:\n] [Paris]
    prompt, answer   [Answer] [:\n] | [Paris]

Line breaks at the end of the prompt belong to the prompt, spaces to the answer. If one token holds
characters of both, the split is that of lm-evaluation-harness (TemplateLM._encode_pair): whitespace
between the two belongs to the answer. If the prompt alone has n tokens, the answer begins after the
first n tokens of the whole text. Training, generation and scoring share this module.
"""
from typing import NamedTuple

from utils import InputError, refusing

# placeholder for an answer that is not known yet; it does not change the prompt's tokens
STAND_IN = "a"
# placeholders for the texts of a conversation while a chat template is read
QUESTION_MARK, ANSWER_MARK = "qzx-question-qzx", "qzx-answer-qzx"


class Pair(NamedTuple):
    """The token ids of a prompt and of its answer."""
    prompt: list
    answer: list
    offsets: list  # (start, end) in the text of each token of the prompt; None of slow tokenizers


def encode_pairs(tokenizer, prompts, answers):
    """Return a Pair for each prompt with its answer, without special tokens."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = encode(tokenizer, texts)
    return [split_pair(tokenizer, prompt, ids, offsets)
            for prompt, ids, offsets in zip(prompts, *encoded)]


def encode_prompts(tokenizer, prompts):
    """Return a Pair for each prompt whose answer is not known yet; its `answer` has no meaning."""
    return encode_pairs(tokenizer, prompts, [STAND_IN] * len(prompts))


def encode(tokenizer, texts):
    """Return (rows of token ids, rows of offsets or Nones) of texts without special tokens."""
    if not texts:
        return [], []
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False,
                        return_offsets_mapping=tokenizer.is_fast)
    return encoded["input_ids"], encoded.get("offset_mapping") or [None] * len(texts)


def split_pair(tokenizer, prompt, ids, offsets):
    """Return the Pair of a whole text's ids, which begins with the prompt."""
    border = len(prompt.rstrip(" "))
    if offsets is not None:
        count = next((n for n, (_, end) in enumerate(offsets) if end > border), len(ids))
        if count == len(ids) or offsets[count][0] >= border:
            # a line end that the tokenizer turns into a space is the answer's, like other spaces
            while count and not tokenizer.decode(ids[count - 1:count]).strip(" "):
                count -= 1
            return Pair(ids[:count], ids[count:], offsets[:count])
    (alone,), (alone_offsets,) = encode(tokenizer, [prompt.rstrip()])
    return Pair(alone, ids[len(alone):], alone_offsets)


def start_tokens(tokenizer):
    """Return the ids that the tokenizer puts before a text, such as [<s>]."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    for count in range(len(ids) - len(bare) + 1):
        if ids[count:count + len(bare)] == bare:
            return ids[:count]
    return []


def add_start(start, ids):
    """Return the ids with the start tokens before them, unless the text begins with these."""
    return ids if ids[:len(start)] == start else start + ids


def chat_frame(tokenizer):
    """Return (before, after): the text that the tokenizer's chat template puts before and after the
    user's turn, up to the place of the assistant's answer.

    Raise InputError without a chat template, and for one that does not show the turn as it is.
    """
    name = tokenizer.name_or_path
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(f"--chat_template: the tokenizer of {name} has no chat template; leave "
                         "the flag out, or give the folder of an instruction-tuned model")
    question = [{"role": "user", "content": QUESTION_MARK}]
    answer = [{"role": "assistant", "content": ANSWER_MARK}]
    with refusing(f"--chat_template: the chat template of {name} fails", "leave the flag out"):
        prompt = tokenizer.apply_chat_template(question, tokenize=False,
                                               add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(question + answer, tokenize=False)
    if prompt.count(QUESTION_MARK) != 1:
        raise InputError(f"--chat_template: the chat template of {name} does not show the user's "
                         "turn once; leave the flag out")
    before, after = prompt.split(QUESTION_MARK)
    # whitespace that an answer begins with in a conversation, such as Llama-2's space
    gap = whole.removeprefix(prompt).partition(ANSWER_MARK)[0]
    if whole.startswith(prompt) and gap.isspace():
        after += gap
    return before, after
