"""The toy teacher: a folder that transformers and curate.py read, equal for equal seeds, made of training scans."""

import sys

import numpy as np
import pytest
import torch

from tandem.launch import make_teacher as command
from tandem.train.models.pretrained.clip_similarity import ClipSimilarity, check_clip_folder

STEPS = 2


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers", reason="extra hf")


@pytest.fixture(scope="module")
def teacher(transformers, tmp_path_factory):
    """(folder, scores) of a teacher of a few steps."""
    folder = tmp_path_factory.mktemp("teacher") / "clip"
    return folder, command.make_teacher(folder, steps=STEPS)


def test_the_folder_holds_a_clip_without_pickles(teacher, transformers):
    folder, scores = teacher
    assert not [path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    model = transformers.CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True)
    by_class, by_patches = command.embed_images(model, torch.zeros(3, 3, command.SIDE, command.SIDE))
    assert by_class.shape == by_patches.shape == (3, command.EMBEDDING)
    assert np.isfinite(scores["loss"]) and 0 <= scores["image"] <= 1 and 0 <= scores["patches"] <= 1
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(folder, use_safetensors=True)
    assert vision.visual_projection.weight.shape == (command.EMBEDDING, command.WIDTH)


def test_transformers_prepares_texts_and_curation_prepares_images_as_in_training(teacher, transformers):
    folder, _ = teacher
    check_clip_folder(folder)
    captions = command.Captions(command.Tokenizer(folder / "tokenizer.json"))
    texts = [command.DIGITS[0].format(word) for word in command.WORDS[:10]]
    found = transformers.AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    length = found["input_ids"].shape[1]
    assert torch.equal(found["input_ids"], captions.tokens_C10T[0][:, :length])
    assert torch.equal(found["attention_mask"], captions.real_C10T[0][:, :length])

    scorer = ClipSimilarity(folder)
    digits = command.draw_digits("train", 2, seed=0)
    prepared = scorer.prepare(digits.pixels_I3HW[0].permute(1, 2, 0).numpy())
    pixels_13HW = scorer._preprocessing.pixel_values([prepared])
    assert torch.allclose(pixels_13HW, digits.normalised(torch.tensor([0])), atol=1e-6)


def test_equal_seeds_make_equal_teachers(teacher, tmp_path):
    again = tmp_path / "again"
    command.make_teacher(again, steps=STEPS)
    assert (again / "model.safetensors").read_bytes() == (teacher[0] / "model.safetensors").read_bytes()


def test_a_teacher_that_is_there_is_left_alone(teacher, capsys):
    folder, _ = teacher
    assert command.main([str(folder), "--steps", str(STEPS)]) == 0
    assert "nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{teacher}", "--steps", "3"], "was made with"),
        (["{teacher}/..", "--steps", "3"], "is not empty"),
        (["{new}", "--steps", "0"], "--steps is 0"),
    ],
)
def test_what_cannot_be_made_is_told_in_one_sentence(arguments, words, teacher, tmp_path, capsys):
    words_of = {"teacher": teacher[0], "new": tmp_path / "new"}
    with pytest.raises(SystemExit) as end:
        command.main([argument.format(**words_of) for argument in arguments])
    assert end.value.code == 2
    assert words in capsys.readouterr().err


def test_without_transformers_the_install_command_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"pip install 'tandem\[hf\]'"):
        command.make_teacher(tmp_path / "new", steps=1)
    assert not list(tmp_path.iterdir())
