"""A vision encoder at native resolution, a connector, and a language model of one of transformers' families.

    patches of all images -> encoder -> connector -> rows that stand in the place of the image token's embeddings

Images are packed: patches of all images and video frames of a batch lie end to end in the order of their image tokens,
and attention stays inside an image.  Patches come in blocks of merge x merge, whose tokens the connector joins.

Legend: N patches, P values of a patch, I images and frames, D width, H heads, K head width, V visual tokens,
B samples, T tokens.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from .configuration_tandem import TandemConfig, TandemVisionConfig


def new_norm(config: TandemVisionConfig) -> nn.Module:
    kind = nn.RMSNorm if config.norm == "rmsnorm" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.layer_norm_eps)


def activated(h_NX, activation: str):
    if activation == "swiglu":
        gate_NF, up_NF = h_NX.chunk(2, dim=-1)
        return F.silu(gate_NF) * up_NF
    if activation == "quick_gelu":
        return h_NX * torch.sigmoid(1.702 * h_NX)
    return F.gelu(h_NX, approximate="tanh" if activation == "gelu_tanh" else "none")


class Block(nn.Module):
    """Pre-norm attention within each segment and an MLP, with residuals."""

    def __init__(self, config: TandemVisionConfig):
        super().__init__()
        width, hidden, bias = config.hidden_size, config.intermediate_size, config.bias
        self.heads, self.activation = config.num_attention_heads, config.activation
        self.attention_norm = new_norm(config)
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.projection = nn.Linear(width, width, bias=bias)
        self.mlp_norm = new_norm(config)
        self.mlp_up = nn.Linear(width, hidden * (2 if config.activation == "swiglu" else 1), bias=bias)
        self.mlp_down = nn.Linear(hidden, width, bias=bias)

    def forward(self, x_ND, rotation, lengths: list[int]):
        q_NHK, k_NHK, v_NHK = self.qkv(self.attention_norm(x_ND)).unflatten(-1, (3, self.heads, -1)).unbind(1)
        if rotation is not None:
            q_NHK, k_NHK = rotate(q_NHK, *rotation), rotate(k_NHK, *rotation)
        parts = zip(*(tensor.transpose(0, 1).split(lengths, dim=1) for tensor in (q_NHK, k_NHK, v_NHK)), strict=True)
        seen_HNK = torch.cat([F.scaled_dot_product_attention(*part) for part in parts], dim=1)
        x_ND = x_ND + self.projection(seen_HNK.transpose(0, 1).flatten(1))
        return x_ND + self.mlp_down(activated(self.mlp_up(self.mlp_norm(x_ND)), self.activation))


class Positions(nn.Module):
    """Learned positions of a square grid, the class token's first, resized to the grids of images."""

    def __init__(self, config: TandemVisionConfig):
        super().__init__()
        self.first, self.side = int(config.class_token), config.position_grid
        bicubic = config.interpolation == "bicubic"
        self.how = {"mode": "bicubic"} if bicubic else {"mode": "bilinear", "antialias": True}
        self.weight = nn.Parameter(torch.zeros(self.first + self.side**2, config.hidden_size))

    def forward(self, grid_hw: list[int], place_N2: torch.Tensor) -> torch.Tensor:
        """[N, D] of an image's patches, in the order of their places."""
        table_1DGG = self.weight[self.first :].float().T.unflatten(1, (self.side, self.side))[None]
        resized_1Dhw = F.interpolate(table_1DGG, grid_hw, align_corners=False, **self.how)
        y_N, x_N = place_N2.to(self.weight.device).T
        return resized_1Dhw[0, :, y_N, x_N].T.to(self.weight.dtype)


class ClassToken(nn.Module):
    def __init__(self, config: TandemVisionConfig):
        super().__init__()
        self.token = nn.Parameter(torch.zeros(config.hidden_size))


