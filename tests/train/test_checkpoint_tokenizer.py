"""A checkpoint knows its tokenizer: another one is refused, or allowed by name with what it means."""

import dataclasses

import pytest

from tandem.data.media.text import Tokenizer, build_byte_tokenizer
from tandem.data.media.tokenizer_files import SpecialTokens
from tandem.train.checkpoints.checkpoint import Reader
from tandem.train.checkpoints.tokenizer import check_resume, check_start, identity
from tandem.train.config.checks import check_config
from tests.support import settings
from tests.train.folders import HALVES, STATE, write

PARTS = {"encoder", "adapter", "llm"}


@pytest.fixture
def path(tmp_path):
    build_byte_tokenizer(tmp_path / "tokenizer.json")
    return tmp_path / "tokenizer.json"


def saved(tmp_path, **state) -> Reader:
    return Reader(write(tmp_path / "run", HALVES, state=dataclasses.replace(STATE, **state)))


def test_the_same_tokenizer_starts_and_resumes_in_silence(tmp_path, path):
    reader = saved(tmp_path, tokenizer=identity(Tokenizer(path)))
    path.rename(tmp_path / "moved.json")
    assert check_start(reader, Tokenizer(tmp_path / "moved.json"), PARTS, allowed=False) == []
    check_resume(reader, Tokenizer(tmp_path / "moved.json"))


@pytest.mark.parametrize(
    ("special", "grown", "words"),
    [
        (None, "\n", r"another tokenizer \(sha256 [0-9a-f]{12}\.\.\., not [0-9a-f]{12}\.\.\. of data.tokenizer="),
        (SpecialTokens(image="<picture>"), "", "other special tokens than data.tokenizer="),
    ],
)
def test_another_tokenizer_is_refused_or_allowed_by_name(tmp_path, path, special, grown, words):
    reader = saved(tmp_path, tokenizer=identity(Tokenizer(path)))
    path.write_text(path.read_text() + grown)
    other = Tokenizer(path, special)
    with pytest.raises(ValueError, match=f"{words}.*its llm would .*set checkpoint.other_tokenizer=true"):
        check_start(reader, other, PARTS, allowed=False)
    (told,) = check_start(reader, other, PARTS, allowed=True)
    assert told.startswith(f"llm of {reader.path} learnt with") and told.endswith("must learn its tokens anew")
    with pytest.raises(ValueError, match=f"checkpoint.resume=true, but {reader.path} was trained with .*{words}"):
        check_resume(reader, other)


def test_parts_without_words_start_with_any_tokenizer(tmp_path, path):
    reader = saved(tmp_path, tokenizer={"file": "0" * 64, "ids": "1" * 64})
    assert check_start(reader, Tokenizer(path), {"encoder", "adapter"}, allowed=False) == []


def test_an_older_checkpoint_does_not_say_its_tokenizer(tmp_path, path):
    (told,) = check_start(saved(tmp_path), Tokenizer(path), PARTS, allowed=False)
    assert "records no tokenizer" in told
    check_resume(saved(tmp_path / "again"), Tokenizer(path))


def test_an_allowance_without_a_use_is_refused():
    with pytest.raises(ValueError, match="checkpoint.other_tokenizer=true: has no use"):
        check_config(settings("stage1", "checkpoint.other_tokenizer=true"), 1)
