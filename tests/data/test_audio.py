import io
from resource import RUSAGE_SELF, getrusage

import av
import numpy as np
import pytest

from tandem.data.media.audio import FLOOR, MELS, RATE, TOP, decode_audio, log_mel, sound_grid, spectrogram
from tandem.data.media.video import SoundError, VideoError, decode_frames, probe
from tandem.data.vision import VisionSpec
from tests.data.conftest import encoded_video, sound_of
from tests.data.videos import Counted, make_video


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


def test_of_a_long_track_only_the_beginning_is_decoded():
    data = encoded_video(60, fps=1, sound_S=sound_of(440, seconds=60), sound_codec="pcm_s16le")
    whole, file = decode_audio(io.BytesIO(data)), Counted(data)
    assert len(whole) == 60 * RATE
    assert np.array_equal(decode_audio(file, samples=RATE), whole[:RATE])
    assert file.bytes_read < len(data) / 4  # a minute of it


def test_the_picture_of_a_sound_has_whole_blocks_for_all_that_is_heard():
    grids = sound_grid(np.array([1, 280, 281, 1000, 10**7]), 2.0, VisionSpec())
    assert grids.tolist() == [[8, 2], [8, 2], [8, 4], [8, 8], [8, 16]] and grids.dtype == np.int32
    assert sound_grid(2000, 0.3, VisionSpec()).tolist() == [8, 4]
    milliseconds = np.arange(1, 30_000, 7)
    grid = sound_grid(milliseconds, 20, VisionSpec())
    heard = np.minimum(milliseconds, 20_000)
    assert (grid[:, 0] == MELS / 14).all() and (grid % 2 == 0).all()
    assert ((grid[:, 1] * 140 >= heard) & (grid[:, 1] * 140 < heard + 280)).all()


@pytest.mark.parametrize(("patch_size", "merge", "mels"), [(14, 2, 112), (16, 2, 96), (14, 3, 126), (14, 1, 126)])
def test_every_geometry_has_filters_that_kaldi_can_make(patch_size, merge, mels):
    vision = VisionSpec(patch_size=patch_size, merge=merge)
    grid = sound_grid(1000, 1.0, vision)
    assert vision.pixels_hw(grid)[0] == mels and (grid % merge == 0).all()
    data = encoded_video(1, sound_S=sound_of(300), sound_codec="pcm_s16le")
    assert len(vision.cut(spectrogram(io.BytesIO(data), *vision.pixels_hw(grid)))) == grid.prod()


def test_a_block_above_all_filters_is_refused_where_sound_is_read():
    wide = VisionSpec(patch_size=32, merge=4)
    with pytest.raises(ValueError, match="data.audio_seconds=1.0: .*merge=4 .* 128 mel filters"):
        sound_grid(1000, 1.0, wide)
    assert sound_grid(np.zeros(0, int), 0, wide).shape == (0, 2)


def test_a_picture_shows_low_tones_above_and_time_to_the_right():
    picture = spectrogram(io.BytesIO(encoded_video(2, sound_S=sound_of(300, 3000), sound_codec="pcm_s16le")), MELS, 224)
    assert picture.shape == (112, 224, 3) and picture.dtype == np.uint8
    assert (picture == picture[..., :1]).all()
    loudest = picture[..., 0].argmax(0)
    low, high = (round((1127 * np.log(1 + hertz / 700) - 31.75) / 24.86 - 1) for hertz in (300, 3000))
    assert (abs(loudest[5:95] - low) <= 1).all() and (abs(loudest[105:195] - high) <= 1).all() and low < high
    assert picture[:, :198].max(0).min() > 100 and not picture[:, 198:].any()  # 198 windows, then black


def test_pixels_are_the_energies_on_a_scale_from_the_floor():
    data = encoded_video(2, sound_S=0.1 * np.random.default_rng(0).standard_normal(40_000), sound_codec="pcm_s16le")
    picture = spectrogram(io.BytesIO(data), MELS, 168)
    energy = log_mel(decode_audio(io.BytesIO(data)))[: 12 * 14].T
    back = FLOOR + picture[..., 0] * (TOP - FLOOR) / 255
    assert abs(back - energy).max() <= (TOP - FLOOR) / 255 / 2 + 1e-3 and picture.min() > 0 and picture.max() < 255
    assert np.array_equal(spectrogram(io.BytesIO(data), MELS, 56), picture[:, :56])  # a shorter one is its beginning
    assert spectrogram(io.BytesIO(encoded_video(2, sound_S=sound_of(300))), MELS, 420).shape == (112, 420, 3)


def test_a_file_may_be_asked_for_frames_after_its_sound():
    file = io.BytesIO(make_video(20, tone=440))
    spectrogram(file, MELS, 56)
    file.seek(0)
    assert len(list(decode_frames(file, [0, 500]))) == 2


