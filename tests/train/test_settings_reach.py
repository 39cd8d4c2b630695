"""Every setting of optim, model, objective, train and parallel reaches what it names, in every recipe, or is refused.

    optim        steps of real stages against the formulas of `followed.py`, in each engine, and not of other values
    the others   outputs, shapes, gradients and batches: `settings_effects.py`

A setting that is in no table fails a test: whoever adds one says here what it does.
"""

import dataclasses
import functools
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tandem.train.config.checks import check_config
from tandem.train.config.settings import composed, read_config
from tests.distributed.world import run_world
from tests.support import settings
from tests.train import followed, settings_effects
from tests.train.followed import joint_norm, moment_error, update_error

RECIPES = ("vit_mim", "vit_contrastive", "vit_omni", "stage0", "stage1", "stage2")
SECTIONS = ("optim", "model", "objective", "train", "parallel")
CLIP = 0.05
OPTIM = [
    "optim.lr=3e-2",
    "optim.min_lr=4e-3",
    "optim.warmup_steps=2",
    "optim.betas=[0.7,0.8]",
    "optim.eps=1e-4",
    "optim.weight_decay=0.3",
    f"optim.clip_norm={CLIP}",
    "optim.layer_decay=0.6",
    "optim.ema=0.28",
    "optim.lr_scale.encoder=0.4",
    "train.steps=6",
]
SCALED = {"encoder": 0.4, "adapter": 2.0, "llm": 0.5, "router": 3.0}
SCALES = [f"optim.lr_scale.{part}={factor}" for part, factor in SCALED.items()]
CONSTANT = ["optim.schedule=constant", "optim.clip_norm=0", "optim.lr=1e-3"]
WEIGHTS = ["objective.contrastive.siglip_weight=0.5", "objective.contrastive.superclass_weight=2.0"]
PAIRS = ["objective.omni.pairs=['frames:sound','audio:visual']"]
PAIRS += ["objective.omni.matching_weight=0.3", "objective.omni.caption_weight=0.7"]
RUNS = {
    "stage1": ("stage1", ["train.global_batch_size=4", *OPTIM, *SCALES], 4),
    "constant": ("stage1", ["train.global_batch_size=4", *CONSTANT], 3),
    "lamb": ("vit_contrastive", ["optim=lamb", *OPTIM, *WEIGHTS], 3),
    "default weights": ("vit_contrastive", [], 1),
    "omni": ("vit_omni", [*OPTIM, *PAIRS], 3),
}
ENGINES = [
    ("stage1", "encoder"),
    ("stage1", "llm"),
    ("constant", "encoder"),
    ("constant", "llm"),
    ("lamb", "encoder"),
    ("omni", "encoder"),
]
TOYS = {  # what a run with OPTIM must not look as if it had
    "lr": 3e-3,
    "min_lr": 1e-3,
    "warmup_steps": 1,
    "schedule": "constant",
    "betas": (0.9, 0.95),
    "eps": 1e-8,
    "weight_decay": 0.1,
    "layer_decay": 1.0,
}
OF_RUNS = {f"optim.{key}" for key in (*TOYS, "name", "clip_norm", "ema")} | {"train.steps"}
OF_RUNS |= {f"optim.lr_scale.{part}" for part in SCALED}
OF_RUNS |= {f"objective.contrastive.{key}_weight" for key in ("siglip", "superclass")}
OF_RUNS |= {f"objective.omni.{key}" for key in ("pairs", "matching_weight", "caption_weight")}
OF_EFFECTS = [key for key in settings_effects.EFFECTS if "." in key]


@pytest.fixture(scope="module")
def runs(corpus):
    """By the names of RUNS."""
    return dict(zip(RUNS, run_world(followed.follow, 1, str(corpus), list(RUNS.values()))[0], strict=True))


@pytest.fixture(scope="module")
def outcomes(corpus, tmp_path_factory):
    """Of each effect nothing, or what went wrong."""
    teacher = followed.make_teacher(corpus, tmp_path_factory.mktemp("teacher") / "run")
    return run_world(settings_effects.outcomes, 1, str(corpus), str(teacher), timeout=300)[0]


# ---- the table is whole ----------------------------------------------------------------------------------------------


def keys_of(value, prefix: str):
    """Names of all settings below a section."""
    if not isinstance(value, dict):
        return {prefix}
    return set().union(*(keys_of(inner, f"{prefix}.{name}") for name, inner in value.items()))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_has_an_effect_in_a_table(recipe):
    composed = dataclasses.asdict(settings(recipe))
    known = OF_RUNS | set(OF_EFFECTS)
    assert set().union(*(keys_of(composed[section], section) for section in SECTIONS)) == known


