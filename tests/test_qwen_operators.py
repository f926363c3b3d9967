"""The causal convolution and the gated delta rule against ONNX's reference operators, and the rule as it is written.

ONNX's LinearAttention computes in float32 whatever it is given, and repeats no keys for several value heads.
"""

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from minimtp.layers import (
    causal_conv,
    delta_writes,
    gated_delta,
    gated_delta_chunk,
    gated_delta_step,
    l2_norm,
    silu,
)

LENGTHS = (1, 2, 15, 16, 17, 63, 64, 65, 128, 150)
HEADS = ((1, 1), (3, 3), (2, 4), (2, 6))  # key heads, value heads
SHAPES = {"square": (8, 8), "tall": (16, 6), "flat": (5, 12)}  # width of keys, of values
DTYPES = {"float64": 1e-12, "float32": 1e-5}


def numbers(shape, seed, low=-1.0, high=1.0):
    return low + (high - low) * np.random.RandomState(seed).random_sample(shape)


def delta_inputs(length, heads=(2, 4), widths=(16, 6), dtype=np.float64, seed=0, state=True, decay=None, beta=None):
    """What gated_delta takes: q, k, v, log decay, beta, state. decay, beta: constants instead of random ones."""
    (G, H), (K, V) = heads, widths
    q_TGK, k_TGK = (l2_norm(numbers((length, G, K), seed + i)) for i in (1, 2))
    log_decay_TH = -(numbers((length, H), seed + 3, 0, 1.5) ** 3) if decay is None else np.full((length, H), decay)
    beta_TH = numbers((length, H), seed + 4, 0, 1) if beta is None else np.full((length, H), beta)
    state_HKV = numbers((H, K, V), seed + 5) * bool(state)
    inputs = q_TGK, k_TGK, numbers((length, H, V), seed + 6), log_decay_TH, beta_TH, state_HKV
    return tuple(np.asarray(x, dtype) for x in inputs)


def for_value_heads(q_TGK, k_TGK, v_THV):
    """Each key head repeated for its value heads, which follow one another."""
    times = v_THV.shape[1] // q_TGK.shape[1]
    return q_TGK.repeat(times, axis=1), k_TGK.repeat(times, axis=1), v_THV


def the_rule(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV):
    """The gated delta rule, one number of the output at a time -> (out [T, H, V], writes [T, H, V], state)."""
    q_THK, k_THK, v_THV = for_value_heads(q_TGK, k_TGK, v_THV)
    out_THV, u_THV, state_HKV = np.zeros_like(v_THV), np.zeros_like(v_THV), state_HKV.copy()
    for t, h in np.ndindex(v_THV.shape[:2]):
        state_HKV[h] *= np.exp(log_decay_TH[t, h])
        answer_V = sum(state_HKV[h, i] * k_THK[t, h, i] for i in range(k_THK.shape[2]))
        u_THV[t, h] = beta_TH[t, h] * (v_THV[t, h] - answer_V)
        state_HKV[h] += np.outer(k_THK[t, h], u_THV[t, h])
        out_THV[t, h] = sum(state_HKV[h, i] * q_THK[t, h, i] for i in range(q_THK.shape[2]))
    return out_THV, u_THV, state_HKV


def onnx_delta(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV):
    """ONNX's LinearAttention -> (out [T, H, V], state)."""
    (length, H, V), q_THK, k_THK = v_THV.shape, *for_value_heads(q_TGK, k_TGK, v_THV)[:2]
    node = onnx.helper.make_node(
        "LinearAttention", ["q", "k", "v", "state", "decay", "beta"], ["out", "after"], update_rule="gated_delta",
        q_num_heads=H, kv_num_heads=H, scale=1.0,
    )  # fmt: skip
    flat = {"q": q_THK, "k": k_THK, "v": v_THV, "decay": log_decay_TH, "beta": beta_TH}
    inputs = {name: x.reshape(1, length, -1) for name, x in flat.items()} | {"state": state_HKV[None]}
    out, after = ReferenceEvaluator(node).run(None, inputs)
    return out.reshape(length, H, V), after[0]


def by_steps(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV):
    """gated_delta_step for every token -> (out [T, H, V], writes [T, H, V], state)."""
    outs, writes = [], []
    for q_HK, k_HK, v_HV, log_decay_H, beta_H in zip(*for_value_heads(q_TGK, k_TGK, v_THV), log_decay_TH, beta_TH):
        out_HV, u_HV, state_HKV = gated_delta_step(q_HK, k_HK, v_HV, np.exp(log_decay_H), beta_H, state_HKV)
        outs.append(out_HV)
        writes.append(u_HV)
    return np.stack(outs), np.stack(writes), state_HKV


