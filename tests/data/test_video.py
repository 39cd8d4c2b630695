import io
import math
import re

import numpy as np
import pytest

from tandem.data.media.video import SoundError, VideoError, _Frames, decode_frames, opened, probe, sample_frames
from tandem.data.vision import VisionSpec
from tests.data.videos import Counted, make_video, number_of, only_sound

LEVELS = (640, 512, 384, 256, 160, 128)
BUDGET = 81_920
KINDS = [("mp4", "libx264"), ("mov", "mjpeg"), ("webm", "libvpx-vp9"), ("mkv", "libx264"), ("avi", "mpeg4")]


@pytest.mark.parametrize("level, frames", [(640, 128), (512, 160), (384, 213), (256, 320), (160, 512), (128, 640)])
def test_frames_that_fit_at_each_level(level, frames):
    """The table of Seed1.5-VL section 2.2 at 1, 2 and 5 frames a second: one frame more takes the next level."""
    for fps in (1, 2, 5):
        times_ms, chosen = sample_frames(frames * 1000 // fps, fps, BUDGET, LEVELS)
        assert (len(times_ms), chosen) == (frames, level)
        assert np.array_equal(times_ms, np.arange(frames) * 1000 // fps)
        times_ms, chosen = sample_frames(math.ceil((frames + 1) * 1000 / fps), fps, BUDGET, LEVELS)
        after = LEVELS[LEVELS.index(level) + 1 :]
        if after:
            assert (len(times_ms), chosen) == (frames + 1, after[0])
        else:  # no lower level is left: as many frames, spread over the whole
            assert (len(times_ms), chosen) == (640, 128)


def test_a_long_video_is_sampled_evenly_over_its_whole_length():
    times_ms, level = sample_frames(2 * 3600 * 1000, 1, BUDGET, LEVELS)
    assert (len(times_ms), level, times_ms.dtype) == (640, 128, np.int64)
    assert times_ms[0] == 0 and times_ms[-1] == 639 * 7_200_000 // 640
    assert np.ptp(np.diff(times_ms)) <= 1


@pytest.mark.parametrize("duration_ms, fps, frames", [(1, 1, 1), (999, 1, 1), (1000, 1, 1), (1001, 1, 2), (1000, 3, 3)])
def test_short_videos_have_a_frame_for_each_begun_period(duration_ms, fps, frames):
    times_ms, level = sample_frames(duration_ms, fps, BUDGET, LEVELS)
    assert (len(times_ms), level) == (frames, 640) and times_ms[0] == 0 and times_ms[-1] < max(duration_ms, 1)


def test_every_sampling_keeps_the_budget():
    rng = np.random.default_rng(0)
    for duration_ms, fps in zip(rng.integers(1, 10**7, 300), rng.choice([0.5, 1, 2, 5, 29.97], 300), strict=True):
        times_ms, level = sample_frames(int(duration_ms), float(fps), BUDGET, LEVELS)
        assert len(times_ms) * level <= BUDGET and (np.diff(times_ms) > 0).all() and times_ms[-1] < duration_ms
    assert len(sample_frames(5000, 1, 100, (128,))[0]) == 1  # a budget below one frame still gives one


def test_a_frame_takes_at_most_its_level_and_a_small_one_less():
    for level in LEVELS:
        for size in ((1080, 1920), (1920, 1080), (700, 720)):
            tokens = int(VisionSpec(4, 4096).views(*size, level).prod()) // 4
            assert 0.8 * level < tokens <= level
    assert VisionSpec(4, 4096).views(56, 84, 640).tolist() == [4, 6]
    assert VisionSpec(4, 400).views(1080, 1920, 640).prod() <= 400  # the run's own limit holds for frames too
    assert VisionSpec(4, 4096).views(np.array([56, 28]), np.array([84, 28]), 640).tolist() == [[4, 6], [2, 2]]


@pytest.mark.parametrize("kind, codec", KINDS)
def test_frames_are_those_shown_at_each_time(kind, codec):
    data = make_video(40, kind=kind, codec=codec)
    found = probe(io.BytesIO(data))
    assert (found.height, found.width, found.duration_ms, found.fps, found.audio) == (48, 64, 4000, 10, False)
    for times_ms in ([0, 1000, 2000, 3000], [0, 99, 100, 101, 3999], [3900], [1234, 1234], range(0, 4000, 50)):
        frames = list(decode_frames(io.BytesIO(data), times_ms))
        assert [number_of(frame) for frame in frames] == [time // 100 for time in times_ms]
        assert all(frame.shape == (48, 64, 3) and frame.dtype == np.uint8 for frame in frames)


def test_frame_times_that_are_no_whole_milliseconds():
    data = make_video(30, fps=30)
    times_ms, _ = sample_frames(1000, 15, BUDGET, LEVELS)
    assert [number_of(frame) for frame in decode_frames(io.BytesIO(data), times_ms)] == list(range(0, 30, 2))


def test_times_count_from_the_first_frame():
    data = make_video(20, first_pts=35, kind="mkv")
    assert [number_of(frame) for frame in decode_frames(io.BytesIO(data), [0, 1000])] == [0, 10]


@pytest.mark.parametrize("rotation, white", [(0, (0, 0)), (90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_rotation_is_applied_and_seen_by_the_probe(rotation, white):
    """The white quarter is at the top left before a rotation to the left by so many degrees."""
    data = make_video(12, rotation=rotation)
    found = probe(io.BytesIO(data))
    (frame,) = decode_frames(io.BytesIO(data), [0])
    assert frame.shape[:2] == (found.height, found.width) == ((64, 48) if rotation % 180 else (48, 64))
    assert frame[white].min() > 240
    for corner in {(0, 0), (0, -1), (-1, 0), (-1, -1)} - {white}:
        assert frame[corner].max() < 15


@pytest.mark.parametrize("kind", ["mp4", "mkv"])
def test_what_lies_before_a_keyframe_is_not_decoded(kind, monkeypatch):
    """Of 60 frames with a keyframe every 10th, the last is reached over the 10 of its own group."""
    data = make_video(60, kind=kind)
    decoded = []
    times = _Frames._time
    monkeypatch.setattr(_Frames, "_time", lambda self, frame: decoded.append(frame.pts) or times(self, frame))
    for times_ms, most in (([0, 5900], 2 + 12), ([5900], 1 + 12), ([0, 100, 200, 300], 6)):
        decoded.clear()
        assert number_of(list(decode_frames(io.BytesIO(data), times_ms))[-1]) == times_ms[-1] // 100
        assert len(set(decoded)) <= most


def test_a_large_file_is_read_only_where_needed():
    data = make_video(60, size=(480, 640), codec="mjpeg", kind="mov")
    file = Counted(data)
    list(decode_frames(file, [0, 5000]))
    assert file.bytes_read < 2 * len(data)  # buffers are read whole
    assert number_of(next(decode_frames(Counted(data), [5000]))) == 50


def test_a_video_that_ends_before_its_last_wanted_frame():
    data = make_video(30)
    assert number_of(list(decode_frames(io.BytesIO(data), [2900, 3500]))[1]) == 29  # the last frame stands a second
    frames = decode_frames(io.BytesIO(data), [0, 9000])
    next(frames)
    with pytest.raises(VideoError, match="the video ends at 2900 ms, before 9000 ms"):
        next(frames)
    cut = make_video(40, kind="mkv")[:-3000]
    with pytest.raises(VideoError):
        list(decode_frames(io.BytesIO(cut), [0, 3900, 5000]))


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "cannot be decoded"),
        (b"no video at all", "cannot be decoded"),
        (make_video(10)[:200], "cannot be decoded"),
        (only_sound(), "no video track"),
        (make_video(0), "cannot be decoded|no video track|no duration|no frame"),
    ],
    ids=["empty", "junk", "header cut", "sound", "no frames"],
)
def test_what_is_no_video_is_told_in_one_sentence(data, message):
    for use in (probe, lambda file: list(decode_frames(file, [0]))):
        with pytest.raises(VideoError, match=message) as raised:
            use(io.BytesIO(data))
        assert "\n" not in str(raised.value)


def test_sizes_are_checked_before_anything_is_decoded():
    data = make_video(3)
    for use in (probe, lambda file, limit: list(decode_frames(file, [0], limit))):
        with pytest.raises(VideoError, match="declares 64 x 48 pixels per frame; the limit is 3071 pixels"):
            use(io.BytesIO(data), 3071)
        use(io.BytesIO(data), 3072)


@pytest.mark.parametrize("side", [9000, 60_000])
def test_absurd_sizes_are_refused_whichever_header_tells_them(side):
    """Of a file whose frames are JPEGs, the frames' own headers lie, and the container's too."""
    frames = make_video(3, kind="mov", codec="mjpeg")
    lie = side.to_bytes(2, "big") * 2
    for found in list(re.finditer(b"\xff\xc0\x00\x11\x08", frames)):
        frames = frames[: found.end()] + lie + frames[found.end() + 4 :]
    at = frames.index(b"jpeg") + 4 + 24
    both = frames[:at] + lie + frames[at + 4 :]
    for data in (frames, both):
        with pytest.raises(VideoError, match="cannot be decoded|the limit is 67108864 pixels"):
            probe(io.BytesIO(data))


def test_absurd_durations_are_refused():
    data = make_video(60, kind="mkv", size=(240, 320))
    assert data.count(b"00:00:06.0") == 1
    for hours, message in ((b"99", "the limit is 86400000 ms"), (b"00", "no duration")):
        with pytest.raises(VideoError, match=message):
            probe(io.BytesIO(data.replace(b"00:00:06.0", hours + b":00:00.0")))


def test_playlists_are_never_followed(tmp_path):
    inner = tmp_path / "inner.mp4"
    inner.write_bytes(make_video(3))
    playlists = (f"#EXTM3U\n#EXTINF:1,\n{inner}\n#EXT-X-ENDLIST\n", f"ffconcat version 1.0\nfile {inner}\n")
    for playlist in playlists:
        with pytest.raises(VideoError, match="cannot be decoded"):
            probe(io.BytesIO(playlist.encode()))


def test_errors_inside_the_file_come_out_as_video_errors():
    class Failing(io.BytesIO):
        def read(self, size=-1):
            raise OSError("the disk is gone")

    with pytest.raises(VideoError, match="cannot be decoded"), opened(Failing(b"x" * 100), "video"):
        pass


def test_of_sound_errors_are_sounds_once_the_file_is_open():
    data = make_video(3, tone=440)
    for kind, error in (("audio", SoundError), ("video", VideoError)):
        with (
            pytest.raises(VideoError, match=f"the {kind} cannot be decoded: no such thing") as raised,
            opened(io.BytesIO(data), kind),
        ):
            raise ValueError("no such thing")
        assert type(raised.value) is error
