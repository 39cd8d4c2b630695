"""Every kind of data that people have, indexed or imported, and compared with its source: each text, each picture."""

import glob

import pytest

from tandem.data.formats.in_place import find_format
from tandem.data.shards.catalog import open_catalog
from tandem.data.shards.index import load_index
from tandem.data.shards.storage import open_range
from tandem.launch import import_data, index_shards
from tests.data.kinds import COUNT, KINDS, Expected

FORMATS = {
    "image_and_txt": "pairs",
    "img2dataset": "pairs",
    "image_and_json": "pairs",
    "images_alone": "images",
    "video_and_txt": "video",
    "text_lines": "text",
    "tar_gz": "pairs",
}
WITHOUT_ASSISTANT = ("images_alone",)


def samples_of(shard: str, tokenizer) -> list[Expected]:
    """The samples of an indexed shard as a reader gets them: turns, and the bytes of the media."""
    index, found = load_index(shard, tokenizer.sha256), []
    with open_range(shard) as file:
        for sample in index.samples:
            media = index.media[sample["first_media"] :][: sample["media"]]
            kinds = ["video" if medium["kind"] else "image" for medium in media]
            data = file.read(int(sample["text_offset"]), int(sample["text_size"]))
            content = find_format(index.format).content(data, bool(sample["plain"]), kinds, index.prompt, "a sample")
            turns = tuple((turn["role"], turn["text"]) for turn in content["turns"])
            found.append(Expected(turns, tuple(file.read(int(m["offset"]), int(m["size"])) for m in media)))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_data_becomes_what_its_source_says(kind, tmp_path, tokenizer, capsys):
    made = KINDS[kind](tmp_path)
    if made.imported:
        out = tmp_path / "out"
        command = [made.source, *made.options, "--out", str(out), "--tokenizer", tokenizer.path, "--workers", "1"]
        assert import_data.main(command) == 0
        shards = sorted(glob.glob(f"{out}/*.tar"))
        assert open_catalog([str(out / "data.catalog")], tokenizer.sha256).n_samples == COUNT
    else:
        shards = [made.source]
        assert index_shards.main([*shards, "--tokenizer", tokenizer.path, "--workers", "1"]) == 0
    said = capsys.readouterr().out
    assert [sample for shard in shards for sample in samples_of(shard, tokenizer)] == made.expected
    index = load_index(shards[0], tokenizer.sha256)
    assert index.format == FORMATS.get(kind, "turns") and not index.skipped
    assert index.untrained == (COUNT if kind in WITHOUT_ASSISTANT else 0)
    assert made.imported or f": {index.format}, {COUNT} samples" in said
