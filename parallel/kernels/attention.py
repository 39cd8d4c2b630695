"""The one attention entry point, for encoder and LLM: packed segments, causal or not, grouped-query heads, windows.

A `Segments` says where segments of q and of k/v begin; tokens attend inside their segment only.  With fewer queries
than keys the last query stands at the last key (FlashAttention's varlen convention), as context parallelism needs it.

The backend is chosen once a process (`choose`, from `parallel.attention`):
    flash4  flash-attn-4 by its own kernels       cudnn  torch's SDPA by cuDNN where all segments have one length
    varlen  torch's FlashAttention-2              te     Transformer Engine
    sdpa    torch's SDPA by segment, any device and dtype
What the chosen one cannot take (head width, dtype, device) goes to the next that can, with one logged line a cause.

Legend: T query tokens, S key tokens, H query heads, G key/value heads, K head width, N segments.
"""

import logging
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch

from tandem.parallel.comm.transfer import host_to_device
from tandem.parallel.kernels import attention_kernels, attention_sdpa, flash4

logger = logging.getLogger(__name__)

NAMES = ("auto", "flash4", "varlen", "cudnn", "te", "sdpa")
_HALF = (torch.bfloat16, torch.float16)
_EASY_WIDTH = 64  # of heads, that every kernel takes

_chosen = "auto"
_said: set[str] = set()


