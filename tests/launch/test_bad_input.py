"""What a person can get wrong ends every rank with one sentence that names it.

Settings and files are refused before the world starts, so most cases share one world of two ranks that never meets.
"""

import runpy
import shutil
import sys

import pytest
from omegaconf import OmegaConf
from PIL import Image

from tandem.launch import index_shards
from tandem.launch.evaluate import main as evaluate
from tandem.train import loop
from tandem.train.checkpoints.origins import open_origins
from tandem.train.config.checks import check_config
from tandem.train.config.settings import composed, read_config
from tandem.train.tasks import find
from tests.curation_shards import encoded, pair
from tests.distributed.world import run_torchrun, run_world
from tests.support import ROOT, corpus_overrides, settings, write_tar

# ---- settings and files, refused before anything starts -----------------------------------------------------------

SHARDS = "data.sources.main.shards="
REFUSED = {  # name: (overrides, what the sentence says); {corpus} and {files} are folders
    "layout that does not divide the world": (
        ["parallel.tp=3"],
        "parallel.tp*cp*pp = 3*1*1 = 3 does not divide the world of 2 ranks",
    ),
    "layout larger than the world": (["parallel.pp=4"], "does not divide the world of 2 ranks"),
    "experts not divisible": (
        ["parallel.ep=2", "model.llm.num_experts=3"],
        "model.llm.num_experts=3 is not divisible by parallel.ep=2",
    ),
    "etp beside tp": (["parallel.tp=2", "parallel.etp=1"], "parallel.etp=1 with parallel.ep=1 and parallel.tp=2"),
    "ep without experts": (
        ["parallel.ep=2", "model.llm.num_experts=0", "model.llm.ffn_width=96"],
        "parallel.ep=2 with model.llm.num_experts=0",
    ),
    "heads not divisible": (["parallel.tp=2", "model.llm.kv_heads=1"], "model.llm.kv_heads=1 is not divisible"),
    "layers not divisible": (
        ["parallel.pp=2", "parallel.vpp=4"],
        "model.llm.layers=4 is not divisible by parallel.pp*vpp=8",
    ),
    "vpp without pp": (["parallel.vpp=2"], "parallel.vpp=2 needs parallel.pp > 1"),
    "vpp without enough micro-batches": (
        ["parallel.pp=2", "parallel.vpp=2", "train.global_batch_size=3"],
        "parallel.vpp=2: the 3 micro-batches of a replica",
    ),
    "tp without sequence parallelism": (
        ["parallel.tp=2", "parallel.sequence_parallel=false"],
        "parallel.sequence_parallel=false with parallel.tp=2",
    ),
    "balance group": (["parallel.balance_group_size=3"], "parallel.balance_group_size=3"),
    "ZeRO stage": (["parallel.encoder.zero_stage=4"], "parallel.encoder.zero_stage=4: must be 1, 2 or 3"),
    "recompute": (["parallel.encoder.recompute=some"], "parallel.encoder.recompute=some: must be one of none"),
    "compilation": (["parallel.compile=some"], "parallel.compile=some: must be one of auto, always, never"),
    "recompute of the LLM": (["train.recompute=replay"], "train.recompute=replay: must be one of none, selective"),
    "recompute of the LLM as a switch": (["train.recompute=true"], "train.recompute=True: say full, or one of none"),
    "chunks smaller than an image": (
        ["parallel.encoder.chunk_patches=64"],
        "parallel.encoder.chunk_patches=64 is smaller than one image of data.max_patches=256",
    ),
    "batch not divisible": (
        ["train.global_batch_size=3"],
        "train.global_batch_size=3 is not divisible by dp*train.micro_batch_size = 2*1",
    ),
    "no batch": (["train.micro_batch_size=0"], "train.micro_batch_size=0: must be at least 1"),
    "no log": (["logger.every=0"], "logger.every=0: must be at least 1"),
    "row that tp cannot cut": (["parallel.tp=2", "train.seq_length=255", "data.max_patches=64"], "= 255 is not"),
    "rows shorter than one image": (
        ["train.seq_length=64"],
        "train.seq_length=64 is shorter than one image of data.max_patches=256 (64 tokens)",
    ),
    "rows shorter than one image of larger blocks": (
        ["train.seq_length=29", "data.max_patches=256", "data.min_patches=9", "model.connector.merge=3"],
        "train.seq_length=29 is shorter than one image of data.max_patches=256 (28 tokens)",
    ),
    "patches of no pixels": (["model.encoder.patch_size=0"], "model.encoder.patch_size=0: must be a whole number"),
    "blocks of no patches": (
        ["model.connector.merge=0"],
        "model.connector.merge=0: must be a whole number, at least 1",
    ),
    "two channels": (["model.encoder.image_mean=[0.5,0.5]"], "model.encoder.image_mean=[0.5, 0.5]: must be 3 finite"),
    "no deviation": (["model.encoder.image_std=[0.5,0,0.5]"], "model.encoder.image_std=[0.5, 0.0, 0.5]: must be above"),
    "rows shorter than every sample": (
        ["train.seq_length=4", "data.max_patches=4", "data.video.budget=4"],
        "train.seq_length is 4, but the smallest sample",
    ),
    "trainable that is no part": (["train.trainable=[adapter,head]"], "train.trainable=['adapter', 'head']"),
    "precision": (["train.precision=fp16"], "train.precision=fp16: must be one of fp32, bf16"),
    "schedule": (["optim.schedule=linear"], "optim.schedule=linear: must be one of cosine, constant"),
    "betas": (["optim.betas=[0.9]"], "optim.betas=[0.9]"),
    "optimizer": (["optim.name=sgd"], "optim.name=sgd: must be one of adamw, lamb"),
    "LAMB for an LLM": (["optim.name=lamb"], "optim.name=lamb: the LLM is trained by AdamW alone"),
    "model without heads": (["model.llm.kv_heads=0"], "model.llm.kv_heads=0: must be at least 1"),
    "encoder without heads": (["model.encoder.heads=0"], "model.encoder.heads=0: must be at least 1"),
    "heads that cannot turn": (
        ["model.llm.head_width=15"],
        "model.llm.head_width=15 with model.llm.rotary_fraction=1.0",
    ),
    "more experts chosen than there are": (["model.llm.top_k=9"], "model.llm.top_k=9 is more than"),
    "no shards": ([SHARDS + "[]"], "data.sources.main.shards is empty"),
    "missing shard": ([SHARDS + "[{files}/nothing.tar]"], "{files}/nothing.tar"),
    "pattern without a match": ([SHARDS + "['{files}/nothing-*.tar']"], "nothing-*.tar' matches no file"),
    "shard without index": ([SHARDS + "[{files}/bare.tar]"], "{files}/bare.tar has no index; run python launch/"),
    "shard that changed": (
        [SHARDS + "[{files}/changed/read-0000.tar]"],
        "the index of {files}/changed/read-0000.tar belongs to another",
    ),
    "shard behind a URL": ([SHARDS + "['s3://bucket/a.tar']"], "s3://bucket/a.tar"),
    "missing tokenizer": (["data.tokenizer={files}/none.json"], "tokenizer file {files}/none.json cannot be read"),
    "tokenizer that is none": (["data.tokenizer={files}/bare.tar"], "tokenizer file {files}/bare.tar cannot be read"),
    "tokenizer larger than the vocabulary": (["model.llm.vocab_size=128"], "more than model.llm.vocab_size=128"),
    "unknown role": (
        ["data.sources.main.train_roles=[tool]"],
        "data.sources.main.train_roles=['tool']: choose some of",
    ),
    "no weight for one source": (
        ["data.sources.more.shards=[{files}/bare.tar]", "data.sources.main.weight=1"],
        "data.sources: more has no weight, but others have",
    ),
    "levels of video that rise": (["data.video.levels=[4,8]"], "data.video.levels=[4, 8]: must be tokens of a frame"),
    "video longer than a row": (["data.video.budget=100000"], "data.video.budget=100000: must be at most train.seq"),
    "learning rate that rises": (["optim.lr=1e-4", "optim.min_lr=1e-3"], "optim.min_lr=0.001: must be at most optim"),
    "too long": (["data.too_long=split"], "data.too_long=split: must be one of cut, refuse"),
    "seed": (["train.seed=-1"], "train.seed=-1: must be"),
    "start from nothing": (["checkpoint.load_from={files}/run"], "there is no checkpoint at {files}/run"),
    "start from a damaged checkpoint": (
        ["checkpoint.load_from={files}/step-00000001"],
        "checkpoint {files}/step-00000001: manifest.json cannot be used: it has no 'format'",
    ),
}


