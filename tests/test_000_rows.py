"""What bit-exactness rests on, tested first: a token's numbers do not depend on who shares the pass, on how a weight
is stored, or on where in a buffer its keys lie.

Every property is one call of `independent_of_width` or `same_bits`; arithmetic that does depend on the width goes
through the same calls and must be caught.
"""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from random_qwen import write_qwen
from threadpoolctl import threadpool_info
from tiny import FOLDER, MODELS, pair, random_ids, random_prompt, same_bits

import minimtp
from minimtp import Sampling, backend, gemma4, layers, qwen35, qwen35_mtp
from minimtp.backend import ROWS, arithmetic, matmul, tiles
from minimtp.checkpoint import float_to_bf16
from minimtp.delta_state import DeltaState
from minimtp.kv import FullKV, SlidingKV
from minimtp.quant import Plain, pack

DTYPES = ("float32", "float64")
SHAPES = [(1, 1), (1, 5), (1, 300), (2, 64), (3, 7), (5, 1), (17, 33), (63, 65), (64, 64), (65, 1), (65, 40), (65, 130),
          (127, 96), (128, 31), (129, 257), (193, 1000), (320, 256), (1216, 65)]  # fmt: skip
TALL = [(65, 4096), (129, 4096), (130, 4096), (257, 1025), (193, 1500)]  # more than one tile; the last of 1 or 2 rows

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def single_blas_thread(monkeypatch):
    """And tiles of a quarter of their size, so that weights here have several."""
    monkeypatch.setattr(backend, "TILE_BYTES", 1 << 20)
    tiles.cache_clear()
    with arithmetic():
        yield
    tiles.cache_clear()


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 rows, and the thread pool for every weight of more than one."""
    monkeypatch.setattr(backend, "TILE_BYTES", 1)
    monkeypatch.setattr(backend, "POOL_BYTES", 0)
    tiles.cache_clear()


def normal(shape, dtype, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def tokens(features, dtype, seed=1):
    return normal((ROWS, features), dtype, seed)


def moved(x, by):
    """A copy whose data starts `by` elements after an aligned address."""
    out = np.empty(x.size + by, x.dtype)[by:].reshape(x.shape)
    out[...] = x
    return out


def independent_of_width(f, *per_token):
    """f maps arrays of T tokens each to one of T tokens: is every token's result that of a pass of its own?"""
    alone = np.concatenate([f(*(x[t : t + 1] for x in per_token)) for t in range(ROWS)])
    spans = [slice(a, a + width) for width in range(2, ROWS + 1) for a in {0, (ROWS - width) // 2, ROWS - width}]
    return all(same_bits(f(*(x[span] for x in per_token)), alone[span]) for span in spans)


# The matrix product


@every_dtype
@pytest.mark.parametrize("shape", SHAPES + TALL, ids=str)
def test_a_product_does_not_depend_on_the_width(shape, dtype):
    w_OI = normal(shape, dtype)
    assert independent_of_width(lambda x_TI: matmul(x_TI, w_OI), tokens(shape[1], dtype))


@every_dtype
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[0] > 64], ids=str)
def test_tiles_and_the_pool_change_nothing_between_widths(shape, dtype, small_tiles):
    w_OI = normal(shape, dtype)
    assert independent_of_width(lambda x_TI: matmul(x_TI, w_OI), tokens(shape[1], dtype))


@every_dtype
@pytest.mark.parametrize("shape", [(257, 1025), (1100, 1024)], ids=str)
def test_the_pool_gives_what_one_thread_gives(shape, dtype, monkeypatch):
    w_OI, x_TI = normal(shape, dtype), tokens(shape[1], dtype)
    results = []
    for size in (0, 1 << 60):
        monkeypatch.setattr(backend, "POOL_BYTES", size)
        results.append(matmul(x_TI, w_OI))
    assert len(tiles(*shape)) > 1 and same_bits(*results)


@every_dtype
@pytest.mark.parametrize("shape", [(1, 32), (64, 32), (65, 64), (130, 96), (129, 4096), (1100, 1024)], ids=str)
def test_packed_weights_give_the_bits_of_dense_ones(shape, dtype):
    int4, x_TI = pack(normal(shape, "float32")), tokens(shape[1], dtype)
    assert same_bits(matmul(x_TI, int4), matmul(x_TI, int4.dequantize(dtype)))
    assert independent_of_width(lambda x_TI: matmul(x_TI, int4), x_TI)


