"""What a person sees of the data before training on it."""

import numpy as np
import pytest
from PIL import Image

from tandem.launch import inspect_data
from tests.support import corpus_overrides


def test_a_row_is_drawn_and_the_mixture_told(corpus, tmp_path, capsys):
    more = [f"+data.sources.clips.shards=['{corpus}/train/video-*.tar']", "+data.sources.clips.weight=1"]
    mixture = ["data.sources.main.weight=3", "data.workers=1", *more]
    out = tmp_path / "row.png"
    settings = ["+recipe=stage2", "scale=toy", *corpus_overrides(corpus, "{read,ground}-*"), *mixture]
    assert inspect_data.main([*settings, "--steps", "2", "--row", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("mixture", "clips", "ground", "samples/s", "MB/s", "planning"))
    picture = np.asarray(Image.open(out).convert("RGB")).astype(int)
    strip = picture[45, 10:-10]
    for colour in (inspect_data.TRAINED, inspect_data.PLAIN, inspect_data.SPECIAL, inspect_data.VISUAL):
        assert (abs(strip - colour).sum(axis=1) == 0).any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["+recipe=stage2", "scale=toy", "train.stepz=3"], "train.stepz"),
        (["scale=toy"], "choose a recipe"),
        (["+recipe=stage2", "scale=toy", "--row", "99"], "--row 99 one of the 8 rows"),
        (["+recipe=stage2", "scale=toy", "data.sources.main.shards=[none.tar]"], "none.tar"),
    ],
)
def test_what_cannot_be_shown_is_told_in_one_sentence(arguments, words, corpus, capsys):
    overrides = [] if "none.tar" in words else corpus_overrides(corpus)
    tokenizer = [f"data.tokenizer={corpus}/tokenizer.json"] if "none.tar" in words else []
    with pytest.raises(SystemExit) as end:
        inspect_data.main([*arguments, *overrides, *tokenizer])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error
