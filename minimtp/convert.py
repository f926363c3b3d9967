"""One checkpoint becomes another: GGUF in F32, Q8_0 or Q4_0, or a folder in compressed-tensors int4 or plain bf16.

Integers and steps that the other format can hold stay as they are; bf16 weights on an int4 lattice get back theirs.
What had to be rounded is counted. What was written is read again, the way any checkpoint is, before it takes its name.

Letters: O output and I input features, R some of the rows O; G groups of 32 along I.
"""

import os
import re
import zlib
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import prod
from pathlib import Path

import numpy as np

from .checkpoint import (
    CheckpointError,
    Lazy,
    bf16_to_float,
    float_to_bf16,
    read_safetensors,
    release,
    show,
    sweep,
    temporary,
    write_safetensors,
)
from .encode import GROUP, Counts, as_int4, encode, in_order, is_int4, narrow, on_all_cores, runs, some_rows
from .ggml import Blocks
from .gguf_file import read_header
from .gguf_write import FILE_TYPES, architecture_of, config_keys, gguf_places, stored_bytes, text_keys, write_gguf
from .loading import resolve
from .quant import Plain, release_all
from .source import MATRICES, as_json, open_source

FORMATS = (*FILE_TYPES, "compressed-tensors", "bf16")
INT4 = ("Q4_0", "int4")  # how a report calls it in GGUF, and in a folder
READ = 1 << 24  # bytes read again at a time
FLOAT_KINDS = ("vector", "zero_centred", "plus_one")
ROUTER, GATES = ".ffn_gate_inp", (".ssm_alpha", ".ssm_beta")  # F32 in every file; in a file of int4
KEPT = "per_layer_model_proj"  # in a file of int4, in its own float type
IGNORED = {  # linear layers that stay as they are, and what is no part of a language model; as in published files
    "gemma4": ["lm_head", "re:.*embed.*", "re:.*vision_tower.*", "re:.*vision_embedder.*", "re:.*audio_tower.*",
               "re:.*router.*"],
    "qwen3_5": ["lm_head", "re:.*embed.*", "re:.*visual.*", "re:.*linear_attn\\.in_proj_[ab]$", "re:.*mtp.*",
                "re:.*mlp\\.gate$", "re:.*shared_expert_gate$"],
}  # fmt: skip


@dataclass(kw_only=True)
class Row(Counts):
    """What became of one tensor."""

    name: str
    stored: str
    weights: int
    changed: int = 0  # weights that read back as others; for bf16 weights, as others in bf16
    error: float = 0.0  # relative Frobenius norm of the change


@dataclass
class Report:
    source: str
    destination: str
    to: str
    tensors: list
    dropped: list  # published names that the format has no place for
    notes: list

    @property
    def exact(self):
        return not any(row.changed for row in self.tensors)

    def as_dict(self):
        return {**asdict(self), "exact": self.exact}

    def text(self):
        """For people to read."""
        by_type = Counter(row.stored for row in self.tensors)
        lines = [f"{len(self.tensors)} tensors: " + ", ".join(f"{n} {dtype}" for dtype, n in by_type.most_common())]
        total, changed = Counts(), [row for row in self.tensors if row.changed]
        for row in self.tensors:
            if row.stored in INT4:
                total.add(row)
        if any(by_type[name] for name in INT4):
            counts = f"{total.kept:,} kept, {total.found:,} found on their lattice, {total.rounded:,} rounded"
            lines.append(f"int4 groups: {counts}; steps that had to be rounded: {total.steps:,}")
        if changed:
            worst = max(changed, key=lambda row: row.error)
            lines.append(f"rounded: {len(changed)} tensors, by {worst.error:.2g} at most ({worst.name})")
        lines += [f"left out: {', '.join(self.dropped)}"] * bool(self.dropped) + self.notes
        return "\n".join([*lines, "exact" if self.exact else "not exact"])


