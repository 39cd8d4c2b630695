"""What a checkpoint's weights depend on, compared with the settings that load them."""

import dataclasses
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tandem.train.config.architecture import OF_TRAINING, PARTS, architecture, check_architecture
from tandem.train.config.settings import keys
from tandem.train.tasks import find
from tandem.train.tasks import names as tasks
from tests.support import settings

PATH = Path("runs/a/checkpoints/step-00000001")


def refusal(saved: dict, *overrides: str, parts=("encoder", "adapter", "llm")) -> str:
    try:
        check_architecture(settings("stage1", *overrides), saved, parts, PATH)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.llm.rope_base=500.0", "model.llm.rope_base was 10000.0 and is 500.0"),
        ("model.llm.norm_eps=1e-5", "model.llm.norm_eps was 1e-06 and is 1e-05"),
        ("model.llm.top_k=3", "model.llm.top_k was 2 and is 3"),
        ("model.encoder.heads=2", "model.encoder.heads was 4 and is 2"),
        (
            "model.encoder.image_mean=[0.4,0.5,0.5]",
            "model.encoder.image_mean was [0.5, 0.5, 0.5] and is [0.4, 0.5, 0.5]",
        ),
        ("model.connector.merge=1", "model.connector.merge was 2 and is 1"),
    ],
)
def test_a_difference_that_shapes_do_not_show_is_refused_by_name(override, words):
    saved = architecture(settings("stage1"))
    meant = "; what is meant can be named in checkpoint.allow_changed"
    assert refusal(saved, override) == f"checkpoint {PATH}: {words}{meant}"
    assert not refusal(saved)
    assert not refusal(saved, override, f"checkpoint.allow_changed=[{override.partition('=')[0]}]")


def test_only_the_parts_that_are_taken_count():
    saved = architecture(settings("stage1"))
    assert not refusal(saved, "model.llm.rope_base=500.0", parts=("encoder", "adapter"))
    assert "model.encoder.norm_eps" in refusal(saved, "model.encoder.norm_eps=1e-3", parts=("adapter",))


def test_what_training_alone_sees_may_change():
    saved = architecture(settings("stage1"))
    assert not refusal(saved, "model.llm.aux_loss=0.5", "model.encoder.drop_path=0.1", "model.llm.init_std=1")
    assert not OF_TRAINING & saved.keys()
    assert all(any(key == known or known.startswith(f"{key}.") for known in keys()) for key in OF_TRAINING)


def test_a_key_that_is_younger_than_the_checkpoint_had_its_default():
    saved = architecture(settings("stage1"))
    del saved["model.llm.qk_norm"]
    assert not refusal(saved)
    assert "model.llm.qk_norm was False and is True" in refusal(saved, "model.llm.qk_norm=true")
    assert "model.llm.old was 1 and is None" in refusal(saved | {"model.llm.old": 1})


def test_a_checkpoint_that_does_not_say_fits():
    assert not refusal({}, "model.llm.rope_base=500.0")


def test_every_part_of_every_task_has_its_settings():
    parts = {part for task in tasks() for part in find(task).parts}
    assert parts == set(PARTS)


def test_unknown_keys_and_parts_are_refused_before_anything_is_opened():
    from tandem.train.config.checks import check_config

    for override, words in (
        ("checkpoint.allow_changed=[optim.lr]", "checkpoint.allow_changed names optim.lr: no settings of"),
        ("checkpoint.load_from={encodr: runs/a}", "checkpoint.load_from names encodr: parts are encoder, adapter, llm"),
        ("checkpoint.load_from=[runs/a]", "checkpoint.load_from=['runs/a']: must be one place, or places by part"),
        ("checkpoint.load_from={llm: 3}", "must be one place, or places by part"),
        ("checkpoint.load_from={llm: a} checkpoint.load_modules=[llm]", "checkpoint.load_modules=['llm'] with places"),
        ("checkpoint.load_from={llm: a} checkpoint.load_optimizer=true", "the moments of several runs do not go"),
    ):
        with pytest.raises(ValueError, match="checkpoint") as refused:
            words_of = override.replace("} ", "}\n").split("\n") if "}" in override else [override]
            check_config(settings("stage1", *words_of), 1)
        assert words in str(refused.value)


def test_it_is_fit_for_json_and_holds_no_section():
    found = architecture(settings("stage1"))
    assert not any(dataclasses.is_dataclass(value) or OmegaConf.is_config(value) for value in found.values())
    assert found["model.connector.options"] == {} and found["model.llm.heads"] == 4
