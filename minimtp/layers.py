"""The mathematics, as pure functions of arrays.

Shapes are in the names. T tokens of this pass, S cache slots, D model width, V vocabulary, H query heads,
G key/value heads (R = H / G query heads share one), K head width, C = K / 2 rotation angles, F feed-forward width,
E experts, X experts a token uses. In the gated delta rule: G key heads of width K, H value heads of width V, C channels
of the convolution and W its width.
"""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from .backend import ROWS, matmul, twins, with_kernel

ATTEND_ELEMENTS = 1 << 24  # scores held at a time
KV_BLOCK = 256  # positions whose keys or values are unpacked at a time: few enough to stay in cache
DELTA_BLOCK = 64  # tokens of a wide pass that the gated delta rule takes at once


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

    What comes by as "layer.N.experts", the experts chosen, is also counted. progress, if given, is called with the
    number of layers done, and of all, after each.
    """

    PARTS = ("in", "attn", "mlp", "experts", "out")

    def __init__(self, wanted, layers, progress=None):
        known = {"embed", "final_norm", "logits", *(f"layer.{i}.{part}" for i in range(layers) for part in self.PARTS)}
        if unknown := set(wanted) - known:
            parts = "|".join(self.PARTS)
            raise ValueError(f"unknown tap {min(unknown)!r}: expected embed, layer.N.{parts}, final_norm or logits")
        self._wanted, self._kept, self._experts_read = frozenset(wanted), {}, 0
        self._done, self._layers, self._progress = 0, layers, progress

    def within(self, prefix):
        """The same for names below a prefix."""
        return lambda name, x: self(f"{prefix}.{name}", x)

    def __call__(self, name, x):
        if name in self._wanted:
            self._kept[name] = x.copy()
        if name.endswith(".experts") and isinstance(x, np.ndarray):
            self._experts_read += len(np.unique(x))
        if self._progress and name.startswith("layer.") and name.endswith(".out"):
            self._done += 1
            self._progress(self._done, self._layers)
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


@with_kernel
def rms_norm(x, weight=None, eps=1e-6):
    """Root-mean-square norm over the last axis, times `weight` where there is one (Zhang & Sennrich 2019)."""
    mean = np.add.reduce(x * x, axis=-1, keepdims=True) / x.shape[-1]
    normed = x / np.sqrt(mean + eps)
    return normed if weight is None else normed * weight


@with_kernel
def add_normed(residual, x, weight, eps):
    """The residual plus the norm of what a sub-layer made of it."""
    return residual + rms_norm(x, weight, eps)


@with_kernel
def gelu(x):
    """GELU in its tanh form (`gelu_pytorch_tanh`)."""
    return 0.5 * x * (1.0 + np.tanh(0.7978845608028654 * (x + 0.044715 * (x * x * x))))


@with_kernel
def sigmoid(x):
    """1 / (1 + e^-x)"""
    return 1.0 / (1.0 + np.exp(-x))


@with_kernel
def silu(x):
    """x sigmoid(x), also called swish."""
    return x / (1.0 + np.exp(-x))


def softplus(x):
    """log(1 + e^x)"""
    return np.logaddexp(x, x.dtype.type(0))


@with_kernel
def softcap(x, cap):
    """Squash smoothly into (-cap, cap); None leaves x alone."""
    return x if cap is None else np.tanh(x / cap) * cap


class Rope(NamedTuple):
    """Rotary embedding; see rope_frequencies."""

    kind: str
    theta: float
    fraction: float = 1.0
    factor: float = 1.0


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


@with_kernel
def rope_table(positions_T, frequencies_C, dtype):
    """(cos, sin) of every position's angles -> two [T, 1, C] arrays; the 1 is for the heads."""
    angles_TC = positions_T[:, None].astype(np.float64) * frequencies_C
    return np.cos(angles_TC).astype(dtype)[:, None], np.sin(angles_TC).astype(dtype)[:, None]