@pytest.mark.parametrize("key", settings_effects.EFFECTS)
def test_setting_does_what_it_says(key, outcomes):
    assert not outcomes[key], outcomes[key]


# ---- optim -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("run", "engine"), ENGINES)
def test_updates_are_those_of_the_formula(run, engine, runs):
    """Rate of the step and the layer, both betas, epsilon, and decay of weights alone, in both engines."""
    assert update_error(runs[run], engine) < 1e-3
    assert moment_error(runs[run], engine, runs[run].config.optim.betas) < 1e-4


@pytest.mark.parametrize(("run", "engine"), [("stage1", "encoder"), ("stage1", "llm"), ("lamb", "encoder")])
@pytest.mark.parametrize("key", TOYS)
def test_updates_are_not_those_of_another_value(key, run, engine, runs):
    falls_nowhere = len(runs[run].losses) < 4 and key in ("min_lr", "schedule")
    of_encoder_alone = key == "layer_decay" and engine == "llm"
    error = update_error(runs[run], engine, **{key: TOYS[key]})
    assert (error > 1e-2) != (falls_nowhere or of_encoder_alone), error


@pytest.mark.parametrize("part", SCALED)
@pytest.mark.parametrize("engine", ["encoder", "llm"])
def test_each_part_has_its_own_rate(engine, part, runs):
    """The router's on top of the LLM's; layers of the encoder have their decay besides."""
    scale = SimpleNamespace(**SCALED | {part: 1.0})
    held = (part in ("llm", "router")) == (engine == "llm")
    assert (update_error(runs["stage1"], engine, lr_scale=scale) > 1e-2) == held


@pytest.mark.parametrize("engine", ["encoder", "llm"])
def test_each_beta_is_of_its_own_moment(engine, runs):
    assert moment_error(runs["stage1"], engine, (0.9, 0.8)) > 0.1 < moment_error(runs["stage1"], engine, (0.7, 0.95))


@pytest.mark.parametrize("engine", ["encoder", "llm"])
def test_the_schedule_ends_where_the_run_does(engine, runs):
    assert update_error(runs["stage1"], engine, steps=8) > 1e-2


def test_gradients_are_clipped_to_the_joint_norm(runs):
    """Of everything that is trained, in the stages with an LLM and in those without; 0 clips nothing."""
    for name in ("stage1", "lamb", "omni"):
        for step, norm in enumerate(runs[name].grad_norms):
            assert norm > 10 * CLIP and joint_norm(runs[name], step) == pytest.approx(CLIP, rel=1e-4)
    for step, norm in enumerate(runs["constant"].grad_norms):
        assert norm > 1 and joint_norm(runs["constant"], step) == pytest.approx(norm, rel=1e-4)


def test_lamb_is_adamw_times_the_ratio_of_norms(runs):
    assert update_error(runs["lamb"], "encoder", name="adamw") > 0.1
    assert update_error(runs["omni"], "encoder", name="lamb") > 0.1


def test_the_average_follows_its_decay(runs):
    """min(ema, (1 + n) / (10 + n)) after the n-th update, which OPTIM lets both sides of take; none without."""
    for name in ("stage1", "lamb", "omni"):
        first, *later = runs[name].states["encoder"]
        averages = {key: first[key, "param"] for key, kind in first if kind == "ema"}
        assert averages
        for update, state in enumerate(later, 1):
            decay = min(0.28, (1 + update) / (10 + update))
            for key in averages:
                averages[key] = decay * averages[key] + (1 - decay) * state[key, "param"]
                error = (averages[key] - state[key, "ema"]).norm()
                assert error <= 1e-5 * (state[key, "param"] - first[key, "param"]).norm() + 1e-5, key
    assert "ema" not in {kind for _, kind in runs["constant"].states["encoder"][-1]}


def test_the_llm_is_not_trained_by_lamb():
    with pytest.raises(ValueError, match="optim.name=lamb: the LLM is trained by AdamW alone"):
        check_config(settings("stage1", "optim=lamb"), 1)


# ---- weights of the objectives ---------------------------------------------------------------------------------------


def test_contrastive_losses_have_their_weights(runs):
    weighted, default = (runs[name] for name in ("lamb", "default weights"))
    for name, loss in default.reports[0].items():
        assert weighted.reports[0][name] == pytest.approx(loss, rel=1e-5)
    for run, siglip, superclass in ((weighted, 0.5, 2.0), (default, 1.0, 1.0)):
        report = run.reports[0]
        assert run.losses[0] == pytest.approx(siglip * report["siglip"] + superclass * report["superclass"])