def convert(src, dst, to, progress=None):
    """Convert a folder, a GGUF file or a bundled model, by name -> Report.

    to: "f32", "q8_0" or "q4_0" (dst is a .gguf file), "compressed-tensors" or "bf16" (a folder). progress is called
    with bytes done and bytes in all, to be written and read again. CheckpointError, with nothing left behind, for what
    cannot be converted; nothing that exists is overwritten.
    """
    _check_destination(dst, to)
    source = open_source(src)
    return write_checkpoint(source, dst, to, progress, str(resolve(src)))


def _check_destination(dst, to):
    dst = Path(dst)
    if to not in FORMATS:
        raise CheckpointError(f"cannot convert to {show(to)}: one of {', '.join(FORMATS)} was expected")
    if (dst.suffix == ".gguf") != (to in FILE_TYPES):
        raise CheckpointError(f"{dst}: {to} is written to {'a .gguf file' if to in FILE_TYPES else 'a folder'}")
    if not dst.absolute().parent.is_dir():
        raise CheckpointError(f"{dst}: no such folder to write into")
    sweep(dst.absolute())
    refuse_existing(dst)


def refuse_existing(dst):
    """Raise CheckpointError where something is there already."""
    if dst.exists():
        raise CheckpointError(f"{dst}: is already there")


# What is written


def write_checkpoint(source, dst, to, progress=None, name="", compare=True):
    """Write a Source as in `convert` -> Report.

    compare: every weight read back is compared with the source's; else only the bytes with those that were made.
    """
    _check_destination(dst, to)
    dst, plan = Path(dst), _plan(source, to)
    size = sum(stored_bytes(key, tensor) for key, tensor in plan.tensors.items())
    meter = _Meter(progress, size * (3 if compare else 2))
    with temporary(dst.absolute(), Path.mkdir) as folder:
        path, sums = folder / dst.name if to in FILE_TYPES else folder / "model.safetensors", {}
        tensors = {key: meter.watch(key, tensor, sums) for key, tensor in plan.tensors.items()}
        if to in FILE_TYPES:
            write_gguf(path, _metadata(source, plan, to, name), tensors)
        else:
            for file, data in source.files.items():
                (folder / file).write_bytes(data)
            (folder / "config.json").write_text(as_json(_written_config(source, plan, to)), encoding="utf-8")
            write_safetensors(path, tensors, {"format": "pt"})
        _check_bytes(path, sums, meter)
        if compare:
            _compare(source, plan, path if to in FILE_TYPES else folder, meter, size)
        refuse_existing(dst)
        os.rename(path if to in FILE_TYPES else folder, dst)
    return Report(name, str(dst), to, list(plan.rows.values()), plan.dropped, source.notes)


class _Meter:
    """Progress, and a checksum of every tensor's bytes as they are made."""

    def __init__(self, progress, total):
        self.progress, self.total, self.done = progress, total, 0

    def add(self, size):
        self.done += size
        if self.progress:
            self.progress(self.done, self.total)

    def watch(self, name, tensor, sums):
        def chunks():
            sums[name] = 0
            for chunk in tensor.chunks():
                data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8)
                sums[name] = zlib.crc32(data, sums[name])
                yield data
                release(data)
                self.add(data.size)

        return replace(tensor, chunks=chunks)


@dataclass
class _Plan:
    tensors: dict  # {name in the file: Lazy}
    rows: dict = field(default_factory=dict)  # {published name: Row}
    dropped: list = field(default_factory=list)
    plain: list = field(default_factory=list)  # linear layers that a folder of int4 holds as floats
    packed: int = 0  # those that it holds as int4


def _plan(source, to):
    plan = _Plan(config_keys(source.config, source.parsed)[1] if to in FILE_TYPES else {})
    add = _add_to_gguf if to in FILE_TYPES else _add_to_folder
    for name, kind, weights in source.tensors:
        add(plan, source, to, name, kind, weights)
    if to in FILE_TYPES:
        plan.dropped += sorted(source.others)
        return plan
    plan.tensors |= {name: Lazy(raw.dtype, raw.shape, partial(list, [raw.data])) for name, raw in source.others.items()}
    return plan