def rotate(x_THK, table):
    """Rotate each head's pairs (i, i + C) by their position's angles (RoFormer; the half-split layout).

    What a head has beyond the table's 2 C stays as it is.
    """
    cos_T1C, sin_T1C = table
    angles = cos_T1C.shape[-1]
    a_THC, b_THC, rest_THK = x_THK[..., :angles], x_THK[..., angles : 2 * angles], x_THK[..., 2 * angles :]
    return np.concatenate([a_THC * cos_T1C - b_THC * sin_T1C, b_THC * cos_T1C + a_THC * sin_T1C, rest_THK], axis=-1)


@with_kernel
def turn_and_keep(q_THK, k_TGK, v_TGK, q_norm_K, k_norm_K, eps, rope, kv, norm_values=False):
    """Norm queries and keys and rotate them, keep keys and values in kv -> the queries [T, H, K].

    k_TGK None: nothing is kept, kv has the entries of another layer. norm_values: by their length, without a weight.
    """
    if k_TGK is not None:
        v_TGK = rms_norm(v_TGK, eps=eps) if norm_values else v_TGK
        kv.append(rotate(rms_norm(k_TGK, k_norm_K, eps), rope), v_TGK)
    return rotate(rms_norm(q_THK, q_norm_K, eps), rope)


@with_kernel
def halves(x):
    """The two halves of the last axis."""
    middle = x.shape[-1] // 2
    return x[..., :middle], x[..., middle:]


def softmax(x):
    """Softmax over the last axis."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


class Blocks(NamedTuple):
    """Keys or values that are no array: rows(first, last) makes the floats [G, last - first, K] of some of S slots.

    Slot 0 holds position `start`.
    """

    shape: tuple  # (G, S, K)
    start: int
    rows: Callable

    def each(self, low, high):
        """Blocks of the slots low .. high - 1, cut at multiples of KV_BLOCK positions -> (first, last, floats)."""
        for edge in range(low - (self.start + low) % KV_BLOCK, high, KV_BLOCK):
            first, last = max(edge, low), min(edge + KV_BLOCK, high)
            yield first, last, self.rows(first, last)


@with_kernel
def seen(positions_T, window=None, appended=1):
    """What the queries at these positions see -> (first position, last one + 1), an array each.

    Of a window its last positions; appended: 1 where a query's own key is there, 0 where it ends before.
    """
    ends_T = positions_T + appended
    return (np.zeros_like(ends_T) if window is None else np.maximum(ends_T - window, 0)), ends_T


@with_kernel
def attend_over(q_THK, kv, span, scale=1.0):
    """Attention of each query t over the positions span[0][t] .. span[1][t] - 1 that a memory holds -> [T, H, K]."""
    low_T, high_T = span
    return attend(q_THK, *kv.read(), low_T - kv.start, high_T - kv.start, scale)


def attend(q_THK, k_GSK, v_GSK, low_T, high_T, scale=1.0):
    """Attention of each query t over the slots low_T[t] .. high_T[t] - 1 -> [T, H, K]. Keys and values may be Blocks.

    Narrow passes give every query exactly its own slots: masked padding would change the order of sums.
    """
    T, H, K = q_THK.shape
    q_TGRK = (q_THK if scale == 1.0 else q_THK * scale).reshape(T, k_GSK.shape[0], -1, K)
    if T > ROWS:
        return _attend_wide(q_TGRK, k_GSK, v_GSK, np.asarray(low_T), np.asarray(high_T)).reshape(T, H, K)
    if isinstance(k_GSK, Blocks):
        return _attend_blocks(q_TGRK, k_GSK, v_GSK, low_T, high_T).reshape(T, H, K)
    out_TGRK = np.empty_like(q_TGRK)
    for t in range(T):
        slots = slice(low_T[t], high_T[t])
        weights_GRS = softmax(q_TGRK[t] @ k_GSK[:, slots].transpose(0, 2, 1))
        np.matmul(weights_GRS, v_GSK[:, slots], out=out_TGRK[t])
    return out_TGRK.reshape(T, H, K)


def _attend_blocks(q_TGRK, k_GSK, v_GSK, low_T, high_T):
    """The same over Blocks, which are made once for as many queries as their scores leave room for."""
    T, G, R, _ = q_TGRK.shape
    out_TGRK, most = np.empty_like(q_TGRK), max(1, ATTEND_ELEMENTS // (G * R * k_GSK.shape[1]))
    for start in range(0, T, most):
        t = slice(start, start + most)
        weights = _scores_by_block(q_TGRK[t], k_GSK, low_T[t], high_T[t])
        for i, scores_GRS in enumerate(weights):
            weights[i] = softmax(scores_GRS)
        out_TGRK[t] = _sums_by_block(weights, v_GSK, low_T[t], high_T[t])
    return out_TGRK


def _scores_by_block(q_TGRK, k_GSK, low_T, high_T):
    """Each query's scores over its slots -> list of [G, R, high - low]; a block of keys is made once for all.

    Blocks lie at the same positions in every pass, so a query's scores and sums come from the same operations in all.
    """
    scores = [np.empty((*q_TGRK.shape[1:3], high - low), q_TGRK.dtype) for low, high in zip(low_T, high_T)]
    for first, last, k_GBK in k_GSK.each(min(low_T), max(high_T)):
        for q_GRK, scores_GRS, low, high in zip(q_TGRK, scores, low_T, high_T):
            a, b = max(first, low), min(last, high)
            if a < b:
                scores_GRS[..., a - low : b - low] = q_GRK @ k_GBK[:, a - first : b - first].transpose(0, 2, 1)
    return scores


def _sums_by_block(weights, v_GSK, low_T, high_T):
    """Each query's weighted sum of the values of its slots, block after block -> [T, G, R, K]."""
    out_TGRK = np.zeros((len(weights), *weights[0].shape[:2], v_GSK.shape[2]), weights[0].dtype)
    for first, last, v_GBK in v_GSK.each(min(low_T), max(high_T)):
        for out_GRK, weights_GRS, low, high in zip(out_TGRK, weights, low_T, high_T):
            a, b = max(first, low), min(last, high)
            if a < b:
                out_GRK += weights_GRS[..., a - low : b - low] @ v_GBK[:, a - first : b - first]
    return out_TGRK


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
        if isinstance(k_GSK, Blocks):  # all these queries as one
            q_GXK, ends = np.ascontiguousarray(q_GRTK).reshape(G, -1, K), ([first], [last])
            scores_GRTS = _scores_by_block(q_GXK[None], k_GSK, *ends)[0].reshape(*q_GRTK.shape[:3], -1)
            weights_GXS = softmax(np.where(seen_TS, scores_GRTS, -np.inf)).reshape(G, q_GXK.shape[1], -1)
            sums_GRTK = _sums_by_block([weights_GXS], v_GSK, *ends).reshape(q_GRTK.shape)
        else:
            scores_GRTS = q_GRTK @ k_GSK[:, None, first:last].swapaxes(-1, -2)
            weights_GRTS = softmax(np.where(seen_TS, scores_GRTS, -np.inf))
            sums_GRTK = weights_GRTS @ v_GSK[:, None, first:last]
        out_TGRK[t] = sums_GRTK.transpose(2, 0, 1, 3)
    return out_TGRK


