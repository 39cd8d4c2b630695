"""The VisionSpec of a model's parts: where settings become the plain numbers that data/vision.py reckons with."""

from tandem.data.vision import VisionSpec
from tandem.train.models.encoders.vit import ViTConfig
from tandem.train.models.towers.vision_tower import ConnectorConfig


def vision_spec(
    encoder: ViTConfig, connector: ConnectorConfig | None = None, llm_width: int = 0, **limits: int
) -> VisionSpec:
    """limits: min_patches and max_patches of an image.  Without a connector it is the default one, of no cost."""
    return VisionSpec(
        patch_size=encoder.patch_size,
        merge=(connector or ConnectorConfig()).merge,
        mean=tuple(encoder.image_mean),
        std=tuple(encoder.image_std),
        width=encoder.width,
        depth=encoder.depth,
        mlp_width=int(encoder.width * encoder.mlp_ratio),
        out_width=llm_width,
        **limits,
    )
