"""reader/borders.py: prompts and answers have the tokens of the whole text, by any tokenizer."""
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from causal_helpers import SIZES
from reader.borders import add_start, chat_frame, encode_pairs, encode_prompts, start_tokens
from reader.causal import CausalReader, PromptCollator, Prompts
from reader.scorers import make_causal_texts
from utils import InputError

WORDS = ["Answer", "Question", "Paris", "aris", "one", "town", "who", "user", "assistant"]
# Llama-3's and Qwen's: punctuation takes the line ends after it, letters one character before them
LLAMA3 = (r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
GPT2 = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL = ["<end>", "<s>", "<|user|>", "<|assistant|>"]
CHAT = ("{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
TEMPLATES = [
    r"Question: {question} {text}\nAnswer:", r"Question: {question} {text}\nAnswer: ",
    r"{text} {question}\nAnswer:\n", r"{text} {question}\nAnswer:\n\n", "{text} {question}",
    r"{text} {question}\n", r"{text}\n\n{question}\n\n", r"{text} {question} Answer:  ",
    r"{question} (Answer) {text} \n"]
ANSWERS = ["Paris", "one town", "1990", "(Paris)", "巴黎", "Paris\nwho"]
RECORD = {"id": "r", "question": "who?", "ctxs": [{"title": None, "text": "one town."}]}


def byte_level(pattern, merges, trim_offsets):
    """Return a byte-level BPE tokenizer whose tokens are the bytes, WORDS and the joined `merges`.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: number for number, char in enumerate(alphabet)}
    rules = []
    for word in [" " + word for word in WORDS] + WORDS + merges:
        pieces = [piece for piece, _ in pre_tokenizers.ByteLevel(
            add_prefix_space=False, use_regex=False).pre_tokenize_str(word)]
        token = pieces[0]
        for end in range(2, len(token) + 1):
            if token[:end] not in vocabulary:
                vocabulary[token[:end]] = len(vocabulary)
                rules.append((token[:end - 1], token[end - 1]))
    model = Tokenizer(models.BPE(vocabulary, rules))
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    model.decoder = decoders.ByteLevel()
    model.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    return model


def sentence_pieces():
    """Return a tokenizer like Llama-2's: a dummy space before the text, spaces in tokens, line
    breaks as bytes.
    """
    pieces = ["<unk>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    pieces += list(dict.fromkeys([char for word in WORDS for char in word]
                                 + ["\N{LOWER ONE EIGHTH BLOCK}", ":", "?", ".", "(", ")"]))
    rules = []
    for word in ["\N{LOWER ONE EIGHTH BLOCK}" + word for word in WORDS] + WORDS:
        for end in range(2, len(word) + 1):
            if word[:end] not in pieces:
                pieces.append(word[:end])
                rules.append((word[:end - 1], word[end - 1]))
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    model = Tokenizer(models.BPE(vocabulary, rules, unk_token="<unk>", byte_fallback=True))
    model.normalizer = normalizers.Sequence([
        normalizers.Prepend("\N{LOWER ONE EIGHTH BLOCK}"),
        normalizers.Replace(" ", "\N{LOWER ONE EIGHTH BLOCK}")])
    model.decoder = decoders.Sequence([decoders.Replace("\N{LOWER ONE EIGHTH BLOCK}", " "),
                                       decoders.ByteFallback(), decoders.Fuse(),
                                       decoders.Strip(" ", 1, 0)])
    return model


def unigram():
    """Return a tokenizer like T5's: line breaks become spaces, and a space begins the next word."""
    letters = sorted({*"".join(WORDS), *":?.()"})
    pieces = [("<unk>", 0.0)] + [(char, -9.0) for char in letters]
    pieces += [("\N{LOWER ONE EIGHTH BLOCK}", -8.0)]
    pieces += [("\N{LOWER ONE EIGHTH BLOCK}" + word, -2.0) for word in WORDS]
    model = Tokenizer(models.Unigram(pieces, unk_id=0))
    model.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    return model


def word_pieces():
    words = ["[UNK]", *WORDS, *(f"##{word}" for word in WORDS), *":?.()"]
    words += [f"##{char}" for char in "abcdefghijklmnopqrstuvwxyz0123456789"] + list("0123456789")
    model = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)},
                                       unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    return model


KINDS = {
    "Llama-3": lambda: byte_level(LLAMA3, [":\n", ":\n\n", "\n\n", "?\n", "?\n\n"], True),
    "Llama-3, untrimmed": lambda: byte_level(LLAMA3, [":\n", ":\n\n", "\n\n", "?\n"], False),
    "GPT-2": lambda: byte_level(GPT2, ["\n\n"], False),
    "bytes": lambda: byte_level(GPT2, [], True),
    "Llama-2": sentence_pieces, "T5": unigram, "BERT": word_pieces}


def wrap(model, start=False):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, eos_token="<end>", bos_token="<s>",
                                        chat_template=CHAT)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    if start:
        bos = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
        own = tokenizer.backend_tokenizer.post_processor
        tokenizer.backend_tokenizer.post_processor = processors.Sequence(
            [*([own] if own else []), bos])
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return wrap(KINDS[request.param]())


def collate(tokenizer, template, answer, **changes):
    """Return (ids of the prompt, ids of the answer without </s>, text of the prompt)."""
    collator = PromptCollator(tokenizer, 1, 200, Prompts(template, **changes))
    ids, = collator.prompt_ids([RECORD])[0]
    return ids, collator.target_ids(answer)[:-1], collator.texts(RECORD)[0]


