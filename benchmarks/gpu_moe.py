"""The MoE slice's rows of benchmarks/gpu.py: ours, and Hugging Face's and Megatron-core's layers of the same sizes.

Legend: T tokens, D width, S places of a sequence, B sequences.
"""

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.gpu_measure import Missing, Place, Variant, Work, relative
from benchmarks.gpu_reference import canonical, canonical_hugging_face, plain_layers
from benchmarks.gpu_tower import HF, RECOMPUTE, TE, choose
from benchmarks.workloads import language
from benchmarks.workloads.tower import random_like
from tandem.train.models.language.llm_config import LLMConfig

TOY = dataclasses.replace(
    language.SLICE,
    layers=2, width=128, heads=4, kv_heads=2, head_width=32, num_experts=8, top_k=2, expert_width=64, vocab_size=512,
)  # fmt: skip
CHECKED = dataclasses.replace(TOY, width=256, head_width=128, expert_width=128)
CHECKED_TOKENS, CHECKED_SEQUENCE = 256, 128
LONG = 131072
MEGATRON = {  # kind of Megatron-core's layers: words of the row, packages
    "te": ("Transformer Engine", TE),
    "te-fused": ("Transformer Engine, router and gradient fusion", TE),
    "local": ("local spec", {}),
}
FLIPS = 4  # times the limit: rounding sends a token in a hundred to another expert


@dataclasses.dataclass(frozen=True)
class Sizes:
    """tokens of each case, and the length of its sequences."""

    config: LLMConfig
    cases: dict[str, tuple[int, int]]


def sizes(place: Place) -> Sizes:
    if place.full:
        whole = language.SEQUENCE
        return Sizes(language.SLICE, {"moe 32k": (4 * whole, whole), "moe 8k": (whole, whole), "moe 4k": (4096, 4096)})
    return Sizes(TOY, {"moe toy": (256, 128)})


def variants(place: Place, world: language.World) -> Iterator[Variant]:
    """Ours and all peers; Megatron-core's local spec, whose scores fill the memory, on the shortest case alone."""
    config, cases = sizes(place).config, sizes(place).cases
    shortest = list(cases)[-1]
    for case, (tokens, sequence) in cases.items():
        yield ours(place, world, case, config, tokens, sequence)
        yield hugging_face(place, case, config, tokens, sequence, "grouped_mm")
        if case in ("moe 8k", "moe toy"):
            yield hugging_face(place, case, config, tokens, sequence, "eager")
        yield megatron(place, world, case, config, tokens, sequence, "te")
        yield megatron(place, world, case, config, tokens, sequence, "te-fused")
        if case == next(iter(cases)) and place.device.type == "cuda":
            yield ours(place, world, case, config, tokens, sequence, kernels="te")
        if case == shortest:
            yield megatron(place, world, case, config, tokens, sequence, "local")


def recompute_table(place: Place, world: language.World) -> Iterator[Variant]:
    config, (tokens, sequence) = sizes(place).config, next(iter(sizes(place).cases.values()))
    for recompute in RECOMPUTE:
        yield ours(place, world, "recompute, moe", config, tokens, sequence, recompute=recompute)


def long_row(place: Place, world: language.World) -> Iterator[Variant]:
    """One sequence as long as stage 2's rows, beside the row of shorter ones to which its time is compared."""
    config, (tokens, sequence) = sizes(place).config, next(iter(sizes(place).cases.values()))
    long = LONG if place.full else 2 * tokens
    yield ours(place, world, "long row", config, tokens, sequence, prefix=f"{tokens:,} tokens, ")
    for recompute in ("none", "full"):
        yield ours(place, world, "long row", config, long, long, recompute=recompute, prefix=f"{long:,} tokens, ")


def ours(
    place: Place,
    world: language.World,
    case: str,
    config: LLMConfig,
    tokens: int,
    sequence: int,
    recompute: str = "none",
    kernels: str = "torch",
    prefix: str = "",
) -> Variant:
    def build() -> Work:
        choose(place)
        built = language.build_language(config, world, place.dtype, tokens, sequence, recompute, kernels)
        return Work(built.step, language.slice_flops(config, tokens, sequence), tokens)

    def error() -> float:
        return our_error(place, world, recompute, kernels)

    needs = TE if kernels == "te" else {}
    return Variant(case, f"{prefix}{kernels} kernels, recompute {recompute}", build, error, needs, slack=FLIPS)


@functools.cache
def our_error(place: Place, world: language.World, recompute: str, kernels: str) -> float:
    choose(place)
    small = (CHECKED_TOKENS, CHECKED_SEQUENCE)
    built = language.build_language(CHECKED, world, place.dtype, *small, recompute, kernels)
    found_T1D = built.forward()
    found_T1D.backward(built.row.gradient_T1D)
    row = built.row
    return stage_error(built.chunk, row.hidden_T1D.flatten(0, 1), row.hidden_T1D.grad, found_T1D, row.gradient_T1D)


