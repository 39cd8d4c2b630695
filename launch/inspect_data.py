"""Shows what a run would train on: a picture of one packed row, and tables of mixture, packing and reading speed.

    python launch/inspect_data.py +recipe=stage2 scale=toy
    python launch/inspect_data.py +recipe=stage1 scale=toy data.sources.main.weight=1 --steps 50 --row 3 --out row.png

Settings are those of launch/pretrain.py. Colours of the picture: text that is trained on is green, other text grey,
special tokens violet, visual tokens blue, padding white; boxes of <bbox> are drawn in red on the sample's first image.
"""

import argparse
import math
import os
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hydra.errors import HydraException
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file of a checkout, which need not be installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tandem.data.dataset import Data
from tandem.data.media.text import Tokenizer
from tandem.data.planning.plan import StepPlan
from tandem.data.reading.reader import RowBatch, ShardReader
from tandem.data.vision import VisionSpec
from tandem.train.config.checks import check_config
from tandem.train.config.schema import Config
from tandem.train.config.settings import composed, one_sentence, read_config
from tandem.train.input.dataset import open_data

TRAINED, PLAIN, SPECIAL, VISUAL = (26, 127, 55), (110, 110, 110), (130, 80, 160), (60, 120, 200)
COLOURS = np.array([PLAIN, SPECIAL, TRAINED, VISUAL, (255, 255, 255)], np.uint8)  # by kind; the last is padding
SHADES = ((214, 228, 240), (240, 226, 210))  # of neighbouring samples in the strip
CARD, THUMB, GAP, COLUMNS, TEXT_COLUMNS, LINE = 300, 132, 10, 4, 46, 15
_BOX = re.compile(r"<bbox>\s*(\d+)\s+(\d+)\s+(\d+)\s+(\d+)\s*</bbox>")


@dataclass
class Facts:
    """Sums over the steps that were read."""

    steps: int = 0
    samples: Counter = field(default_factory=Counter)  # (source, domain) -> samples
    tokens: Counter = field(default_factory=Counter)
    images: int = 0
    visual_tokens: int = 0
    filled: int = 0
    places: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    planning: float = 0.0
    skipped: Counter = field(default_factory=Counter)  # (shard, reason) -> samples


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="+", help="+recipe=NAME and other settings as key=value")
    parser.add_argument("--steps", type=int, default=10, help="steps to read for the tables; each holds a global batch")
    parser.add_argument("--row", type=int, default=0, help="row of the first step to draw")
    parser.add_argument("--out", type=Path, default=Path("row.png"), help="picture to write")
    arguments = parser.parse_intermixed_args(argv)
    try:
        config = settings_of(arguments.settings)
        if arguments.steps < 1 or not 0 <= arguments.row < config.train.global_batch_size:
            raise ValueError(
                f"--steps {arguments.steps} must be at least 1 and --row {arguments.row} one of the "
                f"{config.train.global_batch_size} rows of a step"
            )
        data = open_data(config)
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")
    try:
        picture = draw_row(data, arguments.row)
        picture.save(arguments.out)
        print_facts(config, data, read_steps(data, arguments.steps))
        print(f"row {arguments.row} of step 0 drawn to {arguments.out}")
    finally:
        data.reader.close()
    return 0


def settings_of(overrides: list[str]) -> Config:
    """Typed and checked settings, as one process would run with them. Raises ValueError."""
    try:
        config = read_config(composed(overrides))
    except HydraException as error:
        raise ValueError(one_sentence(error)) from error
    check_config(config, 1)
    return config


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def read_steps(data: Data, steps: int) -> Facts:
    """Plans and reads whole global batches from the start of the stream, as one rank that needs everything."""
    facts = Facts()
    for _ in range(steps):
        begin = time.perf_counter()
        plan = data.stream.next_step()
        facts.planning += time.perf_counter() - begin
        images, text = read_all(data.reader, plan, np.arange(data.stream.config.rows_per_step))
        facts.seconds += time.perf_counter() - begin
        facts.steps += 1
        facts.images += plan.tokens_I.size
        facts.visual_tokens += int(plan.tokens_I.sum())
        facts.filled += int(plan.length_S.sum())
        facts.places += text.tokens.size
        facts.bytes_read += images.bytes_read + text.bytes_read
        sources = data.stream.corpus.source_of(plan.shard_S)
        for source, domain, length in zip(
            sources.tolist(), plan.domain_S.tolist(), plan.length_S.tolist(), strict=True
        ):
            facts.samples[source, domain] += 1
            facts.tokens[source, domain] += length
        facts.skipped.update((f.shard, f.reason) for f in (*images.failures, *text.failures))
        images.release()
    return facts


def read_all(reader: ShardReader, plan: StepPlan, rows: np.ndarray):
    """(images, text) of some rows of a plan."""
    return reader.read(plan, np.flatnonzero(np.isin(plan.row_I, rows)), rows)