@every_dtype
@pytest.mark.parametrize("shape", SHAPES[1::3] + TALL[2:], ids=str)
def test_plain_weights_give_the_bits_of_dense_ones(shape, dtype):
    w_OI, x_TI = normal(shape, "float32"), tokens(shape[1], dtype)
    for plain in (Plain(float_to_bf16(w_OI), "BF16"), Plain(w_OI.astype(np.float16), "F16"), Plain(w_OI, "F32")):
        assert same_bits(matmul(x_TI, plain), matmul(x_TI, plain.dequantize(dtype)))
        assert independent_of_width(lambda x_TI: matmul(x_TI, plain), x_TI)  # noqa: B023


@every_dtype
@pytest.mark.parametrize("shape", [(1, 300), (65, 130), (129, 257), (320, 256)], ids=str)
def test_a_product_does_not_depend_on_addresses_or_strides(shape, dtype):
    w_OI, x_TI = normal(shape, dtype), tokens(shape[1], dtype)
    expected = matmul(x_TI, w_OI)
    for by in range(1, 5):
        assert same_bits(matmul(moved(x_TI, by), moved(w_OI, by + 1)), expected)
    assert same_bits(matmul(np.asfortranarray(x_TI), w_OI), expected)
    assert same_bits(matmul(np.repeat(x_TI, 2, axis=1)[:, ::2], w_OI), expected)


@pytest.mark.parametrize("columns", [1, 31, 256, 4096, 100_000])
def test_tiles_cover_the_rows_with_heights_of_64_and_no_lone_row(columns):
    for rows in [1, 2, 63, 64, 65, 66, 128, 129, 130, 4097, 65 * 64, 65 * 64 + 1, 262_144]:
        cuts = tiles(rows, columns)
        heights = [stop - start for start, stop in cuts]
        assert [start for start, _ in cuts] == [0, *(stop for _, stop in cuts[:-1])] and cuts[-1][1] == rows
        assert all(height % 64 == 0 for height in heights[:-1]) and (heights[-1] > 1 or rows == 1)


# Everything between two products


@every_dtype
@pytest.mark.parametrize("features", [1, 2, 7, 8, 9, 31, 64, 65, 127, 129, 256, 1000, 5376])
def test_pointwise_operations_and_norms_do_not_depend_on_the_width(features, dtype):
    weight = normal(features, dtype, 3)
    x_TD = 3 * tokens(features, dtype)
    for f in (
        lambda x_TD: layers.rms_norm(x_TD, weight),
        layers.rms_norm,
        layers.gelu,
        layers.softmax,
        lambda x_TD: layers.softcap(x_TD, 30.0),
        lambda x_TD: layers.gelu(x_TD) * x_TD + x_TD * weight,
    ):
        assert independent_of_width(f, x_TD)


@every_dtype
@pytest.mark.parametrize("heads, head_dim", [(1, 2), (3, 6), (8, 64), (5, 10), (2, 512)])
def test_norms_and_rotation_of_heads_do_not_depend_on_the_width(heads, head_dim, dtype):
    x_THK = normal((ROWS, heads, head_dim), dtype)
    frequencies_C = layers.rope_frequencies(gemma4.Rope("proportional", 1e6, 0.5, 1.0), head_dim)

    def f(x_THK, positions_T):
        return layers.rotate(layers.rms_norm(x_THK), layers.rope_table(positions_T, frequencies_C, np.dtype(dtype)))

    assert independent_of_width(f, x_THK, np.arange(ROWS) + 1000)


# Attention


ATTENTION = [(1, 1, 2), (4, 1, 16), (4, 4, 6), (6, 2, 20), (8, 1, 64), (16, 2, 256)]  # heads, kv heads, head width
WINDOWS = [1, 2, 9, 40]


def filled(kv, k_SGK, v_SGK, width):
    """kv after reading the keys and values in passes, every one but the last committed."""
    for start in range(0, len(k_SGK), width):
        kv.commit()
        kv.append(k_SGK[start : start + width], v_SGK[start : start + width])
    return kv


