"""Which tokenizer a checkpoint was trained with, and what starting from it with another one means."""

from collections.abc import Collection

from tandem.data.media.text import Tokenizer
from tandem.train.checkpoints.checkpoint import Reader

WITHOUT_WORDS = {"encoder", "adapter", "mim", "pool"}  # parts to which an id means nothing


def identity(tokenizer: Tokenizer) -> dict[str, str]:
    """What a checkpoint keeps of its tokenizer: sha256 of the file, and of all that decides the ids of a sample."""
    return {"file": tokenizer.file_sha256, "ids": tokenizer.sha256}


def difference(reader: Reader, tokenizer: Tokenizer) -> str:
    """How the tokenizer differs from that of the checkpoint, in words; empty where it does not, or is not known."""
    theirs, ours = reader.state.tokenizer, identity(tokenizer)
    if not theirs or theirs["ids"] == ours["ids"]:
        return ""
    if theirs["file"] != ours["file"]:
        shas = f"sha256 {theirs['file'][:12]}..., not {ours['file'][:12]}..."
        return f"another tokenizer ({shas} of data.tokenizer={tokenizer.path})"
    return f"another chat template or other special tokens than data.tokenizer={tokenizer.path} has now"


def check_start(reader: Reader, tokenizer: Tokenizer, parts: Collection[str], allowed: bool) -> list[str]:
    """Return messages on a start of these parts.  Raises ValueError for another tokenizer unless `allowed`."""
    words = sorted(set(parts) - WITHOUT_WORDS)
    if not words:
        return []
    if not reader.state.tokenizer:
        return [f"{reader.path} records no tokenizer: {', '.join(words)} must have been trained with this one"]
    other = difference(reader, tokenizer)
    if other and not allowed:
        raise ValueError(
            f"checkpoint {reader.path} was trained with {other}: its {', '.join(words)} would take tokens for others; "
            "name its own tokenizer, or set checkpoint.other_tokenizer=true to start from it all the same"
        )
    meaning = f"{', '.join(words)} of {reader.path} learnt with {other}, and must learn its tokens anew"
    return [meaning] if other else []


def check_resume(reader: Reader, tokenizer: Tokenizer) -> None:
    """Raises ValueError where a run would go on with another tokenizer: its rows would be others."""
    if other := difference(reader, tokenizer):
        raise ValueError(
            f"checkpoint.resume=true, but {reader.path} was trained with {other}; start from it with "
            "checkpoint.load_from, checkpoint.other_tokenizer=true and another run.dir"
        )
