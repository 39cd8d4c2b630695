"""Qwen2.5-VL whole: encoder, merger and language model from one folder, trained, and back into its own class."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tandem.data.media.text import Tokenizer
from tandem.launch import checkpoint as checkpoint_command
from tandem.parallel.grid import destroy_grid
from tandem.parallel.hybrid_step import forward_only
from tandem.train import families
from tandem.train.build import build_engines
from tandem.train.checkpoints import checkpoint
from tandem.train.config.checks import check_config
from tandem.train.evaluation.answers import answer_forward
from tandem.train.export.settings import whole
from tandem.train.families import connectors
from tandem.train.input.dataset import open_data
from tandem.train.input.rows import row_prefetcher
from tandem.train.models.connectors import between
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import corpus_overrides, read_metrics, settings
from tests.train.folders import check_each_row_once

LAYOUTS = {"one rank": (1, []), "tp2.pp2": (4, ["parallel.tp=2", "parallel.pp=2"]), "cp2": (2, ["parallel.cp=2"])}
NORMS = ("grad_norm", "grad_norm_encoder", "grad_norm_adapter", "grad_norm_llm")
SMALL = ["train.global_batch_size=4", "train.seq_length=256", "data.max_patches=64", "optim.warmup_steps=0"]


@pytest.fixture(scope="module")
def theirs(corpus, tmp_path_factory):
    """(folder, model): tiny, of random weights, with the toy tokenizer's special tokens."""
    import transformers

    tokens = Tokenizer(corpus / "tokenizer.json")
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {
        "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 96, "vocab_size": 384, "bos_token_id": None, "eos_token_id": None, "rope_parameters": rope,
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "out_hidden_size": 64,
        "window_size": 56, "fullatt_block_indexes": [1],
    }  # fmt: skip
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision, image_token_id=tokens.image_id, video_token_id=383,
        vision_start_token_id=tokens.before_ids[0], vision_end_token_id=tokens.after_ids[0],
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).float().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor.uniform_(*((-0.3, 0.3) if name.endswith("bias") else (0.5, 1.5)))
    folder = tmp_path_factory.mktemp("whole") / "model"
    model.save_pretrained(folder)
    processor = transformers.Qwen2VLImageProcessor(image_mean=[0.48, 0.45, 0.4], image_std=[0.27, 0.26, 0.28])
    processor.save_pretrained(folder)
    return folder, model


def words_of(folder: Path, corpus: Path) -> list[str]:
    parts = [f"model.{part}.folder={folder}" for part in ("encoder", "connector", "llm")]
    return [*parts, *SMALL, *corpus_overrides(corpus)]


def train_each(words: list[str], runs: list[tuple[list[str], str]]) -> None:
    for more, out in runs:
        train_run("stage1", [*words, *more], out)
        destroy_grid()


@pytest.fixture(scope="module")
def trained(theirs, corpus, tmp_path_factory) -> Path:
    """By layout a run of three steps; "still", at a rate of 0."""
    root, words = tmp_path_factory.mktemp("runs"), words_of(theirs[0], corpus)
    steps = ["train.steps=3", "optim.lr=1e-3"]
    for layout, (world, sizes) in LAYOUTS.items():
        runs = [([*steps, *sizes], f"{root}/{layout}")]
        if world == 1:
            runs.append((["train.steps=1", "optim.lr=0", "optim.min_lr=0"], f"{root}/still"))
        run_world(train_each, world, words, runs, timeout=300)
    return root


