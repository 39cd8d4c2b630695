import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tandem.data.media.video import sample_frames
from tandem.data.planning.view import (
    FIRST_IMAGE_CUT,
    IMAGE_TOO_LONG,
    NO_TEXT_LEFT,
    REASONS,
    TOO_LONG,
    Resolution,
    Views,
    view_shard,
)
from tandem.data.vision import VisionSpec
from tests.data.synthetic import Medium, MemoryShard, Sample, corpus_of, random_shards, stamp_lengths

RESOLUTION = Resolution(
    seq_length=200,
    too_long="refuse",
    vision=VisionSpec(4, 64),
    video_budget=40,
    video_levels=(9, 4, 1),
    audio_seconds=0,
)


def view_of(samples, fps=1.0, **changes):
    resolution = Resolution(**{**vars(RESOLUTION), **changes})
    shard = MemoryShard.of(samples)
    return view_shard(shard, np.arange(len(shard.groups), dtype=np.int16), fps, resolution, stamp_lengths)


def spelled(sample: Sample, fps: float, resolution: Resolution) -> list:
    """The sample token by token: "text", "event", or (unit, what) inside the unit of an image or frame."""
    out, unit = ["text"] * sample.text_tokens, 0
    for medium in reversed(sample.media):  # from the back, so that places ahead stay
        if not medium.duration_ms:
            grid = resolution.vision.views(medium.height, medium.width)
            out[medium.at - 1] = out[medium.at] = "mark"
            out[medium.at : medium.at] = ["visual"] * int(grid.prod() // 4)
            continue
        times, level = sample_frames(medium.duration_ms, fps, resolution.video_budget, resolution.video_levels)
        tokens = int(resolution.vision.views(medium.height, medium.width, level).prod() // 4)
        content = []
        for frame, time in enumerate(times.tolist()):
            content += ["stamp"] * int(stamp_lengths(np.array([time]))[0]) + ["mark"] + ["visual"] * tokens + ["mark"]
            following = times[frame + 1] if frame + 1 < len(times) else np.inf
            for event_ms, event_tokens in medium.events:
                if (time <= event_ms or frame == 0) and event_ms < following:
                    content += ["event"] * event_tokens
        out[medium.at : medium.at] = content
    marked = []
    for place, kind in enumerate(out):
        begins = kind == "stamp" and (place == 0 or out[place - 1] != "stamp")
        begins |= kind == "mark" and out[place - 1] != "stamp" and out[place + 1] == "visual"
        unit += begins
        marked.append(kind if kind in ("text", "event") else (unit, kind))
    return marked


def units(tokens: list) -> list[tuple[int, int, int]]:
    """(begin, first visual token, end) of each unit."""
    found = {}
    for place, token in enumerate(tokens):
        if isinstance(token, tuple):
            begin, first, _ = found.get(token[0], (place, None, None))
            found[token[0]] = (begin, place if first is None and token[1] == "visual" else first, place + 1)
    return list(found.values())


@st.composite
def samples(draw):
    made = []
    for _ in range(draw(st.integers(1, 6))):
        at, media = draw(st.integers(1, 30)), []
        for _ in range(draw(st.integers(0, 4))):
            height, width = draw(st.tuples(st.integers(1, 400), st.integers(1, 400)))
            if draw(st.booleans()):
                at += 1
                media.append(Medium(at, height, width))
                at += 1
            else:
                duration = draw(st.integers(1, 12_000))
                times = sorted(draw(st.lists(st.integers(0, duration + 2000), max_size=4)))
                events = tuple((time, draw(st.integers(1, 9))) for time in times)
                media.append(Medium(at, height, width, duration, events))
            at += draw(st.integers(0, 20))
        made.append(Sample(at + draw(st.integers(1, 120)), tuple(media), domain=draw(st.sampled_from("xyz"))))
    return made


@settings(max_examples=60, deadline=None)
@given(samples(), st.sampled_from([0.5, 1.0, 2.0]))
def test_lengths_and_places_are_those_of_the_layout(made, fps):
    view = view_of(made, fps, seq_length=1 << 20)
    assert (view.refused_N == 0).all() and not view.cut_N.any()
    for n, sample in enumerate(made):
        tokens = spelled(sample, fps, Resolution(**{**vars(RESOLUTION), "seq_length": 1 << 20}))
        assert view.length_N[n] == len(tokens)
        mine = slice(int(view.first_image_N[n]), int(view.first_image_N[n] + view.images_N[n]))
        assert view.offset_I[mine].tolist() == [first for _, first, _ in units(tokens)]
        ends = view.offset_I[mine] + view.tokens_I[mine] + 1
        assert ends.tolist() == [end for _, _, end in units(tokens)]
    assert len(view.media_I) == view.images_N.sum()
    assert np.array_equal(view.tokens_I, VisionSpec().tokens(view.grid_hw_I2))


@settings(max_examples=100, deadline=None)
@given(samples(), st.integers(10, 150))
def test_cut_samples_fill_the_row_and_never_split_an_image(made, seq_length):
    view = view_of(made, seq_length=seq_length, too_long="cut")
    for n, sample in enumerate(made):
        tokens = spelled(sample, 1.0, RESOLUTION)
        found = units(tokens)
        split = [begin for begin, _, end in found if begin < seq_length < end]
        kept = min([len(tokens), seq_length, *split])
        whole = sum(end <= kept for _, _, end in found)
        reason = ""
        if kept < len(tokens) and found and not whole:
            huge = any(end - begin > seq_length for begin, _, end in found)
            reason = IMAGE_TOO_LONG if huge else FIRST_IMAGE_CUT
        elif kept < len(tokens) and kept - sum(end - begin for begin, _, end in found[:whole]) <= 1:
            reason = NO_TEXT_LEFT
        assert REASONS[view.refused_N[n]] == reason
        if not reason:
            assert (view.length_N[n], view.images_N[n], view.cut_N[n]) == (kept, whole, kept < len(tokens))


def test_a_video_with_events_by_hand():
    """<user> [stamp 5][SOI] v [EOI] EE [stamp][SOI] v [EOI] E [stamp][SOI] v [EOI] EE then 7 tokens of text."""
    video = Medium(1, 28, 28, duration_ms=3000, events=((0, 1), (999, 1), (1000, 1), (2500, 1), (9000, 1)))
    view = view_of([Sample(8, (video,))])
    assert view.time_I.tolist() == [0, 1000, 2000] and view.tokens_I.tolist() == [1, 1, 1]
    assert view.offset_I.tolist() == [7, 17, 26]
    assert view.length_N.tolist() == [8 + 3 * 8 + 5]


def test_long_samples_are_refused_with_their_reason():
    image = Medium(2, 280, 280)  # 100 visual tokens where the resolution allows
    made = [Sample(199), Sample(201), Sample(150, (image,)), Sample(98, (image,))]
    view = view_of(made, vision=VisionSpec(4, 400))
    assert [REASONS[code] for code in view.refused_N] == ["", TOO_LONG, TOO_LONG, ""]
    view = view_of(made, vision=VisionSpec(4, 400), seq_length=101)
    assert [REASONS[code] for code in view.refused_N] == [TOO_LONG, TOO_LONG, IMAGE_TOO_LONG, IMAGE_TOO_LONG]
    view = view_of([Sample(150, (Medium(99, 28, 28), Medium(120, 28, 28)))], seq_length=121, too_long="cut")
    assert (view.length_N[0], view.images_N[0]) == (120, 1)  # the second image's [SOI] is at 120
    for seq_length, fits in ((100, False), (101, True)):  # the first image's [EOI] is at 100
        view = view_of([Sample(150, (Medium(99, 28, 28),))], seq_length=seq_length, too_long="cut")
        assert (view.refused_N[0] == 0) == fits and view.images_N[0] == fits
    text_first = view_of([Sample(150, (Medium(120, 28, 28),))], seq_length=100, too_long="cut")
    assert REASONS[text_first.refused_N[0]] == FIRST_IMAGE_CUT
    only_images = view_of([Sample(9, (Medium(2, 28, 28), Medium(4, 28, 28)))], seq_length=5, too_long="cut")
    assert REASONS[only_images.refused_N[0]] == NO_TEXT_LEFT


def test_frames_share_the_budget_of_their_video():
    large = dict(height=500, width=500)
    view = view_of([Sample(5, (Medium(1, **large, duration_ms=ms),)) for ms in (4000, 9500, 90_000)], seq_length=4000)
    assert view.images_N.tolist() == [4, 10, 40] and set(view.tokens_I[:4]) == {9} and set(view.tokens_I[4:14]) == {4}
    assert set(view.tokens_I[14:]) == {1} and view.time_I[14:17].tolist() == [0, 2250, 4500]
    view = view_of([Sample(5, (Medium(1, **large, duration_ms=4000),))], fps=0.5, vision=VisionSpec(4, 16))
    assert view.time_I.tolist() == [0, 2000] and set(view.tokens_I) == {4}  # data.max_patches holds for frames too


@pytest.mark.parametrize("most", [1, 100])
def test_columns_are_gathered_over_shards_however_few_views_are_kept(most):
    corpus = corpus_of(random_shards(5, 40, seed=1), random_shards(3, 20, seed=2), settings=[{}, {"fps": 2}])
    resolution = Resolution(**{**vars(RESOLUTION), "seq_length": 4000})
    views = Views(corpus, resolution, stamp_lengths, most)
    rng = np.random.default_rng(0)
    shard_X = rng.integers(0, 8, 300)
    place_X = rng.integers(0, np.where(shard_X < 5, 40, 20))
    length_X, domain_X = views.gather(shard_X, place_X, "length_N", "domain_N")
    for x in range(300):
        view = views.of(int(shard_X[x]))
        assert length_X[x] == view.length_N[place_X[x]] and domain_X[x] == view.domain_N[place_X[x]]
    assert len(views._views) <= most
    empty = np.zeros(0, np.int64)
    assert views.gather(empty, empty, "length_N")[0].shape == (0,)


def test_a_shard_without_samples_and_without_media():
    view = view_of([])
    assert len(view.length_N) == 0 and view.grid_hw_I2.shape == (0, 2)
    view = view_of([Sample(5), Sample(500)], too_long="cut")
    assert view.length_N.tolist() == [5, 200] and view.cut_N.tolist() == [False, True]
    assert view.offset_I.shape == (0,) and view.images_N.tolist() == [0, 0]
