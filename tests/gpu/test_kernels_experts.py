"""kernels/experts.cu on the CPU, against layers.best_experts and layers.mixture."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from minimtp import layers, shim
from minimtp.checkpoint import bf16_to_float, float_to_bf16
from minimtp.kernel_source import source
from minimtp.quant import Plain, Quantized

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

NAN = np.float32(np.nan)
WARPS = 5
D, F = 352, 72  # neither a multiple of 256, and rows end within a block of warps


def constants(tokens, activation="gelu", scale="f16", group=8):
    kind = (("BF16_EXPERTS", 1),) if scale is None else (("SCALE", scale), ("GROUP", group))
    return (("TOKENS", tokens), ("ACTIVATION", activation), *kind)


def edited(old, new, compiled_with):
    """The source with a defect planted in it."""
    text = source("experts", compiled_with)
    assert old in text, old
    return text.replace(old, new)


# route


def route(logits_TE, top_k, scale_E=None, order="forward", text=None):
    """What the kernel leaves: chosen, weights, and of each used slot its expert, tokens and weights."""
    T, E = logits_TE.shape
    S = min(T * top_k, E)
    chosen_TX, expert_S = np.full((T, top_k), -1, np.int32), np.full(S, -1, np.int32)
    weights_TX, weights_ST = np.full((T, top_k), NAN), np.full((S, T), NAN)
    slots, tokens_S = np.full(1, -1, np.int32), np.zeros(S, np.uint32)
    arrays = [chosen_TX, weights_TX, slots, expert_S, tokens_S, weights_ST, logits_TE, scale_E, E, top_k]
    shim.launch("experts", "route", 1, 256, arrays, constants=constants(T), order=order, text=text)
    return SimpleNamespace(
        chosen_TX=chosen_TX,
        weights_TX=weights_TX,
        slots=slots,
        expert_S=expert_S,
        tokens_S=tokens_S,
        weights_ST=weights_ST,
        used=slots[0],
    )


def expected_route(logits_TE, top_k, scale_E=None):
    chosen_TX, weights_TX = layers.best_experts(logits_TE, top_k)
    return chosen_TX, weights_TX if scale_E is None else weights_TX * scale_E[chosen_TX]


def check_route(logits_TE, top_k, scale_E=None, order="forward", text=None):
    chosen_TX, weights_TX = expected_route(logits_TE, top_k, scale_E)
    found = route(logits_TE, top_k, scale_E, order, text)
    np.testing.assert_array_equal(found.chosen_TX, chosen_TX)
    np.testing.assert_allclose(found.weights_TX, weights_TX, rtol=2e-6, atol=1e-30)
    union = np.unique(chosen_TX)
    assert found.used == len(union)
    np.testing.assert_array_equal(found.expert_S[: found.used], union)
    for slot, expert in enumerate(union):
        users = [t for t in range(len(chosen_TX)) if expert in chosen_TX[t]]
        assert found.tokens_S[slot] == sum(1 << t for t in users)
        weights_T = np.where(found.chosen_TX == expert, found.weights_TX, 0).sum(-1)
        np.testing.assert_array_equal(found.weights_ST[slot], weights_T)
    assert (found.expert_S[found.used :] == -1).all()  # no slot beyond them is written


@pytest.mark.parametrize("tokens", [1, 5, 8])
@pytest.mark.parametrize("experts, top_k", [(128, 8), (256, 8), (37, 3), (5, 5), (1, 1)])
def test_route_finds_the_experts_and_their_union_of_every_published_and_every_odd_size(tokens, experts, top_k):
    rng = np.random.RandomState(experts + tokens)
    logits_TE = rng.normal(0, 2, (tokens, experts)).astype(np.float32)
    scale_E = rng.uniform(0.5, 2, experts).astype(np.float32)
    for order, scale in (("forward", None), ("backward", scale_E), ("shuffled", scale_E)):
        check_route(logits_TE, top_k, scale, order)


def test_of_equal_experts_the_lower_number_comes_first_and_tokens_may_agree():
    logits_TE = np.zeros((5, 70), np.float32)
    check_route(logits_TE, 8)
    logits_TE[2, [3, 69, 40]] = 1
    logits_TE[3] = -np.arange(70) // 4
    check_route(logits_TE, 8, np.linspace(1, 2, 70).astype(np.float32))


def test_route_bears_far_logits_and_stays_within_bounds_when_they_are_not_numbers():
    logits_TE = np.full((5, 40), -1e4, np.float32)
    logits_TE[0, 7], logits_TE[1, 39], logits_TE[2] = 1e4, -9e3, 88
    logits_TE[3, 5:] = -np.inf
    check_route(logits_TE, 4)
    logits_TE[1, 3], logits_TE[2] = np.nan, np.nan
    found = route(logits_TE, 4)
    assert np.isnan(found.weights_TX[1:3]).all()
    for chosen_X in found.chosen_TX:
        assert len(set(chosen_X)) == 4 and 0 <= chosen_X.min() and chosen_X.max() < 40


def test_a_tokens_route_is_the_same_bits_in_every_width():
    logits_TE = np.random.RandomState(1).normal(0, 2, (8, 128)).astype(np.float32)
    wide = route(logits_TE, 8)
    for t in range(8):
        alone = route(logits_TE[t : t + 1], 8)
        np.testing.assert_array_equal(alone.weights_TX[0], wide.weights_TX[t])
    np.testing.assert_array_equal(route(logits_TE[2:7], 8).weights_TX, wide.weights_TX[2:7])


@pytest.mark.parametrize(
    "old, new",
    [
        ("MOST_EXPERTS - e)", "e + 1)"),  # of equal ones the higher number; and one that is not there
        ("    if (lane == 0) used[warp] = __popc(users);\n    __syncthreads();", "    used[warp] = __popc(users);"),
        ("e < experts ? logits_TE", "e <= experts ? logits_TE"),
    ],
)
def test_a_defect_of_route_is_seen(old, new):
    logits_TE = np.random.RandomState(2).randint(0, 3, (5, 68)).astype(np.float32)
    text = edited(old, new, constants(5))
    with pytest.raises((AssertionError, shim.KernelError)):
        for order in shim.ORDERS:
            check_route(logits_TE, 6, text=text, order=order)


# The experts themselves


def int4_experts(rng, E, rows, columns, group=8, scale="f16"):
    """Random codes [E, O, I / 2] and scales [E, O, I / group], and each expert as the reference knows it."""
    packed_EOB = rng.randint(0, 256, (E, rows, columns // 2)).astype(np.uint8)
    scales = rng.uniform(0.01, 0.03, (E, rows, columns // group)).astype(np.float32)
    kind, scales_EOG = {
        "f16": ("F16", scales.astype(np.float16)),
        "bf16": ("BF16", float_to_bf16(scales)),
        "f32": ("F32", scales),
    }[scale]
    weights = [Quantized(packed_EOB[e], Plain(scales_EOG[e], kind), group) for e in range(E)]
    return packed_EOB, scales_EOG.view(np.float32 if scale == "f32" else np.uint16), weights


def bf16_experts(rng, E, rows, columns):
    bits_EOI = float_to_bf16(rng.normal(0, 0.1, (E, rows, columns)).astype(np.float32))
    return bits_EOI, None, list(bf16_to_float(bits_EOI))


def model(rng, E, scale="f16", group=8):
    """Weights of E experts as the kernels take them, and as layers.mixture does."""

    def make(rows, columns):
        return (
            bf16_experts(rng, E, rows, columns) if scale is None else int4_experts(rng, E, rows, columns, group, scale)
        )

    gate, up, down = make(F, D), make(F, D), make(D - 3, F)  # an odd number of rows
    reference = SimpleNamespace(experts_gate_proj=gate[2], experts_up_proj=up[2], experts_down_proj=down[2])
    return gate[:2], up[:2], down[:2], reference


def mixture(x_TD, routed, weights, compiled_with, order="forward", text=None):
    """The three kernels one after the other -> out [T, D - 3]."""
    (T, D_in), (gate, up, down, _), S = x_TD.shape, weights, len(routed.expert_S)
    rows = down[0].shape[1]
    gated_STF, out_STD = np.full((S, T, F), NAN), np.full((S, T, rows), NAN)
    out_TD = np.full((T, rows), NAN)
    union = [routed.slots, routed.expert_S, routed.tokens_S]
    run = dict(constants=compiled_with, order=order, text=text)
    arrays = [gated_STF, x_TD, *gate, *up, *union, F, D_in]
    shim.launch("experts", "experts_gated", (-(-F // WARPS), S), 32 * WARPS, arrays, **run)
    arrays = [out_STD, gated_STF, *down, *union, rows, F]
    shim.launch("experts", "experts_down", (-(-rows // (2 * WARPS)), S), 32 * WARPS, arrays, **run)
    arrays = [out_TD, out_STD, routed.weights_ST, routed.slots, routed.tokens_S, rows]
    shim.launch("experts", "experts_sum", (-(-rows // 64), T), 64, arrays, **run)
    for slot in range(S):  # only what the union needs is written
        users = [routed.tokens_S[slot] >> t & 1 and slot < routed.used for t in range(T)]
        np.testing.assert_array_equal(np.isnan(out_STD[slot]).any(-1), [not user for user in users])
    return out_TD


def case(rng, tokens, E=6, top_k=3):
    """Tokens that agree about some experts and not about others."""
    return rng.normal(0, 1, (tokens, D)).astype(np.float32), rng.normal(0, 2, (tokens, E)).astype(np.float32), top_k


def worst(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    "tokens, activation, scale",
    [(1, "gelu", "f16"), (5, "gelu", "f16"), (8, "gelu", "f16"), (5, "silu", "bf16"), (5, "silu", None)],
)
def test_the_mixture_is_that_of_the_reference(tokens, activation, scale, record_property):
    rng = np.random.RandomState(tokens)
    x_TD, logits_TE, top_k = case(rng, tokens)
    weights, routed = model(rng, 6, scale), route(logits_TE, top_k)
    act = getattr(layers, activation)
    chosen_TX, weights_TX = layers.best_experts(logits_TE, top_k)
    expected_TD = np.zeros((tokens, D - 3), np.float32)
    for e in np.unique(chosen_TX):  # layers.mixture, but for an output of another width than its input
        t, place = np.nonzero(chosen_TX == e)
        one = [getattr(weights[3], f"experts_{part}_proj")[e] for part in ("gate", "up", "down")]
        expected_TD[t] += layers.gated_mlp(x_TD[t], *one, act) * weights_TX[t, place, None]
    found = [mixture(x_TD, routed, weights, constants(tokens, activation, scale), order) for order in shim.ORDERS]
    record_property("worst", float(worst(found[0], expected_TD)))
    print(f"{tokens} {activation} {scale}: {worst(found[0], expected_TD):.1e}")
    assert worst(found[0], expected_TD) < 1e-5
    assert (found[0] == found[1]).all() and (found[0] == found[2]).all()


def test_a_tokens_mixture_is_the_same_bits_whoever_shares_the_pass():
    rng = np.random.RandomState(7)
    x_TD, logits_TE, top_k = case(rng, 8)
    weights = model(rng, 6)
    wide_TD = mixture(x_TD, route(logits_TE, top_k), weights, constants(8))
    few_TD = mixture(x_TD[1:6], route(logits_TE[1:6], top_k), weights, constants(5))
    np.testing.assert_array_equal(few_TD, wide_TD[1:6])
    for t in (0, 7):
        alone_TD = mixture(x_TD[[t]], route(logits_TE[[t]], top_k), weights, constants(1))
        np.testing.assert_array_equal(alone_TD, wide_TD[[t]])


@pytest.mark.parametrize(
    "old, new",
    [
        ("four_nibbles(w >> 16)", "four_nibbles(w >> 8)"),
        ("row >= rows) return;  // a whole warp\n    unsigned", "row > rows) return;\n    unsigned"),
        ("slot >= *slots ||", ""),  # what route did not write is read
        ("+ 256 * i;", "+ 255 * i;"),
        ("slot = 0; slot < *slots; slot++", "slot = 0; slot + 1 < *slots; slot++"),
    ],
)
def test_a_defect_of_the_experts_is_seen(old, new):
    rng = np.random.RandomState(9)
    x_TD, logits_TE, top_k = case(rng, 1)
    weights, routed = model(rng, 6), route(logits_TE, top_k)
    expected = mixture(x_TD, routed, weights, constants(1))
    routed.slots[0] -= old.startswith("slot >=")  # there the last slot is to stay empty
    with pytest.raises((AssertionError, shim.KernelError)):
        found = mixture(x_TD, routed, weights, constants(1), text=edited(old, new, constants(1)))
        np.testing.assert_allclose(found, expected, rtol=1e-4)
