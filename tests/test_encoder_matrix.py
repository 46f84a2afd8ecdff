"""Vectors of our encoders against sentence-transformers' own, over folders of every kind: module
lists, poolings, similarities, prompts, lengths, dimensions and architectures.

Each folder has tiny random weights. Ours are opened as retrieve.py opens them.
"""
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

import train_dense
from conftest import make_bert
from dense.flags import parse_retriever_flags
from dense.model import BiEncoder, CrossEncoder
from records.corpus import open_corpus
from records.templates import named_version
from retrieval import dev_set as evaluation
from retrieval.flags import name_index, parse_retrieve_flags, read_dense_settings, settle_templates
from retrieval.search import SearchSettings, open_search_model, search
from retrieval_helpers import make_questions
from utils import InputError, World

ALONE = World(0, 0, 1, torch.device("cpu"))
TEXTS = ["who wrote it", "the cradle of a baker stood in the town", "it", "a letter " * 40]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return make_bert(tmp_path_factory.mktemp("bert") / "bert")


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def make_folder(folder, base, modules=(("Pooling", {"pooling_mode_mean_tokens": True}),),
                settings=None, texts=None, path=""):
    """Write a sentence-transformers folder around a transformers' one, by hand, as released folders
    of many versions are.

    modules: [(kind, its configuration)] behind the transformer; settings:
    config_sentence_transformers.json; texts: sentence_bert_config.json; path: of the transformer.
    """
    folder = Path(folder)
    shutil.copytree(base, folder / path)
    listed = [{"idx": 0, "name": "0", "path": path,
               "type": "sentence_transformers.models.Transformer"}]
    torch.manual_seed(1)
    for index, (kind, config) in enumerate(modules, 1):
        name = f"{index}_{kind}"
        write_json(folder / name / "config.json",
                   {"word_embedding_dimension": 32} | config if kind == "Pooling" else config)
        if kind == "Dense":
            layer = nn.Linear(config["in_features"], config["out_features"])
            save_file({f"linear.{key}": value for key, value in layer.state_dict().items()},
                      folder / name / "model.safetensors")
        if kind == "LayerNorm":
            save_file({"norm.weight": torch.rand(config["dimension"]),
                       "norm.bias": torch.rand(config["dimension"])},
                      folder / name / "model.safetensors")
        listed.append({"idx": index, "name": str(index), "path": name,
                       "type": f"sentence_transformers.models.{kind}"})
    write_json(folder / "modules.json", listed)
    if settings is not None:
        write_json(folder / "config_sentence_transformers.json", settings)
    if texts is not None:
        write_json(folder / path / "sentence_bert_config.json", texts)
    return folder


def open_ours(folder, *flags):
    """Return (model, collator) of a folder as retrieve.py opens it."""
    args = parse_retrieve_flags("", ["--query_encoder", str(folder), "--corpus", "x", *flags])
    templates = settle_templates(args, args.retrieval_method)
    return open_search_model(read_dense_settings(args, templates), None, ALONE)


def encode_ours(folder, *flags, texts=TEXTS):
    """Return (query vectors, document vectors) of the encoders themselves, before the metric."""
    model, collator = open_ours(folder, *flags)
    key_encoder = model.encoders.get("key", model.query_encoder)
    with torch.no_grad():
        return (model.query_encoder(collator.queries(texts, [""] * len(texts)), "query"),
                key_encoder(collator.keys(texts, [""] * len(texts)), "key"))


def open_theirs(folder):
    return SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})


