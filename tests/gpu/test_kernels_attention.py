"""Attention's kernels, run on the CPU: rope_write against norms, rotation and storages; attention against attend."""

import shutil
from functools import partial

import numpy as np
import pytest

from minimtp import gemma4, kv_storage, shim
from minimtp.kernel_source import source
from minimtp.kv import FullKV
from minimtp.layers import Rope, attend, rms_norm, rope_frequencies, rope_table, rotate

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

STORAGES = {"F32": "float32", "F16": "float16", "BF16": "bf16", "INT8": "int8"}
EVERYTHING = 2**31 - 1  # the window of a full layer
EPS = 1e-6
GEMMA_FULL = Rope("proportional", 1e6, 0.25)
GEMMA_SLIDING = Rope("default", 1e4)


def close(got, expected, tolerance=1e-5):
    """Whether the largest error is that small beside the largest number."""
    return np.abs(got - expected).max() <= tolerance * np.abs(expected).max()


def normal(seed, *shape):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


def planted(name, constants, defect):
    """The source with one text in it replaced; None without a defect."""
    if defect is None:
        return None
    text, (before, after) = source(name, tuple(constants.items())), defect
    assert text.count(before) == 1, before
    return text.replace(before, after)


# rope_write


def storage_buffers(storage, kv_heads, slots, head_dim):
    """(rows [G, S, K], scales [G, S] or None) that nothing was written to."""
    dtype = kv_storage.STORAGES[STORAGES[storage]].parts[""][0]
    rows = np.full((kv_heads, slots, head_dim), 77, dtype)
    return rows, np.full((kv_heads, slots), 77, np.float16) if storage == "INT8" else None


