"""Every kernel, with constants that models give it, through NVIDIA's compiler for every generation supported.

NVRTC needs no GPU. A warning fails, and so do registers spilled to memory, which a kernel would wait for.
"""

import re
from itertools import product

import nvrtc
import pytest

from minimtp.kernel_source import FOLDER, kernels_of, source

pytestmark = pytest.mark.skipif(nvrtc.missing() is not None, reason=str(nvrtc.missing()))

ARCHITECTURES = ["sm_86", "sm_89", "sm_90"]  # Ampere's consumer cards, Ada, Hopper
MOST_SHARED = 48 << 10
WIDTHS = [1, 5, 8]
FLOATS = ["f32", "f16", "bf16"]
STORAGES = ["F32", "F16", "BF16", "INT8"]


def every(**choices):
    """All combinations of constants -> [((name, value), ...)]"""
    return [tuple(zip(choices, values)) for values in product(*choices.values())]


def attentions():
    """Query heads of a kv head, a head's width, how keys are kept, a split, whether keys are made of values."""
    shapes = [(2, 256, "INT8", 128, 0), (8, 512, "F16", 1024, 0), (8, 512, "BF16", 1024, 1)]
    few = [(6, 256, "F32", 1024, 0), (4, 512, "INT8", 1024, 0)]  # in one width
    for tokens, shape in [*product(WIDTHS, shapes), *product(WIDTHS[-1:], few)]:
        shared, width, storage, split, values_only = shape
        heads = max(n for n in range(1, shared + 1) if shared % n == 0 and tokens * n <= 16)
        yield (
            *(("TOKENS", tokens), ("HEADS", heads), ("HEAD_DIM", width), ("STORAGE", storage)),
            *(("SPLIT", split), ("VALUES_ONLY", values_only)),
        )


def expressions():
    """What the package asks of the elementwise kernel."""
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.parent.glob("*.py")]
    found = {e for text in texts for e in re.findall(r'(?:elementwise|_expression)\(\s*"([^"]+)"', text)}
    return sorted({"x", "gelu(x)", "sigmoid(x)", "silu(x)", *found})


TABLE = {
    "attention": list(attentions()),
    "causal_conv": every(TOKENS=WIDTHS, WIDTH=[4]),
    "elementwise": every(EXPRESSION=expressions()),
    "experts": every(TOKENS=WIDTHS, ACTIVATION=["gelu"], SCALE=["bf16"], GROUP=[32])
    + every(TOKENS=WIDTHS, ACTIVATION=["silu"], SCALE=["f16"], GROUP=[32])
    + every(TOKENS=[8], ACTIVATION=["gelu"], SCALE=["f32"], GROUP=[32])
    + every(TOKENS=WIDTHS, ACTIVATION=["silu"], BF16_EXPERTS=[1]),
    "gated_delta": every(TOKENS=WIDTHS, KEY_DIM=[128], WARPS=[8]),
    "gather": every(STORAGE=["FLOATS", "INT4", "CODES8"], SCALE=FLOATS) + every(STORAGE=["Q6K"], SCALE=["f16"]),
    "matvec_float": every(TOKENS=WIDTHS, WEIGHT=FLOATS),
    "matvec_int4": every(TOKENS=WIDTHS, SCALE=["bf16"], SPAN=[32], ACTIVATION=["gelu"])
    + every(TOKENS=WIDTHS, SCALE=["f16"], SPAN=[8], ACTIVATION=["silu"])
    + every(TOKENS=[8], SCALE=["f32"], SPAN=[8], ACTIVATION=["gelu"]),
    "matvec_int8": every(TOKENS=WIDTHS),
    "matvec_q6k": every(TOKENS=WIDTHS),
    "rms_norm": [()],
    "rope_write": every(HEAD_DIM=[256, 512], STORAGE=STORAGES),
}


def test_the_table_has_every_kernel():
    assert sorted(TABLE) == sorted(path.stem for path in FOLDER.glob("*.cu"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", TABLE)
def test_a_kernel_compiles_without_warning_or_spill(name, architecture, record_property):
    faults, most = [], {}
    for constants in TABLE[name]:
        if architecture != ARCHITECTURES[0] and dict(constants).get("TOKENS", WIDTHS[-1]) != WIDTHS[-1]:
            continue  # the first one gets all, the others the widest pass, which needs the most
        shown = " ".join(f"{key}={value}" for key, value in constants)
        text = source(name, constants)
        compiled = nvrtc.compile(text, architecture)
        assert compiled.cubin[:4] == b"\x7fELF" and sorted(compiled.usage) == sorted(kernels_of(text)), shown
        if "warning" in compiled.log:
            faults.append(f"{shown}:\n{compiled.log}")
        for kernel, usage in compiled.usage.items():
            most[kernel] = max(most.get(kernel, (0,)), (*usage, shown))
            if usage.spilled or usage.shared > MOST_SHARED:
                faults.append(f"{kernel} {shown}: {usage}")
    for kernel, (registers, _, _, shared, shown) in most.items():
        record_property(kernel, registers)
        print(f"\n{architecture} {kernel}: {registers} registers, {shared} bytes shared: {shown}", end="")
    assert not faults, "\n".join(faults)


def test_nvrtc_is_the_version_that_is_asked_for():
    assert nvrtc.version() == (12, 9)


def test_a_broken_source_is_refused_with_its_line():
    text = source("matvec_int8", (("TOKENS", 1),)) + '\n#line 7 "end.cu"\n__device__ int broken() { return nothing; }\n'
    with pytest.raises(nvrtc.CompileError, match=r'end.cu\(7\): error: identifier "nothing" is undefined'):
        nvrtc.compile(text, "sm_86")


def test_warnings_spills_and_shared_memory_are_told():
    text = """extern "C" __global__ void wasteful(float* x) {
        __shared__ float shared[100];
        float many[200];
        int unused;
        for (int i = 0; i < 200; i++) many[i] = x[i * 32 + threadIdx.x];
        for (int i = 0; i < 200; i++) shared[threadIdx.x] += many[i] * many[(i * 7 + int(x[i])) % 200];
        __syncthreads();
        x[threadIdx.x] = shared[threadIdx.x ^ 1];
    }
    extern "C" __global__ void __launch_bounds__(1024, 2) spilling(float* x) {
        float many[64];
    #pragma unroll
        for (int i = 0; i < 64; i++) many[i] = x[i * 1024 + threadIdx.x];
        __syncthreads();
    #pragma unroll
        for (int i = 0; i < 64; i++) x[i * 1024 + threadIdx.x] = many[i] * many[i ^ 1] + many[63 - i];
    }"""
    compiled = nvrtc.compile(text, "sm_86")
    assert compiled.usage["wasteful"].shared == 400 and compiled.usage["wasteful"].stack >= 800
    assert compiled.usage["spilling"].spilled > 0 and compiled.usage["spilling"].registers <= 64
    assert re.search(r'warning #177-D: variable "unused"', compiled.log)


def test_an_architecture_that_is_not_there_is_refused():
    with pytest.raises(nvrtc.CompileError, match="(?i)invalid|unsupported"):
        nvrtc.compile("", "sm_12345")
