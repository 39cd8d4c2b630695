"""The part of the toy corpus that the encoder's own stages train on: captions, labels, clips saying what they show."""

import io
from collections import Counter

import numpy as np
import pytest

from tandem.data.media.audio import RATE, decode_audio
from tandem.data.media.image import image_size
from tandem.data.media.text import Tokenizer
from tandem.data.media.video import probe
from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.planning.plan import AUDIO
from tandem.data.planning.stream import Stream
from tandem.data.reading.captions import captions
from tandem.data.reading.reader import ShardReader
from tandem.data.shards.index import load_index
from tandem.data.synthesis import speech, vision
from tandem.data.synthesis.images import WORDS
from tandem.data.synthesis.maker import PHOTOGRAPHS, load_sources
from tandem.data.synthesis.vision import DIGITS, VisionTasks
from tandem.data.vision import VisionSpec
from tandem.launch.make_shards import VISION_TASKS
from tests.data.synthetic import stream_config
from tests.data.test_make_shards import contents

SPLITS = {"train": 60, "heldout": 16}


@pytest.fixture(scope="module")
def shards(corpus):
    """What is in every shard, {(split, task): [(json, media)]}."""
    return {(split, task): list(contents(corpus / "vision", split, task)) for split in SPLITS for task in VISION_TASKS}


def maker(seed=0, split="train") -> VisionTasks:
    return VisionTasks(load_sources(), split, np.random.default_rng(seed))