def one_query(q_HK, k_SGK, v_SGK):
    """Attention of one query over exactly these keys, in arrays of their own."""
    k_GSK, v_GSK = (np.ascontiguousarray(x.swapaxes(0, 1)) for x in (k_SGK, v_SGK))
    return layers.attend(q_HK[None], k_GSK, v_GSK, [0], [k_GSK.shape[1]])


def attention_case(heads, kv_heads, head_dim, length, dtype):
    q_THK = normal((ROWS, heads, head_dim), dtype, 5)
    return q_THK, normal((length, kv_heads, head_dim), dtype, 6), normal((length, kv_heads, head_dim), dtype, 7)


@every_dtype
@pytest.mark.parametrize("heads, kv_heads, head_dim", ATTENTION)
def test_attention_does_not_depend_on_width_capacity_or_where_the_keys_lie(heads, kv_heads, head_dim, dtype):
    for length in (ROWS, 33, 130):
        q_THK, k_SGK, v_SGK = attention_case(heads, kv_heads, head_dim, length, dtype)
        for slots, width in ((0, 1), (0, 5), (length, 16), (777, length)):
            kv = filled(FullKV(kv_heads, head_dim, dtype, slots), k_SGK, v_SGK, width)
            check_attention(q_THK, k_SGK, v_SGK, None, kv)
        for window in WINDOWS:
            for width in (1, 5, 16, length):
                kv = filled(SlidingKV(kv_heads, head_dim, window, dtype), k_SGK, v_SGK, width)
                check_attention(q_THK, k_SGK, v_SGK, window, kv)