def off(found, expected):
    """Largest difference, relative to the largest number expected."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape and np.isfinite(found).all() and np.isfinite(expected).all()
    return np.abs(found - expected).max() / max(np.abs(expected).max(), 1e-30)


def check(found, expected, tolerance):
    for name, a, b in zip(("out", "writes", "state"), found, expected, strict=True):
        assert off(a, b) <= tolerance, name


# The gated delta rule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", (False, True), ids=("from_nothing", "from_a_state"))
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_the_rule_is_onnx_linear_attention(length, heads, state):
    for seed, widths in enumerate(SHAPES.values()):
        inputs = delta_inputs(length, heads, widths, seed=10 * seed, state=state)
        expected = onnx_delta(*inputs)
        for form in (gated_delta, gated_delta_chunk, by_steps):
            out_THV, _, after_HKV = form(*inputs)
            assert off(out_THV, expected[0]) < 1e-5 and off(after_HKV, expected[1]) < 1e-5, form


def test_onnx_computes_the_rule_as_written():
    inputs = delta_inputs(20, dtype=np.float32)
    out_THV, _, after_HKV = the_rule(*inputs)
    expected = onnx_delta(*inputs)
    assert off(out_THV, expected[0]) < 1e-6 and off(after_HKV, expected[1]) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("length", LENGTHS)
def test_every_form_is_the_rule_as_written(length, heads, dtype):
    """And delta_writes, which un-reading relies on, reaches the same state from the writes alone."""
    inputs = delta_inputs(length, heads, SHAPES["flat"], seed=length)
    expected = the_rule(*inputs)
    inputs = tuple(x.astype(dtype) for x in inputs)
    for form in (gated_delta, gated_delta_chunk, by_steps):
        found = form(*inputs)
        assert {x.dtype for x in found} == {np.dtype(dtype)}
        check(found, expected, DTYPES[dtype])
    _, k_TGK, _, log_decay_TH, _, state_HKV = inputs
    assert off(delta_writes(k_TGK, found[1], log_decay_TH, state_HKV), expected[2]) <= DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("beta", (0.0, 1.0, None), ids=lambda beta: f"beta_{beta}")
@pytest.mark.parametrize("decay", (0.0, -1e-6, -1.0, -30.0, -200.0, -1e5), ids=lambda decay: f"decay_{decay}")
def test_chunks_are_steps_at_the_extremes(decay, beta, dtype):
    """No decay at all, and such that exp underflows within a token or within a few; nothing and everything written."""
    for length in (17, 64, 150):
        inputs = delta_inputs(length, dtype=dtype, decay=decay, beta=beta)
        check(gated_delta_chunk(*inputs), by_steps(*inputs), 2 * DTYPES[dtype])  # 150 times the same rounded decay


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_that_forget_beside_heads_that_do_not(dtype):
    q_TGK, k_TGK, v_THV, log_decay_TH, *rest = delta_inputs(150, dtype=dtype)
    log_decay_TH[:] = [0.0, -30.0, -1e-3, -500.0]
    log_decay_TH[40:45] = [-300.0, 0.0, -80.0, -1.0]
    inputs = q_TGK, k_TGK, v_THV, log_decay_TH, *rest
    check(gated_delta_chunk(*inputs), by_steps(*inputs), DTYPES[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_key_again_and_again(dtype):
    """The system of a chunk at its worst: every write corrects the one before it."""
    q_TGK, k_TGK, v_THV, *rest = delta_inputs(150, dtype=dtype, decay=0.0, beta=1.0)
    k_TGK[:] = k_TGK[0]
    found = gated_delta_chunk(q_TGK, k_TGK, v_THV, *rest)
    check(found, by_steps(q_TGK, k_TGK, v_THV, *rest), DTYPES[dtype])


def test_what_was_written_last_is_answered():
    """beta 1: asked with its own key, the state answers a token's value; beta 0: it only fades."""
    _, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV = delta_inputs(150, heads=(4, 4), beta=1.0)
    k_TGK /= np.linalg.norm(k_TGK, axis=-1, keepdims=True)
    for form in (gated_delta_chunk, by_steps):
        out_THV, *_ = form(k_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV)
        assert off(out_THV, v_THV) < 1e-12
        out_THV, u_THV, after_HKV = form(k_TGK, k_TGK, v_THV, log_decay_TH, 0 * beta_TH, state_HKV)
        faded_HKV = np.exp(log_decay_TH.sum(0))[:, None, None] * state_HKV
        assert not u_THV.any() and off(after_HKV, faded_HKV) < 1e-12


@pytest.mark.parametrize("cut", (1, 16, 17, 64, 100, 149))
def test_reading_in_two_passes(cut):
    inputs = delta_inputs(150)
    *per_token, state_HKV = inputs
    first = gated_delta(*(x[:cut] for x in per_token), state_HKV)
    second = gated_delta(*(x[cut:] for x in per_token), first[2])
    found = *(np.concatenate(both) for both in zip(first[:2], second[:2])), second[2]
    check(found, the_rule(*inputs), 1e-12)


