"""The exported model beside ours: the same inputs from the same files, the same logits, and answers by `generate`."""

import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tandem.data.media.text import Tokenizer
from tandem.data.shards.indexing import build_index
from tandem.launch.checkpoint import main
from tandem.parallel.hybrid_step import forward_only
from tandem.train.build import build_engines
from tandem.train.checkpoints import checkpoint
from tandem.train.config.checks import check_config
from tandem.train.evaluation.answers import answer_forward
from tandem.train.input.dataset import open_data
from tandem.train.input.rows import row_prefetcher
from tests.data.videos import make_video
from tests.distributed.runs import train_run
from tests.distributed.world import run_world
from tests.support import ROOT, settings, write_tar
from tests.train.folders import write_qwen3_moe

PIXELS = np.random.default_rng(0).integers(0, 255, (16, 16, 4), dtype=np.uint8)


def encoded(size: tuple[int, int], kind: str, mode: str = "RGB", **how) -> bytes:
    """A file of a blurred random picture; size: width and height."""
    file = io.BytesIO()
    picture = Image.fromarray(PIXELS).resize(size, Image.Resampling.BICUBIC)
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 250)
    else:
        picture = picture.convert(mode)
    picture.save(file, kind, **how)
    return file.getvalue()


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded((90, 60), "JPEG", exif=exif)


def turns(*texts: str, first: str = "user") -> list[dict]:
    roles = ["system"] * (first == "system") + ["user", "assistant"] * len(texts)
    return [{"role": role, "text": text} for role, text in zip(roles, texts, strict=False)]