def test_every_sample_has_its_class_and_captions_that_name_it(shards):
    names = {"digit": set(WORDS[:10]), "photo": set(PHOTOGRAPHS.values())}
    names["sound"] = names["digit"] | names["photo"]
    labels = load_sources().labels
    for (split, task), samples in shards.items():
        assert len(samples) == SPLITS[split]
        for content, media in samples:
            said = [turn["text"] for turn in content["turns"]]
            assert [turn["role"] for turn in content["turns"]] == ["user", "assistant"] * (len(said) // 2)
            assert said[0] == ("<video>" if task == "sound" else "<image>") and len(media) == 1
            assert len(said) == 2 or (task == "sound" and said[2] == "What is heard?" and len(said) == 4)
            assert content["label"] in names[task] and all(content["label"] in caption for caption in said[1::2])
            assert [WORDS[labels[scan]] for scan in content["scans"]] in ([], [content["label"]])
        assert len({content["label"] for content, _ in samples}) > 5
    assert all((content["scans"] != []) == (content["label"] in WORDS) for content, _ in shards["train", "sound"])


def test_captions_are_drawn_from_templates(shards):
    said = {task: [content["turns"][1]["text"] for content, _ in shards["train", task]] for task in VISION_TASKS}
    assert set(said["digit"]) <= {template.format(word) for template in DIGITS for word in WORDS[:10]}
    assert len(set(said["digit"])) > 30 and len(set(said["photo"])) > 30 and len(set(said["sound"])) > 30
    assert "a eight" not in str(said["sound"])


def test_held_out_scans_are_held_out_and_dealt_in_rounds(shards):
    scans = {split: set() for split in SPLITS}
    for (split, _), samples in shards.items():
        scans[split].update(scan for content, _ in samples for scan in content["scans"])
    assert len(scans["train"]) > 80 and not scans["train"] & scans["heldout"]
    held = maker(split="heldout")
    dealt = Counter(held.next_scan()[0] for _ in range(VISION_TASKS["digit"].heldout))
    assert set(dealt) == set(held.scans.tolist()) and min(dealt.values()) >= 2


def test_digits_have_the_sizes_of_the_reading_task(shards):
    sizes = [image_size(io.BytesIO(media[0]), 1 << 20) for _, media in shards["train", "digit"]]
    assert min(map(min, sizes)) >= 18 and max(map(max, sizes)) <= 84 and len(set(sizes)) > 40


def test_clips_have_sound_and_are_heard_through_the_data_path(corpus, shards):
    tokenizer = Tokenizer(corpus / "tokenizer.json")
    media = load_index(f"{corpus}/vision/train/sound-0000.tar", tokenizer.sha256).media
    assert media["audio"].all() and set(media["duration_ms"]) == {1000, 2000, 3000}
    opened = Corpus.open([SourceSettings("sound", (f"{corpus}/vision/train/sound-*.tar",))], tokenizer.sha256)
    config = stream_config(
        seq_length=512, rows_per_step=60, seed=0, vision=VisionSpec(4, 256), rows="samples", audio_seconds=3
    )
    plan = Stream(opened, config, tokenizer.stamp_lengths).next_step()
    images, rows = ShardReader(opened, tokenizer, VisionSpec(), 1 << 20, 0).read(
        plan, range(len(plan.time_I)), range(60)
    )
    assert not images.failures and not rows.failures and (plan.time_I == AUDIO).sum() == 60
    tokens_T, lengths_RK = captions(rows.tokens, rows.trained, 2, 64, tokenizer.eos_id)
    texts = np.split(tokens_T, np.cumsum(lengths_RK.ravel())[:-1])
    by_key = [[turn["text"] for turn in content["turns"][1::2]] for content, _ in shards["train", "sound"]]
    for n, index in enumerate(plan.index_S.tolist()):
        assert [tokenizer.decode(text) for text in texts[2 * n : 2 * n + 2]] == [f"{t}<eos>" for t in by_key[index]]


def test_photographs_pan_and_are_named(monkeypatch):
    monkeypatch.setattr(vision, "PICTURES", 1.0)
    monkeypatch.setattr(speech, "speaks", lambda: False)
    made = maker().sound()
    video = probe(io.BytesIO(made.media[0][1]))
    assert made.label in PHOTOGRAPHS.values() and not made.scans
    assert video.duration_ms == 3000 and video.audio and min(video.height, video.width) >= 32
    frames, _, _ = maker(3).panning()
    assert frames.dtype == np.uint8 and (frames[0] != frames[-1]).any()


def keys_heard(sound_S: np.ndarray) -> str:
    """Keys of a telephone in a track, from the two strongest of their tones in windows of 50 ms."""
    rows, columns = (sorted({pair[side] for pair in speech.KEYS.values()}) for side in (0, 1))
    key_of, heard = {pair: key for key, pair in speech.KEYS.items()}, " "
    time = np.arange(800) / RATE
    for window in np.lib.stride_tricks.sliding_window_view(sound_S, 800)[::200]:
        power = {hertz: abs(np.exp(-2j * np.pi * hertz * time) @ window) for hertz in (*rows, *columns)}
        pair = max(rows, key=power.get), max(columns, key=power.get)
        loud = min(power[hertz] for hertz in pair) > 0.06 * len(window) / 4
        heard += (key_of.get(pair, "?") if loud else " ") if heard[-1] != key_of.get(pair, "?") or not loud else ""
    return heard.replace(" ", "")


@pytest.mark.parametrize("split", SPLITS)
def test_without_espeak_tones_stand_for_names(monkeypatch, split):
    for module in (speech, vision):
        monkeypatch.setattr(module, "speaks", lambda: False)
    tasks = maker(split=split)
    for _ in range(8):
        made = tasks.sound()
        number = [*WORDS[:10], *PHOTOGRAPHS.values()].index(made.label)
        heard = made.turns[3]["text"]
        assert heard in {template.format(made.label) for template in vision.TONES}
        assert keys_heard(decode_audio(io.BytesIO(made.media[0][1]))) == str(number)


@pytest.mark.parametrize("installed", ["as it is", "as a package alone"])
def test_espeak_says_names_in_many_voices(installed, monkeypatch, tmp_path):
    if installed == "as a package alone":
        monkeypatch.setenv("PATH", str(tmp_path))
    speech.spoken.cache_clear()
    waves = [speech.spoken("three", *voice) for voice in speech.TRAIN_VOICES + speech.HELDOUT_VOICES]
    assert all(0.1 < len(wave) / RATE < 1 and 0.5 < abs(wave).max() < 1.5 for wave in waves)
    assert len({wave.tobytes() for wave in waves}) == len(waves)
    spoken_again = speech.spoken.__wrapped__("three", *speech.TRAIN_VOICES[0])
    assert np.array_equal(waves[0], spoken_again)
    assert not set(speech.TRAIN_VOICES) & set(speech.HELDOUT_VOICES)
    longest = max(PHOTOGRAPHS.values(), key=len)
    assert len(speech.spoken(longest, "en-us", 150, 50)) < speech.NAMED_WITHIN * RATE


def test_an_espeak_that_fails_is_told(tmp_path, monkeypatch):
    program = tmp_path / "espeak-ng"
    program.write_text("#!/bin/sh\necho no voices here >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(ValueError, match="espeak-ng cannot say 'one' as en-us: no voices here"):
        speech.spoken("one", "en-us", 150, 51)


def test_a_track_holds_the_name_in_noise():
    rng = np.random.default_rng(0)
    for number, name in enumerate(WORDS[:10]):
        track = speech.named_aloud(name, number, 3, bool(number % 2), rng)
        assert track.shape == (3 * RATE,) and track.dtype == np.float32 and 0.1 < abs(track).max() <= 1
        assert np.count_nonzero(track) > 2.9 * RATE and abs(track[2 * RATE :]).max() < 0.05  # noise alone, to the end
