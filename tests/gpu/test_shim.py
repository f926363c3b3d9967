"""The shim that runs kernels on the CPU: it gives what CUDA documents, and refuses what a GPU would not forgive."""

import mmap
import shutil

import numpy as np
import pytest

from minimtp import checkpoint, quant, shim
from minimtp.kernel_source import FOLDER, source

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")

N = 64
COMMON = (FOLDER / "common.cuh").read_text().replace("#pragma once", "")

# One source, which is compiled once.
SAMPLES = r"""
extern "C" __global__ void reverse(float* out, const float* x, int n) {
    __shared__ float shared[64];
    shared[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    out[threadIdx.x] = shared[n - 1 - threadIdx.x];
}
extern "C" __global__ void reverse_without_barrier(float* out, const float* x, int n) {
    __shared__ float shared[64];
    shared[threadIdx.x] = x[threadIdx.x];
    out[threadIdx.x] = shared[n - 1 - threadIdx.x];
}
extern "C" __global__ void some_at_the_barrier(float* out, int who, int what) {
    if (what == 0 && threadIdx.x == who) return;
    if (what == 1 && threadIdx.x == who) __syncwarp();  // at the warp's
    if (what == 2 && threadIdx.x >= who)
        __syncthreads();  // at the second
    else
        __syncthreads();  // at the first
    out[threadIdx.x] = 1;
}
extern "C" __global__ void read_at(float* out, const float* x, int i) {
    out[threadIdx.x] = x[threadIdx.x == 5 ? i : 0];
}
extern "C" __global__ void write_at(float* out, int i) { if (threadIdx.x == 5 && blockIdx.x == 2) out[i] = 1; }
extern "C" __global__ void read_four(float* out, const float* x, int i) {
    float4 four = *reinterpret_cast<const float4*>(x + i);
    out[threadIdx.x] = four.x + four.w;
}
extern "C" __global__ void shuffle(int* out, unsigned mask, int from, int ended) {
    if (threadIdx.x == ended) return;
    if (mask >> threadIdx.x & 1) out[threadIdx.x] = __shfl_sync(mask, int(100 + threadIdx.x), from);  // in the shuffle
}
extern "C" __global__ void not_in_the_mask(int* out) { out[threadIdx.x] = __shfl_sync(0xFFFFu, 1, 0); }
extern "C" __global__ void uninitialised(float* out, int* whole) {
    __shared__ float shared[32];
    __shared__ int integers[32];
    DYNAMIC_SHARED(float, dynamic);
    out[threadIdx.x] = threadIdx.x % 2 ? shared[threadIdx.x] : dynamic[threadIdx.x];
    whole[threadIdx.x] = integers[threadIdx.x];
    shared[threadIdx.x] = dynamic[threadIdx.x] = integers[threadIdx.x] = 1;  // a second block must not see it
}
extern "C" __global__ void dynamic_at(float* out, int i) {
    DYNAMIC_SHARED(float, dynamic);
    if (out) dynamic[threadIdx.x] = 1, out[threadIdx.x] = dynamic[i];
    else dynamic[i] = 1;
}
extern "C" __global__ void shared_at(float* out, int i) {
    __shared__ float shared[32];
    out[threadIdx.x] = shared[i];
}
extern "C" __global__ void divide(int* out, int by, int far) { out[threadIdx.x] = (7 / by) << far; }
extern "C" __global__ void indices(int* out) {
    int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
    int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
    int* mine = out + 6 * (block * int(blockDim.x * blockDim.y * blockDim.z) + thread);
    mine[0] = blockIdx.x, mine[1] = blockIdx.y, mine[2] = blockIdx.z;
    mine[3] = threadIdx.x, mine[4] = threadIdx.y, mine[5] = threadIdx.z;
}
extern "C" __global__ void lanes(float* out, const float* x, unsigned* votes, int half) {
    int lane = threadIdx.x % 32, i = blockDim.x * blockIdx.x + threadIdx.x, n = gridDim.x * blockDim.x;
    float mine = x[i];
    out[0 * n + i] = __shfl_sync(0xFFFFFFFFu, mine, lane * 7 + 3);
    out[1 * n + i] = __shfl_xor_sync(0xFFFFFFFFu, mine, 5);
    out[2 * n + i] = __shfl_down_sync(0xFFFFFFFFu, mine, 3);
    out[3 * n + i] = __shfl_up_sync(0xFFFFFFFFu, mine, 3);
    out[4 * n + i] = warp_sum(mine);
    out[5 * n + i] = warp_max(mine);
    unsigned long long wide = __shfl_sync(0xFFFFFFFFu, (unsigned long long)(i) << 40 | 1, 31);
    out[6 * n + i] = float(wide >> 40) + float(wide & 1) / 2;
    votes[0 * n + i] = __ballot_sync(0xFFFFFFFFu, mine > 0);
    votes[1 * n + i] = __any_sync(0xFFFFFFFFu, mine > 2.5f);
    votes[2 * n + i] = __all_sync(0xFFFFFFFFu, mine > -2.5f);
    unsigned mask = lane < half ? (1u << half) - 1 : ~((1u << half) - 1);  // two parties of a warp
    votes[3 * n + i] = lane < half ? __ballot_sync(mask, lane % 3 == 0) : __ballot_sync(mask, lane % 5 == 0);
}
extern "C" __global__ void halves(float* out, float* out_bf16, const uint16* halves, int n) {
    int i = blockDim.x * blockIdx.x + threadIdx.x;
    if (i < n) out[i] = half_to_float(halves[i]), out_bf16[i] = bf16_to_float(halves[i]);
}
extern "C" __global__ void round_halves(uint16* out, uint16* out_bf16, const float* x, int n) {
    int i = blockDim.x * blockIdx.x + threadIdx.x;
    if (i < n) out[i] = float_to_half(x[i]), out_bf16[i] = float_to_bf16(x[i]);
}
extern "C" __global__ void nearest(int* out, const float* x) { out[threadIdx.x] = __float2int_rn(x[threadIdx.x]); }
extern "C" __global__ void add_up(int* sum, float* same, const float* also) {
    atomicAdd(sum, int(threadIdx.x));
    same[threadIdx.x] = 1;
    __syncthreads();
    same[threadIdx.x] += also[(threadIdx.x + 1) % blockDim.x];
}
"""
TEXT = f"{COMMON}#line 1\n{SAMPLES}"


