"""What fits in a memory: weights, drafter, keys and values, scratch, what is left, the longest context that fits."""

import os
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from . import kv_storage
from .backend import ROWS
from .display import MEMORY, escaped, framed, stacked, table
from .kv import SLACK
from .layers import ATTEND_ELEMENTS

MIB = 1 << 20
DRIVER = 600 * MIB  # what a card's driver and context take before the first weight
CHUNK = 512  # tokens of a prompt that are read in one pass


class DoesNotFit(ValueError):
    """A model needs more memory than there is."""


class Part(NamedTuple):
    """One row of a plan: what it is, how it is stored, its bytes."""

    name: str
    stored: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """What a model takes at some context, part by part in bytes, beside what there is; make_plan makes it.

    memory None: nobody said how much there is, and what follows from it is None too.
    """

    model: str
    config: object = field(repr=False)
    context: int
    storage: str  # of keys and values, one of kv_storage.NAMES
    mtp: bool  # whether an MTP layer's keys and values are among them
    weights: tuple
    drafter: tuple
    scratch: tuple
    memory: int | None
    driver: int

    @property
    def kv(self):
        """What the layers remember -> Parts."""
        return kv_parts(self.config, self.context, self.storage, self.mtp)

    @property
    def sums(self):
        """{"weights", "drafter", "kv", "scratch": bytes}"""
        return {name: sum(part.bytes for part in parts) for name, parts in self.parts().items()}

    @property
    def left(self):
        """Bytes beside driver, weights, drafter, keys and values; less than 0 where these do not fit."""
        sums = self.sums
        return None if self.memory is None else self.memory - self.driver - sum(sums.values()) + sums["scratch"]

    @property
    def fits(self):
        """Whether what is left is enough for scratch."""
        return None if self.memory is None else self.left >= self.sums["scratch"]

    @property
    def max_context(self):
        """Tokens of the longest context that fits, at most the model's own; 0 where none does."""
        contexts = range(1, self.config.max_position_embeddings + 1)
        return None if self.memory is None else bisect_left(contexts, True, key=lambda n: not self.at(n).fits)

    def at(self, context):
        """The same at another context."""
        return replace(self, context=context)

    def parts(self):
        """{"weights", "drafter", "kv", "scratch": Parts}"""
        return {"weights": self.weights, "drafter": self.drafter, "kv": self.kv, "scratch": self.scratch}

    def as_dict(self):
        """JSON-able: every part in bytes, their sums in MiB rounded up, what is left rounded down."""
        return {
            "context": self.context,
            "kv_storage": self.storage,
            "memory_mib": None if self.memory is None else self.memory // MIB,
            "driver_mib": _up(self.driver),
            **{f"{name}_mib": _up(size) for name, size in self.sums.items()},
            "left_mib": None if self.memory is None else self.left // MIB,
            "fits": self.fits,
            "max_context": self.max_context,
            **{name: [part._asdict() for part in parts] for name, parts in self.parts().items()},
        }

    def text(self):
        """For people to read, in MiB."""
        room = "" if self.memory is None else f", of {self.memory // MIB:,}"
        lines = [f"MiB at {self.context:,} tokens{room}", _row("driver", "", self.driver)]
        for name, parts in self.parts().items():
            lines.append(_row(name, "" if parts else "none", self.sums[name]))
            lines += [_row(f"  {part.name}", part.stored, part.bytes) for part in parts]
        if self.memory is not None:
            lines += [self._verdict(), f"longest context that fits: {self.max_context:,} tokens"]
        return "\n".join(lines)

    def _verdict(self):
        scratch = f"scratch takes {_up(self.sums['scratch']):,}"
        if self.left < 0:
            return f"does not fit: {_up(-self.left):,} MiB too much, and {scratch}"
        return f"{'fits' if self.fits else 'does not fit'}: {self.left // MIB:,} MiB left, and {scratch}"

    def stack(self):
        """{name in display.MEMORY: bytes}, from a bar's beginning to its end."""
        sums = {"driver": self.driver, **self.sums}
        kv, scratch = {f"{part.name} KV": part.bytes for part in self.kv}, sums.pop("scratch")
        del sums["kv"]
        return {name: size for name, size in {**sums, **kv, "scratch": scratch}.items() if size}

    def _repr_html_(self):
        whole = None if self.memory is None else self.memory / MIB
        bar = stacked({name: (size / MIB, MEMORY[name]) for name, size in self.stack().items()}, whole, " MiB")
        groups = {"driver": (Part("driver", "", self.driver),), **self.parts()}
        rows = [
            [escaped(f"{group}: {part.name}" if group != part.name else group), escaped(part.stored),
             f"{part.bytes / MIB:,.1f}"]
            for group, parts in groups.items()
            for part in parts
            if part.bytes
        ]  # fmt: skip
        title = f"<b>{escaped(self.model)}</b>, {self.context:,} tokens, keys and values in {escaped(self.storage)}"
        verdict = ""
        if self.memory is not None:
            longest = f"Longest context that fits: {self.max_context:,} tokens."
            verdict = f"<div>Of {whole:,.0f} MiB (dashed), <b>{self._verdict()}</b>. {longest}</div>"
        return framed(f"<div>{title}</div>", bar, verdict, table(["part", "stored", "MiB"], rows))

    def check(self, advice=""):
        """Raise DoesNotFit, the numbers in one line, unless it fits."""
        if self.fits is False:
            needs = " + ".join(f"{name} {_up(size):,}" for name, size in self.sums.items() if size)
            driver = f" less {_up(self.driver):,} for the driver" if self.driver else ""
            there = f"{self.memory // MIB:,} MiB{driver}"
            raise DoesNotFit(f"{self.model}: {needs} MiB at {self.context:,} tokens do not fit in {there}{advice}")


