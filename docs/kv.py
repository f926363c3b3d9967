"""What a storage of keys and values costs: bytes and time in a full layer of a published model; error in a small one.

python docs/kv.py cost [CONFIGURATION] [TOKENS ...]
python docs/kv.py error [MODEL] [TOKENS]
"""

import sys
import time
from functools import lru_cache, partial

import numpy as np

import minimtp
from minimtp import gemma4
from minimtp.backend import arithmetic
from minimtp.kv import FullKV
from minimtp.kv_storage import parse
from minimtp.layers import attend, rms_norm, rope_frequencies, rope_table, rotate
from minimtp.loading import bundled, published_config

STORAGES = ("float32", "float32-v", "float16", "float16-v", "bf16", "bf16-v", "int8", "int8-v")
WIDTHS, CHUNK, MIB = (1, 5), 512, 2**20


def memories(layer, config, count):
    """{storage: a full layer's memory of `count` random tokens}."""
    dtype = np.dtype("float32")
    random, table = np.random.default_rng(0), lru_cache(None)(partial(gemma4.turning_table, config, dtype))
    weight_K, kv = random.normal(size=layer.head_dim).astype(dtype) + 1, {}
    for name in STORAGES:
        storage, values_only = parse(name, dtype)
        keys_of = partial(gemma4.keys_of_values, weight_K, table) if values_only else None
        kv[name] = FullKV(layer.kv_heads, layer.head_dim, dtype, count, storage=storage, keys_of=keys_of)
    frequencies_C = rope_frequencies(config.ropes["full"], layer.head_dim)
    for start in range(0, count, CHUNK):
        positions_T = np.arange(start, min(start + CHUNK, count))
        v_TGK = rms_norm(random.normal(size=(len(positions_T), layer.kv_heads, layer.head_dim)).astype(dtype))
        k_TGK = rotate(v_TGK * weight_K, rope_table(positions_T, frequencies_C, dtype))
        for memory in kv.values():
            memory.append(k_TGK, v_TGK)
    return kv


def milliseconds(kv, layer, width, rounds=12):
    """Least time to attend over each memory in a pass of so many tokens, called in turn."""
    q_THK = np.random.default_rng(1).normal(size=(width, layer.heads, layer.head_dim)).astype(np.float32) / 50
    taken = {name: [] for name in kv}
    with arithmetic():
        for _ in range(rounds):
            for name, memory in kv.items():
                high_T = np.arange(memory.length - width, memory.length) + 1
                start = time.perf_counter()
                attend(q_THK, *memory.read(), np.zeros_like(high_T), high_T)
                taken[name].append(1e3 * (time.perf_counter() - start))
    return {name: min(times) for name, times in taken.items()}


def cost(name="gemma-4-31b", *counts):
    """Print bytes, and the time of narrow passes after so many tokens."""
    _, config = published_config(name)
    full = [layer for layer in config.layers if layer.kind == "full" and layer.k_eq_v]
    print(f"{name}: {len(full)} layers of {full[0].heads} heads, {full[0].kv_heads} kv heads of {full[0].head_dim}")
    for count in map(int, counts or (1024, 8192, 32768)):
        kv = memories(full[0], config, count)
        times = {width: milliseconds(kv, full[0], width) for width in WIDTHS}
        print(f"\n{count} tokens      MiB a layer" + "".join(f"   ms, width {width}" for width in WIDTHS))
        for storage, memory in kv.items():
            row = "".join(f"{times[width][storage]:14.2f}" for width in WIDTHS)
            print(f"{storage:12}{memory.nbytes / MIB:17.1f}{row}")


def error(model="tiny-gemma4", count=1024):
    """Print how far each layer's attention and the logits are from those with float32, root mean square over theirs."""
    ids_T, outs = None, {}
    for kv in STORAGES:
        target = minimtp.load(model, kv=kv)
        if ids_T is None:
            ids_T = target.tokenizer.encode(bundled("heldout.txt").read_text(encoding="utf-8"))[: int(count)]
            taps = [f"layer.{i}.attn" for i in range(len(target.config.layers))]
            kinds = [layer.kind for layer in target.config.layers]
        cache, rows = target.new_cache(), []
        for start in range(0, len(ids_T), 16):  # as decoding does it: what a pass reads of itself is kept, too
            rows.append(target.forward(ids_T[start : start + 16], cache, taps))
            cache.commit()
        outs[kv] = {tap: np.concatenate([out.taps[tap] for out in rows]) for tap in taps}
        outs[kv]["logits"] = np.concatenate([out.logits_TV for out in rows])
    others = STORAGES[1:]
    print(f"{model}, {len(ids_T)} tokens    " + "".join(f"{kv:>11}" for kv in others))
    for tap, kind in zip([*taps, "logits"], [*kinds, ""]):
        plain = outs["float32"][tap]
        off = [np.sqrt(np.mean((outs[kv][tap] - plain) ** 2) / np.mean(plain**2)) for kv in others]
        print(f"{tap:16}{kind:16}" + "".join(f"{x:11.1e}" for x in off))


if __name__ == "__main__":
    {"cost": cost, "error": error}[sys.argv[1]](*sys.argv[2:])