def line(comment):
    """The number of the line of SAMPLES that has this comment."""
    return 1 + [comment in line for line in SAMPLES.split("\n")].index(True)


FIRST, SECOND, WARP, SHUFFLE = map(line, ("at the first", "at the second", "at the warp's", "in the shuffle"))


def sample(kernel):
    """The source of one of them alone: shared memory counts by file."""
    part = next(part for part in SAMPLES.split('extern "C"')[1:] if f" {kernel}(" in part)
    return f'{COMMON}#line 1\nextern "C"{part}'


def run(kernel, arguments, grid=1, block=N, order="forward", **more):
    shim.launch("sample", kernel, grid, block, arguments, order=order, **{"text": TEXT, **more})


def floats(n=N):
    return np.arange(1, n + 1, dtype=np.float32)


def nans(n=N):
    return np.full(n, np.nan, np.float32)


def refused(match, kernel, arguments, **more):
    """Launch what must fail; and then what must not: the process goes on."""
    with pytest.raises(shim.KernelError, match=match):
        run(kernel, arguments, **more)
    out = nans()
    run("reverse", [out, floats(), N])
    np.testing.assert_array_equal(out, floats()[::-1])


# What a GPU would not forgive


@pytest.mark.parametrize("order", shim.ORDERS)
def test_with_its_barrier_a_kernel_is_right_in_every_order(order):
    out = nans()
    run("reverse", [out, floats(), N], order=order)
    np.testing.assert_array_equal(out, floats()[::-1])


