"""Language models of Hugging Face: in, on several layouts, and out again, against transformers' own classes in fp32."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tandem.parallel.comm.context import pack_row
from tandem.train import families
from tandem.train.models.language.llm_config import LLMConfig
from tests.distributed.runs import build_run, train_run
from tests.distributed.world import run_world
from tests.support import ROOT, corpus_overrides, read_metrics, settings

COMMON = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
OWN = {
    "llama": {"intermediate_size": 96},
    "mistral": {"intermediate_size": 96, "sliding_window": None, "head_dim": 24},
    "mixtral": {"intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "qwen3": {"intermediate_size": 96, "head_dim": 32},
    "qwen3_moe": {
        "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "norm_topk_prob": True,
    },
}  # fmt: skip
LAYOUTS = {
    "one rank": (1, []),
    "tp2.pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "tp2.ep2": (2, ["parallel.tp=2", "parallel.ep=2"]),
    "cp2": (2, ["parallel.cp=2"]),
}
LENGTHS = [40, 9, 79]  # of the samples of one row


def transformers_model(name: str):
    """A tiny model of random weights, norms too."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **COMMON, **OWN[name], attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name in OWN:
        transformers_model(name).save_pretrained(root / name)
    return root


def tokens_of_a_row() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 384, sum(LENGTHS)))


def logits_here(folder: str, overrides: list[str]) -> torch.Tensor | None:
    """Logits of the row on the last stage of one rank of a world, after loading from the folder."""
    config, engines, *_ = build_run("stage1", [f"model.llm.folder={folder}", *overrides], steps=0)
    engines.llm.load(families.open_folder(config.model.llm).read, optimizer=False)
    (chunk,) = engines.llm.chunks
    grid, tokens_T = engines.grid, tokens_of_a_row()
    positions_T = np.concatenate([np.arange(length) for length in LENGTHS]).astype(np.int32)
    row = pack_row(LENGTHS, positions_T, grid.layout, grid.place.cp, torch.device("cpu"))
    if grid.layout.pp > 1:  # hidden states by hand from one stage to the next
        return _through_two_stages(chunk, grid, tokens_T, row)
    with torch.no_grad():
        visual = (torch.zeros(0, config.model.llm.width), torch.zeros(0, dtype=torch.long))
        return chunk(tokens_T[None], None, row, *visual)[0]


def _through_two_stages(chunk, grid, tokens_T, row):
    width = chunk.config.hidden_size
    hidden = torch.empty(len(tokens_T) // grid.layout.tp, 1, width)
    ranks = grid.layout.world // 2
    with torch.no_grad():
        if grid.place.pp == 0:
            visual = (torch.zeros(0, width), torch.zeros(0, dtype=torch.long))
            dist.send(chunk(tokens_T[None], None, row, *visual).contiguous(), dist.get_rank() + ranks)
            return None
        dist.recv(hidden, dist.get_rank() - ranks)
        chunk.set_input_tensor(hidden)
        return chunk(None, None, row)[0]


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "cp2"])
@pytest.mark.parametrize("name", OWN)
def test_logits_are_those_of_transformers(folders, corpus, name, layout):
    world, sizes = LAYOUTS[layout]
    if "ep2" in layout and "num_experts_per_tok" not in OWN[name]:
        sizes = ["parallel.tp=2"]
    found = [one for one in run_world(logits_here, world, f"{folders}/{name}", [*sizes, *corpus_overrides(corpus)])]
    model, wanted = transformers_model(name), []
    with torch.no_grad():
        for tokens_T in tokens_of_a_row().split(LENGTHS):
            wanted.append(model(tokens_T[None]).logits[0])
    wanted_TV = torch.cat(wanted)
    for logits_TV in (one for one in found if one is not None):
        assert (logits_TV - wanted_TV).abs().max() <= 1e-5 * wanted_TV.abs().max()