def stage_error(
    stage: torch.nn.Module, hidden_TD, hidden_gradient, output, gradient, naming: Callable[[dict], dict] = canonical
) -> float:
    """Of output and gradients of input, of experts and of all other weights, against `plain_layers`.

    hidden_TD and the three after it hold T rows of D in one order.  naming: gives the stage's tensors the reference's
    names.
    """
    tensors = naming(dict(stage.named_parameters()))
    weights = {name: tensor.detach().double().cpu().requires_grad_() for name, tensor in tensors.items()}
    x_TD = hidden_TD.detach().double().cpu().requires_grad_()
    wanted_TD = plain_layers(weights, CHECKED, x_TD, CHECKED_SEQUENCE)
    wanted_TD.backward(gradient.detach().reshape(x_TD.shape).double().cpu())
    gradients = naming({name: getattr(p, "main_grad", p.grad) for name, p in stage.named_parameters()})
    found, wanted = [output.reshape(x_TD.shape), hidden_gradient.reshape(x_TD.shape)], [wanted_TD, x_TD.grad]
    for experts in (False, True):
        names = [name for name in weights if (".fc" in name) is experts]
        found.append(torch.cat([gradients[name].flatten().double().cpu() for name in names]))
        wanted.append(torch.cat([weights[name].grad.flatten() for name in names]))
    return relative(found, wanted)


# ---- peers -----------------------------------------------------------------------------------------------------------


def hugging_face(place: Place, case: str, config: LLMConfig, tokens: int, sequence: int, experts: str) -> Variant:
    """Qwen3-MoE's layers with sdpa, without the norms that ours lack."""

    def build() -> Work:
        stage, hidden_BSD, gradient_BSD = hugging_face_stage(config, place, tokens, sequence, experts)

        def step():
            run_hugging_face(stage, hidden_BSD).backward(gradient_BSD)
            hidden_BSD.grad = None
            stage.zero_grad(set_to_none=True)

        return Work(step, language.slice_flops(config, tokens, sequence), tokens)

    def error() -> float:
        return hugging_face_error(place, experts)

    return Variant(case, f"Hugging Face Qwen3-MoE, {experts} experts", build, error, HF, ours=False, slack=FLIPS)


@functools.cache
def hugging_face_error(place: Place, experts: str) -> float:
    stage, hidden_BSD, gradient_BSD = hugging_face_stage(CHECKED, place, CHECKED_TOKENS, CHECKED_SEQUENCE, experts)
    output_BSD = run_hugging_face(stage, hidden_BSD)
    output_BSD.backward(gradient_BSD)
    several = (hidden_BSD, hidden_BSD.grad, output_BSD, gradient_BSD)
    naming = functools.partial(canonical_hugging_face, config=CHECKED)
    return stage_error(stage, *(x.flatten(0, 1) for x in several), naming)


def run_hugging_face(stage: torch.nn.Module, hidden_BSD: torch.Tensor) -> torch.Tensor:
    return stage(inputs_embeds=hidden_BSD, use_cache=False).last_hidden_state


