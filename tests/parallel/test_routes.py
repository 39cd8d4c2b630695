"""Routes of visual rows: each one leaves once and arrives once, at the place its position says, for every layout."""

import numpy as np
import pytest

from tandem.parallel.layout import Layout
from tandem.parallel.plan.routes import VisualPlan, assign_encoding_ranks, build_routes, local_positions, place_of

ROW, CHUNK = 96, 32
LAYOUTS = [
    Layout(world=1),
    Layout(world=4),
    Layout(world=4, tp=2, pp=2, ep=2),
    Layout(world=8, tp=2, cp=2, pp=2),
    Layout(world=8, tp=2, balance_group_size=4),
    Layout(world=16, cp=4, pp=2, balance_group_size=8),
    Layout(world=8, tp=2, cp=2, cp_comm_type="a2a"),
]


def random_plan(layout, images, micro_batches=3, seed=0):
    draw = np.random.default_rng(seed)
    tokens = draw.integers(1, 9, images)
    return VisualPlan(
        unit_I=np.arange(images),
        cost_I=tokens * 100,
        patches_I=tokens * 4,
        tokens_I=tokens,
        replica_I=draw.integers(0, layout.dp, images),
        micro_batch_I=draw.integers(0, micro_batches, images),
        start_I=draw.integers(0, ROW - 9, images),
        row_tokens=ROW,
    )


def simulate(plan, layout, balance):
    """Moves row names by the routes of every rank; returns what each rank's leaves hold."""
    encoding_rank_I = assign_encoding_ranks(plan, layout, balance)
    routes = [build_routes(plan, encoding_rank_I, layout, rank, 3, CHUNK) for rank in range(layout.world)]
    leaves = [[None] * route.leaf_U.size for route in routes]
    departed, arrived = [0] * layout.world, [0] * layout.world
    for chunk in range(len(routes[0].chunks)):
        sent = {}
        for rank, route in enumerate(routes):
            rows = [(image, token) for image in route.chunks[chunk] for token in range(plan.tokens_I[image])]
            borders = departed[rank] + np.cumsum([0, *route.send_counts_CG[chunk]])
            assert borders[-1] - borders[0] == len(rows)
            departed[rank] = borders[-1]
            out = [rows[place] for place in route.send_V[borders[0] : borders[-1]]]
            for other, first, last in zip(group_of(layout, rank), borders, borders[1:], strict=False):
                sent[rank, other] = out[first - borders[0] : last - borders[0]]
        for rank, route in enumerate(routes):
            group = group_of(layout, rank)
            assert [len(sent[other, rank]) for other in group] == route.receive_counts_CG[chunk].tolist()
            got = [row for other in group for row in sent[other, rank]]
            for place, row in zip(route.leaf_U[arrived[rank] :], got, strict=False):
                assert leaves[rank][place] is None
                leaves[rank][place] = row
            arrived[rank] += len(got)
    assert [route.send_V.size for route in routes] == departed
    assert [route.leaf_U.size for route in routes] == arrived
    return encoding_rank_I, routes, leaves


def group_of(layout, rank):
    return layout.group_ranks(layout.group_of_replica(layout.coordinates(rank).dp))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("balance", [True, False])
@pytest.mark.parametrize("images", [0, 1, 40])
def test_every_row_arrives_once_where_it_belongs(layout, balance, images):
    plan = random_plan(layout, images)
    encoding_rank_I, routes, leaves = simulate(plan, layout, balance)
    assert len({len(route.chunks) for route in routes}) == 1
    assert images < 40 or len(routes[0].chunks) > 1
    arrived = [row for leaf in leaves for row in leaf]
    assert len(arrived) == len(set(arrived)) == plan.tokens_I.sum()
    for rank, (route, leaf) in enumerate(zip(routes, leaves, strict=True)):
        place = layout.coordinates(rank)
        micro = np.repeat(np.arange(3), route.leaf_rows_M)
        for (image, token), at, batch in zip(leaf, route.at_U, micro, strict=True):
            cp, tp, index = place_of(np.array(plan.start_I[image] + token), layout, ROW)
            assert (place.pp, place.dp, place.cp, place.tp) == (0, plan.replica_I[image], cp, tp)
            assert (plan.micro_batch_I[image], index) == (batch, at)
        keys = [
            (batch, encoding_rank_I[image], image, token) for (image, token), batch in zip(leaf, micro, strict=True)
        ]
        assert keys == sorted(keys)  # whatever the chunks
    for image in range(images):  # images stay inside the balance group, or without balancing inside the replica
        encoder = layout.coordinates(encoding_rank_I[image])
        if balance:
            assert layout.group_of_replica(encoder.dp) == layout.group_of_replica(plan.replica_I[image])
        else:
            assert encoder.dp == plan.replica_I[image]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_places_cover_a_row_once(layout):
    cp, tp, index = place_of(np.arange(ROW), layout, ROW)
    assert len(set(zip(cp.tolist(), tp.tolist(), index.tolist(), strict=True))) == ROW
    for rank in range(layout.cp):
        mine = local_positions(layout, rank, ROW)
        assert (cp[mine] == rank).all()
        assert (tp[mine] * (ROW // layout.cp // layout.tp) + index[mine] == np.arange(mine.size)).all()


def test_chunks_hold_at_most_chunk_patches_in_order():
    layout = Layout(world=2)
    plan = random_plan(layout, 50)
    encoding_rank_I = assign_encoding_ranks(plan, layout, True)
    for rank in range(2):
        route = build_routes(plan, encoding_rank_I, layout, rank, 3, 40)
        assert all(plan.patches_I[ids].sum() <= 40 for ids in route.chunks)
        assert np.concatenate(route.chunks).tolist() == np.flatnonzero(encoding_rank_I == rank).tolist()
    with pytest.raises(ValueError, match="parallel.encoder.chunk_patches=4 is smaller than an image"):
        build_routes(plan, encoding_rank_I, layout, 0, 3, 4)


def test_digest_tells_plans_apart():
    layout = Layout(world=2)
    plan = random_plan(layout, 20)
    encoding_rank_I = assign_encoding_ranks(plan, layout, True)
    assert plan.digest(encoding_rank_I) == random_plan(layout, 20).digest(encoding_rank_I.copy())
    assert plan.digest(encoding_rank_I) != plan.digest(1 - encoding_rank_I)