def test_a_missing_barrier_is_wrong_in_an_order():
    wrong = []
    for order in shim.ORDERS:
        out = nans()
        run("reverse_without_barrier", [out, floats(), N], order=order)
        wrong.append((out != floats()[::-1]).any())
    assert all(wrong)  # here in each: some thread always comes before the one that it reads


@pytest.mark.parametrize(
    "who, what, match",
    [
        (
            3,
            0,
            rf"divergent barrier: thread \(0, 0, 0\) .* __syncthreads in line {FIRST}, thread \(3, 0, 0\) .* has ended",
        ),
        (40, 1, rf"divergent barrier: thread \(0, 0, 0\) .* thread \(40, 0, 0\) .* at __syncwarp in line {WARP}"),
        (33, 2, rf"divergent barrier: .* in line {FIRST}, thread \(33, 0, 0\) .* in line {SECOND}"),
    ],
)
def test_a_divergent_barrier_names_who_waits_where(who, what, match):
    for order in shim.ORDERS:
        refused(match, "some_at_the_barrier", [nans(), who, what], order=order)


@pytest.mark.parametrize("i, order", [(N, "forward"), (-1, "backward"), (1 << 30, "forward"), (-(1 << 30), "shuffled")])
def test_a_read_outside_an_array_names_the_thread(i, order):
    match = r"read_at: thread \(5, 0, 0\) of block \(0, 0, 0\): access out of bounds, address 0x"
    refused(match + (rf".*: byte {4 * i} of argument 1, which has 256" if abs(i) <= N else ""), "read_at",
            [nans(), floats(), i], order=order)  # fmt: skip


@pytest.mark.parametrize("i, order", [(N, "forward"), (-1, "backward"), (1 << 30, "forward"), (-(1 << 30), "shuffled")])
def test_a_write_outside_an_array_names_the_thread(i, order):
    match = r"write_at: thread \(5, 0, 0\) of block \(2, 0, 0\): access out of bounds"
    refused(match, "write_at", [nans(), i], grid=3, order=order)


@pytest.mark.parametrize("i", [-1, N - 1])
def test_a_write_beside_an_array_within_its_pages_is_seen_afterwards(i):
    for order in shim.ORDERS:
        refused(
            "argument 0: written out of bounds|access out of bounds", "write_at", [nans(N - 1), i], grid=3, order=order
        )


def test_a_read_beside_an_array_within_its_pages_gives_nan():
    for order in shim.ORDERS:
        out = floats()
        try:
            run("read_at", [out, floats(N - 1), N - 1], order=order)
        except shim.KernelError:
            continue
        assert np.isnan(out[5]) and out[4] == 1


def test_a_null_pointer_is_out_of_bounds():
    refused(r"thread \(0, 0, 0\).*out of bounds", "read_at", [nans(), None, 0])


def test_a_read_only_array_that_is_written_is_refused():
    out = floats()
    out.setflags(write=False)
    refused("argument 0: written, and it is read-only", "write_at", [out, 7], grid=3)


@pytest.mark.parametrize("i", [1, 2, 3])
def test_an_unaligned_float4_is_refused(i):
    refused(r"thread \(0, 0, 0\).*misaligned", "read_four", [nans(), floats(), i])


def test_an_aligned_float4_is_not():
    out = nans()
    run("read_four", [out, floats(), 4])
    assert (out == 5 + 8).all()


def test_a_shuffle_with_a_lane_that_has_ended_is_refused():
    for order in shim.ORDERS:
        arguments = [np.zeros(32, np.int32), -1, 0, 7]
        refused(
            f"a lane of its mask has ended, __shfl_sync in line {SHUFFLE}", "shuffle", arguments, block=32, order=order
        )


def test_a_shuffle_that_waits_for_lanes_elsewhere_is_refused():
    refused("lanes that do not exist", "shuffle", [np.zeros(32, np.int32), -1, 0, -1], block=31)


def test_reading_a_lane_outside_the_mask_is_refused():
    arguments = [np.zeros(32, np.int32), 0x0F, 9, -1]
    refused(rf"thread .* reads a lane outside its mask, __shfl_sync in line {SHUFFLE}", "shuffle", arguments, block=32)


