"""The omni-modal loss once more, in fp64 and the plainest way: an image, a text and a sample at a time, no packing.

It shares with the house only the names of the weights.  Toy tuples for the tests are made here too.

Legend: T rows (patches or tokens), H heads, K head width, J = K/2 angles.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from data.vision import VisionSpec
from tests.train.toys import packed, random_images
from train.models.initial import initialize
from train.models.omni import OmniChunk, OmniConfig, OmniTower
from train.models.text_encoder import TextConfig
from train.models.vit import ViTConfig

ENCODER = ViTConfig(width=16, depth=2, heads=2, mlp_ratio=2.0, rope_base=100.0)
TEXT = TextConfig(width=12, depth=1, heads=2, vocab_size=23, max_tokens=16, mlp_ratio=2.0, rope_base=50.0)
WIDTH = 10
SIZES = {"decoder_width": 20, "decoder_depth": 2, "decoder_heads": 2, "scale_init": 5.0, "bias_init": -2.0}


@dataclass(frozen=True)
class Tuple:
    """A sample: patches and grids of its frames and, last, of its audio; tokens of the visual and the audio caption."""

    grids: list[list[int]]
    images: list[np.ndarray]
    captions: tuple[np.ndarray, np.ndarray]


def toy_tuples(count: int) -> list[Tuple]:
    """Of 1, 2 or 3 frames and captions of different lengths; the last two say the same words."""
    random = np.random.default_rng(0)
    made = []
    for place in range(count):
        grids = [[[2, 2], [4, 2], [2, 4]][(place + frame) % 3] for frame in range(1 + place % 3)] + [
            [4, 2 + place % 2 * 2]
        ]
        captions = tuple(random.integers(1, TEXT.vocab_size, length) for length in (2 + place % 4, 4 - place % 3))
        made.append(Tuple(grids, random_images(grids, seed=place), captions))
    return [*made[:-1], Tuple(made[-1].grids, made[-1].images, made[-2].captions)]


def toy_tower(config: OmniConfig, recompute: str = "none") -> OmniTower:
    """Initialised; norms and biases are moved from ones and zeros, so that each is seen to be in its place."""
    tower = OmniTower(ENCODER, TEXT, config, width=WIDTH, recompute=recompute)
    initialize(tower, seed=0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if parameter.dim() == 1 or name == "pool.query":
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return tower


def toy_chunk(tuples: list[Tuple], places: list[int]) -> OmniChunk:
    """The samples at `places`, in that order, of a global step that is `tuples`."""
    mine = [tuples[place] for place in places]
    return OmniChunk.of(
        packed(
            [image for sample in mine for image in sample.images], [grid for sample in mine for grid in sample.grids]
        ),
        [len(sample.images) - 1 for sample in mine],
        [sample.captions for sample in mine],
        [tuples[(place + 1) % len(tuples)].captions for place in places],
    )


def tokens_of(tuples: list[Tuple]) -> int:
    return sum(len(text) for sample in tuples for text in sample.captions)


# ---- the reference -------------------------------------------------------------------------------------------------
class Reference:
    """weights: the tower's, by name, fp64 leaves."""

    def __init__(self, tower: OmniTower, config: OmniConfig):
        self.config = config
        self.weights = {name: p.detach().double().requires_grad_() for name, p in tower.named_parameters()}

    def terms(self, tuples: list[Tuple]) -> dict[str, torch.Tensor]:
        """Each term over the whole batch, before its weight."""
        features = [[self.encode(*image) for image in zip(s.images, s.grids, strict=True)] for s in tuples]
        sources = {
            "frames": torch.stack([torch.stack([self.pool(x) for x in xs[:-1]]).mean(0) for xs in features]),
            "audio": torch.stack([self.pool(xs[-1]) for xs in features]),
            "visual": torch.stack([self.text(sample.captions[0]) for sample in tuples]),
            "sound": torch.stack([self.text(sample.captions[1]) for sample in tuples]),
        }
        terms = {}
        for pair in self.config.pairs:
            a, b = (F.normalize(self.side(side, sources), dim=-1) for side in pair.split(":"))
            name = f"omni.temperatures.{pair.replace('+', '_').replace(':', '_with_')}"
            scale = self.config.scale_init * self.weights[f"{name}.log_scale_moved"].exp()
            bias = self.config.bias_init + self.weights[f"{name}.bias_moved"]
            terms[pair] = dense_siglip(a, b, scale, bias)
        matching, caption = [], []
        for place, sample in enumerate(tuples):
            seen = self.context(features[place])
            own = np.concatenate(sample.captions)
            others = tuples[(place + 1) % len(tuples)].captions
            if self.config.matching_weight:
                matching.append(-F.logsigmoid(self.match(own, seen)) / 2)
                if not all(np.array_equal(*both) for both in zip(sample.captions, others, strict=True)):
                    matching.append(-F.logsigmoid(-self.match(np.concatenate(others), seen)) / 2)
            if self.config.caption_weight:
                caption += self.write(own, seen)
        if matching:
            terms["matching"] = torch.stack(matching).sum() / len(tuples)
        if caption:
            terms["caption"] = torch.stack(caption).mean()
        return terms

    def loss(self, tuples: list[Tuple]) -> torch.Tensor:
        return weighted(self.terms(tuples), self.config)

    def encode(self, patches_TP, grid):
        half = ENCODER.width // ENCODER.heads // 2
        places = torch.from_numpy(VisionSpec().positions([grid])).double()
        angles = torch.cat([angles_of(places[:, axis], half, ENCODER.rope_base) for axis in (0, 1)], dim=-1)
        x = self.linear("encoder.patch_embedding", torch.from_numpy(patches_TP).double() / 127.5 - 1)
        for depth in range(ENCODER.depth):
            x = self.block(f"encoder.blocks.{depth}", x, ENCODER.heads, angles)
        return self.norm("encoder.final_norm", x)

    def pool(self, x):
        q = self.linear("pool.to_query", self.weights["pool.query"])
        k, v = self.linear("pool.to_keys_values", x).chunk(2, dim=-1)
        y = self.linear("pool.projection", attend(q, k, v, ENCODER.heads))
        y = y + self.mlp("pool", self.norm("pool.mlp_norm", y))
        return self.linear("pool.out", y)[0]

    def text(self, tokens):
        x = self.weights["text.encoder.embedding.weight"][torch.from_numpy(tokens)]
        angles = angles_of(torch.arange(len(tokens)).double(), TEXT.width // TEXT.heads, TEXT.rope_base)
        for depth in range(TEXT.depth):
            x = self.block(f"text.encoder.blocks.{depth}", x, TEXT.heads, angles)
        return self.linear("text.projection", self.norm("text.encoder.final_norm", x)[-1])

    def side(self, side, sources):
        if "+" not in side:
            return sources[side]
        return self.linear(
            f"omni.fusions.{side.replace('+', '_')}", torch.cat([sources[s] for s in side.split("+")], 1)
        )

    def context(self, features):
        seen = []
        for number, x in enumerate(features):
            kind, number = (1, 0) if number == len(features) - 1 else (0, number)
            x = self.norm("omni.reader.decoder.context_norm", self.linear("omni.reader.decoder.context", x))
            angle = angles_of(torch.tensor([float(number)]).double(), x.shape[1], 10000.0)[0]
            seen.append(
                x + self.weights["omni.reader.decoder.kinds.weight"][kind] + torch.cat([angle.sin(), angle.cos()])
            )
        return torch.cat(seen)

    def decode(self, x, seen, causal):
        heads = self.config.decoder_heads
        angles = angles_of(torch.arange(len(x)).double(), self.config.decoder_width // heads, 10000.0)
        for depth in range(self.config.decoder_depth):
            x = self.block(f"omni.reader.decoder.blocks.{depth}", x, heads, angles, causal, seen)
        return self.norm("omni.reader.decoder.final_norm", x)

    def match(self, tokens, seen):
        x = self.weights["omni.reader.decoder.tokens.weight"][torch.from_numpy(tokens)]
        x = F.gelu(self.linear("omni.reader.matching.up", self.decode(x, seen, False)[-1]), approximate="tanh")
        return self.linear("omni.reader.matching.out", self.norm("omni.reader.matching.norm", x))[0]

    def write(self, tokens, seen):
        """Loss of each token, given those before it."""
        before = self.weights["omni.reader.decoder.tokens.weight"][torch.from_numpy(tokens[:-1])]
        x = self.decode(torch.cat([self.weights["omni.reader.decoder.start.weight"], before]), seen, True)
        logits = x @ self.weights["omni.reader.words.weight"].T
        return [-logits[place].log_softmax(0)[token] for place, token in enumerate(tokens)]

    def block(self, name, x, heads, angles, causal=False, seen=None):
        q, k, v = self.linear(f"{name}.qkv", self.norm(f"{name}.attention_norm", x)).chunk(3, dim=-1)
        q, k = turned(q, heads, angles), turned(k, heads, angles)
        x = x + self.linear(f"{name}.projection", attend(q, k, v, heads, causal))
        if seen is not None:
            q = self.linear(f"{name}.cross_query", self.norm(f"{name}.cross_norm", x))
            k, v = self.linear(f"{name}.cross_key_value", seen).chunk(2, dim=-1)
            x = x + self.linear(f"{name}.cross_projection", attend(q, k, v, heads))
        return x + self.mlp(name, self.norm(f"{name}.mlp_norm", x))

    def mlp(self, name, x):
        return self.linear(f"{name}.mlp_down", F.gelu(self.linear(f"{name}.mlp_up", x), approximate="tanh"))

    def linear(self, name, x):
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def norm(self, name, x):
        centred = x - x.mean(-1, keepdim=True)
        centred = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return centred * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]


def weighted(terms: dict[str, torch.Tensor], config: OmniConfig) -> torch.Tensor:
    weights = {"matching": config.matching_weight, "caption": config.caption_weight}
    return sum(weights.get(name, 1 / len(config.pairs)) * term for name, term in terms.items())


def dense_siglip(a_BE, b_BE, scale, bias) -> torch.Tensor:
    """The formula, all pairs at once."""
    signs_BB = 2 * torch.eye(len(a_BE), dtype=a_BE.dtype) - 1
    return -F.logsigmoid(signs_BB * (scale * a_BE @ b_BE.T + bias)).sum() / len(a_BE)


def angles_of(places_T, width, base):
    return places_T[:, None] * base ** (-torch.arange(0, width, 2).double() / width)


def turned(x_TD, heads, angles_TJ):
    """Pairs (i, i + J) of every head as complex numbers, turned by the angles."""
    first, second = x_TD.unflatten(-1, (heads, 2, -1)).unbind(2)
    z = torch.complex(first, second) * torch.polar(torch.ones_like(angles_TJ), angles_TJ)[:, None]
    return torch.stack([z.real, z.imag], dim=2).flatten(1)


def attend(q_TD, k_SD, v_SD, heads, causal=False):
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q_TD, k_SD, v_SD))
    scores_HTS = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
    if causal:
        scores_HTS = scores_HTS.masked_fill(torch.ones(scores_HTS.shape[1:]).triu(1).bool(), -torch.inf)
    return (scores_HTS.softmax(-1) @ v).transpose(0, 1).flatten(1)
