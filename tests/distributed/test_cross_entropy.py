"""Vocabulary-parallel cross-entropy on real ranks: VisualGPT's loss against Megatron-core's own, which gathers hidden
states, makes all logits and reduces them.  fp32, as its softmax is: sums in another order, 1e-6 of values near 1."""

import dataclasses

import pytest
import torch
from megatron.core.models.gpt.gpt_model import GPTModel

from tandem.parallel.engines import llm_shards
from tandem.parallel.grid import build_grid, destroy_grid
from tandem.parallel.layout import Layout
from tandem.train.models.language.llm import VisualGPT
from tandem.train.models.language.llm_spec import build_chunk, transformer_config
from tests.distributed.world import run_world
from tests.support import settings
from tests.train.toys import CPU

TOKENS = 24
OTHERS = dict.fromkeys(["input_ids", "position_ids", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"])


def losses_and_gradients(tp: int, sequence_parallel: bool):
    """By path, ours and Megatron-core's: (losses [S], gradient of all hidden states [S, D], of this rank's words)."""
    layout = Layout(world=tp, tp=tp)
    grid = build_grid(layout, CPU, seed=0)
    config = dataclasses.replace(settings("stage1").model.llm, layers=1, num_experts=0, ffn_width=32)
    megatron = transformer_config(config, layout, dtype=torch.float32, recompute="none", deterministic=False)
    chunk = build_chunk(config, megatron, vp_stage=None, first=False, last=True)
    llm_shards.initialize(chunk, 0, config.init_std, config.layers)
    layer = chunk.output_layer
    layer.sequence_parallel = megatron.sequence_parallel = sequence_parallel
    layer.allreduce_dgrad = tp > 1 and not sequence_parallel
    generator = torch.Generator().manual_seed(0)
    whole_S1D = torch.randn(TOKENS, 1, config.width, generator=generator)
    labels_1S = torch.randint(config.vocab_size, (1, TOKENS), generator=generator)
    grad_1S = torch.rand(1, TOKENS, generator=generator)
    mine_S1D = whole_S1D.chunk(tp)[grid.rank] if sequence_parallel else whole_S1D
    results = []
    for postprocess in (VisualGPT._postprocess, GPTModel._postprocess):
        leaf = mine_S1D.clone().requires_grad_()
        losses_1S = postprocess(chunk, hidden_states=leaf, labels=labels_1S, **OTHERS)
        results.append((losses_1S.detach(), *torch.autograd.grad(losses_1S, (leaf, layer.weight), grad_1S)))
    destroy_grid()
    return results


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_equals_all_logits_and_megatron_cores_cross_entropy(tp, sequence_parallel):
    ranks = run_world(losses_and_gradients, tp, tp, sequence_parallel, timeout=60)
    for ours, megatron in ranks:
        for mine, theirs in zip(ours, megatron, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=2e-6)
    assert all(torch.equal(ranks[0][0][0], ours[0]) for ours, _ in ranks), "losses differ between ranks"