def print_facts(config: Config, data: Data, facts: Facts) -> None:
    """Tables of the mixture and of packing and speed."""
    console = Console()
    names = [source.settings.name for source in data.stream.corpus.sources]
    samples, tokens = facts.samples.total(), facts.tokens.total()
    table = Table("source", "domain", "samples", "share", "tokens", "share", title="mixture")
    for (source, domain), count in sorted(facts.samples.items()):
        mine = facts.tokens[source, domain]
        shares = f"{count / samples:.1%}", f"{mine / tokens:.1%}"
        table.add_row(names[source], data.stream.domains[domain], f"{count:,}", shares[0], f"{mine:,}", shares[1])
    console.print(table)
    megabytes = facts.bytes_read / 1e6
    table = Table("", "", title=f"{facts.steps} steps, {config.data.workers} workers", show_header=False)
    for name, value in (
        ("tokens that hold something", f"{facts.filled / facts.places:.2%} of {facts.places:,}"),
        ("images and frames", f"{facts.images:,}, {facts.visual_tokens / facts.filled:.1%} of the tokens"),
        ("planning", f"{1e3 * facts.planning / facts.steps:.1f} ms a step"),
        ("reading and decoding", f"{samples / facts.seconds:,.0f} samples/s, {megabytes / facts.seconds:,.1f} MB/s"),
        *((f"left out: {reason}", f"{n:,} samples") for reason, n in data.stream.refused.items()),
        *((f"unreadable in {shard}: {reason}", f"{n:,}") for (shard, reason), n in sorted(facts.skipped.items())),
    ):
        table.add_row(name, value)
    console.print(table)


# ---------------------------------------------------------------------------------------------------------------------
# The picture


def draw_row(data: Data, row: int) -> Image.Image:
    """One row of the stream's next step: a strip of its positions, and a card for every sample. Uses no step up."""
    start = data.stream.state()
    plan = data.stream.next_step()
    data.stream.load_state(start)
    batch, text = read_all(data.reader, plan, np.array([row]))
    images = pictures(plan, batch, np.flatnonzero(plan.row_I == row), data.stream.config.vision)
    batch.release()
    kind_P = kinds_of(data.reader.tokenizer, text.tokens[0], text.trained[0])
    samples = np.flatnonzero(plan.row_S == row).tolist()
    cards = [draw_card(data, plan, text, sample, images) for sample in samples]
    width = COLUMNS * (CARD + GAP) + GAP
    columns: list[list[Image.Image]] = [[] for _ in range(COLUMNS)]
    heights = [0] * COLUMNS
    for card in cards:
        least = heights.index(min(heights))
        columns[least].append(card)
        heights[least] += card.height + GAP
    sheet = Image.new("RGB", (width, 90 + max(heights) + GAP), "white")
    draw_strip(sheet, plan, samples, COLOURS[kind_P])
    for place, column in enumerate(columns):
        y = 90
        for card in column:
            sheet.paste(card, (GAP + place * (CARD + GAP), y))
            y += card.height + GAP
    return sheet


def kinds_of(tokenizer: Tokenizer, tokens_P: np.ndarray, trained_P: np.ndarray) -> np.ndarray:
    """Kind of every token, int64 [P], into COLOURS."""
    kind_P = np.isin(tokens_P, list(tokenizer.ids.values())).astype(np.int64)
    kind_P[trained_P] = 2
    kind_P[tokens_P == tokenizer.image_id] = 3
    kind_P[tokens_P == tokenizer.pad_id] = 4
    return kind_P


