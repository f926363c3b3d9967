"""How fast packed weights are multiplied, in weights per second of every storage: by 1, 5 and 32 tokens, and what that
costs next to one token. `python tests/unpack_speed.py`
"""

import time

import numpy as np

from minimtp.backend import THREADS, arithmetic, matmul
from minimtp.ggml import TYPES, Blocks
from minimtp.quant import Plain, Quantized

SHAPES = [(4096, 5376), (1344, 21504)]  # as the 31B's, of its layers' matrices the narrowest and the widest
WIDTHS = (1, 5, 32)


def weights(rows, columns):
    r = np.random.RandomState(0)
    scales = Plain((r.rand(rows, columns // 32) / 64).astype(np.float16), "F16")
    yield "int4", Quantized(r.randint(0, 256, (rows, columns // 2), np.uint8), scales)
    yield "BF16", Plain(r.randint(0, 1 << 14, (rows, columns)).astype(np.uint16), "BF16")
    for type in ("Q4_0", "Q8_0", "Q6_K"):
        data = r.randint(0, 256, (rows, TYPES[type].row_bytes(columns)), np.uint8)
        data.view(TYPES[type].record)["d"] = 1 / 64
        yield type, Blocks(data, type, (rows, columns))


def seconds(x_TI, weight, repeat=7):
    """The best of some."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        matmul(x_TI, weight)
        times.append(time.perf_counter() - start)
    return min(times)


def main():
    print(f"{THREADS} threads; 10^9 weights/s (times a pass of one token)")
    for shape in SHAPES:
        for name, weight in weights(*shape):
            x_TI = np.random.RandomState(1).standard_normal((max(WIDTHS), shape[1])).astype(np.float32)
            with arithmetic():
                times = [seconds(x_TI[:width], weight) for width in WIDTHS]
            size = shape[0] * shape[1] / 1e9
            cells = (f"{width}: {size / t:.2f} ({t / times[0]:.2f})" for width, t in zip(WIDTHS, times))
            print(f"{shape[0]} x {shape[1]} {name}  ", "  ".join(cells))


if __name__ == "__main__":
    main()
