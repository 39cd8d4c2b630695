"""The towers of the encoder's own stages under ZeRO 1, 2 and 3 on two ranks against one process and plain AdamW.

Five steps of uneven batches: rank 0 has more samples than rank 1, in chunks of two, and rank 1 fills up with a blank;
in one step it has nothing else.  The one process runs a step's samples as one chunk, so that between the two are other
shapes of matrix products and the order of fp32 sums: 2e-5 after five updates.

Legend: I images, B samples, M masked patches, C teacher width, E embedding width.
"""

import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tandem.data.vision import VisionSpec
from tandem.parallel.engines import encoder_engine
from tandem.parallel.engines.encoder_engine import EncoderEngine
from tandem.parallel.engines.state import AdamSettings
from tandem.train.models.encoders.text_encoder import PackedTexts, TextConfig
from tandem.train.models.encoders.vit import PackedImages, ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.layers.masking import drop_path_factors, mask_images
from tandem.train.models.towers.contrastive import ContrastiveConfig, ContrastiveTower
from tandem.train.models.towers.masked import MaskedImages, MimConfig, MimTower
from tandem.train.objectives.siglip import siglip_loss
from tandem.train.objectives.superclass import InverseFrequency, TokenSets
from tests.distributed.runs import whole_state
from tests.distributed.world import run_world

CPU = torch.device("cpu")
# eps above the rounding noise of a gradient that is zero (key biases), which Adam would turn into whole steps
ADAM = AdamSettings(lr=1e-3, betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1)
SAMPLES_OF_STEP = ((4, 1), (3, 2), (5, 3), (2, 0), (4, 2))  # by rank
CHUNK = 2
GRIDS = ((2, 2), (2, 4), (4, 4))
WORDS, TEACHER_WIDTH = 30, 12
ENCODER = ViTConfig(width=24, depth=3, heads=2, rope_base=100.0, drop_path=0.3)


# ---- towers, and what a step gives them ------------------------------------------------------------------------------


def frames_of(step: int, sample: int) -> int:
    return 1 + (step + sample) % 2


def images_of(step: int, samples: list[int]) -> tuple[PackedImages, np.ndarray, np.ndarray]:
    """(images, keys [I, 3], counts [B]); a sample's images are the same wherever it is."""
    keys = np.array([(step, sample, frame) for sample in samples for frame in range(frames_of(step, sample))])
    grids = np.array([GRIDS[(key[1] + key[0]) % 3] for key in keys])
    patches = [
        np.random.default_rng(key).integers(0, 256, (grid.prod(), VisionSpec().patch_values), np.uint8)
        for key, grid in zip(keys, grids, strict=True)
    ]
    keep_LI = drop_path_factors(ENCODER.depth, ENCODER.drop_path, keys)
    images = PackedImages.of(np.concatenate(patches), VisionSpec().positions(grids), grids.prod(1), CPU, keep_LI)
    return images, keys, np.array([frames_of(step, sample) for sample in samples])


def mim_inputs(step: int, samples: list[int]):
    """(inputs of the tower, its rows)"""
    if not samples:
        return (MaskedImages.blank(VisionSpec(), CPU), torch.zeros(3, TEACHER_WIDTH)), 0
    images, keys, _ = images_of(step, samples)
    patches_I = images.segments.q_lengths_N
    mask_N = mask_images(patches_I, 0.75, keys)
    target_NC = torch.cat(
        [
            torch.from_numpy(np.random.default_rng([9, *key]).standard_normal((n, TEACHER_WIDTH), np.float32))
            for key, n in zip(keys, patches_I, strict=True)
        ]
    )
    return (MaskedImages.of(images, mask_N), target_NC[torch.from_numpy(mask_N)]), int(mask_N.sum())


def contrastive_inputs(step: int, samples: list[int]):
    frequency = InverseFrequency(WORDS, CPU)  # as it was before the first caption: all words weigh the same
    if not samples:
        sets = TokenSets.of(np.zeros(1), np.ones(1))
        return (PackedImages.blank(VisionSpec(), CPU), PackedTexts.blank(CPU), frequency.k_hot(sets), None), 0
    images, _, frames_B = images_of(step, samples)
    texts = [
        np.random.default_rng([5, step, sample]).integers(0, WORDS, 1 + (step + 2 * sample) % 5) for sample in samples
    ]
    tokens_T, lengths_B = np.concatenate(texts), np.array([len(text) for text in texts])
    khot = frequency.k_hot(TokenSets.of(tokens_T, lengths_B))
    return (images, PackedTexts.of(tokens_T, lengths_B, CPU), khot, torch.from_numpy(frames_B)), len(samples)


def mim_share(outputs, rows_of_rank, group):
    return outputs[0].sum() / sum(rows_of_rank)


def contrastive_share(outputs, rows_of_rank, group):
    *pairs, superclass_B = outputs
    return siglip_loss(*pairs, counts=rows_of_rank, group=group) + superclass_B.sum() / sum(rows_of_rank)


def build(kind: str, folder: str | None = None):
    """(tower, its inputs of samples, this rank's share of the loss of outputs); folder: of a text tower."""
    if kind == "contrastive":
        text = TextConfig(width=16, depth=2, heads=2, vocab_size=WORDS, max_tokens=8, rope_base=100.0, folder=folder)
        config = ContrastiveConfig(scale_init=4.0, bias_init=-2.0)
        tower = ContrastiveTower(ENCODER, text, config, width=20, recompute="full")
        inputs, share = contrastive_inputs, contrastive_share
    else:
        mim = MimConfig(masked=kind, decoder_width=16, decoder_depth=1, decoder_heads=2)
        tower, inputs, share = MimTower(ENCODER, mim, TEACHER_WIDTH, "full"), mim_inputs, mim_share
    initialize(tower, seed=0)
    return tower, inputs, share


