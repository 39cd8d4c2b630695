"""The plan of one step's visual tokens, as arrays: who encodes each image, in which chunk, and where each row travels.

An image's n visual tokens are n rows.  Its owner encodes it; every row then goes to the one first-stage rank that owns
the row's place in the sequence (zigzag over cp, contiguous over tp, as Megatron-core splits a row), so nothing is sent
twice.  All of this is a pure function of the same arrays on every rank: sender and receiver agree without a word.

Legend: I images of the step (video frames among them), V rows this rank encodes, U rows this rank receives, G ranks of
the balance group.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from parallel.balance import assign_images, cut_in_order, load_max_over_mean
from parallel.layout import Layout


@dataclass(frozen=True)
class VisualPlan:
    """Images of one step in stream order: cost, patches, visual tokens, and their place in the LLM's micro-batches.

    unit_I: images that one rank encodes together (a still image, a clip of a video), ascending from 0.  start_I counts
    tokens from the first of the micro-batch; row_tokens is the micro-batch's length.
    """

    unit_I: np.ndarray
    cost_I: np.ndarray
    patches_I: np.ndarray
    tokens_I: np.ndarray
    replica_I: np.ndarray
    micro_batch_I: np.ndarray
    start_I: np.ndarray
    row_tokens: int

    def digest(self, owner_I: np.ndarray) -> int:
        """63-bit digest of the plan and of the assignment, for ranks to compare before they use them."""
        hasher = hashlib.blake2b(digest_size=8)
        arrays = (self.cost_I, self.tokens_I, self.replica_I, self.micro_batch_I, self.start_I, owner_I)
        for array in arrays:
            hasher.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return int.from_bytes(hasher.digest(), "little") >> 1


@dataclass(frozen=True)
class Routes:
    """What one rank does with one step's images.

    chunks: image ids this rank encodes, chunk by chunk; every rank has the same number of chunks, some empty.
    send_V: encoded row that goes out at each place of the send buffer; send_counts_G, receive_counts_G: rows exchanged
    with each rank of the balance group, in its order.  take_U: received row of each leaf row, leaves ordered by
    micro-batch; leaf_rows_M: rows of each micro-batch's leaf; at_U: local position of each leaf row in the embedding
    output.  load_max_over_mean: encoder load of the whole world under this assignment.
    """

    chunks: list[np.ndarray]
    send_V: np.ndarray
    send_counts_G: list[int]
    receive_counts_G: list[int]
    take_U: np.ndarray
    at_U: np.ndarray
    leaf_rows_M: list[int]
    load_max_over_mean: float


def assign_owners(plan: VisualPlan, layout: Layout, balance: bool) -> np.ndarray:
    """Global rank that encodes each image, int64 [I].

    With `balance`, greedy by cost of units inside the balance group of their replica; without it, the units of a
    replica are dealt in order over the replica's own ranks.
    """
    first_U = np.flatnonzero(np.diff(plan.unit_I, prepend=-1))  # the first image of every unit
    cost_U = np.add.reduceat(plan.cost_I, first_U) if first_U.size else plan.cost_I
    replica_U = plan.replica_I[first_U]
    owner_U = np.empty(first_U.size, dtype=np.int64)
    team_U = layout.group_of_replica(replica_U) if balance else replica_U
    for team in np.unique(team_U).tolist():
        members = np.array(layout.group_ranks(team) if balance else layout.replica_ranks(team))
        mine_J = np.flatnonzero(team_U == team)
        if balance:
            owner_U[mine_J] = members[assign_images(cost_U[mine_J], members.size)]
        else:
            owner_U[mine_J] = members[np.arange(mine_J.size) % members.size]
    return owner_U[plan.unit_I]


def place_of(position: np.ndarray, layout: Layout, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cp, tp, local index) of positions in a row of `row_tokens` under zigzag cp and sequence-parallel tp."""
    half = _zigzag_chunk(layout, row_tokens)
    chunk, offset = np.divmod(position, half)
    front = chunk < layout.cp
    cp = np.where(front, chunk, 2 * layout.cp - 1 - chunk)
    local = np.where(front, offset, offset + half)
    tp, index = np.divmod(local, row_tokens // layout.cp // layout.tp)
    return cp, tp, index


def _zigzag_chunk(layout: Layout, row_tokens: int) -> int:
    """Length of the 2 cp chunks of a row; rank i holds the i-th and the i-th from the end.  cp = 1 cuts none."""
    return row_tokens // (2 * layout.cp) if layout.cp > 1 else row_tokens


def local_positions(layout: Layout, cp: int, row_tokens: int) -> np.ndarray:
    """Row positions that context-parallel rank `cp` holds, in its order: the inverse of `place_of` before tp splits."""
    if layout.cp == 1:
        return np.arange(row_tokens)
    half, back = _zigzag_chunk(layout, row_tokens), 2 * layout.cp - 1 - cp
    return np.concatenate([np.arange(cp * half, (cp + 1) * half), np.arange(back * half, (back + 1) * half)])


def build_routes(
    plan: VisualPlan, owner_I: np.ndarray, layout: Layout, rank: int, micro_batches: int, chunk_patches: int
) -> Routes:
    """Routes of `rank` for one step.  Raises ValueError if an image alone exceeds `chunk_patches`."""
    group = layout.group_of_replica(layout.coordinates(rank).dp)
    ranks_G = np.array(layout.group_ranks(group))
    send_V, send_counts_G = _outgoing(plan, owner_I, layout, rank, ranks_G)
    take_U, at_U, leaf_rows_M, receive_counts_G = _incoming(plan, owner_I, layout, rank, ranks_G, micro_batches)
    return Routes(
        chunks=_chunks(plan, owner_I, layout, rank, chunk_patches),
        send_V=send_V,
        send_counts_G=send_counts_G,
        receive_counts_G=receive_counts_G,
        take_U=take_U,
        at_U=at_U,
        leaf_rows_M=leaf_rows_M,
        load_max_over_mean=load_max_over_mean(plan.cost_I, owner_I, layout.world),
    )


def _rows_of(plan: VisualPlan, images_J: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image id and row position of every visual token of `images_J`, images in the given order."""
    tokens_J = plan.tokens_I[images_J]
    first_J = np.cumsum(tokens_J) - tokens_J
    image_V = np.repeat(images_J, tokens_J)
    within_V = np.arange(tokens_J.sum()) - np.repeat(first_J, tokens_J)
    return image_V, plan.start_I[image_V] + within_V


def _destination(plan: VisualPlan, layout: Layout, image_V: np.ndarray, position_V: np.ndarray):
    cp, tp, index = place_of(position_V, layout, plan.row_tokens)
    return layout.rank_of(tp=tp, cp=cp, dp=plan.replica_I[image_V], pp=0), index


def _outgoing(plan, owner_I, layout, rank, ranks_G):
    image_V, position_V = _rows_of(plan, np.flatnonzero(owner_I == rank))
    to_V, _ = _destination(plan, layout, image_V, position_V)
    order_V = np.argsort(to_V, kind="stable")
    counts_G = np.searchsorted(to_V[order_V], ranks_G, "right") - np.searchsorted(to_V[order_V], ranks_G, "left")
    return order_V, counts_G.tolist()


def _incoming(plan, owner_I, layout, rank, ranks_G, micro_batches):
    place = layout.coordinates(rank)
    images_J = np.flatnonzero(plan.replica_I == place.dp) if place.pp == 0 else np.empty(0, dtype=np.int64)
    image_U, position_U = _rows_of(plan, images_J)
    to_U, index_U = _destination(plan, layout, image_U, position_U)
    here = to_U == rank
    image_U, index_U = image_U[here], index_U[here]
    arrival_U = np.argsort(owner_I[image_U], kind="stable")  # place in the receive buffer -> row in image order
    from_U = owner_I[image_U][arrival_U]
    counts_G = np.searchsorted(from_U, ranks_G, "right") - np.searchsorted(from_U, ranks_G, "left")
    leaf_U = np.argsort(plan.micro_batch_I[image_U][arrival_U], kind="stable")
    rows_M = np.bincount(plan.micro_batch_I[image_U], minlength=micro_batches)
    return leaf_U, index_U[arrival_U][leaf_U], rows_M.tolist(), counts_G.tolist()


def _chunks(plan, owner_I, layout, rank, chunk_patches):
    """Images of `rank` cut in order into chunks of at most `chunk_patches`, padded to the world's largest count."""
    if plan.patches_I.size and plan.patches_I.max() > chunk_patches:
        raise ValueError(
            f"parallel.encoder.chunk_patches={chunk_patches} is smaller than an image of {plan.patches_I.max()} "
            "patches; raise it or lower data.max_patches"
        )
    order_I = np.argsort(owner_I, kind="stable")
    mine, most = [], 1  # one chunk even in a step without images: frozen or idle, every rank takes part
    for owner, images_J in _runs(owner_I, order_I):
        chunks = cut_in_order(images_J, plan.patches_I, chunk_patches)
        most = max(most, len(chunks))
        if owner == rank:
            mine = chunks
    return mine + [np.empty(0, dtype=np.int64)] * (most - len(mine))


def _runs(owner_I, order_I):
    borders = np.flatnonzero(np.diff(owner_I[order_I])) + 1
    for images_J in np.split(order_I, borders):
        if images_J.size:
            yield int(owner_I[images_J[0]]), images_J
