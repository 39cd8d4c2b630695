"""Device memory at the peak of a step, as formulas: of the encoder, and of one pipeline stage of the LLM.

    weights      in the dtype of the activations
    gradients    fp32, what micro-batches and chunks add up in
    optimizer    fp32 weights and both moments, 12 bytes a parameter, divided over data-parallel ranks
    activations  what is kept between forward and backward, by `recompute`
    at hand      the block or layer that is computed: its inside, and gradients on their way; or the loss
    buffers      images and rows that come in, rows and their gradients that go out

What allocator, kernels and communication libraries hold besides is not in here: some 3 to 5 GiB on a CUDA device.
Sizes are those of balanced routing; an expert with twice the tokens needs twice the rows.

Legend: d width, h and g numbers of all query and key/value heads together, f expert width, k experts a token.
"""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from tandem.parallel.kernels.cross_entropy import peak_bytes
from tandem.parallel.kernels.recompute import IN_FLIGHT
from tandem.parallel.layout import Layout
from tandem.train.cost.flops import qk_norm_widths
from tandem.train.models import connectors
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.encoders.vit import SeedViT, ViTConfig
from tandem.train.vision import vision_spec

if TYPE_CHECKING:  # the encoder's memory is counted without Megatron-core
    from tandem.train.models.language.llm_config import LLMConfig

FP32 = 4
OPTIMIZER = 3 * FP32  # weights and two moments of a parameter
POSITION = 2 * 4  # bytes of a patch's place
ARRANGEMENT = 2 * 4 + 2 * 8  # and of its image's grid, its token and its token's row


@dataclass(frozen=True)
class Memory:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    at_hand: int
    buffers: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


# ---- encoder ---------------------------------------------------------------------------------------------------------


def encoder_parameters(config: ViTConfig, llm_width: int, connector: ConnectorConfig | None = None) -> tuple[int, int]:
    """Parameters of (encoder, adapter)."""
    with torch.device("meta"):
        encoder = sum(parameter.numel() for parameter in SeedViT(config).parameters())
    kind, sizes, options = connectors.between(config, connector or ConnectorConfig(), llm_width)
    return encoder, kind.parameters(sizes, options)


def encoder_memory(
    config: ViTConfig,
    connector: ConnectorConfig,
    llm_width: int,
    *,
    chunk_patches: int,
    chunks: int,
    recompute: str,
    zero_stage: int,
    world: int,
    element: int,
) -> Memory:
    """Of one training step of encoder and adapter on one rank: `chunks` of at most `chunk_patches` patches.

    recompute: `parallel.encoder.recompute`; with replay one chunk is in memory, whatever their number.  element: bytes
    of an activation, 2 for bf16.
    """
    parameters = sum(encoder_parameters(config, llm_width, connector))
    d, mlp = config.width, config.mlp_width
    held, kept = (1, "none") if recompute == "replay" else (chunks, recompute)

    def of_blocks(recompute: str, layers: int, patches: int) -> int:
        return activation_bytes(recompute, patches, layers, d, config.heads, mlp, element, config.gated)

    vision = vision_spec(config, connector)
    rows, values = vision.tokens_of(chunk_patches), vision.patch_values
    kind, sizes, options = connectors.between(config, connector, llm_width)
    adapter = rows * element * kind.token_elements(sizes, options)
    ends = chunk_patches * element * (values + d)  # pixels that are embedded, features before the final norm
    if vision.learned:
        ends += chunk_patches * element * config.position_grid**2  # what each row of the table is in a position
    inside = 0 if kept == "none" else of_blocks("none", 1, chunk_patches)
    tables = 0 if vision.learned else chunk_patches * 2 * FP32 * d // config.heads
    places = POSITION + ARRANGEMENT * (not config.plain)
    return Memory(
        weights=parameters * element // (world if zero_stage == 3 else 1),
        gradients=parameters * FP32 // (world if zero_stage > 1 else 1),
        optimizer=parameters * OPTIMIZER // world,
        activations=of_blocks(kept, config.depth, held * chunk_patches) + held * (ends + adapter + tables),
        at_hand=inside + chunk_patches * element * ((3 if config.gated else 2) * mlp + 2 * d),
        buffers=chunks * (chunk_patches * (values + places) + 2 * rows * llm_width * element),
    )


