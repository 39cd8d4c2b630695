"""Configuration of a vision encoder trained with tandem, and of a language model that sees through one."""

from transformers import AutoConfig, PretrainedConfig


class TandemVisionConfig(PretrainedConfig):
    """A pre-norm ViT at native resolution.

    kind: of the encoder, a key of ENCODERS in the modeling file.  merge: a block of merge x merge patches is contiguous
    in the order of patches.  rope_theta: base of the 2D rotary positions.  image_mean, image_std: by which the image
    processor normalises.  positions: rotary, or learned: a table of position_grid x position_grid that is resized
    (bicubic or antialias).  norm: layernorm or rmsnorm.  activation: gelu_tanh, gelu, quick_gelu or swiglu.  frames:
    that the patch embedding has weights for.  window: patches per side of the windows that attention stays in, 0 for
    none, but in whole_layers.
    """

    model_type = "tandem_vision"
    base_config_key = "vision_config"
    has_no_defaults_at_init = True

    def __init__(
        self,
        kind: str = "vit",
        hidden_size: int = 0,
        num_hidden_layers: int = 0,
        num_attention_heads: int = 1,
        intermediate_size: int = 0,
        layer_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        patch_size: int = 1,
        merge: int = 1,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        positions: str = "rotary",
        position_grid: int = 1,
        interpolation: str = "bicubic",
        class_token: bool = False,
        pre_norm: bool = False,
        final_norm: bool = True,
        norm: str = "layernorm",
        activation: str = "gelu_tanh",
        bias: bool = True,
        patch_bias: bool = True,
        frames: int = 1,
        window: int = 0,
        whole_layers: list[int] | None = None,
        **kwargs,
    ):
        self.kind = kind
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.layer_norm_eps = layer_norm_eps
        self.rope_theta = rope_theta
        self.patch_size = patch_size
        self.merge = merge
        self.image_mean = image_mean
        self.image_std = image_std
        self.positions = positions
        self.position_grid = position_grid
        self.interpolation = interpolation
        self.class_token = class_token
        self.pre_norm = pre_norm
        self.final_norm = final_norm
        self.norm = norm
        self.activation = activation
        self.bias = bias
        self.patch_bias = patch_bias
        self.frames = frames
        self.window = window
        self.whole_layers = whole_layers or []
        super().__init__(**kwargs)


class TandemConfig(PretrainedConfig):
    """An encoder, a connector and a language model of one of transformers' families.

    connector: {"kind": a key of CONNECTORS in the modeling file, "options": settings of this kind alone}.
    image_token_id: the token at the place of every visual token.
    """

    model_type = "tandem"
    has_no_defaults_at_init = True
    sub_configs = {"text_config": AutoConfig, "vision_config": TandemVisionConfig}

    def __init__(self, text_config=None, vision_config=None, connector=None, image_token_id: int = 0, **kwargs):
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        if isinstance(vision_config, dict):
            vision_config = TandemVisionConfig(**vision_config)
        self.text_config = text_config
        self.vision_config = vision_config
        self.connector = connector
        self.image_token_id = image_token_id
        super().__init__(**kwargs)
