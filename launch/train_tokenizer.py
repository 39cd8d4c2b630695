"""Train a tokenizer on the text of shards: byte-level BPE with the special tokens of data/media/text.py.

    python launch/train_tokenizer.py tokenizer.json shards/toy/train/*.tar --vocab-size 512

The text of all turns and streams is read from the shards, whatever their format (docs/data.md); no index is needed, as
an index needs a tokenizer. Any text can be encoded and comes back unchanged. The same shards give the same file.
Afterwards, index the shards with it (launch/index_shards.py).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.data.formats.in_place import contents, take_texts
from tandem.data.media.text import texts_of, train_bpe_tokenizer
from tandem.data.media.turns import SampleError
from tandem.data.shards.catalog import expand_shards
from tandem.data.shards.storage import open_range
from tandem.data.shards.tars import TarSamples


class ShardTexts:
    """Iterates over the texts of shards; counts the samples it takes and those it leaves out as damaged."""

    def __init__(self, shards: Sequence[str]):
        self.shards, self.samples, self.skipped = shards, 0, 0

    def __iter__(self) -> Iterator[str]:
        for shard in self.shards:
            with open_range(shard) as file:
                tar = TarSamples(file, take_texts)
                for sample in tar:
                    try:
                        said = [content["turns"] for _, content in contents(sample)]
                        texts = [text for turns in said for text in texts_of(turns, sample.name)]
                    except SampleError:
                        self.skipped += 1
                        continue
                    self.samples += bool(texts)
                    yield from texts
            if tar.broken:
                raise ValueError(f"shard {shard} is not whole: {tar.broken}")
        if self.samples == 0:
            raise ValueError(f"{self.shards[0]} and the other shards hold no sample with text; nothing to train on")


def train_tokenizer(out: str | Path, patterns: Sequence[str], vocab_size: int) -> str:
    """Train, write `out` and say so in a line. Raises ValueError."""
    out = Path(out)
    if out.exists():
        raise ValueError(f"{out} exists already, and indexes may depend on it; choose another name or delete it")
    if not out.parent.is_dir():
        raise ValueError(f"folder {out.parent} for {out.name} does not exist; make it first")
    texts = ShardTexts(expand_shards(patterns))
    size = train_bpe_tokenizer(out, texts, vocab_size)
    skipped = f", {texts.skipped} damaged ones left out" if texts.skipped else ""
    fewer = f" (text gave no more pairs to reach {vocab_size})" if size < vocab_size else ""
    return f"{out}: {size} tokens{fewer}, trained on {texts.samples} samples{skipped}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", help="tokenizer file to write, for data.tokenizer; must not exist")
    parser.add_argument("shards", nargs="+", help="tar files; braces and globs work")
    parser.add_argument(
        "--vocab-size", type=int, required=True, help="tokens, the 256 bytes and the special tokens included"
    )
    arguments = parser.parse_args(argv)
    try:
        print(train_tokenizer(arguments.out, arguments.shards, arguments.vocab_size))
    except (ValueError, OSError) as error:
        parser.exit(2, f"error: {error}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