def test_the_inputs_stay_as_they_are():
    inputs = delta_inputs(65)
    before = [x.copy() for x in inputs]
    for form in (gated_delta, gated_delta_chunk, by_steps):
        form(*inputs)
        assert all((a == b).all() for a, b in zip(inputs, before))


@pytest.mark.parametrize("place", range(6), ids=("q", "k", "v", "log_decay", "beta", "state"))
def test_every_input_counts(place):
    """Negative control: one input a little different, and ONNX disagrees."""
    inputs = list(delta_inputs(5))
    expected = onnx_delta(*inputs)
    inputs[place] = 1.01 * inputs[place]
    out_THV, _, after_HKV = gated_delta(*inputs)
    assert off(out_THV, expected[0]) > 1e-4
    assert off(after_HKV, expected[1]) > 1e-4 or place == 0


def test_value_heads_of_a_key_head_follow_one_another():
    """Negative control: q and k tiled over the value heads instead, as GGUF files order them, is another answer."""
    q_TGK, k_TGK, *rest = delta_inputs(20)
    expected, *_ = onnx_delta(q_TGK, k_TGK, *rest)
    tiled, *_ = gated_delta(np.tile(q_TGK, (1, 2, 1)), np.tile(k_TGK, (1, 2, 1)), *rest)
    assert off(tiled, expected) > 0.1


# The convolution -----------------------------------------------------------------------------------------------------

# name -> length, channels, width, whether inputs came before
CONVOLUTIONS = {
    "basic": (20, 6, 4, False), "with_past_state": (20, 6, 4, True), "decode_step": (1, 6, 4, True),
    "kernel_size_one": (9, 5, 1, True), "kernel_size_two": (9, 5, 2, True), "one_channel": (1, 1, 4, False),
    "short_input_no_past_state": (2, 3, 4, False), "short_input": (2, 3, 4, True), "wide_kernel": (70, 8, 7, True),
    "as_long_as_the_kernel": (4, 3, 4, True),
}  # fmt: skip


def onnx_conv(x_TC, weight_CW, window_WC, activation="none"):
    """ONNX's CausalConvWithState -> (out [T, C], the next window [W-1, C])."""
    node = onnx.helper.make_node(
        "CausalConvWithState", ["x", "w", "", "state"], ["out", "after"], activation=activation
    )
    inputs = {"x": x_TC.T[None], "w": weight_CW[:, None], "state": window_WC.T[None]}
    out, after = ReferenceEvaluator(node).run(None, inputs)
    return out[0].T, after[0].T


@pytest.mark.parametrize("dtype, tolerance", (("float64", 1e-14), ("float32", 1e-6)))
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_convolution_is_onnx_causal_conv(case, dtype, tolerance):
    length, channels, width, past = CONVOLUTIONS[case]
    shapes = (length, channels), (channels, width), (width - 1, channels)
    x_TC, weight_CW, window_WC = (numbers(shape, seed).astype(dtype) for seed, shape in enumerate(shapes))
    window_WC *= past
    out_TC = causal_conv(x_TC, weight_CW, window_WC)
    assert out_TC.dtype == dtype
    assert off(out_TC, onnx_conv(x_TC, weight_CW, window_WC)[0]) <= tolerance
    assert off(silu(out_TC), onnx_conv(x_TC, weight_CW, window_WC, "silu")[0]) <= 1e-6  # float32 within ONNX


@pytest.mark.parametrize("cut", (1, 2, 3, 4, 30, 49))
def test_convolution_in_two_passes(cut):
    """With ONNX's own state carried over."""
    x_TC, weight_CW, window_WC = numbers((50, 6), 1), numbers((6, 4), 2), numbers((3, 6), 3)
    whole_TC = causal_conv(x_TC, weight_CW, window_WC)
    first_TC, carried_WC = causal_conv(x_TC[:cut], weight_CW, window_WC), onnx_conv(x_TC[:cut], weight_CW, window_WC)[1]
    second_TC = causal_conv(x_TC[cut:], weight_CW, carried_WC)
    assert off(np.concatenate([first_TC, second_TC]), whole_TC) < 1e-15


def test_the_convolution_looks_back_alone():
    """An input changes its own output and the W - 1 after it, by its weight from the last to the first."""
    x_TC, weight_CW = np.zeros((12, 1)), numbers((1, 4), 0)
    x_TC[5] = 1.0
    out_T = causal_conv(x_TC, weight_CW, np.zeros((3, 1)))[:, 0]
    assert (out_T[5:9] == weight_CW[0, ::-1]).all() and np.count_nonzero(out_T) == 4
