"""What the reference trainer starts from: initial weights and batches of a run, as plain tensors, made by a world of
one rank; and the weights and moments that a checkpoint holds."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from tandem.data.planning.plan import row_cu_seqlens, row_positions
from tandem.train.checkpoints.checkpoint import Reader, resolve
from tests.distributed.runs import build_run, whole_state
from tests.support import settings


def language_start(recipe: str, overrides: list[str], steps: int) -> tuple[dict, list[dict]]:
    """(initial weights by their names in a checkpoint, batches) of a run on one rank."""
    config, engines, data, prefetcher = build_run(recipe, overrides, steps)
    weights = {name: w for (name, kind), w in whole_state(engines.encoder).items() if kind == "param"}
    llm = {f"llm.{name}": w for (name, kind), w in whole_state(engines.llm).items() if kind == "param"}
    batches = []
    for prepared in prefetcher:
        batches.append(_language_batch(prepared, config.train.micro_batch_size, data.stream.domains, config.vision))
        prepared.release()
    data.reader.close()
    return weights | llm, batches


def _language_batch(prepared, rows_per_micro_batch: int, domains: list[str], vision) -> dict:
    plan = prepared.plan
    ids = np.concatenate(prepared.rank_shard.routes.chunks).astype(np.int64)
    images = {}
    if ids.size:
        keep_LI = prepared.rank_shard.keep_LI
        images = {
            "patches": torch.from_numpy(prepared.images.patches_NP.copy()),
            "positions": torch.from_numpy(vision.positions(plan.grid_hw_I2[ids])),
            "lengths": plan.grid_hw_I2[ids].prod(1).tolist(),
            "keep_LI": None if keep_LI is None else torch.from_numpy(keep_LI.copy()),
        }
    first_I = np.cumsum(plan.tokens_I[ids]) - plan.tokens_I[ids]  # row of the first visual token of each image
    rows = []
    for rows_b, text in zip(prepared.rank_shard.rows_MB, prepared.text, strict=True):
        at, taken = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for place, row in enumerate(rows_b):
            for i in np.flatnonzero(plan.row_I[ids] == row):
                within = np.arange(plan.tokens_I[ids[i]])
                at.append(place * plan.seq_length + plan.start_I[ids[i]] + within)
                taken.append(first_I[i] + within)
        rows.append(
            {
                "tokens": torch.from_numpy(text.tokens.reshape(-1)),
                "labels": torch.from_numpy(text.labels.reshape(-1)),
                "mask": torch.from_numpy(text.loss_mask.reshape(-1)),
                "domain": torch.from_numpy(text.domain.reshape(-1).astype(np.int64)),
                "positions": torch.from_numpy(np.concatenate([row_positions(plan, row) for row in rows_b])),
                "lengths": np.concatenate([np.diff(row_cu_seqlens(plan, row)) for row in rows_b]).tolist(),
                "at_V": torch.from_numpy(np.concatenate(at)),
                "rows_V": torch.from_numpy(np.concatenate(taken)),
            }
        )
    return {"images": images, "rows": rows, "domains": list(domains)}


def plain_settings(recipe: str, overrides: list[str]) -> SimpleNamespace:
    """The settings of a run as the reference takes them."""
    config = settings(recipe, *overrides)
    return SimpleNamespace(
        encoder=vars(config.model.encoder),
        merge=config.model.connector.merge,
        llm=SimpleNamespace(**vars(config.model.llm)),
        optim=SimpleNamespace(**vars(config.optim)),
        trainable=list(config.train.trainable),
        steps=config.train.steps,
    )


def saved(run_dir: Path) -> dict[tuple[str, str], torch.Tensor]:
    """Every tensor of the newest checkpoint of a run by (name, kind)."""
    reader = Reader(resolve(run_dir))
    return {(name, kind): reader.whole(name, kind) for name, facts in reader.tensors.items() for kind in facts["kinds"]}


def relative(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """L2 norm of the difference over that of the reference."""
    ours, reference = ours.double(), reference.detach().double()
    return float((ours - reference).norm() / reference.norm().clamp(min=1e-30))
