"""The tensors of a checkpoint become the parameters of a model: each is used exactly once, or skipped by name."""

import os
from types import SimpleNamespace

import numpy as np

from .checkpoint import CheckpointError, show
from .formats import parse_quantization, read_weight
from .quant import Plain

PREFIXES = ("model.language_model.", "language_model.model.")  # spellings of "model."
VECTORS = ("vector", "zero_centred")  # kinds of tensors that are always unpacked


def read_parameters(checkpoint, family, config, dtype, keep):
    """The parameters as a tree of names; every tensor of the checkpoint is used exactly once, or skipped by name."""
    quantization = parse_quantization(checkpoint.config)
    table = family.tensors(config)
    tensors, prefix = _wanted_tensors(checkpoint, family, table), _prefix(checkpoint)
    if keep == "auto":
        dense_bytes = sum(int(np.prod(shape)) for _, shape, _ in table.values()) * dtype.itemsize
        keep = "dense" if dense_bytes <= _free_memory() // 2 else "packed"
    params = SimpleNamespace(layers=[SimpleNamespace() for _ in config.layers])
    for place, (name, shape, kind) in table.items():
        name = prefix + name.removeprefix("model.") if name.startswith("model.") else name
        less_one = kind == "zero_centred" and not getattr(tensors.get(name), "plus_one", False)
        for at, value in READERS[kind](tensors, place, name, shape, quantization):
            if not isinstance(value, np.ndarray):
                value = _unpacked(value, dtype, kind in VECTORS or keep == "dense")
            _plant(params, at, value + 1 if less_one else value)
    if tensors:
        more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
        raise CheckpointError(f"{checkpoint.folder}: unknown tensor {show(min(tensors))}{more}")
    return params


def _prefix(checkpoint):
    """What this checkpoint writes where the tables say "model."."""
    return next((p for p in PREFIXES if any(name.startswith(p) for name in checkpoint.tensors)), "model.")


def _wanted_tensors(checkpoint, family, table):
    """The checkpoint's tensors that are the family's, less the second copy of a tied head that some exports have."""
    tensors = {name: raw for name, raw in checkpoint.tensors.items() if family.owns(name)}
    head, embedding = tensors.get("lm_head.weight"), tensors.get(f"{_prefix(checkpoint)}embed_tokens.weight")
    if "lm_head" not in table and head is not None and embedding is not None:
        same = (head.dtype, head.shape) == (embedding.dtype, embedding.shape)
        if same and np.array_equal(head.data, embedding.data):
            del tensors["lm_head.weight"]
    return tensors


# Readers of the kinds of tensors that a family's table names: each takes what it reads out of `tensors` and yields
# (place in the parameters, value).


def _read_linear(tensors, place, name, shape, quantization):
    weight, names = read_weight(tensors, name.removesuffix(".weight"), quantization)
    _check_shape(name, weight, shape)
    for used in names:
        del tensors[used]
    yield place, weight


def _read_vector(tensors, place, name, shape, quantization):
    raw = _take(tensors, name)
    weight = Plain(raw.stored(), raw.dtype, raw.name)
    _check_shape(name, weight, shape)
    yield place, weight


def _read_unused(tensors, place, name, shape, quantization):
    """A tensor that some exports carry and no layer uses: dropped where it is there, after a look at its shape."""
    stem = name.removesuffix("weight")
    if any(key.startswith(stem) for key in tensors):
        list(_read_linear(tensors, place, name, shape, quantization))
    yield from ()


def _read_permutation(tensors, place, name, shape, quantization):
    raw = _take(tensors, name)
    _check_shape(name, raw, shape)
    if raw.dtype != "I64" or not np.array_equal(np.sort(raw.stored()), np.arange(shape[0])):
        raise CheckpointError(f"{raw.file}: {show(name)} is not an I64 permutation of 0..{shape[0] - 1}")
    yield place, raw.stored().copy()


def _read_experts(tensors, place, name, shape, quantization):
    """All experts in one tensor (gate rows before up rows), or one tensor for each -> a list of weights per matrix."""
    (count, rows, columns), stem = shape, name.rsplit(".", 1)[1]
    parts = ("gate_proj", "up_proj") if stem == "gate_up_proj" else (stem,)
    height = rows // len(parts)
    fused = _take(tensors, name) if name in tensors else None
    if fused is not None:
        _check_shape(name, fused, shape)
    for i, part in enumerate(parts):
        if fused is not None:
            split = fused.stored()[:, i * height : (i + 1) * height]
            weights = [Plain(split[e], fused.dtype, name) for e in range(count)]
        else:
            names = (f"{name.removesuffix(stem)}{e}.{part}.weight" for e in range(count))
            weights = [next(_read_linear(tensors, "", n, (height, columns), quantization))[1] for n in names]
        yield place.replace(stem, part), weights


READERS = {
    "linear": _read_linear,
    "embedding": _read_linear,
    "vector": _read_vector,
    "zero_centred": _read_vector,
    "experts": _read_experts,
    "permutation": _read_permutation,
    "unused": _read_unused,
}


def _take(tensors, name):
    if name not in tensors:
        raise CheckpointError(f"tensor {show(name)} is missing")
    return tensors.pop(name)


def _check_shape(name, weight, shape):
    if weight.shape != shape:
        raise CheckpointError(f"{show(name)} is {list(weight.shape)}, expected {list(shape)}")


def _unpacked(weight, dtype, dense):
    """The weight (or list of them) checked, and as a dense array where asked for."""
    if isinstance(weight, list):
        return [_unpacked(one, dtype, dense) for one in weight]
    weight.check_finite()
    if not dense:
        return weight
    with np.errstate(over="ignore"):
        array = weight.dequantize(dtype)
    if getattr(weight, "dtype", None) == "F64" and not np.isfinite(array).all():
        raise CheckpointError(f"{show(weight.name)}: values beyond {dtype}")
    return array


def _plant(params, place, value):
    """Set `layers.3.q_proj` and the like."""
    if place.startswith("layers."):
        _, index, place = place.split(".")
        params = params.layers[int(index)]
    setattr(params, place, value)


def _free_memory():
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 4 << 30
