"""What a device does with its time: passes and kernels against the bytes that they must move, and against a copy.

Decoding waits for memory, so every number stands beside the bandwidth of a plain copy on the same device in the same
run. On device.Host all of it runs, and says so: its times mean nothing, and no fraction is claimed.
"""

from functools import partial
from statistics import median

import numpy as np

from .backend import ROWS
from .device_bytes import CARDS, crossover, flops, launch_bytes, leaves, must_read
from .device_weights import Weight
from .kernel_ops import WIDTH

WIDTHS, REPEATS = range(1, WIDTH + 1), 30
COPIED = 256 << 20  # bytes; on the host a small part of them


def measure(target, prompt, widths=WIDTHS, repeats=REPEATS):
    """Passes of each width after a prompt, the kernels of a plain one, the copy they are held against -> a dict.

    It goes beside what bench.measure says. The peak of memory is read before the copy's buffers, half a GiB, are made.
    """
    device, on_gpu, peak = target.device, target.device.name != "host", target.device.peak_bytes()
    cache = target.new_cache(min(target.config.max_position_embeddings, len(prompt) + ROWS))
    cache.graphs = True  # they are what is timed
    target.forward(prompt, cache, last=1)
    cache.commit()
    buffers = [device.empty(COPIED if on_gpu else COPIED >> 8, np.uint8) for _ in range(2)]
    copy = partial(device.copy, *buffers)
    copy()
    bandwidth = 2 * buffers[0].nbytes / median(device.seconds(copy, repeats))
    passes = {width: pass_of_width(target, cache, (prompt * width)[-width:], repeats) for width in widths}
    kernels = kernel_table(target, cache, prompt[-1], copy)
    if on_gpu:
        for row in (*passes.values(), *kernels.values()):
            row["fraction"] = row["bytes"] / row["seconds"] / bandwidth
    return {
        "device": device.name,
        "copy_bytes_per_second": bandwidth,
        "passes_by_width": passes,
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1]["seconds"])),
        "crossover": {name: crossover(target, cache, *rates) for name, rates in CARDS.items()},
        "torch_int4": torch_int4(target, widths, repeats, copy) if on_gpu else None,
        "device_peak_bytes": peak,
    }


# Passes


def pass_of_width(target, cache, tokens, repeats):
    """Time of a pass's graph on the device, what the pass must read, its operations; the cache is left as it was."""
    experts = experts_read(target, cache, tokens)
    for _ in range(5):  # compiled, the arena grown, captured
        target.forward(tokens, cache)
        cache.rollback(len(tokens))
    seconds = target.device.seconds(cache.replay_of(("target", None), len(tokens)), repeats)
    work = {"bytes": must_read(target, cache, len(tokens), experts), "flops": flops(target, len(tokens))}
    return {"seconds": median(seconds), **work} | ({"experts": experts} if experts else {})


def experts_read(target, cache, tokens):
    """How many experts a pass of these tokens reads, over all layers, or None where there are none."""
    if target.config.experts is None:
        return None
    taps = [f"layer.{i}.experts" for i in range(len(target.config.layers))]
    found = target.forward(tokens, cache, taps=taps).taps
    cache.rollback(len(tokens))
    return sum(len(np.unique(chosen_TX)) for chosen_TX in found.values())


# Kernels


def kernel_table(target, cache, token, before):
    """{kernel: launches, seconds and bytes} of one pass of one token, its launches timed one by one.

    `before` is started ahead of each: it takes longer than the host needs to launch, and leaves nothing in the cache.
    """
    device, launch, rows, graphs = target.device, target.device.launch, {}, cache.graphs
    experts = target.config.experts.top_k if target.config.experts else 0
    counts = {"token": 1, "position": cache.length + 1, "expert": experts}

    def timed(file, kernel, grid, block, arguments, constants=(), shared=0):
        (seconds,) = device.seconds(lambda: launch(file, kernel, grid, block, arguments, constants, shared), 1, before)
        row = rows.setdefault(kernel, {"launches": 0, "seconds": 0.0, "bytes": 0})
        row["launches"] += 1
        row["seconds"] += seconds
        row["bytes"] += launch_bytes(kernel, arguments, counts)

    device.launch, cache.graphs = timed, False
    try:
        target.forward([token], cache)
    finally:
        del device.launch
        cache.graphs = graphs
    cache.rollback(1)
    return rows


# PyTorch's int4 product, where there is one on a GPU


def torch_int4(target, widths, repeats, before):
    """Times of torch's int4 product beside ours, one row for each shape and width; None without torch on a GPU.

    Its activations are bf16, ours float32. Both run on our stream, after what `before` starts, and by our clock.
    """
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    rows, device = [], target.device
    kept = {w.shape: w for _, w in leaves(target.params) if isinstance(w, Weight) and w.storage == "INT4"}
    for (O, I), weight in sorted(kept.items()):
        if O % 8 or I % 128 or weight.group not in (32, 64, 128, 256):  # what torch's kernel takes
            continue
        codes = torch.randint(256, (O, I // 2), dtype=torch.uint8, device="cuda")
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand((I // weight.group, O, 2), device="cuda").bfloat16()
        for width in widths:
            x_TI, out_TO = (device.zeros((width, size), np.float32) for size in (I, O))
            x = torch.zeros((width, I), dtype=torch.bfloat16, device="cuda")
            theirs = partial(torch.ops.aten._weight_int4pack_mm, x, packed, weight.group, scales)
            ours = partial(weight.product, out_TO, x_TI)
            ours()
            theirs()
            torch.cuda.synchronize()
            with torch.cuda.stream(torch.cuda.ExternalStream(device.stream.ptr)):
                seconds = [median(device.seconds(product, repeats, before)) for product in (ours, theirs)]
            rows.append({"shape": [O, I], "width": width, "seconds": seconds[0], "torch_seconds": seconds[1]})
    return rows


# The picture


def plot(report, path):
    """A roofline: what passes of each width compute in a second, by operations for each byte they must read."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("a picture needs matplotlib: pip install 'minimtp[docs]'") from None

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes, name, rows = figure.subplots(), report["device"], report["passes_by_width"]
    points = {width: (row["flops"] / row["bytes"], row["flops"] / row["seconds"]) for width, row in rows.items()}
    for width, point in points.items():
        axes.plot(*point, "ko")
        axes.annotate(width, point, xytext=(4, -10), textcoords="offset points")
    if name != "host":
        x = np.geomspace(min(points.values())[0] / 2, max(points.values())[0] * 4)
        axes.plot(x, x * report["copy_bytes_per_second"], label="as fast as a copy")
        for card in (card for card in CARDS if card in name):
            axes.axhline(CARDS[card][0], color="gray", label=f"float32 of a {card}, as published")
        axes.legend(frameon=False)
    axes.set(xscale="log", yscale="log", xlabel="operations for each byte", ylabel="operations a second")
    axes.set(title=f"passes by width on {name}" + (": its times mean nothing" if name == "host" else ""))
    figure.savefig(path)
