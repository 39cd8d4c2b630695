"""The plan of one step's visual tokens, as arrays: who encodes each image, in which chunk, and where each row travels.

An image's n visual tokens are n rows, which its encoding rank makes.  Every row goes to the one first-stage rank that
holds the row's place in the sequence (`place_of`: chunks over cp, contiguous over tp, as Megatron-core splits a row),
so nothing is sent twice.  All of this is a pure function of the same arrays on every rank: sender and receiver agree
without a word.

Rows travel chunk by chunk, while the next one is encoded: the arrays of a dispatch plan are lists by chunk.

Legend: I images of the step (video frames among them), C chunks, V rows this rank encodes, U rows this rank receives,
G ranks of the balance group.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from tandem.parallel.layout import Layout
from tandem.parallel.plan.balance import assign_images, cut_in_order, load_max_over_mean


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

    def digest(self, encoding_rank_I: np.ndarray) -> int:
        """63-bit digest of the plan and of the assignment, for ranks to compare before they use them."""
        hasher = hashlib.blake2b(digest_size=8)
        arrays = (self.cost_I, self.tokens_I, self.replica_I, self.micro_batch_I, self.start_I, encoding_rank_I)
        for array in arrays:
            hasher.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return int.from_bytes(hasher.digest(), "little") >> 1


@dataclass(frozen=True)
class Routes:
    """What one rank does with one step's images.

    chunks: image ids this rank encodes, chunk by chunk; every rank has the same number of chunks, some empty.
    send_counts_CG, receive_counts_CG: rows of every chunk exchanged with each rank of the balance group, in its order.
    send_V: row of its own chunk's output that goes out at each place of the send buffers.  leaf_U: leaf row of each row
    received, in order of arrival: by chunk, then by sender; leaves are ordered by micro-batch.  leaf_rows_M: rows of
    each micro-batch's leaf; at_U: local position of each leaf row in the embedding output.
    load_max_over_mean: encoder load of the whole world under this assignment.
    """

    chunks: list[np.ndarray]
    send_counts_CG: np.ndarray
    receive_counts_CG: np.ndarray
    send_V: np.ndarray
    leaf_U: np.ndarray
    at_U: np.ndarray
    leaf_rows_M: list[int]
    load_max_over_mean: float


def assign_encoding_ranks(plan: VisualPlan, layout: Layout, balance: bool) -> np.ndarray:
    """Global rank that encodes each image, int64 [I].

    With `balance`, greedy by cost of units inside the balance group of their replica; without it, the units of a
    replica are dealt in order over the replica's own ranks.
    """
    first_U = np.flatnonzero(np.diff(plan.unit_I, prepend=-1))  # the first image of every unit
    cost_U = np.add.reduceat(plan.cost_I, first_U) if first_U.size else plan.cost_I
    replica_U = plan.replica_I[first_U]
    encoding_rank_U = np.empty(first_U.size, dtype=np.int64)
    team_U = layout.group_of_replica(replica_U) if balance else replica_U
    for team in np.unique(team_U).tolist():
        members = np.array(layout.group_ranks(team) if balance else layout.replica_ranks(team))
        mine_J = np.flatnonzero(team_U == team)
        if balance:
            encoding_rank_U[mine_J] = members[assign_images(cost_U[mine_J], members.size)]
        else:
            encoding_rank_U[mine_J] = members[np.arange(mine_J.size) % members.size]
    return encoding_rank_U[plan.unit_I]


def place_of(position: np.ndarray, layout: Layout, row_tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(cp, tp, local index) of positions in a row of `row_tokens` under cp and sequence-parallel tp.

    Rank i of cp holds the i-th chunk of the row and, where there are two a rank (`Layout.row_chunks`), the i-th from
    the end: zigzag.
    """
    length = row_tokens // layout.row_chunks
    chunk, offset = np.divmod(position, length)
    front = chunk < layout.cp
    cp = np.where(front, chunk, 2 * layout.cp - 1 - chunk)
    local = np.where(front, offset, offset + length)
    tp, index = np.divmod(local, row_tokens // layout.cp // layout.tp)
    return cp, tp, index


def local_positions(layout: Layout, cp: int, row_tokens: int) -> np.ndarray:
    """Row positions that context-parallel rank `cp` holds, in its order: the inverse of `place_of` before tp splits."""
    length = row_tokens // layout.row_chunks
    chunks = [cp] if layout.row_chunks == layout.cp else [cp, layout.row_chunks - 1 - cp]
    return np.concatenate([np.arange(chunk * length, (chunk + 1) * length) for chunk in chunks])


def build_routes(
    plan: VisualPlan, encoding_rank_I: np.ndarray, layout: Layout, rank: int, micro_batches: int, chunk_patches: int
) -> Routes:
    """Routes of `rank` for one step.  Raises ValueError if an image alone exceeds `chunk_patches`."""
    group = layout.group_of_replica(layout.coordinates(rank).dp)
    ranks_G = np.array(layout.group_ranks(group))
    chunk_I, count = _chunks(plan, encoding_rank_I, chunk_patches)
    mine_J = np.flatnonzero(encoding_rank_I == rank)
    send_V, send_counts_CG = _outgoing(plan, mine_J, chunk_I, layout, ranks_G, count)
    leaf_U, at_U, leaf_rows_M, receive_counts_CG = _incoming(
        plan, encoding_rank_I, chunk_I, layout, rank, ranks_G, count, micro_batches
    )
    return Routes(
        chunks=np.split(mine_J, np.searchsorted(chunk_I[mine_J], np.arange(1, count))),
        send_counts_CG=send_counts_CG,
        receive_counts_CG=receive_counts_CG,
        send_V=send_V,
        leaf_U=leaf_U,
        at_U=at_U,
        leaf_rows_M=leaf_rows_M,
        load_max_over_mean=load_max_over_mean(plan.cost_I, encoding_rank_I, layout.world),
    )


def _rows_of(plan: VisualPlan, images_J: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Image id and row position of every visual token of `images_J`, images in the given order."""
    tokens_J = plan.tokens_I[images_J]
    first_J = np.cumsum(tokens_J) - tokens_J
    image_V = np.repeat(images_J, tokens_J)
    within_V = np.arange(tokens_J.sum()) - np.repeat(first_J, tokens_J)
    return image_V, plan.start_I[image_V] + within_V


def _destination(
    plan: VisualPlan, layout: Layout, image_V: np.ndarray, position_V: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    cp, tp, index = place_of(position_V, layout, plan.row_tokens)
    return layout.rank_of(tp=tp, cp=cp, dp=plan.replica_I[image_V], pp=0), index


def _outgoing(plan, mine_J, chunk_I, layout, ranks_G, chunks):
    """(send_V, send_counts_CG) of the images mine_J, which lie in the order of their chunks."""
    image_V, position_V = _rows_of(plan, mine_J)
    to_V, _ = _destination(plan, layout, image_V, position_V)
    chunk_V = chunk_I[image_V]
    order_V = np.lexsort((to_V, chunk_V))  # stable: rows for one rank keep the order of their images
    first_C = np.searchsorted(chunk_V, np.arange(chunks))
    return order_V - first_C[chunk_V], _counts(chunk_V, to_V, ranks_G, chunks)


def _incoming(plan, encoding_rank_I, chunk_I, layout, rank, ranks_G, chunks, micro_batches):
    """(leaf_U, at_U, leaf_rows_M, receive_counts_CG) of `rank`.

    Leaf rows of a micro-batch lie by encoding rank, then by image, then as in the image.
    """
    place = layout.coordinates(rank)
    images_J = np.flatnonzero(plan.replica_I == place.dp) if place.pp == 0 else np.empty(0, dtype=np.int64)
    image_U, position_U = _rows_of(plan, images_J)
    to_U, index_U = _destination(plan, layout, image_U, position_U)
    here = to_U == rank
    image_U, index_U = image_U[here], index_U[here]
    from_U, chunk_U, micro_U = encoding_rank_I[image_U], chunk_I[image_U], plan.micro_batch_I[image_U]
    arrival_U, leaves_U = np.lexsort((from_U, chunk_U)), np.lexsort((from_U, micro_U))
    leaf_of_U = np.empty_like(leaves_U)
    leaf_of_U[leaves_U] = np.arange(leaves_U.size)
    rows_M = np.bincount(micro_U, minlength=micro_batches)
    return leaf_of_U[arrival_U], index_U[leaves_U], rows_M.tolist(), _counts(chunk_U, from_U, ranks_G, chunks)


def _counts(chunk_V, other_V, ranks_G, chunks):
    """Rows of each chunk by the rank at the other end, int64 [C, G]; ranks_G ascends."""
    cell_V = chunk_V * ranks_G.size + np.searchsorted(ranks_G, other_V)
    return np.bincount(cell_V, minlength=chunks * ranks_G.size).reshape(chunks, ranks_G.size)


def _chunks(plan, encoding_rank_I, chunk_patches):
    """(chunk of each image on its encoding rank, the largest number of chunks of any rank).

    The images of a rank are cut in order into chunks of at most `chunk_patches`.
    """
    if plan.patches_I.size and plan.patches_I.max() > chunk_patches:
        raise ValueError(
            f"parallel.encoder.chunk_patches={chunk_patches} is smaller than an image of {plan.patches_I.max()} "
            "patches; raise it or lower data.max_patches"
        )
    order_I = np.argsort(encoding_rank_I, kind="stable")
    chunk_I = np.zeros(encoding_rank_I.size, dtype=np.int64)
    most = 1  # one chunk even without images: every rank takes part
    for images_J in np.split(order_I, np.flatnonzero(np.diff(encoding_rank_I[order_I])) + 1):
        chunks = cut_in_order(images_J, plan.patches_I, chunk_patches)
        for number, images_K in enumerate(chunks):
            chunk_I[images_K] = number
        most = max(most, len(chunks))
    return chunk_I, most