def test_a_lane_outside_its_own_mask_is_refused():
    refused(r"thread \(16, 0, 0\).* not in its own mask", "not_in_the_mask", [np.zeros(32, np.int32)], block=32)


def test_more_than_1024_threads_are_refused():
    refused("1025 threads", "write_at", [nans(), 0], block=1025)
    refused("1056 threads", "write_at", [nans(), 0], block=(33, 8, 4))
    refused("0 threads", "write_at", [nans(), 0], block=0)
    run("write_at", [nans(), 0], block=1024)


@pytest.mark.parametrize("floats_more, allowed", [(0, True), (1, False)])
def test_static_shared_memory_ends_at_48_kib(floats_more, allowed):
    text = sample("reverse").replace("[64]", f"[{12 * 1024 + floats_more}]")
    arguments, out = [nans(), floats(), N], nans()
    if allowed:
        run("reverse", [out, *arguments[1:]], text=text)
        np.testing.assert_array_equal(out, floats()[::-1])
    else:
        refused("49156 bytes of shared memory: at most 49152", "reverse", arguments, text=text)


def test_shared_memory_ends_at_99_kib():
    alone, out = sample("dynamic_at"), nans()
    run("dynamic_at", [out, N - 1], shared=99 << 10, text=alone)
    refused("101380 bytes of shared memory: at most 101376", "dynamic_at", [out, 0], shared=(99 << 10) + 4, text=alone)


@pytest.mark.parametrize("order", shim.ORDERS)
def test_shared_memory_is_poison_at_the_start_of_every_block(order):
    out, whole = floats(32), np.zeros(32, np.int32)
    run("uninitialised", [out, whole], grid=3, block=32, shared=128, order=order)
    assert np.isnan(out).all() and (whole == -1).all()


