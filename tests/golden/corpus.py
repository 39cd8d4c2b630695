"""A tiny corpus with the same samples on every machine.

Pixels and words follow from SHAKE-128 of the sample's name.  Images are BMP and videos uncompressed with 16-bit PCM
sound, because what JPEG, H.264 and AAC give back, and how many bytes zlib writes, can depend on the processor.

    text, image, pair, clip      dialogues: no image, one, several, a video
    photo, sound                 for the vision recipes: an image with a caption, a video with a caption of its frames
                                 and one of its sound
"""

import hashlib
import io
import json
from pathlib import Path

import av
import numpy as np
from PIL import Image

from tandem.data.media.text import Tokenizer, build_byte_tokenizer
from tandem.data.shards.indexing import build_index
from tests.support import write_tar

SAMPLES = 16  # per shard
SIDES = (28, 40, 56, 61, 75, 97)  # pixels; most are no multiple of 28
WORDS = ("red", "green", "blue", "light", "dark", "steep", "flat", "left", "right", "over", "under", "wave")
FPS, SECONDS, RATE = 4, 2, 16_000

Member = tuple[str, bytes]


def make_corpus(folder: Path) -> None:
    """Writes tokenizer.json, and one shard with its index per kind of sample."""
    build_byte_tokenizer(folder / "tokenizer.json")
    tokenizer = Tokenizer(folder / "tokenizer.json")
    for kind in (_text, _image, _pair, _clip, _photo, _sound):
        domain = kind.__name__.removeprefix("_")
        members = []
        for number in range(SAMPLES):
            key = f"{domain}-{number:03d}"
            turns, media = kind(key)
            content = {"domain": domain, "turns": [_turn(place, text) for place, text in enumerate(turns)]}
            members += [(f"{key}.json", json.dumps(content).encode())]
            members += [(f"{key}.{place}.{suffix}", data) for place, (suffix, data) in enumerate(media)]
        build_index(write_tar(folder / f"{domain}.tar", members), tokenizer)


def _text(key: str) -> tuple[list[str], list[Member]]:
    return [words(f"{key} question", 6), words(f"{key} answer", 9)], []


def _image(key: str) -> tuple[list[str], list[Member]]:
    return [f"<image>{words(f'{key} question', 3)}", words(f"{key} answer", 4)], [_bmp(key)]


def _pair(key: str) -> tuple[list[str], list[Member]]:
    images = [_bmp(f"{key} {place}") for place in range(2 + hash_bytes(key, 1)[0] % 2)]
    return ["<image>" * len(images) + words(f"{key} question", 2), words(f"{key} answer", 2)], images


def _clip(key: str) -> tuple[list[str], list[Member]]:
    return [f"<video>{words(f'{key} question', 2)}", words(f"{key} answer", 3)], [("avi", _avi(key))]


def _photo(key: str) -> tuple[list[str], list[Member]]:
    return ["<image>", words(key, 2 + hash_bytes(key, 1)[0] % 4)], [_bmp(key)]


def _sound(key: str) -> tuple[list[str], list[Member]]:
    captions = words(f"{key} seen", 3), words(f"{key} heard", 2)
    return ["<video>", captions[0], "What is heard?", captions[1]], [("avi", _avi(key))]


def _turn(place: int, text: str) -> dict[str, str]:
    return {"role": ("user", "assistant")[place % 2], "text": text}


def hash_bytes(key: str, count: int) -> list[int]:
    """`count` numbers from 0 to 255 that follow from the key alone."""
    return list(hashlib.shake_128(key.encode()).digest(count))


def words(key: str, count: int) -> str:
    return " ".join(WORDS[number % len(WORDS)] for number in hash_bytes(key, count))


def picture(key: str, time: int = 0) -> np.ndarray:
    """Waves of three colours, uint8 [H, W, 3]; they move with time."""
    tall, wide, *rest = hash_bytes(key, 11)
    start_3, down_3, across_3 = np.array(rest).reshape(3, 3) % (256, 9, 9)
    y_H11 = np.arange(SIDES[tall % len(SIDES)])[:, None, None]
    x_W1 = np.arange(SIDES[wide % len(SIDES)])[:, None]
    wave_HW3 = (start_3 + down_3 * y_H11 + across_3 * (x_W1 + 2 * time)) % 512
    return np.minimum(wave_HW3, 511 - wave_HW3).astype(np.uint8)


def _bmp(key: str) -> Member:
    file = io.BytesIO()
    Image.fromarray(picture(key)).save(file, "BMP")
    return "bmp", file.getvalue()


def _avi(key: str) -> bytes:
    """Uncompressed frames, and a square wave of the key's pitch and loudness."""
    pitch, loud = hash_bytes(key, 2)
    sign_S = np.arange(RATE * SECONDS) * (100 + pitch) // (RATE // 2) % 2 * 2 - 1
    sound = av.AudioFrame.from_ndarray((sign_S * (2000 + 20 * loud)).astype(np.int16)[None], "s16", "mono")
    sound.sample_rate = RATE
    file = io.BytesIO()
    with av.open(file, "w", format="avi", options={"fflags": "+bitexact"}) as container:
        video = container.add_stream("rawvideo", rate=FPS)
        video.height, video.width = picture(key).shape[:2]
        video.pix_fmt = "bgr24"
        track = container.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for time in range(FPS * SECONDS):
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture(key, time), format="rgb24")))
        for packets in (video.encode(), track.encode(sound), track.encode()):
            container.mux(packets)
    return file.getvalue()
