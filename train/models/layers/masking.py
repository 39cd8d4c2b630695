"""Which patches are masked and which branches dropped: pure functions of integer keys, on the host.

A key, such as (seed, step, place of the sample, image), and a counter are hashed to 64 bits each (splitmix64's
finalizer, Steele et al. 2014, absorbing one integer at a time).  No generator has a state, so that any rank, layout,
resumed run or recomputation gets the same numbers.

Legend: N patches of I images, n integers of a key, L = 2 * depth residual branches.
"""

import numpy as np

_MASKS, _DROPS = 1, 2  # first word of what is hashed: keeps the streams apart
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIERS = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def masked_patches(patches_I: np.ndarray, ratio: float) -> np.ndarray:
    """int64 [I]: how many patches of each image are masked, see `mask_images`."""
    return np.clip(np.floor(ratio * patches_I + 0.5).astype(np.int64), 1, np.maximum(patches_I - 1, 1))


def mask_images(patches_I, ratio: float, keys_In: np.ndarray) -> np.ndarray:
    """bool [N]: masked patches of images whose patches lie end to end, each image's a function of its key alone.

    Of every image exactly ratio * patches are masked, rounded half up, but at least one, and one stays visible where
    the image has more than one.
    """
    patches_I = np.asarray(patches_I, np.int64)
    masked_I = masked_patches(patches_I, ratio)
    first_I = np.cumsum(patches_I) - patches_I
    image_N = np.repeat(np.arange(len(patches_I)), patches_I)
    within_N = np.arange(len(image_N)) - first_I[image_N]
    score_N = _absorb(_hash(_MASKS, np.asarray(keys_In))[image_N], within_N)
    order_N = np.lexsort((score_N, image_N))  # by score inside each image; equal scores in order of patches
    mask_N = np.empty(len(image_N), bool)
    mask_N[order_N] = within_N < masked_I[image_N]
    return mask_N


def drop_path_factors(depth: int, rate: float, keys_In: np.ndarray) -> np.ndarray:
    """fp32 [L, I]: 0 where an image skips a residual branch, else 1 / (1 - p), with p = rate * block / depth.

    Blocks count from 1, and each has two branches, attention and MLP (Huang et al. 2016, section 3).
    """
    drop_L1 = np.repeat(rate * np.arange(1, depth + 1) / depth, 2)[:, None]
    hash_I = _hash(_DROPS, np.asarray(keys_In))
    hash_LI = _absorb(hash_I[None], np.arange(2 * depth)[:, None])
    uniform_LI = (hash_LI >> np.uint64(11)) * 2.0**-53
    return np.where(uniform_LI < drop_L1, 0.0, 1.0 / (1.0 - drop_L1)).astype(np.float32)


def _hash(stream: int, keys_In: np.ndarray) -> np.ndarray:
    """uint64 [I] of integer keys [I, n]."""
    hash_I = np.full(len(keys_In), stream, np.uint64)
    for column_I in np.moveaxis(keys_In, -1, 0):
        hash_I = _absorb(hash_I, column_I)
    return hash_I


def _absorb(hash_: np.ndarray, integer: np.ndarray) -> np.ndarray:
    """Next hash after one more integer; arithmetic modulo 2 ** 64."""
    mixed = (hash_ ^ integer.astype(np.uint64)) + _GAMMA
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MULTIPLIERS[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MULTIPLIERS[1]
    return mixed ^ (mixed >> np.uint64(31))
