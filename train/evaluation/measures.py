"""What unit embeddings are worth: zero-shot classification and retrieval, as functions of matrices.

    zero-shot   the class whose text is nearest to the image                      (Radford et al. 2021, section 3.1)
    R@k         of all queries, the share with a right item among the k nearest   (Karpathy, Fei-Fei 2015, section 4.2)

Ties are lost: what is as near as the right answer, to within TIE, counts as nearer, so that equal embeddings everywhere
score nothing rather than everything.

Legend: B samples, C classes, P templates, Q queries, I items, E embedding width.
"""

import math

import torch
import torch.nn.functional as F

RECALL_AT = (1, 5)
CLASSES_FOR_TOP5 = 10
BLOCK = 1 << 24  # similarities held at once
TIE = 1e-6  # cosines of equal embeddings differ in their last bits, by where in the product they stand


def class_embeddings(text_CPE: torch.Tensor) -> torch.Tensor:
    """The mean over templates of normalised text embeddings, normalised again, [C, E]."""
    return F.normalize(F.normalize(text_CPE, dim=-1).mean(dim=1), dim=-1)


def ranks(query_QE: torch.Tensor, item_IE: torch.Tensor, query_key_Q: torch.Tensor, item_key_I: torch.Tensor):
    """How many wrong items are as near to each query as its nearest right one, to within TIE, or nearer, int64 [Q].

    An item is right where its key is the query's; a query without a right item has all items before it.  Raises
    ValueError where an embedding is not finite.
    """
    for embedding in (query_QE, item_IE):
        if bad := int((~embedding.isfinite().all(dim=-1)).sum()):
            raise ValueError(f"{bad} of {len(embedding)} embeddings are not finite: these weights cannot be scored")
    step, out = max(1, BLOCK // max(1, len(item_IE))), []
    for begin in range(0, len(query_QE), step):
        similarity_QI = query_QE[begin : begin + step] @ item_IE.T
        right_QI = query_key_Q[begin : begin + step, None] == item_key_I
        best_Q1 = similarity_QI.masked_fill(~right_QI, -math.inf).amax(dim=1, keepdim=True)
        out.append(((similarity_QI >= best_Q1 - TIE) & ~right_QI).sum(dim=1))
    return torch.cat(out)


def zero_shot(image_BE: torch.Tensor, class_CE: torch.Tensor, label_B: torch.Tensor, names: list[str]) -> dict:
    """Accuracy of the nearest class, and of the five nearest where there are ten classes; counts by class.

    label_B: int64, the right class of each sample; names: of the classes.
    """
    place_B = ranks(image_BE, class_CE, label_B, torch.arange(len(class_CE), device=label_B.device))
    top5 = {"top5": _share(place_B < 5)} if len(names) >= CLASSES_FOR_TOP5 else {}
    scores = {"samples": len(label_B), "classes": len(names), "top1": _share(place_B < 1), **top5}
    return scores | {"chance": 1 / len(names), "per_class": per_class(place_B < 1, label_B, names)}


def per_class(right_B: torch.Tensor, label_B: torch.Tensor, names: list[str]) -> dict[str, dict[str, int]]:
    """Samples and right answers of every class that has samples; a label of -1 is of no class."""
    known_B = label_B >= 0
    samples = torch.bincount(label_B[known_B], minlength=len(names)).tolist()
    right = torch.bincount(label_B[known_B & right_B], minlength=len(names)).tolist()
    return {name: {"samples": n, "right": k} for name, n, k in zip(names, samples, right, strict=True) if n}


def recall(query_QE: torch.Tensor, item_IE: torch.Tensor, query_key_Q: torch.Tensor, item_key_I: torch.Tensor) -> dict:
    """R@k for k in RECALL_AT of one query or more, and what items in a random order would score.

    Keys are int64 from 0; an item is right where its key is the query's.
    """
    place_Q = ranks(query_QE, item_IE, query_key_Q, item_key_I)
    keys = int(max(query_key_Q.max(), item_key_I.max())) + 1
    right, queries = torch.bincount(item_key_I, minlength=keys)[query_key_Q].unique(return_counts=True)
    scores: dict[str, float] = {"queries": len(query_QE), "items": len(item_IE)}
    for k in RECALL_AT:
        scores[f"r{k}"] = _share(place_Q < k)
        random = (chance(len(item_IE), n, k) * q for n, q in zip(right.tolist(), queries.tolist(), strict=True))
        scores[f"chance_r{k}"] = sum(random) / len(query_QE)
    return scores


def chance(items: int, right: int, k: int) -> float:
    """The chance that k of `items` drawn at random hold one of the `right`."""
    return 1 - math.comb(items - right, k) / math.comb(items, k) if k < items else float(right > 0)


def _share(hit_B: torch.Tensor) -> float:
    return float(hit_B.double().mean())
