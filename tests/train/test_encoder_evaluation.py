"""Measures of an encoder, against formulas spelt out here and against scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression

from tandem.train.evaluation import encoder, measures, probe
from tandem.train.evaluation.embedding import Embedded

CPU = torch.device("cpu")


def unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def recall_of_sorted(query, item, query_key, item_key, k):
    """R@k by sorting all items of every query."""
    hits = [
        np.isin(item_key[np.argsort(-(item @ row))[:k]], key).any() for row, key in zip(query, query_key, strict=True)
    ]
    return np.mean(hits)


# ---- retrieval ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1 << 24, 150], ids=["at once", "in blocks"])
def test_recall_is_that_of_sorted_items(monkeypatch, block):
    monkeypatch.setattr(measures, "BLOCK", block)
    query, item = unit(40, 3), unit(50, 3, seed=1)
    query_key, item_key = torch.arange(40) % 7, torch.arange(50) % 7
    scores = measures.recall(query, item, query_key, item_key)
    for k in (1, 5):
        wanted = recall_of_sorted(*(x.numpy() for x in (query, item, query_key, item_key)), k)
        assert scores[f"r{k}"] == pytest.approx(wanted)
    assert 0 < scores["r1"] < scores["r5"] < 1
    assert (scores["queries"], scores["items"]) == (40, 50)


def test_ties_are_lost_and_equal_keys_are_hits():
    same = torch.ones(6, 2)
    keys = torch.arange(6)
    assert measures.recall(same, same, keys, keys)["r5"] == 0
    assert measures.recall(same, same, keys * 0, keys * 0)["r1"] == 1
    assert measures.recall(unit(6, 4), unit(6, 4), keys, keys)["r1"] == 1


def test_ties_are_lost_at_any_size():
    """Cosines of equal embeddings differ in their last bits by the column that they stand in."""
    query_key, item_key = torch.arange(797) % 10, torch.arange(10)
    for seed in range(8):
        row_1E = unit(1, 64, seed=seed)
        scores = measures.recall(row_1E.repeat(797, 1), row_1E.repeat(10, 1), query_key, item_key)
        assert scores["r1"] == scores["r5"] == 0


def test_embeddings_that_are_not_finite_are_refused():
    spoilt = unit(6, 4)
    spoilt[2, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 6 embeddings are not finite"):
        measures.recall(unit(6, 4), spoilt, torch.arange(6), torch.arange(6))


@pytest.mark.parametrize(("items", "right", "k"), [(6, 1, 1), (6, 2, 5), (7, 3, 2), (4, 4, 5), (4, 0, 2)])
def test_chance_is_that_of_all_draws(items, right, k):
    draws = list(itertools.combinations(range(items), min(k, items)))
    wanted = sum(any(item < right for item in draw) for draw in draws) / len(draws)
    assert measures.chance(items, right, k) == pytest.approx(wanted)


def named(texts):
    """Embeddings of texts that depend on the text alone."""
    return torch.cat([unit(1, 16, seed=sum(map(ord, text))) for text in texts])


def test_a_hit_is_any_item_with_the_same_caption():
    """Two cats: each is right for the other's caption, and the caption is one text."""
    said = [("a cat",), ("a dog",), ("a cat",), ()]
    rows = named(["a cat", "a dog", "a dog", "a bird"])
    scores = encoder.retrieval(Embedded(["cat", "dog", "cat", None], said, rows), named, CPU)
    assert set(scores) == {"image_to_text", "text_to_image"}
    found = scores["image_to_text"]
    assert (found["queries"], found["items"], found["r1"], found["r5"]) == (3, 2, pytest.approx(2 / 3), 1)
    found = scores["text_to_image"]
    assert (found["queries"], found["items"]) == (2, 3)
    assert found["r1"] == 0.5, "a cat's caption finds a cat; the dog's is as near to the wrong cat, and ties are lost"
    assert found["chance_r1"] == pytest.approx((2 / 3 + 1 / 3) / 2)


def test_labels_count_where_every_item_has_one():
    said = [("a cat",), ("this is a cat",), ("a dog",)]
    rows = named(["this is a cat", "a cat", "a dog"])
    scores = encoder.retrieval(Embedded(["cat", "cat", "dog"], said, rows), named, CPU)["image_to_text"]
    assert scores["r1"] == pytest.approx(1 / 3) and scores["same_label"]["r1"] == 1
    scores = encoder.retrieval(Embedded(["cat", None, "dog"], said, rows), named, CPU)["image_to_text"]
    assert "same_label" not in scores
    mixed = encoder.retrieval(Embedded(["cat", "tom", "dog"], [("a cat",), ("a cat",), ("a dog",)], rows), named, CPU)
    assert "same_label" not in mixed["text_to_image"], "a caption of two labels has none"


def test_sound_is_found_by_the_captions_of_what_is_found():
    """Three videos, the second without sound; the others share the caption of the sound, not that of the frames."""
    said = [("left", "three"), ("up",), ("right", "three")]
    videos, sounds = unit(3, 16), unit(2, 16, seed=5)
    embedded = Embedded([None] * 3, said, videos, audio_VE=sounds, audio_V=[0, 2])
    scores = encoder.retrieval(embedded, named, CPU)
    directions = [f"{a}_to_{b}" for a, b in (("image", "text"), ("audio", "text"), ("video", "audio"))]
    assert set(scores) == {*directions, *("_to_".join(name.split("_to_")[::-1]) for name in directions)}
    assert scores["video_to_audio"]["r1"] == 1, "either sound is a three"
    right = (videos[[0, 2]] @ sounds.T).diagonal() > (videos[[2, 0]] @ sounds.T).diagonal()
    assert scores["audio_to_video"]["r1"] == right.double().mean()
    assert (scores["text_to_audio"]["queries"], scores["text_to_audio"]["items"]) == (1, 2)