def _up(size):
    return -(-size // MIB)


def _row(name, stored, size):
    return f"  {name:20} {stored:16} {size / MIB:>12,.1f}"


def make_plan(model, config, weights, context=None, storage="bf16", *, drafter=None, mtp=False, memory=None,
              driver=DRIVER, scratch=None):  # fmt: skip
    """Plan a model from its configuration and its weights, {(component, type): bytes} -> Plan.

    context: tokens, None for all that the model takes; storage: of keys and values, one of kv_storage.NAMES. drafter:
    its weights likewise; mtp: it is the target's own MTP layer, with keys and values. memory, driver: bytes; scratch:
    bytes, None for what scratch_parts estimates. Raises ValueError for a context or a storage that cannot be.
    """
    limit = config.max_position_embeddings
    context = limit if context is None else context
    if not 1 <= context <= limit:
        raise ValueError(f"a context of {context} tokens: {model} takes 1 to {limit}")
    if storage not in kv_storage.NAMES:
        raise ValueError(f"keys and values as {storage!r}: expected one of {', '.join(kv_storage.NAMES)}")
    packed = any(type not in ("F64", "F32", "F16", "BF16") for _, type in weights)
    scratch = scratch_parts(config, packed) if scratch is None else (Part("reserved", "", scratch),)
    weights, drafter = (tuple(Part(*key, size) for key, size in (held or {}).items()) for held in (weights, drafter))
    return Plan(model, config, context, storage, mtp, weights, drafter, scratch, memory, driver)


def kv_parts(config, context, storage, mtp=False):
    """What the layers remember of `context` tokens -> Parts, one for each kind of layer.

    A sliding layer has slots for its window and SLACK more. A linear one has its state in float32 and the window of its
    convolution, in 2 bytes a number where storage is narrower than float32, both twice: as they are, and as they were
    at the commit, to un-read a draft.
    """
    kept, values_only = kv_storage.parse(storage, "float32")
    sizes = Counter()
    own = [("mtp", config.attention)] if mtp else []
    for kind, layer in [(layer.kind, layer) for layer in config.layers] + own:
        if kind == "linear":
            state = layer.value_heads * layer.key_dim * layer.value_dim * 4
            window = (layer.kernel - 1) * layer.channels * (4 if kept.row_bytes(1) >= 4 else 2)
            sizes["linear", "float32"] += state + window
            sizes["linear, committed", "float32"] += state + window
        elif getattr(layer, "owns_kv", True):
            alone = values_only and getattr(layer, "k_eq_v", False)
            slots = min(context, config.sliding_window + SLACK) if kind == "sliding" else context
            stored = storage.removesuffix(kv_storage.VALUES_ONLY) + (", V alone" if alone else "")
            sizes[kind, stored] += (1 if alone else 2) * layer.kv_heads * kept.row_bytes(layer.head_dim) * slots
    return tuple(Part(*key, size) for key, size in sizes.items())


def scratch_parts(config, packed):
    """What a pass needs beside weights and KV -> Parts: the most of a prompt's chunk and of a narrow pass.

    activations: of CHUNK tokens, four rows of the hidden size (residual, its norm, a layer's output, hidden states to
    hand on), per-layer inputs, and what the widest layer holds at once: queries, gates, what they gather, keys and
    values; or a convolution's input and output, gate and output; or both halves of the feed-forward, of all experts in
    use. scores: of attention, in blocks. matrix: where weights are packed, the largest of a layer unpacked to 2 bytes a
    weight, for a chunk's product (a narrow pass unpacks as it multiplies). logits: of ROWS tokens, and their laws.
    """
    widths = [_widths(layer, config) for layer in config.layers]
    per_layer = getattr(config, "per_layer_input", 0) * len(config.layers)
    held, rows = (max(column) for column in zip(*widths))
    heads = max(getattr(layer, "heads", 0) for layer in config.layers)
    return (
        Part("activations", "float32", 4 * CHUNK * (4 * config.hidden_size + per_layer + held)),
        Part("scores", "float32", 4 * min(ATTEND_ELEMENTS, heads * CHUNK * config.max_position_embeddings)),
        Part("matrix", "bf16", 2 * config.hidden_size * rows * packed),
        Part("logits", "float32", 4 * 2 * ROWS * config.vocab_size),
    )


def _widths(layer, config):
    """(numbers a token holds at once in a layer, rows or columns of its largest matrix besides the hidden size)"""
    if layer.kind == "linear":
        mixer, rows = 2 * layer.channels + 2 * layer.value_heads * layer.value_dim, layer.channels
    else:
        gates, queries = hasattr(config, "attention"), layer.heads * layer.head_dim  # Qwen's queries come with gates
        mixer, rows = (2 + gates) * queries + 2 * layer.kv_heads * layer.head_dim, (1 + gates) * queries
    used = largest = getattr(layer, "intermediate_size", None) or getattr(config, "intermediate_size", None) or 0
    if experts := config.experts:
        shared = getattr(experts, "shared_size", 0)
        used += experts.top_k * experts.intermediate_size + shared
        largest = max(largest, experts.intermediate_size, shared)
    return max(mixer, 2 * used), max(rows, largest)


def available_memory():
    """Bytes this process could still take: of the machine, and of the container it is in."""
    room, group = _machine_memory(), Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        reclaimable = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.M)[1]
        return min(room, limit - used + int(reclaimable))
    except (OSError, ValueError, TypeError):  # no container, or no limit
        return room


def _machine_memory():
    try:
        return int(re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.M)[1]) << 10
    except (OSError, TypeError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):  # not every system tells
            return 4 << 30
