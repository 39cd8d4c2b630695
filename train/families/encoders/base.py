"""What a family of encoders is: fields of config.json for keys of `model.encoder`, and a table of tensors.

read     config.json of a vision model, or of a model that has one as its vision_config, to our keys
write    our keys to the config.json of the vision model alone
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from tandem.train.families.base import WITHOUT_MEANING
from tandem.train.families.encoders.tensors import Names, tensors
from tandem.train.families.tensors import Form, Tensor
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.layers.blocks import hidden_width

# Keys that are no architecture: choices of a run, and what the folder is chosen by.
CHOICES = ("drop_path", "final_norm", "feature_layer", "folder", "image_mean", "image_std")
PLAIN: dict[str, Any] = {each.name: each.default for each in fields(ViTConfig) if each.name not in CHOICES}
PLAIN |= {"whole_layers": []}
IDLE = {"learned": {"rope_base"}, "rotary": {"position_grid", "interpolation"}}  # keys without an effect
# Of old vision_configs: settings of text generation, and what training without us would use.
OF_OTHERS = WITHOUT_MEANING | {
    "add_cross_attention", "bad_words_ids", "begin_suppress_tokens", "cross_attention_hidden_size",
    "decoder_start_token_id", "diversity_penalty", "do_sample", "early_stopping", "encoder_no_repeat_ngram_size",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "initializer_factor", "is_decoder", "length_penalty", "max_length", "min_length", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "output_scores", "prefix", "projection_dim",
    "pruned_heads", "remove_invalid_values", "repetition_penalty", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder",
    "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torchscript", "typical_p", "use_bfloat16",
    "vision_use_head",
}  # fmt: skip
ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "quick_gelu": "quick_gelu"}


@dataclass(frozen=True)
class EncoderFamily(ABC):
    """One family.

    model_type, architecture, processor: of the vision model alone.  sizes: field of config.json to key of ours, of
    equal value.  defaults: of fields that a folder may leave out.  fixed: fields that must have this value, where they
    are there.  unused: pattern of tensors that are no part of the encoder, to what they are.  prefixes: before names in
    folders of larger models.  final_norm: whether the model's own features are normed, and `either`: whether ours may
    do otherwise.  call: of the model, with what its processor gives, in Python.
    """

    model_type: str
    architecture: str
    processor: str
    sizes: dict[str, str]
    defaults: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    names: Names = field(default_factory=Names)
    prefixes: tuple[str, ...] = ("vision_model.", "")
    final_norm: bool = True
    either: bool = False
    call: str = "model(**inputs)"

    def settings(self, said: dict, feature_layer: int = -1) -> dict[str, Any]:
        """The architecture in keys of `model.encoder`.

        Raises ValueError for a field that is not supported, by name.
        """
        said = said.get("vision_config", said) or {}
        for name, value in self.fixed.items():
            if said.get(name, value) != value:
                raise ValueError(f"config.json: {name}={said[name]!r} is not supported, only {value!r}")
        meant = {*self.sizes, *self.defaults, *self.fixed}
        if unknown := sorted(set(said) - meant - OF_OTHERS):
            raise ValueError(f"config.json: {', '.join(unknown)} of {self.model_type} is not supported")
        said = {**self.defaults, **said}
        out = PLAIN | {key: said[name] for name, key in self.sizes.items()}
        out |= {"mlp_ratio": said["intermediate_size"] / out["width"], **self.read(said)}
        out["depth"] += feature_layer + 1
        return out

    @abstractmethod
    def read(self, said: dict) -> dict[str, Any]:
        """Keys of ours that are no field's own value; every field is there."""

    @abstractmethod
    def write(self, model: ViTConfig) -> dict[str, Any]:
        """The fields that `read` reads."""

    def config(self, model: ViTConfig, dtype: str) -> dict[str, Any]:
        """The config.json of a model, of all its layers."""
        out = {"architectures": [self.architecture], "model_type": self.model_type, "dtype": dtype}
        out |= {**self.defaults, **self.fixed, **{name: getattr(model, key) for name, key in self.sizes.items()}}
        return out | {"intermediate_size": model.mlp_width, **self.write(model)}

    def preprocessor(self, model: ViTConfig) -> dict[str, Any]:
        """The preprocessor_config.json: how transformers makes pixels for this model."""
        scale = {"do_convert_rgb": True, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}
        pixels = {"image_mean": list(model.image_mean), "image_std": list(model.image_std)}
        return {"image_processor_type": self.processor, **self.processor_sizes(model), **scale, **pixels}

    @abstractmethod
    def processor_sizes(self, model: ViTConfig) -> dict[str, Any]:
        """Fields of the preprocessor_config.json on sizes of images."""

    def holds(self, model: ViTConfig) -> bool:
        """Whether a model is one of this family: whether what it is written as is read as the same."""
        try:
            found = self.settings(self.config(model, "float32"))
        except ValueError:
            return False
        same = hidden_width(model.width, found.pop("mlp_ratio")) == model.mlp_width
        same &= all(getattr(model, key) == found[key] for key in found.keys() - IDLE[model.positions])
        return same and (self.either or model.final_norm is self.final_norm)

    # ---- tensors

    @abstractmethod
    def patch(self, model: ViTConfig) -> Form | None:
        """Form of the patch embedding's rows."""

    def tensors(self, model: ViTConfig) -> Iterator[Tensor]:
        """Every tensor of the encoder, by our names."""
        return tensors(model, self.names, self.patch(model))

    def fills(self, model: ViTConfig) -> dict[str, tuple[tuple[int, ...], float]]:
        """(shape, value) of tensors that the class has and the encoder lacks, by name; they do not touch features."""
        if not self.either or model.final_norm:
            return {}
        return {
            f"{self.names.final_norm}.{kind}": ((model.width,), value)
            for kind, value in (("weight", 1.0), ("bias", 0.0))
        }

    def left_out(self, names: Iterable[str], model: ViTConfig) -> dict[str, str]:
        """Of surplus tensors of a folder those that are no part of this encoder, and why."""
        reasons = dict(self.unused)
        if not model.final_norm:
            reasons[re.escape(self.names.final_norm)] = "model.encoder.final_norm=false"
        if model.feature_layer < -1:
            above = (model.depth + place for place in range(-1 - model.feature_layer))
            layers = "|".join(re.escape(self.names.layer.format(layer=layer)) for layer in above)
            reasons[layers] = f"model.encoder.feature_layer={model.feature_layer}"
        found = {}
        for name in names:
            bare = next(name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix))
            if why := next((why for pattern, why in reasons.items() if re.match(pattern, bare)), None):
                found[name] = why
        return found


def square(said: dict, name: str) -> int:
    """A size that may be written once or as an equal pair."""
    if (value := said[name]) is None:
        raise ValueError(f"config.json: {name} is missing")
    sides = {*value} if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise ValueError(f"config.json: {name}={value} is not supported, only squares")
    return sides.pop()


def activation(said: dict) -> str:
    """Our name of `hidden_act`."""
    if said["hidden_act"] not in ACTIVATIONS:
        may = ", ".join(ACTIVATIONS)
        raise ValueError(f"config.json: hidden_act={said['hidden_act']!r} is not supported, only {may}")
    return ACTIVATIONS[said["hidden_act"]]


def hidden_act(model: ViTConfig) -> str:
    """Their name of our activation.  Raises ValueError for one that they lack."""
    for theirs, ours in ACTIVATIONS.items():
        if ours == model.activation:
            return theirs
    raise ValueError(f"it has no {model.activation}")
