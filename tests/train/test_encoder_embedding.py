"""Samples and texts through towers: nothing depends on chunks, and texts are read as in training."""

import numpy as np
import pytest
import torch

from tandem.data.reading.captions import captions
from tandem.data.reading.labelled import LabelledSample, Patches
from tandem.data.vision import VisionSpec
from tandem.train.checkpoints.checkpoint import Reader
from tandem.train.evaluation.embedding import BareEncoder, Embedder, load_weights, pack
from tandem.train.models.encoders.text_encoder import PackedTexts, TextConfig
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.towers.omni import OmniConfig, OmniTower
from tests.train.folders import write

ENCODER = ViTConfig(width=32, depth=2, heads=2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tower(tokenizer):
    text = TextConfig(width=32, depth=1, heads=2, vocab_size=tokenizer.vocab_size, max_tokens=12)
    tower = OmniTower(ENCODER, text, OmniConfig(matching_weight=0, caption_weight=0), width=16)
    initialize(tower, 0)
    return tower


def patches(grids, rng):
    return Patches.of(
        [(rng.integers(0, 256, (down * across, 588), np.uint8), (down, across)) for down, across in grids]
    )


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    grids = [[(2, 2)], [(4, 2), (2, 6), (2, 2)], [(6, 4)], [(2, 2), (2, 2)]]
    sounds = [None, patches([(8, 2)], rng), None, patches([(8, 4)], rng)]
    return [
        LabelledSample(f"{place}", f"{place % 2}", (f"caption {place}",), patches(grid, rng), sound)
        for place, (grid, sound) in enumerate(zip(grids, sounds, strict=True))
    ]


@pytest.mark.parametrize("chunk", [1, 30, 10_000])
def test_chunks_change_nothing(tower, samples, tokenizer, chunk):
    """Against every image alone; a sample with more patches than a chunk is one of its own."""
    embedder = Embedder(tower, VisionSpec(), CPU, chunk, tokenizer, 12)
    seen = []
    out = embedder.embed(samples, embeddings=True, means=True, seen=lambda place, sample: seen.append((place, sample)))
    assert seen == list(enumerate(samples))
    assert (out.labels, out.captions) == (["0", "1", "0", "1"], [sample.captions for sample in samples])
    with torch.no_grad():
        for place, sample in enumerate(samples):
            sizes = np.cumsum([0, *sample.images.grid_hw_I2.prod(axis=1)])
            alone = [
                pack([Patches(sample.images.patches_NP[first:end], grid[None])], VisionSpec(), CPU)[0]
                for first, end, grid in zip(sizes, sizes[1:], sample.images.grid_hw_I2, strict=False)
            ]
            means = torch.stack([tower.encoder(images).mean(0) for images in alone]).mean(0)
            torch.testing.assert_close(out.mean_BD[place], means, rtol=1e-5, atol=1e-6)
            pooled = torch.cat([tower.pool(tower.encoder(images), images.segments) for images in alone]).mean(0)
            torch.testing.assert_close(out.image_BE[place], pooled / pooled.norm(), rtol=1e-5, atol=1e-6)
        heard = [tower.embed_audio(pack([samples[place].sound], VisionSpec(), CPU)[0]) for place in (1, 3)]
    assert out.audio_V == [1, 3]
    torch.testing.assert_close(out.audio_VE, torch.cat(heard), rtol=1e-5, atol=1e-6)


def test_only_what_is_asked_for_is_computed(tower, samples):
    bare = BareEncoder(ENCODER)
    bare.encoder.load_state_dict(tower.encoder.state_dict())
    means = Embedder(bare, VisionSpec(), CPU, 100).embed(samples, embeddings=False, means=True)
    assert means.image_BE is None and means.audio_VE is None and means.audio_V == []
    both = Embedder(tower, VisionSpec(), CPU, 100).embed(samples, embeddings=True, means=True)
    assert torch.equal(means.mean_BD, both.mean_BD)
    assert Embedder(tower, VisionSpec(), CPU, 100).embed(samples, embeddings=True, means=False).mean_BD is None


def test_texts_are_read_as_the_captions_of_training(tower, tokenizer):
    """The tokens of an assistant's turn, cut as training cuts them; chunks change nothing."""
    said = ["a cat", "a caption of more than twelve bytes", "<bbox>", "é"]
    encoded = [
        tokenizer.encode_sample([{"role": "assistant", "text": text}], ("assistant",), (), text) for text in said
    ]
    length = max(len(row.tokens_T) for row in encoded)
    rows = np.zeros((2, len(said), length), np.int32)
    for place, row in enumerate(encoded):
        rows[0, place, : len(row.tokens_T)], rows[1, place, : len(row.tokens_T)] = row.tokens_T, row.trained_T
    tokens_T, lengths = captions(rows[0], rows[1].astype(bool), 1, 12, tokenizer.eos_id)
    with torch.no_grad():
        wanted = tower.embed_texts(PackedTexts.of(tokens_T, lengths[:, 0], CPU))
    for chunk in (1, 15, 1000):
        embedder = Embedder(tower, VisionSpec(), CPU, chunk, tokenizer, 12)
        torch.testing.assert_close(embedder.texts(said), wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="the text '' has no token"):
        embedder.texts(["a cat", ""])
    with pytest.raises(ValueError, match="placeholder"):
        embedder.texts(["an <image>"])


def test_weights_are_those_of_the_kind_asked_for(tmp_path):
    """Frozen tensors have no running mean: they are as they are."""
    tower = BareEncoder(ViTConfig(width=8, depth=1, heads=1))
    whole = lambda tensor: tuple(slice(0, size) for size in tensor.shape)  # noqa: E731
    pieces = [(name, "param", value.detach() + 1, whole(value)) for name, value in tower.named_parameters()]
    plain = write(tmp_path / "plain", [pieces])
    frozen = "encoder.patch_embedding.bias"
    means = [(name, "ema", value + 1, where) for name, _, value, where in pieces if name != frozen]
    averaged = write(tmp_path / "averaged", [pieces + means])
    before = {name: value.detach().clone() for name, value in tower.named_parameters()}
    for path, kind, more in ((plain, "param", 1), (averaged, "param", 1), (averaged, "ema", 2)):
        load_weights(tower, Reader(path), kind)
        for name, value in tower.named_parameters():
            torch.testing.assert_close(value, before[name] + (1 if name == frozen else more))
    with pytest.raises(ValueError, match=r"has no ema of its weights: optim.ema was 0; give --weights param"):
        load_weights(tower, Reader(plain), "ema")
    with pytest.raises(ValueError, match=r"has no param of encoder\.blocks\.1\."):
        load_weights(BareEncoder(ViTConfig(width=8, depth=2, heads=1)), Reader(plain), "param")
