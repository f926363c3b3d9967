"""ggml's block types: unpacked and rounded bit for bit as the gguf library does it; exact in double; refused by name.

The library is one oracle; the other is a loop over single weights with exact fractions, written from ggml-quants.c.
"""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st

from minimtp import backend, ggml
from minimtp.backend import ROWS, arithmetic, gather, matmul, tiles
from minimtp.checkpoint import CheckpointError, float_to_bf16
from minimtp.ggml import TYPES, Blocks, encode_q4_0, quantize
from minimtp.quant import Plain, Quantized, pack, pack_codes

rng = np.random.default_rng(11)
every_type = pytest.mark.parametrize("type", TYPES)
every_dtype = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Where in a block its float16 scales are; MXFP4 has an exponent in byte 0
HALVES = {
    "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q2_K": [80, 82], "Q3_K": [108],
    "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_NL": [0], "IQ4_XS": [0], "MXFP4": [],
}  # fmt: skip
HALF_BITS = {
    "any": [bits for bits in range(1 << 16) if bits & 0x7C00 != 0x7C00],
    "ordinary": [0x2000, 0xA123, 0x2EDC],
    "extreme": [0x7BFF, 0xFBFF, 0x7BFE, 0x0400, 0x8400],
    "denormal": [0x0001, 0x8001, 0x03FF, 0x83FF, 0x0000, 0x8000],
}
EXPONENTS = {"any": range(253), "ordinary": [120, 125], "extreme": [250, 252, 3], "denormal": [0, 1, 2]}


def random_bytes(type, rows=3, blocks=2, scales="any", seed=0):
    """-> uint8 [rows, blocks · bytes]: random codes and packed scales, float16 scales of the kind asked for."""
    random = np.random.default_rng([seed, *type.encode()])
    data_NB = random.integers(0, 256, (rows * blocks, TYPES[type].bytes), dtype=np.uint8)
    for at in HALVES[type]:
        data_NB[:, at : at + 2] = random.choice(HALF_BITS[scales], (len(data_NB), 1)).astype("<u2").view(np.uint8)
    if type == "MXFP4":
        data_NB[:, 0] = random.choice(EXPONENTS[scales], len(data_NB))
    return data_NB.reshape(rows, -1)


def blocks_of(type, rows=3, blocks=2, scales="any", seed=0):
    return Blocks(random_bytes(type, rows, blocks, scales, seed), type, (rows, blocks * TYPES[type].block), "w.weight")


def oracle(w):
    return quants.dequantize(w.data, GGMLQuantizationType[w.type])


def same_bits(x, y):
    """Not even the sign of a zero differs."""
    bits = {4: np.uint32, 8: np.uint64}[x.itemsize]
    return x.shape == y.shape and x.dtype == y.dtype and np.array_equal(x.view(bits), y.view(bits))


