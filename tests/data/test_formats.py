"""Formats of shards: which one is told, what does not fit it, and tars as other programs write them."""

import json
import tarfile
from pathlib import Path

import pytest

from tandem.data.formats.in_place import formats
from tandem.data.media.turns import escaped, placeholders, split_marks
from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.planning.stream import Stream
from tandem.data.reading.reader import ShardReader
from tandem.data.shards.catalog import open_catalog
from tandem.data.shards.index import load_index
from tandem.data.shards.indexing import build_index, is_current
from tandem.data.shards.storage import open_range
from tandem.data.shards.tars import TarSamples
from tandem.data.vision import VisionSpec
from tandem.launch.index_shards import main
from tests.data.kinds import caption, picture
from tests.data.synthetic import stream_config
from tests.support import write_tar


def pairs(count: int, start: int = 0) -> list[tuple[str, bytes]]:
    return [
        (f"{i}.{end}", data) for i in range(start, start + count) for end, data in (("jpg", picture(i)), ("txt", b"a"))
    ]


def test_a_backslash_makes_a_placeholder_text(tokenizer):
    assert split_marks(r"a\<image>b<image>\\<video>\x") == [
        (False, "a<image>b"),
        (True, "<image>"),
        (False, "\\"),
        (True, "<video>"),
        (False, "\\x"),
    ]
    for text in ("<image>", r"\<image>", r"\\<bbox></bbox>", "plain", "<", "a<video>" * 3):
        assert split_marks(escaped(text)) == [(False, text)] and placeholders(escaped(text)) == []
    turns = [{"role": "assistant", "text": r"\<image>"}]
    encoded = tokenizer.encode_sample(turns, ("assistant",), [], "s")
    assert tokenizer.decode(encoded.tokens_T[1:-1]) == "<image>" and tokenizer.image_id not in encoded.tokens_T


def test_the_prompt_of_pairs_is_a_setting_that_the_index_keeps(tmp_path, tokenizer):
    shard, prompt = write_tar(tmp_path / "a.tar", pairs(3)), "What is <image> here?"
    assert build_index(shard, tokenizer).format == "pairs"
    plain = load_index(shard, tokenizer.sha256)
    tokens_N, at_M = plain.samples["text_tokens"].copy(), plain.media["at"].copy()
    assert not is_current(shard, tokenizer, prompt=prompt) and is_current(shard, tokenizer, format="pairs")
    assert build_index(shard, tokenizer, prompt=prompt).samples == 3
    index = load_index(shard, tokenizer.sha256)
    assert index.prompt == prompt and index.digest != plain.digest
    more = len("What is  here?")
    assert (index.samples["text_tokens"] - tokens_N).tolist() == [more] * 3
    assert (index.media["at"] - at_M).tolist() == [len("What is ")] * 3
    build_index(shard, tokenizer, prompt=prompt.replace("What", "That"))  # the records are the same
    assert load_index(shard, tokenizer.sha256).digest != index.digest
    for bad, words in (("no mark", "0 placeholders"), ("<video>", "<video>; format pairs needs one <image>")):
        with pytest.raises(ValueError, match=words):
            build_index(shard, tokenizer, prompt=bad)
    with pytest.raises(ValueError, match="samples of format text have no prompt"):
        build_index(write_tar(tmp_path / "t.tar", [("a.txt", b"x")]), tokenizer, prompt="<image>")


def test_prompt_and_caption_are_read_as_they_were_indexed(tmp_path, tokenizer):
    members = [
        (f"{i}.{end}", data) for i in range(3) for end, data in (("jpg", picture(i)), ("txt", caption(i).encode()))
    ]
    shard = write_tar(tmp_path / "a.tar", members)
    build_index(shard, tokenizer, prompt="What is <image> here?")
    corpus = Corpus.open([SourceSettings("main", (shard,))], tokenizer.sha256)
    config = stream_config(seq_length=512, rows_per_step=1, seed=0, vision=VisionSpec(), block_samples=3)
    plan = Stream(corpus, config, tokenizer.stamp_lengths).next_step()
    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0)
    images, rows = reader.read(plan, range(len(plan.tokens_I)), [0])
    assert not images.failures and not rows.failures
    for place, number in enumerate(plan.index_S.tolist()):
        here = slice(int(plan.start_S[place]), int(plan.start_S[place] + plan.length_S[place]))
        tokens_T, trained_T = rows.tokens[0, here], rows.trained[0, here]
        assert tokenizer.decode(tokens_T[trained_T], skip_special=True) == caption(number)
        assert tokenizer.decode(tokens_T[~trained_T], skip_special=True) == "What is  here?"