def _add_to_gguf(plan, source, to, name, kind, weights):
    places = gguf_places(source.config, source.parsed, name)
    plan.dropped += [name] * (not places)
    for i, place in enumerate(places):
        some = weights[i :: len(places)]
        stored = "F32" if kind in FLOAT_KINDS else _gguf_type(place, kind, some[0], to, source.has_int4)
        row = plan.rows.setdefault(name, Row(name=name, stored=stored, weights=_count(weights)))
        if kind in FLOAT_KINDS:
            plan.tensors[place.name] = _vector(place, kind, some[0])
        else:
            shape = _shape(kind, some, fused=len(places) == 1 and "gate_up" in name)
            plan.tensors[place.name] = Lazy(stored, shape, partial(_encoded, some, place, stored, row))


def _count(weights):
    return sum(prod(weight.shape) for weight in weights)


def _shape(kind, weights, fused):
    """Of a matrix, or of all those of experts in one. fused: an expert's gate and up are one."""
    rows, columns = weights[0].shape
    parts = 2 if fused else 1
    return (len(weights) // parts, parts * rows, columns) if kind == "experts" else (rows, columns)


def _gguf_type(place, kind, weight, to, left_alone):
    """How a file holds a matrix. left_alone: plain weights are those that int4 QAT did not touch."""
    sample = in_order(some_rows(weight, 0, 1), place.head_order)
    if to == "f32" or ROUTER in place.name:
        return "F32"
    if weight.shape[-1] % GROUP:
        return "F16"
    if to == "q8_0" or is_int4(sample):
        return "Q8_0" if to == "q8_0" else "Q4_0"
    if any(gate in place.name for gate in GATES):
        return "F32"
    if place.name.startswith(KEPT) and isinstance(sample, Plain):
        return sample.dtype
    if kind == "embedding" or left_alone:
        return sample.type if isinstance(sample, Blocks) else "Q8_0"
    return "Q4_0"


def _vector(place, kind, weight):
    def chunks():
        x = weight.dequantize(np.float32)
        if kind == "zero_centred":
            x = x + np.float32(1)
        if place.name.endswith("ssm_a"):
            x = -np.exp(weight.dequantize(np.float64)).astype(np.float32)
        yield x if place.row_order is None else x.take(place.row_order, 0)

    shape = weight.shape if len(weight.shape) < 3 else (weight.shape[0], *weight.shape[2:])  # the convolution's 1
    return Lazy("F32", shape, chunks)


def _add_to_folder(plan, source, to, name, kind, weights):
    own = source.prefix + name.removeprefix("model.") if name.startswith("model.") else name
    size = _count(weights)
    if kind == "permutation":
        plan.tensors[own] = Lazy("I64", weights[0].shape, partial(list, weights))
        plan.rows[name] = Row(name=name, stored="I64", weights=size)
    elif kind in FLOAT_KINDS:
        dtype, array = _published_vector(kind, weights[0])
        plan.tensors[own] = Lazy(dtype, array.shape, partial(list, [array]))
        plan.rows[name] = Row(name=name, stored=dtype, weights=size)
    elif to == "compressed-tensors" and _packs(source, own, kind, weights[0]):
        plan.rows[name], plan.packed = Row(name=name, stored="int4", weights=size), plan.packed + len(weights)
        for each, weight in zip(_module_names(own, kind, len(weights)), weights):
            plan.tensors |= _packed_tensors(each, weight, plan.rows[name])
    else:
        dtype = _float_type(weights, to)
        row = plan.rows[name] = Row(name=name, stored=dtype, weights=size)
        shape = _shape(kind, weights, fused="gate_up" in name)
        plan.tensors[own] = Lazy(dtype, shape, partial(_encoded, weights, None, dtype, row))
        if kind == "linear":
            plan.plain.append(own.removesuffix(".weight"))


def _published_vector(kind, weight):
    """A vector as folders have them -> (dtype, array): bf16 where that is exact, else float32."""
    x = weight.dequantize(np.float64) - (kind == "plus_one")
    bits = float_to_bf16(x)
    back = bf16_to_float(bits, np.float32) + np.float32(kind == "plus_one")
    exact = np.array_equal(back, weight.dequantize(np.float32))
    return ("BF16", bits) if exact else ("F32", x.astype(np.float32))


def _float_type(weights, to):
    """How a folder holds matrices as floats: in bf16 if that is what was asked for, or exact; else as they were."""
    if to == "bf16" or not isinstance(weights[0], Plain) or all(map(_is_bf16, weights)):
        return "BF16"
    return weights[0].dtype


def _is_bf16(weight):
    if weight.dtype == "BF16":
        return True
    parts = (weight.rows(a, b, np.float64) for a, b in runs(weight))
    return all((narrow(w_RI, "BF16") == w_RI).all() for w_RI in parts)


def _module_names(name, kind, count):
    """The modules of a tensor: one, or of experts one for each matrix."""
    if kind != "experts":
        return [name.removesuffix(".weight")]
    stem, parts = name.rsplit(".", 1)[0], ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
    return [f"{stem}.{i // len(parts)}.{parts[i % len(parts)]}" for i in range(count)]


def _packs(source, name, kind, weight):
    """Whether compressed-tensors holds a weight as int4: it is, or it is a layer's, plain, where none is int4 yet."""
    sample = some_rows(weight, 0, 1)
    if kind == "embedding" or is_int4(sample):  # transformers packs no embedding
        return kind != "embedding"
    if source.has_int4 or weight.shape[-1] % GROUP:
        return False
    module = name.removesuffix(".weight")
    return not any(re.fullmatch(rule.removeprefix("re:"), module) for rule in _ignored(source.config))


def _ignored(config):
    return IGNORED["gemma4" if config["model_type"].startswith("gemma4") else "qwen3_5"]


def _written_config(source, plan, to):
    config = {k: v for k, v in source.config.items() if k != "quantization_config"}
    if to == "bf16" or not plan.packed:
        return config
    rules = (source.config.get("quantization_config") or {}).get("ignore") or _ignored(config)
    known = re.compile("|".join(rule.removeprefix("re:") for rule in rules))
    weights = {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
        "actorder": None, "block_structure": None, "observer": "memoryless_minmax", "observer_kwargs": {},
    }  # fmt: skip
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        **config,
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            "ignore": rules + [name for name in plan.plain if not known.fullmatch(name)],
            "config_groups": {"group_0": {**group, "format": "pack-quantized"}},
        },
    }


