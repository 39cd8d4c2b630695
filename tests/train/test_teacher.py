"""Teachers against the libraries that made them, patch by patch.

Where a picture has the teacher's own size nothing is resized: features are transformers' own, to fp32 rounding.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file
from transformers.utils import import_utils

from tandem.data.vision import VisionSpec
from tandem.train.models.encoders.vit import SeedViT, ViTConfig
from tandem.train.models.layers.initial import initialize
from tandem.train.models.pretrained import hugging_face
from tandem.train.models.pretrained.teacher import load_teacher
from tests.train.folders import saved_models, write
from tests.train.toys import CPU, pack_pictures, packed, pictures, random_images

SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
FIXED = dict(**SIZES, image_size=56, patch_size=14)
CLIP = (torch.tensor(hugging_face.CLIP_MEAN), torch.tensor(hugging_face.CLIP_STD))
HALF = (torch.full((3,), 0.5),) * 2
IMAGENET = (torch.tensor(hugging_face.IMAGENET_MEAN), torch.tensor(hugging_face.IMAGENET_STD))


def clip():
    return transformers.CLIPVisionConfig(**FIXED, projection_dim=20)


def whole(config_class, **vision):
    text = dict(**SIZES, vocab_size=60, bos_token_id=0, eos_token_id=1, pad_token_id=1)
    return config_class(text_config=text, vision_config={**FIXED, **vision}, projection_dim=20)


def clip_features(model, pixels):
    hidden = model.vision_model(pixels).last_hidden_state[:, 1:]
    return model.visual_projection(model.vision_model.post_layernorm(hidden))


def patch_tokens(model, pixels):
    return model(pixels).last_hidden_state[:, -16:]


def normed_tokens(model, pixels):
    return model.post_layernorm(patch_tokens(model, pixels))


MODELS = {  # how it is made, what transformers itself gives for the patches, and its width, mean and deviation
    "CLIP": (lambda: transformers.CLIPVisionModelWithProjection(clip()), clip_features, 20, CLIP),
    "a whole CLIP": (lambda: transformers.CLIPModel(whole(transformers.CLIPConfig)), clip_features, 20, CLIP),
    "CLIP without projection": (lambda: transformers.CLIPVisionModel(clip()), normed_tokens, 32, CLIP),
    "SigLIP": (
        lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**FIXED)),
        patch_tokens,
        32,
        HALF,
    ),
    "a whole SigLIP": (
        lambda: transformers.SiglipModel(whole(transformers.SiglipConfig)),
        lambda model, pixels: patch_tokens(model.vision_model, pixels),
        32,
        HALF,
    ),
    "DINOv2": (
        lambda: transformers.Dinov2Model(transformers.Dinov2Config(**FIXED)),
        patch_tokens,
        32,
        IMAGENET,
    ),
    "ViT": (lambda: transformers.ViTModel(transformers.ViTConfig(**FIXED)), patch_tokens, 32, HALF),
    "ViT-MSN": (lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**FIXED)), patch_tokens, 32, HALF),
    "BEiT": (lambda: transformers.BeitModel(transformers.BeitConfig(**FIXED)), patch_tokens, 32, HALF),
    "data2vec": (
        lambda: transformers.Data2VecVisionModel(transformers.Data2VecVisionConfig(**FIXED)),
        patch_tokens,
        32,
        HALF,
    ),
    "I-JEPA": (lambda: transformers.IJepaModel(transformers.IJepaConfig(**FIXED)), patch_tokens, 32, HALF),
}


OUTSIDE = "facebook/dinov2-base"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    def uneven(model):
        for name, parameter in model.named_parameters():  # norms that do nothing could be left out unseen
            if "norm" in name:
                torch.nn.init.normal_(parameter, 0.5)

    return saved_models(tmp_path_factory, {kind: build for kind, (build, *_) in MODELS.items()}, uneven)


def in_patch_order(plain_CHW, grid):
    """[C, h, w] as rows in the order of our patches."""
    y, x = VisionSpec().positions([grid]).T
    return plain_CHW[:, y, x].T


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_features_are_those_of_transformers(kind, folders):
    """For two pictures of the teacher's size, and one that it sees squeezed and answers for on another grid."""
    (folder, model), (_, features_of, width, (mean, std)) = folders(kind), MODELS[kind]
    teacher = load_teacher(folder, CPU, torch.float32, VisionSpec())
    images, grids = pack_pictures(raw := pictures([(56, 56), (84, 28), (56, 56)]))
    found = teacher.features(images, grids).split(grids.prod(1).tolist())
    assert teacher.width == width
    for picture, grid, rows in zip(raw, grids, found, strict=True):
        pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float()
        pixels = F.interpolate(pixels, (56, 56), mode="bilinear", antialias=True)  # changes nothing at its own size
        with torch.no_grad():
            plain_1NC = features_of(model, (pixels / 255 - mean[:, None, None]) / std[:, None, None])
        plain_CHW = plain_1NC[0].T.unflatten(1, (4, 4))
        plain_CHW = F.interpolate(plain_CHW[None], tuple(grid), mode="bilinear", align_corners=False)[0]
        torch.testing.assert_close(rows, in_patch_order(plain_CHW, grid), rtol=0, atol=1e-5)


