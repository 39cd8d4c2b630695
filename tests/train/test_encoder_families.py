"""Encoders of Hugging Face: in, against transformers' own classes in fp32, and out again to the bit."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file

from tandem.train.checkpoints.checkpoint import Reader
from tandem.train.config.checks import check_config
from tandem.train.export import settings as export_settings
from tandem.train.export.hugging_face import content
from tandem.train.export.remote import configuration_tandem, modeling_tandem
from tandem.train.families import encoders
from tandem.train.models.encoders.vit import SeedViT, ViTConfig, normalise
from tests.support import settings
from tests.train.folders import check_each_row_once, write
from tests.train.vision_models import MODELS, SIDE, features, images, model_of, saved

GRIDS = [(SIDE, SIDE), (4, 10), (2, 2), (SIDE, SIDE), (14, 6)]
ALONE = ("siglip", "clip", "siglip2", "qwen2_5_vl")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("encoders")
    for kind in MODELS:
        saved(kind, root)
    return root


def opened(folder: Path, *overrides: str):
    """(settings, our encoder with the folder's weights, the folder)."""
    config = settings("stage1", f"model.encoder.folder='{folder}'", *overrides)
    encoder, found = SeedViT(config.model.encoder), encoders.open_folder(folder, config.model.encoder)
    for name, parameter in encoder.named_parameters():
        parameter.data.copy_(found.read(name, "param", (0,) * parameter.dim(), tuple(parameter.shape)))
    return config, encoder, found


def assert_close(found_ND, wanted_ND):
    assert (found_ND - wanted_ND).abs().max() <= 1e-5 * wanted_ND.abs().max()


@pytest.mark.parametrize("kind", MODELS)
def test_features_of_packed_images_are_those_of_transformers(folders, kind):
    """Images of the model's own size and of others, all in one packing."""
    config, encoder, _ = opened(folders / kind)
    pixels, packed = images(config, GRIDS)
    with torch.no_grad():
        found = encoder(packed).split([h * w for h, w in GRIDS])
    model = model_of(kind)
    for mine_ND, image in zip(found, pixels, strict=True):
        assert_close(mine_ND, features(model, config, image))


@pytest.mark.parametrize("norm", [False, True])
def test_the_second_last_layer_with_or_without_a_norm(folders, norm):
    config, encoder, folder = opened(
        folders / "clip", "model.encoder.feature_layer=-2", f"model.encoder.final_norm={norm}"
    )
    assert config.model.encoder.depth == 2 and "feature_layer=-2" in folder.description
    (image, *_), packed = images(config, GRIDS[:1])
    model = model_of("clip")
    wanted_ND = features(model, config, image, layer=-2)
    with torch.no_grad():
        assert_close(encoder(packed), model.post_layernorm(wanted_ND) if norm else wanted_ND)


@pytest.mark.parametrize("kind", ALONE)
def test_any_box_is_read_alike(folders, kind):
    """As ZeRO cuts them, across the parts of q, k and v and inside the kernel of a convolution."""
    _, encoder, folder = opened(folders / kind)
    for name in ("blocks.1.qkv.weight", "patch_embedding.weight", "blocks.1.mlp_up.weight"):
        whole = dict(encoder.named_parameters())[name].detach()
        start, size = (whole.shape[0] // 3 - 5, 7), (13, 30)
        box = whole[start[0] : start[0] + size[0], start[1] : start[1] + size[1]]
        assert torch.equal(folder.read(name, "param", start, size), box)


@pytest.mark.parametrize("kind", ALONE)
def test_every_number_of_theirs_is_used_once(folders, kind):
    config, encoder, folder = opened(folders / kind)
    family, _ = encoders.of_folder(folders / kind)
    table = list(family.tensors(config.model.encoder))
    assert {tensor.name: tensor.shape for tensor in table} == {
        name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()
    }
    assert check_each_row_once(table) | folder.left_out.keys() == load_file(folders / kind / "model.safetensors").keys()


@pytest.mark.parametrize("kind", ALONE)
def test_what_is_written_is_what_came_in_and_opens(folders, kind, tmp_path):
    config, encoder, _ = opened(folders / kind)
    pieces = [
        (f"encoder.{name}", "param", weight.detach(), tuple(slice(0, size) for size in weight.shape))
        for name, weight in encoder.named_parameters()
    ]
    run = tmp_path / "run" / "checkpoints"
    reader = Reader(write(run, [pieces]))
    out = content(reader, config, "encoder", "fp32")
    for name, text in out.texts.items():
        (tmp_path / name).write_text(text)
    tensors = {name: out.weights.read(name).contiguous() for name in out.weights.shapes}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    filled = encoders.of_folder(folders / kind)[0].fills(config.model.encoder)
    first = load_file(folders / kind / "model.safetensors")
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert tuple(tensor.shape) == out.weights.shapes[name]
        assert name in filled or torch.equal(tensor, first[name]), name
    again, info = transformers.AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(model_of(kind))
    pixels, packed = images(config, [GRIDS[0]])
    with torch.no_grad():
        assert_close(features(again, config, pixels[0]), encoder(packed))
    assert encoders.settings_of(tmp_path) == encoders.settings_of(folders / kind)
    assert run_usage(tmp_path) > 0
    processor, ours = transformers.AutoImageProcessor.from_pretrained(tmp_path), config.model.encoder
    assert list(processor.image_mean) == ours.image_mean and list(processor.image_std) == ours.image_std


def run_usage(folder: Path) -> int:
    """Numbers in the features that the example of the model card prints the shape of."""
    Image.new("RGB", (200, 90), (200, 30, 60)).save(folder / "image.png")
    code = (folder / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    found: dict = {}
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()):
        exec(code, found)
    assert found["features"].isfinite().all()
    return found["features"].numel()


# ---- refused ---------------------------------------------------------------------------------------------------------


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as refused:
        config = settings("stage1", f"model.encoder.folder='{folder}'", *overrides)
        encoders.open_folder(folder, config.model.encoder)
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.fixture
def copy(folders, tmp_path):
    return lambda kind: Path(shutil.copytree(folders / kind, tmp_path / "copy"))


def change(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("siglip", {"model_type": "dinov2"}, "model_type=dinov2: must be one of clip, qwen2_5_vl, siglip, siglip2"),
        ("siglip", {"hidden_act": "relu"}, "hidden_act='relu' is not supported, only gelu_pytorch_tanh, gelu,"),
        ("siglip", {"attention_dropout": 0.1}, "attention_dropout=0.1 is not supported, only 0.0"),
        ("siglip", {"num_channels": 1}, "num_channels=1 is not supported, only 3"),
        ("siglip", {"qk_norm": True}, "qk_norm of siglip_vision_model is not supported"),
        ("siglip", {"image_size": [84, 98]}, "image_size=[84, 98] is not supported, only squares"),
        ("siglip", {"num_hidden_layers": 4}, "the model lacks encoder.layers.3."),
        ("siglip", {"num_hidden_layers": 2}, "the model has no place for encoder.layers.2."),
        ("siglip", {"image_size": 98}, "embeddings.position_embedding.weight has shape [36, 48], config.json says [49"),
        ("siglip2", {"num_patches": 37}, "num_patches=37 is not supported, only squares"),
        ("qwen2_5_vl", {"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters={'rope_type': 'yarn'} is not"),
        ("qwen2_5_vl", {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(copy, kind, fields, words):
    folder = copy(kind)
    change(folder / "config.json", **fields)
    sentence = refusal(folder)
    assert sentence.startswith(f"model.encoder.folder={folder}: ") and words in sentence


def test_pickles_and_empty_folders_are_refused(copy, tmp_path):
    folder = copy("clip")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "holds pytorch_model.bin and no model.safetensors: pickles are not read" in refusal(folder)
    assert "there is no such folder" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("kind", "override", "words"),
    [
        ("clip", "model.encoder.depth=4", "model.encoder.depth=4, but model.encoder.folder={folder} has 3: leave"),
        ("clip", "model.encoder.image_mean=[0.1,0.4,0.6]", "model.encoder.image_mean=[0.1, 0.4, 0.6], but"),
        (
            "siglip",
            "model.encoder.class_token=true",
            "model.encoder.class_token=True, but model.encoder.folder={folder}",
        ),
        ("qwen2_5_vl", "model.encoder.final_norm=true", "has no norm after its layers: leave model.encoder.final_norm"),
        ("clip", "model.encoder.feature_layer=-3", "model.encoder.feature_layer=-3: must be one of -1, -2"),
    ],
)
def test_a_key_that_contradicts_the_folder_is_refused(folders, kind, override, words):
    assert words.format(folder=folders / kind) in refusal(folders / kind, override)


def test_pixels_are_normalised_as_the_folder_says(copy):
    folder = copy("siglip")
    said = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    vision = settings("stage1", f"model.encoder.folder='{folder}'").vision
    assert (vision.mean, vision.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    change(folder / "preprocessor_config.json", do_normalize=False)
    assert "preprocessor_config.json cannot be used: do_normalize=false is not supported" in refusal(folder)
    change(folder / "preprocessor_config.json", do_normalize=True, rescale_factor=0.5)
    assert "rescale_factor=0.5 is not supported, only 1/255" in refusal(folder)


def test_fields_that_a_folder_leaves_out_are_those_of_the_class(copy):
    """Older folders name what differs from the class alone."""
    folder = copy("whole siglip")
    whole = json.loads((folder / "config.json").read_text())
    change(
        folder / "config.json", vision_config={"model_type": "siglip_vision_model"}, text_config=whole["text_config"]
    )
    found = encoders.settings_of(folder)
    assert (found["width"], found["depth"], found["patch_size"], found["position_grid"]) == (768, 12, 16, 14)


def test_an_encoder_is_of_the_family_that_computes_the_same():
    def family(*overrides: str):
        found = encoders.of_model(settings("stage1", *overrides).model.encoder)
        return found and found.model_type

    learned = ["model.encoder.positions=learned", "model.encoder.position_grid=4"]
    assert family() is None and family("model.encoder.norm=rmsnorm") is None
    assert family(*learned) == "siglip_vision_model"
    assert family(*learned, "model.encoder.interpolation=antialias") == "siglip2_vision_model"
    assert family(*learned, "model.encoder.final_norm=false") is None


# ---- our own class ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ALONE)
def test_our_class_computes_the_same(folders, kind):
    """The encoder of an exported model with an LLM, whose positions torch itself resizes."""
    config, encoder, _ = opened(folders / kind)
    connector = config.model.connector
    model = modeling_tandem.TandemVisionModel(
        configuration_tandem.TandemVisionConfig(**export_settings.vision(config.model.encoder, connector))
    )
    model.encoder.load_state_dict(encoder.state_dict())
    _, packed = images(config, GRIDS)
    normalised_NP = normalise(packed.patches_NP, config.model.encoder.image_mean, config.model.encoder.image_std)
    with torch.no_grad():
        assert_close(model.eval()(normalised_NP, torch.tensor(GRIDS)).last_hidden_state, encoder(packed))


# ---- switches without a folder ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("switches", "words"),
    [
        ({"positions": "sinus"}, "model.encoder.positions=sinus: must be one of rotary, learned"),
        ({"activation": "relu"}, "model.encoder.activation=relu: must be one of gelu_tanh, gelu, quick_gelu, swiglu"),
        ({"class_token": True}, "class_token=true with model.encoder.positions=rotary"),
        ({"window": 4, "positions": "learned", "class_token": True}, "class_token=true with model.encoder.window=4"),
        ({"window": -1}, "model.encoder.window=-1: must be patches a side of a window, or 0"),
        ({"whole_layers": [0]}, "model.encoder.whole_layers=[0] without model.encoder.window"),
        (
            {"window": 4, "whole_layers": [2]},
            "model.encoder.whole_layers=[2]: must be rising numbers of layers, from 0",
        ),
        ({"window": 4, "whole_layers": [1, 0]}, "model.encoder.whole_layers=[1, 0]: must be rising"),
        ({"feature_layer": -2}, "model.encoder.feature_layer=-2 without model.encoder.folder"),
        ({"heads": 3}, "model.encoder.width=32 over model.encoder.heads=3: every head needs as many channels"),
    ],
)
def test_switches_that_cannot_be_are_refused(switches, words):
    with pytest.raises(ValueError) as refused:
        ViTConfig(**{"width": 32, "depth": 2, "heads": 2} | switches)
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_masked_modelling_refuses_what_it_cannot_take_apart():
    overrides = ["objective.teacher=nowhere", "model.encoder.positions=learned"]
    with pytest.raises(ValueError, match="model.encoder.positions=learned, .*: task=mim takes patches out of an image"):
        check_config(settings("vit_mim", *overrides), 1)