def test_a_source_can_ask_for_a_format(tmp_path, tokenizer):
    shard = write_tar(tmp_path / "a.tar", pairs(2))
    build_index(shard, tokenizer)
    for asked in ("auto", "pairs"):
        Corpus.open([SourceSettings("main", (shard,), format=asked)], tokenizer.sha256)
    with pytest.raises(ValueError, match=r"data.sources.main.format=turns, but .* indexed as pairs"):
        Corpus.open([SourceSettings("main", (shard,), format="turns")], tokenizer.sha256)
    with pytest.raises(ValueError, match="data.sources.main.format=pear: there is no format 'pear'"):
        SourceSettings("main", (shard,), format="pear")


def test_a_sample_fits_one_format_at_most(tmp_path):
    held = {
        "turns": [("a.json", b'{"turns": []}'), ("a.jpg", b"")],
        "pairs": [("a.json", b'{"caption": "x"}'), ("a.jpg", b"")],
        "images": [("a.cls", b"3"), ("a.0.png", b""), ("a.1.png", b"")],
        "video": [("a.webm", b""), ("a.txt", b"")],
        "text": [("a.jsonl", b"{}")],
        None: [("a.json", b'{"caption": "x"}'), ("a.jpg", b""), ("a.mp4", b"")],
    }
    for name, members in held.items():
        with open_range(write_tar(tmp_path / "a.tar", members)) as file:
            (sample,) = TarSamples(file, lambda member: member.read())
            assert [each.name for each in formats().values() if each.fits(sample)] == ([name] if name else [])


def test_samples_of_another_format_are_counted_by_it(tmp_path, tokenizer):
    turns = json.dumps({"turns": [{"role": "assistant", "text": "a"}]}).encode()
    members = [*pairs(3), ("t.json", turns), ("no.jpg", picture(0)), ("latin.jpg", picture(0)), ("latin.txt", b"\xe9")]
    report = build_index(write_tar(tmp_path / "a.tar", [*members, ("e.jpg", picture(0)), ("e.txt", b" ")]), tokenizer)
    assert report.samples == 3 and report.skipped == {
        "of format turns, not pairs": 1,
        "no text": 2,
        "not UTF-8": 1,
    }
    assert "iconv" in report.examples["not UTF-8"]


def test_an_index_of_nothing_is_an_error_that_says_what_was_found(tmp_path, tokenizer, capsys):
    shard = write_tar(tmp_path / "a.tar", pairs(3))
    command = [shard, "--tokenizer", tokenizer.path, "--workers", "1"]
    words = "holds no usable sample of format turns: it has 3 .jpg, 3 .txt, which looks like format pairs"
    for again in range(2):  # and where the index is there already
        with pytest.raises(SystemExit) as end:
            main([*command, "--format", "turns"])
        captured = capsys.readouterr()
        assert end.value.code == 2 and words in captured.err, again
    with pytest.raises(ValueError, match=words):
        open_catalog([shard], tokenizer.sha256)
    assert main(command) == 0
    other = write_tar(tmp_path / "b.tar", [("a.xyz", b""), ("b.xyz", b"")])
    with pytest.raises(SystemExit):
        main([other, shard, "--tokenizer", tokenizer.path, "--catalog", str(tmp_path / "x.catalog")])
    assert "it has 2 .xyz, where a sample is KEY.json" in capsys.readouterr().err
    assert not (tmp_path / "x.catalog").exists()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "empty"), "--tokenizer", tokenizer.path])
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "empty"), "--tokenizer", tokenizer.path])
    assert "python launch/import_data.py" in capsys.readouterr().err