def test_an_image_is_the_same_whatever_is_beside_it(folders):
    """Also behind the border of a batch of the teacher's."""
    teacher = load_teacher(folders("CLIP")[0], CPU, torch.float32, VisionSpec())
    raw = pictures([(28, 28)] * 70 + [(56, 84), (28, 56), (56, 84)])
    images, grids = pack_pictures(raw)
    together = teacher.features(images, grids).split(grids.prod(1).tolist())
    for place in (0, 63, 64, 69, 70, 71, 72):
        alone_NC = teacher.features(*pack_pictures([raw[place]]))
        torch.testing.assert_close(together[place], alone_NC, rtol=0, atol=1e-5)


def test_a_teacher_is_frozen_and_takes_the_precision_of_the_run(folders):
    teacher = load_teacher(folders("CLIP")[0], CPU, torch.bfloat16, VisionSpec())
    images, grids = pack_pictures(pictures([(56, 56)]))
    features_NC = teacher.features(images, grids)
    assert features_NC.dtype == torch.float32 and not features_NC.requires_grad
    exact_NC = load_teacher(folders("CLIP")[0], CPU, torch.float32, VisionSpec()).features(images, grids)
    assert not torch.equal(features_NC, exact_NC)
    assert torch.cosine_similarity(features_NC, exact_NC).min() > 0.99


def test_mean_and_deviation_are_read_beside_the_weights(tmp_path, folders):
    folders("CLIP")[1].save_pretrained(tmp_path)
    images, grids = pack_pictures(pictures([(56, 56)]))
    default_NC = load_teacher(tmp_path, CPU, torch.float32, VisionSpec()).features(images, grids)
    said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    one_NC = load_teacher(tmp_path, CPU, torch.float32, VisionSpec()).features(images, grids)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    assert torch.equal(load_teacher(tmp_path, CPU, torch.float32, VisionSpec()).features(images, grids), one_NC)
    assert not torch.equal(one_NC, default_NC)


# ---- ours ------------------------------------------------------------------------------------------------------------

ENCODER = dict(width=32, depth=2, heads=4, mlp_ratio=4.0, rope_base=100.0, norm_eps=1e-6)


def own_run(folder, ema=False, **changes):
    """A run with one checkpoint of the encoder that is returned; with `ema` that is the running mean of another."""
    encoder = SeedViT(ViTConfig(**ENCODER))
    initialize(encoder, seed=3)
    whole = [
        (f"encoder.{name}", kind, tensor, tuple(slice(0, size) for size in parameter.shape))
        for name, parameter in encoder.named_parameters()
        for kind, tensor in (("param", parameter.detach() + ema), ("ema", parameter.detach()))[: 1 + ema]
    ]
    write(folder / "checkpoints", [whole])
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"encoder": {**ENCODER, **changes}}}))
    return encoder