def _metadata(source, plan, to, name):
    architecture = architecture_of(source.config)
    mtp = any(key.startswith("mtp.") for key in plan.rows)
    text = source.keys
    if text is None and "tokenizer.json" in source.files:
        text = text_keys(architecture, source.files, source.parsed.vocab_size)
    return {
        "general.architecture": architecture,
        "general.type": "model",
        **({"general.name": Path(name).name.removesuffix(".gguf")} if name else {}),
        "general.file_type": FILE_TYPES[to],
        "general.quantization_version": 2,
        **config_keys(source.config, source.parsed, mtp)[0],
        **(text or {}),
    }


# Tensors, made while they are written


def _encoded(weights, place, stored, row):
    """The chunks of one tensor in the file; counts in the row what was done."""
    row_order, head_order = (place.row_order, place.head_order) if place else (None, None)

    def encode_rows(weight, start, stop):
        counts = Counts()
        part = some_rows(weight, start, stop)
        data = encode(in_order(part, head_order), stored, counts)
        release_all(part)
        return data, counts

    for data, counts in on_all_cores(encode_rows, ((w, *run) for w in weights for run in runs(w, row_order))):
        row.add(counts)
        yield data


def _packed_tensors(name, weight, row):
    """X.weight_packed, X.weight_scale and X.weight_shape of one weight, made some rows at a time."""
    O, I = weight.shape
    sample, scales = some_rows(weight, 0, 1), []
    is_stored = is_int4(sample)  # then the scales are there, and nothing has to be found
    dtype = as_int4(sample, Counts(), np.float32).scales.dtype if is_stored else "F32"

    def int4_rows(start, stop):
        counts, part = Counts(), some_rows(weight, start, stop)
        packed = as_int4(part, counts, np.float32)
        release_all(part)
        return packed, counts

    def packed_chunks():
        for part, counts in on_all_cores(int4_rows, runs(weight)):
            row.add(counts)
            scales.extend([] if is_stored else [part.scales.dequantize(np.float32)])
            yield part.packed

    def scale_chunks():
        if is_stored:
            yield from (int4_rows(*run)[0].scales.stored for run in runs(weight))
        yield from scales  # float32, they follow the packed codes in the file
        scales.clear()

    return {
        f"{name}.weight_packed": Lazy("I32", (O, I // 8), packed_chunks),
        f"{name}.weight_scale": Lazy(dtype, (O, I // GROUP), scale_chunks),
        f"{name}.weight_shape": Lazy("I64", (2,), partial(list, [np.array([O, I], np.int64)])),
    }


# What was written, read again


def _check_bytes(path, sums, meter):
    """The tensors in the file have the bytes that were made for them."""
    tensors = (read_header(path) if path.suffix == ".gguf" else read_safetensors(path)[::-1])[1]
    if tensors.keys() != sums.keys():
        raise CheckpointError(f"{path}: {len(tensors)} tensors, {len(sums)} were written")
    for name, raw in tensors.items():
        found = 0
        for part in (raw.data[at : at + READ] for at in range(0, raw.data.size, READ)):
            found = zlib.crc32(part, found)
            release(part)
            meter.add(part.size)
        if found != sums[name]:
            raise CheckpointError(f"{path}: {show(name)} reads back otherwise than it was written")


def _compare(source, plan, path, meter, size):
    """Every weight as the written checkpoint gives it, with the source's; fills in what changed in the rows."""
    written = {name: (kind, weights) for name, kind, weights in open_source(path).tensors}
    if written.keys() != plan.rows.keys():
        raise CheckpointError(f"{path}: {show(min(written.keys() ^ plan.rows.keys()))} is written or read, not both")
    total = sum(row.weights for row in plan.rows.values())
    for name, kind, weights in source.tensors:
        if name in plan.rows:
            row = plan.rows[name]
            _compare_weights(row, kind, weights, *written[name])
            if row.changed and not (row.rounded or row.steps or name.endswith("A_log")):
                raise CheckpointError(f"{path}: {show(name)}: {row.changed} weights read back as others")
            meter.add(size * row.weights // total)


def _compare_weights(row, kind, weights, new_kind, new_weights):
    is_bf16 = isinstance(weights[0], Plain) and weights[0].dtype == "BF16" and kind in MATRICES

    def compare_rows(old, new, start, stop):
        w, v = _values(old, kind, start, stop), _values(new, new_kind, start, stop)
        if not np.isfinite(w).all():
            raise CheckpointError(f"{show(row.name)}: NaN or infinite values")
        changed = int(((narrow(v, "BF16") if is_bf16 else v) != w).sum())
        return changed, float(np.square(v - w).sum()), float(np.square(w).sum())

    pairs = zip(weights, new_weights, strict=True)
    parts = (
        (*pair, *run) for pair in pairs for run in (runs(pair[0]) if kind in MATRICES else [(0, pair[0].shape[0])])
    )
    changed, square, whole = map(sum, zip(*on_all_cores(compare_rows, parts)))
    row.changed, row.error = changed, float(np.sqrt(square / whole)) if changed and whole else float(changed > 0)


def _values(weight, kind, start, stop):
    """Rows in float64; of a zero-centred vector with its 1, added in float32, as a forward has it."""
    if isinstance(weight, np.ndarray):
        return weight[start:stop]
    if kind in ("zero_centred", "plus_one"):
        return (weight.rows(start, stop, np.float32) + np.float32(kind == "zero_centred")).astype(np.float64)
    return weight.rows(start, stop, np.float64)