# ---- zero-shot ------------------------------------------------------------------------------------------------------


def test_a_class_is_the_mean_of_its_normalised_templates():
    text_CPE = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    wanted = torch.stack([sum(row / row.norm() for row in rows) for rows in text_CPE])
    wanted = wanted / wanted.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(measures.class_embeddings(text_CPE), wanted)


def test_zero_shot_counts_by_class_and_leaves_out_what_has_no_label():
    names = {"3": "three", "4": "four", "10": "ten"}
    rows = named(["a three", "a four", "a four", "a ten"])
    embedded = Embedded(["3", "3", "4", None], [()] * 4, rows)
    scores = encoder.zero_shot(embedded, names, ["a {}"], named, CPU)
    assert (scores["samples"], scores["classes"], scores["top1"]) == (3, 3, pytest.approx(2 / 3))
    assert scores["per_class"] == {"3": {"samples": 2, "right": 1}, "4": {"samples": 1, "right": 1}}
    assert "top5" not in scores


def test_top5_from_ten_classes_on():
    classes, images = unit(10, 4), unit(30, 4, seed=1)
    label = torch.arange(30) % 10
    scores = measures.zero_shot(images, classes, label, [str(place) for place in range(10)])
    nearest = (images @ classes.T).argsort(dim=1, descending=True)
    assert scores["top1"] == pytest.approx(float((nearest[:, 0] == label).double().mean()))
    assert scores["top5"] == pytest.approx(float((nearest[:, :5] == label[:, None]).any(dim=1).double().mean()))


def test_names_of_classes():
    embedded = Embedded(["10", "9", None, "tabby_cat"], [()] * 4)
    assert list(encoder.class_names(embedded, None).items()) == [("9", "9"), ("10", "10"), ("tabby_cat", "tabby cat")]
    with pytest.raises(ValueError, match="--classes lacks 1 of the data's labels, among them 'tabby_cat'"):
        encoder.class_names(embedded, {"9": "nine", "10": "ten"})
    with pytest.raises(ValueError, match="2 classes have the name 'crane'"):
        encoder.class_names(Embedded(), {"bird": "crane", "machine": "crane"})


# ---- linear probe ---------------------------------------------------------------------------------------------------


def blobs(count, seed, spread=1.2, classes=4, width=6):
    """Features around a centre a class."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(7).normal(size=(classes, width))
    label = np.arange(count) % classes
    rows = 3 + (centres[label] + spread * rng.normal(size=(count, width))) * np.logspace(-2, 2, width)
    return torch.from_numpy(rows).float(), torch.from_numpy(label)


@pytest.mark.parametrize("l2", [1e-3, 1.0])
def test_a_fit_is_that_of_scikit_learn(l2):
    rows, label = blobs(120, 0)
    fitted = probe.fit(rows, label, 4, l2)
    standard = ((rows.double() - fitted.mean_D) / fitted.scale_D).numpy()
    assert np.allclose(standard.std(axis=0), 1) and np.allclose(standard.mean(axis=0), 0)
    peer = LogisticRegression(C=1 / (l2 * len(rows)), tol=1e-10, max_iter=10_000).fit(standard, label)
    ours, theirs = fitted.logits(rows).softmax(dim=1).numpy(), peer.predict_proba(standard)
    assert np.abs(ours - theirs).max() < 1e-5


def test_a_probe_scores_what_it_has_not_seen_and_repeats_itself():
    train, held_out = blobs(200, 0), blobs(400, 1)
    names = ["a", "b", "c", "d"]
    scores = probe.probe(*train, *held_out, names)
    assert scores == probe.probe(*train, *held_out, names)
    assert 0.5 < scores["accuracy"] < 1 and scores["l2"] in probe.GRID
    assert (scores["train_samples"], scores["samples"]) == (200, 400)
    rows, label = held_out
    unknown = probe.probe(*train, rows, torch.full_like(label, -1), names)
    assert unknown["accuracy"] == 0 and unknown["per_class"] == {}


def test_l2_is_chosen_on_a_fifth_of_every_class():
    label = torch.tensor([0] * 10 + [1] * 3 + [2])
    back = probe.held_back(label)
    assert [int(back[label == value].sum()) for value in range(3)] == [2, 1, 0]
    rows, label = blobs(60, 3, spread=4.0)
    back = probe.held_back(label)
    accuracy = {
        l2: (probe.fit(rows[~back], label[~back], 4, l2).logits(rows[back]).argmax(dim=1) == label[back])
        .double()
        .mean()
        for l2 in probe.GRID
    }
    best = max(accuracy.values())
    assert probe.choose_l2(rows, label, 4) == (max(l2 for l2 in probe.GRID if accuracy[l2] == best), best)


@pytest.mark.parametrize("label", [[0, 0, 0, 0], [0, 1, 2, 3]], ids=["one class", "one sample a class"])
def test_a_probe_needs_classes_with_samples(label):
    with pytest.raises(ValueError, match="two classes or more"):
        probe.probe(unit(4, 3), torch.tensor(label), unit(4, 3), torch.tensor(label), ["a", "b", "c", "d"])


def test_a_constant_feature_and_a_spoilt_one():
    rows, label = blobs(60, 0)
    rows[:, 2] = 7.0
    assert probe.probe(rows, label, rows, label, list("abcd"))["accuracy"] > 0.5
    rows[5, 1] = math.inf
    with pytest.raises(ValueError, match="features of the held-out part are not finite"):
        probe.probe(*blobs(60, 0), rows, label, list("abcd"))
