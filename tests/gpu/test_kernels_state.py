"""Kernels of norms and the Gated DeltaNet, run on the CPU, against NumPy."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from minimtp import layers, qwen35, shim
from minimtp.delta_state import DeltaState
from minimtp.kernel_source import source

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
ORDERS = ["forward", "backward", "shuffled"]
CLOSE = 1e-5


def nans(*shape):
    return np.full(shape, np.nan, np.float32)


def normal(random, *shape):
    return random.standard_normal(shape).astype(np.float32)


def assert_close(got, wanted):
    assert got.shape == wanted.shape
    assert np.abs(got - wanted).max() <= CLOSE * np.abs(wanted).max()


def changed(name, constants, *edits):
    """The source of a kernel with some of its text replaced, which must be there."""
    text = source(name, constants)
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    return text


def assert_caught(check, *arguments, **options):
    """The shim refuses what the check runs, or the check sees that the numbers are wrong."""
    with pytest.raises((shim.KernelError, AssertionError)):
        check(*arguments, **options)


# Norms


def check_norm(columns, threads, order="forward", rows=3, text=None, with_all=True):
    random = np.random.RandomState(columns)
    x_TD, residual_TD = normal(random, rows, columns) * 0.01, normal(random, rows, columns)  # the eps counts
    weight_D, out_TD = normal(random, columns), nans(rows, columns)
    wanted_TD, extra = layers.rms_norm(x_TD, weight_D if with_all else None, 1e-4), [None, None]
    if with_all:
        wanted_TD, extra = residual_TD + wanted_TD, [weight_D, residual_TD]
    arguments = [out_TD, x_TD, *extra, columns, 1e-4]
    shim.launch("rms_norm", "rms_norm", rows, threads, arguments, shared=4 * columns, order=order, text=text)
    assert_close(out_TD, wanted_TD)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("columns, threads", [(100, 32), (67, 96), (1, 32), (1536, 1024)])
def test_a_norm_with_weight_and_residual(columns, threads, order):
    check_norm(columns, threads, order)


def test_a_bare_norm_has_no_weight_and_adds_nothing():
    check_norm(70, 64, with_all=False)


def test_a_norm_may_overwrite_the_residual():
    random = np.random.RandomState(1)
    x_TD, stream_TD, weight_D = normal(random, 2, 50), normal(random, 2, 50), normal(random, 50)
    wanted_TD = stream_TD + layers.rms_norm(x_TD, weight_D)
    arguments = [stream_TD, x_TD, weight_D, stream_TD, 50, 1e-6]
    shim.launch("rms_norm", "rms_norm", 2, 32, arguments, shared=200, order="shuffled")
    assert_close(stream_TD, wanted_TD)


def gated_norm(x_RV, weight_V, gate_RV, order="forward", text=None):
    """The kernel's result, two rows a block."""
    out_RV, (rows, columns) = nans(*x_RV.shape), x_RV.shape
    arguments = [out_RV, x_RV, weight_V, gate_RV, rows, columns, 1e-6]
    shim.launch("rms_norm", "rms_norm_gated", -(-rows // 2), 64, arguments, order=order, text=text)
    return out_RV


def check_gated_norm(order="forward", text=None):
    random = np.random.RandomState(3)
    x_RV, gate_RV, weight_V = normal(random, 5, 40), 9 * normal(random, 5, 40), normal(random, 40)
    normed_RV = layers.rms_norm(x_RV, weight_V)
    assert_close(gated_norm(x_RV, weight_V, gate_RV, order, text), normed_RV * layers.silu(gate_RV))


@pytest.mark.parametrize("order", ORDERS)
def test_a_gated_norm_of_rows_that_do_not_fill_the_last_block(order):
    check_gated_norm(order)


def test_norms_with_planted_defects_are_caught():
    no_barrier = changed("rms_norm", (), ("parts[warp] = x;\n    __syncthreads();", "parts[warp] = x;"))
    assert_caught(check_norm, 100, 64, "backward", text=no_barrier)
    edits = ("residual_TD[row + i] + x :", "residual_TD[i] + x :"), ("row >= rows", "row > rows")
    wrong_rows = changed("rms_norm", (), *edits)
    assert_caught(check_norm, 100, 64, text=wrong_rows)
    assert_caught(check_gated_norm, text=wrong_rows)


# Gated DeltaNet

G, H, K, V, W, WARPS, LOG = 2, 4, 18, 40, 4, 4, 16  # a warp's rows end beyond K, a tile of columns beyond V
C = 2 * G * K + H * V


def random_layer(seed=4):
    random = np.random.RandomState(seed)
    return SimpleNamespace(
        conv_CW=normal(random, C, W) * 0.5,
        A_log=normal(random, H),
        dt_bias=normal(random, H),
        gated_norm=normal(random, V),
    )


def random_inputs(tokens, seed=5):
    """What a layer's projections would be: conv [T, C], a and b [T, H], z [T, H V]."""
    random = np.random.RandomState(seed)
    return [normal(random, tokens, width) for width in (C, H, H, H * V)]


class KernelMemory:
    """A layer's memory as the kernels have it: committed window and state, logs, and how many tokens of those count."""

    def __init__(self):
        self.window_WC, self.state_HKV = np.zeros((W - 1, C), np.float32), np.zeros((H, K, V), np.float32)
        self.conv_LC, self.k_LGK, self.u_LHV, self.decay_LH = (
            nans(LOG, C),
            nans(LOG, G, K),
            nans(LOG, H, V),
            nans(LOG, H),
        )
        self.after_HKV, self.logged = nans(H, K, V), np.zeros(1, np.int32)

    @property
    def writes(self):
        return self.k_LGK, self.u_LHV, self.decay_LH

    def conv(self, w, conv_TC, order="forward", text=None):
        out_TC, tokens = nans(*conv_TC.shape), len(conv_TC)
        arguments = [out_TC, self.conv_LC, conv_TC, w.conv_CW, self.window_WC, self.logged, C]
        constants = ("TOKENS", tokens), ("WIDTH", W)
        shim.launch(
            "causal_conv", "causal_conv", -(-C // 64), 64, arguments, constants=constants, order=order, text=text
        )
        return out_TC

    def rule(self, w, mixed_TC, a_TH, b_TH, order="forward", text=None):
        tokens = len(mixed_TC)
        out_THV = nans(tokens, H, V)
        inputs = mixed_TC, a_TH, b_TH, w.A_log, w.dt_bias, self.state_HKV, self.logged
        arguments = [out_THV, self.after_HKV, *self.writes, *inputs, G, V, float(np.float32(K**-0.5))]
        constants = ("TOKENS", tokens), ("KEY_DIM", K), ("WARPS", WARPS)
        grid, block = (H, -(-V // 32)), 32 * WARPS
        shim.launch("gated_delta", "gated_delta", grid, block, arguments, constants=constants, order=order, text=text)
        return out_THV

    def read(self, w, conv_TC, a_TH, b_TH, order="forward", conv_text=None, rule_text=None):
        """One pass -> what the rule answers [T, H, V]."""
        mixed_TC = self.conv(w, conv_TC, order, conv_text)
        out_THV = self.rule(w, mixed_TC, a_TH, b_TH, order, rule_text)
        self.logged += len(conv_TC)
        return out_THV

    def replayed(self, count, order="forward"):
        """The state after the log's first `count` tokens, made in the place of a copy of the committed one."""
        state_HKV, constants = self.state_HKV.copy(), (("TOKENS", 1), ("KEY_DIM", K), ("WARPS", WARPS))
        arguments = [state_HKV, *self.writes, np.array([count], np.int32), G, V]
        grid, block = (H, -(-V // 32)), 32 * WARPS
        shim.launch("gated_delta", "gated_delta_replay", grid, block, arguments, constants=constants, order=order)
        return state_HKV

    def commit(self, order="forward"):
        arguments, constants = [self.window_WC, self.conv_LC, self.logged, C], (("TOKENS", 1), ("WIDTH", W))
        shim.launch("causal_conv", "causal_conv_commit", -(-C // 64), 64, arguments, constants=constants, order=order)
        self.state_HKV = self.replayed(self.logged[0], order)
        self.logged[:] = 0


def selector(start, stop, width):
    """A weight that passes on some columns of its input as they are."""
    return np.eye(width, dtype=np.float32)[start:stop]


def numpy_pass(w, inputs, memory):
    """The same pass by qwen35.delta_net, all of whose projections only pass on -> [T, H V]."""
    edges = np.cumsum([0, *(x.shape[1] for x in inputs)])
    qkv, a, b, z = (selector(start, stop, edges[-1]) for start, stop in zip(edges, edges[1:]))
    weights = SimpleNamespace(
        in_proj_qkv=qkv, in_proj_a=a, in_proj_b=b, in_proj_z=z, out_proj=np.eye(H * V, dtype=np.float32),
        conv1d=w.conv_CW[:, None], A_log=w.A_log, dt_bias=w.dt_bias, gated_norm=w.gated_norm,
    )  # fmt: skip
    return qwen35.delta_net(np.concatenate(inputs, axis=1), weights, qwen35.DeltaNet(G, H, K, V, W), 1e-6, memory)


def check_delta_net(
    order="forward", plan=((8, 3, False), (1, 0, True), (8, 8, False), (5, 1, True), (1, 0, False)), **texts
):
    """Passes that keep all or some of their tokens, with and without a commit after them; the last state, too."""
    w, kernels, memory = random_layer(), KernelMemory(), DeltaState(G, H, K, V, W)
    for step, (tokens, unread, commit) in enumerate(plan):
        conv_TC, a_TH, b_TH, z_TV = inputs = random_inputs(tokens, 10 + step)
        wanted_TD = numpy_pass(w, inputs, memory)
        out_THV = kernels.read(w, conv_TC, a_TH, b_TH, order, **texts)
        gated_RV = gated_norm(out_THV.reshape(-1, V), w.gated_norm, z_TV.reshape(-1, V), order)
        assert_close(gated_RV.reshape(tokens, -1), wanted_TD)
        assert_close(kernels.after_HKV, memory.state_HKV)
        memory.rollback(unread)
        kernels.logged -= unread
        if commit:
            memory.commit()
            kernels.commit(order)
            assert np.array_equal(kernels.window_WC, memory.window())
            assert_close(kernels.state_HKV, memory.state_HKV)


@pytest.mark.parametrize("order", ORDERS)
def test_the_kernels_are_qwens_delta_net_through_passes_unreading_and_commits(order):
    check_delta_net(order)


@pytest.mark.parametrize("widths", [(1,) * 8, (5, 1, 1, 1)])
def test_a_tokens_bits_do_not_depend_on_the_pass_it_is_read_in(widths):
    w, (conv_TC, a_TH, b_TH, _), whole, parts = random_layer(), random_inputs(8), KernelMemory(), KernelMemory()
    whole.state_HKV[:] = parts.state_HKV[:] = normal(np.random.RandomState(6), H, K, V)
    out_THV, starts = whole.read(w, conv_TC, a_TH, b_TH), np.cumsum((0, *widths))
    outs = [parts.read(w, conv_TC[i:j], a_TH[i:j], b_TH[i:j], "shuffled") for i, j in zip(starts, starts[1:])]
    assert np.array_equal(np.concatenate(outs), out_THV)
    for mine, other in zip((*parts.writes, parts.conv_LC), (*whole.writes, whole.conv_LC)):
        assert np.array_equal(mine[:8], other[:8]) and np.isnan(mine[8:]).all()
    assert np.array_equal(parts.after_HKV, whole.after_HKV)


@pytest.mark.parametrize("order", ORDERS)
def test_a_replay_has_the_bits_of_the_state_that_the_pass_made(order):
    w, (conv_TC, a_TH, b_TH, _), whole, single = random_layer(), random_inputs(8), KernelMemory(), KernelMemory()
    whole.state_HKV[:] = single.state_HKV[:] = normal(np.random.RandomState(7), H, K, V)
    whole.read(w, conv_TC, a_TH, b_TH)
    assert np.array_equal(whole.replayed(0, order), whole.state_HKV)
    for t in range(8):
        single.read(w, conv_TC[t : t + 1], a_TH[t : t + 1], b_TH[t : t + 1])
        assert np.array_equal(whole.replayed(t + 1, order), single.after_HKV)
    assert np.array_equal(whole.replayed(8, order), whole.after_HKV)


def test_large_and_tiny_gates_stay_numbers():
    w, kernels, memory = random_layer(), KernelMemory(), DeltaState(G, H, K, V, W)
    conv_TC, a_TH, b_TH, z_TV = random_inputs(1)
    a_TH[:], b_TH[:], conv_TC[0, : 2 * G * K] = [[200, -200, 30, -30]], [[-200, 200, 30, -30]], 0
    with np.errstate(over="ignore"):
        numpy_pass(w, [conv_TC, a_TH, b_TH, z_TV], memory)
    kernels.read(w, conv_TC, a_TH, b_TH)
    assert np.array_equal(kernels.after_HKV, memory.state_HKV)  # keys of length 0: nothing is written


def test_a_delta_net_with_planted_defects_is_caught():
    conv, rule = (("TOKENS", 1), ("WIDTH", W)), (("TOKENS", 1), ("KEY_DIM", K), ("WARPS", WARPS))
    plan = (1, 0, False), (1, 0, False), (1, 0, False), (1, 0, False), (1, 0, True), (1, 0, True)
    check_delta_net("backward", plan)
    in_front = changed("causal_conv", conv, ("log_LC[(long long)(before + t)", "log_LC[(long long)(t)"))
    assert_caught(check_delta_net, "forward", plan, conv_text=in_front)
    edits = [
        ("= x;\n    __syncthreads();\n    float sum", "= x;\n    float sum"),
        ("state_R[r] * decay);", "state_R[r]);"),
    ]
    for edit in edits:
        assert_caught(check_delta_net, "backward", plan, rule_text=changed("gated_delta", rule, edit))
