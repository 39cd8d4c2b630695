"""Captions of samples: the runs of trained tokens in rows that hold one sample each, end to end.

    row 0   . . . a b c <eos> . . d e <eos>  pad        ->  a b c <eos> | d e <eos> | f <eos>,  lengths [[4, 3], [2, 0]]
    row 1   . . f <eos>  pad

A run ends with its <eos>, which is trained too. A caption is missing and has length 0 if the row has fewer runs than
requested, if its run is an <eos> alone, or if its run does not end with one because it was cut with its row
(data.too_long=cut).

Shapes: R rows, P positions of a row, K captions of a row, X runs, T tokens of all captions.
"""

import numpy as np


def captions(
    tokens_RP: np.ndarray, trained_RP: np.ndarray, runs: int, max_tokens: int, eos_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (tokens int32 [T], lengths int32 [R, K]) of the first K = `runs` runs of each row, row by row.

    A caption longer than max_tokens (at least 2) keeps its first max_tokens - 1 tokens and its `<eos>`.
    """
    rows, positions = trained_RP.shape
    edge_RP1 = np.diff(np.pad(trained_RP.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    row_X, begin_X = np.nonzero(edge_RP1 == 1)
    _, end_X = np.nonzero(edge_RP1 == -1)
    run_X = np.arange(len(row_X)) - np.searchsorted(row_X, row_X)  # which of its row's
    asked_X = run_X < runs
    row_X, run_X, begin_X, end_X = row_X[asked_X], run_X[asked_X], begin_X[asked_X], end_X[asked_X]
    whole_X = (end_X - begin_X > 1) & (tokens_RP[row_X, end_X - 1] == eos_id)
    length_X = np.where(whole_X, np.minimum(end_X - begin_X, max_tokens), 0)

    first_X = np.cumsum(length_X) - length_X
    within_T = np.arange(length_X.sum()) - np.repeat(first_X, length_X)
    place_T = np.repeat(row_X * positions + begin_X, length_X) + within_T
    last_X = length_X > 0
    place_T[(first_X + length_X - 1)[last_X]] = (row_X * positions + end_X - 1)[last_X]
    lengths_RK = np.zeros((rows, runs), np.int32)
    lengths_RK[row_X, run_X] = length_X
    return tokens_RP.reshape(-1)[place_T].astype(np.int32), lengths_RK