def test_members_of_macos_and_letters_of_any_case(tmp_path, tokenizer):
    members = []
    for i in range(4):
        said = json.dumps({"turns": [{"role": "user", "text": "<image>"}, {"role": "assistant", "text": "a"}]}).encode()
        members += [(f"._{i}.JSON", b"mac"), (f"{i}.JSON", said), (f"d/._{i}.JPG", b"mac"), (f"{i}.JPG", picture(i))]
    report = build_index(write_tar(tmp_path / "a.tar", [*members, (".DS_Store", b"x")]), tokenizer)
    assert (report.format, report.samples, report.images, report.skipped) == ("turns", 4, 4, {})


def test_media_without_numbers_are_named(tmp_path, tokenizer):
    said = json.dumps({"turns": [{"role": "user", "text": "<image>"}]}).encode()
    members = [
        ("a.json", said),
        ("a.jpg", picture(0)),
        ("b.json", said),
        ("b.jpg", picture(0)),
        ("b.png", picture(1, "PNG")),
    ]
    report = build_index(write_tar(tmp_path / "a.tar", members), tokenizer)
    assert (report.samples, report.untrained, report.skipped) == (1, 1, {"placeholder mismatch": 1})
    assert "its media .jpg, .png have no number, as in KEY.0.jpg" in report.examples["placeholder mismatch"]
    assert any("1 samples have no turn of the assistant" in line for line in report.lines())


def test_a_sparse_member_costs_its_sample_only(tmp_path, tokenizer):
    """A sparse file of GNU tar: one block of data stands for a megabyte."""
    whole = Path(write_tar(tmp_path / "a.tar", pairs(4))).read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        at = tar.getmember("2.jpg").offset
    head = bytearray(tarfile.TarInfo("s.jpg").tobuf(tarfile.GNU_FORMAT))
    head[124:136] = b"%011o\0" % 512  # bytes stored
    head[156:157] = tarfile.GNUTYPE_SPARSE
    head[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512  # the one piece: where and how long
    head[483:495] = b"%011o\0" % (1 << 20)  # bytes of the file
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    (tmp_path / "a.tar").write_bytes(whole[:at] + bytes(head) + bytes(512) + whole[at:])
    report = build_index(tmp_path / "a.tar", tokenizer)
    assert (report.samples, report.broken, report.skipped) == (4, None, {"not a plain file": 1})


def test_tars_behind_the_end_mark_are_read(tmp_path, tokenizer):
    parts = [Path(write_tar(tmp_path / f"{n}.tar", pairs(3, 10 * n))).read_bytes() for n in range(3)]
    (tmp_path / "a.tar").write_bytes(b"".join(parts))
    report = build_index(tmp_path / "a.tar", tokenizer)
    assert (report.samples, report.broken, report.skipped) == (9, None, {})
    (tmp_path / "a.tar").write_bytes(parts[0] + parts[0] + b"junk")
    report = build_index(tmp_path / "a.tar", tokenizer)
    assert report.samples == 3 and report.skipped == {"members not adjacent": 2, "cut off by the end of the shard": 1}
    assert report.broken == f"damaged: no readable tar header at byte {2 * len(parts[0])}; what follows is left out"
    (tmp_path / "a.tar").write_bytes(parts[0] + parts[1][:-10000])
    assert "truncated" in build_index(tmp_path / "a.tar", tokenizer).broken


def test_lines_of_text_are_samples(tmp_path, tokenizer):
    lines = [json.dumps({"text": caption(i)}) for i in range(3)]
    data = "\n".join([*lines, "", "{", '{"other": 1}']).encode()
    report = build_index(write_tar(tmp_path / "a.tar", [("a.jsonl", data)]), tokenizer)
    assert report.samples == 3 and report.skipped == {"bad json": 1, "no text": 1}
    assert "line 5" in report.examples["bad json"]
