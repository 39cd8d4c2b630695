"""The vision tower's rows of benchmarks/gpu.py: attention backends, compilation, recomputation, and an equal peer.

Legend: N patches, P values a patch, D width, I images.
"""

import functools
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu_measure import Missing, Place, Variant, Work, relative
from benchmarks.gpu_reference import dense_features
from benchmarks.workloads import tower
from tandem.data.vision import VisionSpec
from tandem.parallel.kernels import attention, attention_kernels, attention_sdpa, compilation
from tandem.train.models.encoders.vit import ViTConfig

TOY = ViTConfig(width=64, depth=2, heads=2)
CHECKED = ViTConfig(width=128, depth=2, heads=2)  # heads as wide as the full size's
CHECKED_PACK = tower.draw_pack(384, seed=0, smallest=16, largest=200)
BACKENDS = ("flash4", "varlen", "te")
RECOMPUTE = ("none", "selective", "offload", "full")
HF = {"transformers": "pip install 'transformers>=5'"}
FLASH2 = {"flash_attn.flash_attn_interface": "pip install flash-attn --no-build-isolation"}
FLASH4 = {"flash_attn.cute": "pip install --pre flash-attn-4"}
TE = {"transformer_engine.pytorch": "pip install 'transformer-engine[pytorch]'"}
VARLEN = "torch_varlen_flash"  # Hugging Face passes packed sequences to attention whose name holds "flash"
PEERS = {  # Hugging Face's name of the attention: the row's words, packages besides transformers
    "sdpa": ("sdpa", {}),
    VARLEN: ("blocks compiled, varlen of torch", {}),
    "flash_attention_2": ("blocks compiled, flash-attn 2", FLASH2),
    "flash_attention_4": ("blocks compiled, flash-attn 4", FLASH4),
}
BACKEND_NEEDS = {"flash4": FLASH4, "te": TE}


def choose_attention(backend: str, place: Place) -> None:
    """For this process.  Raises Missing where device or installation refuse it."""
    try:
        attention.choose(backend, place.device, place.dtype)
    except ValueError as error:
        raise Missing(str(error)) from error


def choose(place: Place, backend: str = "auto", compiled: bool = True) -> None:
    """Attention's backend and compilation, where the device compiles, for this process; a run's if nothing is given."""
    choose_attention(backend, place)
    compilation.configure("auto" if compiled else "never")


def packs(place: Place) -> dict[str, tower.Pack]:
    if place.full:
        return {"tower 32k": tower.draw_pack(32768), "tower 16k": tower.draw_pack(16384)}
    return {"tower toy": tower.draw_pack(256, seed=0, smallest=16, largest=100)}


def variants(place: Place) -> Iterator[Variant]:
    """Ours in all settings on the largest pack, in the best setting on the others; the peers alike."""
    largest, *others = packs(place).items()
    case, pack = largest
    compiled = place.device.type == "cuda"
    yield ours(place, case, pack, "auto", compiled, "none")
    for kind in PEERS:
        yield peer(place, case, pack, kind)
    if compiled:
        yield ours(place, case, pack, "auto", False, "none")
        for backend in BACKENDS:
            yield ours(place, case, pack, backend, True, "none")
    yield ours(place, case, pack, "auto", compiled, "selective")
    for case, pack in others:
        yield ours(place, case, pack, "auto", compiled, "none")
        for kind in ("sdpa", VARLEN):
            yield peer(place, case, pack, kind)


def recompute_table(place: Place) -> Iterator[Variant]:
    """Ours in the best setting, by what is kept for the backward."""
    pack = next(iter(packs(place).values()))
    for recompute in RECOMPUTE:
        yield ours(place, "recompute, tower", pack, "auto", place.device.type == "cuda", recompute)


def config_of(place: Place) -> ViTConfig:
    return ViTConfig() if place.full else TOY


def ours(place: Place, case: str, pack: tower.Pack, backend: str, compiled: bool, recompute: str) -> Variant:
    config = config_of(place)

    def build() -> Work:
        choose(place, backend, compiled)
        built = tower.build_tower(config, pack, place.device, place.dtype, recompute)
        return Work(built.step, flops=pack.flops(config), tokens=pack.patches)

    def error() -> float:
        return tower_error(place, backend, compiled, recompute)

    name = f"{backend}, {'compiled' if compiled else 'eager'}, recompute {recompute}"
    return Variant(case, name, build, error, BACKEND_NEEDS.get(backend, {}))


@functools.cache
def tower_error(place: Place, backend: str, compiled: bool, recompute: str) -> float:
    """Of features and gradients of a small tower, against a dense one in fp64."""
    choose(place, backend, compiled)
    pack = CHECKED_PACK
    vit = tower.build_vit(CHECKED).to(place.device, place.dtype)
    dense = tower.build_vit(CHECKED).to(place.dtype).double()
    gradient_ND = tower.random_like((pack.patches, CHECKED.width), torch.device("cpu"), place.dtype)
    images = pack.images(torch.device("cpu"))
    features, first = [], 0
    for grid_2, length in zip(pack.grid_I2, pack.lengths_I, strict=True):
        pixels_NP = (images.patches_NP[first : first + length].float() / 127.5 - 1).to(place.dtype).double()
        features.append(dense_features(dense, pixels_NP, torch.from_numpy(VisionSpec().positions(grid_2))))
        first += length
    wanted_ND = torch.cat(features)
    wanted_ND.backward(gradient_ND.double())
    found_ND = vit(pack.images(place.device), recompute)
    found_ND.backward(gradient_ND.to(place.device))
    return relative((found_ND, flat_gradient(vit)), (wanted_ND, flat_gradient(dense)))


