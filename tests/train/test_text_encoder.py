"""The text encoder: texts apart, positions relative, the last token as embedding; and text towers of Hugging Face."""

import dataclasses
import itertools
import json
import socket

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tandem.train.models.encoders.text_encoder import PackedTexts, TextConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.pretrained.hf_text import build_text_encoder
from tests.train.folders import saved_models

CPU = torch.device("cpu")
CONFIG = TextConfig(width=32, depth=2, heads=4, vocab_size=50, max_tokens=9, rope_base=100.0)
LENGTHS = [3, 9, 9, 1, 5]
BORDERS = np.cumsum([0, *LENGTHS]).tolist()
WORDS, START, END, PAD = 60, 51, 52, 53


def texts_of(tokens_T, lengths=LENGTHS):
    return PackedTexts.of(tokens_T, np.array(lengths), CPU)


@pytest.fixture
def tokens_T():
    return np.random.default_rng(0).integers(0, 50, sum(LENGTHS))


@pytest.fixture(scope="module")
def ours():
    encoder = build_text_encoder(CONFIG)
    initialize(encoder, seed=0)
    return encoder


def embed(encoder, texts):
    with torch.no_grad():
        return encoder.pool(encoder(texts), texts)


# ---- ours ------------------------------------------------------------------------------------------------------------


def test_texts_do_not_see_each_other(ours, tokens_T):
    with torch.no_grad():
        before_TD = ours(texts_of(tokens_T))
        for first, last in itertools.pairwise(BORDERS):
            other_T = tokens_T.copy()
            other_T[first] = (other_T[first] + 1) % 50
            moved_T = (ours(texts_of(other_T)) != before_TD).any(1)
            assert moved_T[first:last].all(), "attention goes both ways, all over a text"
            assert not moved_T[:first].any() and not moved_T[last:].any()


def test_packing_is_one_text_at_a_time(ours, tokens_T):
    alone = [embed(ours, texts_of(part, [len(part)])) for part in np.split(tokens_T, BORDERS[1:-1])]
    together_BD = embed(ours, texts_of(tokens_T))
    assert together_BD.shape == (len(LENGTHS), ours.width)
    torch.testing.assert_close(together_BD, torch.cat(alone), rtol=0, atol=1e-6)


def test_the_embedding_is_the_feature_of_the_last_token(ours, tokens_T):
    texts = texts_of(tokens_T)
    with torch.no_grad():
        features_TD = ours(texts)
    assert torch.equal(ours.pool(features_TD, texts), features_TD[torch.tensor(BORDERS[1:]) - 1])


def test_only_relative_positions_matter_and_order_does(ours, tokens_T):
    texts = texts_of(tokens_T)
    moved = dataclasses.replace(texts, positions_T=texts.positions_T + 40)
    torch.testing.assert_close(embed(ours, moved), embed(ours, texts), rtol=0, atol=1e-5)
    turned = np.concatenate([part[::-1] for part in np.split(tokens_T, BORDERS[1:-1])])
    assert (embed(ours, texts_of(turned)) - embed(ours, texts))[1].abs().max() > 1e-2


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recomputation_changes_no_gradient(ours, tokens_T, recompute):
    gradients = []
    for mode in ("none", recompute):
        ours.zero_grad()
        ours(texts_of(tokens_T), mode).square().sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in ours.parameters()]))
    assert gradients[0].abs().sum() > 0 and torch.equal(*gradients)


def test_a_blank_is_one_text_of_one_token(ours):
    assert embed(ours, PackedTexts.blank(CPU)).shape == (1, CONFIG.width)


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match=r"model\.text\.width=30 over model\.text\.heads=4"):
        dataclasses.replace(CONFIG, width=30)
    with pytest.raises(ValueError, match=r"model\.text\.depth=0"):
        dataclasses.replace(CONFIG, depth=0)


# ---- Hugging Face ----------------------------------------------------------------------------------------------------

SIZES = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=12,
    vocab_size=WORDS,
    bos_token_id=START,
    eos_token_id=END,
    pad_token_id=PAD,
)


def clip():
    return transformers.CLIPTextConfig(**SIZES, projection_dim=20)


def siglip():
    return transformers.SiglipTextConfig(**SIZES, projection_size=20)


MODELS = {
    "CLIP with projection": lambda: transformers.CLIPTextModelWithProjection(clip()),
    "CLIP without": lambda: transformers.CLIPTextModel(clip()),
    "a whole CLIP": lambda: transformers.CLIPModel(
        transformers.CLIPConfig(text_config={**SIZES, "projection_dim": 512}, vision_config=VISION, projection_dim=20)
    ),
    "SigLIP": lambda: transformers.SiglipTextModel(siglip()),
    "a whole SigLIP": lambda: transformers.SiglipModel(
        transformers.SiglipConfig(text_config=siglip().to_dict(), vision_config=VISION)
    ),
}
VISION = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28, patch_size=14
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return saved_models(tmp_path_factory, MODELS)


def build(folder, **changes):
    return build_text_encoder(dataclasses.replace(CONFIG, folder=str(folder), **changes))


