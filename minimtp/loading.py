"""A path becomes a model: family, configuration, parameters, tokenizer, drafter. Strict; every error names a thing."""

import hashlib
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from . import gemma4, gemma4_assistant
from .backend import array_module
from .cache import CacheError
from .checkpoint import CheckpointError, bf16_to_float, float_to_bf16, open_checkpoint, read_json, show
from .drafting import GemmaAssistant, PromptLookup
from .quant import Plain, check_finite, parse_quantization, read_weight
from .text import Tokenizer, load_chat_template, load_tokenizer

TARGETS = (gemma4,)
DRAFTERS = {gemma4_assistant: GemmaAssistant}
DTYPES = ("float32", "float64")
KEEPS = ("packed", "dense", "auto")
PREFIXES = ("model.language_model.", "language_model.model.")  # spellings of "model."


@dataclass(frozen=True, eq=False)
class Target:
    """A loaded target model. Holds weights and configuration only; a sequence lives in its cache."""

    folder: Path
    family: ModuleType
    config: object
    params: SimpleNamespace
    tokenizer: Tokenizer | None
    dtype: np.dtype
    backend: str
    fingerprint: str
    generation_config: dict

    def new_cache(self, capacity=None):
        """An empty cache for at most `capacity` tokens (None: the model's context, memory grown as needed)."""
        limit = self.config.max_position_embeddings
        if capacity is not None and not 1 <= capacity <= limit:
            raise CacheError(f"a cache of {capacity} tokens does not suit a context of {limit}")
        return self.family.new_cache(self.config, self.dtype, capacity, self.fingerprint, self.backend)

    def load_cache(self, path, capacity=None):
        """The cache that `cache.save(path)` wrote. Raises CacheError or CheckpointError if it is not this model's."""
        cache = self.new_cache(capacity)
        cache.restore(path)
        return cache

    def forward(self, ids_T, cache, taps=(), last=None):
        """Read ids_T after what the cache holds -> layers.Output, with logits of the last `last` rows (None: all).

        Raises ValueError for ids that cannot be read, CacheError for another model's cache or a full one; the cache is
        then as before.
        """
        if cache.fingerprint != self.fingerprint:
            raise CacheError("this cache belongs to another model, or to other weights or another dtype")
        return self.family.forward(self.params, self.config, ids_T, cache, self.dtype, taps, last)

    def chat_template(self):
        """The checkpoint's ChatTemplate, or None."""
        return load_chat_template(self.folder)

    def embed(self, ids_T):
        """The tokens' embeddings as the first layer sees them -> [T, D]."""
        return self.family.embed(self.params, self.config, ids_T, self.dtype)

    @property
    def stop_ids(self):
        """Ids that end a text, from generation_config.json."""
        ids = self.generation_config.get("eos_token_id", [])
        return tuple(ids) if isinstance(ids, list) else (ids,)


def open_model(path, role=None):
    """Open a checkpoint folder, or a bundled model by name -> (Checkpoint, family module, configuration); no weights.

    role: "target" or "drafter" to insist on one. Raises CheckpointError.
    """
    checkpoint = open_checkpoint(resolve(path))
    return checkpoint, *_parse(checkpoint.config, checkpoint.folder, role)


def _parse(config, where, role=None):
    """(family, configuration) of a config.json."""
    kind = config.get("model_type")
    for family in (*TARGETS, *DRAFTERS):
        if kind in family.MODEL_TYPES:
            if role not in (None, "drafter" if family in DRAFTERS else "target"):
                raise CheckpointError(f"{where}: model type {kind!r} is not a {role}")
            return family, family.parse_config(config)
    known = ", ".join(name for family in (*TARGETS, *DRAFTERS) for name in family.MODEL_TYPES)
    raise CheckpointError(f"{where}: unknown model type {show(kind)}: expected one of {known}")