def check_vectors(folder, texts=TEXTS):
    """Assert that a folder's vectors are those of sentence-transformers."""
    theirs = open_theirs(folder)
    for ours, encode in zip(encode_ours(folder, texts=texts),
                            (theirs.encode_query, theirs.encode_document)):
        np.testing.assert_allclose(ours.numpy(), encode(texts), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- modules

MEAN = ("Pooling", {"pooling_mode_mean_tokens": True})
TANH = ("Dense", {"in_features": 32, "out_features": 16, "bias": True,
                  "activation_function": "torch.nn.modules.activation.Tanh"})
LINEAR = ("Dense", {"in_features": 32, "out_features": 24,
                    "activation_function": "torch.nn.modules.linear.Identity"})
NORMALIZE = ("Normalize", {})
NORM = ("LayerNorm", {"dimension": 32})


@pytest.mark.parametrize("modules, settings", [
    ([MEAN, NORMALIZE], {"similarity_fn_name": "dot"}),          # A7
    ([MEAN, NORMALIZE], {"similarity_fn_name": "euclidean"}),
    ([MEAN], {"similarity_fn_name": "cosine"}),
    ([MEAN, NORMALIZE, LINEAR], {}),
    ([MEAN, NORMALIZE, LINEAR, NORMALIZE], {"truncate_dim": 7}),
    ([MEAN, NORM, LINEAR], {"similarity_fn_name": "dot", "truncate_dim": 100}),
    ([("Pooling", {"pooling_mode_cls_token": True}), TANH, NORMALIZE], None),  # LaBSE
    ([MEAN, TANH], {}),                                          # distiluse
    ([MEAN, ("Dropout", {"dropout": 0.5}), LINEAR], {}),
    ([("Pooling", {"pooling_mode": ["mean", "cls"]}),
      ("Dense", {"in_features": 64, "out_features": 8})], {}),   # the default activation is Tanh
])
def test_modules_and_similarities(modules, settings, bert, tmp_path):
    """A7, D: modules are computed in their order, whatever the similarity."""
    folder = make_folder(tmp_path / "st", bert, modules, settings)
    check_vectors(folder)
    model, _ = open_ours(folder)
    metrics = {"dot": "ip", "euclidean": "l2"}
    assert model.metric == metrics.get((settings or {}).get("similarity_fn_name"), "cos")


@pytest.mark.parametrize("pooling", [
    {"pooling_mode_max_tokens": True}, {"pooling_mode_weightedmean_tokens": True},
    {"pooling_mode_lasttoken": True}, {"pooling_mode_mean_sqrt_len_tokens": True},
    {"pooling_mode": "weightedmean"}, {"pooling_mode_cls_token": False},
    {"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True},
    {"pooling_mode": ["lasttoken", "max", "cls"]},
])
@pytest.mark.parametrize("skips", [False, True])
def test_poolings(pooling, skips, bert, tmp_path):
    """D, A5: each pooling, with the prompt and without it (include_prompt false)."""
    prompts = {"prompts": {"query": "who was this ", "document": "the town "}}
    folder = make_folder(tmp_path / "st", bert,
                         [("Pooling", pooling | {"include_prompt": not skips})], prompts)
    check_vectors(folder)


@pytest.mark.parametrize("settings", [
    {"prompts": {"query": "who was ", "document": "the town "}, "default_prompt_name": "query"},
    {"prompts": {"query": "who was "}, "default_prompt_name": "query"},
    {"prompts": {"document": "the town ", "x": "it "}, "default_prompt_name": "x"},
    {"prompts": {"query": "who was ", "passage": "the town "}},
    {"prompts": {"query": None, "document": ""}, "default_prompt_name": None},
])
def test_prompts(settings, bert, tmp_path):
    """A5"""
    check_vectors(make_folder(tmp_path / "st", bert, settings=settings))


def test_a_default_prompt_that_only_encode_uses_is_refused(bert, tmp_path):
    """A5: refused, because encode and encode_query differ; flags choose a prompt."""
    folder = make_folder(tmp_path / "st", bert, settings={"prompts": {"x": "who was "},
                                                          "default_prompt_name": "x"})
    with pytest.raises(InputError, match="default_prompt_name 'x'.*--query_prompt"):
        open_ours(folder)
    ours, keys = encode_ours(folder, "--query_prompt", "who was ", "--key_prompt", "")
    theirs = open_theirs(folder)
    np.testing.assert_allclose(ours, theirs.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(keys, theirs.encode_document(TEXTS), atol=1e-5)


# ---------------------------------------------------------------- texts

@pytest.mark.parametrize("texts, path", [
    ({"max_seq_length": 12, "do_lower_case": False}, ""),
    ({"max_seq_length": None}, ""), (None, ""),
    ({"max_seq_length": 50, "query_length": 5, "document_length": 9}, ""),
    ({"max_seq_length": 50, "processing_kwargs": {"text": {"max_length": 7}}}, ""),
    ({"max_seq_length": 9, "do_lower_case": True}, "0_Transformer"),
])
def test_lengths_and_layouts(texts, path, bert, tmp_path):
    """A6: the length of sentence_bert_config.json, else the tokenizer's; C: 0_Transformer."""
    check_vectors(make_folder(tmp_path / "st", bert, texts=texts, path=path))


def test_lower_case_and_the_side_of_truncation(bert, tmp_path):
    """A2's kind: the tokenizer's files count, as in sentence-transformers."""
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    path = base / "tokenizer.json"
    content = json.loads(path.read_text())
    content["normalizer"]["lowercase"] = False
    path.write_text(json.dumps(content))
    path = base / "tokenizer_config.json"
    sides = {"truncation_side": "left", "padding_side": "left", "do_lower_case": False}
    path.write_text(json.dumps(json.loads(path.read_text()) | sides))
    for lower_case in (False, True):
        folder = make_folder(tmp_path / str(lower_case), base,
                             texts={"max_seq_length": 8, "do_lower_case": lower_case})
        # of one length: sentence-transformers' vectors of padding on the left depend on the batch
        check_vectors(folder, ["Who Wrote the river and the town and the baker once more " * 2,
                               "WHO wrote it and the town and the river and the baker"])


def test_plain_folders(bert, tmp_path):
    """A10: the mean is the default pooling; a flag overrides it."""
    check_vectors(bert)
    open_theirs(bert).save_pretrained(str(tmp_path / "saved"))
    check_vectors(tmp_path / "saved")
    ours, _ = encode_ours(bert, "--pooling_method", "cls", "--truncate_dim", "5")
    theirs = open_theirs(bert)
    theirs[1].pooling_mode = "cls"
    np.testing.assert_allclose(ours, theirs.encode(TEXTS, truncate_dim=5), atol=1e-5)


# ---------------------------------------------------------------- architectures

SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
         "intermediate_size": 64, "max_position_embeddings": 70, "pad_token_id": 0,
         "initializer_range": 0.2}
ARCHITECTURES = {
    "bert": {"is_decoder": True}, "roberta": {}, "xlm-roberta": {}, "camembert": {}, "mpnet": {},
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64},
    "modernbert": {"global_attn_every_n_layers": 2}, "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16}, "deberta-v2": {"relative_attention": True,
                                                       "pos_att_type": ["p2c", "c2p"]},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 70},
    "qwen3": {"head_dim": 8, "num_key_value_heads": 2},
    "llama": {}, "t5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2},
    "mt5": {"d_model": 32, "d_kv": 8, "num_heads": 4, "d_ff": 64, "num_layers": 2},
    "bart": {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
             "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
             "decoder_start_token_id": 2, "bos_token_id": 2, "eos_token_id": 3},
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_architectures(kind, bert, tmp_path):
    sizes = dict(SIZES)
    if "d_model" in ARCHITECTURES[kind]:
        del sizes["num_hidden_layers"], sizes["hidden_size"]
    config = transformers.AutoConfig.for_model(kind, **sizes | ARCHITECTURES[kind])
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(bert).save_pretrained(tmp_path / "base")
    check_vectors(tmp_path / "base")


