"""Two grids over the same W ranks, as pure arithmetic: who sits where, and which layouts are possible.

The LLM grid is tp x cp x dp x pp = W with tp fastest (Megatron-core's order "tp-cp-ep-dp-pp"); the encoder grid is
W-way data parallel.  A replica is the tp*cp*pp ranks that share one dp index; a balance group is a run of whole
replicas inside which images may move (Seed1.5-VL report, sections 5.1.1 and 5.1.2).
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np

CP_COMM_TYPES = ("auto", "a2a", "all_gather")
Index = TypeVar("Index", int, np.ndarray)


@dataclass(frozen=True)
class Coordinates:
    """Place of one rank in the LLM grid."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """Sizes of every kind of parallelism, checked on construction; `vpp` counts virtual stages a pipeline rank.

    cp_comm_type: what cp ranks trade in attention, `a2a` or `all_gather`, see `parallel/comm/context.py`.
    Raises ValueError, naming the configuration key and the values seen, for a layout that does not divide the world
    or that Megatron-core would refuse or train wrongly.
    """

    world: int
    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = None  # type: ignore[assignment]  # None, for the choice below, is replaced in __post_init__
    cp_comm_type: str = "all_gather"
    balance_group_size: int = None  # type: ignore[assignment]  # None is replaced in __post_init__

    def __post_init__(self):
        for key in ("tp", "cp", "pp", "vpp", "ep"):
            if getattr(self, key) < 1:
                raise ValueError(f"parallel.{key}={getattr(self, key)}: must be at least 1")
        if self.etp is None:
            object.__setattr__(self, "etp", self.tp if self.ep == 1 else 1)
        if self.world % self.replica_size:
            raise ValueError(
                f"parallel.tp*cp*pp = {self.tp}*{self.cp}*{self.pp} = {self.replica_size} does not divide "
                f"the world of {self.world} ranks"
            )
        if self.ep == 1 and self.etp != self.tp:
            raise ValueError(
                f"parallel.etp={self.etp} with parallel.ep=1 and parallel.tp={self.tp}: Megatron-core trains this "
                f"silently wrong; set parallel.etp={self.tp} or parallel.ep > 1"
            )
        stage = self.tp * self.cp * self.dp
        if self.etp < 1 or stage % (self.ep * self.etp):
            raise ValueError(
                f"parallel.ep*etp = {self.ep}*{self.etp} does not divide the {stage} ranks of a pipeline stage "
                f"(tp*cp*dp = {self.tp}*{self.cp}*{self.dp})"
            )
        if self.vpp > 1 and self.pp == 1:
            raise ValueError(f"parallel.vpp={self.vpp} needs parallel.pp > 1: there is no pipeline to interleave")
        self._check_balance_group()

    def _check_balance_group(self):
        size = self.balance_group_size
        if size is None:
            object.__setattr__(self, "balance_group_size", self.world)
        elif size < 1 or size % self.replica_size or self.world % size:
            raise ValueError(
                f"parallel.balance_group_size={size}: must be a multiple of a replica's {self.replica_size} ranks "
                f"(tp*cp*pp) that divides the world of {self.world}"
            )

    @property
    def row_chunks(self) -> int:
        """Equal chunks into which cp cuts a row: with `all_gather` two a rank in zigzag order, with `a2a` one."""
        return 2 * self.cp if self.cp > 1 and self.cp_comm_type == "all_gather" else self.cp

    @property
    def replica_size(self) -> int:
        return self.tp * self.cp * self.pp

    @property
    def dp(self) -> int:
        return self.world // self.replica_size

    @property
    def replicas_per_group(self) -> int:
        return self.balance_group_size // self.replica_size

    @property
    def groups(self) -> int:
        return self.world // self.balance_group_size

    def rank_of(self, *, tp: Index, cp: Index, dp: Index, pp: int) -> Index:
        """Global rank at a place of the LLM grid, elementwise on arrays."""
        return tp + self.tp * (cp + self.cp * (dp + self.dp * pp))

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a global rank in the LLM grid."""
        rest, tp = divmod(rank, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coordinates(tp=tp, cp=cp, dp=dp, pp=pp)

    def replica_ranks(self, replica: int) -> list[int]:
        """Ranks of one LLM replica, ascending."""
        grid = ((pp, cp, tp) for pp in range(self.pp) for cp in range(self.cp) for tp in range(self.tp))
        return sorted(self.rank_of(tp=tp, cp=cp, dp=replica, pp=pp) for pp, cp, tp in grid)

    def text_ranks(self, replica: int) -> list[int]:
        """Ranks of one replica that need its token ids, ascending: those of the first and the last pipeline stage."""
        return [r for r in self.replica_ranks(replica) if self.coordinates(r).pp in (0, self.pp - 1)]

    def group_of_replica(self, replica: Index) -> Index:
        """Balance group of a replica, elementwise on arrays."""
        return replica // self.replicas_per_group

    def group_ranks(self, group: int) -> list[int]:
        """Ranks of one balance group, ascending."""
        replicas = range(group * self.replicas_per_group, (group + 1) * self.replicas_per_group)
        return sorted(rank for replica in replicas for rank in self.replica_ranks(replica))


def choose_cp_comm_type(asked: str, layout: Layout, kv_heads: int) -> str:
    """`a2a` or `all_gather` for `parallel.cp_comm_type=asked`; `auto` is `a2a` wherever whole K/V heads can be dealt.

    Raises ValueError for another word, and for `a2a` where tp * cp does not divide the K/V heads.
    """
    if asked not in CP_COMM_TYPES:
        raise ValueError(f"parallel.cp_comm_type={asked}: must be one of {', '.join(CP_COMM_TYPES)}")
    fits = kv_heads % (layout.tp * layout.cp) == 0
    if asked == "a2a" and not fits:
        raise ValueError(
            f"parallel.cp_comm_type=a2a deals whole heads over cp ranks, but model.llm.kv_heads={kv_heads} is not "
            f"divisible by parallel.tp*cp = {layout.tp}*{layout.cp}; set all_gather or auto, or lower parallel.cp"
        )
    if asked == "auto":
        return "a2a" if fits else "all_gather"
    return asked
