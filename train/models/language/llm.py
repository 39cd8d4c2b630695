"""The LLM: Megatron-core's GPTModel with RMSNorm, GQA, SwiGLU and a Mixture of Experts, fed with visual rows.

Its embedding output takes rows that come from the encoder at the places of visual tokens, its rotary positions come
from the row's own position table, in any context-parallel split, and its loss comes straight from the last hidden
states.  What its layers are made of is `llm_spec.py`.

Legend: S tokens of a micro-batch on this cp rank, U visual rows on this rank.
"""

from dataclasses import dataclass, replace

from megatron.core.models.gpt.gpt_model import GPTModel

from tandem.parallel.comm.context import PackedRow
from tandem.parallel.kernels.cross_entropy import linear_cross_entropy
from tandem.parallel.layout import Layout
from tandem.train.models.layers.rotary import axis_angles, tables


@dataclass
class LLMConfig:
    """Sizes of the language model; `num_experts=0` makes it dense with `ffn_width`."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    vocab_size: int
    ffn_width: int
    num_experts: int
    top_k: int
    expert_width: int
    shared_expert_width: int
    aux_loss: float
    z_loss: float
    rope_base: float
    norm_eps: float
    init_std: float

    def check(self, layout: Layout) -> None:
        """Raises ValueError, naming keys and values, where this model does not fit the layout."""
        sizes = ["layers", "width", "heads", "kv_heads", "head_width", "vocab_size"]
        sizes += ["top_k", "expert_width"] if self.num_experts else ["ffn_width"]
        for key, least in {**dict.fromkeys(sizes, 1), "num_experts": 0, "shared_expert_width": 0}.items():
            if getattr(self, key) < least:
                raise ValueError(f"model.llm.{key}={getattr(self, key)}: must be at least {least}")
        if self.head_width % 2:
            raise ValueError(f"model.llm.head_width={self.head_width}: must be even, rotary positions turn pairs")
        rules = (
            ("model.llm.heads", self.heads, "parallel.tp", layout.tp),
            ("model.llm.kv_heads", self.kv_heads, "parallel.tp", layout.tp),
            ("model.llm.vocab_size", self.vocab_size, "parallel.tp", layout.tp),
            ("model.llm.heads", self.heads, "model.llm.kv_heads", self.kv_heads),
            ("model.llm.layers", self.layers, "parallel.pp*vpp", layout.pp * layout.vpp),
        )
        if self.num_experts:
            rules += (
                ("model.llm.num_experts", self.num_experts, "parallel.ep", layout.ep),
                ("model.llm.expert_width", self.expert_width, "parallel.etp", layout.etp),
                ("model.llm.shared_expert_width", self.shared_expert_width, "parallel.tp", layout.tp),
            )
        else:
            rules += (("model.llm.ffn_width", self.ffn_width, "parallel.tp", layout.tp),)
        for key, value, by, divisor in rules:
            if value % divisor:
                raise ValueError(f"{key}={value} is not divisible by {by}={divisor}")
        if self.num_experts and self.top_k == 1:
            raise ValueError("model.llm.top_k=1: the weight of a single expert is 1, so its router would not learn")
        if self.num_experts and self.top_k > self.num_experts:
            raise ValueError(f"model.llm.top_k={self.top_k} is more than model.llm.num_experts={self.num_experts}")
        if not self.num_experts and layout.ep > 1:
            raise ValueError(f"parallel.ep={layout.ep} with model.llm.num_experts=0: there are no experts to divide")


class VisualGPT(GPTModel):
    """GPTModel whose embedding output takes visual rows at given places, and whose loss never has a row's logits."""

    def forward(self, tokens_1S, labels_1S, row: PackedRow, visual_UD=None, at_U=None):
        """Per-token loss [1, S] on the last stage (without labels, logits of all words); hidden states on the others.

        visual_UD: rows for this rank's slice of the sequence, at_U their local places; both None past the first stage.
        """
        angles = axis_angles(row.positions_S, self.config.kv_channels, self.rotary_base)
        row = replace(row, tables_2SK=tables(angles))
        embedded = None
        if self.pre_process:
            embedded = self.embedding(input_ids=tokens_1S, position_ids=None)  # [S / tp, 1, D]
            embedded = embedded.index_copy(0, at_U, visual_UD.to(embedded.dtype)[:, None])
        return super().forward(
            input_ids=tokens_1S,
            position_ids=None,
            attention_mask=None,
            decoder_input=embedded,
            labels=labels_1S,
            packed_seq_params=row,
            runtime_gather_output=labels_1S is None,
        )

    def _postprocess(self, hidden_states, labels, **others):
        """The loss in place of Megatron-core's, which makes all logits first."""
        if not self.post_process or labels is None:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, **others)
        losses_S = linear_cross_entropy(
            hidden_states[:, 0],
            self.output_layer.weight,
            labels[0],
            self.pg_collection.tp,
            sequence_parallel=self.config.sequence_parallel,
        )
        return losses_S[None]