def load(path, backend="numpy", dtype="float32", keep="auto", embed_scale="exact"):
    """Load a target model from a checkpoint folder, or the name of a bundled one -> Target.

    dtype: "float32", or "float64", the ground truth that errors are measured against. keep: weights "packed" as
    stored, unpacked at every use, or unpacked once ("dense"); "auto" unpacks where half of the free memory allows it.
    embed_scale: sqrt(hidden size) "exact", or rounded to "bf16" as transformers does where it computes in bf16.
    Raises CheckpointError or BackendError, one line that names the thing.
    """
    for name, value, known in (
        ("dtype", dtype, DTYPES),
        ("keep", keep, KEEPS),
        ("embed_scale", embed_scale, ("exact", "bf16")),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    array_module(backend)
    checkpoint, family, config = open_model(path, "target")
    if embed_scale == "bf16":
        config = replace(config, embed_scale=float(bf16_to_float(float_to_bf16(config.embed_scale))))
    return Target(
        folder=checkpoint.folder,
        family=family,
        config=config,
        params=_read_params(checkpoint, family, config, np.dtype(dtype), keep),
        tokenizer=load_tokenizer(checkpoint.folder, config.vocab_size),
        dtype=np.dtype(dtype),
        backend=backend,
        fingerprint=_fingerprint(checkpoint, dtype, embed_scale),
        generation_config=_generation_config(checkpoint.folder),
    )


def published_config(name):
    """(family module, configuration) of a published model by name. Raises ValueError naming those there are."""
    table = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    if name not in table:
        raise ValueError(f"no published configuration {name!r}: there are {', '.join(table)}")
    return _parse(table[name], "published.json")


def load_drafter(path, target, keep="auto", **options):
    """Load a drafter for a target -> drafting.Drafter.

    path: a checkpoint folder or bundled name; "auto": the assistant beside the target's folder (`NAME-assistant`);
    "lookup": prompt lookup, which needs no weights. options: the drafter's own (see drafting). Raises CheckpointError
    where there is none or it does not fit the target.
    """
    if path == "lookup":
        return PromptLookup(**options)
    folder = find_drafter(target) if path == "auto" else resolve(path)
    if folder is None:
        raise CheckpointError(f"no drafter for {target.folder}: no {target.folder.name}-assistant beside it")
    checkpoint, family, config = open_model(folder, "drafter")
    family.check_fits(config, target.config)
    params = _read_params(checkpoint, family, config, target.dtype, keep)
    return DRAFTERS[family](params, config, target, **options)


def find_drafter(target):
    """The folder of the assistant beside the target's, or None."""
    folder = target.folder.resolve()
    beside = folder.parent / f"{folder.name}-assistant"
    return beside if beside.is_dir() else None


def bundled(name):
    """A model's folder (or a file) that comes with the project: in the installed package, or beside it, or None."""
    package = Path(__file__).resolve().parent
    places = (package / "weights" / name, package.parent / "weights" / name)
    return next((place for place in places if place.exists()), None)


def resolve(path):
    """The path itself where something is there, else the bundled model of that name, else the path."""
    path = Path(path)
    is_name = len(path.parts) == 1 and not path.is_absolute()
    return path if path.exists() or not is_name else bundled(path.name) or path


def _read_params(checkpoint, family, config, dtype, keep):
    """The parameters as a tree of names; every tensor of the checkpoint is used exactly once, or skipped by name."""
    quantization = parse_quantization(checkpoint.config)
    table = family.tensors(config)
    tensors, prefix = _wanted_tensors(checkpoint, family.SKIPPED, table), _prefix(checkpoint)
    if keep == "auto":
        dense_bytes = sum(int(np.prod(shape)) for _, shape, _ in table.values()) * dtype.itemsize
        keep = "dense" if dense_bytes <= _free_memory() // 2 else "packed"
    params = SimpleNamespace(layers=[SimpleNamespace() for _ in config.layers])
    for place, (name, shape, kind) in table.items():
        name = prefix + name.removeprefix("model.") if name.startswith("model.") else name
        for at, value in READERS[kind](tensors, place, name, shape, quantization):
            if not isinstance(value, np.ndarray):
                value = _unpacked(value, dtype, kind == "vector" or keep == "dense")
            _plant(params, at, value)
    if tensors:
        more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
        raise CheckpointError(f"{checkpoint.folder}: unknown tensor {show(min(tensors))}{more}")
    return params


def _prefix(checkpoint):
    """What this checkpoint writes where the tables say "model."."""
    return next((p for p in PREFIXES if any(name.startswith(p) for name in checkpoint.tensors)), "model.")


def _wanted_tensors(checkpoint, skipped, table):
    """The checkpoint's tensors, less other towers' and the second copy of a tied head that some exports have."""
    tensors = {name: raw for name, raw in checkpoint.tensors.items() if not name.startswith(skipped)}
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
    check_finite(weight)
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


def _fingerprint(checkpoint, *settings):
    """A hash of the configuration, the settings, and every tensor's name, shape and a sample of its bytes."""
    digest = hashlib.sha256(json.dumps([checkpoint.config, settings], sort_keys=True).encode())
    for name, raw in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {raw.dtype} {raw.shape}".encode())
        sample = (raw.data[:1024], raw.data[-1024:], raw.data[:: max(1, raw.data.size // 16)])
        digest.update(b"".join(part.tobytes() for part in sample))
    return digest.hexdigest()


def _generation_config(folder):
    """The folder's generation_config.json, nulls left out, or {}. Raises CheckpointError where its ids are none."""
    path = folder / "generation_config.json"
    fields = {k: v for k, v in read_json(path).items() if v is not None} if path.is_file() else {}
    for name in ("eos_token_id", "suppress_tokens"):
        ids = fields.get(name, [])
        ids = [ids] if name == "eos_token_id" and type(ids) is int else ids
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise CheckpointError(f"{path}: {name} is {show(ids)}, expected token ids")
    return fields
