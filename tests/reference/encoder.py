"""The vision encoder in plain PyTorch, one image at a time where attention is concerned.

    x = linear(pixels / 127.5 - 1);   per block  x += keep * projection(attention(norm(x)));  x += keep * mlp(norm(x))

Rotary positions: channel pairs (i, i + K/2) of every head turn by y * base^(-4i/K) for the first quarter of the
channels and by x * base^(-4i/K) for the second.

Legend: N patches of I images end to end, D width, H heads, K head width, L = 2 * depth residual branches.
"""

from collections.abc import Mapping, Sequence

import torch

Weights = Mapping[str, torch.Tensor]


def linear(w: Weights, name: str, x: torch.Tensor) -> torch.Tensor:
    """x W^T + b."""
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def layer_norm(w: Weights, name: str, x: torch.Tensor, eps: float) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: torch.Tensor) -> torch.Tensor:
    """GELU by its tanh formula."""
    return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))


def rotate(x_NHK: torch.Tensor, angles_NJ: torch.Tensor) -> torch.Tensor:
    """Pairs (i, i + K/2) turned by angle i of the K/2 angles of every token."""
    a, b = x_NHK.chunk(2, dim=-1)
    cos, sin = angles_NJ.cos()[:, None], angles_NJ.sin()[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def frequencies(width: int, base: float, like: torch.Tensor) -> torch.Tensor:
    """base^(-2i/width) for i = 0 .. width/2 - 1, computed in fp32 as trained."""
    powers = torch.arange(0, width, 2, dtype=torch.float32) / width
    return (base**-powers).to(like.dtype)


def grid_angles(positions_N2: torch.Tensor, head_width: int, base: float, like: torch.Tensor) -> torch.Tensor:
    """Angles [N, K/2] of (y, x) positions, half of them of each axis."""
    steps = frequencies(head_width // 2, base, like)
    return torch.cat([positions_N2[:, axis, None].to(like.dtype) * steps for axis in (0, 1)], dim=-1)


def attend(q_QHK: torch.Tensor, k_SHK: torch.Tensor, v_SHK: torch.Tensor, causal: bool = False) -> torch.Tensor:
    """softmax(q k^T / sqrt(K)) v of one segment, [Q, H, K]."""
    scores = torch.einsum("qhk,shk->hqs", q_QHK, k_SHK) / q_QHK.shape[-1] ** 0.5
    if causal:
        later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return torch.einsum("hqs,shk->qhk", scores.softmax(-1), v_SHK)


def attention_by_segments(q, k, v, lengths: Sequence[int], causal: bool = False) -> torch.Tensor:
    """Attention inside each of the segments that lie end to end."""
    parts = zip(*(x.split(list(lengths)) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*part, causal=causal) for part in parts])


def block(
    w: Weights,
    prefix: str,
    x_ND: torch.Tensor,
    angles_NJ: torch.Tensor,
    lengths: Sequence[int],
    *,
    heads: int,
    eps: float,
    causal: bool = False,
    keep_2N: torch.Tensor | None = None,
) -> torch.Tensor:
    """A pre-norm block; keep_2N: factors of the attention and the MLP branch of every token."""
    keep_attention, keep_mlp = (1.0, 1.0) if keep_2N is None else keep_2N[:, :, None]
    mixed = linear(w, f"{prefix}qkv", layer_norm(w, f"{prefix}attention_norm", x_ND, eps))
    q, k, v = mixed.unflatten(-1, (3, heads, -1)).unbind(1)
    seen = attention_by_segments(rotate(q, angles_NJ), rotate(k, angles_NJ), v, lengths, causal)
    x_ND = x_ND + keep_attention * linear(w, f"{prefix}projection", seen.flatten(1))
    hidden = gelu(linear(w, f"{prefix}mlp_up", layer_norm(w, f"{prefix}mlp_norm", x_ND, eps)))
    return x_ND + keep_mlp * linear(w, f"{prefix}mlp_down", hidden)


def blocks(
    w: Weights, prefix: str, x_ND, angles_NJ, lengths, *, depth: int, heads: int, eps: float, causal=False, keep_LI=None
) -> torch.Tensor:
    """`depth` blocks named {prefix}blocks.0 and so on; keep_LI: factors of each image's branches."""
    for layer in range(depth):
        keep_2N = None
        if keep_LI is not None:
            keep_2N = keep_LI[2 * layer : 2 * layer + 2].repeat_interleave(torch.as_tensor(lengths), dim=1)
        place = f"{prefix}blocks.{layer}."
        x_ND = block(w, place, x_ND, angles_NJ, lengths, heads=heads, eps=eps, causal=causal, keep_2N=keep_2N)
    return x_ND


def embed(w: Weights, prefix: str, patches_NP: torch.Tensor, config: Mapping) -> torch.Tensor:
    """Linear embedding of uint8 patches, whose channels are normalised: (x / 255 - mean) / deviation."""
    weight = w[f"{prefix}patch_embedding.weight"]
    mean_3, std_3 = (torch.tensor(config[key], dtype=weight.dtype) for key in ("image_mean", "image_std"))
    pixels = (patches_NP.to(weight.dtype).unflatten(1, (-1, 3)) / 255 - mean_3) / std_3
    return linear(w, f"{prefix}patch_embedding", pixels.flatten(1))


def vit(
    w: Weights,
    prefix: str,
    patches_NP: torch.Tensor,
    positions_N2: torch.Tensor,
    lengths: Sequence[int],
    config: Mapping[str, float],
    keep_LI: torch.Tensor | None = None,
) -> torch.Tensor:
    """Features [N, D] of packed images; config: settings of the encoder."""
    x_ND = embed(w, prefix, patches_NP, config)
    return trunk(w, prefix, x_ND, positions_N2, lengths, config, keep_LI)


def trunk(w: Weights, prefix: str, x_ND, positions_N2, lengths, config: Mapping[str, float], keep_LI=None):
    """Embedded patches through all blocks and the final norm."""
    angles = grid_angles(positions_N2, config["width"] // config["heads"], config["rope_base"], x_ND)
    sizes = {"depth": config["depth"], "heads": config["heads"], "eps": config["norm_eps"]}
    x_ND = blocks(w, prefix, x_ND, angles, lengths, **sizes, keep_LI=keep_LI)
    return layer_norm(w, f"{prefix}final_norm", x_ND, config["norm_eps"])


def pool(features_ND: torch.Tensor, merge: int) -> torch.Tensor:
    """Mean over every merge^2 successive patches, which are a block, [N / merge^2, D]."""
    patches = merge * merge
    return sum(features_ND[place::patches] for place in range(patches)) / patches


def adapter(w: Weights, prefix: str, pooled_VD: torch.Tensor, eps: float) -> torch.Tensor:
    """Norm and two-layer MLP to the width of the LLM."""
    hidden = gelu(linear(w, f"{prefix}up", layer_norm(w, f"{prefix}norm", pooled_VD, eps)))
    return linear(w, f"{prefix}down", hidden)