@pytest.mark.parametrize("i", [N, -mmap.PAGESIZE // 4])
def test_dynamic_shared_memory_lies_between_guard_pages(i):
    refused("out of bounds", "dynamic_at", [nans(), i], shared=4 * N)
    refused("out of bounds", "dynamic_at", [None, i], shared=4 * N)


@pytest.mark.parametrize("i", [-1, N - 1])
def test_a_write_beside_dynamic_shared_memory_is_seen_after_the_block(i):
    refused("dynamic shared memory written out of bounds", "dynamic_at", [None, i], shared=4 * N - 4)


@pytest.mark.parametrize("i", [32, -1])
def test_an_index_beyond_static_shared_memory_is_refused(i):
    refused("index beyond its array", "shared_at", [nans(32), i], block=32)


@pytest.mark.parametrize("by, far", [(0, 1), (1, 32)])
def test_a_division_by_zero_and_a_shift_too_far_are_refused(by, far):
    refused("shift too far or division by 0", "divide", [np.zeros(N, np.int32), by, far])


# Arguments, sources, compilers


def test_arguments_are_counted_and_their_kinds_checked():
    refused("reverse takes 3 arguments, not 2", "reverse", [nans(), floats()])
    refused("argument 2: float32 where the kernel takes int32", "reverse", [nans(), floats(), 64.0])
    refused("argument 1: int32 where the kernel takes uint64", "reverse", [nans(), 5, 64])
    refused("not contiguous", "reverse", [nans(), floats(2 * N)[::2], N])
    refused("there is no kernel missing", "missing", [])


def test_a_source_that_does_not_compile_is_refused_with_its_line():
    text = '\nextern "C" __global__ void broken(float* out) {\n    out[0] = nothing;\n}\n'
    refused(r"kernel.cu:3:.*nothing", "broken", [nans()], text=text)


@pytest.mark.parametrize("compiler", [None, "/no/such/compiler", "false"])
def test_without_a_compiler_that_works_it_says_so(compiler, monkeypatch, tmp_path):
    run("reverse", [nans(), floats(), N])  # compiled before
    text = f'extern "C" __global__ void other(float* out) {{ out[0] = {len(str(compiler))}; }}'
    with monkeypatch.context() as patched:
        if compiler is None:
            patched.delenv("CXX", raising=False)
            patched.setenv("PATH", str(tmp_path))
        else:
            patched.setenv("CXX", compiler)
        with pytest.raises(shim.KernelError, match="needs a C.. compiler|refuses the kernel"):
            run("other", [nans()], text=text)
        out = nans()
        run("reverse", [out, floats(), N])
    run("other", [out], text=text)
    assert out[0] == len(str(compiler))


# A kernel of the project, with defects


def products(text, rows=6, columns=1056):
    """(what matvec_int4 of this source makes of random numbers, what it should)"""
    rng = np.random.RandomState(4)
    packed_OB = rng.randint(0, 256, (rows, columns // 2)).astype(np.uint8)
    scales_OG = rng.uniform(0.5, 1, (rows, columns // 32)).astype(np.float16)
    x_TI, out_TO = rng.normal(0, 1, (1, columns)).astype(np.float32), nans(rows)[None]
    arguments = [out_TO, x_TI, packed_OB, scales_OG.view(np.uint16), rows, columns, 32]
    run("matvec_int4", arguments, grid=2, block=32, text=text)
    weight_OI = quant.Quantized(packed_OB, quant.Plain(scales_OG, "F16")).dequantize(np.float32)
    return out_TO, x_TI @ weight_OI.T


def test_defects_of_matvec_int4_are_seen():
    text = source("matvec_int4", (("TOKENS", 1), ("SCALE", "f16"), ("SPAN", 32)))
    found, expected = products(text)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)

    def planted(old, new):
        assert old in text, old
        return products(text.replace(old, new))

    found, expected = planted(
        "0xF, 1, 8), code_to_float(word, 0xF0, 16, 8)", "0xF0, 16, 8), code_to_float(word, 0xF, 1, 8)"
    )
    assert np.abs(found - expected).max() > 1
    with pytest.raises(shim.KernelError, match=r"thread .* out of bounds.* of argument 2|of argument 3"):
        planted("min(first + r, rows - 1)", "min(first + r, rows)")
    with pytest.raises(shim.KernelError, match="argument 0: written out of bounds"):
        planted("first + r < rows", "first + r <= rows")


# What CUDA documents


def test_blocks_and_threads_have_the_indices_of_their_three_dimensions():
    grid, block = (3, 2, 4), (5, 3, 2)
    for order in shim.ORDERS:
        out = np.full((*grid[::-1], *block[::-1], 6), -1, np.int32)
        run("indices", [out], grid=grid, block=block, order=order)
        expected = np.stack(np.indices(out.shape[:-1])[[2, 1, 0, 5, 4, 3]], -1)
        np.testing.assert_array_equal(out, expected)
    out = np.full((4, 1, 8, 6), -1, np.int32)
    run("indices", [out], grid=(1, 4), block=8)
    np.testing.assert_array_equal(out[3, 0, 7], [0, 3, 0, 7, 0, 0])


@pytest.mark.parametrize("order", shim.ORDERS)
@pytest.mark.parametrize("half", [16, 7, 31])
def test_shuffles_and_votes_are_as_documented(order, half):
    blocks, n, lane = 2, 2 * N, np.arange(32)
    x = np.random.RandomState(half).randint(-3, 4, n).astype(np.float32)
    out, votes = np.full((7, n), np.nan, np.float32), np.full((4, n), 9, np.uint32)
    run("lanes", [out, x, votes, half], grid=blocks, order=order)
    x_WL = x.reshape(-1, 32)

    def all_lanes(value_W):
        return np.repeat(value_W, 32)

    np.testing.assert_array_equal(out[0], x_WL[:, (lane * 7 + 3) % 32].ravel())
    np.testing.assert_array_equal(out[1], x_WL[:, lane ^ 5].ravel())
    np.testing.assert_array_equal(out[2], x_WL[:, np.where(lane + 3 < 32, lane + 3, lane)].ravel())
    np.testing.assert_array_equal(out[3], x_WL[:, np.where(lane >= 3, lane - 3, lane)].ravel())
    np.testing.assert_array_equal(out[4], all_lanes(x_WL.sum(-1)))
    np.testing.assert_array_equal(out[5], all_lanes(x_WL.max(-1)))
    np.testing.assert_array_equal(out[6], all_lanes(np.arange(31, n, 32)) + 0.5)
    np.testing.assert_array_equal(votes[0], all_lanes(((x_WL > 0) << lane).sum(-1)))
    np.testing.assert_array_equal(votes[1], all_lanes((x_WL > 2.5).any(-1)))
    np.testing.assert_array_equal(votes[2], all_lanes((x_WL > -2.5).all(-1)))
    low, high = ((lane < half) & (lane % 3 == 0)) << lane, ((lane >= half) & (lane % 5 == 0)) << lane
    np.testing.assert_array_equal(votes[3], np.tile(np.where(lane < half, low.sum(), high.sum()), n // 32))


def test_atomics_add_and_an_array_given_twice_is_one():
    total, same = np.zeros(1, np.int32), nans()
    run("add_up", [total, same, same], order="shuffled")
    assert total[0] == N * (N - 1) // 2 and not np.isnan(same).any() and same.max() > 1


def test_rounding_to_an_integer_is_to_even_and_saturates_as_on_the_device():
    x = np.array([0.5, 1.5, 2.5, -0.5, -1.5, 2e9, 3e9, -3e9, np.inf, -np.inf, np.nan, 2**31], np.float32)
    out = np.zeros(len(x), np.int32)
    run("nearest", [out, x], block=len(x))
    top, bottom = 2**31 - 1, -(2**31)
    assert out.tolist() == [0, 2, 2, 0, -2, 2_000_000_000, top, bottom, top, bottom, 0, top]


def test_every_16_bit_float_is_widened_as_in_numpy():
    bits = np.arange(1 << 16, dtype=np.uint16)
    half, bf16 = nans(1 << 16), nans(1 << 16)
    run("halves", [half, bf16, bits, len(bits)], grid=64, block=1024)
    for found, expected in ((half, bits.view(np.float16).astype(np.float32)), (bf16, checkpoint.bf16_to_float(bits))):
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(found.view(np.uint32)[number], expected.view(np.uint32)[number])
        assert np.isnan(found[~number]).all()


def hard_floats():
    """Every 16-bit float, all midpoints between neighbours, what lies beside these, and random bits of all sizes."""
    rng, bits = np.random.RandomState(3), np.arange(1 << 16, dtype=np.uint16)
    with np.errstate(all="ignore"):
        half = bits.view(np.float16).astype(np.float32)
        middles = [(a[:-1].astype(np.float64) + a[1:]) / 2 for a in (half, checkpoint.bf16_to_float(bits))]
        sure = np.concatenate([half, *middles]).astype(np.float32)
        beside = [np.nextafter(sure, np.float32(end)) for end in (-np.inf, np.inf)]
    edges = np.array([65504, 65519.996, 65520, 65536, 3.4028235e38, 6e-8, 2.98e-8, 2.9802322e-8, 1e-45], np.float32)
    random = rng.randint(0, 1 << 32, 50_000, np.uint64).astype(np.uint32).view(np.float32)
    return np.concatenate([sure, *beside, edges, -edges, random])


def test_floats_are_rounded_to_16_bits_as_in_numpy():
    x = hard_floats()
    half, bf16 = np.zeros(len(x), np.uint16), np.zeros(len(x), np.uint16)
    run("round_halves", [half, bf16, x, len(x)], grid=-(-len(x) // 1024), block=1024)
    number = ~np.isnan(x)
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    np.testing.assert_array_equal(half[number], expected.view(np.uint16)[number])
    np.testing.assert_array_equal(bf16[number], checkpoint.float_to_bf16(x)[number])
    assert np.isnan(half.view(np.float16)[~number]).all() and np.isnan(checkpoint.bf16_to_float(bf16[~number])).all()
