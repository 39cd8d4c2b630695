"""The encoder's own recipes in plain PyTorch: masked image modelling, image-text contrast, the omni-modal stage.

Every loss is written as one dense formula over the whole global batch.  A batch is a dict:

    patches_NP, grid_I2   uint8 patches of all images end to end, and patches of each image down and across
    sample_I, audio_I     sample of each image, ascending, and whether the image is the spectrogram of a sound
    captions              of each sample a list of its captions, each a list of tokens that ends with <eos>

Masks and dropped branches are functions of (seed, step, sample, image within the sample), by a hash written here with
Python's integers.  `follow` trains for some steps and records what a run writes to its metrics.

Legend: N patches of I images of S samples, P values per patch, D width, E width of the embeddings, T tokens of a text,
V words of the vocabulary, L = 2 * depth residual branches, M masked patches, C width of the teacher.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.reference import optim
from tests.reference.encoder import (
    Weights,
    attend,
    blocks,
    embed,
    frequencies,
    gelu,
    layer_norm,
    linear,
    rotate,
    trunk,
    vit,
)

Batch = Mapping[str, Any]
Settings = Mapping[str, Any]
Terms = dict[str, torch.Tensor]
WORD = (1 << 64) - 1
MASKS, DROPS = 1, 2  # first word of what is hashed
DECODER_BASE = 10000.0  # of rotary positions and of sines for the numbers of frames


@dataclass
class Seen:
    """Captions so far, and how many of them hold each token."""

    captions: int = 0
    holding: Counter = field(default_factory=Counter)


@dataclass(frozen=True)
class Teacher:
    """Weights of an encoder named encoder.*, and its sizes."""

    weights: Weights
    sizes: Mapping[str, float]


# ---- random choices --------------------------------------------------------------------------------------------------


def hashed(*words: int) -> int:
    """64 bits of some integers: splitmix64's finalizer, absorbing one integer at a time into the first."""
    state, *rest = words
    for word in rest:
        state = ((state ^ word) + 0x9E3779B97F4A7C15) & WORD
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & WORD
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) & WORD
        state ^= state >> 31
    return state


def masked(patches: int, ratio: float, key: Sequence[int]) -> list[bool]:
    """Which patches of an image are masked: those of the lowest hashes, `ratio` of them rounded half up."""
    count = min(max(math.floor(ratio * patches + 0.5), 1), max(patches - 1, 1))
    order = sorted(range(patches), key=lambda patch: (hashed(MASKS, *key, patch), patch))
    return [patch in set(order[:count]) for patch in range(patches)]