def flat_gradient(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.grad.double().cpu().flatten() for p in module.parameters() if p.grad is not None])


# ---- the peer --------------------------------------------------------------------------------------------------------


def peer(place: Place, case: str, pack: tower.Pack, kind: str) -> Variant:
    """Hugging Face's Qwen3-VL tower of the same size, without merger and deep features.

    It adds positions that it interpolates from a table, which is timed and not counted.  With sdpa it runs as it comes:
    every block reads the lengths of the images on the host (`lengths.tolist()`), which waits for the device.  Of all
    other kinds the blocks are compiled, once for all, and what depends on the sizes of the images alone is worked out
    before the first step.
    """
    config, (words, needs) = config_of(place), PEERS[kind]

    def build() -> Work:
        module, step = peer_step(config, pack, place.device, place.dtype, kind)
        adam = torch.optim.AdamW(module.parameters(), fused=place.device.type == "cuda", **tower.ADAM)

        def train_step():
            step()
            adam.step()
            adam.zero_grad(set_to_none=True)

        return Work(train_step, flops=pack.flops(config), tokens=pack.patches)

    def error() -> float:
        return peer_error(place, kind)

    return Variant(case, f"Hugging Face Qwen3-VL tower, {words}", build, error, HF | needs, ours=False)


@functools.cache
def peer_error(place: Place, kind: str) -> float:
    """Of features and gradients of a small one, against itself with sdpa in fp64."""
    module, step = peer_step(CHECKED, CHECKED_PACK, place.device, place.dtype, kind)
    weights, cpu = module.state_dict(), torch.device("cpu")
    exact, exact_step = peer_step(CHECKED, CHECKED_PACK, cpu, torch.float64, "sdpa", weights)
    return relative((step(), flat_gradient(module)), (exact_step(), flat_gradient(exact)))


def peer_step(
    config: ViTConfig,
    pack: tower.Pack,
    device: torch.device,
    dtype: torch.dtype,
    kind: str,
    weights: dict | None = None,
) -> tuple[torch.nn.Module, Callable[[], torch.Tensor]]:
    """The module, and forward and backward of the pack, which returns the features [N, D]."""
    try:
        from transformers import AttentionInterface, vision_utils
        from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
        from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
    except ImportError as error:
        raise Missing(f"{error}; {HF['transformers']}") from error
    AttentionInterface.register(VARLEN, varlen_of_torch)
    settings = Qwen3VLVisionConfig(
        depth=config.depth,
        hidden_size=config.width,
        intermediate_size=int(config.width * config.mlp_ratio),
        num_heads=config.heads,
        patch_size=VisionSpec.patch_size,
        temporal_patch_size=1,
        spatial_merge_size=2,
        deepstack_visual_indexes=[],
    )
    settings._attn_implementation = "sdpa" if kind == VARLEN else kind
    torch.manual_seed(0)
    module = Qwen3VLVisionModel(settings)
    module.config._attn_implementation = kind  # now, as the constructor takes "flash" for a package's name
    module.merger = torch.nn.Identity()
    if weights is not None:
        module.load_state_dict({name: value.cpu() for name, value in weights.items()})
    module = module.to(device, dtype)
    pixels_NP = (pack.images(device).patches_NP.float() / 127.5 - 1).to(dtype)
    grid_I3 = torch.nn.functional.pad(torch.from_numpy(pack.grid_I2), (1, 0), value=1).to(device)
    gradient_ND = tower.random_like((pack.patches, config.width), torch.device("cpu"), dtype).to(device)
    known = {} if kind == "sdpa" else of_sizes_alone(vision_utils, module, grid_I3)
    if known and device.type == "cuda":
        for block in module.blocks:
            block.compile(dynamic=False)

    def step() -> torch.Tensor:
        features_ND = module(pixels_NP, grid_thw=grid_I3, **known).last_hidden_state
        features_ND.backward(gradient_ND)
        return features_ND

    return module, step


def of_sizes_alone(vision_utils, module: torch.nn.Module, grid_I3: torch.Tensor) -> dict[str, torch.Tensor | int]:
    """Arguments of the peer's forward that it would else work out from the images' sizes at every step."""
    merge = module.config.spatial_merge_size
    cu_seqlens, longest = vision_utils.get_vision_attention_seqlens(grid_I3, module.config)
    indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid_I3,
        num_grid_per_side=module.num_grid_per_side,
        mode=module.interpolation_mode,
        align_corners=module.interpolation_align_corners,
        spatial_merge_size=merge,
    )
    return {
        "cu_seqlens": cu_seqlens,
        "max_seqlen": longest,
        "position_ids": vision_utils.get_vision_position_ids(grid_I3, merge),
        "interp_indices": indices,
        "interp_weights": weights,
    }


def varlen_of_torch(_, query_1HNK, key_1HNK, value_1HNK, *, scaling, cu_seq_lens_q, max_length_q, **__):
    """torch's varlen attention by Hugging Face's interface; returns [1, N, H, K] and no weights.

    A CPU has no such kernel: there, where only toys run, sdpa takes its place segment by segment.
    """
    q, k, v = (x[0].transpose(0, 1) for x in (query_1HNK, key_1HNK, value_1HNK))
    if q.device.type == "cpu":
        lengths = cu_seq_lens_q.diff().tolist()
        return attention_sdpa.by_lengths(q, k, v, lengths, lengths, False, scaling, None)[None], None
    segments = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    return attention_kernels.varlen_attn(q, k, v, *segments, scale=scaling)[None], None
