"""The VisionSpec of a model's parts: where settings become the plain numbers that data/vision.py reckons with."""

from tandem.data.vision import VisionSpec
from tandem.train.models import connectors
from tandem.train.models.connectors.base import ConnectorConfig
from tandem.train.models.encoders.vit import ViTConfig


def vision_spec(
    encoder: ViTConfig, connector: ConnectorConfig | None = None, llm_width: int = 0, **limits: int
) -> VisionSpec:
    """limits: min_patches and max_patches of an image.  Without a connector it is the default one, of no cost.

    Raises ValueError, naming the key, for settings that cannot work.
    """
    connector = connector or ConnectorConfig()
    token_flops = 0
    if llm_width:
        kind, sizes, options = connectors.between(encoder, connector, llm_width)
        token_flops = kind.token_flops(sizes, options)
    return VisionSpec(
        patch_size=encoder.patch_size,
        merge=connector.merge,
        mean=tuple(encoder.image_mean),
        std=tuple(encoder.image_std),
        width=encoder.width,
        depth=encoder.depth,
        mlp_width=encoder.mlp_width,
        mlp_matrices=3 if encoder.gated else 2,
        token_flops=token_flops,
        class_tokens=int(encoder.class_token),
        window=encoder.window,
        whole_layers=len(encoder.whole_layers),
        learned=encoder.positions == "learned",
        **limits,
    )
