"""Model FLOPs of a step, for MFU: multiply-adds count two, recomputation counts nothing, causal attention half.

A trained module costs three forwards; a frozen one costs its forward, and where gradients pass through it once more for
its weights' products and twice more for its attention, which has no weights to save a product on.

Legend: n patches of an image or tokens of a text, d width of its blocks, D LLM width, pairs = query-key pairs that
attention looks at.
"""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tandem.data.vision import VisionSpec, transformer_flops
from tandem.train.models.encoders.text_encoder import TextConfig
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.layers.blocks import hidden_width
from tandem.train.models.towers.masked import MimConfig
from tandem.train.vision import vision_spec

if TYPE_CHECKING:  # the encoder's FLOPs are counted without Megatron-core
    from tandem.train.models.language.llm_config import LLMConfig

PEAK_TFLOPS = {  # by a part of the name, the first that fits: dense bf16, from the vendors' data sheets
    "GB200": 2500.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
}


def encoder_flops(config: ViTConfig, grid_hw_I2: np.ndarray) -> int:
    """Forward FLOPs of the encoder over images of these patches down and across."""
    return int(vision_spec(config).encoder_flops(grid_hw_I2).sum())


def mim_flops(
    vit: ViTConfig, mim: MimConfig, patches_I: np.ndarray, visible_I: np.ndarray, teacher_width: int
) -> tuple[int, int]:
    """Forward FLOPs of masked image modelling, (encoder, all else), the teacher's own not counted.

    patches_I: of each image; visible_I: those of them that are not masked.  A plain encoder's cost depends on numbers
    of patches alone.
    """
    of_encoder = [encoder_flops(vit, np.stack([n_I, np.ones_like(n_I)], -1)) for n_I in (patches_I, visible_I)]
    visible, masked = int(np.sum(visible_I)), int(np.sum(patches_I) - np.sum(visible_I))
    if mim.masked == "token":  # the trunk runs over all places, the embedding over visible patches
        unseen = 2 * masked * vision_spec(vit).patch_values * vit.width
        return of_encoder[0] - unseen, 2 * masked * vit.width * teacher_width
    mlp_width = hidden_width(mim.decoder_width, vit.mlp_ratio)
    decoder = int(transformer_flops(patches_I, mim.decoder_width, mim.decoder_depth, mlp_width).sum())
    head = 2 * mim.decoder_width * (visible * vit.width + masked * teacher_width)
    return of_encoder[1], decoder + head


def pool_flops(vit: ViTConfig, patches_I: np.ndarray, out_width: int) -> int:
    """Forward FLOPs of attention pooling: one learned query, keys and values of every patch, an MLP of ratio 4."""
    n, images, d = int(np.sum(patches_I)), len(patches_I), vit.width
    project = 0 if out_width == d else 2 * d * out_width
    return 2 * d * d + n * (4 * d * d + 4 * d) + images * (18 * d * d + project)


def text_flops(config: TextConfig, lengths_N: np.ndarray) -> np.ndarray:
    """Forward FLOPs of our text encoder for each text of these tokens, without a projection, int64 [N]."""
    return transformer_flops(lengths_N, config.width, config.depth, hidden_width(config.width, config.mlp_ratio))


def llm_flops(config: "LLMConfig", tokens: int, pairs: int) -> int:
    """Forward FLOPs of the LLM over `tokens` tokens whose attention looks at `pairs` query-key pairs, all layers
    together."""
    heads, width = config.heads * config.head_width, config.width
    attention = 2 * width * (heads + 2 * config.kv_heads * config.head_width) + 2 * heads * width
    experts = config.top_k * config.expert_width + config.shared_expert_width
    sparse = 6 * width * experts + 2 * width * (config.num_experts + config.shared_expert_gate)
    mlps = sum(sparse if has_experts else 6 * width * config.ffn_width for has_experts in config.sparse)
    layers = tokens * (config.layers * attention + mlps) + 4 * heads * pairs
    return layers + 2 * tokens * width * config.vocab_size