def reference(kind: str, folder: str | None = None) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(loss of each step, weights at the end) of one process."""
    tower, inputs, share = build(kind, folder)
    parameters = list(tower.parameters())
    groups = [
        {"params": [p for p in parameters if sum(n > 1 for n in p.shape) > 1], "weight_decay": ADAM.weight_decay},
        {"params": [p for p in parameters if sum(n > 1 for n in p.shape) <= 1], "weight_decay": 0.0},
    ]
    adam, losses = torch.optim.AdamW(groups, lr=ADAM.lr, betas=ADAM.betas, eps=ADAM.eps), []
    for step, counts in enumerate(SAMPLES_OF_STEP):
        given, rows = inputs(step, list(range(sum(counts))))
        loss = share(tower(*given), [rows], None)
        losses.append(float(loss.detach()))
        adam.zero_grad()
        loss.backward()
        adam.step()
    return losses, {name: parameter.detach() for name, parameter in tower.named_parameters()}


# ---- what a rank runs ------------------------------------------------------------------------------------------------


def rank_trains(kinds: tuple[str, ...], stage: int, folder: str | None = None):
    encoder_engine.PERSISTENT_NUMEL = 40  # so that the test's small weights are sharded, but for norms and biases
    return {kind: _train(stage, *build(kind, folder)) for kind in kinds}


def _train(stage: int, tower, inputs, share):
    engine = EncoderEngine(tower, dict(tower.named_children()), zero_stage=stage, precision="fp32", adam=ADAM)
    losses = []
    for step, counts in enumerate(SAMPLES_OF_STEP):
        chunks = [inputs(step, samples) for samples in _chunks(counts)]
        losses.append(_accumulate(engine, chunks, share))
        engine.squared_grad_norms()
        engine.step(1.0)
    return losses, whole_state(engine)


def _chunks(counts) -> list[list[int]]:
    """Samples of each chunk of this rank; as many chunks on every rank, blank ones empty."""
    rank = dist.get_rank()
    mine = list(range(sum(counts[:rank]), sum(counts[: rank + 1])))
    most = -(-max(counts) // CHUNK)
    return [mine[CHUNK * chunk : CHUNK * (chunk + 1)] for chunk in range(most)]


def _accumulate(engine, chunks, share) -> float:
    """Encodes all chunks, takes the loss of their outputs, and gives each its gradient; the loss over the world."""
    kept = [engine.encode(*given) for given, _ in chunks]
    rows = [count for _, count in chunks]
    leaves = []
    for parts in zip(*kept, strict=True):
        whole = parts[0] if not parts[0].dim() else torch.cat([part[:n] for part, n in zip(parts, rows, strict=True)])
        leaves.append(whole.detach().clone().requires_grad_())
    rows_of_rank = [None] * dist.get_world_size()
    dist.all_gather_object(rows_of_rank, sum(rows))
    loss = share(leaves, rows_of_rank, dist.group.WORLD)
    loss.backward()
    for place, (outputs, n) in enumerate(zip(kept, rows, strict=True)):
        begin, gradients = sum(rows[:place]), []
        for output, leaf in zip(outputs, leaves, strict=True):
            gradient = torch.zeros_like(output)
            if not output.dim():
                gradient += leaf.grad if place == 0 else 0
            elif n:
                gradient += leaf.grad[begin : begin + n]
            gradients.append(gradient)
        engine.backward(outputs, tuple(gradients))
    total = loss.detach().clone()
    dist.all_reduce(total)
    return float(total)


# ---- tests -----------------------------------------------------------------------------------------------------------

KINDS = ("drop", "token", "contrastive")


@pytest.fixture(scope="module")
def expected():
    return functools.cache(reference)


def assert_same_training(found, expected):
    (losses, state), (wanted_losses, wanted) = found, expected
    assert losses == pytest.approx(wanted_losses, rel=1e-5)
    assert {name for name, part in state if part == "param"} == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(state[name, "param"], tensor, rtol=0, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_five_steps_equal_one_process(stage, expected):
    for result in run_world(rank_trains, 2, KINDS, stage):
        for kind in KINDS:
            assert_same_training(result[kind], expected(kind))


def test_five_steps_with_a_text_tower_of_hugging_face(tmp_path):
    import transformers

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=20)
    words = dict(vocab_size=WORDS, max_position_embeddings=12, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(**sizes, **words)
    transformers.CLIPTextModelWithProjection(config).save_pretrained(tmp_path)
    for result in run_world(rank_trains, 2, ("contrastive",), 3, str(tmp_path)):
        assert_same_training(result["contrastive"], reference("contrastive", str(tmp_path)))


def test_weights_move_far_enough_to_show_a_difference(expected):
    """A parameter that hardly moves would pass above whatever its gradient was."""
    for kind in KINDS:
        start = dict(build(kind)[0].named_parameters())
        for name, tensor in expected(kind)[1].items():
            if "qkv.bias" not in name:
                assert (tensor - start[name]).abs().max() > 2e-4, (kind, name)