def test_omni_losses_have_their_weights(runs):
    for loss, report in zip(runs["omni"].losses, runs["omni"].reports, strict=True):
        assert set(report) == {"frames:sound", "audio:visual", "matching", "caption"}
        contrast = (report["frames:sound"] + report["audio:visual"]) / 2
        assert loss == pytest.approx(contrast + 0.3 * report["matching"] + 0.7 * report["caption"])


# ---- refusals --------------------------------------------------------------------------------------------------------

REFUSED = {
    "stage1": """optim.name=sgd optim.lr=-1 optim.lr=.nan optim.min_lr=-1 optim.warmup_steps=-1 optim.schedule=linear
        optim.betas=[0.9] optim.betas=[0.9,1.0] optim.eps=-1 optim.eps=.inf optim.weight_decay=-0.1 optim.clip_norm=-1
        optim.layer_decay=0 optim.layer_decay=1.5 optim.ema=1.0 optim.ema=-0.1
        optim.lr_scale.encoder=0 optim.lr_scale.router=-1 optim.lr_scale.llm=.inf
        model.encoder.width=66 model.encoder.width=0 model.encoder.depth=0 model.encoder.heads=3
        model.encoder.drop_path=1.0 model.llm.layers=0 model.llm.width=0 model.llm.heads=3 model.llm.kv_heads=0
        model.llm.head_width=15 model.llm.vocab_size=0 model.llm.num_experts=-1 model.llm.top_k=1 model.llm.top_k=9
        model.llm.expert_width=0 model.llm.shared_expert_width=-1 model.llm.rope_scaling.rope_type=ntk
        model.llm.rotary_fraction=0 model.llm.rotary_fraction=1.5 model.llm.output_bias=true
        model.llm.qk_norm_whole=true model.llm.window=-1 model.llm.window_from=1 model.llm.router_score=tanh
        model.llm.routed_scaling=0 model.llm.router_groups=3 model.llm.router_top_groups=2
        model.llm.first_dense_layers=4 model.llm.first_dense_layers=-1 model.llm.moe_every=0 model.llm.moe_every=5
        model.llm.balance.bias_update=-0.1 model.llm.balance.bias_update=.inf model.llm.balance.by_modality=true
        model.llm.balance.aux_loss_type=global_aux_loss
        train.steps=0 train.global_batch_size=0 train.micro_batch_size=3 train.seq_length=0 train.precision=fp16
        train.recompute=some train.trainable=[] train.trainable=[adapter,mim]
        parallel.tp=2 parallel.pp=2 parallel.vpp=2 parallel.ep=2 parallel.etp=2 parallel.cp=2 parallel.cp_comm_type=ring
        parallel.balance_group_size=3 parallel.kernels=cutlass parallel.attention=magic parallel.compile=sometimes
        parallel.encoder.zero_stage=4 parallel.encoder.chunk_patches=4 parallel.encoder.recompute=some""",
    "vit_contrastive": """model.text.width=66 model.text.depth=0 model.text.heads=0 model.text.vocab_size=0
        model.text.max_tokens=1 model.embedding=0 objective.contrastive.siglip_weight=-1
        objective.contrastive.superclass_weight=-1 objective.contrastive.scale_init=0
        objective.contrastive.bias_init=.inf parallel.tp=2 train.micro_batch_size=2""",
    "vit_mim": """objective.mim.mask_ratio=1.0 objective.mim.mask_ratio=0 objective.mim.masked=half
        objective.mim.decoder_width=36 objective.mim.decoder_depth=0 objective.mim.decoder_heads=0
        objective.teacher=null""",
    "vit_omni": """objective.omni.pairs=[frames] objective.omni.scale_init=-1 objective.omni.bias_init=.nan
        objective.omni.matching_weight=-1 objective.omni.caption_weight=-1 objective.omni.decoder_width=33
        objective.omni.decoder_depth=0 objective.omni.decoder_heads=0""",
}


@functools.cache
def composed_once(recipe: str):
    return composed([f"+recipe={recipe}", "scale=toy"])


@pytest.mark.parametrize(
    ("recipe", "override"), [(recipe, override) for recipe, each in REFUSED.items() for override in each.split()]
)
def test_values_that_cannot_be_are_refused(recipe, override):
    """In a sentence that names the key."""
    key = override.partition("=")[0]
    with pytest.raises(ValueError, match=key.rpartition(".")[2]):
        check_config(read_config(OmegaConf.merge(composed_once(recipe), OmegaConf.from_dotlist([override]))), 1)
