"""Rows of packed samples with a chat template: as long as their index says, and with transformers' ids."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from tandem.data.media.text import Tokenizer
from tandem.data.media.tokenizer_files import SpecialTokens
from tandem.data.planning.stream import Stream
from tandem.data.reading.reader import ShardReader
from tandem.data.shards.index import load_index
from tandem.data.vision import VisionSpec
from tandem.launch import index_shards
from tests.data.chat_tokenizers import TEMPLATES, VISION, write_folder
from tests.data.test_reader import CONFIG, open_corpus

SET = [word for key, token in VISION.items() for word in ("--set", f"special_tokens.{key}={token}")]


@pytest.fixture(scope="module", params=["chatml", "parts"])
def indexed(request, corpus, tmp_path_factory):
    """(folder of the tokenizer, pattern of shards that are indexed with it)."""
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = write_folder(folder / "tokenizer", "metaspace_first", TEMPLATES[request.param])
    for shard in sorted(Path(corpus, "train").glob("*.tar")):
        (folder / shard.name).symlink_to(shard)
    pattern = f"{folder}/*.tar"
    assert index_shards.main([pattern, "--tokenizer", str(tokenizer), "--workers", "1", *SET]) == 0
    return tokenizer, pattern


@pytest.mark.parametrize("too_long", ["refuse", "cut"])
def test_rows_are_as_planned(indexed, too_long):
    folder, pattern = indexed
    tokenizer, theirs = Tokenizer(folder, SpecialTokens(**VISION)), transformers.AutoTokenizer.from_pretrained(folder)
    corpus = open_corpus([pattern], tokenizer, fps=2)
    config = dataclasses.replace(CONFIG, too_long=too_long, seq_length=1024 if too_long == "refuse" else 160)
    stream = Stream(corpus, config, tokenizer.stamp_lengths)
    reader = ShardReader(corpus, tokenizer, VisionSpec(), 1 << 20, 0)
    compared = cut = 0
    for _ in range(6):
        plan = stream.next_step()
        rows = reader.read(plan, [], range(6))[1]
        assert not rows.failures
        cut += int(plan.cut_S.sum())
        for s in np.flatnonzero(~plan.cut_S):
            mine_I = np.flatnonzero(plan.image_sample_I == s)
            if (plan.time_I[mine_I] >= 0).any():
                continue
            index = corpus.index(plan.shard_S[s])
            record = index.samples[plan.index_S[s]]
            turns = json.loads(Path(index.shard).read_bytes()[record["text_offset"] :][: record["text_size"]])["turns"]
            begin = plan.start_S[s]
            tokens = rows.tokens[plan.row_S[s], begin : begin + plan.length_S[s]].tolist()
            assert tokens == expanded(theirs, turns, plan.tokens_I[mine_I])
            compared += 1
    assert compared > 10 and (cut > 0) == (too_long == "cut")


def expanded(theirs, turns, tokens_I) -> list[int]:
    """transformers' ids, with each image's token as often as the image has visual tokens, as its processors do."""
    spelled = {"<image>": "<|vision_start|><|image_pad|><|vision_end|>", "<bbox>": "<|box|>", "</bbox>": "<|/box|>"}
    messages = [{"role": turn["role"], "content": turn["text"]} for turn in turns]
    for message in messages:
        for tag, token in spelled.items():
            message["content"] = message["content"].replace(tag, token)
    ids, out, images = theirs.apply_chat_template(messages, tokenize=True, return_dict=False), [], iter(tokens_I)
    pad = theirs.convert_tokens_to_ids("<|image_pad|>")
    for token in ids:
        out += [token] * (int(next(images)) if token == pad else 1)
    return out


def test_an_index_of_other_special_tokens_is_refused(indexed):
    folder, pattern = indexed
    other = Tokenizer(folder, SpecialTokens(**VISION | {"image": "<|user|>"}))
    with pytest.raises(ValueError, match="was made with another tokenizer"):
        open_corpus([pattern], other)
    mine = Tokenizer(folder, SpecialTokens(**VISION))
    shard = sorted(Path(pattern).parent.glob("*.tar"))[0]
    assert load_index(shard, mine.sha256).n_samples
    with pytest.raises(SystemExit):
        index_shards.main([pattern, "--tokenizer", str(folder), "--set", "special_tokens.picture=<x>"])
