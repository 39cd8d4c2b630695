import json
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.data.media.text import SPECIALS, Tokenizer
from tandem.launch.train_tokenizer import main, train_tokenizer
from tests.support import ROOT

HARD = (
    "a  b\t\n\r\n",
    "naïve 漢字 👩‍👩‍👧 e\u0301 \u00a0\u200b\ufeff",
    "<eos><user>[SOI]</bbox> <system><video>",
    "12345 3.14 don't  it's ٣٤",
    "\x00\x01\x7f\u0085\U0010ffff",
    "",
)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    path = tmp_path_factory.mktemp("trained") / "tokenizer.json"
    train_tokenizer(path, [f"{corpus}/train/*.tar"], 600)
    return path


def test_any_text_comes_back(trained):
    tokenizer = Tokenizer(trained)
    for text in HARD:
        turns = [{"role": "user", "text": text.replace("<video>", "").replace("</bbox>", "")}]
        ids = tokenizer.encode_sample(turns, (), [], "s").tokens_T[1:-1].tolist()
        assert tokenizer.decode(ids) == turns[0]["text"]
        assert not set(ids) & set(tokenizer.ids.values())


def test_it_is_as_large_as_asked_and_shortens_text(trained, tokenizer):
    learned = Tokenizer(trained)
    assert learned.vocab_size == 600 and set(learned.ids) == set(SPECIALS)
    text = "Which digit moves? A bright, grey, square photograph of a tabby cat."
    assert len(learned.encode_text(text)) < len(tokenizer.encode_text(text)) / 3
    assert len(learned.encode_text("2025")) == 4  # digits stand alone
    assert len(learned.stamp(1500)) <= 7


def test_the_same_shards_give_the_same_file(corpus, trained, tmp_path):
    command = [sys.executable, "launch/train_tokenizer.py", str(tmp_path / "again.json"), f"{corpus}/train/*.tar"]
    done = subprocess.run([*command, "--vocab-size", "600"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "again.json: 600 tokens, trained on 420 samples" in done.stdout
    assert (tmp_path / "again.json").read_bytes() == trained.read_bytes()


def test_streams_are_read_and_damaged_samples_left_out(make_shard, tmp_path):
    streamed = make_shard.json("<video>q", stream=[(0, "assistant", "zebra zebra zebra")])
    members = [("a.json", streamed), ("b.json", b"{"), ("c.json", b'{"turns": [{}]}'), ("c.0.png", b"x")]
    shard, _ = make_shard([("a.0.mp4", make_shard.video()), *members])
    line = train_tokenizer(tmp_path / "out.json", [shard], 1000)
    assert "trained on 1 samples, 2 damaged ones left out" in line and "no more pairs" in line
    tokens = json.loads((tmp_path / "out.json").read_text())["model"]["vocab"]
    assert "zebra" in tokens or "Ġzebra" in tokens


def test_mistakes_are_named(corpus, tmp_path, capsys):
    shard = f"{corpus}/train/text-0000.tar"
    (tmp_path / "there.json").write_text("{}")
    (tmp_path / "no.tar").write_bytes(b"x" * 2000)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(shard).read_bytes()[:2000])
    for arguments, message in (
        (["there.json", shard, "--vocab-size", "600"], "there.json exists already"),
        (["none/out.json", shard, "--vocab-size", "600"], "none for out.json does not exist"),
        (["out.json", shard, "--vocab-size", "200"], f"--vocab-size is 200; it must be at least {256 + len(SPECIALS)}"),
        (["out.json", f"{tmp_path}/no.tar", "--vocab-size", "600"], "no.tar is not an uncompressed tar"),
        (["out.json", str(cut), "--vocab-size", "600"], "cut.tar is not whole: truncated: the file ends at byte 2000"),
        (["out.json", f"{tmp_path}/none.tar", "--vocab-size", "600"], "none.tar"),
    ):
        with pytest.raises(SystemExit) as raised:
            main([str(tmp_path / arguments[0]), *arguments[1:]])
        assert raised.value.code == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("out.json*"))


def test_shards_without_text_are_refused(make_shard, tmp_path):
    shard, _ = make_shard([("a.json", b"{"), ("a.0.png", b"x")])
    with pytest.raises(ValueError, match="no sample with text"):
        train_tokenizer(tmp_path / "out.json", [shard], 600)