def damaged_track(codec: str) -> bytes:
    """Noise in place of the later half of what the file holds before its tables."""
    data = bytearray(encoded_video(2, fps=1, sound_S=sound_of(440, 550), sound_codec=codec))
    first, end = data.index(b"mdat") + 8, data.index(b"moov")
    middle = (first + end) // 2
    data[middle : end - 8] = np.random.default_rng(0).bytes(end - 8 - middle)
    return bytes(data)


SILENT = np.zeros(32_000)
BROKEN = np.where(np.arange(32_000) == 999, np.nan, sound_of(440, 550))


@pytest.mark.parametrize(
    "data, message",
    [
        (make_video(3), "the file has no audio track"),
        (damaged_track("aac"), "the audio cannot be decoded: .*Invalid data"),
        (damaged_track("libmp3lame"), "the audio cannot be decoded: .*Invalid data"),
        (encoded_video(2, sound_S=SILENT), "the audio track is silent for the 2.0 seconds that are heard"),
        (encoded_video(2, sound_S=SILENT + 0.5, sound_codec="pcm_f32le"), "the audio track is silent"),
        (encoded_video(2, sound_S=1e-5 * sound_of(440, 440)), "the audio track is silent"),
        (encoded_video(2, sound_S=np.concatenate([SILENT, sound_of(440)])), "the audio track is silent"),
        (encoded_video(2, sound_S=SILENT[:100], sound_codec="pcm_s16le"), "holds 100 samples, less than one window"),
        (encoded_video(2, sound_S=BROKEN, sound_codec="pcm_f32le"), "values that are not finite"),
    ],
    ids=["none", "damaged aac", "damaged mp3", "silent", "constant", "faint", "silent while heard", "empty", "nan"],
)
def test_what_cannot_be_heard_is_told_in_one_sentence(data, message):
    assert probe(io.BytesIO(data)).duration_ms > 0
    with pytest.raises(SoundError, match=message) as raised:
        spectrogram(io.BytesIO(data), MELS, 196)
    assert "\n" not in str(raised.value)


def pcm_track(rate: int, samples: int, channels: int = 1) -> bytes:
    """Noise in a Matroska file, all samples in one packet."""
    layout, file = {1: "mono"}.get(channels, f"{channels} channels"), io.BytesIO()
    values = np.random.default_rng(0).integers(-9000, 9000, (1, samples * channels)).astype(np.int16)
    with av.open(file, "w", format="matroska") as container:
        track = container.add_stream("pcm_s16le", rate=rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(values, "s16", layout)
        frame.sample_rate = rate
        container.mux(track.encode(frame))
        container.mux(track.encode())
    return file.getvalue()


@pytest.mark.parametrize(
    "rate, channels, message",
    [
        (1, 1, "has 1 samples a second; heard are 4000 to 768000"),
        (3999, 1, "has 3999 samples a second"),
        (800_000, 1, "has 800000 samples a second"),
        (16_000, 65, "has 65 channels; the limit is 64"),
    ],
)
def test_a_track_that_is_no_recording_is_refused_before_it_is_resampled(monkeypatch, rate, channels, message):
    """At 1 Hz, the 40 KB of this file are hours: more than a gigabyte at 16 kHz."""
    data = pcm_track(rate, 20_000, channels)
    before = getrusage(RUSAGE_SELF).ru_maxrss
    for samples in (RATE, None):
        with pytest.raises(SoundError, match=message) as raised:
            decode_audio(io.BytesIO(data), samples=samples)
        assert "\n" not in str(raised.value)
    assert getrusage(RUSAGE_SELF).ru_maxrss - before < 1 << 16  # KiB


@pytest.mark.parametrize("rate, channels", [(4_000, 1), (48_000, 64), (768_000, 2)])
def test_of_a_long_frame_only_the_beginning_is_resampled(monkeypatch, rate, channels):
    """All of a track may be one frame: what is heard of it is the same, and little more is made."""
    data, made = pcm_track(rate, 4 * rate, channels), []
    whole = decode_audio(io.BytesIO(data))
    assert len(whole) == 4 * RATE

    class Counting:
        def __init__(self, inner=av.AudioResampler, **settings):
            self._inner = inner(**settings)

        def resample(self, frame):
            made.append(frame.samples / frame.sample_rate)
            return self._inner.resample(frame)

    monkeypatch.setattr(av, "AudioResampler", Counting)
    assert np.array_equal(decode_audio(io.BytesIO(data), samples=RATE // 2), whole[: RATE // 2])
    assert made == [1.5]


def test_a_file_that_is_none_has_no_error_of_sound():
    with pytest.raises(VideoError, match="cannot be decoded") as raised:
        spectrogram(io.BytesIO(b"no video at all"), MELS, 196)
    assert not isinstance(raised.value, SoundError)


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
