"""The omni-modal objective: a contrast for each pair of sides, whether a caption matches, and writing it.

    loss = mean over pairs of siglip(side a, side b)
         + matching_weight * sum of matching losses / samples  +  caption_weight * sum of caption losses / tokens

All samples and all caption tokens of the global batch count alike, whichever rank has them.  See
`train/models/towers/omni.py` for where this comes from; the contrast is that of the contrastive stage, around the ring
of ranks.

Legend: B samples of this rank, E embedding width.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from tandem.train.models.towers.omni import OmniConfig
from tandem.train.objectives.siglip import siglip_loss


def omni_loss(
    outputs: Sequence[torch.Tensor],
    config: OmniConfig,
    *,
    counts: Sequence[int],
    tokens: int,
    group: dist.ProcessGroup | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """This rank's share of the loss, (), and by name of each term, before its weight, its detached share.

    The sum over ranks is the loss; gradients are those of that sum.  All ranks call, with B = 0 where they have none.

    outputs: of `OmniTower`, those of [B] or [B, E] joined over the rank's chunks, scalars of any one of them.
    counts: B of every rank of the group.  tokens: of all captions of the global batch, <eos> included.
    group: None where there is one rank.  Terms: each pair by its name, "matching" and "caption" where they are on.

    Raises ValueError where outputs, counts and group do not fit.
    """
    sides, pairs = len(config.sides), len(config.pairs)
    embedded = dict(zip(config.sides, outputs, strict=False))
    scales, biases = outputs[sides : sides + pairs], outputs[sides + pairs : sides + 2 * pairs]
    losses = iter(outputs[sides + 2 * pairs :])
    terms: dict[str, torch.Tensor] = {}
    share: Any = 0.0
    for pair, scale, bias in zip(config.pairs, scales, biases, strict=True):
        a_BE, b_BE = (embedded[side] for side in pair.split(":"))
        terms[pair] = siglip_loss(a_BE, b_BE, scale, bias, counts=counts, group=group)
        share = share + terms[pair] / pairs
    weighted = (("matching", config.matching_weight, sum(counts)), ("caption", config.caption_weight, tokens))
    for name, weight, total in weighted:
        if weight > 0:
            terms[name] = next(losses).sum() / max(total, 1)
            share = share + weight * terms[name]
    return share, {name: term.detach() for name, term in terms.items()}