def concatenated(parts):
    """Matrices side by side: [T, A] and [T, B] -> [T, A + B]."""
    return np.concatenate(parts, axis=-1) if isinstance(parts[0], np.ndarray) else twins().concatenated(parts)


# Feed-forward


@with_kernel
def gated_mlp(x_TD, gate_proj, up_proj, down_proj, activation):
    """Gated feed-forward -> [T, D]."""
    return matmul(activation(matmul(x_TD, gate_proj)) * matmul(x_TD, up_proj), down_proj)


@with_kernel
def best_experts(scores_TE, top_k, scale_E=None):
    """Which experts each token uses, best first, and their share of it -> (chosen [T, X], weights [T, X]).

    The weights are the softmax over all experts, scaled to sum to 1 over the chosen; then times each one's scale_E.
    """
    p_TE = softmax(scores_TE)
    chosen_TX = np.argsort(-p_TE, axis=-1, kind="stable")[:, :top_k]
    weights_TX = np.take_along_axis(p_TE, chosen_TX, axis=-1)
    weights_TX = weights_TX / weights_TX.sum(-1, keepdims=True)
    return chosen_TX, weights_TX if scale_E is None else weights_TX * scale_E[chosen_TX]


@with_kernel
def mixture(x_TD, chosen_TX, weights_TX, w, activation):
    """Weighted sum of each token's experts -> [T, D].

    Every expert that any token chose is read once, for all of them: a pass pays for the union. A token's sum runs in
    the order of the experts' numbers whoever shares the pass, so its bits do not depend on the others.
    """
    out_TD = np.zeros_like(x_TD)
    for e in np.unique(chosen_TX):
        t, place = np.nonzero(chosen_TX == e)
        expert = w.experts_gate_proj[e], w.experts_up_proj[e], w.experts_down_proj[e]
        out_TD[t] += gated_mlp(x_TD[t], *expert, activation) * weights_TX[t, place, None]
    return out_TD


