"""Language models of Hugging Face: in, on several layouts, and out again, against transformers' own classes in fp32.

One world per layout runs all models after each other: starting a world costs more than a step of a tiny model.
"""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from tandem.launch import checkpoint as checkpoint_command
from tandem.parallel.comm.context import pack_row
from tandem.parallel.engines.llm_engine import LLMEngine
from tandem.parallel.grid import build_grid, destroy_grid
from tandem.train import families
from tandem.train.build import settle_kernels
from tandem.train.models.language.llm_config import LLMConfig
from tandem.train.models.language.llm_spec import build_chunk, transformer_config
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import corpus_overrides, read_metrics, settings
from tests.train.folders import check_each_row_once

COMMON = {
    "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384,
    "max_position_embeddings": 256, "rms_norm_eps": 1e-5, "initializer_range": 0.1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
ORIGINAL = {"original_max_position_embeddings": 32}
MODELS = {
    "llama": {"intermediate_size": 96, "attention_bias": True, "rope_parameters": LLAMA3 | ORIGINAL},
    "mistral": {"intermediate_size": 96, "head_dim": 24, "sliding_window": 20},
    "mixtral": {
        "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None,
        "rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0},
    },
    "qwen2": {
        "intermediate_size": 96, "tie_word_embeddings": True, "use_sliding_window": True, "sliding_window": 20,
        "max_window_layers": 1,
    },
    "qwen3": {"intermediate_size": 96, "head_dim": 32, "rope_parameters": YARN | ORIGINAL, "tie_word_embeddings": True},
    "qwen3_moe": {
        "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 32, "norm_topk_prob": True,
        "decoder_sparse_step": 2, "intermediate_size": 96,
    },
    "qwen2_moe": {
        "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96,
        "shared_expert_intermediate_size": 80, "mlp_only_layers": [0],
    },
    "olmoe": {"intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2, "eos_token_id": 0},
    "glm4_moe": {
        "moe_intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 4, "intermediate_size": 96,
        "head_dim": 32, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "use_qk_norm": True,
        "attention_bias": True, "rope_parameters": COMMON["rope_parameters"] | {"partial_rotary_factor": 0.5},
    },
    "phi3": {
        "intermediate_size": 96, "sliding_window": 20, "pad_token_id": 0, "eos_token_id": 0,
        "rope_parameters": COMMON["rope_parameters"] | {"partial_rotary_factor": 0.5},
    },
}  # fmt: skip
# The language model of a whole one, which tests/distributed/test_whole_family.py trains.
OF_WHOLE = {
    "qwen2_5_vl": {
        "intermediate_size": 96, "rope_parameters": COMMON["rope_parameters"] | {"mrope_section": [2, 3, 3]},
    }
}  # fmt: skip
LAYOUTS = {
    "one rank": (1, []),
    "tp2.pp2": (4, ["parallel.tp=2", "parallel.pp=2"]),
    "tp2.ep2": (2, ["parallel.tp=2", "parallel.ep=2"]),
    "pp2.vpp2.dp2": (4, ["parallel.pp=2", "parallel.vpp=2"]),
    "cp2": (2, ["parallel.cp=2"]),
}
OF_LOGITS = ("one rank", "tp2.pp2", "tp2.ep2")
LENGTHS = [40, 9, 79]  # of the samples of one row
NORMS = ("grad_norm", "grad_norm_encoder", "grad_norm_adapter", "grad_norm_llm")


def models_of(layout: str) -> list[str]:
    """Those for which the layout is of interest: experts for ep; for dp what stages share, or no optimizer holds."""
    if "dp2" in layout:
        return ["qwen3", "glm4_moe"]
    return [name for name in MODELS if "ep2" not in layout or "num_experts_per_tok" in MODELS[name]]


def transformers_model(name: str):
    """A tiny model of random weights, norms and biases too."""
    import transformers

    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(name, **COMMON | MODELS[name], attn_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if tensor.dim() == 1:
                tensor.uniform_(*((-0.3, 0.3) if key.endswith("bias") else (0.5, 1.5)))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("families")
    for name in MODELS:
        transformers_model(name).save_pretrained(root / name)
    return root


def tokens_of_a_row() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 384, sum(LENGTHS)))


def logits_here(root: str, names: list[str], overrides: list[str]) -> dict[str, torch.Tensor | None]:
    """Logits of the row by each model, after loading from its folder; None on a first stage of two."""
    config, cpu, found = settings("stage1", *overrides), torch.device("cpu"), {}
    settle_kernels(config, cpu)
    grid = build_grid(config.layout(dist.get_world_size()), cpu, seed=0)
    for name in names:
        llm = settings("stage1", f"model.llm.folder={root}/{name}").model.llm
        llm.check(grid.layout)
        megatron = transformer_config(llm, grid.layout, dtype=torch.float32, recompute="none", deterministic=False)
        build = functools.partial(_chunk, llm, megatron)
        engine = LLMEngine(megatron, grid, build=build, forward=None, loss=None, trainable=False, adam=None)
        engine.load(families.open_folder(llm).read, optimizer=False)
        found[name] = _logits(*engine.chunks, grid)
    return found


def _chunk(llm: LLMConfig, megatron, vp_stage, first: bool, last: bool):
    return build_chunk(llm, megatron, vp_stage=vp_stage, first=first, last=last)


def _logits(chunk, grid) -> torch.Tensor | None:
    tokens_T = tokens_of_a_row()
    positions_T = np.concatenate([np.arange(length) for length in LENGTHS]).astype(np.int32)
    row = pack_row(LENGTHS, positions_T, grid.layout, grid.place.cp, torch.device("cpu"))
    if grid.layout.pp > 1:  # hidden states by hand from one stage to the next
        return _through_two_stages(chunk, grid, tokens_T, row)
    with torch.no_grad():
        visual = (torch.zeros(0, chunk.config.hidden_size), torch.zeros(0, dtype=torch.long))
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


@pytest.fixture(scope="module")
def logits(folders):
    """By layout, of every rank: logits of each model."""
    found = {}
    for layout, (world, sizes) in LAYOUTS.items():
        if layout in OF_LOGITS:
            found[layout] = run_world(logits_here, world, str(folders), models_of(layout), sizes, timeout=180)
    return found


@pytest.fixture(scope="module")
def wanted():
    """Logits of transformers, sample by sample."""
    found = {}
    for name in MODELS:
        model = transformers_model(name)
        with torch.no_grad():
            found[name] = torch.cat([model(tokens_T[None]).logits[0] for tokens_T in tokens_of_a_row().split(LENGTHS)])
    return found


@pytest.mark.parametrize(("name", "layout"), [(name, layout) for layout in OF_LOGITS for name in models_of(layout)])
def test_logits_are_those_of_transformers(name, layout, logits, wanted):
    for logits_TV in (one[name] for one in logits[layout] if one[name] is not None):
        assert (logits_TV - wanted[name]).abs().max() <= 1e-5 * wanted[name].abs().max()


SMALL = ["train.seq_length=128", "train.global_batch_size=4", "data.max_patches=64"]
STEPS = [*SMALL, "train.steps=3", "optim.lr=1e-3"]
STILL = [*SMALL, "train.steps=1", "optim.lr=0", "optim.min_lr=0"]


def train_all(folders: str, names: list[str], overrides: list[str], out: str) -> None:
    """A run from each folder, one after the other in this world."""
    for name in names:
        train_run("stage1", [f"model.llm.folder={folders}/{name}", *overrides], f"{out}/{name}")
        destroy_grid()


@pytest.fixture(scope="module")
def trained(folders, corpus, tmp_path_factory) -> dict[str, Path]:
    """By layout, runs of three steps; "still", on two stages, at a rate of 0."""
    found = {}
    for layout, (world, sizes) in {**LAYOUTS, "still": (2, ["parallel.pp=2"])}.items():
        found[layout] = tmp_path_factory.mktemp("runs")
        overrides = [*(STILL if layout == "still" else STEPS), *sizes, *corpus_overrides(corpus)]
        run_world(train_all, world, str(folders), models_of(layout), overrides, str(found[layout]), timeout=300)
    return found


@pytest.mark.parametrize(
    ("name", "layout"), [(name, layout) for layout in LAYOUTS if layout != "one rank" for name in models_of(layout)]
)
def test_layouts_train_alike(name, layout, trained):
    mine, one = (read_metrics(trained[place] / name) for place in (layout, "one rank"))
    assert len(mine) == len(one) == 3
    for found, expected in zip(mine, one, strict=True):
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        for norm in NORMS:
            assert found[norm] == pytest.approx(expected[norm], rel=1e-4), norm


def go_on(runs: dict[str, str], overrides: list[str], out: str) -> None:
    """One more step on one rank, with the weights and moments of each run."""
    for place, run in runs.items():
        load = [f"checkpoint.load_from={run}", "checkpoint.load_optimizer=true"]
        train_run("stage1", [*load, *overrides], f"{out}/{place}")
        destroy_grid()


@pytest.mark.parametrize("name", models_of("pp2.vpp2.dp2"))
def test_a_checkpoint_of_stages_and_replicas_goes_on_elsewhere(name, trained, folders, corpus, tmp_path):
    """Both copies of a tied embedding and the routers' biases are one tensor each."""
    runs = {place: str(trained[layout] / name) for place, layout in (("one", "one rank"), ("other", "pp2.vpp2.dp2"))}
    overrides = [*SMALL, "train.steps=1", "optim.lr=1e-3", f"model.llm.folder={folders}/{name}"]
    run_world(go_on, 1, runs, [*overrides, *corpus_overrides(corpus)], str(tmp_path), timeout=180)
    (one,), (other,) = (read_metrics(tmp_path / place) for place in runs)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    for norm in NORMS:
        assert other[norm] == pytest.approx(one[norm], rel=1e-4), norm


@pytest.mark.parametrize("name", MODELS)
def test_what_is_exported_is_what_came_in(name, trained, tmp_path):
    """To the bit, and transformers opens it as the same class."""
    command = ["export", str(trained["still"] / name), str(tmp_path / "out"), "--format", "hf", "--part", "llm"]
    with pytest.raises(SystemExit) as done:
        checkpoint_command.main([*command, "--file-gb", "1e-4"])
    assert done.value.code == 0
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
    family, model = families.FAMILIES.find(name), model_of(name)
    tensors = list(family.tensors(model))
    assert len({tensor.name for tensor in tensors}) == len(tensors)
    check_each_row_once(tensors)
    assert family.refusal(model) is None
    assert families.of_model(model) in (family, families.FAMILIES.find("llama"))  # whose layers mistral's are


def model_of(name: str) -> LLMConfig:
    """The settings of a model of MODELS or of OF_WHOLE."""
    family = families.FAMILIES.find(name)
    said = COMMON | (MODELS | OF_WHOLE)[name]
    return LLMConfig(**family.settings(said), aux_loss=0.0, z_loss=0.0, init_std=0.02)


@pytest.mark.parametrize("name", families.FAMILIES.names())
def test_settings_written_and_read_are_the_same(name):
    family, model = families.FAMILIES.find(name), model_of(name)
    said = family.config(model, "float32")
    assert family.settings(said) == model.architecture == family.settings(json.loads(json.dumps(said)))


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
        ({"tie_word_embeddings": False}, "the model lacks lm_head.weight"),
        ({"attention_bias": True}, "the model lacks model.layers.0.self_attn.k_proj.bias"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type=dynamic is not supported, only"),
        ({"rope_parameters": {"rope_type": "linear"}}, "linear needs factor"),
        ({"rope_parameters": LLAMA3 | ORIGINAL | {"mscale": 1.0}}, "llama3 does not use mscale"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not"),
        ({"rope_parameters": {"rope_theta": 1e4, "mrope_section": [4, 6, 6]}}, "mrope_section of the rotary positions"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}, "rope_parameters": None},
            "rope_type=longrope is",
        ),
        ({"num_attention_heads": "four", "head_dim": None}, "unsupported operand"),
        ({"logit_scale": 2}, "logit_scale of qwen3 is not supported"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "'sliding_attention'] is not supported, only ["),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported, only 'silu'"),
        (
            {"model_type": "qwen4"},
            "model_type=qwen4: must be one of glm4_moe, llama, mistral, mixtral, olmoe, phi3, qwen2,",
        ),
        ({"num_hidden_layers": 5, "layer_types": None}, "the model lacks model.layers.4."),
        ({"num_hidden_layers": 3, "layer_types": None}, "the model has no place for model.layers.3."),
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
    assert "there is no such folder" in refusal(tmp_path / "nowhere")


def test_a_key_that_contradicts_the_folder_is_refused(folders):
    assert refusal(folders / "qwen3", "model.llm.layers=2").startswith(
        f"model.llm.layers=2, but model.llm.folder={folders}/qwen3 has 4: leave model.llm.layers out"
    )


def test_settings_come_from_the_folder(folders):
    model = settings("stage1", f"model.llm.folder={folders}/qwen3_moe").model.llm
    assert (model.num_experts, model.expert_width, model.head_width, model.qk_norm) == (4, 48, 32, True)
    assert model.aux_loss == settings("stage1").model.llm.aux_loss  # which a folder does not decide


@pytest.mark.parametrize(
    ("name", "surplus", "words"),
    [
        ("qwen3", "lm_head.weight", "without lm_head.weight: tied to the embedding"),
        ("glm4_moe", "model.layers.4.eh_proj.weight", "without model.layers.4.eh_proj.weight: of layers that predict"),
        ("glm4_moe", "model.layers.3.eh_proj.weight", "the model has no place for model.layers.3.eh_proj.weight"),
        ("llama", "model.layers.4.eh_proj.weight", "the model has no place for model.layers.4.eh_proj.weight"),
    ],
)
def test_what_the_familys_own_class_does_not_use_is_left_out_by_name(folders, tmp_path, name, surplus, words):
    copy = Path(shutil.copytree(folders / name, tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors") | {surplus: torch.zeros(2, 2)}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    said = refusal(copy) if "no place" in words else families.open_folder(settings_of(copy)).description
    assert words in said


def settings_of(folder: Path) -> LLMConfig:
    return settings("stage1", f"model.llm.folder={folder}").model.llm


def test_a_stored_bias_is_exported_in_fp32(trained, tmp_path):
    """In a folder of bf16 too: rounded, it would choose other experts."""
    command = ["export", str(trained["still"] / "glm4_moe"), str(tmp_path / "out"), "--format", "hf", "--part", "llm"]
    with pytest.raises(SystemExit) as done:
        checkpoint_command.main([*command, "--dtype", "bf16"])
    assert done.value.code == 0
    found = load_file(tmp_path / "out/model.safetensors")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.equal(found[name], transformers_model("glm4_moe").state_dict()[name])
    assert {tensor.dtype for key, tensor in found.items() if not key.endswith("correction_bias")} == {torch.bfloat16}
