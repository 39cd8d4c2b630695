"""The language model's objective: cross-entropy of trained tokens, summed, and reported by data domain.

    loss = sum over trained tokens of -log p(token | tokens before)

The hybrid step divides the sum by the trained tokens of the global batch.

Legend: T tokens of a micro-batch on this rank, U visual rows, D LLM width.
"""

import torch

from tandem.parallel.engines.llm_engine import Leaf
from tandem.train.input.batch import MicroBatch


def train_forward(chunk, batch: MicroBatch, leaf: Leaf | None) -> torch.Tensor:
    """Per-token losses [1, T] on the last stage, hidden states before."""
    return chunk(
        tokens_1S=batch.tokens_1T,
        labels_1S=batch.labels_1T,
        row=batch.row,
        visual_UD=leaf.rows_UD if leaf else None,
        at_U=leaf.at_U if leaf else None,
    )


def train_loss(losses_1T: torch.Tensor, batch: MicroBatch, domains: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum over trained tokens, and the report: loss sum and trained tokens of every data domain, fp64 [2, domains]."""
    mask_1T = batch.loss_mask_1T
    assert mask_1T is not None and batch.domain_1T is not None, "the last stage has text"
    total = (losses_1T.float() * mask_1T).sum()
    with torch.no_grad():
        domain_1T = batch.domain_1T.long().clamp(min=0)
        report_2X = losses_1T.new_zeros(2, domains, dtype=torch.float64)
        trained_1T = mask_1T.to(torch.float64)
        report_2X[0].index_add_(0, domain_1T[0], losses_1T.detach()[0].to(torch.float64) * trained_1T[0])
        report_2X[1].index_add_(0, domain_1T[0], trained_1T[0])
    return total, report_2X
