"""kernels/matvec_*.cu and gather.cu on the CPU, against the weights' own matmul and take, and their layouts."""

import re
import shutil
from functools import cache

import numpy as np
import pytest

from minimtp import device_layout, layers, shim
from minimtp.backend import gather, matmul
from minimtp.checkpoint import CheckpointError, float_to_bf16
from minimtp.ggml import TYPES, Blocks
from minimtp.kernel_source import source
from minimtp.quant import Plain, Quantized

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

WARPS = 2
ORDERS = ("backward", "shuffled")
FLOAT = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
KERNEL = re.compile(r'(extern "C" __global__ void (?:__launch_bounds__\([^()]*\) )?(\w+))\(')
CONSTANTS = ("TOKENS", "SCALE", "SPAN", "ACTIVATION", "WEIGHT", "STORAGE")


# Weights of every storage, and what the kernels are given for them


def plain(rows, columns, dtype, seed=0):
    w_OI = (np.random.RandomState(seed).randn(rows, columns) / 8).astype(np.float32)
    stored = {"F32": lambda: w_OI, "F16": lambda: w_OI.astype(np.float16), "BF16": lambda: float_to_bf16(w_OI)}[dtype]()
    return Plain(stored, dtype)


def int4(rows, columns, group=32, dtype="F16", seed=0):
    r = np.random.RandomState(seed)
    scales_OG = (r.randn(rows, columns // group) / 64).astype(np.float32)
    scales_OG = {"F32": lambda x: x, "F16": np.float16, "BF16": float_to_bf16}[dtype](scales_OG)
    return Quantized(r.randint(0, 256, (rows, columns // 2), np.uint8), Plain(scales_OG, dtype), group)


def blocks(rows, columns, type, seed=0):
    """Every bit at random but the steps, which are ordinary and sometimes subnormal."""
    r, record = np.random.RandomState(seed), TYPES[type].record
    b_OG = r.bytes(rows * TYPES[type].row_bytes(columns))
    b_OG = np.frombuffer(bytearray(b_OG), record).reshape(rows, -1)
    b_OG["d"] = r.randn(*b_OG.shape) * np.where(r.rand(*b_OG.shape) < 0.1, 1e-6, 1e-2)
    return Blocks(b_OG.view(np.uint8), type, (rows, columns))


def x_of(tokens, columns, seed=1):
    return np.random.RandomState(seed).randn(tokens, columns).astype(np.float32)


# One call of each kernel. change: (old, new), a defect that is planted in the source


def run_int4(weights, x_TI, order="forward", change=(), warps=WARPS):
    """matvec_int4 of one weight, gated_int4 of two."""
    layouts = [device_layout.int4(w) for w in weights]
    (O, I), kernel = weights[0].shape, "gated_int4" if len(weights) == 2 else "matvec_int4"
    out_TO, grid = np.full((len(x_TI), O), np.nan, np.float32), -(-O // (warps * 4 // len(weights)))
    arrays = [array for layout in layouts for array in (layout.packed, layout.scales)]
    arguments = [out_TO, x_TI, *arrays, O, I, layouts[0].group]
    constants = int4_constants(len(x_TI), layouts[0].kind, layouts[0].span)
    launch("matvec_int4", kernel, grid, 32 * warps, arguments, constants, order, change)
    return out_TO


def int4_constants(tokens, kind, span):
    activation = "silu" if kind == "bf16" else "gelu"
    return (("TOKENS", tokens), ("SCALE", kind), ("SPAN", span), ("ACTIVATION", activation))


def run_float(weight, x_TI, order="forward", change=()):
    out_TO = np.full((len(x_TI), weight.shape[0]), np.nan, np.float32)
    constants = (("TOKENS", len(x_TI)), ("WEIGHT", FLOAT[weight.dtype]))
    arguments, grid = [out_TO, x_TI, weight.stored, *weight.shape], -(-weight.shape[0] // 4)
    launch("matvec_float", "matvec_float", grid, 128, arguments, constants, order, change)
    return out_TO


def run_blocks(weight, x_TI, order="forward", change=()):
    """matvec_int8 or matvec_q6k."""
    name = {"Q8_0": "matvec_int8", "Q6_K": "matvec_q6k"}[weight.type]
    arrays = [array for array in gather_arrays(weight)[2] if array is not None]  # the same ones in the same order
    out_TO, grid = np.full((len(x_TI), weight.shape[0]), np.nan, np.float32), -(-weight.shape[0] // (4 * WARPS))
    arguments = [out_TO, x_TI, *arrays, *weight.shape]
    launch(name, name, grid, 32 * WARPS, arguments, (("TOKENS", len(x_TI)),), order, change)
    return out_TO


def run_gather(weight, ids, order="forward", change=()):
    storage, kind, arrays, group = gather_arrays(weight)
    D, ids_T = weight.shape[1], np.array(ids, np.int32)
    out_TD = np.full((len(ids), D), np.nan, np.float32)
    arguments, grid = [out_TD, ids_T, *arrays, D, group], (-(-D // 64), len(ids))
    launch("gather", "gather", grid, 64, arguments, (("STORAGE", storage), ("SCALE", kind)), order, change)
    return out_TD


def gather_arrays(weight):
    """STORAGE, SCALE, the four arrays and the group of a weight."""
    if isinstance(weight, Plain):
        return "FLOATS", FLOAT[weight.dtype], [weight.stored, None, None, None], 1
    if isinstance(weight, Blocks) and weight.type == "Q6_K":
        low, high, scales, steps = device_layout.q6k(weight)
        return "Q6K", "f16", [low, scales, high, steps], 1
    if isinstance(weight, Blocks) and weight.type == "Q8_0":
        return "CODES8", "f16", [*device_layout.int8(weight), None, None], 32
    layout = device_layout.int4(weight)
    return "INT4", layout.kind, [layout.packed, layout.scales, None, None], layout.group


def launch(name, kernel, grid, block, arguments, constants, order, change):
    text, variant = edited(name, constants, change), (name, constants, change)
    if variant in together():
        text, kernel = all_together(), f"{kernel}_{together().index(variant)}"
    shim.launch(name, kernel, grid, block, arguments, constants=constants, order=order, text=text)


def edited(name, constants, change=()):
    """The source, with a defect planted in it."""
    text = source(name, constants)
    if not change:
        return text
    assert change[0] in text, change[0]
    return text.replace(*change)


@cache
def all_together():
    """The source of many variants, each kernel's name with its variant's number: one compilation instead of dozens."""
    text = source("gather", (("STORAGE", "FLOATS"), ("SCALE", "f16"))).split("#line 1")[0]
    for i, (name, constants, change) in enumerate(together()):
        kernel = edited(name, constants, change).split("#line 1")[1].split("\n", 1)[1]
        kernel = KERNEL.sub(rf"\1_{i}(", kernel)
        undefined = "".join(f"#undef {name}\n" for name in CONSTANTS)
        defined = "".join(f"#define {name} {value}\n" for name, value in constants)
        used = "".join(f"using variant_{i}::{found[2]};\n" for found in KERNEL.finditer(kernel))
        text += f"{undefined}{defined}namespace variant_{i} {{\n{kernel}\n}}\n{used}"
    return text


def assert_close(found, expected, bound=1e-5):
    assert not np.isnan(found).any()
    assert abs(found - expected).max() <= bound * abs(expected).max()


def assert_same_alone(run, x_TI):
    """No token's bits depend on the others, nor on the order of threads."""
    together = run(x_TI)
    for t in (0, len(x_TI) - 1):
        np.testing.assert_array_equal(run(x_TI[t : t + 1])[0], together[t])
    for order in ORDERS:
        np.testing.assert_array_equal(run(x_TI, order=order), together)


# Layouts, read back column by column as the kernels' heads describe them


def test_the_int4_layout_of_q4_0_has_the_even_column_low_and_the_weights_bits():
    weight = blocks(5, 96, "Q4_0")
    layout, column = device_layout.int4(weight), np.arange(96)
    codes_OI = (layout.packed[:, column // 2] >> 4 * (column % 2)).astype(np.int32) & 15
    w_OI = (codes_OI - 8) * layout.scales.astype(np.float32)[:, column // 32]
    np.testing.assert_array_equal(w_OI, weight.dequantize(np.float32))
    assert (layout.kind, layout.group, layout.span) == ("f16", 32, 32)


def test_the_int8_layout_of_q8_0_has_the_weights_bits():
    weight = blocks(5, 96, "Q8_0")
    codes_OI, scales_OG = device_layout.int8(weight)
    w_OI = codes_OI * np.repeat(scales_OG.astype(np.float32), 32, axis=1)
    np.testing.assert_array_equal(w_OI, weight.dequantize(np.float32))
    assert codes_OI.flags.c_contiguous and scales_OG.flags.c_contiguous


@pytest.mark.parametrize("at_once", [device_layout.BLOCK, 2 * 768])
def test_the_layout_of_q6_k_has_the_weights_bits(at_once, monkeypatch):
    monkeypatch.setattr(device_layout, "BLOCK", at_once)
    weight = blocks(5, 768, "Q6_K")
    low_OB, high_OB, scales_OS, steps_ON = device_layout.q6k(weight)
    column = np.arange(768)
    block, q, m, i = column // 256, column % 256 // 64, column % 64 // 4, column % 4
    low_OI = low_OB[:, 128 * block + 8 * m + 4 * (q // 2) + i] >> 4 * (q % 2) & 15
    high_OI = high_OB[:, 64 * block + 4 * m + i] >> 2 * q & 3
    scale_OI = steps_ON.astype(np.float32)[:, block] * scales_OS[:, 16 * block + 4 * (m // 4) + q]
    w_OI = ((low_OI | high_OI << 4).astype(np.int32) - 32) * scale_OI
    np.testing.assert_array_equal(w_OI, weight.dequantize(np.float32))


def test_what_no_kernel_reads_is_refused_by_name():
    zeros = np.zeros((2, 2), np.int8)
    with pytest.raises(CheckpointError, match="zeros"):
        device_layout.int4(Quantized(np.zeros((2, 32), np.uint8), plain(2, 2, "F16"), 32, zeros=zeros))
    with pytest.raises(CheckpointError, match="8 bits"):
        device_layout.int4(Quantized(np.zeros((2, 64), np.uint8), plain(2, 2, "F16"), 32, bits=8))
    with pytest.raises(CheckpointError, match="groups of 4"):
        device_layout.int4(int4(2, 64, group=4))
    with pytest.raises(CheckpointError, match="of 48"):
        device_layout.int4(int4(2, 48, group=16))
    with pytest.raises(CheckpointError, match="expected Q8_0"):
        device_layout.int8(blocks(2, 64, "Q4_0"))
    with pytest.raises(CheckpointError, match="expected Q6_K"):
        device_layout.q6k(blocks(2, 64, "Q8_0"))


# matvec_int4 and gated_int4

INT4_CASES = [  # rows, columns, group, dtype of scales, tokens
    (19, 1120, 32, "F16", 5),  # a second tile of three lanes, rows that end within a warp
    (8, 2048, 128, "F16", 5),
    (9, 64, 64, "F16", 5),  # one scale a row, and fewer columns than lanes take
    (1, 32, 32, "F16", 8),
    (23, 1056, 32, "BF16", 2),
    (11, 96, 24, "F32", 1),  # groups that end within a lane's columns
    (10, 1088, 8, "F32", 1),
]


@pytest.mark.parametrize("rows, columns, group, dtype, tokens", INT4_CASES)
def test_int4_products_are_matmuls(rows, columns, group, dtype, tokens):
    weight, x_TI = int4(rows, columns, group, dtype), x_of(tokens, columns)
    assert_close(run_int4([weight], x_TI), matmul(x_TI, weight))


def test_int4_products_of_q4_0_are_matmuls():
    weight, x_TI = blocks(13, 160, "Q4_0"), x_of(5, 160)
    assert_close(run_int4([weight], x_TI), matmul(x_TI, weight))


def test_an_int4_product_does_not_depend_on_other_tokens_on_warps_or_on_the_order_of_threads():
    weight, five = int4(19, 1120), x_of(5, 1120)
    assert_same_alone(lambda x_TI, **how: run_int4([weight], x_TI, **how), five)
    eight = np.concatenate([five, x_of(3, 1120, seed=2)])
    np.testing.assert_array_equal(run_int4([weight], eight)[:5], run_int4([weight], five))
    np.testing.assert_array_equal(run_int4([weight], five, warps=3), run_int4([weight], five))


@pytest.mark.parametrize("tokens, dtype, activation", [(5, "F16", layers.gelu), (2, "BF16", layers.silu)])
@pytest.mark.parametrize("rows, columns", [(11, 1120), (3, 64)])
def test_gated_int4_is_the_first_half_of_gated_mlp(tokens, dtype, activation, rows, columns):
    gate, up = (int4(rows, columns, dtype=dtype, seed=seed) for seed in (0, 1))
    x_TI = x_of(tokens, columns)
    expected_TO = activation(matmul(x_TI, gate)) * matmul(x_TI, up)
    assert_close(run_int4([gate, up], x_TI), expected_TO)


def test_gated_int4_does_not_depend_on_other_tokens_nor_on_the_order_of_threads():
    weights = int4(11, 1120), int4(11, 1120, seed=1)
    assert_same_alone(lambda x_TI, **how: run_int4(weights, x_TI, **how), x_of(5, 1120))


INT4_DEFECTS = [
    ("        __syncthreads();  // before the next tile takes this one's place\n", ""),
    ("min(first + r, rows - 1), columns, group", "first + r, columns, group"),  # rows that do not exist
    ("if (column + TILE < columns) load", "load"),  # columns that do not exist
]


@pytest.mark.parametrize("old, new", INT4_DEFECTS)
def test_a_defect_of_the_int4_kernels_is_found(old, new):
    weight, x_TI = int4(19, 1120), x_of(1, 1120)
    assert_found(lambda order: run_int4([weight], x_TI, order, (old, new)), matmul(x_TI, weight))


# matvec_float

FLOAT_CASES = [  # rows, columns, dtype, tokens
    (9, 1080, "F32", 5),
    (5, 35, "F32", 5),  # rows begin at 4 bytes only
    (3, 264, "F16", 8),
    (6, 131, "F16", 8),
    (7, 520, "BF16", 1),
    (1, 1, "BF16", 1),
    (2, 12, "BF16", 1),
]


@pytest.mark.parametrize("rows, columns, dtype, tokens", FLOAT_CASES)
def test_float_products_are_matmuls(rows, columns, dtype, tokens):
    weight, x_TI = plain(rows, columns, dtype), x_of(tokens, columns)
    assert_close(run_float(weight, x_TI), matmul(x_TI, weight))


@pytest.mark.parametrize("columns", [1080, 301])
def test_a_float_product_does_not_depend_on_other_tokens_nor_on_the_order_of_threads(columns):
    weight = plain(9, columns, "F32")
    assert_same_alone(lambda x_TI, **how: run_float(weight, x_TI, **how), x_of(5, columns))


FLOAT_DEFECTS = [("    __syncthreads();\n", ""), ("columns % 8 == 0", "true")]


@pytest.mark.parametrize("old, new", FLOAT_DEFECTS)
def test_a_defect_of_the_float_kernel_is_found(old, new):
    weight, x_TI = plain(9, 1083, "BF16"), x_of(1, 1083)
    assert_found(lambda order: run_float(weight, x_TI, order, (old, new)), matmul(x_TI, weight))


# matvec_int8 and matvec_q6k

BLOCK_CASES = [  # type, rows, columns, tokens
    ("Q8_0", 19, 416, 5),
    ("Q8_0", 1, 32, 5),
    ("Q8_0", 9, 1024, 1),
    ("Q8_0", 5, 160, 8),
    ("Q6_K", 19, 768, 5),  # three blocks: the last step of half a warp
    ("Q6_K", 1, 256, 5),
    ("Q6_K", 8, 512, 1),
    ("Q6_K", 5, 256, 8),
]


@pytest.mark.parametrize("type, rows, columns, tokens", BLOCK_CASES)
def test_products_of_blocks_are_matmuls(type, rows, columns, tokens):
    weight, x_TI = blocks(rows, columns, type), x_of(tokens, columns)
    assert_close(run_blocks(weight, x_TI), matmul(x_TI, weight))


@pytest.mark.parametrize("type, columns", [("Q8_0", 416), ("Q6_K", 768)])
def test_a_product_of_blocks_does_not_depend_on_other_tokens_nor_on_the_order_of_threads(type, columns):
    weight = blocks(19, columns, type)
    assert_same_alone(lambda x_TI, **how: run_blocks(weight, x_TI, **how), x_of(5, columns))


BLOCK_DEFECTS = [
    ("Q8_0", "column < columns)\n                for", "true)\n                for"),  # columns that do not exist
    ("Q8_0", " ^ 0x80808080, 128", ", 128"),
    ("Q6_K", "min(first + r, rows - 1)", "(first + r)"),
    ("Q6_K", "* int8(", "* uint8("),
]


@pytest.mark.parametrize("type, old, new", BLOCK_DEFECTS)
def test_a_defect_of_the_kernels_of_blocks_is_found(type, old, new):
    columns = {"Q8_0": 416, "Q6_K": 768}[type]
    weight, x_TI = blocks(19, columns, type), x_of(1, columns)
    assert_found(lambda order: run_blocks(weight, x_TI, order, (old, new)), matmul(x_TI, weight))


# gather

EMBEDDINGS = [
    plain(7, 130, "F32"),
    plain(7, 130, "F16"),
    plain(7, 130, "BF16"),
    int4(7, 96, 24, "BF16"),
    int4(7, 96, 32, "F32"),
    blocks(7, 96, "Q4_0"),
    blocks(7, 96, "Q8_0"),
    blocks(7, 512, "Q6_K"),
]


@pytest.mark.parametrize(
    "weight", EMBEDDINGS, ids=lambda w: f"{type(w).__name__}-{getattr(w, 'dtype', '')}{w.shape[1]}"
)
def test_gathered_rows_have_the_bits_of_take(weight):
    ids = [6, 0, 3, 3, 5]
    np.testing.assert_array_equal(run_gather(weight, ids, "shuffled"), gather(weight, ids, np.dtype(np.float32)))
    np.testing.assert_array_equal(run_gather(weight, [4]), weight.take([4], np.float32))


GATHER_DEFECTS = [
    ("    if (column >= columns) return;\n", ""),
    ("code * scale;", "code * (scale * 1.1f) / 1.1f;"),  # not the twin's roundings
    ("at % 2", "(at + 1) % 2"),
]


@pytest.mark.parametrize("old, new", GATHER_DEFECTS)
def test_a_defect_of_gather_is_found(old, new):
    weight = int4(7, 96, 32, "BF16")
    expected_TD = weight.take([6, 2], np.float32)
    assert_found(lambda order: run_gather(weight, [6, 2], order, (old, new)), expected_TD, bound=0)


def assert_found(run, expected, bound=1e-5):
    """In some order of threads the shim stops the kernel, or the result is wrong."""
    for order in ("forward", *ORDERS):
        try:
            found = run(order)
        except shim.KernelError as error:
            assert "refuses" not in str(error)  # a defect that does not compile is none
            return
        if not abs(found - expected).max() <= bound * abs(expected).max():
            return
    raise AssertionError("the defect passed")


@cache
def together():
    """The variants that are compiled as one: (source, constants, defect). Wide int4 products need their own memory."""
    one = {"matvec_int4": int4_constants(1, "f16", 32), "matvec_float": (("TOKENS", 1), ("WEIGHT", "bf16"))}
    int4 = [int4_constants(*how) for how in ((1, "f16", 32), (2, "bf16", 32), (1, "f32", 8))]
    float_ = sorted({(("TOKENS", tokens), ("WEIGHT", FLOAT[dtype])) for _, _, dtype, tokens in FLOAT_CASES})
    float_ = [*float_, (("TOKENS", 1), ("WEIGHT", "f32"))]
    stored = dict.fromkeys(
        (("STORAGE", storage), ("SCALE", kind)) for storage, kind, *_ in map(gather_arrays, EMBEDDINGS)
    )
    return [
        *(("matvec_int4", constants, ()) for constants in int4),
        *(("matvec_int4", one["matvec_int4"], change) for change in INT4_DEFECTS),
        *(("matvec_float", constants, ()) for constants in float_),
        *(("matvec_float", one["matvec_float"], change) for change in FLOAT_DEFECTS),
        *((name, (("TOKENS", tokens),), ()) for name in ("matvec_int8", "matvec_q6k") for tokens in (1, 5, 8)),
        *(("matvec_int8", (("TOKENS", 1),), change[1:]) for change in BLOCK_DEFECTS if change[0] == "Q8_0"),
        *(("matvec_q6k", (("TOKENS", 1),), change[1:]) for change in BLOCK_DEFECTS if change[0] == "Q6_K"),
        *(("gather", constants, ()) for constants in stored),
        *(("gather", (("STORAGE", "INT4"), ("SCALE", "bf16")), change) for change in GATHER_DEFECTS),
    ]
