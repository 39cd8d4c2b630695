"""Teachers against the libraries that made them, patch by patch; and the geometry between two grids.

Where a picture has the teacher's own size nothing is resized: features are transformers' own, to fp32 rounding.
"""

import importlib.util
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file

from data.image import patch_positions, to_patches
from tests.train.folders import write
from tests.train.toys import CPU, packed, random_images
from train.models import hf_vision
from train.models.initial import initialize
from train.models.teacher import load_teacher
from train.models.vit import PackedImages, SeedViT, ViTConfig

HAS_TIMM = importlib.util.find_spec("timm") is not None
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
FIXED = dict(**SIZES, image_size=56, patch_size=14)
CLIP = (torch.tensor(hf_vision.CLIP_MEAN), torch.tensor(hf_vision.CLIP_STD))
HALF = (torch.full((3,), 0.5),) * 2
IMAGENET = (torch.tensor(hf_vision.IMAGENET_MEAN), torch.tensor(hf_vision.IMAGENET_STD))


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
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """folders(kind) -> (folder of a random model, the model)."""
    made = {}

    def of(kind):
        if kind not in made:
            torch.manual_seed(0)
            folder, model = tmp_path_factory.mktemp("teacher"), MODELS[kind][0]().eval()
            for name, parameter in model.named_parameters():  # norms that do nothing could be left out unseen
                if "norm" in name:
                    torch.nn.init.normal_(parameter, 0.5)
            model.save_pretrained(folder)
            made[kind] = folder, model
        return made[kind]

    return of


def pictures(sizes_hw, seed=0):
    """Noise of these sizes in pixels, uint8 [H, W, 3] each."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (height, width, 3), np.uint8) for height, width in sizes_hw]


def pack(pictures_HW3):
    """(packed images, their grids)."""
    grids = np.array([[picture.shape[0] // 14, picture.shape[1] // 14] for picture in pictures_HW3])
    patches_NP = np.concatenate([to_patches(picture, *picture.shape[:2]) for picture in pictures_HW3])
    return PackedImages.of(patches_NP, patch_positions(grids), grids.prod(1), CPU), grids


def in_patch_order(plain_CHW, grid):
    """[C, h, w] as rows in the order of our patches."""
    y, x = patch_positions([grid]).T
    return plain_CHW[:, y, x].T


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_features_are_those_of_transformers(kind, folders):
    """For two pictures of the teacher's size, and one that it sees squeezed and answers for on another grid."""
    (folder, model), (_, features_of, width, (mean, std)) = folders(kind), MODELS[kind]
    teacher = load_teacher(folder, CPU, "fp32")
    images, grids = pack(raw := pictures([(56, 56), (84, 28), (56, 56)]))
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
    teacher = load_teacher(folders("CLIP")[0], CPU, "fp32")
    raw = pictures([(28, 28)] * 70 + [(56, 84), (28, 56), (56, 84)])
    images, grids = pack(raw)
    together = teacher.features(images, grids).split(grids.prod(1).tolist())
    for place in (0, 63, 64, 69, 70, 71, 72):
        alone_NC = teacher.features(*pack([raw[place]]))
        torch.testing.assert_close(together[place], alone_NC, rtol=0, atol=1e-5)


def test_a_teacher_is_frozen_and_takes_the_precision_of_the_run(folders):
    teacher = load_teacher(folders("CLIP")[0], CPU, "bf16")
    images, grids = pack(pictures([(56, 56)]))
    features_NC = teacher.features(images, grids)
    assert features_NC.dtype == torch.float32 and not features_NC.requires_grad
    exact_NC = load_teacher(folders("CLIP")[0], CPU, "fp32").features(images, grids)
    assert not torch.equal(features_NC, exact_NC)
    assert torch.cosine_similarity(features_NC, exact_NC).min() > 0.99


def test_mean_and_deviation_are_read_beside_the_weights(tmp_path, folders):
    folders("CLIP")[1].save_pretrained(tmp_path)
    images, grids = pack(pictures([(56, 56)]))
    default_NC = load_teacher(tmp_path, CPU, "fp32").features(images, grids)
    said = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    one_NC = load_teacher(tmp_path, CPU, "fp32").features(images, grids)
    (tmp_path / "preprocessor_config.json").unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": said}))
    assert torch.equal(load_teacher(tmp_path, CPU, "fp32").features(images, grids), one_NC)
    assert not torch.equal(one_NC, default_NC)


# ---- geometry --------------------------------------------------------------------------------------------------------


def test_pixels_come_back_from_patches():
    raw = pictures([(56, 84), (56, 84)])
    images, _ = pack(raw)
    pixels_n3HW = hf_vision.pixels_of(images.patches_NP, 4, 6)
    assert torch.equal(pixels_n3HW, torch.from_numpy(np.stack(raw)).permute(0, 3, 1, 2))