class ViT(nn.Module):
    """Packed images to one feature per patch.

    Patch embedding, positions (2D rotary, or a learned table), blocks, a norm.  The configuration switches on a class
    token per image, a norm before the blocks, and windows, which most blocks' attention then stays in.
    """

    def __init__(self, config: TandemVisionConfig):
        super().__init__()
        self.config, width = config, config.hidden_size
        values = 3 * config.patch_size**2 * config.frames
        self.patch_embedding = nn.Linear(values, width, bias=config.patch_bias)
        self.positions = Positions(config) if config.positions == "learned" else None
        self.class_token = ClassToken(config) if config.class_token else None
        self.pre_norm = new_norm(config) if config.pre_norm else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.final_norm = new_norm(config) if config.final_norm else None

    def forward(self, pixel_values_NP, image_grid_hw_I2):
        config, grids = self.config, image_grid_hw_I2.tolist()
        places = [positions(height, width, config.merge) for height, width in grids]
        images = within = [len(place_N2) for place_N2 in places]
        repeated = pixel_values_NP.repeat(1, config.frames)  # an image is as many equal frames
        x_ND, order_N = self.patch_embedding(repeated.to(self.patch_embedding.weight.dtype)), None
        rotation = None
        if self.positions is not None:
            x_ND = x_ND + torch.cat([self.positions(*image) for image in zip(grids, places, strict=True)])
        if self.class_token is not None:
            token_1D = (self.class_token.token + self.positions.weight[0])[None]  # type: ignore[union-attr]  # none without learned positions
            x_ND = torch.cat([part for image in x_ND.split(images) for part in (token_1D, image)])
            images = within = [patches + 1 for patches in images]
        if config.window:
            order_N, within = windows(places, config.window)
            x_ND = x_ND[order_N]
        if self.positions is None:
            positions_N2 = torch.cat(places)[order_N if order_N is not None else slice(None)].to(x_ND.device)
            rotation = rotary(positions_N2, config.hidden_size // config.num_attention_heads, config.rope_theta)
        if self.pre_norm is not None:
            x_ND = self.pre_norm(x_ND)
        for layer, block in enumerate(self.blocks):
            x_ND = block(x_ND, rotation, images if layer in config.whole_layers else within)
        if self.final_norm is not None:
            x_ND = self.final_norm(x_ND)
        if order_N is not None:
            return torch.empty_like(x_ND).index_copy(0, order_N.to(x_ND.device), x_ND)
        if self.class_token is not None:
            return torch.cat([image[1:] for image in x_ND.split(images)])
        return x_ND


def windows(places: list[torch.Tensor], side: int) -> tuple[torch.Tensor, list[int]]:
    """(order of patches window by window, patches of each window)."""
    order, lengths, first = [], [], 0
    for place_N2 in places:
        _, window_N, patches_W = (place_N2 // side).unique(dim=0, return_inverse=True, return_counts=True)
        order.append(first + window_N.argsort(stable=True))
        lengths += patches_W.tolist()
        first += len(place_N2)
    return torch.cat(order), lengths


def positions(down: int, across: int, merge: int) -> torch.Tensor:
    """(y, x) of every patch of an image [N, 2], block by block, as the image processor cuts it."""
    grid = torch.stack(torch.meshgrid(torch.arange(down), torch.arange(across), indexing="ij"), dim=-1)
    blocks = grid.view(down // merge, merge, across // merge, merge, 2)
    return blocks.transpose(1, 2).reshape(-1, 2)


def rotary(positions_N2, head_width: int, base: float):
    """Cosines and sines [N, 1, K] in fp32: half of the pairs of a head turn with y, half with x."""
    exponent = torch.arange(0, head_width // 2, 2, device=positions_N2.device, dtype=torch.float32) / (head_width // 2)
    angles = (positions_N2.float()[:, :, None] * base**-exponent).flatten(1)
    angles_N1K = torch.cat((angles, angles), dim=-1)[:, None]
    return angles_N1K.cos(), angles_N1K.sin()


def rotate(x_NHK, cos_N1K, sin_N1K):
    """The pairs (i, i + K/2) of every head turned, in fp32."""
    first, second = x_NHK.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_NHK.float() * cos_N1K + turned * sin_N1K).to(x_NHK.dtype)


class PooledMLP(nn.Module):
    """The mean of each block of patches, a norm, and an MLP of two layers, [N, D] to [V, width of the LLM]."""

    def __init__(self, config: TandemConfig):
        super().__init__()
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        self.patches = config.vision_config.merge**2
        self.norm = nn.LayerNorm(width, eps=config.vision_config.layer_norm_eps)
        self.up = nn.Linear(width, out)
        self.down = nn.Linear(out, out)

    def forward(self, features_ND):
        pooled_VD = features_ND.unflatten(0, (-1, self.patches)).mean(dim=1)
        return self.down(F.gelu(self.up(self.norm(pooled_VD)), approximate="tanh"))


ENCODERS = {"vit": ViT}
CONNECTORS = {"mlp": PooledMLP}


class TandemPreTrainedModel(PreTrainedModel):
    config_class: type = TandemConfig
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _supports_flash_attn = True


class TandemVisionModel(TandemPreTrainedModel):
    """The encoder alone."""

    config_class = TandemVisionConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TandemVisionConfig):
        super().__init__(config)
        self.encoder = ENCODERS[config.kind](config)
        self.post_init()

    def forward(self, pixel_values, image_grid_hw, **kwargs) -> BaseModelOutput:
        """Features [N, D] of the patches of all images, end to end."""
        return BaseModelOutput(last_hidden_state=self.encoder(pixel_values, image_grid_hw))


class TandemForConditionalGeneration(TandemPreTrainedModel, GenerationMixin):
    """Images, video frames and text to text."""

    def __init__(self, config: TandemConfig):
        super().__init__(config)
        self.encoder = ENCODERS[config.vision_config.kind](config.vision_config)
        self.adapter = CONNECTORS[config.connector["kind"]](config)
        self.language_model = AutoModelForCausalLM.from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self):
        return self.language_model.get_output_embeddings()

    def get_image_features(self, pixel_values, image_grid_hw):
        """Rows of the language model [V, D] for all images: one for each of their image tokens."""
        return self.adapter(self.encoder(pixel_values, image_grid_hw))

    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        image_grid_hw=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """The language model's output.

        pixel_values [N, P] and image_grid_hw [I, 2] (patches down and across): of the image processor, in the order of
        the image tokens in input_ids [B, T].  Samples may be padded on either side; positions then count from their
        first token.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            rows_VD = self.get_image_features(pixel_values, image_grid_hw)
            at_BT = input_ids == self.config.image_token_id
            if int(at_BT.sum()) != len(rows_VD):
                raise ValueError(f"input_ids has {int(at_BT.sum())} image tokens, the images have {len(rows_VD)}")
            inputs_embeds = inputs_embeds.masked_scatter(at_BT[..., None], rows_VD.to(inputs_embeds.dtype))
        if position_ids is None and attention_mask is not None and attention_mask.dim() == 2:
            position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -inputs_embeds.shape[1] :]
        return self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def prepare_inputs_for_generation(self, input_ids, pixel_values=None, image_grid_hw=None, **kwargs):
        """Images go in with the prompt alone: later steps find them in the cache."""
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        cache = inputs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            inputs |= {"pixel_values": pixel_values, "image_grid_hw": image_grid_hw}
        return inputs

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **kwargs):
        """Several beams or answers of one prompt: its images are repeated with it."""
        pixels_NP, grid_hw_I2 = kwargs.pop("pixel_values", None), kwargs.pop("image_grid_hw", None)
        if pixels_NP is not None:
            patches_I = grid_hw_I2.prod(dim=1)
            ends_I = (patches_I // self.config.vision_config.merge**2).cumsum(0)
            tokens_B = (input_ids == self.config.image_token_id).sum(dim=1)
            ends_B = torch.searchsorted(ends_I, tokens_B.cumsum(0), right=True)  # images up to the end of each sample
            images_B = ends_B.diff(prepend=ends_B.new_zeros(1)).tolist()
            grids = grid_hw_I2.split(images_B)
            pixels = pixels_NP.split([int(grid.prod(dim=1).sum()) for grid in grids])
            kwargs["pixel_values"] = torch.cat([part for part in pixels for _ in range(expand_size)])
            kwargs["image_grid_hw"] = torch.cat([part for part in grids for _ in range(expand_size)])
        images = {key: kwargs.pop(key) for key in ("pixel_values", "image_grid_hw") if key in kwargs}
        input_ids, kwargs = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return input_ids, kwargs | images