def hugging_face_stage(
    config: LLMConfig, place: Place, tokens: int, sequence: int, experts: str
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The layers, their input [B, S, D] and the gradient of their output."""
    try:
        from transformers import Qwen3MoeConfig, Qwen3MoeModel
    except ImportError as error:
        raise Missing(f"{error}; {HF['transformers']}") from error
    settings = Qwen3MoeConfig(
        vocab_size=16,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        num_experts=config.num_experts,
        num_experts_per_tok=config.top_k,
        moe_intermediate_size=config.expert_width,
        norm_topk_prob=True,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        max_position_embeddings=sequence,
        experts_implementation=experts,
    )
    settings._attn_implementation = "sdpa"
    with torch.device(place.device):
        stage = Qwen3MoeModel(settings).to(place.dtype)
    stage.norm = torch.nn.Identity()
    for layer in stage.layers:  # theirs normalise queries and keys of every head, ours do not
        layer.self_attn.q_norm = layer.self_attn.k_norm = torch.nn.Identity()
    language.draw_weights(stage, config.init_std)
    shape = (tokens // sequence, sequence, config.width)
    hidden_BSD, gradient_BSD = (random_like(shape, place.device, place.dtype, seed) for seed in (1, 2))
    return stage, hidden_BSD.requires_grad_(), gradient_BSD


def megatron(
    place: Place, world: language.World, case: str, config: LLMConfig, tokens: int, sequence: int, kind: str
) -> Variant:
    """Megatron-core's own GPT layers, of a kind of `MEGATRON`.

    "te-fused" adds to "te" the router's fused kernels and weight gradients that Transformer Engine's products add to
    fp32 buffers (`gradient_accumulation_fusion`; apex's kernel is for the local spec's layers).  The buffers are not
    zeroed between steps, as they are not between the micro-batches of a training step.
    """

    def build() -> Work:
        stage, hidden_SBD, gradient_SBD = megatron_stage(config, world, place.dtype, tokens, sequence, kind)

        def step():
            run_stage(stage, hidden_SBD).backward(gradient_SBD)
            hidden_SBD.grad = None
            take_gradients(stage)

        return Work(step, language.slice_flops(config, tokens, sequence), tokens)

    def error() -> float:
        return megatron_error(place, world, kind)

    words, needs = MEGATRON[kind]
    return Variant(case, f"Megatron-core, {words}", build, error, needs, ours=False, slack=FLIPS)


@functools.cache
def megatron_error(place: Place, world: language.World, kind: str) -> float:
    small = (CHECKED_TOKENS, CHECKED_SEQUENCE)
    stage, hidden_SBD, gradient_SBD = megatron_stage(CHECKED, world, place.dtype, *small, kind)
    output_SBD = run_stage(stage, hidden_SBD)
    output_SBD.backward(gradient_SBD)
    if kind == "te-fused":
        take_gradients(stage)
    several = (hidden_SBD, hidden_SBD.grad, output_SBD, gradient_SBD)
    return stage_error(stage, *(x.transpose(0, 1).reshape(CHECKED_TOKENS, -1) for x in several))


def take_gradients(stage: torch.nn.Module) -> None:
    """What Megatron-core's data-parallel hooks do: gradients that no product has added to `main_grad` are added."""
    for parameter in stage.parameters():
        if hasattr(parameter, "main_grad") and parameter.grad is not None and not parameter.grad_added_to_main_grad:
            parameter.main_grad.add_(parameter.grad)
        parameter.grad = None


def need_router_kernels() -> None:
    """Raises Missing where Transformer Engine is too old to bring the router's fused kernels."""
    from megatron.core.extensions.transformer_engine import fused_topk_with_score_function

    if fused_topk_with_score_function is None:
        raise Missing("fused router kernels; pip install 'transformer-engine[pytorch]>=2.7'")


def foreign_cudnn() -> str:
    """Paths of cuDNN libraries of this process beside those that came with torch, in a package of their own or in its
    folder."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    paths = {line.split(maxsplit=5)[-1] for line in lines if "libcudnn" in line}
    homes = list(torch.__path__)
    with contextlib.suppress(ModuleNotFoundError):
        homes += importlib.import_module("nvidia.cudnn").__path__
    return ", ".join(sorted(outside(paths, homes)))


def outside(paths: Iterable[str], folders: Iterable[str]) -> list[str]:
    """Those that lie in none of the folders, links followed."""
    homes = [Path(folder).resolve() for folder in folders]
    return [path for path in paths if not any(Path(path).resolve().is_relative_to(home) for home in homes)]


def run_stage(stage, hidden_SBD: torch.Tensor) -> torch.Tensor:
    stage.set_input_tensor(hidden_SBD)
    return stage(input_ids=None, position_ids=None, attention_mask=None)


def megatron_stage(
    config: LLMConfig, world: language.World, dtype: torch.dtype, tokens: int, sequence: int, kind: str
) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor]:
    """The layers, their input [S, B, D] and its gradient."""
    fused, all_fused = kind != "local", kind == "te-fused"
    if all_fused:
        need_router_kernels()
    if fused and (others := foreign_cudnn()):
        print(f"    cuDNN not of torch is loaded, which turns fused attention off: {others}; see docs/performance.md")
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings = TransformerConfig(
        num_layers=config.layers,
        hidden_size=config.width,
        num_attention_heads=config.heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.head_width,
        ffn_hidden_size=config.expert_width,
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=world.device.type == "cpu",
        perform_initialization=False,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        num_moe_experts=config.num_experts,
        moe_router_topk=config.top_k,
        moe_ffn_hidden_size=config.expert_width,
        moe_router_load_balancing_type="none",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=fused,
        moe_permute_fusion=fused,
        apply_rope_fusion=fused,
        bias_activation_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,
        moe_router_fusion=all_fused,
        gradient_accumulation_fusion=all_fused,
    )
    if fused:
        spec = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(config.num_experts, moe_grouped_gemm=True)
    else:
        spec = gpt_layer_specs.get_gpt_layer_local_spec(config.num_experts, normalization="RMSNorm")
    stage = GPTModel(
        config=settings,
        transformer_layer_spec=spec,
        vocab_size=config.vocab_size,
        max_sequence_length=sequence,
        pre_process=False,
        post_process=False,
        position_embedding_type="rope",
        rotary_base=config.rope_base,
    ).to(world.device, dtype)
    language.draw_weights(stage, config.init_std)
    for parameter in stage.parameters() if all_fused else ():
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    shape = (tokens // sequence, sequence, config.width)
    hidden_SBD, gradient_SBD = (
        random_like(shape, world.device, dtype, seed).transpose(0, 1).contiguous() for seed in (1, 2)
    )
    return stage, hidden_SBD.requires_grad_(), gradient_SBD