@pytest.mark.parametrize("ema", [False, True])
def test_a_checkpoint_of_ours_teaches_on_the_native_grid(tmp_path, ema):
    encoder, grids = own_run(tmp_path, ema), [[2, 4], [4, 4]]
    images = packed(random_images(grids), grids)
    for path in (tmp_path, tmp_path / "checkpoints" / "step-00000003"):
        teacher = load_teacher(str(path), CPU, torch.float32, VisionSpec())
        with torch.no_grad():
            assert torch.equal(teacher.features(images, np.array(grids)), encoder(images))
        assert teacher.width == 32


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"depth": 3}, "has no param of encoder.blocks.2"),
        ({"width": 48}, "the model wants"),
        ({"width": 33}, "has no usable model.encoder"),
        ({"layers": 2}, "has no usable model.encoder"),
        (None, "config.yaml of the run"),
    ],
    ids=str,
)
def test_runs_that_do_not_fit_are_refused(tmp_path, changes, sentence):
    own_run(tmp_path, **(changes or {}))
    if changes is None:
        (tmp_path / "config.yaml").unlink()
    with pytest.raises(ValueError) as refused:
        load_teacher(tmp_path, CPU, torch.float32, VisionSpec())
    assert sentence in str(refused.value) and len(str(refused.value).splitlines()) == 1


# ---- what cannot teach -----------------------------------------------------------------------------------------------


def spoilt(folder, harm):
    """Does one kind of harm to a model's folder; a dict is written over its configuration."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if harm == "pickle":
        weights.unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif harm == "nothing":
        weights.unlink()
        config.unlink()
    elif harm == "lacking":
        save_file({k: v for k, v in load_file(weights).items() if "post_layernorm" not in k}, weights)
    elif harm == "preprocessor":
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    elif harm == "adapter":
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "openai/clip-vit-large-patch14"}')
    elif isinstance(harm, str):
        config.write_text(harm)
    else:
        config.write_text(json.dumps({**json.loads(config.read_text()), **harm}))


@pytest.mark.parametrize(
    ("kind", "harm", "sentence"),
    [
        ("CLIP", "pickle", "only as a pickle (pytorch_model.bin)"),
        ("CLIP", "nothing", "has no config.json"),
        ("CLIP", "lacking", "has no weights for 2 tensors"),
        ("CLIP", "preprocessor", "preprocessor_config.json cannot be used"),
        ("CLIP", {"image_size": 60}, "image_size=60 is not divisible by patch_size=14"),
        ("CLIP", {"image_size": 84}, "its weights are of other sizes than config.json says"),
        ("ViT", {"image_size": [56, 28]}, "image_size=[56, 28] in config.json: must be one number"),
        ("ViT", {"model_type": "none such", "auto_map": {"AutoModel": "code.Model"}}, "model_type='none such'"),
        ("ViT", {"hidden_size": "wide"}, "config.json cannot be used by transformers"),
        ("ViT", "{", "config.json cannot be read"),
        ("ViT", "[]", "config.json is not an object"),
        ("ViT", "{}", "model_type=None in config.json: must be one of clip, clip_vision_model, siglip"),
        ("ViT", {"model_type": "dpt", "backbone": OUTSIDE}, "model_type='dpt' in config.json: must be one of clip, "),
        ("ViT", {"model_type": "vitpose", "backbone": OUTSIDE}, "model_type='vitpose' in config.json: must be one of"),
        ("ViT", {"backbone": OUTSIDE}, "backbone in config.json can name what is not in the folder"),
        ("CLIP", {"vision_config": {"backbone": OUTSIDE}}, "backbone in config.json can name what is not"),
        ("ViT", {"attn_implementation": "kernels-community/flash-attn"}, "attn_implementation in config.json can name"),
        ("CLIP", "adapter", "holds an adapter (adapter_config.json)"),
        (
            "ViT",
            {"model_type": "timm_wrapper", "architecture": "hf-hub:timm/resnet18.a1_in1k"},
            "architecture='hf-hub:timm/resnet18.a1_in1k' in config.json: must be a name of timm's own",
        ),
        ("ViT", {"model_type": "timm_wrapper", "model_args": {"checkpoint_path": "x.pth"}}, "checkpoint_path in"),
    ],
    ids=str,
)
def test_folders_that_cannot_teach_are_refused(tmp_path, folders, monkeypatch, kind, harm, sentence):
    """And nobody looks for the network, whatever config.json names."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **more: asked.append(address) or [])
    folders(kind)[1].save_pretrained(tmp_path)
    spoilt(tmp_path, harm)
    with pytest.raises(ValueError) as refused:
        load_teacher(tmp_path, CPU, torch.float32, VisionSpec())
    assert str(refused.value).startswith(f"objective.teacher={tmp_path}: ") and sentence in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1 and not asked