def kept(depth: int, rate: float, key: Sequence[int]) -> list[float]:
    """Factors [L] of an image's branches: 0 with a chance that rises linearly to `rate`, else 1 / (1 - chance)."""
    factors = []
    for branch in range(2 * depth):
        chance = rate * (branch // 2 + 1) / depth
        uniform = (hashed(DROPS, *key, branch) >> 11) / 2**53
        factors.append(0.0 if uniform < chance else 1 / (1 - chance))
    return factors


def keys_of(batch: Batch, seed: int, step: int) -> list[tuple[int, int, int, int]]:
    """(seed, step, sample, number within the sample) of each image."""
    within, keys = Counter(), []
    for sample in batch["sample_I"].tolist():
        keys.append((seed, step, sample, within[sample]))
        within[sample] += 1
    return keys


# ---- images and texts ------------------------------------------------------------------------------------------------


def lengths_of(batch: Batch) -> list[int]:
    """Patches of each image."""
    return [down * across for down, across in batch["grid_I2"].tolist()]


def positions(grid_I2: torch.Tensor) -> torch.Tensor:
    """(y, x) of every patch, [N, 2]: 2x2 blocks row by row, in each block its four patches row by row."""
    places = [
        (y + dy, x + dx)
        for down, across in grid_I2.tolist()
        for y in range(0, down, 2)
        for x in range(0, across, 2)
        for dy in (0, 1)
        for dx in (0, 1)
    ]
    return torch.tensor(places)


def keep_of(batch: Batch, settings: Settings, step: int, like: torch.Tensor) -> torch.Tensor | None:
    """Factors [L, I] of the branches of every image, None without drop path."""
    sizes = settings["model"]["encoder"]
    if not sizes["drop_path"]:
        return None
    keys = keys_of(batch, settings["train"]["seed"], step)
    return torch.tensor([kept(sizes["depth"], sizes["drop_path"], key) for key in keys], dtype=like.dtype).T


def features_of(w: Weights, batch: Batch, settings: Settings, step: int) -> torch.Tensor:
    """Features of all patches, [N, D]."""
    keep_LI = keep_of(batch, settings, step, w["encoder.final_norm.weight"])
    sizes = settings["model"]["encoder"]
    return vit(w, "encoder.", batch["patches_NP"], positions(batch["grid_I2"]), lengths_of(batch), sizes, keep_LI)


def attention_pool(w: Weights, features_ND: torch.Tensor, lengths: Sequence[int], sizes: Mapping) -> torch.Tensor:
    """A learned query looks at each image, then an MLP with a residual, then a linear layer: [I, E]."""
    heads = sizes["heads"]
    q = linear(w, "pool.to_query", w["pool.query"]).unflatten(-1, (heads, -1))
    k, v = linear(w, "pool.to_keys_values", features_ND).unflatten(-1, (2, heads, -1)).unbind(1)
    pooled = [attend(q, *image) for image in zip(k.split(lengths), v.split(lengths), strict=True)]
    y_ID = linear(w, "pool.projection", torch.cat(pooled).flatten(1))
    hidden = gelu(linear(w, "pool.mlp_up", layer_norm(w, "pool.mlp_norm", y_ID, sizes["norm_eps"])))
    y_ID = y_ID + linear(w, "pool.mlp_down", hidden)
    return linear(w, "pool.out", y_ID) if "pool.out.weight" in w else y_ID


def text_embedding(w: Weights, tokens: Sequence[int], sizes: Mapping) -> torch.Tensor:
    """A text's embedding, [E], not normalised: a linear layer on the feature of <eos>."""
    x_TD = w["text.encoder.embedding.weight"][torch.tensor(tokens)]
    angles = text_angles(len(tokens), sizes["width"] // sizes["heads"], sizes["rope_base"], x_TD)
    shape = {"depth": sizes["depth"], "heads": sizes["heads"], "eps": sizes["norm_eps"]}
    x_TD = blocks(w, "text.encoder.", x_TD, angles, [len(tokens)], **shape)
    return linear(w, "text.projection", layer_norm(w, "text.encoder.final_norm", x_TD[-1], sizes["norm_eps"]))


def text_angles(tokens: int, head_width: int, base: float, like: torch.Tensor) -> torch.Tensor:
    """Angles [T, K/2] of positions 0, 1, ..."""
    return torch.arange(tokens, dtype=like.dtype)[:, None] * frequencies(head_width, base, like)


def unit(x_SE: torch.Tensor) -> torch.Tensor:
    """Rows of length 1."""
    return x_SE / x_SE.square().sum(-1, keepdim=True).sqrt()


def siglip(a_SE, b_SE, w: Weights, name: str, settings: Mapping) -> torch.Tensor:
    """The contrast of two sides by the temperature of this name."""
    scale = settings["scale_init"] * w[f"{name}.log_scale_moved"].exp()
    bias = settings["bias_init"] + w[f"{name}.bias_moved"]
    return dense_siglip(unit(a_SE), unit(b_SE), scale, bias)


def dense_siglip(a_SE, b_SE, scale, bias) -> torch.Tensor:
    """1/S sum over i and j of softplus(-+ (scale * a_i . b_j + bias)), - where i = j (Zhai et al. 2023); of units."""
    signs_SS = 2 * torch.eye(len(a_SE), dtype=a_SE.dtype) - 1
    return torch.logaddexp(-signs_SS * (scale * a_SE @ b_SE.T + bias), a_SE.new_zeros(())).sum() / len(a_SE)


# ---- the three objectives --------------------------------------------------------------------------------------------


def mim_terms(w: Weights, batch: Batch, settings: Settings, step: int, teacher: Teacher) -> Terms:
    """Mean over all masked patches of 1 - cosine between what a decoder predicts and the teacher's features.

    The encoder sees visible patches alone; the decoder sees its outputs and a mask token elsewhere, at 2D positions.
    """
    mim, sizes, lengths = settings["objective"]["mim"], settings["model"]["encoder"], lengths_of(batch)
    keys = keys_of(batch, settings["train"]["seed"], step)
    masks = [torch.tensor(masked(n, mim["mask_ratio"], key)) for n, key in zip(lengths, keys, strict=True)]
    mask_N, place_N2, patches_NP = torch.cat(masks), positions(batch["grid_I2"]), batch["patches_NP"]
    with torch.no_grad():
        target_MC = vit(teacher.weights, "encoder.", patches_NP, place_N2, lengths, teacher.sizes)[mask_N]

    visible = [int((~mask).sum()) for mask in masks]
    keep_LI = keep_of(batch, settings, step, w["encoder.final_norm.weight"])
    x_VD = embed(w, "encoder.", patches_NP[~mask_N], sizes)
    x_VQ = linear(w, "mim.decoder.enter", trunk(w, "encoder.", x_VD, place_N2[~mask_N], visible, sizes, keep_LI))
    x_NQ = w["mim.decoder.mask.token"].repeat(len(mask_N), 1)
    x_NQ[~mask_N] = x_VQ
    decoder = {
        "width": mim["decoder_width"],
        "depth": mim["decoder_depth"],
        "heads": mim["decoder_heads"],
        "rope_base": sizes["rope_base"],
        "norm_eps": sizes["norm_eps"],
    }
    predicted_MC = linear(w, "mim.head", trunk(w, "mim.decoder.", x_NQ, place_N2, lengths, decoder)[mask_N])
    return {"cosine": (1 - (unit(predicted_MC) * unit(target_MC)).sum(-1)).mean()}


def contrastive_terms(w: Weights, batch: Batch, settings: Settings, step: int, seen: Seen) -> Terms:
    """SigLIP over all pairs of the batch, and SuperClass; `seen` takes this step's captions."""
    sizes, weights = settings["model"]["encoder"], settings["objective"]["contrastive"]
    pooled_IE = attention_pool(w, features_of(w, batch, settings, step), lengths_of(batch), sizes)
    captions = [of_sample[0] for of_sample in batch["captions"]]
    image_SE = torch.stack([pooled_IE[batch["sample_I"] == sample].mean(0) for sample in range(len(captions))])
    text_SE = torch.stack([text_embedding(w, caption, settings["model"]["text"]) for caption in captions])
    logits_SV = linear(w, "contrastive.classifier", image_SE)
    return {
        "siglip": siglip(image_SE, text_SE, w, "contrastive.temperature", weights),
        "superclass": superclass(logits_SV, captions, seen),
    }


def superclass(logits_SV: torch.Tensor, captions: Sequence[Sequence[int]], seen: Seen) -> torch.Tensor:
    """Mean cross-entropy against the tokens of each caption, weighted by log((D + 1) / (n + 1)) and summing to 1.

    n of all D captions so far, those of this step included, hold a token; <eos> is no class (Huang et al. 2024).
    """
    sets = [sorted(set(caption) - {caption[-1]}) for caption in captions]
    seen.captions += len(sets)
    seen.holding.update(token for tokens in sets for token in tokens)
    losses = []
    for logits_V, tokens in zip(logits_SV, sets, strict=True):
        idf = [math.log((seen.captions + 1) / (seen.holding[token] + 1)) for token in tokens]
        shares = [value / sum(idf) for value in idf] if sum(idf) > 0 else [1 / len(tokens)] * len(tokens)
        log_p_V = logits_V.log_softmax(0)
        losses.append(-sum(share * log_p_V[token] for share, token in zip(shares, tokens, strict=True)))
    return torch.stack(losses).mean()


def omni_terms(w: Weights, batch: Batch, settings: Settings, step: int) -> Terms:
    """A SigLIP for each pair of sides, whether a caption matches, and the cross-entropy of writing it.

    Frames and sound of a sample; both captions read as one text by a decoder that looks at all its patches.  The
    negative of a sample is the text of the next sample of the step, unless both say the same.
    """
    sizes, omni = settings["model"]["encoder"], settings["objective"]["omni"]
    features_ND, lengths = features_of(w, batch, settings, step), lengths_of(batch)
    pooled_IE = attention_pool(w, features_ND, lengths, sizes)
    sample_I, audio_I, captions = batch["sample_I"], batch["audio_I"], batch["captions"]
    samples = range(len(captions))
    sides = {
        "frames": torch.stack([pooled_IE[(sample_I == sample) & ~audio_I].mean(0) for sample in samples]),
        "audio": torch.stack([pooled_IE[(sample_I == sample) & audio_I].mean(0) for sample in samples]),
        "visual": torch.stack([text_embedding(w, both[0], settings["model"]["text"]) for both in captions]),
        "sound": torch.stack([text_embedding(w, both[1], settings["model"]["text"]) for both in captions]),
    }
    terms = {}
    for pair in omni["pairs"]:
        a_SE, b_SE = (omni_side(w, side, sides) for side in pair.split(":"))
        name = pair.replace("+", "_").replace(":", "_with_")
        terms[pair] = siglip(a_SE, b_SE, w, f"omni.temperatures.{name}", omni)

    reader = {"heads": omni["decoder_heads"], "depth": omni["decoder_depth"], "eps": sizes["norm_eps"]}
    images = features_ND.split(lengths)
    texts = [[token for caption in both for token in caption] for both in captions]
    matching, caption = [], []
    for sample in samples:
        mine = [image for image, its in zip(images, sample_I.tolist(), strict=True) if its == sample]
        seen_ND = omni_context(w, mine, audio_I[sample_I == sample].tolist(), reader["eps"])
        own, successor = texts[sample], (sample + 1) % len(texts)
        zero = features_ND.new_zeros(())
        matching.append(torch.logaddexp(-match(w, own, seen_ND, reader), zero) / 2)
        if captions[successor] != captions[sample]:
            matching.append(torch.logaddexp(match(w, texts[successor], seen_ND, reader), zero) / 2)
        caption += write(w, own, seen_ND, reader)
    terms["matching"] = torch.stack(matching).sum() / len(texts)
    terms["caption"] = torch.stack(caption).mean()
    return terms


def omni_side(w: Weights, side: str, sides: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings of one side of a pair, [S, E]: of a source, or one linear layer on several."""
    if "+" not in side:
        return sides[side]
    return linear(w, f"omni.fusions.{side.replace('+', '_')}", torch.cat([sides[s] for s in side.split("+")], dim=-1))


def omni_context(w: Weights, images: Sequence[torch.Tensor], is_audio: Sequence[bool], eps: float) -> torch.Tensor:
    """What the decoder looks at: the patches of a sample, with their kind, and their frame's number by sines."""
    prefix, seen, frames = "omni.reader.decoder", [], 0
    for features_ND, audio in zip(images, is_audio, strict=True):
        x_ND = layer_norm(w, f"{prefix}.context_norm", linear(w, f"{prefix}.context", features_ND), eps)
        number = 0 if audio else frames
        frames += not audio
        angles = number * frequencies(x_ND.shape[1], DECODER_BASE, x_ND)
        seen.append(x_ND + w[f"{prefix}.kinds.weight"][int(audio)] + torch.cat([angles.sin(), angles.cos()]))
    return torch.cat(seen)


def decode(w: Weights, x_TD: torch.Tensor, seen_ND: torch.Tensor, reader: Mapping, causal: bool) -> torch.Tensor:
    """A text through blocks of self-attention, cross-attention and MLP, [T, D]."""
    heads, eps = reader["heads"], reader["eps"]
    angles = text_angles(len(x_TD), x_TD.shape[1] // heads, DECODER_BASE, x_TD)
    for layer in range(reader["depth"]):
        name = f"omni.reader.decoder.blocks.{layer}"
        mixed = linear(w, f"{name}.qkv", layer_norm(w, f"{name}.attention_norm", x_TD, eps))
        q, k, v = mixed.unflatten(-1, (3, heads, -1)).unbind(1)
        read = attend(rotate(q, angles), rotate(k, angles), v, causal)
        x_TD = x_TD + linear(w, f"{name}.projection", read.flatten(1))
        q = linear(w, f"{name}.cross_query", layer_norm(w, f"{name}.cross_norm", x_TD, eps)).unflatten(-1, (heads, -1))
        k, v = linear(w, f"{name}.cross_key_value", seen_ND).unflatten(-1, (2, heads, -1)).unbind(1)
        x_TD = x_TD + linear(w, f"{name}.cross_projection", attend(q, k, v).flatten(1))
        hidden = gelu(linear(w, f"{name}.mlp_up", layer_norm(w, f"{name}.mlp_norm", x_TD, eps)))
        x_TD = x_TD + linear(w, f"{name}.mlp_down", hidden)
    return layer_norm(w, "omni.reader.decoder.final_norm", x_TD, eps)


def match(w: Weights, tokens: Sequence[int], seen_ND: torch.Tensor, reader: Mapping) -> torch.Tensor:
    """Logit that a text belongs to what it looks at."""
    last_D = decode(w, w["omni.reader.decoder.tokens.weight"][torch.tensor(tokens)], seen_ND, reader, causal=False)[-1]
    hidden_D = layer_norm(
        w, "omni.reader.matching.norm", gelu(linear(w, "omni.reader.matching.up", last_D)), reader["eps"]
    )
    return linear(w, "omni.reader.matching.out", hidden_D)[0]


def write(w: Weights, tokens: Sequence[int], seen_ND: torch.Tensor, reader: Mapping) -> list[torch.Tensor]:
    """Cross-entropy of each token, given a start sign and the tokens before it."""
    before = w["omni.reader.decoder.tokens.weight"][torch.tensor(tokens[:-1])]
    x_TD = decode(w, torch.cat([w["omni.reader.decoder.start.weight"], before]), seen_ND, reader, causal=True)
    log_p_TV = (x_TD @ w["omni.reader.words.weight"].T).log_softmax(-1)
    return [-log_p_TV[place, token] for place, token in enumerate(tokens)]


# ---- training --------------------------------------------------------------------------------------------------------


def weights_of_terms(recipe: str, settings: Settings) -> dict[str, float]:
    """The factor of each term in the loss."""
    objective = settings["objective"]
    if recipe == "vit_mim":
        return {"cosine": 1.0}
    if recipe == "vit_contrastive":
        return {name: objective["contrastive"][f"{name}_weight"] for name in ("siglip", "superclass")}
    omni = objective["omni"]
    pairs = {pair: 1 / len(omni["pairs"]) for pair in omni["pairs"]}
    return {**pairs, "matching": omni["matching_weight"], "caption": omni["caption_weight"]}


@dataclass
class Followed:
    """lines: of each step the loss, its terms, norms by part and joint, the clip coefficient and the learning rate.
    optimizer: final weights, moments and average.  seen: captions counted by the contrastive recipe."""

    lines: list[dict[str, Any]]
    optimizer: optim.AdamW
    seen: Seen


def follow(
    recipe: str, settings: Settings, weights: optim.Tensors, batches: Sequence[Batch], teacher: Teacher | None = None
) -> Followed:
    """Trains all weights for one step per batch, in the dtype of the weights."""
    choice, seen, lines = settings["optim"], Seen(), []
    depth, steps = settings["model"]["encoder"]["depth"], len(batches)
    rates = {"lr": choice["lr"], "min_lr": choice["min_lr"], "warmup_steps": choice["warmup_steps"], "steps": steps}
    optimizer = {"adamw": optim.AdamW, "lamb": optim.Lamb}[choice["name"]](
        dict(weights),
        betas=choice["betas"],
        eps=choice["eps"],
        weight_decay=choice["weight_decay"],
        lr_scale=lambda name: optim.layer_factor(name, depth, choice["layer_decay"]),
        ema=choice["ema"],
    )
    state = {"vit_mim": (teacher,), "vit_contrastive": (seen,), "vit_omni": ()}[recipe]
    terms_of = {"vit_mim": mim_terms, "vit_contrastive": contrastive_terms, "vit_omni": omni_terms}[recipe]
    factors = weights_of_terms(recipe, settings)
    for step, batch in enumerate(batches):
        w = {name: tensor.detach().requires_grad_() for name, tensor in optimizer.weights.items()}
        terms = terms_of(w, batch, settings, step, *state)
        loss = sum(factors[name] * term for name, term in terms.items()).squeeze()
        found = torch.autograd.grad(loss, list(w.values()), materialize_grads=True)
        gradients = dict(zip(w, found, strict=True))
        total, lr = optim.norm(gradients), optim.learning_rate(step, **rates)
        with torch.no_grad():
            optimizer.step(optim.clipped(gradients, choice["clip_norm"]), lr)
        parts = {f"grad_norm_{part}": optim.norm(gradients, f"{part}.") for part in settings["train"]["trainable"]}
        losses = {name: term.item() for name, term in terms.items()}
        clip = min(1.0, choice["clip_norm"] / total)
        lines.append({"loss": loss.item(), "losses": losses, "grad_norm": total, **parts, "clip": clip, "lr": lr})
    return Followed(lines, optimizer, seen)
