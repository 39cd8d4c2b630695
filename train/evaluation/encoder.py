"""Scores of an encoder on labelled data: zero-shot classification, retrieval in both directions, a linear probe.

What is measured follows from what there is: classes need labels, retrieval needs captions or sound, the probe needs a
training part.  In retrieval a found item is right if its own caption is that of the right item, to the letter: of two
photographs with one caption, either is a hit.

Legend: B samples, C classes, P templates, U distinct captions, V samples with sound, R rows of a gallery,
H those with a caption, Q queries, I items, E embedding width.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from tandem.train.evaluation import measures
from tandem.train.evaluation.embedding import Embedded
from tandem.train.evaluation.probe import probe

Texts = Callable[[Sequence[str]], torch.Tensor]  # their unit embeddings, [U, E]
TEMPLATES = ("{}", "a photo of {}", "a photo of a {}", "a picture of {}", "an image of {}", "a close-up of {}")
VISUAL, SPOKEN = 0, 1  # places in a sample's captions


def natural(label: str) -> list:
    """Sorts "9" before "10"."""
    parts = re.split(r"([0-9]+)", label)
    return [(place % 2, len(part.lstrip("0")) if place % 2 else 0, part) for place, part in enumerate(parts)]


def class_names(embedded: Embedded, given: dict[str, str] | None) -> dict[str, str]:
    """{label: what stands in the prompts}: as given, or the data's labels with blanks for underscores.

    Raises ValueError for a label of the data that is not among those given, and for two classes of one name.
    """
    labels = sorted({label for label in embedded.labels if label is not None}, key=natural)
    names = given or {label: label.replace("_", " ") for label in labels}
    if missing := [label for label in labels if label not in names]:
        raise ValueError(f"--classes lacks {len(missing)} of the data's labels, among them {missing[0]!r}")
    for name, times in Counter(names.values()).items():
        if times > 1:
            raise ValueError(f"{times} classes have the name {name!r}: give them different ones with --classes")
    return names


def zero_shot(
    embedded: Embedded, names: dict[str, str], templates: Sequence[str], texts: Texts, device: torch.device
) -> dict:
    """Scores of the samples that have a label."""
    prompts = [template.replace("{}", name) for name in names.values() for template in templates]
    class_CE = measures.class_embeddings(texts(prompts).unflatten(0, (len(names), len(templates))))
    rows, places = _labelled(embedded.image_BE, embedded.labels, list(names))
    scores = measures.zero_shot(rows.to(device), class_CE.to(device), places.to(device), list(names))
    return scores | {"templates": list(templates)}


def linear_probe(train: Embedded, held_out: Embedded, features: str, device: torch.device) -> dict:
    """Scores of the held-out samples that have a label.  Raises ValueError as `probe` does, or where there are none.

    features: "patches" for means of patch features, "pooled" for embeddings.
    """
    names = sorted({label for label in train.labels if label is not None}, key=natural)
    parts = []
    for name, part in (("training", train), ("held-out", held_out)):
        rows_BD = part.mean_BD if features == "patches" else part.image_BE
        feature_BD, label_B = _labelled(rows_BD, part.labels, names)
        if not len(label_B):
            raise ValueError(
                f"the {name} part of the linear probe has no labels: name folders of classes, or shards with a "
                '"label" in the json of their samples'
            )
        parts += [feature_BD.to(device), label_B.to(device)]
    feature_BD, label_B, held_out_BD, held_out_B = parts
    return probe(feature_BD, label_B, held_out_BD, held_out_B, names)


def retrieval(embedded: Embedded, texts: Texts, device: torch.device) -> dict[str, dict]:
    """R@k of images with their captions, of sound with its captions, and of images with sound, as far as there are.

    A caption is one text to find, and one to ask for, however many samples have it.  "same_label" has the same scores
    with every item right that has the query's label, where all have one.
    """
    sound_V, scores = embedded.sound_V, {}
    seen_B, said_B = (_captions(embedded, place) for place in (VISUAL, SPOKEN))
    assert embedded.image_BE is not None, "embedded where texts are read"
    galleries = [("image", embedded.image_BE, seen_B, embedded.labels)]
    if sound_V and embedded.sound_VE is not None:
        seen_V, said_V, label_V = (
            [column[sample] for sample in sound_V] for column in (seen_B, said_B, embedded.labels)
        )
        galleries.append(("audio", embedded.sound_VE, said_V, label_V))
        rows = (embedded.image_BE[sound_V].to(device), embedded.sound_VE.to(device))
        for name, (query_VE, item_VE), captions in (
            ("video_to_audio", rows, said_V),
            ("audio_to_video", rows[::-1], seen_V),
        ):
            # An item without a caption is right for its own sample alone.
            own_V = [caption or place for place, caption in enumerate(captions)]
            scores[name] = _recall(query_VE, item_VE, own_V, own_V, label_V, label_V)
    for kind, rows_RE, caption_R, label_R in galleries:
        here = [(row, caption) for row, caption in enumerate(caption_R) if caption is not None]
        if here:
            caption_H, label_H = [caption for _, caption in here], [label_R[row] for row, _ in here]
            text_U, label_U = list(dict.fromkeys(caption_H)), _label_of_each(caption_H, label_H)
            row_HE, text_UE = rows_RE[[row for row, _ in here]].to(device), texts(text_U).to(device)
            scores[f"{kind}_to_text"] = _recall(row_HE, text_UE, caption_H, text_U, label_H, label_U)
            scores[f"text_to_{kind}"] = _recall(text_UE, row_HE, text_U, caption_H, label_U, label_H)
    return scores


def _recall(query_QE, item_IE, query_key: list, item_key: list, query_label: list, item_label: list) -> dict:
    """R@k by keys, and by labels where all queries and items have one."""
    scores = measures.recall(query_QE, item_IE, *_numbers(query_key, item_key, query_QE.device))
    if None not in query_label and None not in item_label:
        by_label = measures.recall(query_QE, item_IE, *_numbers(query_label, item_label, query_QE.device))
        scores["same_label"] = {key: value for key, value in by_label.items() if key not in ("queries", "items")}
    return scores


def _numbers(query_key: list, item_key: list, device: torch.device) -> list[torch.Tensor]:
    """Keys as numbers from 0, equal where the keys are."""
    number = {key: place for place, key in enumerate(dict.fromkeys([*query_key, *item_key]))}
    return [torch.tensor([number[key] for key in keys], device=device) for keys in (query_key, item_key)]


def _label_of_each(captions: list[str], labels: list[str | None]) -> list[str | None]:
    """The label of every distinct caption, in order; None where its samples have none, or several."""
    found: dict[str, set] = {}
    for caption, label in zip(captions, labels, strict=True):
        found.setdefault(caption, set()).add(label)
    return [label if not mixed else None for label, *mixed in map(list, found.values())]


def _captions(embedded: Embedded, place: int) -> list[str | None]:
    return [said[place] if len(said) > place else None for said in embedded.captions]


def _labelled(
    rows_BE: torch.Tensor | None, labels: Sequence[str | None], names: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the samples with a label, place of the label in names or -1, int64)."""
    assert rows_BE is not None, "asked for of `embed`"
    labelled = [(sample, label) for sample, label in enumerate(labels) if label is not None]
    place = {name: number for number, name in enumerate(names)}
    places = torch.tensor([place.get(label, -1) for _, label in labelled], dtype=torch.int64)
    return rows_BE[[sample for sample, _ in labelled]], places