def draw_strip(sheet: Image.Image, plan: StepPlan, samples: list[int], colours_P3: np.ndarray) -> None:
    """The row from its first to its last position, and under it which sample each belongs to."""
    draw, width = ImageDraw.Draw(sheet), sheet.width - 2 * GAP
    filled = int(plan.length_S[samples].sum())
    title = f"{plan.seq_length:,} positions, {len(samples)} samples, {filled / plan.seq_length:.1%} filled"
    draw.text((GAP, 6), title, "black", font(13))
    for place, (colour, words) in enumerate(
        ((TRAINED, "trained text"), (PLAIN, "other text"), (SPECIAL, "special token"), (VISUAL, "visual token"))
    ):
        x = 420 + 150 * place
        draw.rectangle((x, 9, x + 10, 19), fill=colour)
        draw.text((x + 16, 6), words, "black", font(13))
    strip = Image.fromarray(colours_P3[None]).resize((width, 30), Image.Resampling.NEAREST)
    sheet.paste(strip, (GAP, 30))
    for place, sample in enumerate(samples):
        first, last = plan.start_S[sample], plan.start_S[sample] + plan.length_S[sample]
        left, right = (GAP + int(edge) * width // plan.seq_length for edge in (first, last))
        draw.rectangle((left, 62, right, 76), fill=SHADES[place % 2])
        if right - left > 24:
            draw.text((left + 2, 61), str(place), "black", font(11))


def draw_card(data: Data, plan: StepPlan, text: RowBatch, sample: int, images: dict[int, Image.Image]) -> Image.Image:
    """One sample: its name, its images and its text."""
    at = slice(int(plan.start_S[sample]), int(plan.start_S[sample] + plan.length_S[sample]))
    pieces = text_pieces(data, text.tokens[0][at], text.trained[0][at])
    mine = [images[i] for i in np.flatnonzero(plan.image_sample_I == sample).tolist()]
    boxes = _BOX.findall("".join(words for words, _ in pieces))
    lines = wrap(pieces)
    rows: list[list[Image.Image]] = []
    row: list[Image.Image] = []
    used = 0
    for image in [boxed(image, boxes if i == 0 else []) for i, image in enumerate(mine)]:
        if used + image.width > CARD - 2 * GAP and row:
            rows.append(row)
            row, used = [], 0
        row.append(image)
        used += image.width + 4
    rows += [row] if row else []
    height = 24 + sum(max(i.height for i in row) + 4 for row in rows) + LINE * len(lines) + 8
    card = Image.new("RGB", (CARD, height), (250, 250, 250))
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, 0, CARD - 1, height - 1), outline=(205, 205, 205))
    order = int(np.sum(plan.row_S[:sample] == plan.row_S[sample]))
    domain = data.stream.domains[plan.domain_S[sample]]
    draw.text((6, 4), f"{order}  {domain}, {plan.length_S[sample]} tokens", "black", font(12))
    y = 24
    for row in rows:
        x = 6
        for image in row:
            card.paste(image, (x, y))
            x += image.width + 4
        y += max(i.height for i in row) + 4
    for line in lines:
        x = 6
        for words, colour in line:
            draw.text((x, y), words, colour, font(11))
            x += draw.textlength(words, font(11))
        y += LINE
    return card


def text_pieces(data: Data, tokens: np.ndarray, trained: np.ndarray) -> list[tuple[str, tuple[int, int, int]]]:
    """(text, colour) of runs of alike tokens; runs of visual tokens are named by their length."""
    tokenizer, pieces = data.reader.tokenizer, []
    kind = kinds_of(tokenizer, tokens, trained)
    for run in np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(kind)) + 1):
        if kind[run[0]] == 3:
            pieces.append((f"({len(run)} visual)", VISUAL))
        else:
            pieces.append((tokenizer.decode(tokens[run]), tuple(COLOURS[kind[run[0]]].tolist())))
    return pieces


def wrap(pieces: list[tuple[str, tuple]], most: int = 24) -> list[list[tuple[str, tuple]]]:
    """Lines of coloured words; after `most` lines the rest is left out."""
    lines: list[list[tuple[str, tuple]]] = []
    line: list[tuple[str, tuple]] = []
    used = 0
    for words, colour in pieces:
        for part in textwrap.wrap(words.replace("\n", " "), TEXT_COLUMNS, drop_whitespace=False) or [""]:
            if used + len(part) > TEXT_COLUMNS and line:
                lines.append(line)
                line, used = [], 0
            line.append((part, colour))
            used += len(part)
    lines += [line] if line else []
    return lines if len(lines) <= most else [*lines[:most], [("...", PLAIN)]]


def pictures(plan: StepPlan, batch, image_ids: np.ndarray, vision: VisionSpec) -> dict[int, Image.Image]:
    """Thumbnails of images of a batch, by their number in the plan, put together from the patches."""
    out, first = {}, 0
    for i, grid in zip(image_ids.tolist(), batch.grid_hw_I2.tolist(), strict=True):
        patches_NP = batch.patches_NP[first : first + math.prod(grid)]
        image = Image.fromarray(vision.to_pixels(patches_NP, grid))
        first += len(patches_NP)
        image.thumbnail((CARD - 2 * GAP, THUMB if plan.time_I[i] < 0 else THUMB // 2))
        out[i] = image
    return out


def boxed(image: Image.Image, boxes: list[tuple[str, ...]]) -> Image.Image:
    """The image with boxes, given as x y x y in thousandths, drawn on it."""
    for box in boxes:
        x0, y0, x1, y1 = (int(value) for value in box)
        scale_x, scale_y = (image.width - 1) / 999, (image.height - 1) / 999
        corners = sorted((x0 * scale_x, x1 * scale_x)), sorted((y0 * scale_y, y1 * scale_y))
        ImageDraw.Draw(image).rectangle((corners[0][0], corners[1][0], corners[0][1], corners[1][1]), outline="red")
    return image


def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


if __name__ == "__main__":
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.exit(main())
