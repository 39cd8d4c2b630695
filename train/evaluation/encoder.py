"""Scores of an encoder on labelled data: zero-shot classification, retrieval in both directions, a linear probe.

Classification needs labels, retrieval captions or audio, the probe a training split.  A retrieved item counts as
correct if its caption equals the query's: of two photographs with the same caption, either is a hit.

Legend: B samples, C classes, P templates, U distinct captions, V samples with audio, R rows of a gallery,
H rows with a caption, Q queries, I items, E embedding width.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from tandem.train.evaluation import measures
from tandem.train.evaluation.embedding import Embedded
from tandem.train.evaluation.probe import probe

Texts = Callable[[Sequence[str]], torch.Tensor]  # texts to unit embeddings [U, E]
TEMPLATES = ("{}", "a photo of {}", "a photo of a {}", "a picture of {}", "an image of {}", "a close-up of {}")
VISUAL, AUDIO = 0, 1  # index of a caption in a sample's captions


def natural_sort_key(label: str) -> list:
    """Sort key that puts "9" before "10"."""
    parts = re.split(r"([0-9]+)", label)
    return [(index % 2, len(part.lstrip("0")) if index % 2 else 0, part) for index, part in enumerate(parts)]


def class_names(embedded: Embedded, given: dict[str, str] | None) -> dict[str, str]:
    """Return {label: class name for the prompts}: as given, or the data's labels with underscores replaced by spaces.

    Raises ValueError for a label of the data without a given name, and for two classes with the same name.
    """
    labels = sorted({label for label in embedded.labels if label is not None}, key=natural_sort_key)
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
    """Return the zero-shot scores of the samples with a label."""
    prompts = [template.replace("{}", name) for name in names.values() for template in templates]
    class_CE = measures.class_embeddings(texts(prompts).unflatten(0, (len(names), len(templates))))
    rows, classes = _labelled(embedded.image_BE, embedded.labels, list(names))
    scores = measures.zero_shot(rows.to(device), class_CE.to(device), classes.to(device), list(names))
    return scores | {"templates": list(templates)}


def linear_probe(train: Embedded, held_out: Embedded, features: str, device: torch.device) -> dict:
    """Return the scores of the held-out samples with a label.  Raises ValueError as `probe` does, or without any label.

    features: "patches" for means of patch features, "pooled" for embeddings.
    """
    names = sorted({label for label in train.labels if label is not None}, key=natural_sort_key)
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
    """Return R@k of images and their captions, of audio and its captions, and of videos and audio, where they exist.

    Identical captions are merged into one text, as query and as candidate.  "same_label" counts any item with the
    query's label as correct; it is reported if all items and queries have labels.
    """
    audio_V, scores = embedded.audio_V, {}
    visual_caption_B, audio_caption_B = (_captions(embedded, index) for index in (VISUAL, AUDIO))
    assert embedded.image_BE is not None, "image embeddings were not computed"
    galleries = [("image", embedded.image_BE, visual_caption_B, embedded.labels)]
    if audio_V and embedded.audio_VE is not None:
        visual_caption_V, audio_caption_V, label_V = (
            [column[sample] for sample in audio_V] for column in (visual_caption_B, audio_caption_B, embedded.labels)
        )
        galleries.append(("audio", embedded.audio_VE, audio_caption_V, label_V))
        rows = (embedded.image_BE[audio_V].to(device), embedded.audio_VE.to(device))
        for name, (query_VE, item_VE), captions in (
            ("video_to_audio", rows, audio_caption_V),
            ("audio_to_video", rows[::-1], visual_caption_V),
        ):
            # An item without a caption is correct for its own sample only.
            key_V = [caption or index for index, caption in enumerate(captions)]
            scores[name] = _recall(query_VE, item_VE, key_V, key_V, label_V, label_V)
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
    """Return R@k by keys, and by labels if all queries and items have one."""
    scores = measures.recall(query_QE, item_IE, *_numbers(query_key, item_key, query_QE.device))
    if None not in query_label and None not in item_label:
        by_label = measures.recall(query_QE, item_IE, *_numbers(query_label, item_label, query_QE.device))
        scores["same_label"] = {key: value for key, value in by_label.items() if key not in ("queries", "items")}
    return scores


def _numbers(query_key: list, item_key: list, device: torch.device) -> list[torch.Tensor]:
    """Number the keys from 0; equal keys get equal numbers."""
    number = {key: index for index, key in enumerate(dict.fromkeys([*query_key, *item_key]))}
    return [torch.tensor([number[key] for key in keys], device=device) for keys in (query_key, item_key)]


def _label_of_each(captions: list[str], labels: list[str | None]) -> list[str | None]:
    """Return the label of each distinct caption, in order; None if its samples have none or several."""
    found: dict[str, set] = {}
    for caption, label in zip(captions, labels, strict=True):
        found.setdefault(caption, set()).add(label)
    return [label if not mixed else None for label, *mixed in map(list, found.values())]


def _captions(embedded: Embedded, index: int) -> list[str | None]:
    return [caption_tuple[index] if len(caption_tuple) > index else None for caption_tuple in embedded.captions]


def _labelled(
    rows_BE: torch.Tensor | None, labels: Sequence[str | None], names: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rows of the samples with a label, index of the label in names or -1, int64)."""
    assert rows_BE is not None, "image embeddings were not computed"
    labelled = [(sample, label) for sample, label in enumerate(labels) if label is not None]
    index_of = {name: index for index, name in enumerate(names)}
    indexes = torch.tensor([index_of.get(label, -1) for _, label in labelled], dtype=torch.int64)
    return rows_BE[[sample for sample, _ in labelled]], indexes
