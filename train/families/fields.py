"""Fields of config.json and our keys that say the same, each way.

Same("intermediate_size", "ffn_width")       one field, one key or several
Rotary(), MRope()                            base, scaling and the share of a head that turns; sections of three axes
Window(), SwitchedWindow()                   a sliding window in all layers, or behind a switch and from a layer on
"""

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, Protocol

from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.rope import NEEDED, check_scaling


class Field(Protocol):
    """names: the fields that are read."""

    @property
    def names(self) -> Set[str]: ...

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        """Keys of `model.llm`.  Raises ValueError for what is not supported, by name."""

    def write(self, model: LLMConfig) -> dict[str, Any]:
        """Fields of config.json: those from which `read` has the model's keys, if any have."""


class Same:
    """A field whose value is that of all these keys."""

    def __init__(self, name: str, *keys: str):
        self._name, self._keys = name, keys

    @property
    def names(self) -> set[str]:
        return {self._name}

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        if self._name not in said:
            raise ValueError(f"config.json: {self._name} is missing")
        return dict.fromkeys(self._keys, said[self._name])

    def write(self, model: LLMConfig) -> dict[str, Any]:
        return {self._name: getattr(model, self._keys[0])}


@dataclass(frozen=True)
class Heads:
    """Query and key heads and their width; `head_dim` and `num_key_value_heads` may be left out, or null.

    any_width: of heads; without, that of the model over their number.
    """

    any_width: bool = True
    names = frozenset({"num_attention_heads", "num_key_value_heads", "head_dim"})

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        for name in ("hidden_size", "num_attention_heads"):
            if name not in said:
                raise ValueError(f"config.json: {name} is missing")
        heads = said["num_attention_heads"]
        kv_heads, width = said.get("num_key_value_heads"), said.get("head_dim") if self.any_width else None
        return {
            "heads": heads,
            "kv_heads": heads if kv_heads is None else kv_heads,
            "head_width": said["hidden_size"] // heads if width is None else width,
        }

    def write(self, model: LLMConfig) -> dict[str, Any]:
        out = {"num_attention_heads": model.heads, "num_key_value_heads": model.kv_heads}
        return out | ({"head_dim": model.head_width} if self.any_width else {})


