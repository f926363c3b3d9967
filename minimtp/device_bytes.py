"""What passes and kernels on a device must move and compute, counted from what they are given."""

from types import SimpleNamespace

from .device import Array

TABLES = ("embed_tokens", "embed_tokens_per_layer")  # of which a pass reads its tokens' rows
CARDS = {  # published: float32 operations and bytes of memory in a second
    "RTX 3090": (35.6e12, 936e9),
    "RTX 4090": (82.6e12, 1008e9),
    "H200": (67e12, 4.8e12),
}
PARTLY = {  # kernel -> (arguments it reads or writes only rows of, which axis these are on, for each of what)
    "gather": (slice(2, 6), 0, "token"),
    "rope_write": (slice(1, 5), 1, "token"),
    "attention_split": (slice(3, 7), 1, "position"),
    "causal_conv": (slice(1, 2), 0, "token"),
    "gated_delta": (slice(2, 5), 0, "token"),
    "experts_gated": (slice(2, 6), 0, "expert"),
    "experts_down": (slice(2, 4), 0, "expert"),
}


def must_read(target, cache, width, experts=None):
    """Bytes that a pass of `width` tokens after the cache's, all of them committed, cannot do without.

    Every weight once, a tied head with its embedding; of tables that are only looked up, a row for each token; of
    experts, those that were read (over all layers), or else how many an even choice would be expected to; what every
    layer remembers, keys and values as far as its queries see, lent ones for every layer that reads them.
    """
    total = sum(memory_bytes(memory, cache.length, width) for memory in memories(target.config, cache))
    for name, weight in leaves(target.params):
        if name in TABLES and weight is not target.params.lm_head:
            total += weight.nbytes // weight.shape[0] * width
        elif name.startswith("experts_"):
            total += round(weight.nbytes * share_of_experts(target.config, width, experts))
        else:
            total += weight.nbytes
    return total


def memories(config, cache):
    """What each layer reads: its own memory, or the one that is lent to it."""
    return [cache.layers[getattr(layer, "kv", i)] for i, layer in enumerate(config.layers)]


def memory_bytes(memory, length, width):
    """Of keys and values all positions that some query sees; of a Gated DeltaNet the committed state and window."""
    if not hasattr(memory, "slots"):
        return memory.state_HKV.nbytes + memory.window_WC.nbytes
    seen = length + width if memory.keep is None else min(length + width, memory.keep - 1 + width - 1)
    return memory.nbytes // memory.slots * seen


def share_of_experts(config, width, experts=None):
    """Which part of all experts a pass reads, as counted, or as expected of an even choice."""
    count, top_k = config.experts.count, config.experts.top_k
    return 1 - (1 - top_k / count) ** width if experts is None else experts / (count * len(config.layers))


def flops(target, width):
    """Multiplications and additions of a pass's products with weights; attention's are not counted."""
    total = 0
    for name, weight in leaves(target.params):
        if name.startswith("experts_"):
            codes, scales = weight.arrays
            share = target.config.experts.top_k / target.config.experts.count
            total += round(codes.size * (1 if scales is None else 2) * share)
        elif len(weight.shape) == 2 and (name not in TABLES or weight is target.params.lm_head):
            total += weight.shape[0] * weight.shape[1]
    return 2 * width * total


def leaves(params):
    """(name, parameter) of every tensor of a tree, what is there twice once."""
    seen = set()

    def walk(tree):
        for name, value in vars(tree).items():
            parts = value if isinstance(value, list) else [value] if isinstance(value, SimpleNamespace) else None
            if parts is not None:
                for part in parts:
                    yield from walk(part)
            elif id(value) not in seen:
                seen.add(id(value))
                yield name, value

    return walk(params)


def crossover(target, cache, operations, bandwidth, most=64):
    """From which width on a card would rather wait for its float32 units than for its memory, by published rates.

    None: beyond `most`. Unpacking and attention are not counted, so the units are reached somewhat earlier.
    """
    widths = range(1, most + 1)
    bound = (w for w in widths if flops(target, w) / operations > must_read(target, cache, w) / bandwidth)
    return {"width": next(bound, None), "flops": operations, "bytes_per_second": bandwidth, "rates": "published"}


def launch_bytes(kernel, arguments, counts):
    """Bytes that a launch reads and writes: each of its arrays once, but of those in PARTLY only what it needs.

    counts: how many tokens, positions and experts it is about.
    """
    partly, axis, kind = PARTLY.get(kernel, (slice(0), 0, None))
    arrays, some = ({a.address: a for a in part if isinstance(a, Array)} for part in (arguments, arguments[partly]))
    sizes = [array.nbytes for address, array in arrays.items() if address not in some]
    if kernel == "elementwise":  # an argument may be a view of all that comes after its column
        sizes = [min(size, arguments[0].nbytes, arguments[1].nbytes) for size in sizes]
    rows = [(array, array.shape[axis]) for array in some.values()]
    return sum(sizes) + sum(array.nbytes // n * min(counts[kind], n) for array, n in rows)
