"""The merger of Qwen2.5-VL (Bai et al. 2025), which its folders hold as a part of the vision tower."""

from typing import Any

from tandem.train.families.connectors.base import ConnectorFamily
from tandem.train.models.connectors.base import ConnectorConfig, Sizes


class Merger(ConnectorFamily):
    def merge(self, said: dict) -> int:
        return (said.get("vision_config") or {}).get("spatial_merge_size", 2)

    def widths(self, said: dict) -> tuple[int | None, int | None]:
        vision, text = said.get("vision_config") or {}, said.get("text_config") or said
        return vision.get("hidden_size"), text.get("hidden_size")

    def fields(self, config: ConnectorConfig, sizes: Sizes) -> dict[str, Any]:
        return {"spatial_merge_size": config.merge, "out_hidden_size": sizes.llm_width}


FAMILY = Merger(
    "qwen2_5_vl",
    "Qwen2_5_VLForConditionalGeneration",
    kind="merger",
    options={"norm": "rms"},
    names={
        "norm.weight": "ln_q.weight",
        "up.weight": "mlp.0.weight",
        "up.bias": "mlp.0.bias",
        "down.weight": "mlp.2.weight",
        "down.bias": "mlp.2.bias",
    },
    prefixes=("visual.merger.", "model.visual.merger."),
)
