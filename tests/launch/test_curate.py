"""The curate command, its CLIP and its two runners. Tests that need an optional extra (hf, ray) skip without it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tandem.launch import import_data
from tandem.launch.curate import main
from tests.curation_shards import defective_shards, encoded, pair, picture
from tests.support import ROOT, write_tar

WORDS = ("a", "cat", "dog", "red", "blue", "house", "tree", "sky")


def folder_of(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "blocked.txt").write_text("spam.example.com\n")
    return defective_shards(tmp_path)


def test_command_writes_shards_and_tables(tmp_path, shards):
    _, expected = shards
    command = [sys.executable, "launch/curate.py", f"{tmp_path}/s-{{0..2}}.tar", "--out", str(tmp_path / "out")]
    command += ["--block", str(tmp_path / "blocked.txt"), "--workers", "2"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    dropped = [reason for reason in expected.values() if reason]
    files = folder_of(tmp_path / "out")
    assert set(files) == {"s-0.tar", "s-1.tar", "s-2.tar", "curation.json", "curation.md", "dropped.jsonl"}
    result = json.loads(files["curation.json"])
    assert (result["samples"], result["kept"]) == (len(expected), len(expected) - len(dropped))
    assert {reason: found["samples"] for reason, found in result["dropped"].items()} == {
        reason: dropped.count(reason) for reason in dropped
    }
    table = files["curation.md"].decode()
    for reason in dropped:
        assert f"dropped: {reason}" in run.stdout
        share = f"{100 * dropped.count(reason) / len(expected):.1f}%"
        assert f"| dropped: {reason} | {dropped.count(reason)} | {share} |" in table
    assert "the file ends at byte" in table and "3 shards in, 3 out" in table
    log = [json.loads(line) for line in files["dropped.jsonl"].decode().splitlines()]
    assert {entry["key"]: entry["reason"] for entry in log} == {key: why for key, why in expected.items() if why}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["gone.tar"], "shard gone.tar (from 'gone.tar') does not exist"),
        (["s3://bucket/a.tar"], "s3://bucket/a.tar is remote"),
        (["s-*.tar", "--workers", "0"], "--workers is 0"),
        (["s-*.tar", "--near", "40"], "--near is 40"),
        (["s-*.tar", "--min-side", "0"], "--min-side is 0"),
        (["s-*.tar", "--gpus", "1"], "it belongs to --ray"),
        (["s-*.tar", "./s-0.tar"], "have one name"),
        (["s-*.tar", "--block", "none.txt"], "block list none.txt cannot be read"),
        (["blocked.txt", "--workers", "2"], "blocked.txt is not an uncompressed tar"),
    ],
)
def test_mistakes_are_named(tmp_path, shards, monkeypatch, capsys, arguments, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--out", "out"])
    assert left.value.code == 2 and sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(tmp_path, shards, capsys):
    with pytest.raises(SystemExit):
        main([str(tmp_path / "s-0.tar"), "--out", str(tmp_path)])
    assert "is not empty" in capsys.readouterr().err


def test_ray_gives_what_processes_give(tmp_path, shards, monkeypatch):
    """Every file of the outcome, bit for bit, on a Ray of this machine: of curation and of import."""
    ray = pytest.importorskip("ray", reason="extra ray")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(25)))
    try:
        for out, more in (("processes", ["--workers", "1"]), ("ray", ["--ray", "--workers", "2"])):
            assert main(["s-*.tar", "--block", "blocked.txt", "--out", out, *more]) == 0
        assert folder_of(tmp_path / "processes") == folder_of(tmp_path / "ray")
        for out, more in (("import-1", ["--workers", "1"]), ("import-ray", ["--ray", "--workers", "2"])):
            assert import_data.main(["texts.jsonl", "--out", out, "--shard-samples", "10", *more]) == 0
        assert folder_of(tmp_path / "import-1") == folder_of(tmp_path / "import-ray")
    finally:
        ray.shutdown()


# CLIP


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    """Folder of a random CLIP, laid out as Hugging Face does: 32-pixel images and eight words."""
    transformers = pytest.importorskip("transformers", reason="extra hf")
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("clip")
    words = {word: i for i, word in enumerate(("<pad>", "<start>", "<end>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("<start> $A <end>", None, [("<start>", 1), ("<end>", 2)])
    marks = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    tower = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = tower | {"vocab_size": len(words), "max_position_embeddings": 8}
    text |= {"bos_token_id": words["<start>"], "eos_token_id": words["<end>"], "pad_token_id": words["<pad>"]}
    config = transformers.CLIPConfig(
        text_config=text, vision_config=tower | {"image_size": 32, "patch_size": 8}, projection_dim=16
    )
    torch.manual_seed(0)
    model = transformers.CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, safe_serialization=True)
    processor = transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6]
    )
    processor.save_pretrained(folder)
    return folder


def reference_cosines(folder, images, texts) -> np.ndarray:
    """One image with one text at a time, all by transformers itself."""
    import transformers

    model = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    cosines = []
    for image, text in zip(images, texts, strict=True):
        tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=8)
        inputs = {name: tokens[name] for name in ("input_ids", "attention_mask")}
        with torch.no_grad():
            out = model(pixel_values=torch.tensor(np.asarray(processor(image)["pixel_values"])), **inputs)
        cosines.append(float(out.image_embeds[0] @ out.text_embeds[0]))
    return np.array(cosines)


def scored_pairs(count=24):
    rng = np.random.default_rng(0)
    images = [picture(i, *rng.integers(40, 120, 2).tolist()) for i in range(count)]
    return images, [" ".join(rng.choice(WORDS, 1 + i % 11)) for i in range(count)]


def test_preparation_is_that_of_transformers(clip):
    from transformers import AutoImageProcessor

    from tandem.train.models.pretrained.clip_similarity import Preprocessing

    ours, processor = Preprocessing(clip), AutoImageProcessor.from_pretrained(clip)
    for image in scored_pairs()[0]:
        expected = torch.tensor(np.asarray(processor(image)["pixel_values"]))
        torch.testing.assert_close(ours.pixel_values([ours.prepare(np.asarray(image))]), expected, atol=1e-6, rtol=0)


def test_similarity_is_that_of_transformers(clip):
    """Batches with padding against single pairs: fp32 sums differ in order, hence 1e-5. Of two images the nearer."""
    from tandem.train.models.pretrained.clip_similarity import ClipSimilarity

    images, texts = scored_pairs()
    expected = reference_cosines(clip, images, texts)
    assert np.ptp(expected) > 0.1
    scorer = ClipSimilarity(clip)
    prepared = [scorer.prepare(np.asarray(image)) for image in images]
    np.testing.assert_allclose(scorer.best_match([[image] for image in prepared], texts), expected, atol=1e-5)
    pairs = scorer.best_match(list(zip(prepared[::2], prepared[1::2], strict=True)), texts[::2])
    other = reference_cosines(clip, images[1::2], texts[::2])
    np.testing.assert_allclose(pairs, np.maximum(expected[::2], other), atol=1e-5)


def test_command_drops_what_lies_below_the_similarity(tmp_path, clip):
    images, texts = scored_pairs()
    members = [m for i, text in enumerate(texts) for m in pair(f"k{i:02d}", encoded(images[i]), text)]
    shard = write_tar(tmp_path / "s.tar", members)
    cosines = reference_cosines(clip, images, texts)
    least = float(np.sort(cosines)[len(cosines) // 2 - 1 : len(cosines) // 2 + 1].mean())
    arguments = [shard, "--out", str(tmp_path / "out"), "--clip", str(clip), "--min-similarity", str(least)]
    assert main([*arguments, "--keep-duplicates", "--workers", "1"]) == 0
    log = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in log] == [f"k{i:02d}" for i in np.flatnonzero(cosines < least)]
    assert {entry["reason"] for entry in log} == {"image and text differ"} and len(log) == len(texts) // 2


def test_a_clip_without_safetensors_is_refused(tmp_path, clip, capsys):
    """Weights that would have to be unpickled are not even opened."""
    shard = write_tar(tmp_path / "s.tar", pair("a", encoded(Image.new("RGB", (40, 40)))))
    for case, sentence in (
        ("weights", "no .safetensors file"),
        ("kind", "model of type 'bert'"),
        ("none", "has no config"),
    ):
        folder = tmp_path / case
        folder.mkdir()
        for name, data in folder_of(clip).items():
            (folder / name).write_bytes(data)
        if case == "weights":
            os.rename(folder / "model.safetensors", folder / "pytorch_model.bin")
        elif case == "kind":
            (folder / "config.json").write_text('{"model_type": "bert"}')
        else:
            (folder / "config.json").unlink()
        with pytest.raises(SystemExit):
            main([shard, "--out", str(tmp_path / "out"), "--clip", str(folder)])
        assert sentence in capsys.readouterr().err