def exact(type, b, i):
    """Weight i of the block b (bytes) as a Fraction, as the loops of ggml-quants.c find it."""

    def half(at):
        return Fraction(float(np.frombuffer(b[at : at + 2], "<f2")[0]))

    def signed(byte):
        return byte - 256 * (byte > 127)

    def low(at):  # a run of 16 bytes
        return b[at + i % 16] >> 4 * (i % 32 // 16) & 15

    def pair(at):  # two bits, in runs of 32 bytes
        return b[at + 32 * (i // 128) + i % 32] >> 2 * (i % 128 // 32) & 3

    def nibble(at):  # four bits, in runs of 32 bytes
        return b[at + 32 * (i // 64) + i % 32] >> 4 * (i % 64 // 32) & 15

    def bit(at):
        return b[at + i % 32] >> i // 32 & 1

    def scale_min(q, j):
        if j < 4:
            return q[j] & 63, q[j + 4] & 63
        return q[j + 4] & 15 | q[j - 4] >> 6 << 4, q[j + 4] >> 4 | q[j] >> 6 << 4

    iq4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    e2m1 = (0, Fraction(1, 2), 1, Fraction(3, 2), 2, 3, 4, 6)
    if type == "Q4_0":
        return half(0) * (low(2) - 8)
    if type == "Q4_1":
        return half(0) * low(4) + half(2)
    if type == "Q5_0":
        return half(0) * ((low(6) | (b[2 + i // 8] >> i % 8 & 1) << 4) - 16)
    if type == "Q5_1":
        return half(0) * (low(8) | (b[4 + i // 8] >> i % 8 & 1) << 4) + half(2)
    if type == "Q8_0":
        return half(0) * signed(b[2 + i])
    if type == "Q2_K":
        return half(80) * (b[i // 16] & 15) * pair(16) - half(82) * (b[i // 16] >> 4)
    if type == "Q3_K":
        j = i // 16
        scale = (b[96 + j % 8] >> 4 * (j // 8) & 15 | (b[104 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32
        return half(108) * scale * (pair(32) - (0 if bit(0) else 4))
    if type in ("Q4_K", "Q5_K"):
        scale, minimum = scale_min(b[4:16], i // 32)
        code = nibble(16) if type == "Q4_K" else nibble(48) | bit(16) << 4
        return half(0) * scale * code - half(2) * minimum
    if type == "Q6_K":
        code = b[64 * (i // 128) + i % 64] >> 4 * (i % 128 // 64) & 15
        return half(208) * signed(b[192 + i // 16]) * ((code | pair(128) << 4) - 32)
    if type == "IQ4_NL":
        return half(0) * iq4[low(2)]
    if type == "IQ4_XS":
        j, high = i // 32, b[2] | b[3] << 8
        scale = (b[4 + j // 2] >> 4 * (j % 2) & 15 | (high >> 2 * j & 3) << 4) - 32
        return half(0) * scale * iq4[low(8 + 16 * j)]
    assert type == "MXFP4"
    return Fraction(2) ** (b[0] - 127) * e2m1[low(1) & 7] * (-1) ** (low(1) >> 3)


# Unpacking


def test_the_table_has_the_sizes_of_the_library():
    sizes = {type: (entry.block, entry.bytes) for type, entry in TYPES.items()}
    assert sizes == {type: GGML_QUANT_SIZES[GGMLQuantizationType[type]] for type in TYPES} and len(TYPES) == 13


@every_type
@pytest.mark.parametrize("scales", HALF_BITS)
def test_floats_are_bit_for_bit_those_of_the_library(type, scales):
    w = blocks_of(type, 40, 5, scales)
    single = w.dequantize("float32")
    assert single.dtype == np.float32 and single.shape == w.shape == (40, 5 * TYPES[type].block)
    assert np.isfinite(single).all() and same_bits(single, oracle(w))
    assert same_bits(w.dequantize("float64").astype(np.float32), single)  # it is the nearest float to the exact value


@every_type
@pytest.mark.parametrize("scales", ["any", "extreme", "denormal"])
def test_doubles_are_the_exact_values(type, scales):
    w = blocks_of(type, 2, 2, scales, seed=1)
    double, block, size = w.dequantize("float64"), TYPES[type].block, TYPES[type].bytes
    for o, g in np.ndindex(2, 2):
        stored = w.data[o, g * size : (g + 1) * size].tobytes()
        expected = [exact(type, stored, i) for i in range(block)]
        assert [Fraction(x) for x in double[o, g * block : (g + 1) * block].tolist()] == expected


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(list(TYPES)), st.data())
def test_whatever_the_bytes_say_the_library_says_too(type, data):
    rows, count, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3)), TYPES[type].bytes
    stored = data.draw(st.binary(min_size=rows * count * size, max_size=rows * count * size))
    w = Blocks(np.frombuffer(stored, np.uint8).reshape(rows, -1), type, (rows, count * TYPES[type].block))
    with np.errstate(all="ignore"):
        single, expected = w.dequantize("float32"), oracle(w)
    halves = w.data.reshape(-1, size)[:, [at for first in HALVES[type] for at in (first, first + 1)]]
    finite = np.isfinite(np.ascontiguousarray(halves).view("<f2")).all() if HALVES[type] else None
    if type == "MXFP4":
        finite = w.data.reshape(-1, size)[:, 0].max() <= 252
    if finite:
        w.check_finite()
        assert np.isfinite(single).all() and same_bits(single, expected)
    else:
        with pytest.raises(CheckpointError):
            w.check_finite()
        assert np.array_equal(single, expected, equal_nan=True)


# Rows


@every_type
@every_dtype
def test_rows_take_and_dequantize_agree(monkeypatch, type, dtype):
    w = blocks_of(type, 70, 3)
    whole, columns, ids = w.dequantize(dtype), w.shape[1], [69, 0, 3, 3, 41]
    for block in (1, 1000, ggml.BLOCK):  # however the unpacking is cut
        monkeypatch.setattr(ggml, "BLOCK", block)
        for start, stop in ((0, 70), (0, 1), (69, 70), (13, 57), (20, 20)):
            rows = w.rows(start, stop, dtype)
            assert rows.shape == (stop - start, columns) and rows.dtype == dtype
            assert rows.flags.c_contiguous and rows.flags.writeable and not np.shares_memory(rows, w.data)
            assert same_bits(rows, whole[start:stop])
        taken = w.take(ids, np.dtype(dtype))
        assert taken.flags.c_contiguous and same_bits(taken, whole[ids])
        assert w.take([], dtype).shape == (0, columns) and same_bits(w.take(np.array(ids), dtype), taken)


def test_rows_outside_the_weight_are_refused():
    w = blocks_of("Q4_0", 70)
    for start, stop in ((0, 71), (-1, 3), (5, 4), (70, 71)):
        with pytest.raises(IndexError, match="'w.weight': rows"):
            w.rows(start, stop, "float32")
    for ids in ([70], [-1], [0, 10**9]):
        with pytest.raises(IndexError, match="'w.weight': row"):
            w.take(ids, "float32")


@every_type
def test_bytes_may_be_read_only_and_lie_anywhere(type):
    data = random_bytes(type, 6, 3)
    expected = oracle(Blocks(data, type, (6, 3 * TYPES[type].block)))
    for offset in range(4):
        file = np.frombuffer(bytes(offset) + data.tobytes(), np.uint8)
        w = Blocks(file[offset:].reshape(data.shape), type, (6, 3 * TYPES[type].block))
        assert np.shares_memory(w.data, file) and not w.data.flags.writeable  # as stored, nothing copied
        assert same_bits(w.dequantize("float32"), expected) and same_bits(w.take([5, 1], "float32"), expected[[5, 1]])
        w.check_finite()


def test_only_the_rows_asked_for_are_read(tmp_path):
    """The pages of a mapped file that are in memory, says the system, are those of the rows."""
    smaps = Path("/proc/self/smaps")
    if not smaps.exists():
        pytest.skip("this system does not tell which pages are in memory")
    path, (rows, columns) = tmp_path / "mapped-weight", (1 << 15, 4096 * 2)
    with open(path, "wb") as file:
        file.truncate(rows * columns // 32 * 18)  # 144 MiB of zeros that take no room

    def resident():
        entries = smaps.read_text().split("Rss:")
        return sum(int(after.split()[0]) for before, after in zip(entries, entries[1:]) if path.name in before)

    w = Blocks(np.memmap(path, np.uint8, "r").reshape(rows, -1), "Q4_0", (rows, columns))
    assert resident() == 0
    assert not w.rows(20_000, 20_064, "float32").any() and not w.take([7, 30_000], "float64").any()
    assert 64 * columns // 32 * 18 <= resident() * 1024 < 64 * columns // 32 * 18 + (16 << 20)
    w.check_finite()
    assert resident() * 1024 >= rows * columns // 32 * 18


# The product


@every_dtype
@every_type
def test_a_product_with_blocks_has_the_bits_of_a_dense_one(monkeypatch, type, dtype):
    for rows, small in ((130, False), (65, True), (1, False)):
        monkeypatch.setattr(backend, "POOL_BYTES", 0 if small else 4 << 20)
        w = blocks_of(type, rows, 8 if TYPES[type].block == 32 else 2, "ordinary")
        x_TI = rng.standard_normal((ROWS + 3, w.shape[1])).astype(dtype)
        dense_OI = w.dequantize(dtype)
        with arithmetic():
            alone = np.concatenate([matmul(x_TI[t : t + 1], w) for t in range(ROWS)])
            for width in (1, 2, 5, ROWS):
                assert same_bits(matmul(x_TI[:width], w), alone[:width])
                assert same_bits(matmul(x_TI[ROWS - width : ROWS], w), alone[ROWS - width :])
            assert same_bits(alone, matmul(x_TI[:ROWS], dense_OI))
            assert same_bits(matmul(x_TI, w), matmul(x_TI, dense_OI))
        assert same_bits(gather(w, [0, rows - 1], dtype), gather(dense_OI, [0, rows - 1], dtype))


@every_dtype
def test_the_pool_unpacks_the_same_tiles(monkeypatch, dtype):
    w = blocks_of("Q6_K", 700, 8, "ordinary")
    x_TI = rng.standard_normal((5, w.shape[1])).astype(dtype)
    results = []
    monkeypatch.setattr(backend, "TILE_BYTES", 1 << 20)
    tiles.cache_clear()
    for size in (0, 1 << 60):
        monkeypatch.setattr(backend, "POOL_BYTES", size)
        with arithmetic():
            results += [matmul(x_TI, w), matmul(x_TI, w.dequantize(dtype))]
            results.append(np.concatenate([matmul(x_TI[t : t + 1], w) for t in range(5)]))
    assert len(tiles(*w.shape)) > 2 and all(same_bits(result, results[0]) for result in results)
    tiles.cache_clear()


# Q4_0 and Quantized


def test_q4_0_is_the_object_of_every_other_int4_storage():
    w = blocks_of("Q4_0", 9, 5)
    int4 = w.as_quantized()
    assert isinstance(int4, Quantized) and (int4.shape, int4.group, int4.bits) == (w.shape, 32, 4)
    assert int4.scales.dtype == "F16" and int4.name == int4.scales.name == "w.weight"
    data_NB = w.data.reshape(-1, 18)
    assert np.array_equal(int4.scales.stored.reshape(-1), data_NB[:, :2].copy().view("<f2")[:, 0])
    assert np.array_equal(int4.codes().reshape(-1, 32), np.hstack([data_NB[:, 2:] & 15, data_NB[:, 2:] >> 4]) - 8.0)
    for dtype in ("float32", "float64"):
        assert same_bits(int4.dequantize(dtype), w.dequantize(dtype))
    data, rounded = encode_q4_0(int4)
    assert np.array_equal(data, w.data) and data.dtype == np.uint8 and not rounded.any()
    assert (int4.scales.stored < 0).any()
    for type in TYPES.keys() - {"Q4_0"}:
        with pytest.raises(CheckpointError, match=f"'w.weight': {type} is not int4"):
            blocks_of(type).as_quantized()


def quantized(scales_OG, dtype, group=32):
    scales_OG = np.asarray(scales_OG)
    codes = rng.integers(-8, 8, (scales_OG.shape[0], scales_OG.shape[1] * group))
    return Quantized(pack_codes(codes), Plain(scales_OG, dtype, "w.weight_scale"), group, name="w")


@pytest.mark.parametrize("group", [32, 64, 160])
def test_int4_is_encoded_with_its_codes_and_steps(group):
    steps = float_to_bf16(rng.standard_normal((7, 3)) * np.exp2(rng.integers(-16, 15, (7, 3))))
    w = quantized(steps, "BF16", group)
    data, rounded = encode_q4_0(w)
    assert data.shape == (7, 3 * group // 32 * 18) and rounded.shape == (7, 3 * group // 32) and not rounded.any()
    again = Blocks(data, "Q4_0", w.shape)
    assert np.array_equal(again.as_quantized().codes(), w.codes())
    assert same_bits(again.dequantize("float32"), w.dequantize("float32"))


def test_steps_that_are_not_in_float16_are_reported_and_rounded_to_the_nearest():
    steps = {
        1.0: 1.0, -3.0: -3.0, 2.0**-24: 2.0**-24, 65504.0: 65504.0, 255 * 2.0**-24: 255 * 2.0**-24, 0.0: 0.0,
        1 + 2.0**-11: 1.0, 1 + 3 * 2.0**-11: 1 + 2.0**-9, 1 + 2.0**-11 + 2.0**-30: 1 + 2.0**-10, 65519.0: 65504.0,
        -255 * 2.0**-25: -128 * 2.0**-24, 2.0**-25: 0.0, -(2.0**-40): 0.0, 1.5 * 2.0**-25: 2.0**-24,
        0.1: 0.0999755859375,
    }  # fmt: skip
    data, rounded = encode_q4_0(quantized([list(steps)], "F64"))
    stored = Blocks(data, "Q4_0", (1, 32 * len(steps))).as_quantized().scales.stored[0]
    assert stored.tolist() == list(steps.values())
    assert rounded[0].tolist() == [step != kept for step, kept in steps.items()]
    bf16 = quantized(float_to_bf16(np.array([[2.0**-17 * 1.9921875, 2.0**-18 * 1.9921875, 2.0**-18 * 1.5]])), "BF16")
    assert encode_q4_0(bf16)[1].tolist() == [[False, True, False]]


def test_int4_that_q4_0_cannot_hold_is_refused():
    for step in (65520.0, -1e30, np.inf, np.nan):
        with pytest.raises(CheckpointError, match="'w': scales that are not finite, or beyond float16"):
            encode_q4_0(quantized([[1.0, step]], "F64"))
    scales = Plain(np.ones((2, 4), np.float32), "F32")
    for codes, bits in ((np.zeros((2, 64), np.uint8), 8), (np.zeros((2, 32), np.uint8), 4)):
        with pytest.raises(CheckpointError, match=f"'w': {bits} bits in groups of 16 are not Q4_0"):
            encode_q4_0(Quantized(codes, scales, 16, bits, "w"))
    with pytest.raises(CheckpointError, match="'w': 8 bits in groups of 32 are not Q4_0"):
        encode_q4_0(Quantized(np.zeros((2, 128), np.uint8), scales, 32, 8, "w"))


# Rounding


def some_weights(seed, rows=6, blocks=4):
    """Of every size, with ties, blocks of zeros, of equal weights, on a lattice, and just beside where it is cut."""
    random = np.random.default_rng(seed)
    w_OGK = random.standard_normal((rows, blocks, 32)) * np.exp2(random.integers(-20, 12, (rows, blocks, 1)))
    kind = random.integers(0, 8, (rows, blocks))
    w_OGK[kind == 0] = 0
    w_OGK[kind == 1] = random.integers(-16, 17, ((kind == 1).sum(), 32)) / 2
    w_OGK[kind == 2] = random.choice([-1.0, 1.0], ((kind == 2).sum(), 32))
    w_OGK[kind == 3] = random.integers(-254, 255, ((kind == 3).sum(), 32)) / 2
    w_OGK[kind == 4] *= random.random((32,)) < 0.1
    step_N1 = random.standard_normal(((kind == 5).sum(), 1)).astype(np.float32)
    w_OGK[kind == 5] = step_N1 * (random.integers(-127, 127, (len(step_N1), 32)) + 0.5)
    w_OGK[kind == 5, 0] = step_N1[:, 0] * 127
    return w_OGK.reshape(rows, -1)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(["Q4_0", "Q8_0"]), st.integers(0, 2**32 - 1), st.sampled_from([np.float32, np.float64]))
def test_weights_are_rounded_bit_for_bit_as_the_library_does(type, seed, dtype):
    w_OI = some_weights(seed).astype(dtype)
    with np.errstate(all="ignore"):
        expected = quants.quantize(w_OI.astype(np.float32), GGMLQuantizationType[type])
    data = quantize(w_OI, type)
    assert data.dtype == np.uint8 and np.array_equal(data, expected)
    Blocks(data, type, w_OI.shape).check_finite()


@pytest.mark.parametrize("type", ["Q4_0", "Q8_0"])
def test_rounding_does_not_depend_on_how_it_is_cut(monkeypatch, type):
    w_OI = some_weights(5, 30, 3)
    w_OI[3] = 0
    w_OI[4, :64] *= 1e-30  # steps that vanish in float16
    w_OI[5, :64] *= 1e-42  # steps without an inverse in float32: what their codes are, the processor says
    whole = quantize(w_OI, type)
    again = Blocks(whole, type, w_OI.shape).dequantize("float64")
    assert not again[3].any() and not again[4, :64].any() and not again[5, :64].any()
    others = [o for o in range(30) if o != 5]
    assert np.array_equal(whole[others], quants.quantize(w_OI[others].astype(np.float32), GGMLQuantizationType[type]))
    for block in (1, 200, 1000):
        monkeypatch.setattr(ggml, "BLOCK", block)
        assert np.array_equal(quantize(w_OI, type), whole)


def test_rounding_knows_its_ties_and_signs():
    group = np.array([8, -7.5, -8, 7.49, 0.5, -0.5] + [0] * 26, np.float32)[None]
    int4 = Blocks(quantize(group, "Q4_0"), "Q4_0", (1, 32)).as_quantized()
    assert int4.scales.stored.tolist() == [[-1.0]]  # of two largest the first; what lies half-way goes up in x / d
    assert int4.codes()[0, :6].tolist() == [-8, 7, 7, -7, 0, 1]
    group = np.array([127, -126.5, 0.5, -0.5, 1.5, 2.49] + [0] * 26, np.float32)[None]
    int8 = Blocks(quantize(group, "Q8_0"), "Q8_0", (1, 32))
    assert int8.dequantize("float32")[0, :6].tolist() == [127, -127, 1, -1, 2, 2]  # away from zero


def test_ggmls_rounding_moves_a_lattice_without_minus_eight_and_encoding_does_not():
    codes = rng.integers(-7, 8, (4, 64))
    codes[:, ::32] = 7
    w = Quantized(pack_codes(codes), Plain(np.full((4, 2), 0.25, np.float32), "F32"))
    dense = w.dequantize("float32")
    rounded = Blocks(quantize(dense, "Q4_0"), "Q4_0", w.shape).dequantize("float32")
    data, _ = encode_q4_0(w)
    assert np.linalg.norm(rounded - dense) / np.linalg.norm(dense) > 0.03
    assert np.array_equal(Blocks(data, "Q4_0", w.shape).dequantize("float32"), dense)


def test_what_cannot_be_rounded_is_refused():
    for value in (np.nan, np.inf, -np.inf, 1e300, 65520 * 127.0):
        for type in ("Q4_0", "Q8_0"):
            w_OI = np.ones((3, 64))
            w_OI[2, 40] = value
            with pytest.raises(
                CheckpointError, match="'w': weights that are not finite, or whose step is beyond float16"
            ):
                quantize(w_OI, type, "w")
    for type in ("Q4_0", "Q8_0"):
        quantize(np.full((1, 32), 65500 * 8.0), type)
        with pytest.raises(CheckpointError, match="'w': rows of 33 weights are not whole blocks of 32"):
            quantize(np.ones((2, 33)), type, "w")
        for shape in ((32,), (2, 2, 32), (0, 32), (2, 0)):
            with pytest.raises(CheckpointError, match="'w': cannot round"):
                quantize(np.ones(shape), type, "w")
    with pytest.raises(CheckpointError, match="'w': cannot round .* to Q6_K"):
        quantize(np.ones((2, 256)), "Q6_K", "w")


# Wrong tensors


@every_type
def test_rows_that_are_not_whole_blocks_are_refused(type):
    block, size = TYPES[type].block, TYPES[type].bytes
    for columns in (block - 1, block + 1, 3 * block // 2):
        with pytest.raises(CheckpointError, match=f"'w': rows of {columns} weights are not whole blocks of {block}"):
            Blocks(np.zeros((2, columns * size // block), np.uint8), type, (2, columns), "w")
    for stored in ((2, size), (2, 2 * size - 1), (2, 2 * size + 1), (3, 2 * size), (4 * size,), (1, 2, 2 * size)):
        with pytest.raises(CheckpointError, match=r"'w': uint8 \[.*\] for .* expected contiguous uint8 \[2, "):
            Blocks(np.zeros(stored, np.uint8), type, (2, 2 * block), "w")


def test_objects_that_contradict_themselves_are_refused():
    data = np.zeros((2, 36), np.uint8)
    Blocks(data, "Q4_0", (2, 64), "w")
    for stored in (data.view(np.int8), data.view("<f2"), np.zeros((2, 72), np.uint8)[:, ::2], np.asfortranarray(data)):
        with pytest.raises(CheckpointError, match="^'w': .* expected contiguous uint8"):
            Blocks(stored, "Q4_0", (2, 64), "w")
    for shape in ((64,), (1, 2, 64), (0, 64), (2, 0), (-2, -64), [2, 64], ()):
        with pytest.raises(CheckpointError, match="^'w': .* is no shape of Q4_0 rows"):
            Blocks(data, "Q4_0", shape, "w")
    for type in ("Q4_2", "q4_0", "F32", "", None, "x\n" * 1000):
        with pytest.raises(CheckpointError, match="^'w': ggml type .* is not supported; these are: Q4_0, ") as caught:
            Blocks(data, type, (2, 64), "w")
        assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 400


@every_type
def test_not_finite_scales_are_found_wherever_they_are(monkeypatch, type):
    for block in (1, 3, ggml.BLOCK):
        monkeypatch.setattr(ggml, "BLOCK", block)
        for at in [(0, 0), (1, 2), (2, 1), (3, 3)]:
            places = [(half, bits) for half in HALVES[type] for bits in (0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7C01)]
            for where, bits in places or [(0, bits) for bits in (253, 254, 255)]:
                data = random_bytes(type, 4, 4, "extreme")
                w = Blocks(data, type, (4, 4 * TYPES[type].block), "w.weight")
                w.check_finite()
                cell = data.reshape(4, 4, -1)[at]
                cell[where : where + 2] = [bits & 255, bits >> 8] if HALVES[type] else [bits, cell[1]]
                with pytest.raises(CheckpointError, match="^'w.weight': NaN or infinite scales$"):
                    w.check_finite()


def test_packed_int4_survives_the_way_through_q4_0():
    w = pack(rng.standard_normal((33, 64)), name="w")
    data, rounded = encode_q4_0(w)
    again = Blocks(data, "Q4_0", w.shape).as_quantized()
    assert not rounded.any() and np.array_equal(again.packed, w.packed)
    assert same_bits(again.dequantize("float32"), w.dequantize("float32"))
