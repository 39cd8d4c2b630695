"""The language model of Qwen2.5-VL: Qwen2 with M-RoPE (Bai et al. 2025)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from tandem.train.families.base import Family
from tandem.train.families.fields import MRope, Same, SwitchedWindow
from tandem.train.models.language.llm_config import LLMConfig

# Of the whole model, where the fields of the text model stand among them.
WHOLE = {"vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
         "vision_token_id"}  # fmt: skip


@dataclass(frozen=True)
class TextModel(Family):
    def settings(self, said: dict) -> dict[str, Any]:
        text = said.get("text_config") or {name: value for name, value in said.items() if name not in WHOLE}
        return super().settings({"tie_word_embeddings": said.get("tie_word_embeddings", False), **text})

    def config(self, model: LLMConfig, dtype: str) -> dict[str, Any]:
        """The text_config."""
        out = super().config(model, dtype)
        del out["architectures"]
        return out | {"model_type": f"{self.model_type}_text"}

    def left_out(self, names: Iterable[str], model: LLMConfig) -> dict[str, str]:
        names = list(names)
        visual = {name: "not of the language model" for name in names if name.startswith(("visual.", "model.visual."))}
        return super().left_out(names, model) | visual


FAMILY = TextModel(
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    fields=(Same("intermediate_size", "ffn_width"), SwitchedWindow()),
    always={"qkv_bias": True},
    defaults={"rms_norm_eps": 1e-5, "num_key_value_heads": 8},
    rotary=MRope(),
)