# Gated DeltaNet (Yang, Kautz, Hatamizadeh 2024): a state [K, V] per head that answers a key with a value


def l2_norm(x, eps=1e-6):
    """x over its length along the last axis, as in flash-linear-attention: the eps is under the root."""
    return x / np.sqrt(np.add.reduce(x * x, axis=-1, keepdims=True) + eps)


@with_kernel
def gated_norm(x_THV, weight_V, gate_THV, eps):
    """Each head's output, normed, times silu of a gate."""
    return rms_norm(x_THV, weight_V, eps) * silu(gate_THV)


@with_kernel
def delta_rule(conv_TC, a_TH, b_TH, w, layer, memory):
    """What a Gated DeltaNet layer does between its projections -> [T, H, V]; the memory takes in the pass.

    conv_TC: queries, keys and values, to go through the convolution; a and b: for the decay and for beta. w: the
    layer's conv1d, A_log, dt_bias; layer: its sizes.
    """
    T, G, H, K = len(conv_TC), layer.key_heads, layer.value_heads, layer.key_dim
    mixed_TC = silu(causal_conv(conv_TC, w.conv1d[:, 0], memory.window()))
    qk_T2GK = l2_norm(mixed_TC[:, : 2 * G * K].reshape(T, 2, G, K))
    q_TGK, k_TGK = qk_T2GK[:, 0] * conv_TC.dtype.type(K**-0.5), qk_T2GK[:, 1].copy()  # a view would keep both
    log_decay_TH = -np.exp(w.A_log) * softplus(a_TH + w.dt_bias)
    beta_TH, v_THV = sigmoid(b_TH), mixed_TC[:, 2 * G * K :].reshape(T, H, layer.value_dim)
    out_THV, u_THV, state_HKV = gated_delta(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, memory.state_HKV)
    memory.append(conv_TC, k_TGK, u_THV, log_decay_TH, state_HKV)
    return out_THV


def causal_conv(x_TC, weight_CW, window_WC):
    """Each channel's weighted sum of its last W inputs -> [T, C]; the window holds the W - 1 inputs before x."""
    padded = np.concatenate([window_WC, x_TC])
    return sum(padded[j : j + len(x_TC)] * weight_CW[:, j] for j in range(weight_CW.shape[1]))


def gated_delta(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV):
    """The gated delta rule over T tokens -> (out [T, H, V], writes u [T, H, V], state after them).

    For each token the state fades by exp(log_decay); what it then answers to k is corrected towards v by u, beta of the
    difference, written at k; and it is asked q. H / G value heads share a key head. Narrow passes go token by token,
    so that no token's bits depend on the others; wide ones block by block.
    """
    if len(q_TGK) > ROWS:
        return gated_delta_chunk(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV)
    q_THK, k_THK = _for_value_heads(q_TGK, v_THV), _for_value_heads(k_TGK, v_THV)
    out_THV, u_THV, decay_TH = np.empty_like(v_THV), np.empty_like(v_THV), np.exp(log_decay_TH)
    new_HKV, scratch_HKV = np.empty_like(state_HKV), np.empty_like(state_HKV)
    for t in range(len(v_THV)):
        token = q_THK[t], k_THK[t], v_THV[t], decay_TH[t], beta_TH[t]
        out_THV[t], u_THV[t], state_HKV = gated_delta_step(*token, state_HKV, new_HKV, scratch_HKV)
    return out_THV, u_THV, state_HKV