@pytest.mark.parametrize("template", TEMPLATES)
def test_prompt_and_answer_are_the_whole_text(tokenizer, template):  # E1
    for answer in ANSWERS:
        prompt, target, text = collate(tokenizer, template, answer)
        whole = tokenizer(text + answer, add_special_tokens=False)["input_ids"]
        assert prompt + target == whole, answer
        assert len(target) > 0
        assert tokenizer.decode(target).split() == tokenizer.decode(
            tokenizer(" " + answer, add_special_tokens=False)["input_ids"]).split()
        # scoring splits it in the same place
        texts, = make_causal_texts(tokenizer, [text], [answer], "here")
        assert texts[0] == (prompt, target)


def test_line_ends_stay_in_the_prompt():  # E1
    tokenizer = wrap(KINDS["Llama-3"]())
    prompt, target, _ = collate(tokenizer, TEMPLATES[2], "Paris")
    assert tokenizer.convert_ids_to_tokens(prompt)[-2:] == ["Answer", ":Ċ"]
    assert tokenizer.convert_ids_to_tokens(target) == ["Paris"]
    # alone the two line ends are one token of GPT-2, before a word they are two
    tokenizer = wrap(KINDS["GPT-2"]())
    assert tokenizer.tokenize("Answer:\n\n")[-1] == "ĊĊ"
    prompt, target, _ = collate(tokenizer, TEMPLATES[3], "Paris")
    assert tokenizer.convert_ids_to_tokens(prompt)[-3:] == [":", "Ċ", "Ċ"]


def test_a_token_over_the_border_goes_as_in_the_harness():  # E1
    """Check the split of TemplateLM._encode_pair: the tokens of the context alone, then the rest of
    the whole.
    """
    tokenizer = wrap(byte_level(LLAMA3, ["(P"], True))
    pair, = encode_pairs(tokenizer, ["Answer: ("], ["Paris"])
    whole = tokenizer("Answer: (Paris", add_special_tokens=False)["input_ids"]
    alone = tokenizer("Answer: (", add_special_tokens=False)["input_ids"]
    assert pair.prompt == alone and pair.answer == whole[len(alone):]
    assert pair.prompt == encode_prompts(tokenizer, ["Answer: ("])[0].prompt


def test_training_generation_and_scoring_agree(tmp_path):  # E1
    """Check that the loss of an answer is minus the log-likelihood that lm_score.py computes, on
    the tokens of the whole text.
    """
    tokenizer = wrap(KINDS["Llama-3"]())
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(LlamaConfig(
        **SIZES, vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=None)).eval()
    reader = CausalReader(lm, Prompts(TEMPLATES[2]))
    collator = reader.make_collator(tokenizer, 1, 200)
    batch = collator([(0, RECORD, "Paris")])
    with torch.no_grad():
        loss, _ = reader(**batch["inputs"], labels=batch["labels"], reduction="sum")
        text = collator.texts(RECORD)[0]
        ids = tokenizer(text + "Paris<end>", add_special_tokens=False)["input_ids"]
        log_p = lm(torch.tensor([ids])).logits[0].log_softmax(-1)
    assert tokenizer.convert_ids_to_tokens(ids)[-3:] == [":Ċ", "Paris", "<end>"]
    assert loss.item() == pytest.approx(-log_p[-3, ids[-2]].item() - log_p[-2, ids[-1]].item(),
                                        abs=1e-4)


@pytest.mark.parametrize("kind", ["Llama-3", "Llama-2"])
def test_one_start_token(kind):  # E14
    tokenizer = wrap(KINDS[kind](), start=True)
    bos = tokenizer.bos_token_id
    assert start_tokens(tokenizer) == [bos]
    for template in ("{text} {question}", "<s>{text} {question}", "<s> {text} {question}"):
        prompt, _, _ = collate(tokenizer, template, "Paris")
        assert prompt[0] == bos and prompt.count(bos) == 1
        text = template.format(text="one town.", question="who?") + " "
        (pair,), = make_causal_texts(tokenizer, [text], ["Paris"], "here")
        assert pair.prompt == prompt
    assert add_start([1, 2], [3]) == [1, 2, 3] and add_start([], [3]) == [3]


def test_the_chat_template_frames_the_prompt():  # E16
    tokenizer = wrap(KINDS["Llama-3"](), start=True)
    assert chat_frame(tokenizer) == ("<|user|>\n", "<end>\n<|assistant|>\n")
    prompt, target, text = collate(tokenizer, "{text}\\n{question}\\n", "Paris", chat_template=True)
    turns = [{"role": "user", "content": "one town.\nwho?"}]
    assert text == tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == tokenizer(text)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(target) == ["Paris"]
    # Llama-2's: the start token is the template's, a space stands before the answer
    tokenizer.chat_template = ("<s>{% for m in messages %}{% if m.role == 'user' %}[INST] "
                               "{{ m.content }} [/INST]{% else %} {{ m.content }} <end>{% endif %}"
                               "{% endfor %}")
    prompt, target, text = collate(tokenizer, "{text} {question}", "Paris", chat_template=True)
    assert text == "<s>[INST] one town. who? [/INST] "
    assert prompt.count(tokenizer.bos_token_id) == 1
    assert tokenizer.convert_ids_to_tokens(target) == ["ĠParis"]


def test_a_chat_template_that_cannot_be_is_one_line():  # E16
    tokenizer = wrap(KINDS["GPT-2"]())
    for template, message in ((None, "has no chat template"),
                              ("x", "must contain the user's turn exactly once"),
                              ("{{ raise_exception('no') }}", "fails")):
        tokenizer.chat_template = template
        with pytest.raises(InputError, match=message):
            chat_frame(tokenizer)
