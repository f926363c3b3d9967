"""The mathematics, as pure functions of arrays.

Shapes are in the names. T tokens of this pass, S cache slots, D model width, V vocabulary, H query heads,
G key/value heads (R = H / G query heads share one), K head width, C = K / 2 rotation angles, F feed-forward width.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from .backend import ROWS

ATTEND_ELEMENTS = 1 << 24  # scores held at a time in a wide pass


class Output(NamedTuple):
    """What a forward pass returns: logits [rows asked for, V], hidden after the final norm [T, D], named taps.

    experts_read counts the experts that the pass had to read, over all layers: the union of its tokens' choices.
    """

    logits_TV: np.ndarray
    hidden_TD: np.ndarray
    taps: dict
    experts_read: int = 0


class Taps:
    """Watches a pass: called with a name and a value, keeps a copy of the value if the name was asked for.

    What comes by as "layer.N.experts", the experts chosen, is also counted.
    """

    PARTS = ("in", "attn", "mlp", "experts", "out")

    def __init__(self, wanted, layers):
        known = {"embed", "final_norm", "logits", *(f"layer.{i}.{part}" for i in range(layers) for part in self.PARTS)}
        if unknown := set(wanted) - known:
            parts = "|".join(self.PARTS)
            raise ValueError(f"unknown tap {min(unknown)!r}: expected embed, layer.N.{parts}, final_norm or logits")
        self._wanted, self._kept, self._experts_read = frozenset(wanted), {}, 0

    def within(self, prefix):
        """The same for names below a prefix."""
        return lambda name, x: self(f"{prefix}.{name}", x)

    def __call__(self, name, x):
        if name in self._wanted:
            self._kept[name] = x.copy()
        if name.endswith(".experts"):
            self._experts_read += len(np.unique(x))
        return x

    def collected(self):
        """(taps, experts read)"""
        return self._kept, self._experts_read


def no_tap(name, x):
    """Stands where nothing is tapped."""
    return x


def token_ids(ids_T, vocab_size, placeholders=()):
    """The ids as a list of ints. Raises ValueError where there is none, or one is no token or a placeholder.

    placeholders: {id: what it stands for} of the tokens whose embedding another tower would provide.
    """
    ids_T = np.asarray(ids_T)
    if ids_T.ndim != 1 or not ids_T.size:
        raise ValueError(f"expected a non-empty list of token ids, got shape {ids_T.shape}")
    if ids_T.dtype.kind not in "iu":
        raise ValueError(f"token ids must be integers, got {ids_T.dtype}")
    outside = (ids_T < 0) | (ids_T >= vocab_size)
    if outside.any():
        raise ValueError(f"token id {ids_T[outside][0]} is outside the vocabulary of {vocab_size}")
    ids = ids_T.tolist()
    if media := set(ids).intersection(placeholders):
        raise ValueError(f"token {min(media)} stands for {placeholders[min(media)]}: only text can be read")
    return ids


def rms_norm(x, weight=None, eps=1e-6):
    """Root-mean-square norm over the last axis, times `weight` where there is one (Zhang & Sennrich 2019)."""
    mean = (x * x).sum(-1, keepdims=True) / x.shape[-1]
    normed = x / np.sqrt(mean + eps)
    return normed if weight is None else normed * weight


def gelu(x):
    """GELU in its tanh form (`gelu_pytorch_tanh`)."""
    return 0.5 * x * (1.0 + np.tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))


def softcap(x, cap):
    """Squash smoothly into (-cap, cap); None leaves x alone."""
    return x if cap is None else np.tanh(x / cap) * cap


@cache
def rope_frequencies(rope, head_dim):
    """Angles per position -> [C] float32, which they are by definition in transformers, whatever the run's dtype.

    "default" rotates every pair; "proportional" only the first `fraction` of them, at the full width's pace.
    """
    angles = head_dim // 2 if rope.kind == "default" else int(rope.fraction * head_dim // 2)
    exponents = np.arange(0, 2 * angles, 2, dtype=np.float32) / np.float32(head_dim)
    powers = np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)  # float32 pow differs by machine
    rotated = np.float32(1) / powers / np.float32(rope.factor)
    frequencies_C = np.concatenate([rotated, np.zeros(head_dim // 2 - angles, np.float32)])
    frequencies_C.setflags(write=False)  # every pass shares them
    return frequencies_C


def rope_table(frequencies_C, positions_T, dtype):
    """(cos, sin) of every position's angles -> two [T, 1, C] arrays; the 1 is for the heads."""
    angles_TC = positions_T[:, None].astype(np.float64) * frequencies_C
    return np.cos(angles_TC).astype(dtype)[:, None], np.sin(angles_TC).astype(dtype)[:, None]


def rotate(x_THK, table):
    """Rotate each head's pairs (i, i + K/2) by their position's angles (RoFormer; the half-split layout)."""
    cos_T1C, sin_T1C = table
    half = x_THK.shape[-1] // 2
    a_THC, b_THC = x_THK[..., :half], x_THK[..., half:]
    return np.concatenate([a_THC * cos_T1C - b_THC * sin_T1C, b_THC * cos_T1C + a_THC * sin_T1C], axis=-1)


def softmax(x):
    """Softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def attend(q_THK, k_GSK, v_GSK, low_T, high_T, scale=1.0):
    """Attention of each query t over the slots low_T[t] .. high_T[t] - 1 -> [T, H, K].

    Narrow passes give every query exactly its own slots: masked padding would change the order of sums.
    """
    T, H, K = q_THK.shape
    q_TGRK = (q_THK if scale == 1.0 else q_THK * scale).reshape(T, len(k_GSK), -1, K)
    if T > ROWS:
        return _attend_wide(q_TGRK, k_GSK, v_GSK, np.asarray(low_T), np.asarray(high_T)).reshape(T, H, K)
    out_TGRK = np.empty_like(q_TGRK)
    for t in range(T):
        slots = slice(low_T[t], high_T[t])
        weights_GRS = softmax(q_TGRK[t] @ k_GSK[:, slots].transpose(0, 2, 1))
        np.matmul(weights_GRS, v_GSK[:, slots], out=out_TGRK[t])
    return out_TGRK.reshape(T, H, K)


def _attend_wide(q_TGRK, k_GSK, v_GSK, low_T, high_T):
    """The same in blocks of queries, each over the slots that any of its queries sees, the rest masked."""
    T, G, R, K = q_TGRK.shape
    out_TGRK = np.empty_like(q_TGRK)
    block = int(np.clip(ATTEND_ELEMENTS // (G * R * k_GSK.shape[1]), 1, T))
    for start in range(0, T, block):
        t = slice(start, min(start + block, T))
        first, last = low_T[t].min(), high_T[t].max()
        slots_S = np.arange(first, last)
        seen_TS = (slots_S >= low_T[t, None]) & (slots_S < high_T[t, None])
        q_GRTK = q_TGRK[t].transpose(1, 2, 0, 3)
        scores_GRTS = q_GRTK @ k_GSK[:, None, first:last].swapaxes(-1, -2)
        weights_GRTS = softmax(np.where(seen_TS, scores_GRTS, -np.inf))
        out_TGRK[t] = (weights_GRTS @ v_GSK[:, None, first:last]).transpose(2, 0, 1, 3)
    return out_TGRK