@dataclass(frozen=True)
class Rotary:
    """Rotary positions, as transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) write them.

    kinds: of scaling that the family's class computes.  share: of a head that turns where the folder does not say;
    None where the class turns whole heads whatever it says.
    """

    kinds: tuple[str, ...] = tuple(NEEDED)
    share: float | None = None
    names = frozenset(
        {"rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "original_max_position_embeddings"}
    )

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        rope = {**(said.get("rope_scaling") or {}), **(said.get("rope_parameters") or {})}
        rope = {name: value for name, value in rope.items() if value is not None}
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        base = rope.pop("rope_theta", said.get("rope_theta", 10000.0))
        share = rope.pop("partial_rotary_factor", said.get("partial_rotary_factor", self.share or 1.0))
        if self.share is None and share != 1:
            raise ValueError(f"config.json: partial_rotary_factor={share} is not supported, only 1.0")
        if kind != "default" and kind not in self.kinds:
            raise ValueError(
                f"config.json: rope_type={kind} is not supported, only {', '.join(('default', *self.kinds))}"
            )
        if kind == "default" and rope:
            raise ValueError(f"config.json: {', '.join(sorted(rope))} of the rotary positions is not supported")
        if "original_max_position_embeddings" in NEEDED.get(kind, ()):
            length = said.get("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
            rope["original_max_position_embeddings"] = length or said.get("max_position_embeddings")
        scaling = None if kind == "default" else {"rope_type": kind, **rope}
        try:
            check_scaling(scaling)
        except ValueError as error:
            raise ValueError(
                f"config.json: {str(error).replace('model.llm.rope_scaling', 'rope_parameters')}"
            ) from None
        return {"rope_base": float(base), "rope_scaling": scaling, "rotary_fraction": float(share)}

    def write(self, model: LLMConfig) -> dict[str, Any]:
        out: dict[str, Any] = {"rope_theta": model.rope_base}
        if model.rope_scaling is not None:
            out["rope_scaling"] = dict(model.rope_scaling)
        if self.share is not None or model.rotary_fraction != 1:
            out["partial_rotary_factor"] = model.rotary_fraction
        return out


@dataclass(frozen=True)
class MRope(Rotary):
    """Rotary positions of three axes, with a section of the frequencies each."""

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        rope = {**(said.get("rope_scaling") or {}), **(said.get("rope_parameters") or {})}
        sections = rope.pop("mrope_section", None)
        if sections is None:
            raise ValueError("config.json: mrope_section of the rotary positions is missing")
        rope = {name: "default" if value == "mrope" else value for name, value in rope.items()}
        return super().read({**said, "rope_parameters": rope, "rope_scaling": None}) | {
            "mrope_sections": list(sections)
        }

    def write(self, model: LLMConfig) -> dict[str, Any]:
        rope = {"rope_type": "default", "rope_theta": model.rope_base, **(model.rope_scaling or {})}
        return {"rope_parameters": rope | {"mrope_section": model.mrope_sections and list(model.mrope_sections)}}


@dataclass(frozen=True)
class Window:
    """A sliding window in every layer; null for none."""

    names = frozenset({"sliding_window"})

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        return {"window": said.get("sliding_window") or 0}

    def write(self, model: LLMConfig) -> dict[str, Any]:
        return {"sliding_window": model.window or None}


@dataclass(frozen=True)
class SwitchedWindow:
    """A sliding window that counts where `use_sliding_window` is true; of Qwen2 and Qwen3 from layer
    `max_window_layers` on (by_layer), else in every layer.  supported: false where the class has windows in other
    layers yet."""

    by_layer: bool = True
    supported: bool = True
    names = frozenset({"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"})

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        on = bool(said.get("use_sliding_window")) and said.get("sliding_window") is not None
        if on and not self.supported:
            raise ValueError("config.json: use_sliding_window=True is not supported, only False")
        first = said.get("max_window_layers", 28) if on and self.by_layer else 0
        layers = range(said["num_hidden_layers"])
        kinds = ["sliding_attention" if on and layer >= first else "full_attention" for layer in layers]
        if (given := said.get("layer_types")) is not None and list(given) != kinds:
            raise ValueError(f"config.json: layer_types={given} is not supported, only {kinds}")
        return {"window": said["sliding_window"] if on else 0, "window_from": first}

    def write(self, model: LLMConfig) -> dict[str, Any]:
        first = {"max_window_layers": model.window_from if model.window else model.layers} if self.by_layer else {}
        return {"use_sliding_window": bool(model.window), "sliding_window": model.window or None, **first}


@dataclass(frozen=True)
class SparseLayers:
    """Which layers have experts: each `decoder_sparse_step`-th that is not in `mlp_only_layers`, here the first few."""

    names = frozenset({"decoder_sparse_step", "mlp_only_layers"})

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        dense = sorted(said.get("mlp_only_layers") or [])
        if dense != list(range(len(dense))):
            raise ValueError(f"config.json: mlp_only_layers={dense} is not supported, only the first layers")
        return {"first_dense_layers": len(dense), "moe_every": said.get("decoder_sparse_step", 1)}

    def write(self, model: LLMConfig) -> dict[str, Any]:
        return {"decoder_sparse_step": model.moe_every, "mlp_only_layers": list(range(model.first_dense_layers))}


@dataclass(frozen=True)
class SharedExperts:
    """A shared expert as wide as `n_shared_experts` others, which have a field of their own."""

    names = frozenset({"n_shared_experts"})

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        count = said.get("n_shared_experts", 1)
        if count < 1:
            raise ValueError(f"config.json: n_shared_experts={count} is not supported, only 1 or more")
        return {"shared_expert_width": count * said["moe_intermediate_size"]}

    def write(self, model: LLMConfig) -> dict[str, Any]:
        return {"n_shared_experts": model.shared_expert_width // model.expert_width}


@dataclass(frozen=True)
class Groups:
    """Groups of experts whose score is the sum of their two best; with one group there is nothing to choose."""

    names = frozenset({"n_group", "topk_group"})

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        groups, top, experts = said.get("n_group", 1), said.get("topk_group", 1), said["num_experts_per_tok"]
        if groups > 1 and experts != 2 * top:
            raise ValueError(
                f"config.json: topk_group={top} with num_experts_per_tok={experts} is not supported, only half of it"
            )
        return {"router_groups": groups, "router_top_groups": top}

    def write(self, model: LLMConfig) -> dict[str, Any]:
        return {"n_group": model.router_groups, "topk_group": model.router_top_groups}


@dataclass(frozen=True)
class Dropped:
    """A field of what is not read: layers that predict further tokens are left out (`train.families.base.Family`)."""

    name: str

    @property
    def names(self) -> set[str]:
        return {self.name}

    def read(self, said: dict[str, Any]) -> dict[str, Any]:
        return {}

    def write(self, model: LLMConfig) -> dict[str, Any]:
        return {self.name: 0}
