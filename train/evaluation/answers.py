"""Does the model use its eyes: loss and exact match of the answers, with the right images and with exchanged ones.

Answers are scored under teacher forcing: every trained token must be the most likely one given the true text before it.
That is the same as greedy decoding giving the whole answer, because both fail at the first wrong token.

Legend: S samples of a step, T positions of a micro-batch.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tandem.data.dataset import Data
from tandem.data.planning.plan import StepPlan, row_samples
from tandem.parallel.comm.transfer import to_device
from tandem.parallel.hybrid_step import Engines, forward_only
from tandem.train.config.schema import Config
from tandem.train.input.batch import MicroBatch
from tandem.train.input.rows import replace_pixels, row_prefetcher
from tandem.train.objectives.language import train_forward


@dataclass
class Score:
    """Sums over samples with trained text."""

    samples: int = 0
    exact: int = 0
    loss: float = 0.0
    tokens: int = 0

    def numbers(self) -> dict:
        return {
            "samples": self.samples,
            "exact_match": self.exact / max(self.samples, 1),
            "loss": self.loss / max(self.tokens, 1),
        }


def answer_forward(chunk, batch: MicroBatch, leaf) -> torch.Tensor:
    """Logits of the whole vocabulary [1, T, vocabulary] on the last stage, hidden states before."""
    return train_forward(chunk, dataclasses.replace(batch, labels_1T=None), leaf)


def answer_report(logits_1TV: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """(0, [2, T]): the loss of every position, and whether its label is the most likely token."""
    assert batch.labels_1T is not None, "the last stage has labels"
    logits_TV, labels_T = logits_1TV[0].float(), batch.labels_1T[0]
    loss_T = F.cross_entropy(logits_TV, labels_T, reduction="none")
    return logits_TV.new_zeros(()), torch.stack([loss_T, (logits_TV.argmax(-1) == labels_T).float()])


def exchange_images(plan: StepPlan) -> StepPlan:
    """The plan that reads each image's pixels from another sample's image, of the same data domain where it can.

    Images of a domain are shifted by the most that one of its samples has, so that no sample keeps one of its own while
    it has at most half of the domain's images; sizes stay as planned.
    """
    source_I = np.arange(plan.tokens_I.size)
    domain_I = plan.domain_S[plan.image_sample_I]
    for domain in np.unique(domain_I):
        mine_J = np.flatnonzero(domain_I == domain)
        _, images_of_sample = np.unique(plan.image_sample_I[mine_J], return_counts=True)
        source_I[mine_J] = np.roll(mine_J, images_of_sample.max())
    return replace_pixels(plan, source_I)


def evaluate(config: Config, engines: Engines, data: Data, *, exchanged: bool) -> dict[str, dict]:
    """Scores of one pass over the shards, by domain and over all ("all"); needs cp = 1 (collective).

    What could not be scored is counted under "all": samples unreadable, and samples refused as longer than a row.
    """
    steps = _steps_of_an_epoch(data)
    substitute = exchange_images if exchanged else None
    scores = {name: Score() for name in data.stream.domains}
    seen: set[tuple[int, int]] = set()
    start, unreadable = data.stream.state(), set()
    for prepared in row_prefetcher(data, config, engines.grid, steps=steps, substitute=substitute):
        fresh_S = _first_seen(prepared.plan, seen)
        _add(scores, data.stream.domains, prepared.plan, fresh_S, *_score(engines, prepared))
        places = (prepared.plan.shard_S, prepared.plan.index_S)
        unreadable |= {tuple(int(place[failure.sample]) for place in places) for failure in prepared.skipped}
        prepared.release()
    every = sum(source.catalog.n_samples for source in data.stream.corpus.sources)
    left_out = {"unreadable": len(unreadable), "refused": every - data.stream.samples_per_epoch}
    data.stream.load_state(start)
    total = Score(*(sum(getattr(s, f.name) for s in scores.values()) for f in dataclasses.fields(Score)))
    by_domain = {name: score.numbers() for name, score in scores.items() if score.samples}
    return {**by_domain, "all": total.numbers() | left_out}


def _steps_of_an_epoch(data: Data) -> int:
    """Steps until every sample was in one: plans alone, so that all ranks stop at the same step."""
    start, wanted = data.stream.state(), data.stream.samples_per_epoch
    seen: set[tuple[int, int]] = set()
    steps = 0
    while len(seen) < wanted:
        _first_seen(data.stream.next_step(), seen)
        steps += 1
    data.stream.load_state(start)
    return steps


def _first_seen(plan: StepPlan, seen: set) -> np.ndarray:
    """Which samples of a step were in none before, nor earlier in this one, where an epoch ends inside it."""
    fresh = []
    for key in zip(plan.shard_S.tolist(), plan.index_S.tolist(), strict=True):
        fresh.append(key not in seen)
        seen.add(key)
    return np.array(fresh, dtype=bool)


def _score(engines: Engines, prepared) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Loss sum, trained tokens and wrong tokens of every sample of a step, equal on all ranks (collective)."""
    grid, plan = engines.grid, prepared.plan
    totals_3S = torch.zeros(3, plan.length_S.size, dtype=torch.float64)
    reports = forward_only(engines, to_device(prepared.batch, grid.device))
    if reports and grid.place.tp == 0:
        for report_2T, rows, text in zip(reports, prepared.rank_shard.rows_MB, prepared.text, strict=True):
            mask_T = torch.from_numpy(text.loss_mask.reshape(-1))
            owner = torch.from_numpy(row_samples(plan, rows).reshape(-1))[mask_T].long()
            loss, right = report_2T.cpu().double()[:, mask_T]
            for place, values in enumerate((loss, torch.ones_like(loss), 1 - right)):
                totals_3S[place].index_add_(0, owner, values)
    totals_3S = totals_3S.to(grid.device)
    dist.all_reduce(totals_3S)
    return tuple(totals_3S.cpu().numpy())


def _add(scores, domains, plan, fresh_S, loss_S, tokens_S, wrong_S) -> None:
    for sample in np.flatnonzero(fresh_S & (tokens_S > 0)):
        score = scores[domains[plan.domain_S[sample]]]
        score.samples += 1
        score.exact += int(wrong_S[sample] == 0)
        score.loss += float(loss_S[sample])
        score.tokens += int(tokens_S[sample])
