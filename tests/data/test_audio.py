import io

import numpy as np
import pytest

from data.audio import MELS, RATE, decode_audio, log_mel
from data.video import VideoError, probe
from tests.data.videos import make_video


@pytest.mark.parametrize("kind, codec", [("mp4", "libx264"), ("webm", "libvpx-vp9"), ("mkv", "libx264")])
def test_sound_of_a_video_as_mono_at_16_kHz(kind, codec):
    data = make_video(20, kind=kind, codec=codec, tone=440)
    assert probe(io.BytesIO(data)).audio
    waveform = decode_audio(io.BytesIO(data))
    assert waveform.dtype == np.float32 and waveform.ndim == 1
    assert abs(len(waveform) - 2 * RATE) < RATE // 10  # encoders pad their last block
    second = waveform[RATE // 2 : RATE // 2 + RATE]
    assert abs(np.fft.rfft(second)).argmax() == 440
    assert abs(abs(second).max() - 0.25) < 0.05
    assert abs(len(decode_audio(io.BytesIO(data), 8000)) - 16_000) < 800


def test_a_video_without_sound():
    assert not probe(io.BytesIO(make_video(3))).audio
    with pytest.raises(VideoError, match="no audio track"):
        decode_audio(io.BytesIO(make_video(3)))


def kaldi_filter_banks(waveform, rate=RATE, mels=MELS):
    """The definition, in numpy: offset, pre-emphasis, Povey window, power spectrum, triangles in mel."""
    length, step = rate * 25 // 1000, rate // 100
    frames = np.lib.stride_tricks.sliding_window_view(waveform.astype(np.float64), length)[::step]
    frames = frames - frames.mean(1, keepdims=True)
    frames = frames - 0.97 * np.concatenate([frames[:, :1], frames[:, :-1]], 1)
    frames = frames * (0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))) ** 0.85
    padded = 1 << (length - 1).bit_length()
    power = abs(np.fft.rfft(frames, padded)) ** 2

    def mel(hertz):
        return 1127 * np.log(1 + np.asarray(hertz) / 700)

    corners = np.linspace(mel(20), mel(rate / 2), mels + 2)
    at = mel(np.arange(padded // 2) * rate / padded)[None]
    left, top, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    triangles = np.clip(np.minimum((at - left) / (top - left), (right - at) / (right - top)), 0, None)
    return np.log(np.maximum(power[:, : padded // 2] @ triangles.T, np.finfo(np.float32).eps))


def test_log_mel_is_kaldis():
    rng = np.random.default_rng(0)
    waveform = (0.1 * rng.standard_normal(RATE) + 0.2 * np.sin(np.arange(RATE) / 7)).astype(np.float32)
    found = log_mel(waveform)
    assert found.shape == (98, MELS) and found.dtype == np.float32
    assert abs(found - kaldi_filter_banks(waveform)).max() < 2e-3  # single against double precision
    assert np.array_equal(found, log_mel(waveform))  # no dither
    assert log_mel(waveform[:399]).shape == (0, MELS) and log_mel(waveform[:400]).shape == (1, MELS)
    assert np.allclose(log_mel(np.zeros(400)), np.log(np.finfo(np.float32).eps))
    assert log_mel(waveform[:8000], 8000, 40).shape == (98, 40)