@pytest.mark.parametrize("grid", [(4, 4), (6, 2), (2, 8), (10, 12)])
def test_grids_span_the_same_picture(grid):
    """A ramp over the picture stays one: at a place's middle stands its height; outside the teacher's outermost
    middles, the outermost value."""
    side = (torch.arange(4) + 0.5) / 4
    ramp_2gg = torch.stack(torch.meshgrid(side, side, indexing="ij"))
    rows_N2 = hf_vision.regridded(ramp_2gg[None], *grid)
    middles = (torch.from_numpy(patch_positions([grid])) + 0.5) / torch.tensor(grid)
    torch.testing.assert_close(rows_N2, middles.clamp(0.125, 0.875), rtol=0, atol=1e-6)


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
        teacher = load_teacher(str(path), CPU, "fp32")
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
        load_teacher(tmp_path, CPU, "fp32")
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
    elif harm == "timm":
        timm = {"architecture": "eva02_base_patch16_clip_224", "num_classes": 20, "pretrained_cfg": {"tag": "merged2b"}}
        config.write_text(json.dumps(timm))
    elif harm == "preprocessor":
        (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
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
        pytest.param("CLIP", "timm", "requires the timm library", marks=pytest.mark.skipif(HAS_TIMM, reason="it is")),
        ("ViT", {"image_size": [56, 28]}, "image_size=[56, 28] in config.json: must be one number"),
        ("ViT", {"model_type": "none such", "auto_map": {"AutoModel": "code.Model"}}, "of no model that transformers"),
    ],
    ids=str,
)
def test_folders_that_cannot_teach_are_refused(tmp_path, folders, kind, harm, sentence):
    folders(kind)[1].save_pretrained(tmp_path)
    spoilt(tmp_path, harm)
    with pytest.raises(ValueError) as refused:
        load_teacher(tmp_path, CPU, "fp32")
    assert str(refused.value).startswith(f"objective.teacher={tmp_path}: ") and sentence in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


SWIN = dict(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2)
BERT = dict(**SIZES, vocab_size=60, max_position_embeddings=8)


@pytest.mark.parametrize(
    ("name", "sizes", "sentence"),
    [
        ("Dinov2WithRegisters", FIXED, "gives 21 tokens for an image, where 4 x 4 patches"),
        ("Swin", SWIN, "gives 16 tokens for an image, where 8 x 8 patches"),
        ("Siglip2Vision", {**SIZES, "patch_size": 14, "num_patches": 16}, "has no fixed resolution"),
        ("Bert", BERT, "bert is not a vision transformer"),
        ("CLIPText", {**BERT, "bos_token_id": 0, "eos_token_id": 1}, "clip_text_model is not a vision transformer"),
    ],
)
def test_models_whose_grid_cannot_map_are_refused(tmp_path, name, sizes, sentence):
    """Registers beside the class token, windows that shrink the grid, no fixed grid, and no images at all."""
    config = getattr(transformers, f"{name}Config")(**sizes)
    getattr(transformers, f"{name}Model")(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError) as refused:
        load_teacher(tmp_path, CPU, "fp32")
    assert sentence in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="there is no such folder"):
        load_teacher(tmp_path / "nowhere", CPU, "fp32")


@pytest.mark.parametrize("name", ["eva02_large_patch14_clip_224", "vit_base_patch16_clip_224"])
def test_a_folder_of_timm_teaches_where_timm_is_installed(tmp_path, name):
    """EVA-02-CLIP with its projection; a CLIP that was made a classifier without what is now its classes."""
    timm = pytest.importorskip("timm")
    sizes = dict(img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=2)
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=20, **sizes).eval()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    said = {"mean": HALF[0].tolist(), "std": HALF[1].tolist(), "tag": "merged2b" if "eva" in name else "x_ft_in1k"}
    config = {"architecture": name, "num_classes": 20, "model_args": sizes, "pretrained_cfg": said}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images, grids = pack(raw := pictures([(56, 56)]))
    with torch.no_grad():
        pixels = torch.from_numpy(raw[0]).permute(2, 0, 1)[None] / 255
        plain_1NC = model.forward_features((pixels - 0.5) / 0.5)[:, 1:]
        plain_1NC = model.head(plain_1NC) if "eva" in name else plain_1NC
    teacher = load_teacher(tmp_path, CPU, "fp32")
    wanted_NC = in_patch_order(plain_1NC[0].T.unflatten(1, (4, 4)), [4, 4])
    torch.testing.assert_close(teacher.features(images, grids), wanted_NC, rtol=0, atol=1e-5)
    assert teacher.width == (20 if "eva" in name else 32)
