"""Split the tokens of a text into prompt tokens and answer tokens.

Prompt and answer are tokenised as one text, because a token may span the border: ":" and a line end
are one token in Llama-3's tokenizer, a space and the word after it in most tokenizers.

    the text         Answer : \n P a r i s
    its tokens       [Answer] [:\n] [Paris]
    prompt, answer   [Answer] [:\n] | [Paris]

Line breaks at the end of the prompt belong to the prompt, spaces to the answer. If a token spans
the border, the split is that of lm-evaluation-harness (TemplateLM._encode_pair): if the prompt
without trailing whitespace has n tokens, the answer begins after the first n tokens of the text.
Training, generation and scoring share this module.
"""
from typing import NamedTuple

from utils import InputError, refusing

# placeholder for an answer that is not known yet; it does not change the prompt's tokens
STAND_IN = "a"
# placeholders for the turns of a conversation, from which the text around them is found
QUESTION_MARK, ANSWER_MARK = "qzx-question-qzx", "qzx-answer-qzx"


class Pair(NamedTuple):
    """Hold the token ids of a prompt and of its answer."""
    prompt: list
    answer: list
    offsets: list  # (start, end) of each prompt token in the text; None with a slow tokenizer


def encode_pairs(tokenizer, prompts, answers):
    """Return a Pair for each prompt with its answer, without special tokens."""
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    encoded = encode_with_offsets(tokenizer, texts)
    return [split_pair(tokenizer, prompt, ids, offsets)
            for prompt, ids, offsets in zip(prompts, *encoded)]


def encode_prompts(tokenizer, prompts):
    """Return a Pair for each prompt without a known answer; the Pair's `answer` has no meaning."""
    return encode_pairs(tokenizer, prompts, [STAND_IN] * len(prompts))


def encode_with_offsets(tokenizer, texts):
    """Return (rows of token ids, rows of offsets) of texts, without special tokens; with a slow
    tokenizer each row of offsets is None.
    """
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
            # some tokenizers turn a line end into a space, and spaces belong to the answer
            while count and not tokenizer.decode(ids[count - 1:count]).strip(" "):
                count -= 1
            return Pair(ids[:count], ids[count:], offsets[:count])
    (alone,), (alone_offsets,) = encode_with_offsets(tokenizer, [prompt.rstrip()])
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
    """Return the ids with the start tokens before them, unless they begin with these already."""
    return ids if ids[:len(start)] == start else start + ids


def chat_frame(tokenizer):
    """Return (before, after): the texts that the tokenizer's chat template puts before the user's
    turn, and between that turn and the assistant's answer.

    Raise InputError if there is no chat template, or if its text does not contain the turn once.
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
        raise InputError(f"--chat_template: the chat template of {name} must contain the "
                         "user's turn exactly once; leave the flag out")
    before, after = prompt.split(QUESTION_MARK)
    # whitespace that the template puts before an answer, such as Llama-2's space
    gap = whole.removeprefix(prompt).partition(ANSWER_MARK)[0]
    if whole.startswith(prompt) and gap.isspace():
        after += gap
    return before, after
