"""The runs whose numbers are golden, and the worlds that make them.

All runs have toy size, fp32 and `train.deterministic=true`.  Runs with the same number of ranks share one world, in the
order of RUNS; a run may start from an earlier one.  Paths are relative to the folder of the corpus, so that config.yaml
in the stored checkpoint names no folder of a machine.  Adam's eps is 1e-5: some gradients are zero in exact arithmetic,
such as those of the encoder's key biases, and a smaller eps would turn their rounding into whole steps.
"""

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from tandem.parallel.grid import destroy_grid
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.golden.compare import Numbers, golden_part, saved_norms
from tests.golden.corpus import make_corpus
from tests.support import read_metrics

CHECKPOINT = Path(__file__).parent / "checkpoint"
STEPS, SAVED_STEP, LAST_STEP = 3, 2, 4  # of a run; of the stored checkpoint, and of the runs that resume from it

ALL = ["train.deterministic=true", "data.tokenizer=tokenizer.json", "optim.eps=1e-5"]
LANGUAGE = [
    *ALL,
    f"train.steps={STEPS}",
    "train.seq_length=192",
    "train.global_batch_size=4",
    "data.sources.main.shards=[image.tar,pair.tar]",
    "data.sources.main.weight=3",
    "+data.sources.words.shards=[text.tar]",
    "+data.sources.words.weight=1",
    "+data.sources.clips.shards=[clip.tar]",
    "+data.sources.clips.weight=1",
    "data.max_patches=32",
    "data.video.budget=64",
    "data.block_samples=32",
    "optim.lr=3e-3",
    "optim.min_lr=5e-4",
    "optim.warmup_steps=2",
    "optim.clip_norm=0.5",
    "optim.betas=[0.8,0.9]",
    "optim.weight_decay=0.3",
    "optim.layer_decay=0.7",
    "parallel.encoder.chunk_patches=96",
    "model.encoder.norm_eps=1e-3",
    "model.encoder.drop_path=0.3",
    "model.llm.norm_eps=1e-3",
    "model.llm.aux_loss=0.1",
    "model.llm.z_loss=0.1",
]
VISION = [
    *ALL,
    f"train.steps={STEPS}",
    "train.global_batch_size=6",
    "optim.lr=2e-3",
    "optim.min_lr=3e-4",
    "optim.warmup_steps=1",
    "optim.betas=[0.8,0.93]",
    "optim.weight_decay=0.3",
    "optim.layer_decay=0.8",
]
CONTRASTIVE = [
    *VISION,
    "data.sources.main.shards=[photo.tar]",
    "data.max_patches=64",
    "parallel.encoder.chunk_patches=96",
    "optim.clip_norm=8",
    "optim.ema=0.9",
    "model.encoder.drop_path=0.4",
    "model.embedding=40",
    "objective.contrastive.siglip_weight=0.7",
    "objective.contrastive.superclass_weight=0.3",
    "objective.contrastive.scale_init=7",
    "objective.contrastive.bias_init=-4",
]
MIM = [
    *VISION,
    "data.sources.main.shards=[photo.tar]",
    "data.max_patches=64",
    "parallel.encoder.chunk_patches=96",
    "optim.clip_norm=0.8",
    "model.encoder.drop_path=0.3",
    "objective.teacher=vit_contrastive",
    "objective.mim.mask_ratio=0.6",
]
OMNI = [
    *VISION,
    "data.sources.main.shards=[sound.tar]",
    "data.max_patches=128",
    "data.video.budget=32",
    "parallel.encoder.chunk_patches=300",
    "optim.clip_norm=4",
    "objective.omni.scale_init=6",
    "objective.omni.bias_init=-5",
    "objective.omni.matching_weight=0.3",
    "objective.omni.caption_weight=0.6",
]
# As small as a model with two layers, two heads and four experts can be: its checkpoint is in git.
SMALL = [
    *LANGUAGE,
    f"train.steps={LAST_STEP}",
    "optim.schedule=constant",
    "model.encoder.width=8",
    "model.encoder.heads=1",
    "model.encoder.mlp_ratio=2",
    "model.llm.layers=2",
    "model.llm.width=8",
    "model.llm.heads=2",
    "model.llm.kv_heads=2",
    "model.llm.head_width=4",
    "model.llm.vocab_size=268",
    "model.llm.num_experts=4",
    "model.llm.expert_width=8",
    "model.llm.shared_expert_width=8",
]
TP_PP_EP = ["parallel.tp=2", "parallel.pp=2", "parallel.ep=2"]
CP_PP_VPP = ["parallel.cp=2", "parallel.pp=2", "parallel.vpp=2"]