def gated_delta_step(q_HK, k_HK, v_HV, decay_H, beta_H, state_HKV, new_HKV=None, scratch_HKV=None):
    """The rule for one token, as it is defined -> (out [H, V], u [H, V], state), the state in new_HKV if given."""
    state_HKV = np.multiply(state_HKV, decay_H[:, None, None], out=new_HKV)
    u_HV = beta_H[:, None] * (v_HV - (k_HK[:, None] @ state_HKV)[:, 0])
    state_HKV += np.multiply(k_HK[:, :, None], u_HV[:, None], out=scratch_HKV)
    return (q_HK[:, None] @ state_HKV)[:, 0], u_HV, state_HKV


def gated_delta_chunk(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV):
    """The same over many tokens by matrix products, in blocks -> (out [T, H, V], u [T, H, V], state).

    Within a block each u depends on those before it through what they left for its key: a triangular system.
    """
    outs, writes = [], []
    for start in range(0, len(v_THV), DELTA_BLOCK):
        t = slice(start, start + DELTA_BLOCK)
        out_HTV, u_HTV = _delta_block(
            _heads_first(_for_value_heads(q_TGK[t], v_THV)), _heads_first(_for_value_heads(k_TGK[t], v_THV)),
            _heads_first(v_THV[t]), log_decay_TH[t].T, beta_TH[t].T, state_HKV,
        )  # fmt: skip
        outs.append(_heads_first(out_HTV))
        writes.append(_heads_first(u_HTV))
        state_HKV = delta_writes(k_TGK[t], writes[-1], log_decay_TH[t], state_HKV)
    return np.concatenate(outs), np.concatenate(writes), state_HKV


def _delta_block(q_HTK, k_HTK, v_HTV, log_decay_HT, beta_HT, state_HKV):
    dtype, sums_HT = q_HTK.dtype, np.cumsum(log_decay_HT, axis=1, dtype=np.float64)  # differences of long sums
    since_HT1 = np.exp(sums_HT).astype(dtype)[:, :, None]  # what is left at t of the state before the block
    past_TT = np.tri(sums_HT.shape[1], dtype=bool)
    between_HTT = np.exp(np.where(past_TT, sums_HT[:, :, None] - sums_HT[:, None], -np.inf)).astype(dtype)
    beta_HT1, from_state_HTV = beta_HT[:, :, None], since_HT1 * (k_HTK @ state_HKV)
    answers_HTT = between_HTT * (k_HTK @ k_HTK.swapaxes(1, 2))  # to the key at t of what was written at s
    system_HTT = np.tril(beta_HT1 * answers_HTT, -1) + np.eye(len(past_TT), dtype=dtype)
    u_HTV = np.linalg.solve(system_HTT, beta_HT1 * (v_HTV - from_state_HTV))
    from_writes_HTV = (between_HTT * (q_HTK @ k_HTK.swapaxes(1, 2))) @ u_HTV
    return since_HT1 * (q_HTK @ state_HKV) + from_writes_HTV, u_HTV


def delta_writes(k_TGK, u_THV, log_decay_TH, state_HKV):
    """The state after the writes u at k: one by one in narrow passes, as the steps did it, else as one product."""
    k_THK = _for_value_heads(k_TGK, u_THV)
    if len(u_THV) <= ROWS:
        new_HKV, scratch_HKV = state_HKV.copy(), np.empty_like(state_HKV)
        for k_HK, u_HV, decay_H in zip(k_THK, u_THV, np.exp(log_decay_TH)):
            new_HKV *= decay_H[:, None, None]
            new_HKV += np.multiply(k_HK[:, :, None], u_HV[:, None], out=scratch_HKV)
        return new_HKV
    sums_TH = np.cumsum(log_decay_TH, axis=0, dtype=np.float64)
    left_TH1 = np.exp(sums_TH[-1] - sums_TH).astype(u_THV.dtype)[:, :, None]
    faded_HKV = state_HKV * np.exp(sums_TH[-1]).astype(u_THV.dtype)[:, None, None]
    return faded_HKV + (left_TH1 * k_THK).transpose(1, 2, 0) @ _heads_first(u_THV)


def _for_value_heads(x_TGK, v_THV):
    return np.repeat(x_TGK, v_THV.shape[1] // x_TGK.shape[1], axis=1)


def _heads_first(x_THK):
    return x_THK.swapaxes(0, 1)
