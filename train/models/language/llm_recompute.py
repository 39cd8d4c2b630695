"""What the LLM's layers keep for their backward, `train.recompute`.

    none       all
    selective  a layer's input, outputs of attention and of matmuls into another width than the layer's (queries, keys
               and values, gates of the experts); norms, activations, routing and its exchange are computed again
    offload    a layer's input, in host memory; the layer is computed again
    full       a layer's input; the layer is computed again

All ranks of a stage compute the same layers again in the same order, so collectives inside them meet.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils.checkpoint import checkpoint, noop_context_fn

from tandem.parallel.comm.context import PackedRow
from tandem.parallel.kernels.attention import saved_ops
from tandem.parallel.kernels.recompute import HostStore, kept_matmuls
from tandem.parallel.kernels.router import RouterPass

RECOMPUTE = ("none", "selective", "offload", "full")


@dataclass
class LLMTransformerConfig(TransformerConfig):
    """Megatron-core's settings, what a layer keeps, and switches of `LLMConfig` that Megatron-core does not know."""

    recompute: str = "none"
    qk_norm_whole: bool = False
    output_bias: bool = False
    window: int = 0
    window_from: int = 0
    expert_bias: bool = False
    expert_bias_visual: bool = False


class RecomputedLayer(TransformerLayer):
    """Megatron-core's layer under `config.recompute`, whose router counts each micro-batch once."""

    def forward(self, hidden_states, *args, packed_seq_params: PackedRow, **kwargs):
        routed = RouterPass(packed_seq_params.tokens)
        forward: Callable[..., Any] = functools.partial(
            self._routed, routed, packed_seq_params=packed_seq_params, **kwargs
        )
        if not torch.is_grad_enabled():
            return forward(hidden_states, *args)
        output = self._recomputed(forward, hidden_states, *args)
        if self.is_moe_layer:
            self.mlp.router.count(routed)
        return output

    def _recomputed(self, forward, hidden_states, *args):
        recompute, context_fn = self.config.recompute, noop_context_fn
        if recompute == "none":
            return forward(hidden_states, *args)
        if recompute == "selective":
            context_fn = kept_matmuls(self.config.hidden_size, saved_ops())
        more: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": context_fn}
        return checkpoint(forward, hidden_states, *args, **more)

    def _routed(self, routed: RouterPass, hidden_states, *args, **kwargs):
        if not self.is_moe_layer:
            return super().forward(hidden_states, *args, **kwargs)
        router = self.mlp.router
        router.pass_ = routed
        try:
            return super().forward(hidden_states, *args, **kwargs)
        finally:  # torch breaks off where all that was saved is there again
            router.pass_ = RouterPass(None)  # what it left lives no longer than the layer's graph


def offload(layers: TransformerBlock) -> None:
    """Sends what these layers save in a forward to host memory."""
    forward = layers.forward

    def stored(*args, **kwargs):
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        parameters = list(layers.parameters())
        with HostStore(parameters[0].device, parameters):
            return forward(*args, **kwargs)

    layers.forward = stored