def test_the_hub_is_out_of_reach_once_transformers_is_imported():
    """In a process of its own: here the tests have imported it before."""
    import_and_ask = (
        "from tandem.train.models.pretrained.hugging_face import transformers_for; transformers_for('x'); "
        "import huggingface_hub; print(huggingface_hub.constants.HF_HUB_OFFLINE)"
    )
    environment = {key: value for key, value in os.environ.items() if key not in hugging_face.OFFLINE}
    done = subprocess.run([sys.executable, "-c", import_and_ask], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr


def test_timm_is_asked_for_where_a_folder_needs_it(tmp_path, folders):
    """In a process of its own, which finds no timm."""
    folders("CLIP")[1].save_pretrained(tmp_path)
    said = {"architecture": EVA, "num_classes": 20, "pretrained_cfg": {"tag": "merged2b"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    load = (
        "import sys, importlib.util as util, torch; find = util.find_spec; "
        "util.find_spec = lambda name, *rest: None if name == 'timm' else find(name, *rest); "
        "from tandem.data.vision import VisionSpec; from tandem.train.models.pretrained.teacher import load_teacher; "
        "load_teacher(sys.argv[1], torch.device('cpu'), torch.float32, VisionSpec())"
    )
    done = subprocess.run([sys.executable, "-c", load, str(tmp_path)], capture_output=True, text=True)
    assert f"ValueError: objective.teacher={tmp_path}: " in done.stderr
    assert "requires the timm library" in done.stderr.splitlines()[-1]


BERT = dict(**SIZES, vocab_size=60, max_position_embeddings=8)


@pytest.mark.parametrize(
    ("name", "sizes", "sentence"),
    [
        ("Dinov2WithRegisters", FIXED, "gives 21 tokens for an image, where 4 x 4 patches"),
        ("Siglip2Vision", {**SIZES, "patch_size": 14, "num_patches": 16}, "has no fixed resolution"),
        ("DeiT", FIXED, "gives 18 tokens for an image, where 4 x 4 patches"),
        ("Swin", dict(embed_dim=8, depths=[1, 1], num_heads=[1, 2]), "model_type='swin' in config.json: must be one"),
        ("CLIPText", {**BERT, "bos_token_id": 0, "eos_token_id": 1}, "model_type='clip_text_model' in config.json"),
    ],
)
def test_models_whose_grid_cannot_map_are_refused(tmp_path, name, sizes, sentence):
    """Registers or more beside the class token, no fixed grid, windows that shrink the grid, and no images at all."""
    config = getattr(transformers, f"{name}Config")(**sizes)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refused:
        load_teacher(tmp_path, CPU, torch.float32, VisionSpec())
    assert sentence in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_teacher(tmp_path / "nowhere", CPU, torch.float32, VisionSpec())


# ---- timm ------------------------------------------------------------------------------------------------------------

TORCHVISION = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")
EVA = "eva02_enormous_patch14_clip_224"  # the report's teacher, EVA02-CLIP-E
TIMM_SIZES = dict(img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=2)


class AnyClass(type):
    """Of classes that have every attribute: its own name."""

    def __getattr__(cls, name):
        return name


class NoTorchvision(ModuleType):
    """Has a class behind every name."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}") or AnyClass(name, (), {})


@pytest.fixture(scope="module")
def timm():
    """timm and transformers want torchvision beside timm, which has no build for CPUs; the models here use nothing of
    it."""
    with pytest.MonkeyPatch.context() as patch:
        if importlib.util.find_spec("torchvision") is None:
            for name in TORCHVISION:
                patch.setitem(sys.modules, f"torchvision{name}", NoTorchvision(f"torchvision{name}"))
            message = import_utils.BACKENDS_MAPPING["timm"][1]
            patch.setitem(import_utils.BACKENDS_MAPPING, "timm", (lambda: True, message))
            for module in (import_utils, transformers.utils):
                patch.setattr(module, "is_timm_available", lambda: True)
        yield importlib.import_module("timm")


def timm_folder(timm, folder, name):
    """Writes a model as timm's hub has it; returns the model."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=20, **TIMM_SIZES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    save_file(model.state_dict(), folder / "model.safetensors")
    said = {"mean": HALF[0].tolist(), "std": HALF[1].tolist(), "tag": "merged2b" if "eva" in name else "x_ft_in1k"}
    config = {"architecture": name, "num_classes": 20, "model_args": TIMM_SIZES, "pretrained_cfg": said}
    (folder / "config.json").write_text(json.dumps(config))
    return model


def eva_features(w, pixels_3HW):
    """EVA02-CLIP-E by its formulas: norms after each branch, learned positions, class token first, head on patches."""

    def norm(name, x_ND):
        return F.layer_norm(x_ND, x_ND.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(name, x_ND):
        return F.linear(x_ND, w[f"{name}.weight"], w[f"{name}.bias"])

    patches_DHW = F.conv2d(pixels_3HW, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    x_ND = torch.cat([w["cls_token"][0], patches_DHW.flatten(1).T]) + w["pos_embed"][0]
    for layer in range(TIMM_SIZES["depth"]):
        name = f"blocks.{layer}"
        bias = torch.cat([w[f"{name}.attn.q_bias"], torch.zeros(32), w[f"{name}.attn.v_bias"]])
        qkv = F.linear(x_ND, w[f"{name}.attn.qkv.weight"], bias).unflatten(1, (3, 2, 16))
        q, k, v = qkv.permute(1, 2, 0, 3)
        mixed = ((q @ k.transpose(1, 2) / 4).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x_ND = x_ND + norm(f"{name}.norm1", linear(f"{name}.attn.proj", mixed))
        hidden = F.gelu(linear(f"{name}.mlp.fc1", x_ND))
        x_ND = x_ND + norm(f"{name}.norm2", linear(f"{name}.mlp.fc2", hidden))
    return linear("head", norm("norm", x_ND)[1:])


@pytest.mark.parametrize("name", [EVA, "eva02_large_patch14_clip_224", "vit_base_patch16_clip_224"])
def test_a_folder_of_timm_teaches(timm, tmp_path, name):
    """EVA-02-CLIP with its projection; a CLIP that was made a classifier without what is now its classes."""
    model = timm_folder(timm, tmp_path, name)
    images, grids = pack_pictures(raw := pictures([(56, 56)]))
    with torch.no_grad():
        pixels = (torch.from_numpy(raw[0]).permute(2, 0, 1) / 255 - 0.5) / 0.5
        plain_1NC = model.forward_features(pixels[None])[:, 1:]
        plain_1NC = model.head(plain_1NC) if "eva" in name else plain_1NC
        if name == EVA:
            torch.testing.assert_close(eva_features(model.state_dict(), pixels)[None], plain_1NC, rtol=0, atol=2e-5)
    teacher = load_teacher(tmp_path, CPU, torch.float32, VisionSpec())
    wanted_NC = in_patch_order(plain_1NC[0].T.unflatten(1, (4, 4)), [4, 4])
    torch.testing.assert_close(teacher.features(images, grids), wanted_NC, rtol=0, atol=2e-5)
    assert teacher.width == (20 if "eva" in name else 32)
