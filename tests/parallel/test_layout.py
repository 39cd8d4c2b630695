"""Which layouts are possible, and who sits where."""

import pytest

from tandem.parallel.layout import Layout


def test_coordinates_and_ranks_are_inverse():
    layout = Layout(world=48, tp=2, cp=2, pp=3, ep=2)
    seats = {layout.coordinates(rank) for rank in range(48)}
    assert len(seats) == 48
    for rank in range(48):
        place = layout.coordinates(rank)
        assert layout.rank_of(tp=place.tp, cp=place.cp, dp=place.dp, pp=place.pp) == rank


def test_groups_are_whole_replicas_that_cover_the_world():
    layout = Layout(world=16, tp=2, pp=2, balance_group_size=8)
    groups = [layout.group_ranks(group) for group in range(layout.groups)]
    assert sorted(rank for ranks in groups for rank in ranks) == list(range(16))
    for group, ranks in enumerate(groups):
        assert {int(layout.group_of_replica(layout.coordinates(rank).dp)) for rank in ranks} == {group}


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (dict(world=4, tp=3), "parallel.tp*cp*pp = 3*1*1 = 3 does not divide the world of 4"),
        (dict(world=4, tp=2, ep=1, etp=1), "parallel.etp=1 with parallel.ep=1 and parallel.tp=2"),
        (dict(world=4, ep=3), "parallel.ep*etp = 3*1 does not divide"),
        (dict(world=4, vpp=2), "parallel.vpp=2 needs parallel.pp > 1"),
        (dict(world=8, tp=2, pp=2, balance_group_size=2), "parallel.balance_group_size=2"),
        (dict(world=2, tp=0), "parallel.tp=0"),
    ],
)
def test_impossible_layouts_are_named(sizes, words):
    with pytest.raises(ValueError, match="parallel") as error:
        Layout(**sizes)
    assert words in str(error.value)


def test_etp_follows_tp_only_without_expert_parallelism():
    assert Layout(world=4, tp=2).etp == 2
    assert Layout(world=4, tp=2, ep=2).etp == 1
