"""The tensors of a checkpoint become the parameters of a model: each is used exactly once, or skipped by name."""

from collections import Counter
from types import SimpleNamespace

import numpy as np

from .backend import Rounded
from .checkpoint import CheckpointError, show
from .formats import parse_quantization, read_weight
from .ggml import Blocks
from .memory import component_of
from .mobile import ACTIVATION_SCALES, MobileConfig, cache_scales, read_scalar
from .plan import available_memory
from .quant import Plain, Quantized

PREFIXES = ("model.language_model.", "language_model.model.")  # spellings of "model."
VECTORS = ("vector", "zero_centred", "plus_one")  # kinds of tensors that are always unpacked


def read_parameters(checkpoint, family, config, dtype, keep):
    """The parameters as a tree of names; every tensor of the checkpoint is used exactly once, or skipped by name."""
    if keep == "auto":
        dense_bytes = sum(int(np.prod(shape)) for _, shape, _ in family.tensors(config).values()) * dtype.itemsize
        keep = "dense" if dense_bytes <= available_memory() // 2 else "packed"
    params = SimpleNamespace(layers=[SimpleNamespace() for _ in config.layers])
    for _, kind, found in read_weights(checkpoint, family, config):
        for at, value in found:
            if not isinstance(value, np.ndarray):
                value = _unpacked(value, dtype, kind in VECTORS or keep == "dense")
            _plant(params, at, value + 1 if kind == "zero_centred" else value)
    if hasattr(params, "embed_tokens") and not hasattr(params, "lm_head"):
        params.lm_head = params.embed_tokens
    return params


def read_weights(checkpoint, family, config):
    """The tensors of the family's table, one by one -> (published name, kind, [(place in the parameters, value)]).

    A value is a weight, of experts a list of weights for each matrix, or a permutation; a "zero_centred" vector whose
    1 is already added is "plus_one". CheckpointError, at the end, for tensors of the checkpoint that are left over.
    """
    quantization, prefix = parse_quantization(checkpoint.config), find_prefix(checkpoint)
    tensors = {name: raw for name, raw in checkpoint.tensors.items() if family.owns(name)}
    table = _settle_head(family.tensors(config), tensors, prefix)
    for place, (published, shape, kind) in table.items():
        name = prefix + published.removeprefix("model.") if published.startswith("model.") else published
        has_one = kind == "zero_centred" and getattr(tensors.get(name), "plus_one", False)
        found = list(READERS[kind](tensors, place, name, shape, quantization))
        yield published, "plus_one" if has_one else kind, found
    for name in cache_scales(tensors) if isinstance(quantization, MobileConfig) else ():  # which no forward uses
        del tensors[name]
    if tensors:
        more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
        raise CheckpointError(f"{checkpoint.folder}: unknown tensor {show(min(tensors))}{more}")


def stored_parts(checkpoint, family, config):
    """{(component, type): bytes} of what a model uses of a checkpoint, as stored there. Raises CheckpointError."""
    parts = Counter()
    for _, _, found in read_weights(checkpoint, family, config):
        for place, value in found:
            for weight in value if isinstance(value, list) else [value]:
                type, size = _stored(weight)
                parts[component_of(place), type] += size
    return parts


def _stored(weight):
    """(type, bytes) of what read_weights gives."""
    match weight:
        case Rounded():
            return _stored(weight.weight)
        case Plain():
            return weight.dtype, weight.stored.nbytes
        case Blocks():
            return weight.type, weight.data.nbytes
        case Quantized():
            zeros = 0 if weight.zeros is None else weight.zeros.nbytes
            return f"INT{weight.bits}", weight.packed.nbytes + weight.scales.stored.nbytes + zeros
        case _:
            return "I64", weight.nbytes


def find_prefix(checkpoint):
    """What this checkpoint writes where the tables say "model."."""
    return next((p for p in PREFIXES if any(name.startswith(p) for name in checkpoint.tensors)), "model.")


def _settle_head(table, tensors, prefix):
    """The table, with a head of its own where one is stored though the configuration ties it to the embedding.

    transformers uses such a head, with a warning. One that is a copy of the embedding, which some exports have, is
    taken out of the tensors instead.
    """
    if "lm_head" in table or "embed_tokens" not in table or not _has_head(tensors):
        return table
    if _is_copy(tensors, prefix):
        del tensors["lm_head.weight"]
        return table
    return table | {"lm_head": ("lm_head.weight", *table["embed_tokens"][1:])}


def _has_head(tensors):
    return any(name.startswith("lm_head.") for name in tensors)


def _is_copy(tensors, prefix):
    """Whether lm_head.weight is the embedding again."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get(f"{prefix}embed_tokens.weight")
    if head is None or embedding is None or (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return False
    blocks = range(0, len(head.data), 1 << 20)
    return all(np.array_equal(head.data[at : at + (1 << 20)], embedding.data[at : at + (1 << 20)]) for at in blocks)


def notes(checkpoint, family, config):
    """What its tensors say about a checkpoint beyond its configuration -> lines for people to read."""
    tensors, lines = {name: raw for name, raw in checkpoint.tensors.items() if family.owns(name)}, []
    if getattr(config, "tied", False) and _has_head(tensors):
        copy = _is_copy(tensors, find_prefix(checkpoint))
        found = "a copy of the embedding, read as one with it" if copy else "not the embedding, and used"
        lines.append(f"lm_head is stored, though tie_word_embeddings is true: it is {found}")
    if rounded := sum(read_scalar(raw) > 0 for name, raw in tensors.items() if name.endswith(ACTIVATION_SCALES)):
        lines.append(f"activations are rounded to 8 bits: {rounded} scales of inputs and outputs")
    if scales := cache_scales(tensors).values():
        lines.append(f"{len(scales)} cache scales, {min(scales):.4g} to {max(scales):.4g}: not used")
    return lines


# Readers of the kinds of tensors that a family's table names: each takes what it reads out of `tensors` and yields
# (place in the parameters, value).


def _read_linear(tensors, place, name, shape, quantization):
    base = name.removesuffix(".weight")
    weight, names = read_weight(tensors, base, quantization)
    said = quantization.describe(base) if quantization and not isinstance(weight, Plain) else ""
    _check_shape(name, weight, shape, said)
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


def _check_shape(name, weight, shape, said=""):
    if weight.shape != shape:
        raise CheckpointError(f"{show(name)} is {list(weight.shape)}{said}, expected {list(shape)}")


def _unpacked(weight, dtype, dense):
    """The weight (or list of them) checked, and as a dense array where asked for."""
    if isinstance(weight, list):
        return [_unpacked(one, dtype, dense) for one in weight]
    if isinstance(weight, Rounded):
        return weight._replace(weight=_unpacked(weight.weight, dtype, dense))
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
