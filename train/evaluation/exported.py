"""Exact match of an exported folder: transformers reads the shards' samples itself and answers by greedy decoding.

A sample is right if every trained turn is generated whole, end token included, after the true turns before it.  That is
the measure of `answers.py`, by another program from the same files.

Legend: B prompts of a batch.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tandem.data.dataset import Data
from tandem.data.formats.in_place import find_format
from tandem.data.media.turns import KIND_OF, Turn, checked_turns, media_of
from tandem.data.reading.jobs import KINDS
from tandem.data.shards.index import ShardIndex
from tandem.data.shards.storage import open_range
from tandem.train.config.schema import Config
from tandem.train.evaluation.answers import Score
from tandem.train.models.pretrained.hugging_face import first_line, transformers_for

ASKED = "assistant"  # whose turns are generated
BATCH = 32  # prompts answered together


@dataclass
class Question:
    """A conversation up to an assistant's turn, and the text of that turn; sample: its number in the shard."""

    sample: int
    messages: list[dict]
    answer: str
    images: list[bytes]
    videos: list[bytes]


class Answers:
    """A model and its processor, as transformers opens them.

    Raises ValueError where the folder is none that `launch/checkpoint.py export --format hf` writes.
    """

    def __init__(self, folder: str, device: torch.device):
        transformers = transformers_for("--exported")
        if not (Path(folder) / "modeling_tandem.py").is_file():
            raise ValueError(f"--exported {folder}: is no folder of launch/checkpoint.py export --format hf --part all")
        try:
            self._processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            kind = transformers.AutoModelForImageTextToText
            self._model = kind.from_pretrained(folder, trust_remote_code=True).to(device).eval()
        except Exception as error:  # errors of the hub's HTTP libraries have no common base
            raise ValueError(f"--exported {folder}: cannot be opened: {first_line(error)}") from error
        self._processor.tokenizer.padding_side = "left"
        added = self._processor.tokenizer.added_tokens_decoder.values()
        self.special = [token.content for token in added if token.special]

    @torch.no_grad()
    def right(self, batch: Sequence[Question], fps: float) -> list[bool]:
        """Which questions are answered with exactly the answer."""
        tokenizer, template = self._processor.tokenizer, self._processor.apply_chat_template
        wanted = [tokenizer(one.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"] for one in batch]
        texts = [template(one.messages, add_generation_prompt=True) for one in batch]
        media = {"images": [one.images for one in batch], "videos": [one.videos for one in batch]}
        inputs = self._processor(text=texts, fps=fps, padding=True, **media)
        inputs = inputs.to(self._model.device)
        longest = max(map(len, wanted))
        answers = self._model.generate(**inputs, max_new_tokens=longest, do_sample=False)
        answers_B = answers[:, inputs["input_ids"].shape[1] :].tolist()
        return [found[: len(ids)] == ids for found, ids in zip(answers_B, wanted, strict=True)]


def evaluate_folder(config: Config, data: Data, folder: str, device: torch.device) -> dict[str, dict]:
    """{domain: {"samples", "exact_match"}} of the configuration's shards, and of all ("all"), by transformers.

    Raises ValueError for a folder that cannot be opened, and for sources that train other turns than the assistant's.
    """
    for name, settings in config.data.sources.items():
        if list(settings.train_roles) != [ASKED]:
            raise ValueError(f"data.sources.{name}.train_roles={settings.train_roles}: --exported answers for {ASKED}")
    answers, corpus = Answers(folder, device), data.stream.corpus
    scores = {name: Score() for name in data.stream.domains}
    for shard in range(corpus.n_shards):
        index = corpus.index(shard)
        questions = list(_questions(index, answers.special))
        fps = corpus.sources[int(corpus.source_of(shard))].settings.fps
        wrong = _wrong(answers, [one for of_sample in questions for one in of_sample], fps)
        domains = corpus.group_domains(shard)[np.asarray(index.samples)["group"]]
        for domain, of_sample in zip(domains.tolist(), questions, strict=True):
            if of_sample:
                score = scores[data.stream.domains[domain]]
                score.samples += 1
                score.exact += of_sample[0].sample not in wrong
    scores["all"] = Score(*(sum(getattr(one, key) for one in scores.values()) for key in ("samples", "exact")))
    return {name: {key: one.numbers()[key] for key in ("samples", "exact_match")} for name, one in scores.items()}


def _wrong(answers: Answers, questions: list[Question], fps: float) -> set[int]:
    """Samples with a turn that is answered otherwise."""
    questions.sort(key=lambda one: len(str(one.messages)))  # little padding
    found: set[int] = set()
    for begin in range(0, len(questions), BATCH):
        batch = questions[begin : begin + BATCH]
        found |= {one.sample for one, good in zip(batch, answers.right(batch, fps), strict=True) if not good}
    return found


def _questions(index: ShardIndex, special: Sequence[str]) -> Iterator[list[Question]]:
    """Those of each sample of a shard; none where a text spells a special token or stands inside of a video, which a
    message cannot say."""
    media, format = np.asarray(index.media), find_format(index.format)
    with open_range(index.shard) as file:
        for number, sample in enumerate(np.asarray(index.samples)):
            mine = media[int(sample["first_media"]) :][: int(sample["media"])]
            kinds, name = [KINDS[kind] for kind in mine["kind"].tolist()], f"sample {number} of {index.shard}"
            text = file.read(int(sample["text_offset"]), int(sample["text_size"]))
            content = format.content(text, bool(sample["plain"]), kinds, index.prompt, name)
            turns = checked_turns(content["turns"], name)
            if any(turn.stream or _spells(turn, special) for turn in turns):
                yield []
                continue
            waiting = iter(file.read(int(medium["offset"]), int(medium["size"])) for medium in mine)
            yield list(_of_sample(number, turns, waiting))


def _spells(turn: Turn, special: Sequence[str]) -> bool:
    return any(token in piece for is_mark, piece in turn.pieces if not is_mark for token in special)


def _of_sample(sample: int, turns: list[Turn], media: Iterator[bytes]) -> Iterator[Question]:
    messages: list[dict] = []
    seen: dict[str, list[bytes]] = {"image": [], "video": []}
    for turn in turns:
        said = "".join(piece for _, piece in turn.pieces)
        if turn.role == ASKED:
            yield Question(sample, list(messages), said, list(seen["image"]), list(seen["video"]))
        for mark in media_of(turn.pieces):
            seen[KIND_OF[mark]].append(next(media))
        messages.append({"role": turn.role, "content": said})