@pytest.fixture(scope="module")
def files(corpus, tmp_path_factory):
    """A folder of files that cannot be used."""
    folder = tmp_path_factory.mktemp("files")
    shard = corpus / "train" / "read-0000.tar"
    shutil.copy(shard, folder / "bare.tar")
    (folder / "changed").mkdir()
    shutil.copy(f"{shard}.index", folder / "changed")
    (folder / "changed" / shard.name).write_bytes(shard.read_bytes() + bytes(512))
    (folder / "pickle").mkdir()
    (folder / "pickle/config.json").write_text("{}")
    (folder / "pickle/pytorch_model.bin").write_bytes(b"cos\nsystem\n")
    (folder / "step-00000001").mkdir()
    (folder / "step-00000001" / "manifest.json").write_text("{}")
    return folder


def refusals(cases):
    """What `run` on this rank says to each list of overrides; it never gets as far as a collective."""
    base = composed(["+recipe=stage1", "scale=toy"])
    OmegaConf.set_struct(base, False)
    said = []
    for overrides in cases:
        try:
            loop.run(read_config(OmegaConf.merge(base, OmegaConf.from_dotlist(overrides))))
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.fixture(scope="module")
def said(corpus, files):
    """name -> the sentences of both ranks."""
    cases = []
    for overrides, _ in REFUSED.values():
        cases.append([*corpus_overrides(corpus), *(override.format(files=files) for override in overrides)])
    ranks = run_world(refusals, 2, cases)
    return dict(zip(REFUSED, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_every_rank_refuses_with_the_same_sentence(name, said, files):
    first, second = said[name]
    assert REFUSED[name][1].format(files=files) in first
    assert first == second and "\n" not in first


VIT_REFUSED = {  # name: (recipe, overrides, what the sentence says)
    "no teacher": ("vit_mim", [], "objective.teacher is missing: name a folder with a Hugging Face vision model"),
    "missing teacher": ("vit_mim", ["objective.teacher={files}/none"], "none: there is no such folder"),
    "teacher that is none": ("vit_mim", ["objective.teacher={files}/changed"], "has no config.json"),
    "teacher in a pickle": ("vit_mim", ["objective.teacher={files}/pickle"], "only as a pickle (pytorch_model.bin)"),
    "mask of everything": ("vit_mim", ["objective.mim.mask_ratio=1"], "objective.mim.mask_ratio=1.0: must be between"),
    "reading": ("vit_mim", ["objective.mim.masked=none"], "objective.mim.masked=none: must be one of drop, token"),
    "layout of an LLM": ("vit_contrastive", ["parallel.tp=2"], "parallel.tp=2: task=contrastive has no LLM to split"),
    "micro-batches": ("vit_contrastive", ["train.micro_batch_size=2"], "train.micro_batch_size=2: has no meaning in"),
    "trainable": ("vit_contrastive", ["train.trainable=[llm]"], "must name one or more of encoder, pool, text"),
    "text encoder": ("vit_contrastive", ["model.text.folder={files}/pickle"], "only as a pickle (pytorch_model.bin)"),
    "no weight": ("vit_contrastive", ["objective.contrastive.siglip_weight=-1"], "siglip_weight=-1.0: must be 0"),
    "texts of <eos> alone": ("vit_contrastive", ["model.text.max_tokens=1"], "model.text.max_tokens=1: must be at l"),
    "nothing to learn": (
        "vit_contrastive",
        ["objective.contrastive.siglip_weight=0", "objective.contrastive.superclass_weight=0"],
        "siglip_weight=0 and superclass_weight=0 leave nothing to learn",
    ),
    "no temperature": (
        "vit_omni",
        ["objective.omni.scale_init=inf"],
        "objective.omni.scale_init=inf: must be above 0",
    ),
    "rate that is no number": ("vit_mim", ["optim.lr=nan", "objective.teacher=x"], "optim.lr=nan: must be a finite"),
    "layer decay": ("vit_contrastive", ["optim.layer_decay=1.1"], "optim.layer_decay=1.1: must be above 0"),
    "average": ("vit_contrastive", ["optim.ema=1"], "optim.ema=1.0: must be from 0 to below 1"),
    "drop path": ("vit_contrastive", ["model.encoder.drop_path=1"], "model.encoder.drop_path=1.0: must be from 0"),
    "sound for nobody": ("vit_contrastive", ["data.audio_seconds=2"], "data.audio_seconds=2.0: must be 0 in task=c"),
    "nothing to hear": ("vit_omni", ["objective.omni.pairs=[frames:visual]"], "none has audio, for frames alone"),
    "sound in the LLM's rows": (
        "stage1",
        ["data.audio_seconds=2"],
        "data.audio_seconds=2.0: task=language has no use for sound",
    ),
    "a patch that is all of an image": (
        "vit_mim",
        ["objective.teacher=folder", "model.connector.merge=1", "data.min_patches=1"],
        "data.min_patches=1: must be at least 2 in task=mim",
    ),
    "blocks above all mel filters": (
        "vit_omni",
        ["model.encoder.patch_size=64"],
        "needs 128 mel filters, and there are at most 126",
    ),
    "no sound": ("vit_omni", ["data.audio_seconds=0"], "data.audio_seconds=0.0: must be above 0"),
    "pairs": ("vit_omni", ["objective.omni.pairs=[frames:smell]"], "'frames:smell' names 'smell', must be of frames"),
    "tuple larger than a chunk": ("vit_omni", ["data.video.budget=511"], "chunk_patches=2048 is smaller than a sample"),
}


@pytest.mark.parametrize("name", VIT_REFUSED)
def test_the_encoders_own_stages_refuse_before_the_ranks_meet(name, files):
    recipe, overrides, words = VIT_REFUSED[name]
    with pytest.raises(ValueError) as error:
        config = settings(recipe, *(override.format(files=files) for override in overrides))
        check_config(config, 2 if "parallel.tp=2" in overrides else 1)
        find(config.task).check_folders(config)
        open_origins(config)
    assert words in str(error.value) and "\n" not in str(error.value)


def on_the_command_line(monkeypatch, *overrides):
    """What launch/pretrain.py says as it exits, run in this process."""
    monkeypatch.setattr(sys, "argv", ["launch/pretrain.py", *overrides])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # set by the program itself; here it is also taken back
    with pytest.raises(SystemExit) as exit:
        runpy.run_path(str(ROOT / "launch/pretrain.py"), run_name="__main__")
    return exit.value.code


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["+recipe=stage1", "train.stepz=3"], "train.stepz"),
        (["+recipe=stage1", "+train.stepz=3"], "train.stepz"),
        (["+recipe=stage1", "train.steps=many"], "train.steps: Value 'many'"),
        (["+recipe=stage1", "scale=huge"], "scale/huge"),
        (["+recipe=stage9"], "recipe/stage9"),
        ([], "task is missing; choose a recipe, as in +recipe=stage1"),
        (["+recipe=stage1", "scale=toy", "parallel.tp=3"], "parallel.tp*cp*pp = 3*1*1 = 3"),
    ],
)
def test_the_program_exits_with_one_sentence(overrides, words, monkeypatch, capsys):
    said = on_the_command_line(monkeypatch, *overrides)
    assert said.startswith("error: ") and words in said
    assert "\n" not in said and "HYDRA" not in said and "To append" not in said
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["unknown key", "impossible layout", "shard without index"])
def test_torchrun_ends_with_the_sentence(name, corpus, files, tmp_path):
    """The real launcher adds its own report of ranks that failed; ours is the only other error, and no traceback."""
    wrong, words = {
        "unknown key": (["train.stepz=3"], "train.stepz"),
        "impossible layout": (["parallel.tp=3"], "parallel.tp*cp*pp = 3*1*1 = 3 does not divide the world of 2"),
        "shard without index": ([SHARDS + f"[{files}/bare.tar]"], f"{files}/bare.tar has no index"),
    }[name]
    overrides = [*corpus_overrides(corpus), f"run.dir={tmp_path}/run", *wrong]
    done = run_torchrun(2, ["launch/pretrain.py", "+recipe=stage1", "scale=toy", *overrides], timeout=120)
    said = {line for line in done.stderr.splitlines() if line.startswith("error: ")}
    assert done.returncode != 0
    assert len(said) == 1 and words in said.pop()
    assert 'launch/pretrain.py", line' not in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{files}/run"], "there is no checkpoint at {files}/run"),
        (["{files}/step-00000001"], "config.yaml is missing"),
        (["{run}"], "manifest.json cannot be used"),
        (["{run}", "parallel.tpp=2"], "parallel.tpp=2: Key 'tpp' not in 'ParallelConfig'"),
        (["{run}", "train.steps=many"], "train.steps=many: Value 'many'"),
        (["{run}", SHARDS + "[{files}/bare.tar]"], "{files}/bare.tar has no index"),
        (["{run}", "parallel.cp=2"], "parallel.tp*cp*pp = 1*2*1 = 2 does not divide the world of 1"),
        (["{spoilt}"], "{spoilt}/config.yaml cannot be used"),
    ],
)
def test_evaluation_exits_with_one_sentence(arguments, words, corpus, files, tmp_path):
    places = {"files": files, "run": tmp_path / "run", "spoilt": tmp_path / "spoilt"}
    config = settings("stage1", *corpus_overrides(corpus))
    for name, text in (("run", OmegaConf.to_yaml(OmegaConf.structured(config))), ("spoilt", "train: [")):
        (places[name] / "checkpoints").mkdir(parents=True)
        shutil.copytree(files / "step-00000001", places[name] / "checkpoints" / "step-00000001")
        (places[name] / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit:
        evaluate([argument.format(**places) for argument in arguments])
    assert exit.value.code.startswith("error: ") and words.format(**places) in exit.value.code
    assert "\n" not in exit.value.code


def test_a_sample_with_more_images_than_places_is_left_out_and_counted(corpus, tmp_path, capsys):
    picture = encoded(Image.new("RGB", (28, 28)))
    members = [*pair("good", picture), *pair("more", picture), ("more.1.png", picture)]
    shard = write_tar(tmp_path / "more.tar", members)
    assert index_shards.main([shard, "--tokenizer", str(corpus / "tokenizer.json"), "--workers", "1"]) == 0
    report = capsys.readouterr().out
    assert f"{shard}: turns, 1 samples, 1 images" in report
    assert "skipped 1: placeholder mismatch (first: sample more has 1 <image> placeholders in its text but 2" in report
