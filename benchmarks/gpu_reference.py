"""References written plainly, to compare with before anything is timed; benchmarks/gpu.py runs them in fp64 on the CPU.

Legend: T tokens, D width, H heads, G key/value heads, J heads of one group, K head width, E experts, S queries.
For the vision tower: N patches, P values a patch, J half a head's width, F width of the MLP.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from tandem.parallel.kernels.attention import Segments

if TYPE_CHECKING:  # attention is compared without Megatron-core
    from tandem.train.models.encoders.vit import SeedViT
    from tandem.train.models.language.llm_config import LLMConfig


def dense_features(vit: "SeedViT", pixels_NP: torch.Tensor, positions_N2: torch.Tensor) -> torch.Tensor:
    """Features of one image, [N, D]: rotation as complex numbers, softmax over all scores."""
    config, (weight, bias) = vit.config, (vit.patch_embedding.weight, vit.patch_embedding.bias)
    quarter = config.width // config.heads // 4
    frequency = config.rope_base ** (-torch.arange(quarter, device=pixels_NP.device) / quarter)
    angle_NJ = (positions_N2[:, :, None] * frequency).flatten(1)
    turn_N1J = torch.polar(torch.ones_like(angle_NJ), angle_NJ)[:, None]

    def turned(x_NHK):
        first, second = x_NHK.unflatten(-1, (2, -1)).unbind(-2)
        turned_NHJ = torch.complex(first, second) * turn_N1J
        return torch.cat((turned_NHJ.real, turned_NHJ.imag), dim=-1)

    def linear(layer, x_NC):
        return F.linear(x_NC, layer.weight, layer.bias)

    x_ND = F.linear(pixels_NP, weight, bias)
    for block in vit.blocks:
        qkv_NY = linear(block.qkv, block.attention_norm(x_ND))
        q_NHK, k_NHK, v_NHK = qkv_NY.unflatten(-1, (3, config.heads, -1)).unbind(1)
        scores_HNN = torch.einsum("nhk,mhk->hnm", turned(q_NHK), turned(k_NHK)) * (4 * quarter) ** -0.5
        mixed_NHK = torch.einsum("hnm,mhk->nhk", scores_HNN.softmax(-1), v_NHK)
        x_ND = x_ND + linear(block.projection, mixed_NHK.flatten(1))
        h_NF = F.gelu(linear(block.mlp_up, block.mlp_norm(x_ND)), approximate="tanh")
        x_ND = x_ND + linear(block.mlp_down, h_NF)
    return vit.final_norm(x_ND)


def softmax_attention(q_THK, k_SGK, v_SGK, segments: Segments, causal: bool) -> torch.Tensor:
    """Softmax over all scores of each segment, [T, H, K]."""
    repeat = q_THK.shape[1] // k_SGK.shape[1]
    parts = [x.split(segments.q_lengths_N) for x in (q_THK, k_SGK, v_SGK)]
    outputs = []
    for q, k, v in zip(*parts, strict=True):
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
        scores_HTS = torch.einsum("thk,shk->hts", q, k) * q.shape[-1] ** -0.5
        if causal:
            later_TS = torch.ones(len(q), len(k), dtype=torch.bool).triu(1)
            scores_HTS = scores_HTS.masked_fill(later_TS, float("-inf"))
        outputs.append(torch.einsum("hts,shk->thk", scores_HTS.softmax(-1), v))
    return torch.cat(outputs)


def canonical(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a Megatron-core stage by one naming, whichever spec built it; experts as `LAYER.fc1.EXPERT`."""
    found = {}
    for name, tensor in tensors.items():
        layer, rest = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name).groups()
        if rest.endswith("linear_qkv.layer_norm_weight"):  # Transformer Engine's norm is a part of the product
            rest = "input_layernorm.weight"
        if expert := re.fullmatch(r"mlp\.experts\.local_experts\.(\d+)\.linear_(fc[12])\.weight", rest):
            rest = f"{expert[2]}.{expert[1]}"
        elif expert := re.fullmatch(r"mlp\.experts\.linear_(fc[12])\.weight(\d+)", rest):
            rest = f"{expert[1]}.{expert[2]}"
        elif stacked := re.fullmatch(r"mlp\.experts\.linear_(fc[12])", rest):
            found |= {f"{layer}.{stacked[1]}.{expert}": part for expert, part in enumerate(tensor)}
            continue
        found[f"{layer}.{rest.removeprefix('self_attention.').removesuffix('.weight')}"] = tensor
    return found


