"""Context parallelism from the settings to a micro-batch: what is refused, and that everything is cut at one place."""

import numpy as np
import pytest
import torch

from tandem.parallel.layout import Coordinates, Layout
from tandem.parallel.plan.routes import assign_encoding_ranks, build_routes, place_of
from tandem.train.config.checks import check_config
from tandem.train.config.schema import Config
from tandem.train.input.batch import RowText, context_sentence, micro_batch_of, rows_of_replica, visual_plan
from tandem.train.input.dataset import open_data
from tests.support import corpus_overrides, settings

SMALL = ["train.seq_length=256", "train.global_batch_size=8", "data.max_patches=64", "data.video.budget=32"]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (4, ["parallel.cp=4", "parallel.cp_comm_type=a2a"], "model.llm.kv_heads=2 is not divisible by parallel.tp*cp"),
        (4, ["parallel.tp=2", "parallel.cp=2", "parallel.cp_comm_type=a2a"], "parallel.tp*cp = 2*2"),
        (2, ["parallel.cp=2", "parallel.cp_comm_type=ring"], "parallel.cp_comm_type=ring: must be one of auto, a2a"),
        (2, ["parallel.cp=2", "train.seq_length=257"], "micro_batch_size = 257 is not divisible by 2"),
        (2, ["parallel.cp=2", "train.seq_length=254", "parallel.cp_comm_type=all_gather"], "is not divisible by 4"),
        (4, ["parallel.cp=4", "train.seq_length=252"], "8 chunks of a row for parallel.cp=4"),
        (4, ["parallel.tp=2", "parallel.cp=2", "train.seq_length=252"], "(parallel.tp=2 times 4 chunks of a row"),
        (64, ["parallel.cp=64", "train.seq_length=34"], "train.seq_length*micro_batch_size = 34"),
        (6, ["parallel.cp=4"], "parallel.tp*cp*pp = 1*4*1 = 4 does not divide the world of 6"),
        (2, ["parallel.cp=0"], "parallel.cp=0: must be at least 1"),
    ],
)
def test_what_cannot_work_is_refused(world, overrides, words):
    with pytest.raises(ValueError, match="parallel") as error:
        check_config(settings("stage1", *SMALL, *overrides), world)
    assert words in str(error.value)


def test_the_choice_and_what_it_sends_are_said():
    config = settings("stage1", *SMALL, "parallel.cp=2", "train.seq_length=65536")
    sentence = context_sentence(config, check_config(config, 2))
    assert "2 ranks share a row by a2a (parallel.cp_comm_type=auto): 12.00 MiB sent by a rank" in sentence


LAYOUTS = [
    (2, ["parallel.cp=2"]),
    (2, ["parallel.cp=2", "parallel.cp_comm_type=all_gather"]),
    (8, ["parallel.tp=2", "parallel.cp=4", "train.micro_batch_size=2"]),
    (8, ["parallel.tp=2", "parallel.cp=4", "model.llm.heads=8", "model.llm.kv_heads=8", "parallel.cp_comm_type=a2a"]),
]


def whole_and_parts(plan, config: Config, layout, micro_batch: int):
    """(micro-batch of one process, micro-batches of every cp rank); a token is its own position in the row."""
    b = config.train.micro_batch_size
    rows = rows_of_replica(layout, 0, config.micro_batches(layout), b)[micro_batch]
    tokens = np.arange(b * plan.seq_length, dtype=np.int32).reshape(b, -1)
    trained = np.random.default_rng(0).random(tokens.shape) < 0.5
    text = RowText.of(plan, rows, tokens, trained, pad_id=-7)

    def part(layout, cp):
        return micro_batch_of(plan, rows, text, layout, Coordinates(tp=0, cp=cp, dp=0, pp=0), CPU)

    return part(Layout(world=1), 0), [part(layout, cp) for cp in range(layout.cp)]


def assert_cut_alike(whole, parts):
    """Every token once, and with it what belongs to it."""
    assert sorted(torch.cat([part.tokens_1T[0] for part in parts]).tolist()) == list(range(whole.row_tokens))
    for part in parts:
        here_S = part.tokens_1T[0]
        for name in ("labels_1T", "loss_mask_1T", "domain_1T"):
            assert torch.equal(getattr(part, name)[0], getattr(whole, name)[0, here_S]), name
        assert torch.equal(part.row.positions_S, whole.row.positions_S[here_S])


@pytest.mark.parametrize(("world", "overrides"), LAYOUTS, ids=str)
def test_text_positions_and_visual_rows_are_cut_at_one_place(world, overrides, corpus):
    config = settings("stage1", *SMALL, *corpus_overrides(corpus), *overrides)
    layout = check_config(config, world)
    stream, crossing, count = open_data(config).stream, 0, config.micro_batches(layout)
    for plan in (stream.next_step() for _ in range(2)):
        visual = visual_plan(plan, layout, config.train.micro_batch_size, config.vision, 256)
        for number in range(count):
            whole, parts = whole_and_parts(plan, config, layout, number)
            assert_cut_alike(whole, parts)
            for image in np.flatnonzero(visual.micro_batch_I == number):
                at = visual.start_I[image] + np.arange(visual.tokens_I[image])
                cp, tp, index = place_of(at, layout, whole.row_tokens)
                local = tp * (whole.row_tokens // layout.cp // layout.tp) + index
                assert [int(parts[c].tokens_1T[0, i]) for c, i in zip(cp, local, strict=True)] == at.tolist()
                crossing += len(set(cp.tolist())) > 1
        encoding_rank_I = assign_encoding_ranks(visual, layout, True)
        delivered = [build_routes(visual, encoding_rank_I, layout, rank, count, 256).at_U.size for rank in range(world)]
        assert sum(delivered) == visual.tokens_I.sum()
    assert crossing, "no image of these steps crosses a border between cp ranks"