SAMPLES = {  # of each its turns, and its media as (ending, bytes)
    "text only": (turns("be brief", "What is 1 + 1?", "2", "And 2 + 2?", "4", first="system"), []),
    "one image, decoded smaller": (turns("<image>What is this?", "noise"), [("jpg", encoded((700, 500), "JPEG"))]),
    "several images": (
        turns("Compare <image> with <image>, and with\n<image>.", "<bbox>1 2 3 4</bbox> is <text> alone."),
        [("png", encoded((40, 70), "PNG", "RGBA")), ("jpg", turned()), ("png", encoded((33, 31), "PNG", "I;16"))],
    ),
    "a video": (turns("<video>What happens? ", "It gets brighter."), [("mp4", make_video(frames=30))]),
    "a video and an image": (
        turns("<image> and <video>?", "Neither.", "<image>", "x"),
        [
            ("png", encoded((2, 300), "PNG", "P")),
            ("mp4", make_video(frames=20, rotation=90)),
            ("webp", encoded((9, 9), "WEBP")),
        ],
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with the shard, a tokenizer, and each medium as SAMPLE.NUMBER.ENDING."""
    folder, members = tmp_path_factory.mktemp("files"), []
    for place, (said, media) in enumerate(SAMPLES.values()):
        members.append((f"{place}.json", json.dumps({"turns": said}).encode()))
        for number, (ending, data) in enumerate(media):
            members.append((f"{place}.{number}.{ending}", data))
            (folder / members[-1][0]).write_bytes(data)
    write_tar(folder / "mixed.tar", members)
    from tandem.data.media.text import build_byte_tokenizer

    build_byte_tokenizer(folder / "tokenizer.json")
    report = build_index(folder / "mixed.tar", Tokenizer(folder / "tokenizer.json"))
    assert report.lines()[0].count("5 samples")
    return folder


def overrides(files: Path, llm: Path) -> list[str]:
    small = ["train.seq_length=640", "train.global_batch_size=1", "data.max_patches=64", "data.video.budget=64"]
    small += [
        "data.video.levels=[16,8]",
        "data.block_samples=5",
        "train.steps=60",
        "optim.lr=3e-3",
        f"model.llm.folder={llm}",
    ]
    return [*small, f"data.sources.main.shards=['{files}/mixed.tar']", f"data.tokenizer={files}/tokenizer.json"]


@pytest.fixture(scope="module")
def run(files, tmp_path_factory) -> Path:
    """A run of sixty steps from a language model of transformers."""
    folder = tmp_path_factory.mktemp("run")
    write_qwen3_moe(folder / "llm")
    run_world(train_run, 1, "stage1", overrides(files, folder / "llm"), str(folder / "run"), timeout=180)
    return folder / "run"


def export(*words: str) -> str:
    """What the command says as it ends, empty for success."""
    with pytest.raises(SystemExit) as end:
        main(["export", *map(str, words)])
    return end.value.code or ""


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "exported"
    assert not export(run, folder, "--format", "hf", "--file-gb", "0.0002")
    return folder


@pytest.fixture(scope="module")
def processor(exported):
    import transformers

    return transformers.AutoProcessor.from_pretrained(exported, trust_remote_code=True)


@pytest.fixture(scope="module")
def model(exported):
    import transformers

    kind = transformers.AutoModelForImageTextToText
    found, info = kind.from_pretrained(exported, trust_remote_code=True, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return found.eval()


def rows_here(config_words: list[str], run: str) -> list[dict]:
    """Of every sample of a packed row, by its number in the shard: tokens, patches, grids and logits (world of one)."""
    config = settings("stage1", "logger.wandb=disabled", *config_words)
    data = open_data(config)
    layout = check_config(config, 1)

    def keep_logits(logits_1TV, batch):
        return logits_1TV.new_zeros(()), logits_1TV[0]

    engines = build_engines(config, layout, torch.device("cpu"), forward=answer_forward, loss=keep_logits)
    checkpoint.load(checkpoint.Reader(checkpoint.resolve(run)), engines, optimizer=False)
    (prepared,) = row_prefetcher(data, config, engines.grid, steps=1)
    (logits_TV,), plan, (text,) = forward_only(engines, prepared.batch), prepared.plan, prepared.text
    ids = np.concatenate(prepared.rank_shard.routes.chunks)  # order of the images that were read
    patches_I = np.split(prepared.images.patches_NP, np.cumsum(prepared.images.patches_I)[:-1])
    patches_of = dict(zip(ids.tolist(), patches_I, strict=True))
    out = {}
    for sample in range(plan.length_S.size):
        here = slice(int(plan.start_S[sample]), int(plan.start_S[sample] + plan.length_S[sample]))
        images = np.flatnonzero(plan.image_sample_I == sample)
        out[int(plan.index_S[sample])] = {
            "ids": text.tokens[0, here].tolist(),
            "grids": plan.grid_hw_I2[images].tolist(),
            "patches": [patches_of[image].copy() for image in images.tolist()],
            "logits": logits_TV[here].clone(),
        }
    data.reader.close()
    return [out[place] for place in range(len(SAMPLES))]


@pytest.fixture(scope="module")
def ours(run, files) -> list[dict]:
    (found,) = run_world(rows_here, 1, overrides(files, run.parent / "llm"), str(run), timeout=180)
    return found


def conversation(place: int, files: Path) -> list[dict]:
    """A sample as transformers has it, its media by their paths."""
    said, media = list(SAMPLES.values())[place]
    paths = iter(str(files / f"{place}.{number}.{ending}") for number, (ending, _) in enumerate(media))
    out = []
    for turn in said:
        parts = [part for part in re.split("(<image>|<video>)", turn["text"]) if part]
        kinds = {"<image>": "image", "<video>": "video"}
        content = [
            {"type": kinds[part], "path": next(paths)} if part in kinds else {"type": "text", "text": part}
            for part in parts
        ]
        out.append({"role": turn["role"], "content": content})
    return out


def inputs_of(processor, conversations: list, side: str = "left"):
    processor.tokenizer.padding_side = side
    options = {"tokenize": True, "return_dict": True, "processor_kwargs": {"padding": True}}
    return processor.apply_chat_template(conversations, **options)


@pytest.mark.parametrize("place", range(len(SAMPLES)), ids=list(SAMPLES))
def test_files_become_the_same_ids_and_patches(place, processor, ours, files):
    inputs = inputs_of(processor, [conversation(place, files)])
    assert inputs["input_ids"][0].tolist() == ours[place]["ids"]
    if not ours[place]["grids"]:
        assert "pixel_values" not in inputs
        return
    assert inputs["image_grid_hw"].tolist() == ours[place]["grids"]
    patches_NP = torch.from_numpy(np.concatenate(ours[place]["patches"])).float()
    assert torch.equal(inputs["pixel_values"], patches_NP / (255 * 0.5) - 0.5 / 0.5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_logits_of_the_packed_row(side, processor, model, ours, files):
    inputs = inputs_of(processor, [conversation(place, files) for place in range(len(SAMPLES))], side)
    with torch.no_grad():
        logits_BTV = model(**inputs).logits
    for place, sample in enumerate(ours):
        found = logits_BTV[place][inputs["attention_mask"][place].bool()]
        assert found.shape == sample["logits"].shape
        assert (found - sample["logits"]).abs().max() <= 1e-4 * sample["logits"].abs().max(), list(SAMPLES)[place]


def test_answers_come_from_the_cache_and_for_several_beams(processor, model, files):
    """Each token is the most likely one after all before it, in a padded batch of prompts with images."""
    prompts = [conversation(place, files)[:-1] for place in (1, 2, 3)]
    processor.tokenizer.padding_side = "left"
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    inputs = processor.apply_chat_template(prompts, **options, processor_kwargs={"padding": True})
    length = inputs["input_ids"].shape[1]
    answers = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = processor.apply_chat_template([prompt], **options)
        ids = torch.cat((alone["input_ids"], answer[None, length:]), dim=1)
        with torch.no_grad():
            logits_TV = model(ids, alone["pixel_values"], alone["image_grid_hw"]).logits[0]
        logits_TV[:, model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens has it
        assert torch.equal(logits_TV[-6:-1].argmax(-1), answer[length:])
    beams = model.generate(**inputs, max_new_tokens=4, num_beams=3, num_return_sequences=3)
    assert len(beams) == 9
    single = processor.apply_chat_template([prompts[1]], **options)
    of_one = model.generate(**single, max_new_tokens=4, num_beams=3, num_return_sequences=3)
    assert torch.equal(beams[3:6, length:], of_one[:, single["input_ids"].shape[1] :])


def test_transformers_answers_as_often_as_the_checkpoint(run, exported):
    """By greedy decoding of each answer, against one forward over the true text."""
    command = [sys.executable, "launch/evaluate.py", str(run), "--exported", str(exported), "--at-least", "0.2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr + done.stdout
    scores = json.loads((run / "evaluation.json").read_text())
    ours, theirs = scores["images"]["all"], scores["exported"]["all"]
    assert ours["exact_match"] > 0.5
    assert (theirs["samples"], theirs["exact_match"]) == (ours["samples"], ours["exact_match"]) and ours["samples"] == 5


def test_the_weights_are_those_of_the_checkpoint(run, exported, model):
    reader = checkpoint.Reader(checkpoint.resolve(run))
    state = model.state_dict()
    names = [name for name in reader.tensors if not name.startswith("llm.")]
    assert names and all(torch.equal(state[name], reader.whole(name)) for name in names)
    assert torch.equal(
        state["language_model.model.embed_tokens.weight"], reader.whole("llm.embedding.word_embeddings.weight")
    )
    index = json.loads((exported / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {path.name for path in exported.glob("*.safetensors")}


def test_transformers_saves_and_opens_it_again(exported, processor, model, files, tmp_path):
    import transformers

    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True).eval()
    reread = transformers.AutoProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    inputs, same = (inputs_of(one, [conversation(2, files)]) for one in (processor, reread))
    assert all(torch.equal(inputs[key], same[key]) for key in inputs)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("part", ["all", "llm", "encoder"])
def test_the_usage_on_the_card_runs(part, run, tmp_path, monkeypatch, capsys):
    assert not export(run, tmp_path / "out", "--format", "hf", "--part", part, "--dtype", "bf16")
    card = (tmp_path / "out/README.md").read_text()
    assert "| steps | 60 |" in card and "| tokens seen, padding included | 38,400 |" in card and "mixed.tar" in card
    assert "| loss | " in card
    (code,) = re.findall("```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path / "out")
    Image.fromarray(PIXELS[..., :3]).save("image.png")
    capsys.readouterr()
    exec(code, {})
    printed = capsys.readouterr().out
    assert printed.strip() == "torch.Size([4, 64])" if part == "encoder" else printed.endswith("\n")


def test_the_encoder_alone_has_the_features_of_the_whole(run, model, processor, files, tmp_path):
    import transformers

    assert not export(run, tmp_path / "out", "--format", "hf", "--part", "encoder")
    alone = transformers.AutoModel.from_pretrained(tmp_path / "out", trust_remote_code=True)
    images = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", trust_remote_code=True)
    inputs = images([str(files / "2.0.png"), (files / "2.1.jpg").read_bytes(), PIXELS[..., :3]])
    with torch.no_grad():
        features_ND = alone(**inputs).last_hidden_state
        assert torch.equal(features_ND, model.encoder(inputs["pixel_values"], inputs["image_grid_hw"]))


def test_media_and_placeholders_must_agree(processor, model, files):
    image = files / "1.0.jpg"
    for text, media, words in (
        ("<user><image>", {}, "more <image> placeholders in the text than media"),
        ("<user>", {"images": [image, image]}, "2 more media than <image> placeholders"),
        ("<user><video>", {"images": image}, "more <video> placeholders"),
    ):
        with pytest.raises(ValueError, match=words):
            processor(text=text, **media)
    with pytest.raises(ValueError, match="a message spells <eos>, which is a special token"):
        processor.apply_chat_template([{"role": "user", "content": "a <eos> b"}])
    with pytest.raises(Exception, match="a role must be one of system, user, assistant, not tool"):
        processor.apply_chat_template([{"role": "tool", "content": "a"}])
    inputs = processor(text="<user><image>", images=PIXELS[..., :3])
    with pytest.raises(ValueError, match="input_ids has 2 image tokens, the images have 1"):
        model(torch.cat((inputs["input_ids"], inputs["input_ids"]), 1), inputs["pixel_values"], inputs["image_grid_hw"])


def test_frames_with_times_are_a_video(processor, files):
    """Frames of one's own at the times of the sampled ones give the same inputs as the file."""
    whole = processor(text="<user><video>", videos=files / "3.0.mp4")
    video = processor._sampled(files / "3.0.mp4", 2.0)[:2]
    frames = processor(text="<user><video>", videos=[video])
    assert all(torch.equal(whole[key], frames[key]) for key in whole)


def test_an_export_that_cannot_be_leaves_nothing(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    out, checkpoints = tmp_path / "out/hf", copy / "checkpoints"

    def refused(words: str, *options: str) -> None:
        sentence = export(copy, out, "--format", "hf", *options)
        assert words in sentence and "\n" not in sentence and not out.parent.exists(), sentence

    refused("--modules llm: with --format hf name", "--modules", "llm")
    refused("nowhere.json cannot be read", "--tokenizer", "nowhere.json")
    settings_text = (copy / "config.yaml").read_text()
    allowed = settings_text.replace("allow_changed: []", "allow_changed: [model.connector.kind]")
    (copy / "config.yaml").write_text(allowed.replace("kind: mlp", "kind: shuffle"))
    refused("model.connector.kind=shuffle: the exported model cannot have this yet, only mlp")
    (copy / "config.yaml").write_text(settings_text.replace("qk_norm: true", "qk_norm: false"))
    refused("model.llm.qk_norm was True and is False")
    (copy / "config.yaml").unlink()
    refused("config.yaml is missing")
    (copy / "config.yaml").write_text(settings_text)
    (checkpoints / ".step-00000064.partial").mkdir()
    refused(
        f"step-00000064 is being saved, or was when its run ended: wait for it, or name {checkpoints}/step-00000060"
    )
    file = checkpoints / "step-00000060/rank-00000.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1  # found out only when all bytes are read
    file.write_bytes(raw)
    sentence = export(checkpoints / "step-00000060", out, "--format", "hf")
    assert "rank-00000.safetensors is damaged" in sentence and not list(out.parent.glob("*"))
    shutil.rmtree(checkpoints / "step-00000060")
    assert "is being saved, or was when its run ended: wait for it" in export(copy, out, "--format", "hf")
