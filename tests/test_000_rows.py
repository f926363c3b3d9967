"""What bit-exactness rests on, tested first: a token's numbers do not depend on who shares the pass, on how a weight
is stored, or on where in a buffer its keys lie.

Every property is one call of `independent_of_width` or `same_bits`; arithmetic that does depend on the width goes
through the same calls and must be caught.
"""

import numpy as np
import pytest
from threadpoolctl import threadpool_info
from tiny import MODELS, pair, random_ids, random_prompt, same_bits

from minimtp import Sampling, backend, gemma4, layers
from minimtp.backend import ROWS, arithmetic, matmul, tiles
from minimtp.cache import FullKV, SlidingKV
from minimtp.checkpoint import float_to_bf16
from minimtp.quant import Plain, pack

DTYPES = ("float32", "float64")
SHAPES = [(1, 1), (1, 5), (1, 300), (2, 64), (3, 7), (5, 1), (17, 33), (63, 65), (64, 64), (65, 1), (65, 40), (65, 130),
          (127, 96), (128, 31), (129, 257), (193, 1000), (320, 256), (1216, 65)]  # fmt: skip
TALL = [(65, 4096), (129, 4096), (130, 4096), (257, 1025), (193, 1500)]  # more than one tile; the last of 1 or 2 rows

every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True)
def single_blas_thread():
    with arithmetic():
        yield


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 64 rows, and the thread pool for every weight of more than one."""
    monkeypatch.setattr(backend, "TILE_BYTES", 1)
    monkeypatch.setattr(backend, "POOL_BYTES", 0)
    tiles.cache_clear()
    yield
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
        return layers.rotate(layers.rms_norm(x_THK), layers.rope_table(frequencies_C, positions_T, np.dtype(dtype)))

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
