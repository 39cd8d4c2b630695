"""Small checkpoint folders for tests, written without engines; and folders of random Hugging Face models."""

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch

from tandem.train.checkpoints.checkpoint import TrainState, box_key, file_of
from tandem.train.checkpoints.saving import publish
from tandem.train.checkpoints.tensors import write_file
from tandem.train.families.folder import shapes
from tandem.train.families.tensors import Tensor

STATE = TrainState(
    step=3, data={"epoch": 1, "row": 7}, optimizer_steps={"llm": 3}, task="language", layout={"world": 2, "tp": 2}
)
WHOLE = torch.arange(24.0).view(4, 6)
HALVES = [[("w", "param", WHOLE, (slice(0, 2), slice(0, 6)))], [("w", "param", WHOLE, (slice(2, 4), slice(0, 6)))]]


def write(folder, pieces_of_rank, *, step=STATE.step, state=STATE):
    """Publishes `step-N` under `folder`; pieces_of_rank: for each rank (name, kind, whole tensor, slices of it)."""
    final = folder / f"step-{step:08d}"
    staging, reports = folder / f".{final.name}.partial", []
    staging.mkdir(parents=True)
    for rank, pieces in enumerate(pieces_of_rank):
        tensors, boxes = {}, []
        for name, kind, whole, where in pieces:
            corner, values = tuple(part.start for part in where), whole[where]
            tensors[box_key(name, kind, corner)] = values
            boxes.append((name, kind, tuple(whole.shape), corner, tuple(values.shape)))
        reports.append((boxes, write_file(staging / file_of(rank), tensors), {"llm": 3 * (rank == 0)}, None))
    publish(staging, final, dataclasses.replace(state, step=step), reports)
    return final


def flip(path, at):
    """Turns one bit of one byte."""
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


def saved_models(tmp_path_factory, models, change=lambda model: None):
    """of(kind) -> (folder, model): a random model of models[kind](), changed and saved when first asked for."""

    @functools.cache
    def of(kind):
        torch.manual_seed(0)
        folder, model = tmp_path_factory.mktemp("model"), models[kind]().eval()
        change(model)
        model.save_pretrained(folder)
        return folder, model

    return of


def write_qwen3_moe(folder, seed=0):
    """A tiny language model of random weights, as transformers writes it."""
    import transformers

    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
    config = transformers.Qwen3MoeConfig(**sizes, vocab_size=384, norm_topk_prob=True, initializer_range=0.1)
    transformers.AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)


def check_each_row_once(tensors: Sequence[Tensor]) -> set[str]:
    """Asserts that every row of ours comes from one of theirs and every row of theirs goes to one; names of theirs."""
    used = {theirs: np.zeros(shape[0], int) for theirs, shape in shapes(tensors).items()}
    for tensor in tensors:
        rows = np.zeros(tensor.shape[0], int)
        for run in tensor.runs:
            rows[run.ours : run.ours + run.rows] += 1
            used[run.theirs][run.begin : run.begin + run.rows] += 1
        assert (rows == 1).all(), tensor.name
    assert all((rows == 1).all() for rows in used.values())
    return set(used)
