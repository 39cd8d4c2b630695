"""The stream of steps that a configuration describes, and the reader of its bytes."""

import torch

from tandem.data.dataset import Data
from tandem.data.media.text import Tokenizer
from tandem.data.planning.corpus import Corpus, SourceSettings
from tandem.data.planning.stream import Stream, StreamConfig
from tandem.data.reading.reader import ShardReader
from tandem.parallel.comm.transfer import pin, unpin
from tandem.train.config.schema import Config, DataConfig
from tandem.train.families.vocabulary import check_vocabulary
from tandem.train.input.prefetcher import BATCHES_HELD
from tandem.train.tasks import find

IMAGES = "images"  # the format without texts


def _grow_vocabulary(config: Config, tokenizer: Tokenizer) -> None:
    """Gives the LLM of a folder a row for each token that was added to the tokenizer.

    Raises ValueError where the folder has a tokenizer of another vocabulary.
    """
    llm = config.model.llm
    assert llm.folder is not None, "asked for where a folder is named"
    if not config.checkpoint.other_tokenizer:
        check_vocabulary(llm.folder, tokenizer)
    if tokenizer.added:
        llm.vocab_size = max(llm.vocab_size, tokenizer.vocab_size)


def source_settings(data: DataConfig) -> list[SourceSettings]:
    """The sources of `data.sources`.  Raises ValueError, naming the key, for a value that cannot work."""
    if not data.sources:
        raise ValueError("data.sources is empty: name at least one source of shards")
    return [
        SourceSettings(
            **vars(source) | {"name": name, "shards": tuple(source.shards), "train_roles": tuple(source.train_roles)}
        )
        for name, source in data.sources.items()
    ]


def stream_config(config: Config) -> StreamConfig:
    """What decides the stream besides its sources.  Raises ValueError, naming the key, for a value that cannot work."""
    data = config.data
    return StreamConfig(
        seq_length=config.train.seq_length,
        rows_per_step=config.train.global_batch_size,
        seed=config.train.seed,
        vision=config.vision,
        video_budget=data.video.budget,
        video_levels=tuple(data.video.levels),
        block_samples=data.block_samples,
        window_shards=data.window_shards,
        too_long=data.too_long,
        rows="packed" if find(config.task).has_llm else "samples",
        audio_seconds=data.audio_seconds,
    )


def open_data(config: Config) -> Data:
    """Loads tokenizer and indexes.  Raises ValueError, in one sentence, for anything missing or that cannot fit."""
    data = config.data
    tokenizer = Tokenizer(data.tokenizer, data.special_tokens, data.chat)
    task = find(config.task)
    if task.has_llm and config.model.llm.folder:
        _grow_vocabulary(config, tokenizer)
    known = getattr(config.model, task.vocabulary).vocab_size
    if tokenizer.vocab_size > known:
        raise ValueError(
            f"data.tokenizer={data.tokenizer} has {tokenizer.vocab_size} tokens, more than "
            f"model.{task.vocabulary}.vocab_size={known}"
        )
    corpus = Corpus.open(source_settings(data), tokenizer.sha256)
    for source in corpus.sources:
        if task.reads_texts and IMAGES in source.catalog.formats:
            raise ValueError(
                f"data.sources.{source.settings.name} has shards of format {IMAGES}, in which nothing is said: "
                f"task {config.task} needs texts; only task mim does without"
            )
    stream = Stream(corpus, stream_config(config), tokenizer.stamp_lengths)
    pinning = {"on_new_buffer": pin, "on_old_buffer": unpin} if torch.cuda.is_available() else {}
    reader = ShardReader(
        corpus, tokenizer, config.vision, data.max_pixels, data.workers, slots=data.prefetch + BATCHES_HELD, **pinning
    )
    return Data(stream, reader)