def canonical_hugging_face(tensors: Mapping[str, torch.Tensor], config: "LLMConfig") -> dict[str, torch.Tensor]:
    """Tensors of Hugging Face's Qwen3-MoE by the same naming; queries, keys and values joined by group."""
    found = {}
    for layer in range(config.layers):
        w = {name.removeprefix(f"layers.{layer}."): value for name, value in tensors.items()}
        by_group = (w[f"self_attn.{part}_proj.weight"].unflatten(0, (config.kv_heads, -1)) for part in "qkv")
        named = {
            "linear_qkv": torch.cat(list(by_group), dim=1).flatten(0, 1),
            "linear_proj": w["self_attn.o_proj.weight"],
            "input_layernorm": w["input_layernorm.weight"],
            "pre_mlp_layernorm": w["post_attention_layernorm.weight"],
            "mlp.router": w["mlp.gate.weight"],
        }
        for number in range(config.num_experts):
            named[f"fc1.{number}"] = w["mlp.experts.gate_up_proj"][number]
            named[f"fc2.{number}"] = w["mlp.experts.down_proj"][number]
        found |= {f"{layer}.{name}": tensor for name, tensor in named.items()}
    return found


def plain_layers(weights: Mapping[str, torch.Tensor], config: "LLMConfig", x_TD: torch.Tensor, sequence: int):
    """Hidden states after all layers, [T, D]: RMSNorm, rotary grouped-query attention, top-k experts of SwiGLU."""
    segments = Segments.of([sequence] * (len(x_TD) // sequence))
    for layer in range(config.layers):
        w = {name.partition(".")[2]: value for name, value in weights.items() if name.startswith(f"{layer}.")}
        first, second = (w[name] for name in ("input_layernorm", "pre_mlp_layernorm"))
        x_TD = x_TD + _attend(w, config, F.rms_norm(x_TD, first.shape, first, config.norm_eps), segments)
        x_TD = x_TD + _experts(w, config, F.rms_norm(x_TD, second.shape, second, config.norm_eps))
    return x_TD


def _attend(w, config, x_TD, segments):
    repeat, width = config.heads // config.kv_heads, config.head_width
    qkv_TGJK = (x_TD @ w["linear_qkv"].T).unflatten(-1, (config.kv_heads, repeat + 2, width))
    q_THK = _rotate(qkv_TGJK[:, :, :repeat].flatten(1, 2), segments, config.rope_base)
    k_TGK = _rotate(qkv_TGJK[:, :, repeat], segments, config.rope_base)
    return softmax_attention(q_THK, k_TGK, qkv_TGJK[:, :, repeat + 1], segments, True).flatten(1) @ w["linear_proj"].T


def _rotate(x_THK, segments, base):
    half = x_THK.shape[-1] // 2
    position_T = torch.cat([torch.arange(length) for length in segments.q_lengths_N]).double()
    angle_TJ = position_T[:, None] * base ** (-torch.arange(half).double() / half)
    turn_T1J = torch.polar(torch.ones_like(angle_TJ), angle_TJ)[:, None]
    turned_THJ = torch.complex(x_THK[..., :half], x_THK[..., half:]) * turn_T1J
    return torch.cat((turned_THJ.real, turned_THJ.imag), dim=-1)


def _experts(w, config, x_TD):
    chosen = (x_TD @ w["mlp.router"].T).topk(config.top_k, dim=-1)
    weight_TE = torch.zeros(len(x_TD), config.num_experts).double()
    weight_TE = weight_TE.scatter(1, chosen.indices, chosen.values.softmax(-1))
    out_TD = torch.zeros_like(x_TD)
    for expert in range(config.num_experts):
        gate, up = (x_TD @ w[f"fc1.{expert}"].T).chunk(2, dim=-1)
        out_TD = out_TD + (F.silu(gate) * up) @ w[f"fc2.{expert}"].T * weight_TE[:, expert, None]
    return out_TD