@dataclass(frozen=True)
class Run:
    """One run, in a directory called `name`.  resumes: the directory is a copy of the stored checkpoint's."""

    name: str
    ranks: int
    recipe: str
    overrides: list[str]
    resumes: bool = False


RUNS = (
    Run("vit_contrastive", 1, "vit_contrastive", CONTRASTIVE),
    Run("vit_mim", 1, "vit_mim", MIM),
    Run("vit_omni", 1, "vit_omni", OMNI),
    Run("stage0", 1, "stage0", [*LANGUAGE, "model.encoder.drop_path=0", "optim.warmup_steps=1"]),
    Run("stage1", 1, "stage1", LANGUAGE),
    Run("stage2", 1, "stage2", [*LANGUAGE, "train.micro_batch_size=2", "checkpoint.load_from=stage1"]),
    Run("resumed", 1, "stage1", [*SMALL, "checkpoint.resume=true"], resumes=True),
    Run("stage1.dp2.zero3", 2, "stage1", [*LANGUAGE, "parallel.encoder.zero_stage=3"]),
    Run(
        "vit_contrastive.zero3",
        2,
        "vit_contrastive",
        [*CONTRASTIVE, "parallel.encoder.zero_stage=3", "parallel.encoder.recompute=replay"],
    ),
    Run("stage1.tp2.pp2.ep2", 4, "stage1", [*LANGUAGE, *TP_PP_EP]),
    Run("stage1.cp2.pp2.vpp2", 4, "stage1", [*LANGUAGE, *CP_PP_VPP, "train.recompute=full"]),
    Run("resumed.tp2.pp2.ep2", 4, "stage1", [*SMALL, *TP_PP_EP, "checkpoint.resume=true"], resumes=True),
)
WORLDS = tuple(sorted({run.ranks for run in RUNS}))
SAVING = Run("saving", 1, "stage1", [*SMALL, f"checkpoint.every={SAVED_STEP}"])


def numbers_of_world(ranks: int, folder: Path) -> tuple[dict, dict[str, Numbers]]:
    """The fingerprint of a world of so many ranks, and the numbers of its runs, made in an empty folder."""
    runs = [run for run in RUNS if run.ranks == ranks]
    make_corpus(folder)
    for run in runs:
        if run.resumes:
            shutil.copytree(CHECKPOINT, folder / run.name)
    return run_world(train_all, ranks, runs, str(folder), timeout=180)[0]


def train_all(runs: list[Run], folder: str) -> tuple[dict, dict[str, Numbers]]:
    """Trains one run after the other in this world; on rank 0 returns the fingerprint and the numbers of the runs."""
    os.chdir(folder)
    made = {}
    for run in runs:
        destroy_grid()
        train_run(run.recipe, run.overrides, run.name)
        if dist.get_rank() == 0:
            steps = [golden_part(line) for line in read_metrics(Path(run.name))]
            made[run.name] = {"steps": steps, "saved": saved_norms(Path(run.name))}
    return fingerprint(), made


def fingerprint() -> dict:
    """What decides the bits of an fp32 sum: processor, vector instructions, torch, threads, library settings."""
    settings = {key: value for key, value in os.environ.items() if key.startswith(("MKL_", "ONEDNN_", "DNNL_"))}
    return {
        "processor": processor(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "settings": settings,
    }


def processor() -> str:
    """Maker, family, model and name of the processor; a virtual machine's name alone may stand for many."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.is_file():
        return f"{platform.machine()} {platform.processor()}"
    pairs = (line.partition(":") for line in cpuinfo.read_text().partition("\n\n")[0].splitlines())
    known = {key.strip(): value.strip() for key, _, value in pairs}
    keys = ("vendor_id", "cpu family", "model", "model name")
    return " ".join([platform.machine(), *(known[key] for key in keys if key in known)])