def activation_bytes(
    recompute: str, tokens: int, layers: int, width: int, heads: int, mlp: int, element: int, gated: bool = False
) -> int:
    """Bytes on the device that the backward of a stack of pre-norm blocks (`train.models.layers.blocks`) needs, not
    compiled, beside weights, tables and the one block at hand; `element`: bytes of an activation.

    none       input, two norms (and their statistics), q k v, attention's output and log-sum-exp, sum, MLP twice, with
               a gate four times
    selective  input, q k v, attention's output and log-sum-exp
    full       input
    offload    IN_FLIGHT tensors of the width on their way
    """
    lse, statistics = 4 * heads, 4 * 4
    kept = {
        "none": (8 * width + (4 if gated else 2) * mlp) * element + lse + statistics,
        "selective": 5 * width * element + lse,
        "full": width * element,
        "offload": 0,
    }[recompute]
    flying = IN_FLIGHT * width * element if recompute == "offload" else 0
    return tokens * (layers * kept + flying)


# ---- LLM -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageParameters:
    """Parameters on one rank of a pipeline stage: of experts, and all others."""

    experts: int
    others: int


def stage_parameters(config: "LLMConfig", layout: Layout, stage: int) -> StageParameters:
    """Of pipeline rank `stage`, all its virtual stages together."""
    d, h, g = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    whole = 1 if config.qk_norm_whole else layout.tp  # norms over all heads are cut, those of one head are copied
    layer = (2 * d * h + 2 * d * g) // layout.tp + 2 * d + sum(qk_norm_widths(config)) * whole // layout.tp
    layer += (h + 2 * g) // layout.tp * config.qkv_bias + d * config.output_bias
    sparse, dense = layers_of(config, layout, stage)
    fixed = d * (config.num_experts + config.shared_expert_gate) + 3 * d * config.shared_expert_width // layout.tp
    expert = 3 * d * config.expert_width // layout.etp
    experts = sparse * config.num_experts // layout.ep * expert
    others = (sparse + dense) * layer + sparse * fixed + dense * 3 * d * config.ffn_width // layout.tp
    ends = (stage == 0) + (stage == layout.pp - 1)
    ends -= config.tied_embeddings and layout.pp == 1  # more stages have a copy each
    others += ends * config.padded_vocab(layout.tp) * d // layout.tp + d * (stage == layout.pp - 1)
    return StageParameters(experts, others)


def layers_of(config: "LLMConfig", layout: Layout, stage: int) -> tuple[int, int]:
    """(layers with experts, layers without) of pipeline rank `stage`, all its virtual stages together."""
    part = config.layers // (layout.pp * layout.vpp)
    begins = [(virtual * layout.pp + stage) * part for virtual in range(layout.vpp)]
    sparse = sum(sum(config.sparse[begin : begin + part]) for begin in begins)
    return sparse, part * layout.vpp - sparse


def micro_batches_held(layout: Layout, stage: int, micro_batches: int) -> float:
    """Micro-batches whose activations pipeline rank `stage` holds at once, counted over all its layers.

    1F1B runs pp - stage of them forward before the first backward; interleaved, of parts 1 / vpp as large, twice the
    distance to the last stage, one round of every virtual stage but the last, and one.
    """
    if layout.vpp == 1:
        return min(micro_batches, layout.pp - stage)
    parts = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    return min(micro_batches, parts / layout.vpp)