@pytest.mark.parametrize("layout", ["tp2.pp2", "cp2"])
def test_layouts_train_alike(layout, trained):
    mine, one = read_metrics(trained / layout), read_metrics(trained / "one rank")
    assert len(mine) == len(one) == 3
    for found, expected in zip(mine, one, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for norm in NORMS:
            assert found[norm] == pytest.approx(expected[norm], rel=1e-4), norm


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "exported"
    with pytest.raises(SystemExit) as done:
        checkpoint_command.main(["export", str(trained / "still"), str(folder), "--format", "hf"])
    assert not done.value.code
    return folder


def test_what_is_exported_is_what_came_in(theirs, exported):
    import transformers

    again, info = transformers.AutoModelForImageTextToText.from_pretrained(exported, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(again) is type(theirs[1])
    for name, tensor in theirs[1].state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert type(transformers.AutoImageProcessor.from_pretrained(exported)).__name__.startswith("Qwen2VLImageProcessor")


def test_its_language_model_alone_is_no_whole_one(theirs):
    """Our own modeling file has one position a token: the folder would not open."""
    model = settings("stage1", f"model.llm.folder={theirs[0]}").model
    with pytest.raises(ValueError, match=r"model.llm.mrope_sections=\[2, 3, 3\]: .* of a Qwen2_5_VLForConditional"):
        whole(model, families.of_model(model.llm), "fp32", image_token_id=7)


def test_every_number_of_its_connector_is_used_once(theirs):
    family, model = (
        connectors.FAMILIES.find("qwen2_5_vl"),
        settings("stage1", f"model.connector.folder={theirs[0]}").model,
    )
    _, sizes, _ = between(model.encoder, model.connector, model.llm.width)
    names = check_each_row_once(list(family.tensors(sizes)))
    assert {family.prefixes[0] + name for name in names} == {
        name for name in load_file(theirs[0] / "model.safetensors") if name.startswith(family.prefixes)
    }


def test_its_connector_alone_fits_no_other_encoder(theirs):
    model = settings("stage1", f"model.connector.folder={theirs[0]}").model
    _, sizes, _ = between(model.encoder, model.connector, model.llm.width)
    with pytest.raises(ValueError, match="encoder of width 32 and an LLM of width 64, here they have 64 and 64"):
        connectors.open_folder(theirs[0], model.connector, sizes)


def logits_here(words: list[str], run: str) -> list[dict]:
    """Of every sample of a step: tokens, patches, grids and logits (world of one)."""
    config = settings("stage1", "logger.wandb=disabled", *words)
    data = open_data(config)

    def keep_logits(logits_1TV, batch):
        return logits_1TV.new_zeros(()), logits_1TV[0]

    engines = build_engines(
        config, check_config(config, 1), torch.device("cpu"), forward=answer_forward, loss=keep_logits
    )
    checkpoint.load(checkpoint.Reader(checkpoint.resolve(run)), engines, optimizer=False)
    (prepared,) = row_prefetcher(data, config, engines.grid, steps=1)
    rows, plan = forward_only(engines, prepared.batch), prepared.plan
    patches_I = np.split(prepared.images.patches_NP, np.cumsum(prepared.images.patches_I)[:-1])
    patches_of = dict(zip(np.concatenate(prepared.rank_shard.routes.chunks).tolist(), patches_I, strict=True))
    out = []
    for sample in range(plan.length_S.size):
        row, start = int(plan.row_S[sample]), int(plan.start_S[sample])
        here, images = slice(start, start + int(plan.length_S[sample])), np.flatnonzero(plan.image_sample_I == sample)
        out.append(
            {
                "ids": torch.from_numpy(prepared.text[row].tokens[0, here].copy()),
                "grids": plan.grid_hw_I2[images].tolist(),
                "patches": [patches_of[image].copy() for image in images.tolist()],
                "logits": rows[row][here].clone(),
            }
        )
    data.reader.close()
    return out


def test_logits_are_those_of_transformers(theirs, trained, corpus):
    """Packed rows with images, against each sample alone."""
    (samples,) = run_world(logits_here, 1, words_of(theirs[0], corpus), str(trained / "still"), timeout=180)
    model, mean, std = theirs[1], torch.tensor([0.48, 0.45, 0.4]), torch.tensor([0.27, 0.26, 0.28])
    assert len(samples) > 8 and sum(bool(sample["grids"]) for sample in samples) > 4
    for sample in samples:
        ids = sample["ids"][None]
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if sample["grids"]:
            patches_NYXC = torch.from_numpy(np.concatenate(sample["patches"])).float().unflatten(1, (14, 14, 3)) / 255
            patches_NCFYX = ((patches_NYXC - mean) / std).permute(0, 3, 1, 2)[:, :, None].expand(-1, -1, 2, -1, -1)
            inputs["pixel_values"] = patches_NCFYX.flatten(1)
            inputs["image_grid_thw"] = torch.tensor([[1, *grid] for grid in sample["grids"]])
            inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
        with torch.no_grad():
            wanted = model(**inputs).logits[0]
        assert (sample["logits"] - wanted).abs().max() <= 1e-5 * wanted.abs().max()