def rope_write(
    q, k, v, start, slots, storage="F32", q_norm=None, k_norm=None, frequencies=None, half=None, v_norm=False, **options
):
    """Launch it -> (q [T, H, K], keys, key scales, values, value scales)."""
    kv_heads = next((x.shape[1] for x in (k, v) if x is not None), 0)
    tokens, heads, head_dim = q.shape
    kept = [storage_buffers(storage, max(kv_heads, 1), slots, head_dim) for _ in range(2)]
    out = np.full((tokens, heads, head_dim), np.nan, np.float32)
    turning = int(np.count_nonzero(frequencies))
    constants = {"HEAD_DIM": head_dim, "STORAGE": storage}
    (k_rows, k_scales), (v_rows, v_scales) = kept
    scales = [None if x is None else x.view(np.uint16) for x in (k_scales, v_scales)]
    rows = [x.view(np.uint16) if storage == "F16" else x for x in (k_rows, v_rows)]
    arrays = [out, *rows, *scales, q, k, v, q_norm, k_norm, frequencies, np.array([start], np.int32)]
    sizes = [heads, kv_heads, slots, turning, half or head_dim // 2, int(v_norm), EPS]
    shim.launch(
        "rope_write",
        "rope_write",
        (heads + 2 * kv_heads, tokens),
        32,
        [*arrays, *sizes],
        constants=tuple(constants.items()),
        order=options.get("order", "forward"),
        text=planted("rope_write", constants, options.get("defect")),
    )
    return out, k_rows, k_scales, v_rows, v_scales


def gemma_pass(tokens=5, start=3, slots=16, **options):
    """A pass of a Gemma layer, 6 heads of width 48 over 2 kv heads -> (what went in, what came out)."""
    q, k, v = normal(1, tokens, 6, 48), normal(2, tokens, 2, 48) * 3, normal(3, tokens, 2, 48)
    weights = {"q_norm": normal(4, 48), "k_norm": normal(5, 48)}
    frequencies = rope_frequencies(options.pop("rope", GEMMA_FULL), 48)
    return (q, k, v, weights), rope_write(
        q, k, v, start, slots, frequencies=frequencies, v_norm=True, **weights, **options
    )


def gemma_twin(q, k, v, weights, start, rope=GEMMA_FULL):
    table = rope_table(np.arange(start, start + len(q)), rope_frequencies(rope, q.shape[2]), np.float32)
    turned = [rotate(rms_norm(x, weights[name], EPS), table) for x, name in ((q, "q_norm"), (k, "k_norm"))]
    return *turned, rms_norm(v, eps=EPS)


@pytest.mark.parametrize("start, rope", [(0, GEMMA_FULL), (262_000, GEMMA_FULL), (131_072, GEMMA_SLIDING)])
def test_queries_keys_and_values_are_normed_and_turned_as_gemma_does(start, rope):
    slots = 9  # a ring, in which the pass wraps
    given, (q, keys, _, values, _) = gemma_pass(start=start, slots=slots, rope=rope)
    at = np.arange(start, start + 5) % slots
    for got, expected in zip(
        (q, keys[:, at].swapaxes(0, 1), values[:, at].swapaxes(0, 1)), gemma_twin(*given, start, rope)
    ):
        assert close(got, expected, 1e-6)
    others = np.setdiff1d(np.arange(slots), at)
    assert (keys[:, others] == 77).all() and (values[:, others] == 77).all()


def test_queries_and_keys_are_turned_in_part_as_qwen_does():
    q, k, v, norm = normal(1, 3, 6, 48), normal(2, 3, 2, 48), normal(3, 3, 2, 48), normal(4, 48)
    frequencies = rope_frequencies(Rope("default", 1e7), 12)
    options = {"q_norm": norm, "k_norm": norm, "frequencies": frequencies, "half": 6}
    out, keys, _, values, _ = rope_write(q, k, v, 61, 64, **options)
    table = rope_table(np.arange(61, 64), frequencies, np.float32)
    assert close(out, rotate(rms_norm(q, norm, EPS), table), 1e-6)
    assert close(keys[:, 61:].swapaxes(0, 1), rotate(rms_norm(k, norm, EPS), table), 1e-6)
    assert np.array_equal(values[:, 61:].swapaxes(0, 1), v) and (values[:, :61] == 77).all()


def test_a_layer_that_borrows_keys_and_values_has_queries_only():
    q, frequencies = normal(1, 1, 6, 48), rope_frequencies(GEMMA_SLIDING, 48)
    out, keys, _, values, _ = rope_write(q, None, None, 40, 8, frequencies=frequencies, v_norm=True)
    assert close(out, rotate(q, rope_table(np.array([40]), frequencies, np.float32)), 1e-6)
    assert (keys == 77).all() and (values == 77).all()


def test_where_only_values_are_kept_no_key_is_written():
    q, v, frequencies = normal(1, 2, 6, 48), normal(3, 2, 2, 48), rope_frequencies(GEMMA_FULL, 48)
    _, keys, _, values, _ = rope_write(q, None, v, 0, 8, frequencies=frequencies, v_norm=True)
    assert (keys == 77).all() and close(values[:, :2].swapaxes(0, 1), rms_norm(v, eps=EPS), 1e-6)


def awkward_rows():
    """Zeros, ties between two codes, numbers that overflow float16, rows too small for a float16 scale."""
    v = normal(3, 6, 2, 48)
    v[0, 0], v[1, 1] = 0, np.arange(48) * 0.5
    v[1, 1, 0] = 127
    v[2] *= 3e4
    v[3] *= 1e-6
    v[4] *= 1e-9
    return v


@pytest.mark.parametrize("storage", ["F16", "BF16", "INT8"])
def test_what_is_kept_has_the_bits_of_the_storage(storage):
    q, k, frequencies = normal(1, 6, 6, 48), normal(2, 6, 2, 48), rope_frequencies(GEMMA_FULL, 48)
    arguments = q, k, awkward_rows(), 5, 11
    _, keys, _, values, _ = rope_write(*arguments, k_norm=normal(4, 48), frequencies=frequencies)
    kept = rope_write(*arguments, storage, k_norm=normal(4, 48), frequencies=frequencies)[1:]
    for floats, rows, scales in ((keys, *kept[:2]), (values, *kept[2:])):
        with np.errstate(over="ignore"):
            expected = kv_storage.STORAGES[STORAGES[storage]].encode(floats[:, 5:])
        assert rows[:, 5:].tobytes() == expected[""].tobytes()
        assert scales is None or scales[:, 5:, None].tobytes() == expected["_scale"].tobytes()


def test_a_token_is_written_the_same_alone_in_any_company_and_order():
    together = gemma_pass(tokens=5, storage="INT8")
    for order in ("backward", "shuffled"):
        again = gemma_pass(tokens=5, storage="INT8", order=order)
        assert all(a.tobytes() == b.tobytes() for a, b in zip(together[1], again[1]))
    (q, k, v, weights), (out, keys, *_) = together
    frequencies = rope_frequencies(GEMMA_FULL, 48)
    last = slice(4, 5)
    alone = rope_write(q[last], k[last], v[last], 7, 16, "INT8", frequencies=frequencies, v_norm=True, **weights)
    assert alone[0].tobytes() == out[last].tobytes() and alone[1][:, 7].tobytes() == keys[:, 7].tobytes()


@pytest.mark.parametrize(
    "defect",
    [
        ("b * by.x + a * by.y", "b * by.x - a * by.y"),
        ("__syncwarp();\n    if (!is_v) rotate", "if (!is_v) rotate"),
        ("fmaf(quarters, 4.37113883e-8f, rest)", "0"),
    ],
)
def test_a_defect_of_rope_write_is_found(defect):
    start, slots = 131_072, 9
    order = "backward" if "sync" in defect[0] else "forward"
    try:
        given, (q, keys, *_) = gemma_pass(start=start, slots=slots, defect=defect, rope=GEMMA_SLIDING, order=order)
    except shim.KernelError:
        return
    expected = gemma_twin(*given, start, GEMMA_SLIDING)
    at = np.arange(start, start + 5) % slots
    assert not (close(q, expected[0]) and close(keys[:, at].swapaxes(0, 1), expected[1]))


# attention


def memory(length, kv_heads, head_dim, storage="F32", keys_of=None, seed=0):
    """A FullKV with `length` random entries, the values normed as Gemma's are."""
    kept = kv_storage.STORAGES[STORAGES[storage]]
    kv = FullKV(kv_heads, head_dim, slots=length, storage=kept, keys_of=keys_of)
    kv.append(normal(seed, length, kv_heads, head_dim), rms_norm(normal(seed + 1, length, kv_heads, head_dim)))
    return kv


def buffers(kv, slots):
    """(keys, values, key scales, value scales) of a memory as `slots` slots hold it: the last positions, p mod slots.

    Slots never written hold what is no number.
    """
    out, at = [], np.arange(max(0, kv.length - slots), kv.length)
    for name in ("k", "v", "k_scale", "v_scale"):
        if name not in kv.buffers:
            out.append(None)
            continue
        bits = kv.buffers[name].view(np.uint16) if kv.buffers[name].dtype == np.float16 else kv.buffers[name]
        ring = np.full((bits.shape[0], slots, bits.shape[2]), -1 if bits.dtype.kind in "iu" else np.nan).astype(
            bits.dtype
        )
        ring[:, at % slots] = bits[:, at]
        out.append(ring)
    return out


def attention(q, kv, start, slots, window=EVERYTHING, appended=1, split=64, held=None, **options):
    """Launch both kernels over a memory -> [T, H, K]."""
    tokens, heads, head_dim = q.shape
    kv_heads, storage = kv.shape[0], options.get("storage", "F32")
    shared = options.get("shared_heads") or heads // kv_heads
    constants = {"TOKENS": tokens, "HEADS": shared, "HEAD_DIM": head_dim, "STORAGE": storage, "SPLIT": split}
    constants["VALUES_ONLY"] = int("k" not in kv.buffers)
    frequencies = options.get("frequencies")
    splits = -(-slots // split) if window == EVERYTHING else -(-(window + tokens - 1) // split) + 1
    sums = np.full((splits, tokens, heads, head_dim), np.nan, np.float32)
    weights = np.full((splits, tokens, heads, 2), np.nan, np.float32)
    out, started = np.full(q.shape, np.nan, np.float32), np.array([start], np.int32)
    arrays = [sums, weights, q, *(held or buffers(kv, slots)), options.get("k_norm"), frequencies, started]
    turning = 0 if frequencies is None else int(np.count_nonzero(frequencies))
    launch = partial(
        shim.launch,
        "attention",
        constants=tuple(constants.items()),
        order=options.get("order", "forward"),
        text=planted("attention", constants, options.get("defect")),
    )
    sizes = [heads, kv_heads, slots, window, appended, turning]
    launch("attention_split", (heads // shared, splits), 256, [*arrays, *sizes])
    launch("attention_merge", (heads, tokens), head_dim // 4, [out, sums, weights, started, window, appended])
    return out


def attention_twin(q, kv, start, window=EVERYTHING, appended=1):
    high_T = start + appended * (np.arange(len(q)) + 1)
    return attend(q, *kv.read(), np.maximum(high_T - window, 0), high_T)


@pytest.mark.parametrize("tokens, start", [(1, 0), (1, 199), (5, 61), (8, 120)])
def test_queries_attend_to_everything_up_to_themselves(tokens, start):
    """One position; the last slot; splits that begin in mid-pass; a split that is only partly filled."""
    q, kv = normal(7, tokens, 4, 32), memory(start + tokens, 2, 32)
    assert close(attention(q, kv, start, 200), attention_twin(q, kv, start))


@pytest.mark.parametrize("start", [0, 5, 60, 127, 300])
def test_a_sliding_layer_reads_its_window_from_the_ring(start):
    """The window not yet full, just full, wrapped once and more often; 70 + 5 slots are the fewest that do."""
    q, kv = normal(7, 5, 4, 32), memory(start + 5, 2, 32)
    assert close(attention(q, kv, start, 75, window=70), attention_twin(q, kv, start, 70))


@pytest.mark.parametrize("length", [1, 64, 150])
def test_a_drafter_sees_what_there_is_and_one_position_more(length):
    q, kv = normal(7, 1, 4, 32), memory(length, 2, 32)
    assert close(attention(q, kv, length, 75, 71, appended=0), attention_twin(q, kv, length, 71, appended=0))
    assert close(attention(q, kv, length, 200, appended=0), attention_twin(q, kv, length, appended=0))


def test_a_query_that_sees_nothing_gets_zeros():
    q, kv = normal(7, 1, 4, 32), memory(1, 2, 32)
    assert not attention(q, kv, 0, 200, appended=0).any()


@pytest.mark.parametrize("storage", ["F16", "INT8"])
def test_keys_and_values_are_decoded_as_their_storage_is(storage):
    q, kv = normal(7, 5, 4, 32), memory(133, 2, 32, storage)
    assert close(attention(q, kv, 128, 140, storage=storage), attention_twin(q, kv, 128))


def test_keys_are_made_of_their_values_where_only_those_are_kept():
    storage, head_dim = "INT8", 256
    frequencies, weight = rope_frequencies(GEMMA_FULL, head_dim), normal(9, head_dim)

    def table(block):
        turning = frequencies[frequencies > 0]
        return [part[:, 0] for part in rope_table(np.arange(block * 256, block * 256 + 256), turning, np.float32)]

    kv = memory(133, 2, head_dim, storage, keys_of=partial(gemma4.keys_of_values, weight, table))
    q = normal(7, 5, 4, head_dim) * np.float32(32 / head_dim)
    got = attention(q, kv, 128, 140, storage=storage, frequencies=frequencies, k_norm=weight)
    assert close(got, attention_twin(q, kv, 128))


def test_wide_heads_of_which_a_block_takes_a_part():
    q, kv = normal(7, 2, 8, 512) / 4, memory(90, 1, 512, "BF16")
    got = attention(q, kv, 88, 96, storage="BF16", shared_heads=4)
    assert close(got, attention_twin(q, kv, 88))


def test_a_token_attends_the_same_in_any_company_order_and_capacity():
    """The bits of the last of 8 tokens: in other orders of threads, alone, with fewer heads a block, in other rings."""
    q, kv = normal(7, 8, 4, 32), memory(258, 2, 32)
    whole, ring = attention(q, kv, 250, 258), attention(q, kv, 250, 100, window=92)
    for order in ("backward", "shuffled"):
        assert attention(q, kv, 250, 258, order=order).tobytes() == whole.tobytes()
    for tokens, shared in ((1, 2), (1, 1), (5, 2)):
        options = {"start": 258 - tokens, "shared_heads": shared}
        assert attention(q[-tokens:], kv, slots=999, **options).tobytes() == whole[-tokens:].tobytes()
        assert attention(q[-tokens:], kv, slots=131, window=92, **options).tobytes() == ring[-tokens:].tobytes()


def test_what_a_later_token_keeps_does_not_reach_an_earlier_one():
    q, kv = normal(7, 5, 4, 32), memory(69, 2, 32)
    clean, spoiled = attention(q, kv, 64, 80), buffers(kv, 80)
    for rows in spoiled[:2]:
        rows[:, 67:] = np.inf
    got = attention(q, kv, 64, 80, held=spoiled)
    assert got[:3].tobytes() == clean[:3].tobytes() and not np.isfinite(got[3:]).any()


def test_the_kernels_of_a_pass_give_what_the_reference_keeps_and_attends_to():
    """rope_write's queries and cache go straight into attention: two passes, the second over the first."""
    kv, slots = FullKV(2, 32, slots=20), 20
    frequencies, norm = rope_frequencies(GEMMA_FULL, 32), normal(9, 32)
    held = [np.full((2, slots, 32), np.nan, np.float32) for _ in range(2)]
    for start, tokens in ((0, 5), (5, 8)):
        q, k, v = (normal(seed, tokens, heads, 32) for seed, heads in ((start, 4), (start + 1, 2), (start + 2, 2)))
        options = {"q_norm": norm, "k_norm": norm, "frequencies": frequencies, "v_norm": True}
        out, keys, _, values, _ = rope_write(q, k, v, start, slots, **options)
        for all_GSK, new_GSK in zip(held, (keys, values)):
            all_GSK[:, start : start + tokens] = new_GSK[:, start : start + tokens]
        q, k, v = gemma_twin(q, k, v, {"q_norm": norm, "k_norm": norm}, start)
        kv.append(k, v)
        assert close(attention(out, kv, start, slots, held=[*held, None, None]), attention_twin(q, kv, start))


@pytest.mark.parametrize(
    "defect",
    [
        ("high > window ? high - window : 0", "high > window ? high - window + 1 : 0"),
        ("slot < slots ? slot : slot - slots", "slot"),
        (
            "        __syncthreads();\n\n        for (int r = 0; r < ROWS; r++)\n",
            "        for (int r = 0; r < ROWS; r++)\n",
        ),
    ],
)
def test_a_defect_of_attention_is_found(defect):
    q, kv = normal(7, 5, 4, 32), memory(132, 2, 32)
    try:
        got = attention(q, kv, 127, 75, window=70, split=128, defect=defect, order="backward")
    except shim.KernelError:
        return
    assert not close(got, attention_twin(q, kv, 127, 70))
