"""What toy videos sound like: a name spoken by espeak-ng where it is installed, telephone tones elsewhere.

    espeak-ng   "three" in one of a few voices; those of training and of held-out clips differ.  The program where it is
                on the PATH, else the library of the package espeakng-loader (extra `toy`)
    tones       keys of the name's number, as a telephone dials them: two tones at once (DTMF, ITU-T Q.23)

The digits have the numbers 0 to 9, the photographs those from 10 on.

Shapes: S samples at 16 kHz, float32 within -1 to 1.
"""

import functools
import importlib.util
import shutil
import subprocess
import sys

import av
import numpy as np

from tandem.data.synthesis import espeak
from tandem.data.synthesis.videos import SOUND_RATE

# Voice, words a minute, pitch of 0 to 99.
TRAIN_VOICES = (
    ("en-us", 150, 50),
    ("en-us", 180, 35),
    ("en-us+m2", 140, 45),
    ("en-us+m4", 165, 60),
    ("en-us+f1", 150, 55),
    ("en-us+f3", 175, 45),
    ("en-gb", 140, 40),
    ("en-gb", 170, 60),
    ("en-gb+m1", 155, 50),
    ("en-gb+m6", 130, 55),
    ("en-gb+f2", 160, 50),
    ("en-gb+f4", 145, 65),
)
HELDOUT_VOICES = (("en-us+m3", 155, 40), ("en-us+f2", 145, 60), ("en-gb+m5", 160, 55), ("en-gb+f1", 170, 45))
KEYS = {"1": (697, 1209), "2": (697, 1336), "3": (697, 1477), "4": (770, 1209), "5": (770, 1336)}
KEYS |= {"6": (770, 1477), "7": (852, 1209), "8": (852, 1336), "9": (852, 1477), "0": (941, 1336)}
NAMED_WITHIN = 2  # seconds from the beginning, so that little of a track need be heard
_QUIET = 0.01  # of a word's loudest sample: what is cut off before and behind it


@functools.cache
def speaks() -> bool:
    """Whether this machine has espeak-ng, as a program or as a package."""
    return shutil.which("espeak-ng") is not None or importlib.util.find_spec("espeakng_loader") is not None


def command_for(name: str, voice: str, speed: int, pitch: int) -> list[str]:
    """The command that writes a name, spoken, to stdout as a WAV file."""
    if shutil.which("espeak-ng"):
        return ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", name]
    import espeakng_loader  # an extra

    files = [espeak.__file__, espeakng_loader.get_library_path(), espeakng_loader.get_data_path()]
    voice = voice.replace("en-gb", "en")  # the library finds British English, the default of "en", by this name alone
    return [sys.executable, "-IS", *files, voice, str(speed), str(pitch), name]


@functools.cache
def spoken(name: str, voice: str, speed: int, pitch: int) -> np.ndarray:
    """A name in a voice, loudest at 1. Raises ValueError if espeak-ng fails."""
    said = subprocess.run(command_for(name, voice, speed, pitch), capture_output=True)
    head, _, wave = said.stdout.partition(b"data")
    samples_S = np.frombuffer(wave[4 : len(wave) // 2 * 2], "<i2").astype(np.float32)
    if said.returncode or not samples_S.any():
        raise ValueError(f"espeak-ng cannot say {name!r} as {voice}: {said.stderr.decode(errors='replace').strip()}")
    frame = av.AudioFrame.from_ndarray(samples_S[None] / abs(samples_S).max(), "fltp", "mono")
    frame.sample_rate = int.from_bytes(head[24:28], "little")
    resampler = av.AudioResampler("fltp", "mono", SOUND_RATE)
    parts = [*resampler.resample(frame), *resampler.resample(None)]
    wave_S = np.concatenate([part.to_ndarray()[0] for part in parts])
    loud = np.flatnonzero(abs(wave_S) > _QUIET)
    return wave_S[loud[0] : loud[-1] + 1]


def dialled(number: int, rng: np.random.Generator) -> np.ndarray:
    """The keys of a number, one after another."""
    parts = []
    for key in str(number):
        time_S = np.arange(int(SOUND_RATE * rng.uniform(0.15, 0.35))) / SOUND_RATE
        tones_S = sum(np.sin(2 * np.pi * hertz * time_S) for hertz in KEYS[key]) / 2
        fade_S = np.minimum(1, np.minimum(time_S, time_S[::-1]) / 0.01)
        parts += [tones_S * fade_S, np.zeros(int(SOUND_RATE * 0.05))]
    return np.concatenate(parts[:-1]).astype(np.float32)


def named_aloud(name: str, number: int, seconds: int, heldout: bool, rng: np.random.Generator) -> np.ndarray:
    """A track of whole `seconds`: faint noise, and somewhere in its first two seconds the name, as far as it fits."""
    if speaks():
        voices = HELDOUT_VOICES if heldout else TRAIN_VOICES
        word_S = spoken(name, *voices[int(rng.integers(len(voices)))])
    else:
        word_S = dialled(number, rng)
    track_S = rng.normal(0, 10 ** rng.uniform(-3.5, -2.5), SOUND_RATE * seconds)
    within = SOUND_RATE * min(seconds, NAMED_WITHIN)
    word_S = word_S[:within] * rng.uniform(0.2, 0.8)
    begin = int(rng.integers(within - len(word_S) + 1))
    track_S[begin : begin + len(word_S)] += word_S
    return np.clip(track_S, -1, 1).astype(np.float32)