@pytest.mark.parametrize("ends", ["<|endoftext|>", "<|im_end|>", None])
def test_a_decoder_with_its_own_end_token(ends, bert, tmp_path):
    """A8: texts end as the tokenizer's own post-processor ends them (Qwen3-Embedding adds
    <|endoftext|>, which is not its eos), within the length.
    """
    backend = AutoTokenizer.from_pretrained(bert).backend_tokenizer
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    backend.post_processor = TemplateProcessing(
        single=f"$A {ends}" if ends else "$A",
        special_tokens=[(name, backend.token_to_id(name))
                        for name in ("<|endoftext|>", "<|im_end|>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>",
                                        pad_token="<|endoftext|>", padding_side="left")
    config = transformers.AutoConfig.for_model("qwen3", **SIZES | ARCHITECTURES["qwen3"])
    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    folder = make_folder(tmp_path / "st", tmp_path / "base",
                         [("Pooling", {"pooling_mode_lasttoken": True}), NORMALIZE],
                         {"prompts": {"query": "who wrote ", "document": ""},
                          "similarity_fn_name": "cosine"}, {"max_seq_length": 20})
    check_vectors(folder)


def test_stored_half_precision_is_computed_in_float32(bert, tmp_path):
    folder = make_folder(tmp_path / "st", bert)
    AutoModel.from_pretrained(bert, dtype=torch.bfloat16).save_pretrained(folder)
    model, _ = open_ours(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    check_vectors(folder)


# ---------------------------------------------------------------- what is refused

@pytest.mark.parametrize("change, message", [
    (("modules.json", [{"type": "sentence_transformers.models.Router", "path": ""}]),
     "has a 'Router' module"),
    (("modules.json", [{"type": "custom_st.Transformer", "path": ""}]), "custom_st.Transformer"),
    (("modules.json", [{"type": "sentence_transformers.models.Transformer", "path": ""}]),
     "one Pooling after it"),
    (("config_sentence_transformers.json", {"similarity_fn_name": "manhattan"}), "'manhattan'"),
    (("config_sentence_transformers.json", {"model_type": "SparseEncoder"}), "'SparseEncoder'"),
    (("config_sentence_transformers.json", {"truncate_dim": 0}), "truncate_dim must be >= 1"),
    (("config_sentence_transformers.json", {"prompts": {"query": 3}}), "an object of texts"),
    (("config_sentence_transformers.json", {"default_prompt_name": "x"}), "not among its prompts"),
    (("2_Dense/config.json", TANH[1] | {"activation_function": "my.Swish"}), "'my.Swish'"),
    (("2_Dense/config.json", TANH[1] | {"use_residual": True}), "use_residual"),
    (("2_Dense/config.json", TANH[1] | {"out_features": 4}), "do not match config.json"),
    (("2_Dense/config.json", TANH[1] | {"module_input_name": "token_embeddings"}), "input_name"),
    (("sentence_bert_config.json", {"query_expansion": {"length": 32}}), "query_expansion"),
    (("sentence_bert_config.json", {"modality_config": {"message": {}}}), "modality_config"),
    (("adapter_config.json", {"peft_type": "LORA"}), "holds an adapter"),
])
def test_folders_that_cannot_be_computed_are_refused(change, message, bert, tmp_path):
    """A7 and its kind: refused when opened, in one line that names the setting."""
    folder = make_folder(tmp_path / "st", bert, [MEAN, TANH])
    write_json(folder / change[0], change[1])
    with pytest.raises(InputError, match=message):
        open_ours(folder)


# ---------------------------------------------------------------- weights

def rename(folder, name):
    """Rename the weights of a folder by a function of their names; None leaves one out."""
    path = Path(folder) / "model.safetensors"
    weights = {name(key): value for key, value in load_file(path).items()}
    weights.pop(None, None)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("wrapper", ["module.", "0.auto_model.", "module.bert.", "model.encoder."])
def test_a_wrapper_s_prefix_is_left_out(wrapper, bert, tmp_path, capsys):
    """A11"""
    expected, _ = encode_ours(bert)
    shutil.copytree(bert, tmp_path / "wrapped")
    rename(tmp_path / "wrapped", lambda name: wrapper + name)
    assert torch.equal(encode_ours(tmp_path / "wrapped")[0], expected)
    assert f"the prefix {wrapper!r} of its weights' names is left out" in capsys.readouterr().out


def test_missing_weights_are_refused(bert, tmp_path, capsys):
    """A11: half of the layers, or a module's weights; an unused pooler may be missing."""
    half = tmp_path / "half"
    shutil.copytree(bert, half)
    rename(half, lambda name: None if "layer.1." in name or "pooler" in name else name)
    with pytest.raises(InputError, match="encoder.layer.1.attention.output.LayerNorm.bias is "
                       "missing"):
        open_ours(half)
    with pytest.raises(InputError, match="is missing in the file"):  # nor is it trained on
        BiEncoder.open(half)
    shutil.copytree(bert, tmp_path / "more")
    rename(tmp_path / "more", lambda name: name if "pooler" not in name else f"cls.{name}")
    assert torch.equal(encode_ours(tmp_path / "more")[0], encode_ours(bert)[0])
    assert "2 weights of the file are not used (first: cls.pooler.dense.bias)" in (
        capsys.readouterr().out)


# ---------------------------------------------------------------- DPR's encoders

@pytest.mark.parametrize("projection", [0, 16])
def test_dpr_encoders_as_on_the_hub(projection, bert, tmp_path):
    """B1: vectors are transformers' pooler_output; DPR compares them by inner products."""
    config = transformers.DPRConfig(**SIZES, projection_dim=projection)
    kinds = {"query": transformers.DPRQuestionEncoder, "key": transformers.DPRContextEncoder}
    theirs, tokenizer = {}, AutoTokenizer.from_pretrained(bert)
    for role, kind in kinds.items():
        torch.manual_seed(len(role))
        theirs[role] = kind(config).eval()
        theirs[role].save_pretrained(tmp_path / role)
        tokenizer.save_pretrained(tmp_path / role)
    shutil.copytree(tmp_path / "query", tmp_path / "question")  # a "query" folder would be a pair
    ours = encode_ours(tmp_path / "question", "--key_encoder", str(tmp_path / "key"))
    batch = tokenizer(TEXTS, padding=True, truncation=True, max_length=64, return_tensors="pt")
    for vectors, role in zip(ours, ("query", "key")):
        with torch.no_grad():
            expected = theirs[role](**batch).pooler_output
        torch.testing.assert_close(vectors, expected, atol=1e-5, rtol=1e-5)
    model, _ = open_ours(tmp_path / "question", "--key_encoder", str(tmp_path / "key"))
    assert model.metric == "ip"


# ---------------------------------------------------------------- empty texts

@pytest.mark.parametrize("pooling", ["mean", "lasttoken", "weightedmean"])
def test_an_empty_text(pooling, bert, tmp_path):
    """B3: zeros where the tokenizer gives no token, as in sentence-transformers, and never NaN."""
    base = tmp_path / "base"
    shutil.copytree(bert, base)
    path = base / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    (base / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "[PAD]"}))
    folder = make_folder(tmp_path / "st", base, [("Pooling", {"pooling_mode": pooling}), LINEAR])
    check_vectors(folder, ["who wrote it", "", " "])
    ours, _ = encode_ours(folder, "--pooling_method", "max", texts=["", "it"])
    assert ours.isfinite().all()


# ---------------------------------------------------------------- rankers

@pytest.mark.parametrize("settings", [
    {}, {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
    {"sbert_ce_default_activation_function": "torch.nn.modules.activation.Tanh"},
])
def test_rankers_score_as_cross_encoder_predict(settings, bert, tmp_path):
    from sentence_transformers import CrossEncoder as Theirs
    config = transformers.AutoConfig.from_pretrained(bert, num_labels=1, **settings)
    torch.manual_seed(3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(bert)
    tokenizer.model_max_length = 18
    tokenizer.save_pretrained(tmp_path)
    model, collator = open_ours(tmp_path, "--ranker", "--retrieval_method", "rank")
    with torch.no_grad():
        ours = model.predict(collator.pairs(TEXTS, TEXTS[::-1]))
    expected = Theirs(str(tmp_path), device="cpu").predict(list(zip(TEXTS, TEXTS[::-1])))
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_rankers_that_cannot_be_used(bert, tmp_path):
    """A11's kind: more than one score, lost weights, an encoder without a ranking head."""
    config = transformers.AutoConfig.from_pretrained(bert, num_labels=3)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "three")
    with pytest.raises(InputError, match="num_labels must be 1, one score per pair, got 3"):
        CrossEncoder.open(tmp_path / "three")
    with pytest.raises(InputError, match="is not a ranker, it has no classifier.bias"):
        CrossEncoder.open(bert, trained=True)
    config.num_labels = 1
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "half")
    rename(tmp_path / "half", lambda name: None if "layer.0" in name else name)
    with pytest.raises(InputError, match="bert.encoder.layer.0.*is missing"):
        CrossEncoder.open(tmp_path / "half")


# ---------------------------------------------------------------- the scripts

PROMPTED = {"prompts": {"query": "who was this ", "document": "the town "},
            "similarity_fn_name": "dot", "truncate_dim": 20}
RECORDS = [{"query": TEXTS[0], "pos": [TEXTS[1]], "neg": [TEXTS[2]]},
           {"query": TEXTS[2], "pos": [TEXTS[3]], "neg": [TEXTS[1]]}]


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def train(out, base, rows, *flags):
    """Train for one update, in this process; OUT is written."""
    records = write_lines(out.parent / f"{out.name}.train.jsonl", rows)
    given = ["--output_dir", str(out), "--query_encoder", str(base), "--train_data", records,
             "--max_steps", "1", "--lr", "1e-3", "--warmup_ratio", "0", *flags]
    args = parse_retriever_flags("", given)
    train_dense.main(args)


def test_scores_of_retrieve(bert, tmp_path, capsys):
    """A5, A6, A7, B3: scores of a whole search, its index, its notes."""
    folder = make_folder(tmp_path / "st", bert, [MEAN, NORMALIZE, LINEAR], PROMPTED,
                         {"max_seq_length": 11})
    documents = [*TEXTS, ""]
    corpus_path = write_lines(tmp_path / "corpus.jsonl", [
        {"_id": f"d{i}", "title": "", "text": text} for i, text in enumerate(documents)])
    arguments = ["--query_encoder", str(folder), "--corpus", corpus_path, "--hits", "5",
                 "--key_template", "{text}", "--dtype", "float32"]

    def search_ours(*flags):
        args = parse_retrieve_flags("", [*arguments, *flags])
        templates = settle_templates(args, "dense")
        corpus = open_corpus(args.corpus, templates["key_template"], ALONE)
        questions = make_questions(*[{"question": text} for text in TEXTS])
        settings = SearchSettings("dense", args.hits, index=name_index(args, "dense"),
                                  dense=read_dense_settings(args, templates))
        return search(settings, corpus, questions, ALONE)
    results = search_ours()
    theirs = open_theirs(folder)
    expected = theirs.similarity(theirs.encode_query(TEXTS), theirs.encode_document(documents))
    for row, indices, scores in zip(expected, results.indices, results.scores):
        np.testing.assert_allclose(scores, row[indices], atol=1e-5)
        assert np.all(np.diff(scores) <= 0)
    said = capsys.readouterr().out
    assert "pooling mean (1_Pooling/config.json), normalised by its modules, metric ip " in said
    assert "11 tokens per query (sentence_bert_config.json)" in said
    assert "prompts 'who was this ' and 'the town '" in said and "20 dimensions of 24" in said
    assert "1 documents have no text (first: 'd4')" in said
    # the index is of these files and of no others
    with pytest.raises(InputError, match="holds an index of another instruction"):
        search_ours("--key_prompt", "")
    with pytest.raises(InputError, match="holds an index of another truncate_dim"):
        search_ours("--truncate_dim", "5")
    for name in ("modules.json", "config_sentence_transformers.json"):
        content = (folder / name).read_text()
        (folder / name).write_text(content + " ")
        with pytest.raises(InputError, match="the corpus or the model has changed"):
            search_ours()
        (folder / name).write_text(content)


def test_training_keeps_what_the_folder_states(bert, tmp_path):
    """A5: prompts, modules, dimensions and similarity are trained with and written."""
    folder = make_folder(tmp_path / "st", bert, [MEAN, NORMALIZE, LINEAR], PROMPTED,
                         {"max_seq_length": 30, "do_lower_case": True})
    train(tmp_path / "out", folder, RECORDS)
    check_vectors(tmp_path / "out")
    theirs, before = open_theirs(tmp_path / "out"), open_theirs(folder)
    assert theirs.prompts == before.prompts and theirs.max_seq_length == 30
    assert (theirs.truncate_dim, theirs.similarity_fn_name) == (20, "dot")
    assert [type(module) for module in theirs] == [type(module) for module in before]
    assert not np.allclose(theirs.encode(TEXTS), before.encode(TEXTS), atol=1e-5)


def test_a_checkpoint_states_the_instructions_that_were_used(bert, tmp_path):
    """E2: no instruction is saved if no example names a task."""
    train(tmp_path / "without", bert, RECORDS)
    _, collator = open_ours(tmp_path / "without", "--task", "qa")
    assert collator.instruction("qa") == ("", "")
    assert open_theirs(tmp_path / "without").prompts == {"query": "", "document": ""}
    args = json.loads((tmp_path / "without" / "args.json").read_text())
    assert (args["instructions"], args["args"]["version"]) == ({}, "none")

    train(tmp_path / "with", bert, [row | {"task": "qa"} for row in RECORDS])
    _, collator = open_ours(tmp_path / "with")
    instruction = "Represent this sentence for searching relevant passages: "
    assert collator.instruction("") == collator.instruction("qa") == (instruction, "")
    assert open_theirs(tmp_path / "with").prompts["query"] == instruction
    check_vectors(tmp_path / "with")


def test_two_encoders_are_trained_further(bert, tmp_path):
    """A folder with two encoders needs no --key_encoder and refuses one."""
    train(tmp_path / "two", bert, RECORDS, "--tie_encoders", "false")
    train(tmp_path / "more", tmp_path / "two", RECORDS, "--tie_encoders", "false")
    assert (tmp_path / "more" / "key" / "modules.json").exists()
    with pytest.raises(InputError, match="already has a key encoder"):
        train(tmp_path / "x", tmp_path / "two", RECORDS, "--tie_encoders", "false", "--key_encoder",
              str(bert))


@pytest.mark.parametrize("fields, flags", [
    ({"task": "qa"}, ["--version", "e5"]), ({"prompt": "the town "}, []), ({}, [])])
def test_dev_sets_get_the_prompts_that_are_saved(fields, flags, bert, tmp_path):
    """A23, E2: qrels name no task, and are measured with the prompts that OUT then has."""
    qrels = write_lines(tmp_path / "qrels.jsonl", [
        {"query-id": f"q{i}", "corpus-id": f"d{i}", "score": 1} for i in range(len(TEXTS))])
    queries = write_lines(tmp_path / "queries.jsonl", [
        {"_id": f"q{i}", "text": text} for i, text in enumerate(TEXTS)])
    corpus = write_lines(tmp_path / "corpus.jsonl", [
        {"_id": f"d{i}", "title": "", "text": text[::-1]} for i, text in enumerate(TEXTS)])
    measured = []

    def measure(model, dev, collator, *rest):
        measured.append(collator)
        return evaluation.measure_retriever(model, dev, collator, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_dense, "measure_retriever", measure)
        train(tmp_path / "out", bert, [row | fields for row in RECORDS], *flags, "--eval_qrels",
              f"qrels={qrels}", "--queries", queries, "--corpus", corpus)
    _, collator = open_ours(tmp_path / "out", "--task", "qa")
    assert measured[0].instruction("") == collator.instruction("qa")
    assert any(collator.instruction("")) == bool(fields)


@pytest.mark.parametrize("name, version", [
    ("BAAI/bge-base-en", "bge"), ("BAAI/bge-small-en-v1.5", "bge"), ("/x/bge-large-en/", "bge"),
    ("BAAI/bge-base-zh-v1.5", "bge-zh"), ("BAAI/llm-embedder", "llm-embedder"),
    ("intfloat/e5-base-v2", "e5"), ("intfloat/multilingual-e5-small", "e5"),
    ("hub/models--intfloat--e5-large/snapshots/0be5", "e5"),
    ("intfloat/multilingual-e5-large-instruct", "none"), ("BAAI/bge-m3", "none"),
    ("intfloat/e5-mistral-7b-instruct", "none"), ("BAAI/bge-en-icl", "none"),
    ("BAAI/bge-reranker-base", "none"),
    ("BAAI/bge-multilingual-gemma2", "none"), ("BAAI/bge-code-v1", "none"),
    ("BAAI/bge-vl-base", "none"), ("my-bge-base", "none"), ("/x/e5/", "none"),
])
def test_instructions_are_for_known_models(name, version):
    """A9"""
    assert named_version(name) == version