@dataclass(frozen=True)
class Segments:
    """Borders of N segments in packed queries and keys, on the host (for plans) and on the device (for kernels).

    longest_q, longest_k: powers of two not below the longest, so that compiled code meets few values of them.
    equal: lengths of queries and keys where all segments share them.  same: keys are as many as queries everywhere.
    own_keys: every query has a key at its own place.  Compiled code must read nothing else that is not a tensor.
    """

    q_lengths_N: tuple[int, ...]
    k_lengths_N: tuple[int, ...]
    cu_q_N1: torch.Tensor
    cu_k_N1: torch.Tensor
    longest_q: int = field(init=False)
    longest_k: int = field(init=False)
    equal: tuple[int, int] | None = field(init=False)
    same: bool = field(init=False)
    own_keys: bool = field(init=False)

    def __post_init__(self):
        q, k = self.q_lengths_N, self.k_lengths_N
        pairs = set(zip(q, k, strict=True))
        derived = {
            "longest_q": _power_of_two(max(q, default=0)),
            "longest_k": _power_of_two(max(k, default=0)),
            "equal": pairs.copy().pop() if len(pairs) == 1 else None,
            "same": q == k,
            "own_keys": all(queries <= keys for queries, keys in pairs),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    @staticmethod
    def of(q_lengths_N, k_lengths_N=None, device: torch.device | str = "cpu") -> "Segments":
        """Segments from their lengths; keys as long as queries unless `k_lengths_N` is given."""
        q, cu_q_N1 = _borders(q_lengths_N, device)
        k, cu_k_N1 = (q, cu_q_N1) if k_lengths_N is None else _borders(k_lengths_N, device)
        return Segments(q, k, cu_q_N1, cu_k_N1)


def attention(
    q_THK: torch.Tensor,
    k_SGK: torch.Tensor,
    v_SGK: torch.Tensor,
    segments: Segments,
    *,
    causal: bool,
    scale: float | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Softmax attention inside each segment, [T, H, K], zeros for queries of a segment without keys.

    scale: of the logits, K ** -0.5 unless given.  window: keys less than this far from the query are seen, before it
    where causal (`window` keys with its own), on both sides where not.
    Raises ValueError for shapes or dtypes that do not belong together, and where causal or windowed for a segment of
    fewer keys than queries, some of which would see nothing.
    """
    if (causal or window is not None) and not segments.own_keys:
        raise ValueError("causal or windowed attention: a segment has more queries than keys")
    if window is not None and window < 1:
        raise ValueError(f"window={window}: must be at least 1, the query's own key")
    traced = torch.compiler.is_compiling()
    if traced:  # cuDNN would need the lengths, and Transformer Engine breaks the graph
        passed_over = ("cudnn", "te")
    elif segments.equal is None or window is not None or (causal and not segments.same):
        passed_over = ("cudnn",)
    else:
        passed_over = ()
    name = _backend(
        q_THK.device,
        (q_THK.dtype, k_SGK.dtype, v_SGK.dtype),
        tuple(q_THK.shape[1:]),
        tuple(k_SGK.shape[1:]),
        tuple(v_SGK.shape[1:]),
        passed_over,
    )
    if name == "flash4" or (name == "sdpa" and traced and q_THK.device.type == "cpu"):
        cu = (segments.cu_q_N1, segments.cu_k_N1)
        return flash4.packed_attention(q_THK, k_SGK, v_SGK, *cu, causal, scale, window)[0]
    if name == "sdpa":
        lengths = (segments.q_lengths_N, segments.k_lengths_N)
        return attention_sdpa.by_lengths(q_THK, k_SGK, v_SGK, *lengths, causal, scale, window)
    return getattr(attention_kernels, name)(q_THK, k_SGK, v_SGK, segments, causal, scale, window)


def choose(name: str, device: torch.device | str, dtype: torch.dtype) -> str:
    """Sets the process's backend by `parallel.attention`, logs it in one line and returns its name.

    Raises ValueError for a name that does not exist, and for a backend asked for by name that this device, dtype or
    installation cannot serve.
    """
    global _chosen
    if name not in NAMES:
        raise ValueError(f"parallel.attention={name}: must be one of {', '.join(NAMES)}")
    device = torch.device(device)
    reason = None if name == "auto" else _refusal(name, device, dtype, _EASY_WIDTH)
    if reason is not None:
        raise ValueError(f"parallel.attention={name}: {reason}; auto takes what there is")
    _chosen = name
    _route.cache_clear()
    _said.clear()
    picked = _order(name, device, dtype)[0]
    note = ""
    if name == "auto" and picked == "varlen":
        note = f"; flash4 would be faster: {flash4.refusal(device, _EASY_WIDTH)}"
    if picked == "cudnn":
        note = f" where all segments have one length, else {_order('auto', device, dtype)[0]}"
    logger.info("attention: %s on %s in %s (parallel.attention=%s)%s", picked, device, dtype, name, note)
    return picked


def saved_ops() -> list[torch._ops.OpOverload]:
    """The operators whose outputs a recompute policy keeps so that no attention is computed twice.

    Transformer Engine's kernels are no operators of torch: with `te` a policy recomputes them.
    """
    return [
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.tandem.packed_attention.default,
        torch.ops.aten._flash_attention_forward.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    ]


@torch.compiler.assume_constant_result
def _backend(device, dtypes, q_HK, k_GK, v_GK, passed_over) -> str:
    """The backend of one call; compiled code takes it as a constant, so that it may log and ask the device."""
    return _route(_chosen, device, dtypes, q_HK, k_GK, v_GK, passed_over)


@cache
def _route(chosen, device, dtypes, q_HK, k_GK, v_GK, passed_over) -> str:
    if len(set(dtypes)) > 1:
        raise ValueError(f"attention: q, k and v must have one dtype, not {', '.join(map(str, dtypes))}")
    (heads, width), (kv_heads, k_width) = q_HK, k_GK
    if k_GK != v_GK or width != k_width or heads % kv_heads:
        raise ValueError(f"attention: heads of q {q_HK}, k {k_GK} and v {v_GK}: one width, and G must divide H")
    causes = []
    for name in _order(chosen, device, dtypes[0]):
        if name in passed_over:
            continue
        reason = _refusal(name, device, dtypes[0], width)
        if reason is None:
            break
        causes.append(f"{name} does not serve: {reason}")
    for cause in causes:
        if cause not in _said:
            _said.add(cause)
            logger.warning("attention: %s; %s runs instead", cause, name)
    return name


def _order(chosen: str, device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Backends from the first to try to the last."""
    if device.type != "cuda" or dtype not in _HALF:
        fallbacks = ("sdpa",)
    elif flash4.refusal(device, _EASY_WIDTH) is None:
        fallbacks = ("flash4", "varlen", "sdpa")
    else:
        fallbacks = ("varlen", "sdpa")
    return fallbacks if chosen == "auto" else (chosen, *(name for name in fallbacks if name != chosen))


def _refusal(name: str, device: torch.device, dtype: torch.dtype, width: int) -> str | None:
    """Why a backend cannot take heads of this width on this device in this dtype; None where it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it runs on CUDA, not on {device.type}"
    if dtype not in _HALF:
        return f"it takes bfloat16 or float16, not {dtype}"
    if name == "flash4":
        return flash4.refusal(device, width)
    if name == "varlen":
        return attention_kernels.varlen_refusal(device, width)
    return attention_kernels.cudnn_refusal(width) if name == "cudnn" else attention_kernels.te_refusal(width)


def _borders(lengths_N, device) -> tuple[tuple[int, ...], torch.Tensor]:
    lengths_N = np.asarray(lengths_N, dtype=np.int64)
    cu_N1 = np.concatenate([[0], lengths_N.cumsum()]).astype(np.int32)
    return tuple(lengths_N.tolist()), host_to_device(cu_N1, device)


def _power_of_two(length: int) -> int:
    return 1 << max(length - 1, 0).bit_length()