@pytest.mark.parametrize("name", OWN)
def test_layouts_train_alike_and_what_is_exported_is_what_came_in(folders, corpus, name, tmp_path):
    """Three steps on each layout; at a rate of 0 the exported folder holds the numbers of the first one."""
    small = ["train.seq_length=128", "train.global_batch_size=4", "data.max_patches=64", "train.steps=3"]
    small += [f"model.llm.folder={folders}/{name}", *corpus_overrides(corpus)]
    losses = {}
    for layout, (world, sizes) in LAYOUTS.items():
        if "ep2" in layout and "num_experts_per_tok" not in OWN[name]:
            continue
        run_world(train_run, world, "stage1", [*small, *sizes, "optim.lr=1e-3"], str(tmp_path / layout), timeout=180)
        losses[layout] = [(line["loss"], line["grad_norm"]) for line in read_metrics(tmp_path / layout)]
    for layout, found in losses.items():
        for mine, one in zip(found, losses["one rank"], strict=True):
            assert mine[0] == pytest.approx(one[0], rel=1e-5), layout
            assert mine[1] == pytest.approx(one[1], rel=1e-4), layout
    still = [*small, "train.steps=1", "optim.lr=0", "optim.min_lr=0"]
    run_world(train_run, 2, "stage1", [*still, "parallel.pp=2"], str(tmp_path / "still"), timeout=180)
    command = [sys.executable, "launch/checkpoint.py", "export", str(tmp_path / "still"), str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--format", "hf", "--part", "llm", "--file-gb", "1e-4"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    import transformers

    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    first = transformers_model(name)
    assert type(again) is type(first)
    for key, tensor in first.state_dict().items():
        assert torch.equal(again.state_dict()[key], tensor), key
    with torch.no_grad():
        tokens_1T = tokens_of_a_row()[None]
        assert torch.allclose(again(tokens_1T).logits, first(tokens_1T).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", families.FAMILIES.names())
def test_every_number_of_theirs_is_used_once(name):
    family = families.FAMILIES.find(name)
    sizes = {"layers": 2, "width": 8, "heads": 6, "kv_heads": 3, "head_width": 4, "vocab_size": 10, "norm_eps": 1e-6}
    sizes |= {"ffn_width": 0 if family.experts else 5, "num_experts": 3 * family.experts, "top_k": 2, "expert_width": 7}
    rest = {"shared_expert_width": 0, "aux_loss": 0.0, "z_loss": 0.0, "rope_base": 1e4, "init_std": 0.02}
    model = LLMConfig(**sizes, **rest, qk_norm=family.qk_norm)
    tensors = list(family.tensors(model))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    used = {theirs: np.zeros(shape[0], int) for theirs, shape in families.shapes(tensors).items()}
    for tensor in tensors:
        rows = np.zeros(tensor.shape[0], int)
        for run in tensor.runs:
            rows[run.ours : run.ours + run.rows] += 1
            used[run.theirs][run.begin : run.begin + run.rows] += 1
        assert (rows == 1).all(), tensor.name
    assert all((rows == 1).all() for rows in used.values())
    assert families.of_model(model) in (family, families.FAMILIES.find("llama"))  # whose layers mistral's are
    said = {**family.config(model, "float32"), "rms_norm_eps": 1e-6}
    found, none = family.settings(said), {} if family.experts else {"top_k": 1, "expert_width": 1}
    assert found == {key: getattr(model, key) for key in found} | none


def refusal(folder, *overrides: str) -> str:
    with pytest.raises(ValueError) as refused:
        families.open_folder(settings("stage1", f"model.llm.folder={folder}", *overrides).model.llm)
    return str(refused.value)


@pytest.fixture
def copy(folders, tmp_path):
    return Path(shutil.copytree(folders / "qwen3", tmp_path / "copy"))


def change(folder: Path, **fields) -> None:
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(said | fields))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True is not supported, only False"),
        ({"attention_bias": True}, "attention_bias=True is not supported, only False"),
        (
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6}},
            "rope_type=yarn is not supported, only default",
        ),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor of the rotary"),
        ({"logit_scale": 2}, "logit_scale of qwen3 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has sliding_attention"),
        (
            {"model_type": "qwen4"},
            "model_type=qwen4: must be one of llama, mistral, mixtral, qwen3, qwen3_moe",
        ),
        ({"num_hidden_layers": 3}, "the model lacks model.layers.2."),
        ({"num_hidden_layers": 1}, "the model has no place for model.layers.1."),
        ({"intermediate_size": 97}, "has shape [96, 64], config.json says [97, 64]"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused(copy, fields, words):
    change(copy, **fields)
    sentence = refusal(copy)
    assert sentence.startswith(f"model.llm.folder={copy}: ") and words in sentence and "\n" not in sentence


def test_a_field_that_is_missing_is_named(copy):
    said = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({key: said[key] for key in said if key != "hidden_size"}))
    assert refusal(copy) == f"model.llm.folder={copy}: config.json: hidden_size is missing"


def test_pickles_and_empty_folders_are_refused(copy, tmp_path):
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    assert "holds pytorch_model.bin and no model.safetensors: pickles are not read" in refusal(copy)
    assert "No such file" in refusal(tmp_path / "nowhere")


def test_a_key_that_contradicts_the_folder_is_refused(folders):
    assert refusal(folders / "qwen3", "model.llm.layers=4").startswith(
        f"model.llm.layers=4, but model.llm.folder={folders}/qwen3 has 2: leave model.llm.layers out"
    )


def test_settings_come_from_the_folder(folders):
    model = settings("stage1", f"model.llm.folder={folders}/qwen3_moe").model.llm
    assert (model.num_experts, model.expert_width, model.head_width, model.qk_norm) == (4, 48, 32, True)
    assert model.aux_loss == settings("stage1").model.llm.aux_loss  # which a folder does not decide