def llm_pairs(config: "LLMConfig", lengths_N: np.ndarray) -> int:
    """Query-key pairs of all layers together, over samples of these lengths."""
    full = config.layers - config.windowed_layers
    return full * causal_pairs(lengths_N) + config.windowed_layers * causal_pairs(lengths_N, config.window)


def causal_pairs(lengths_N: np.ndarray, window: int = 0) -> int:
    """Query-key pairs of causal attention inside segments of these lengths; window: keys that a query sees, 0 for
    all."""
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    unseen_N = np.maximum(lengths_N - window, 0) if window else np.zeros_like(lengths_N)
    return int((lengths_N * (lengths_N + 1) // 2 - unseen_N * (unseen_N + 1) // 2).sum())


def llm_parameters(config: "LLMConfig") -> tuple[int, int]:
    """(all, active) parameters; active counts top_k of the experts and everything else once.  A router's stored bias is
    none."""
    heads = config.heads * config.head_width
    mixed = heads + 2 * config.kv_heads * config.head_width
    attention = config.width * mixed + heads * config.width
    attention += mixed * config.qkv_bias + config.width * config.output_bias
    norms = 2 * config.width + sum(qk_norm_widths(config))
    expert = 3 * config.width * config.expert_width
    fixed = 3 * config.width * config.shared_expert_width
    fixed += config.width * (config.num_experts + config.shared_expert_gate)
    dense, sparse = 3 * config.width * config.ffn_width, sum(config.sparse)
    outside = (2 - config.tied_embeddings) * config.vocab_size * config.width + config.width
    same = config.layers * (attention + norms) + (config.layers - sparse) * dense + sparse * fixed + outside
    return same + sparse * config.num_experts * expert, same + sparse * config.top_k * expert


def qk_norm_widths(config: "LLMConfig") -> tuple[int, int]:
    """Weights of the norms of queries and of keys in one layer."""
    if not config.qk_norm:
        return 0, 0
    heads = (config.heads, config.kv_heads) if config.qk_norm_whole else (1, 1)
    return heads[0] * config.head_width, heads[1] * config.head_width


@dataclass(frozen=True)
class StepFlops:
    """Model FLOPs of one training step over the whole world."""

    encoder: int
    adapter: int
    llm: int

    @property
    def total(self) -> int:
        return self.encoder + self.adapter + self.llm


def step_flops(
    vision: VisionSpec, llm: "LLMConfig", trainable, grid_hw_I2: np.ndarray, tokens: int, lengths_N: np.ndarray
) -> StepFlops:
    """FLOPs of forward and backward of a step that trains these parts.

    The backward of a trained part costs two forwards.  That of a frozen part through which gradients pass costs one,
    and two of its attention, which has no weights.
    """
    visual_tokens, pairs = int(vision.tokens(grid_hw_I2).sum()), llm_pairs(llm, lengths_N)
    forward, attention = llm_flops(llm, tokens, pairs), llm_flops(llm, 0, pairs)
    to_encoder = "encoder" in trainable
    return StepFlops(
        encoder=int(vision.encoder_flops(grid_hw_I2).sum()) * (3 if to_encoder else 1),
        adapter=int(vision.connector_flops(visual_tokens)) * (3 if "adapter" in trainable else 2 if to_encoder else 1),
        llm=3 * forward if "llm" in trainable else 2 * forward + attention,
    )


def device_peak_tflops(device: torch.device) -> float:
    """Peak of one device: a data sheet's for a known GPU; measured by a matrix product on a CPU or an unknown one."""
    if device.type == "cuda":
        return peak_of(torch.cuda.get_device_name(device)) or _measure(device, torch.bfloat16, size=8192)
    return _measure(device, torch.float32, size=1024)


def peak_of(name: str) -> float | None:
    """Peak of the GPU that calls itself `name`, None for one that is not known."""
    return next((peak for key, peak in PEAK_TFLOPS.items() if key in name), None)


def _measure(device: torch.device, dtype: torch.dtype, size: int, repeats: int = 5) -> float:
    x = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        (x @ x)[0, 0].item()
        best = min(best, time.perf_counter() - begin)
    return 2 * size**3 / best / 1e12
