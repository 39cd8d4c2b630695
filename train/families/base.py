"""What a family is: fields of config.json for settings of ours, and their names for tensors of ours."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from tandem.train.families.fields import Field, Heads, Rotary, Same
from tandem.train.families.tensors import Names, Tensor, tensors
from tandem.train.models.language.llm_config import DENSE, NOT_OF_THE_MODEL, LLMConfig

# Of config.json: says nothing about the weights or about what they compute.
WITHOUT_MEANING = {
    "architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "initializer_range", "max_position_embeddings", "attention_dropout",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "pretraining_tp", "max_window_layers",
    "_name_or_path", "return_dict", "output_hidden_states", "chunk_size_feed_forward", "id2label", "label2id",
    "is_encoder_decoder", "output_attentions", "problem_type", "_attn_implementation", "auto_map",
}  # fmt: skip
COMMON = (
    Same("num_hidden_layers", "layers"),
    Same("hidden_size", "width"),
    Same("vocab_size", "vocab_size"),
    Same("rms_norm_eps", "norm_eps"),
    Same("tie_word_embeddings", "tied_embeddings"),
)
USUAL: dict[str, Any] = {"hidden_act": "silu", "tie_word_embeddings": False}
OFF = {each.name: each.default for each in fields(LLMConfig) if each.default is not MISSING} | DENSE
OFF = {key: value for key, value in OFF.items() if key not in NOT_OF_THE_MODEL} | {"ffn_width": 0}


@dataclass(frozen=True)
class Family:
    """One family.

    model_type, architecture: as config.json has them.  fields: beside COMMON, `heads` and `rotary`.  always: keys of
    ours that all models of the family have.  fixed: fields that must have this value.  defaults: of fields that a
    folder may leave out.  aliases: other names of fields, to those used here.  names: of tensors.  mtp: layers behind
    the last one predict further tokens (MTP), and are left out.
    """

    model_type: str
    architecture: str
    fields: tuple[Field, ...]
    always: dict[str, Any] = field(default_factory=dict)
    fixed: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    heads: Heads = field(default_factory=Heads)
    rotary: Rotary = field(default_factory=Rotary)
    mtp: bool = False
    names: Names = field(default_factory=Names)

    def settings(self, said: dict) -> dict[str, Any]:
        """Keys of `model.llm` from a config.json.  Raises ValueError for a field that is not supported, by name."""
        fixed = {"hidden_act": "silu", **self.fixed}
        said = {self.aliases.get(name, name): value for name, value in said.items()}
        said = {**USUAL, **fixed, **self.defaults, **said}
        for name, value in fixed.items():
            if said[name] != value:
                raise ValueError(f"config.json: {name}={said[name]!r} is not supported, only {value!r}")
        meant = set(fixed).union(*(each.names for each in self._fields))
        if "layer_types" not in meant and set(said.pop("layer_types", None) or ()) - {"full_attention"}:
            raise ValueError(f"config.json: layer_types of {self.model_type} is not supported, only full_attention")
        if unknown := sorted(set(said) - meant - WITHOUT_MEANING):
            raise ValueError(f"config.json: {', '.join(unknown)} of {self.model_type} is not supported")
        out = OFF | self.always
        for each in self._fields:
            out |= each.read(said)
        return LLMConfig(**out, aux_loss=0.0, z_loss=0.0, init_std=0.0).architecture

    def config(self, model: LLMConfig, dtype: str) -> dict[str, Any]:
        """A config.json of this model, which names no tokens: the weights do not know them."""
        out: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.model_type, "dtype": dtype}
        out |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        out |= {**USUAL, **self.fixed}
        for each in self._fields:
            out |= each.write(model)
        return out | {"use_cache": True}

    def refusal(self, model: LLMConfig) -> str | None:
        """Why this family cannot hold a model, as `config` writes it and `settings` reads it; None where it can."""
        try:
            found = self.settings(self.config(model, "float32"))
        except ValueError as error:
            return str(error)
        for key, ours in model.architecture.items():
            if found[key] != ours:
                return f"its models have {key}={found[key]}, this one {ours}"
        return None

    def tensors(self, model: LLMConfig) -> Iterator[Tensor]:
        """Every tensor of the whole model, by our names."""
        return tensors(model, self.names)

    def left_out(self, names: Iterable[str], model: LLMConfig) -> dict[str, str]:
        """Of surplus tensors of a folder those that the family's own class does not use either, and why."""
        out = {}
        for name in names:
            layer = re.match(r"model\.layers\.(\d+)\.", name)
            if model.tied_embeddings and name == "lm_head.weight":
                out[name] = "tied to the embedding"
            elif self.mtp and layer and int(layer[1]) >= model.layers:
                out[name] = "of layers that predict further tokens (MTP)"
        return out

    @property
    def _fields(self) -> tuple[Field, ...]:
        return (*COMMON, self.heads, self.rotary, *self.fields)