def layer_bytes(
    config: "LLMConfig", layout: Layout, recompute: str, row_tokens: int, element: int, *, sparse: bool
) -> int:
    """What the backward of one layer needs of a row of `row_tokens`, on a rank that holds 1 / (cp * tp) of them.

    sparse: whether it has experts.

    none       layer input, both norms' outputs, sum; q k v, attention's output and log-sum-exp; routing; rows of the
               experts and their gates
    selective  layer input, q k v, attention's output and log-sum-exp, gates
    full       layer input
    offload    none beside IN_FLIGHT layers' inputs, which the caller adds
    """
    tokens, tp = row_tokens // layout.cp, layout.tp
    d, h, g = config.width, config.heads * config.head_width, config.kv_heads * config.head_width
    if sparse:
        rows, gates = config.top_k * layout.etp, 2 * config.expert_width // layout.etp
        routing = 40 * config.top_k + (8 * config.num_experts if config.aux_loss or config.z_loss else 0)
        shared = config.shared_expert_width
    else:
        rows, gates, routing, shared = 0, 0, 0, config.ffn_width
    lse, statistics = 4 * config.heads, 2 * 4
    # of one token, on all tp ranks together; the norms' and the experts' rows are divided over them by the sequence
    kept = {
        "none": element * (4 * d + 2 * h + 2 * g + rows * (d + gates) + 3 * shared) + lse + statistics + routing,
        "selective": element * (d + 2 * h + 2 * g + rows * gates + 2 * shared) + lse,
        "full": element * d,
        "offload": 0,
    }[recompute]
    return tokens * kept // tp


def stage_memory(
    config: "LLMConfig",
    layout: Layout,
    *,
    stage: int,
    row_tokens: int,
    micro_batches: int,
    recompute: str,
    element: int,
) -> Memory:
    """Of one training step on one rank of pipeline rank `stage`; recompute: `train.recompute`."""
    parameters = stage_parameters(config, layout, stage)
    whole = parameters.experts + parameters.others
    sharded = layout.dp * layout.cp
    expert_sharded = layout.tp * layout.cp * layout.dp // (layout.ep * layout.etp)
    tokens = row_tokens // (layout.cp * layout.tp)
    held, kinds = micro_batches_held(layout, stage, micro_batches), layers_of(config, layout, stage)
    kept = sum(
        count * layer_bytes(config, layout, recompute, row_tokens, element, sparse=sparse)
        for count, sparse in zip(kinds, (True, False), strict=True)
    )
    flying = IN_FLIGHT * tokens * config.width * element if recompute == "offload" else 0
    last = stage == layout.pp - 1
    rows = tokens * config.width * element  # a micro-batch's hidden states, and their gradient
    return Memory(
        weights=whole * element,
        gradients=whole * FP32,
        optimizer=OPTIMIZER * (parameters.others // sharded + parameters.experts // expert_sharded),
        activations=int(held * kept) + flying + last * 2 * rows,
        at_hand=max(
            *(
                _layer_at_hand(config, layout, recompute, row_tokens, element, sparse)
                for count, sparse in zip(kinds, (True, False), strict=True)
                if count
            ),
            last * peak_bytes(tokens * layout.tp, config.width, config.padded_vocab(layout.tp) // layout.tp, element),
        ),
        buffers=2 * rows,
    )


def _layer_at_hand(
    config: "LLMConfig", layout: Layout, recompute: str, row_tokens: int, element: int, sparse: bool
) -> int:
    """A layer made again, gradients of its experts' rows and gates, and the gradient of its largest weight."""
    again = 0 if recompute == "none" else layer_bytes(config, layout, "none", row_tokens, element, sparse=sparse)
    tokens = row_tokens // (layout.cp * layout.tp)
    if sparse:
        rows = config.top_k * layout.etp
        width, inner = config.width, config.expert_width // layout.etp
        weight = config.num_experts // layout.ep * 2 * width * inner
    else:
        rows, width, inner = layout.tp, config.width, config.ffn_width // layout.tp
        weight = 2 * width * inner
    return again + element * (tokens * rows * (2 * width + 3 * inner) + weight)