def embedded_by_transformers(kind, model, text):
    """One text as the model's own documentation has it; our last token is its end."""
    with torch.no_grad():
        if "SigLIP" in kind:
            ids = torch.tensor([[*text[:-1], END] + [PAD] * (SIZES["max_position_embeddings"] - len(text))])
            tower = model.text_model if kind.startswith("a whole") else model
            return tower(input_ids=ids).pooler_output
        ids = torch.tensor([[START, *text[:-1], END]])
        if kind == "a whole CLIP":
            return model.text_projection(model.text_model(input_ids=ids).pooler_output)
        out = model(input_ids=ids)
        return out.text_embeds if kind == "CLIP with projection" else out.pooler_output


@pytest.mark.parametrize("kind", MODELS)
def test_a_text_tower_embeds_as_transformers_does(kind, folders, tokens_T):
    folder, model = folders(kind)
    encoder, texts = build(folder), np.split(tokens_T, BORDERS[1:-1])
    initialize(encoder, seed=1)  # leaves loaded weights alone
    wanted_BD = torch.cat([embedded_by_transformers(kind, model, text.tolist()) for text in texts])
    assert encoder.width == wanted_BD.shape[1] == (32 if kind == "CLIP without" else 20)
    for recompute in ("none", "full"):
        packed = texts_of(tokens_T)
        torch.testing.assert_close(encoder.pool(encoder(packed, recompute), packed), wanted_BD, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["a whole CLIP", "SigLIP"])
def test_a_text_tower_learns_whole_and_keeps_texts_apart(kind, folders, tokens_T):
    encoder, texts = build(folders(kind)[0]), texts_of(tokens_T)
    before_BD = encoder.pool(encoder(texts), texts)
    before_BD.square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    other_T = tokens_T.copy()
    other_T[BORDERS[1]] = (other_T[BORDERS[1]] + 1) % 50
    assert (embed(encoder, texts_of(other_T)) != before_BD).any(1).tolist() == [False, True, False, False, False]


def test_start_and_end_come_from_the_tokenizer_where_there_is_one(tmp_path, folders):
    """The configurations of the first CLIP models have them wrong."""
    folders("CLIP without")[1].save_pretrained(tmp_path)
    vocab = {"a": 0, "<start>": 7, "<end>": 8}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(vocab), bos_token="<start>", eos_token="<end>"
    )
    tokenizer.save_pretrained(tmp_path)
    ids_BJ, _ = build(tmp_path)._padded(texts_of(np.array([3, 4, 0]), [3]))
    assert ids_BJ.tolist() == [[7, 3, 4, 8]]


def word_tokenizer(vocab):
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="a"))


def spoilt(folder, kind):
    """Does one kind of harm to a model's folder."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if kind == "pickle":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "damaged":
        weights.write_bytes(weights.read_bytes()[:100])
    elif kind == "no config":
        config.unlink()
    elif kind == "lacking":
        tensors = load_file(weights)
        save_file({name: tensor for name, tensor in tensors.items() if "final_layer_norm" not in name}, weights)
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **kind}))


@pytest.mark.parametrize(
    ("harm", "changes", "sentence"),
    [
        ("pickle", {}, "only as a pickle (pytorch_model.bin)"),
        ("no weights", {}, "has no model.safetensors"),
        ("damaged", {}, "model.safetensors cannot be read"),
        ("no config", {}, "has no config.json"),
        ("lacking", {}, "has no weights for 2 tensors"),
        ({"model_type": "bert"}, {}, "model_type='bert' in config.json: must be one of clip, clip_text_model, siglip"),
        ({"model_type": "dpt", "backbone": "facebook/dinov2-base"}, {}, "model_type='dpt' in config.json"),
        ({"text_config": {"backbone": "facebook/dinov2-base"}}, {}, "backbone in config.json can name what is not"),
        ({"hidden_size": "wide"}, {}, "config.json cannot be used by transformers"),
        ({"eos_token_id": 2000}, {}, "eos_token_id=2000 is none of its 60 tokens"),
        ({}, {"vocab_size": 61}, "has 60 tokens, fewer than model.text.vocab_size=61"),
        ({}, {"max_tokens": 12}, "has places for 11 tokens, fewer than model.text.max_tokens=12"),
    ],
    ids=str,
)
def test_folders_that_cannot_serve_are_refused(tmp_path, folders, monkeypatch, harm, changes, sentence):
    """And nobody looks for the network."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **more: asked.append(address) or [])
    folders("CLIP with projection")[1].save_pretrained(tmp_path)
    spoilt(tmp_path, harm)
    with pytest.raises(ValueError) as refused:
        build(tmp_path, **changes)
    assert str(refused.value).startswith(f"model.text.folder={tmp_path}: ") and sentence in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 and not asked


def test_a_missing_folder_and_a_missing_library_are_named(tmp_path, monkeypatch, folders):
    with pytest.raises(ValueError, match="there is no such folder"):
        build(tmp_path / "nowhere")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'tandem\[hf\]'"):
        build(folders("SigLIP")[0])