def check_attention(q_THK, k_SGK, v_SGK, window, kv):
    """The last queries, as one pass of as many as are still all held, against each query by itself."""
    length = len(k_SGK)
    low_S = np.maximum(0, np.arange(length) + 1 - (window or length))
    held = [at for at in range(length - ROWS, length) if low_S[at] >= kv.start]
    seen = [slice(low_S[at], at + 1) for at in held]
    alone = [one_query(q_THK[at - length], k_SGK[slots], v_SGK[slots]) for at, slots in zip(held, seen)]
    for width in {1, 2, len(held) // 2 + 1, len(held)}:
        at_T = np.array(held[-width:])
        together = layers.attend(q_THK[at_T - length], *kv.read(), low_S[at_T] - kv.start, at_T + 1 - kv.start)
        assert same_bits(together, np.concatenate(alone[-width:]))


# A whole model


@pytest.mark.parametrize("keep", ["dense", "packed"])
@pytest.mark.parametrize("name", [*MODELS, "bundled"])
def test_a_pass_gives_bit_for_bit_what_single_passes_give(name, keep):
    for dtype in ("float32",) if name == "bundled" else DTYPES:
        target, _ = pair(name, dtype, keep)
        ids_T = random_prompt(target, 3 * ROWS)
        alone, together = target.new_cache(), target.new_cache(capacity=3 * ROWS)
        single = [target.forward([token], alone) for token in ids_T]
        for width in (2, 5, 16, 1, 7, 3, 14):
            rows = slice(together.length, together.length + width)
            out = target.forward(ids_T[rows], together)
            assert same_bits(out.logits_TV, np.concatenate([one.logits_TV for one in single[rows]]))
            assert same_bits(out.hidden_TD, np.concatenate([one.hidden_TD for one in single[rows]]))


def test_packed_and_dense_models_are_one_model():
    (dense, _), (packed, _) = pair("window_20", "float32", "dense"), pair("window_20", "float32", "packed")
    ids_T = random_ids(60, dense.config.vocab_size)
    assert isinstance(dense.params.embed_tokens, np.ndarray) and not isinstance(packed.params.embed_tokens, np.ndarray)
    assert same_bits(*(target.forward(ids_T, target.new_cache()).logits_TV for target in (dense, packed)))


def test_a_forward_pass_holds_blas_to_one_thread(monkeypatch):
    seen = []

    def spy(*operands):
        seen.extend(library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas")
        return matmul(*operands)

    if not any(library["user_api"] == "blas" for library in threadpool_info()):
        pytest.skip("no BLAS here whose threads could be counted")
    monkeypatch.setattr(gemma4, "matmul", spy)
    target, drafter = pair("window_4")
    cache = target.new_cache()
    out = target.forward([1], cache)
    drafter.propose([2], out.hidden_TD, cache, 1, Sampling(temperature=0.0), [0.5])
    assert seen and set(seen) == {1}


# The checks catch what they are there for


@every_dtype
def test_a_product_whose_order_of_sums_follows_the_width_is_caught(dtype):
    def halves(x_TI):
        cut = shape[1] // 2
        if len(x_TI) < 4:
            return matmul(x_TI, w_OI)
        return matmul(x_TI[:, :cut], w_OI[:, :cut]) + matmul(x_TI[:, cut:], w_OI[:, cut:])

    for shape in [(64, 64), (65, 130), (320, 256)]:
        w_OI = normal(shape, dtype)
        assert not independent_of_width(halves, tokens(shape[1], dtype))


def test_plain_gemm_is_caught():
    """The reason for the two modes. A BLAS whose GEMM sums as its matrix-vector product does would not need them."""
    weights = [normal(shape, dtype) for shape in SHAPES + TALL for dtype in DTYPES]
    if all(gemm_is_independent_of_width(w_OI) for w_OI in weights):
        pytest.skip("this BLAS's GEMM does not depend on the width on any shape tried: nothing to catch")


def gemm_is_independent_of_width(w_OI):
    return independent_of_width(lambda x_TI: x_TI @ w_OI.T, tokens(w_OI.shape[1], w_OI.dtype))


@every_dtype
def test_sums_over_rows_that_are_not_contiguous_are_caught(dtype):
    def f(x_TD):
        x_TD = np.asfortranarray(x_TD)
        return np.ascontiguousarray(layers.rms_norm(x_TD))

    assert not all(independent_of_width(f, tokens(features, dtype)) for features in (31, 64, 129, 256, 1000))


@every_dtype
def test_attention_over_masked_padding_is_caught(dtype):
    q_THK, k_SGK, v_SGK = attention_case(4, 2, 16, 50, dtype)
    k_GSK, v_GSK = k_SGK.swapaxes(0, 1).copy(), v_SGK.swapaxes(0, 1).copy()

    def masked(q_THK, high_T):
        held = slice(0, high_T.max())
        scores_GTRS = q_THK.reshape(-1, 2, 2, 16).swapaxes(0, 1) @ k_GSK[:, None, held].swapaxes(-1, -2)
        seen_T1S = np.arange(held.stop) < high_T[:, None, None]
        weights_GTRS = layers.softmax(np.where(seen_T1S, scores_GTRS, -np.inf))
        return (weights_GTRS @ v_GSK[:, None, held]).swapaxes(0, 1)

    assert not independent_of_width(masked, q_THK, np.arange(ROWS) + 30)


# Qwen 3.5: functions of single tokens


@every_dtype
@pytest.mark.parametrize("heads, width", [(1, 1), (3, 5), (2, 8), (5, 31), (2, 128), (16, 65)])
def test_norms_by_length_and_gates_do_not_depend_on_the_width(heads, width, dtype):
    """Of heads that lie beside others in a row, as those of one projection do."""
    x_THK = 5 * normal((ROWS, heads, width + 3), dtype)[..., :width]
    for f in (layers.l2_norm, layers.silu, layers.sigmoid, layers.softplus):
        assert independent_of_width(f, x_THK)
    assert independent_of_width(lambda x_THK: layers.silu(x_THK) * layers.sigmoid(-x_THK), x_THK)


@every_dtype
@pytest.mark.parametrize("heads, head_dim, rotary_dim", [(1, 8, 2), (3, 12, 6), (4, 16, 4), (2, 256, 64), (5, 10, 10)])
def test_rotating_part_of_a_head_does_not_depend_on_the_width(heads, head_dim, rotary_dim, dtype):
    frequencies_C = layers.rope_frequencies(layers.Rope("default", 1e7), rotary_dim)

    def f(x_THK, positions_T):
        return layers.rotate(x_THK, layers.rope_table(positions_T, frequencies_C, np.dtype(dtype)))

    x_THK, positions_T = normal((ROWS, heads, head_dim), dtype), np.arange(ROWS) + 1000
    assert independent_of_width(f, x_THK, positions_T)
    assert same_bits(f(x_THK, positions_T)[..., rotary_dim:], x_THK[..., rotary_dim:])


EXPERTS = [(7, 3, 20, 12), (5, 5, 31, 33), (16, 1, 8, 40), (12, 8, 64, 24)]  # how many, of which a token uses; widths


def mixture_case(count, top_k, model, inner, dtype):
    """(x of ROWS tokens, what best_experts is given for them, the experts' weights)"""
    shapes = {"gate_proj": (inner, model), "up_proj": (inner, model), "down_proj": (model, inner)}
    experts = {f"experts_{name}": normal((count, *shape), dtype, i) for i, (name, shape) in enumerate(shapes.items())}
    return tokens(model, dtype), normal((count, model), dtype, 4), SimpleNamespace(**experts)


@every_dtype
@pytest.mark.parametrize("count, top_k, model, inner", EXPERTS)
def test_a_mixture_of_experts_does_not_depend_on_the_width(count, top_k, model, inner, dtype):
    x_TD, router_ED, w = mixture_case(count, top_k, model, inner, dtype)

    def f(x_TD):
        return layers.mixture(x_TD, *layers.best_experts(matmul(x_TD, router_ED), top_k), w, layers.silu)

    assert len({tuple(row) for row in layers.best_experts(matmul(x_TD, router_ED), top_k)[0]}) > ROWS // 4
    assert independent_of_width(f, x_TD)


# Qwen 3.5: what passes from token to token


def in_passes(f, width, state, per_token):
    """All tokens in passes of a width; f(state, *those of a pass) -> (a result of each, state)."""
    results = []
    for start in range(0, len(per_token[0]), width):
        result, state = f(state, *(x[start : start + width] for x in per_token))
        results.append(result)
    return [np.concatenate(results), *contents(state)]


def contents(state):
    return [state] if isinstance(state, np.ndarray) else list(state.state().values())


def independent_of_passes(f, new_state, *per_token):
    """However the tokens are divided into passes: are every result and the state at the end the same bits?"""
    alone = in_passes(f, 1, new_state(), per_token)
    return all(all(map(same_bits, in_passes(f, width, new_state(), per_token), alone)) for width in range(2, ROWS + 1))


def convolution(conv):
    """Such a function out of one of x, weight and window."""

    def f(window_WC, x_TC, weight_CW):
        return conv(x_TC, weight_CW, window_WC), np.concatenate([window_WC, x_TC])[len(x_TC) :]

    return f


@every_dtype
@pytest.mark.parametrize("channels, width", [(1, 4), (7, 2), (64, 4), (100, 3), (33, 5)])
def test_a_causal_convolution_does_not_depend_on_the_passes(channels, width, dtype):
    weight_CW, x_TC = normal((channels, width), dtype, 2), normal((3 * ROWS, channels), dtype)

    def f(window_WC, x_TC):
        return convolution(layers.causal_conv)(window_WC, x_TC, weight_CW)

    assert independent_of_passes(f, lambda: np.zeros((width - 1, channels), dtype), x_TC)


DELTA = [(1, 1, 8, 8), (2, 4, 16, 6), (3, 3, 5, 12), (2, 6, 31, 33), (1, 3, 128, 128)]  # key and value heads, widths
every_delta = pytest.mark.parametrize("sizes", DELTA, ids=str)


def delta_case(sizes, dtype, length=3 * ROWS):
    """(what gated_delta takes of each token, the state before)"""
    G, H, K, V = sizes
    q_TGK, k_TGK = (layers.l2_norm(normal((length, G, K), dtype, seed)) for seed in (1, 2))
    log_decay_TH, beta_TH = (np.abs(normal((length, H), dtype, seed)) for seed in (3, 4))
    per_token = q_TGK, k_TGK, normal((length, H, V), dtype, 5), -log_decay_TH, layers.sigmoid(beta_TH)
    return per_token, normal((H, K, V), dtype, 6)


def delta(rule):
    """The rule as in_passes wants it; its writes count as results."""

    def f(state_HKV, *per_token):
        out_THV, u_THV, state_HKV = rule(*per_token, state_HKV)
        return np.concatenate([out_THV, u_THV], axis=-1), state_HKV

    return f


@every_dtype
@every_delta
def test_the_gated_delta_rule_does_not_depend_on_the_passes(sizes, dtype):
    per_token, state_HKV = delta_case(sizes, dtype)
    assert independent_of_passes(delta(layers.gated_delta), lambda: state_HKV, *per_token)


def written_again(sizes, dtype, length):
    """(state after so many tokens, state after what they wrote was written again)"""
    (q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH), state_HKV = delta_case(sizes, dtype, length)
    _, u_THV, after_HKV = layers.gated_delta(q_TGK, k_TGK, v_THV, log_decay_TH, beta_TH, state_HKV)
    return after_HKV, layers.delta_writes(k_TGK, u_THV, log_decay_TH, state_HKV)


@every_dtype
@every_delta
def test_writing_again_reaches_the_same_state(sizes, dtype):
    assert all(same_bits(*written_again(sizes, dtype, length)) for length in range(1, ROWS + 1))


# Qwen 3.5: whole layers, and the whole model

QWENS = ("dense", "three_to_one", "int4", "moe", "moe_int4")
WIDTHS = (9, 1, 16, 2, 5, 12, 3, 15, 8, 4, 14, 7, 10, 6, 13, 11)
every_qwen = pytest.mark.parametrize("name", QWENS)


@cache
def qwen(name, dtype="float32", keep="auto"):
    """The target of random_qwen.CONFIGS[name]."""
    folder = Path(FOLDER.name) / f"qwen_{name}"
    return minimtp.load(folder if folder.exists() else write_qwen(name, folder), dtype=dtype, keep=keep)


def mixer(target, i, dtype):
    """Attention or DeltaNet of layer i -> (as in_passes wants it, a function that makes its memory)"""
    config, w = target.config, target.params.layers[i]
    layer, eps = config.layers[i], config.rms_norm_eps

    def delta_net(memory, x_TD):
        return qwen35.delta_net(x_TD, w, layer, eps, memory), memory

    def attention(memory, x_TD):
        positions_T = np.arange(memory.length, memory.length + len(x_TD))
        rope, span = qwen35.rope_at(config, positions_T, np.dtype(dtype)), layers.seen(positions_T)
        return qwen35.attention(x_TD, w, layer, eps, rope, memory, span), memory

    if layer.kind == "full":
        return attention, lambda: FullKV(layer.kv_heads, layer.head_dim, dtype)
    sizes = layer.key_heads, layer.value_heads, layer.key_dim, layer.value_dim, layer.kernel
    return delta_net, lambda: DeltaState(*sizes, dtype)


@every_dtype
@every_qwen
def test_whole_layers_do_not_depend_on_the_passes(name, dtype):
    target = qwen(name, dtype)
    x_TD = normal((3 * ROWS, target.config.hidden_size), dtype)
    kinds = [layer.kind for layer in target.config.layers]
    for i in (kinds.index("linear"), kinds.index("full")):
        assert independent_of_passes(*mixer(target, i, dtype), x_TD)
        w = target.params.layers[i]
        assert independent_of_width(lambda x: qwen35.feed_forward(x, w, target.config, layers.no_tap), x_TD[:ROWS])  # noqa: B023


@every_dtype
@every_qwen
def test_the_mtp_layer_does_not_depend_on_the_passes(name, dtype):
    target = qwen(name, dtype)
    drafter, D = minimtp.load_drafter("auto", target), target.config.hidden_size
    attention = target.config.attention

    def f(kv, embedded_ND, hidden_ND):
        positions_N = np.arange(kv.length, kv.length + len(hidden_ND))
        inputs = (lambda _: embedded_ND), kv, None, hidden_ND, positions_N
        return qwen35_mtp.read(drafter.params, drafter.config, *inputs)[0], kv

    per_token = (normal((3 * ROWS, D), dtype, seed) for seed in (1, 2))
    assert independent_of_passes(f, lambda: FullKV(attention.kv_heads, attention.head_dim, dtype), *per_token)


@cache
def qwen_token_by_token(name, dtype):
    """(ids, logits of each, hidden states, what every layer remembers at the end), each read in a pass of its own."""
    target = qwen(name, dtype)
    ids_T, memory = random_prompt(target, sum(WIDTHS)), target.new_cache()
    outs = [target.forward([token], memory) for token in ids_T]
    logits_TV, hidden_TD = (np.concatenate([getattr(out, part) for out in outs]) for part in ("logits_TV", "hidden_TD"))
    return ids_T, logits_TV, hidden_TD, remembered(memory)


def remembered(memory):
    return [array for layer in memory.layers for array in contents(layer)]


def qwen_in_passes(target, ids_T, widths=WIDTHS):
    memory, outs = target.new_cache(capacity=len(ids_T)), []
    for width in widths:
        outs.append(target.forward(ids_T[memory.length : memory.length + width], memory))
    return *(np.concatenate([getattr(out, part) for out in outs]) for part in ("logits_TV", "hidden_TD")), memory


@pytest.mark.parametrize(
    "name, dtype, keep",
    [*((name, "float32", "dense") for name in QWENS), *((name, "float64", "dense") for name in ("three_to_one", "moe")),
     *((name, "float32", "packed") for name in ("dense", "int4", "moe_int4"))],
)  # fmt: skip
def test_a_pass_of_qwen_gives_bit_for_bit_what_single_passes_give(name, dtype, keep):
    ids_T, logits_TV, hidden_TD, expected = qwen_token_by_token(name, dtype)
    assert len(np.unique(logits_TV, axis=0)) == len(ids_T)
    logits, hidden, memory = qwen_in_passes(qwen(name, dtype, keep), ids_T)
    assert same_bits(logits, logits_TV) and same_bits(hidden, hidden_TD)
    assert all(map(same_bits, remembered(memory), expected))


def test_packed_and_dense_qwen_are_one_model():
    dense, packed = (qwen("moe_int4", keep=keep) for keep in ("dense", "packed"))
    ids_T = random_ids(60, dense.config.vocab_size)
    for place in ("in_proj_qkv", "shared_expert_up_proj"):
        arrays = [isinstance(getattr(target.params.layers[0], place), np.ndarray) for target in (dense, packed)]
        assert arrays == [True, False]
    assert same_bits(*(target.forward(ids_T, target.new_cache()).logits_TV for target in (dense, packed)))


def test_a_pass_of_qwen_holds_blas_to_one_thread(monkeypatch):
    seen = {}

    def spy(module):
        def matmul(*operands):
            found = [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]
            seen.setdefault(module.__name__, set()).update(found)
            return backend.matmul(*operands)

        return matmul

    if not any(library["user_api"] == "blas" for library in threadpool_info()):
        pytest.skip("no BLAS here whose threads could be counted")
    for module in (qwen35, qwen35_mtp):
        monkeypatch.setattr(module, "matmul", spy(module))
    target = qwen("moe")
    memory = target.new_cache()
    out = target.forward([1], memory)
    minimtp.load_drafter("auto", target).propose([2], out.hidden_TD, memory, 1, Sampling(temperature=0.0), ())
    assert seen == {module.__name__: {1} for module in (qwen35, qwen35_mtp)}


# The checks of Qwen catch what they are there for


@every_dtype
@every_delta
def test_the_chunked_rule_in_narrow_passes_is_caught(sizes, dtype):
    per_token, state_HKV = delta_case(sizes, dtype)
    assert not independent_of_passes(delta(layers.gated_delta_chunk), lambda: state_HKV, *per_token)


@every_dtype
@every_delta
def test_writing_again_as_one_product_is_caught(sizes, dtype, monkeypatch):
    stepwise = [written_again(sizes, dtype, length)[0] for length in range(1, ROWS + 1)]
    monkeypatch.setattr(layers, "ROWS", 0)
    assert not all(same_bits(a, written_again(sizes, dtype, i + 1)[1]) for i, a in enumerate(stepwise))


@every_dtype
def test_a_convolution_as_a_product_with_zeros_is_caught(dtype):
    """Each channel's Toeplitz matrix times its inputs: the zeros change the order of sums."""

    def toeplitz(x_TC, weight_CW, window_WC):
        padded_SC = np.concatenate([window_WC, x_TC])
        (T, C), W = x_TC.shape, weight_CW.shape[1]
        matrix_CTS = np.zeros((C, T, T + W - 1), dtype)
        for t in range(T):
            matrix_CTS[:, t, t : t + W] = weight_CW
        return (matrix_CTS @ padded_SC.T[:, :, None])[:, :, 0].T

    weight_CW, x_TC = normal((64, 4), dtype, 2), normal((3 * ROWS, 64), dtype)
    for conv, passes in ((toeplitz, False), (layers.causal_conv, True)):
        f = convolution(conv)
        state = np.zeros((3, 64), dtype)
        assert passes == independent_of_passes(lambda s, x: f(s, x, weight_CW), lambda: state, x_TC)  # noqa: B023


@every_dtype
def test_experts_summed_in_the_order_of_their_first_use_are_caught(dtype):
    x_TD, router_ED, w = mixture_case(7, 4, 20, 12, dtype)

    def f(x_TD):
        chosen_TX, weights_TX = layers.best_experts(matmul(x_TD, router_ED), 4)
        out_TD = np.zeros_like(x_TD)
        for e in dict.fromkeys(chosen_TX.ravel().tolist()):
            t, place = np.nonzero(chosen_TX == e)
            expert = w.experts_gate_proj[e], w.experts_up_proj[e], w.experts_down_proj[e]
            out_TD[t] += layers.gated_mlp(x_TD[t], *expert, layers.silu) * weights_TX[t, place, None]
        return out_TD

    assert not independent_of_width(f, x_TD)


@every_dtype
def test_lengths_summed_over_rows_that_are_not_contiguous_are_caught(dtype):
    def f(x_TK):
        return np.ascontiguousarray(layers.l2_norm(np.asfortranarray(x_TK)))

    assert not all(independent_of_width(f, tokens(width, dtype)) for width in (31, 64, 128, 256))


@pytest.mark.parametrize("name", ["dense", "moe_int4"])
def test_a_layer_with_the_chunked_rule_is_caught(name, monkeypatch):
    target, i = qwen(name), 0
    x_TD = normal((3 * ROWS, target.config.hidden_size), "float32")
    monkeypatch.setattr(layers, "gated_delta", layers.gated_delta_chunk)
    assert target.config.layers[i].kind == "linear"
    assert not independent_of_passes(*mixer(target, i, "float32"), x_TD)


WRONG_PASSES = {
    "the chunked rule": lambda patch: patch.setattr(layers, "gated_delta", layers.gated_delta_chunk),
    "all of it as in wide passes": lambda patch: patch.setattr(layers, "ROWS", 0),
    "attention as in wide passes": lambda patch: patch.setattr(layers, "attend", attend_as_if_wide),
    "positions from nought in every pass": lambda patch: patch.setattr(qwen35, "rope_at", rope_from_nought),
    "a window of zeros": lambda patch: patch.setattr(DeltaState, "window", lambda self: 0 * WINDOW(self)),
}
WINDOW, ROPE_AT, ATTEND = DeltaState.window, qwen35.rope_at, layers.attend


def rope_from_nought(config, positions_T, dtype):
    return ROPE_AT(config, positions_T - positions_T[0], dtype)


def attend_as_if_wide(q_THK, k_GSK, v_GSK, low_T, high_T, scale=1.0):
    """With as many queries before these as make the pass wide."""
    more = [0] * (ROWS + 1)
    padded_THK = np.concatenate([np.repeat(q_THK[:1], ROWS + 1, axis=0), q_THK])
    return ATTEND(padded_THK, k_GSK, v_GSK, [*more, *low_T], [*(1 for _ in more), *high_T], scale)[ROWS + 1 :]


@pytest.mark.parametrize("wrong", WRONG_PASSES)
@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_model_whose_passes_differ_is_caught(name, wrong, monkeypatch):
    ids_T, logits_TV, _, _ = qwen_token_by_token(name, "float32")
    ids_T, widths = ids_T[:40], (9, 1, 16, 2, 5, 7)
    assert same_bits(qwen_in_passes(qwen(name), ids_T, widths)[0], logits_TV[:40])
    WRONG_PASSES[wrong](monkeypatch)
    assert not same_bits(qwen_in_passes(qwen(name), ids_T, widths)[0], logits_TV[:40])
