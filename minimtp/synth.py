"""Random checkpoints of any published shape and size, to measure memory and speed without a download.

A weight is made while it is written, some rows at a time: memory stays small whatever the size. Its row bytes come from
a generator seeded with its name, which is moved to where they stand: the same rows are the same bytes every time.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from . import gemma4, gemma4_assistant, qwen35, qwen35_mtp
from .checkpoint import DTYPES, float_to_bf16, read_json, sweep, temporary
from .convert import refuse_existing, write_checkpoint
from .ggml import TYPES, Blocks
from .gguf_write import FILE_TYPES
from .loading import open_model, parse_model, published
from .memory import SMALL
from .parameters import VECTORS
from .quant import Plain, Quantized
from .source import Source

BUNDLED = {gemma4: "tiny-gemma4", gemma4_assistant: "tiny-gemma4-assistant", qwen35: "tiny-qwen35"}


def synthesize(config, dst, format="bf16", layers=None, seed=0, progress=None):
    """Write a random checkpoint -> convert.Report.

    config: the name of a published configuration, or the path of a config.json; layers: how many of its layers, in the
    same pattern. format: one of convert.FORMATS; those of GGUF are written to a .gguf file, or a new folder with one in
    it. The bundled tokenizer of the family goes with it, where the vocabulary has room. progress is called with bytes
    done and bytes in all. Raises CheckpointError or ValueError, one line, and then leaves nothing behind.
    """
    raw = read_json(Path(config)) if Path(config).is_file() else published(str(config))
    source, dst = make_source(raw if layers is None else keep_layers(raw, layers), format, seed), Path(dst)
    if format not in FILE_TYPES or dst.suffix == ".gguf":
        return write_checkpoint(source, dst, format, progress, dst.stem, compare=False)
    sweep(dst.absolute())
    refuse_existing(dst)
    with temporary(dst.absolute(), Path.mkdir) as folder:
        report = write_checkpoint(source, folder / f"{dst.name}.gguf", format, progress, dst.name, compare=False)
        os.rename(folder, dst)
    return report


# Fewer layers


def keep_layers(raw, count):
    """A config.json with its first layers, in whole periods of their pattern, and keys and values shared as before.

    Raises ValueError for a number that cannot be, saying which can.
    """
    _, config = parse_model(raw, "config")
    kinds, text = [layer.kind for layer in config.layers], raw.get("text_config", raw)
    total, shared = len(kinds), sum(not getattr(layer, "owns_kv", True) for layer in config.layers)
    period = next(n for n in range(1, total + 1) if total % n == 0 and kinds == kinds[:n] * (total // n))
    within = 0 < shared < total  # not in an assistant, which borrows all
    possible = [n for n in range(period, total + 1, period) if n == total or n > period or not within]
    if count not in possible:
        known = ", ".join(map(str, possible))
        raise ValueError(f"{count} layers would not keep the pattern of {total}: possible are {known}")
    if count == total:
        return raw
    few = {**text, "num_hidden_layers": count}
    if text.get("layer_types"):
        few["layer_types"] = text["layer_types"][:count]
    if within:
        periods = round(shared * count / total / period)
        few["num_kv_shared_layers"] = min(max(periods, 1), count // period - 1) * period
    elif shared:
        few["num_kv_shared_layers"] = count
    return few if text is raw else {**raw, "text_config": few}


# What the numbers are


def _rms(numbers):
    return math.sqrt(np.mean(np.square(numbers, dtype=float)))


# What a random byte becomes: one of 256 normal numbers of variance 1; or, for a step of packed codes, a number around 1
# of either sign: codes from -8 to 7 are not centred, and what is not adds up over a row of thousands.
NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)])
NORMAL /= _rms(NORMAL)
STEPS = np.concatenate([np.linspace(-1.25, -0.75, 128), np.linspace(0.75, 1.25, 128)])
STEPS /= _rms(STEPS)
INT4, INT8 = _rms(range(-8, 8)), _rms(range(-128, 128))
CODES = {"INT4": INT4, "Q4_0": INT4, "Q8_0": INT8, "Q6_K": INT8 * _rms(range(-32, 32))}  # RMS of random ones
DECAY = {"A_log": (math.log(2), 0.7), "dt_bias": (-4.5, 1.0)}  # DeltaNet forgets over some ten to a thousand tokens
# Half of a layer's sum goes on; with more of attention in it, which averages, all tokens would be alike 60 layers up.
GEMMA = {"layer_scalar": 0.5, "post_attention_layernorm": 0.4}


def moments(place, shape, kind, config):
    """Mean and standard deviation of a tensor's numbers, such that activations stay of order 1 at any depth.

    Matrices keep the size of what they multiply. Norms are near 1, but the last is near 3, for logits of that order,
    and those of queries and keys are for scores of order 2, as are the routers'.
    """
    part, columns = place.rpartition(".")[2], shape[-1]
    if kind not in VECTORS or part == "conv1d":
        fan_in = config.per_layer_input if part == "embed_tokens_per_layer" else columns
        return 0.0, (2 if part == "router" else 1) / math.sqrt(fan_in)
    if part in DECAY:
        return DECAY[part]
    means = {"norm": 3.0, "router_scale": 2 * math.sqrt(columns)} | (GEMMA if kind == "vector" else {})
    mean = means.get(part, 1.0)
    if part in ("q_norm", "k_norm"):
        mean = math.sqrt(2) * (columns**-0.25 if kind == "vector" else 1)  # Gemma does not divide scores by sqrt(K)
    return mean - (kind == "zero_centred"), mean / 10


# How they are stored: by kind or place, in the first type whose blocks fill the rows

STORED = {
    "bf16": {"linear": ("BF16",), "embedding": ("BF16",), "small": ("BF16",)},
    "f32": {"linear": ("F32",), "embedding": ("F32",), "small": ("F32",)},
    "compressed-tensors": {"linear": ("INT4", "BF16"), "embedding": ("BF16",), "small": ("BF16",)},
    "q4_0": {"linear": ("Q4_0", "F16"), "embedding": ("Q6_K", "Q8_0", "F16"), "small": ("F32",)},
    "q8_0": {"linear": ("Q8_0", "F16"), "embedding": ("Q8_0", "F16"), "small": ("F32",)},
}
BLOCKS = {"INT4": 32} | {name: type.block for name, type in TYPES.items()}


def _type(place, name, shape, kind, format):
    part = place.rpartition(".")[2]
    if format == "q4_0" and part == "per_layer_model_projection":
        return "F16"
    small = kind in VECTORS or part in SMALL or (format == "compressed-tensors" and name.startswith("mtp."))
    row = "small" if small else "embedding" if kind == "embedding" else "linear"
    return next(type for type in STORED[format][row] if shape[-1] % BLOCKS.get(type, 1) == 0)


@dataclass(frozen=True, eq=False)
class Noise:
    """A random weight [out, in], as those of quant.py, whose rows are made where they are read."""

    name: str
    shape: tuple[int, int]
    type: str  # one of checkpoint.FLOATS, a key of CODES
    mean: float  # of floats; packed ones have 0
    spread: float  # their standard deviation
    seed: int

    def part(self, start, stop):
        """Rows start … stop-1 -> Plain, Quantized or Blocks."""
        data_RB, columns = self._bytes(start, stop), self.shape[1]
        if self.type not in CODES:
            return Plain(_as_stored(self.mean + self.spread * NORMAL, self.type).take(data_RB), self.type, self.name)
        steps = STEPS * (self.spread / CODES[self.type])
        if self.type == "INT4":
            scales = Plain(float_to_bf16(steps).take(data_RB[:, columns // 2 :]), "BF16", self.name)
            return Quantized(np.ascontiguousarray(data_RB[:, : columns // 2]), scales, name=self.name)
        data_RB = np.ascontiguousarray(data_RB)
        b_RN = data_RB.view(TYPES[self.type].record)
        b_RN["d"] = steps.astype(np.float16).take(b_RN["d"].view("<u2") & 255)
        return Blocks(data_RB, self.type, (stop - start, columns), self.name)

    def rows(self, start, stop, dtype):
        """-> float [stop - start, in]"""
        return self.part(start, stop).dequantize(dtype)

    def _bytes(self, start, stop):
        """Random bytes for these rows: those that are stored, or one for every float or bf16 step."""
        columns = self.shape[1]
        size = columns // 2 + columns // 32 if self.type == "INT4" else columns
        size = TYPES[self.type].row_bytes(columns, self.name) if self.type in TYPES else size
        words = -(-size // 8)
        generator = np.random.PCG64DXSM([self.seed, int.from_bytes(self.name.encode(), "little")])
        data_W = generator.advance(start * words).random_raw((stop - start) * words)
        return data_W.view(np.uint8).reshape(stop - start, -1)[:, :size]


def _as_stored(numbers, type):
    return float_to_bf16(numbers) if type == "BF16" else numbers.astype(DTYPES[type])


# All of it


def make_source(raw, format, seed=0):
    """A config.json -> Source of random weights, for convert.write_checkpoint."""
    if format not in STORED:
        raise ValueError(f"format is {format!r}, expected one of {', '.join(STORED)}")
    raw = {key: value for key, value in raw.items() if key != "quantization_config"} | {"dtype": "bfloat16"}
    family, config = parse_model(raw, "config")
    models = [(family, config)]
    if getattr(config, "mtp_layers", 0):
        models.append((qwen35_mtp, qwen35_mtp.parse_config(raw)))
    tensors = [
        (name, kind, _weights(place, name, shape, kind, config, format, seed))
        for each, its_config in models
        for place, (name, shape, kind) in each.tensors(its_config).items()
        if kind != "unused"  # which int4 releases do not have
    ]
    nested = "text_config" in raw and family is not gemma4_assistant
    return Source(raw, config, tensors, "model.language_model." if nested else "model.", _text_files(family, config))


def _weights(place, name, shape, kind, config, format, seed):
    """What a Source has for one tensor of the table."""
    if kind == "permutation":
        return [np.random.RandomState(seed).permutation(shape[0])]
    type, numbers = _type(place, name, shape, kind, format), moments(place, shape, kind, config)
    if kind in VECTORS:
        flat = Noise(name, (1, math.prod(shape)), type, *numbers, seed).part(0, 1)
        return [Plain(flat.stored.reshape(shape), type, name)]
    if kind == "experts":
        count, rows, columns = (2 * shape[0], shape[1] // 2, shape[2]) if "gate_up" in name else shape
        return [Noise(f"{name}.{i}", (rows, columns), type, *numbers, seed) for i in range(count)]
    return [Noise(name, shape, type, *numbers, seed)]


def _text_files(family, config):
    """The small files of the family's bundled model, if all its tokens are in the vocabulary."""
    checkpoint, _, bundled = open_model(BUNDLED[family])
    if bundled.vocab_size > config.vocab_size:
        return {}
    kept = [path for path in checkpoint.folder.iterdir() if path.suffix in (".json", ".jinja")]
    return {path.name: path.read_bytes() for path in kept if path.name != "config.json"}
