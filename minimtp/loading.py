"""A path becomes a model: family, configuration, parameters, tokenizer, drafter. Strict; every error names a thing."""

import hashlib
import json
import math
import re
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np

from . import gemma4, gemma4_assistant, kv_storage, qwen35, qwen35_mtp
from .backend import BackendError, arithmetic
from .cache import CacheError
from .checkpoint import Checkpoint, CheckpointError, bf16_to_float, float_to_bf16, open_checkpoint, release, show
from .device import Device, open_device
from .device_weights import parameters_on
from .drafting import GemmaAssistant, MtpLayer, PromptLookup
from .gguf_model import open_gguf
from .layers import Output, Taps, token_ids
from .memory import component_of
from .parameters import read_parameters, stored_parts
from .plan import available_memory, make_plan
from .text import Tokenizer, load_chat_template, load_tokenizer

TARGETS = (gemma4, qwen35)
DRAFTERS = {gemma4_assistant: GemmaAssistant, qwen35_mtp: MtpLayer}
DTYPES = ("float32", "float64")
KEEPS = ("packed", "dense", "auto")
DRAFTER_FILE = re.compile(r"mtp-.*|.*-assistant")  # the names of GGUF files that hold drafters
PART = re.compile(r"-(\d{5})-of-\d{5}$")


@dataclass(frozen=True, eq=False)
class Target:
    """A loaded target model. Holds weights and configuration only; a sequence lives in its cache."""

    checkpoint: Checkpoint
    family: ModuleType
    config: object
    params: SimpleNamespace
    tokenizer: Tokenizer | None
    dtype: np.dtype
    device: Device | None  # None: NumPy
    fingerprint: str
    generation_config: dict
    path: Path  # what was opened: a folder, or one file
    has_mtp: bool  # whether it holds its drafter, too
    kv: str | None = None  # the storage of its caches' keys and values; None: as dtype

    @property
    def folder(self):
        """The checkpoint's folder; of a GGUF checkpoint, its file."""
        return self.checkpoint.folder

    @cached_property
    def _stored(self):
        return stored_parts(self.checkpoint, self.family, self.config)

    def new_cache(self, capacity=None):
        """An empty cache for at most `capacity` tokens (None: the model's context, memory grown as needed)."""
        limit = self.config.max_position_embeddings
        if capacity is not None and not 1 <= capacity <= limit:
            raise CacheError(f"a cache of {capacity} tokens does not suit a context of {limit}")
        if self.device is not None and self.device.memory is not None:
            _check_device(
                self.device, self.folder, self.config, self._stored, capacity or 1, self.kv or self.dtype.name
            )
        settings = self.fingerprint, self.device, self.kv, self.params
        return self.family.new_cache(self.config, self.dtype, capacity, *settings)

    def load_cache(self, path, capacity=None):
        """The cache that `cache.save(path)` wrote. Raises CacheError or CheckpointError if it is not this model's."""
        cache = self.new_cache(capacity)
        cache.restore(path)
        if max(cache.tokens, default=0) >= self.config.vocab_size:
            raise CacheError(f"{path} holds token {max(cache.tokens)} of a vocabulary of {self.config.vocab_size}")
        return cache

    def forward(self, ids_T, cache, taps=(), last=None, progress=None):
        """Read ids_T after what the cache holds -> layers.Output, with logits of the last `last` rows (None: all).

        progress, if given, is called with the number of layers done, and of all, after each.
        Raises ValueError for ids that cannot be read, CacheError for another model's cache or a full one; the cache is
        then as before.
        """
        if cache.fingerprint != self.fingerprint:
            raise CacheError("this cache belongs to another model, or to other weights, another dtype or KV storage")
        ids_T = token_ids(ids_T, self.config.vocab_size, self.config.placeholders)
        if last is not None and last < 0:
            raise ValueError(f"last is {last}, wanted None or a number of rows")
        tap = Taps(taps, len(self.config.layers), progress)
        read = partial(self.family.forward, self.params, self.config, cache, self.dtype, tap, last)
        with arithmetic(), cache.reading(ids_T) as start:
            key, positions_T = None if taps else ("target", last), np.arange(start, start + len(ids_T))
            logits_TV, hidden_TD, *before_norm = cache.run(read, ids_T, positions_T, writes=cache.layers, key=key)
            if cache.drafter is not None:
                cache.drafter.note(*before_norm)
        return Output(logits_TV, hidden_TD, *tap.collected())

    def chat_template(self):
        """The checkpoint's ChatTemplate, or None."""
        return load_chat_template(self.checkpoint)

    def embed(self, ids_T):
        """The tokens' embeddings as the first layer sees them -> [T, D]."""
        return self.family.embed(self.params, self.config, ids_T, self.dtype)

    @property
    def stop_ids(self):
        """Ids that end a text, from generation_config.json."""
        ids = self.generation_config.get("eos_token_id", [])
        return tuple(ids) if isinstance(ids, list) else (ids,)


def open_model(path, role=None):
    """Open a checkpoint folder, a GGUF file, or a bundled model by name -> (Checkpoint, family module, configuration).

    role: "target" or "drafter" to insist on one; of a file with both, the target is it unless the drafter is asked for.
    A folder without config.json may hold one target as a GGUF file. No weight is read yet. Raises CheckpointError.
    """
    path = resolve(path)
    if path.is_dir() and not (path / "config.json").exists():
        path = _gguf_in(path) or path
    checkpoint = open_gguf(path) if path.suffix == ".gguf" and not path.is_dir() else open_checkpoint(path)
    if role == "drafter":
        checkpoint = getattr(checkpoint, "drafter", None) or checkpoint
    return checkpoint, *parse_model(checkpoint.config, checkpoint.folder, role)


def _gguf_in(folder):
    """The one GGUF model in a folder, drafters aside, or None. CheckpointError where there are several."""
    found = _gguf_files(folder) or _gguf_files(folder, drafters=True)
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several models: open one of {', '.join(file.name for file in found)}")
    return found[0] if found else None


def _gguf_files(folder, drafters=False):
    """Its GGUF files, of a split one the first, without projectors of images: those of targets, or of drafters."""
    files = [file for file in sorted(folder.glob("*.gguf")) if "mmproj" not in file.name]
    firsts = [file for file in files if (part := PART.search(file.stem)) is None or int(part[1]) == 1]
    return [file for file in firsts if bool(DRAFTER_FILE.fullmatch(PART.sub("", file.stem))) == drafters]


def parse_model(config, where, role=None):
    """(family module, configuration) of a config.json. Raises CheckpointError."""
    kind = config.get("model_type")
    known = {"target": TARGETS, "drafter": tuple(DRAFTERS)}.get(role, (*TARGETS, *DRAFTERS))
    family = next((family for family in known if kind in family.MODEL_TYPES), None)
    if family is None:
        if role and any(kind in family.MODEL_TYPES for family in (*TARGETS, *DRAFTERS)):
            raise CheckpointError(f"{where}: model type {kind!r} is not a {role}")
        names = ", ".join(dict.fromkeys(name for family in known for name in family.MODEL_TYPES))
        raise CheckpointError(f"{where}: unknown model type {show(kind)}: expected one of {names}")
    return family, family.parse_config(config)


def load(path, backend="numpy", dtype="float32", keep="auto", embed_scale="exact", kv=None):
    """Load a target model from a checkpoint folder or GGUF file, or by the name of a bundled one -> Target.

    dtype: "float32", or "float64", the ground truth that errors are measured against. keep: weights "packed" as
    stored, unpacked at every use, or unpacked once ("dense"); "auto" unpacks where half of the free memory allows it.
    embed_scale: sqrt(hidden size) "exact", or rounded to "bf16" as transformers does where it computes in bf16. kv: how
    caches keep keys and values, one of kv_storage.NAMES (None: as dtype).
    Raises CheckpointError or BackendError, one line that names the thing, or plan.DoesNotFit, one with the numbers.
    """
    for name, value, known in (
        ("dtype", dtype, DTYPES),
        ("keep", keep, KEEPS),
        ("embed_scale", embed_scale, ("exact", "bf16")),
        ("kv", kv or dtype, kv_storage.NAMES),
    ):
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
    device = open_device(backend)
    if device is not None and dtype != "float32":
        raise BackendError(f"backend {backend!r} computes in float32, not in {dtype}")
    checkpoint, family, config = open_model(path, "target")
    keep = keep if device is None else "packed"
    _check_room(checkpoint, family, config, np.dtype(dtype), keep)
    if device is not None and device.memory is not None:
        _check_device(device, checkpoint.folder, config, stored_parts(checkpoint, family, config), 1, kv or dtype)
    if embed_scale == "bf16" and hasattr(config, "embed_scale"):
        config = replace(config, embed_scale=float(bf16_to_float(float_to_bf16(config.embed_scale))))
    return Target(
        checkpoint=checkpoint,
        family=family,
        config=config,
        params=_parameters(checkpoint, family, config, np.dtype(dtype), keep, device),
        tokenizer=load_tokenizer(checkpoint, config.vocab_size),
        dtype=np.dtype(dtype),
        device=device,
        fingerprint=fingerprint(checkpoint, dtype, embed_scale, *[kv] * (kv not in (None, dtype))),
        generation_config=_generation_config(checkpoint),
        path=resolve(path),
        has_mtp=holds_drafter(checkpoint),
        kv=kv,
    )


def _parameters(checkpoint, family, config, dtype, keep, device):
    """As read_parameters, on the device if there is one; what is unpacked in the host's memory is vectors only."""
    params = read_parameters(checkpoint, family, config, dtype, keep)
    return params if device is None else parameters_on(device, params)


def holds_drafter(checkpoint):
    """Whether a target's checkpoint holds its drafter, too."""
    return any(map(qwen35_mtp.owns, checkpoint.tensors)) or getattr(checkpoint, "drafter", None) is not None


def _check_room(checkpoint, family, config, dtype, keep):
    """Raise plan.DoesNotFit where weights are to be unpacked that the machine has no memory for.

    Packed ones, and those stored in the run's own dtype, stay in their file: the system gives their pages back.
    """
    if keep == "dense":
        weights, own = Counter(), {"float32": "F32", "float64": "F64"}[dtype.name]
        for place, (_, shape, kind) in family.tensors(config).items():
            if kind != "unused":
                weights[component_of(place), dtype.name] += math.prod(shape) * dtype.itemsize
        room = available_memory() + checkpoint.stored_bytes().get(own, 0)
        plan = make_plan(str(checkpoint.folder), config, weights, 1, dtype.name, memory=room, driver=0, scratch=0)
        plan.check(" that are free: keep packed leaves weights in their file")


def _check_device(device, folder, config, weights, context, storage):
    """Raise DoesNotFit where a device has no memory for a model and a cache for so many tokens."""
    make_plan(str(folder), config, weights, context, storage, memory=device.memory).check()


def published(name):
    """The config.json of a published model by name. Raises ValueError naming those there are."""
    table = json.loads((Path(__file__).parent / "published.json").read_text(encoding="utf-8"))
    if name not in table:
        raise ValueError(f"no published configuration {name!r}: there are {', '.join(table)}")
    return table[name]


def published_config(name):
    """(family module, configuration) of a published model by name. Raises ValueError naming those there are."""
    return parse_model(published(name), "published.json")


def load_drafter(path, target, keep="auto", **options):
    """Load a drafter for a target -> drafting.Drafter.

    path: a checkpoint folder, GGUF file or bundled name; "auto": the target's own drafter, or the assistant beside it
    (`NAME-assistant`, `NAME-assistant.gguf` or `mtp-NAME.gguf`); "lookup": prompt lookup, which needs no weights.
    options: the drafter's own (see drafting).
    Raises CheckpointError where there is none or it does not fit the target.
    """
    if path == "lookup":
        return PromptLookup(**options)
    folder = find_drafter(target) if path == "auto" else resolve(path)
    if folder is None:
        beside = " or ".join(path.name for path in _beside(target))
        raise CheckpointError(f"no drafter for {target.folder}: no mtp.* tensors in it, and no {beside} beside it")
    checkpoint, family, config = open_drafter(folder, target)
    keep = keep if target.device is None else "packed"
    _check_room(checkpoint, family, config, target.dtype, keep)
    params = _parameters(checkpoint, family, config, target.dtype, keep, target.device)
    return DRAFTERS[family](params, config, target, **options)


def open_drafter(path, target):
    """Open the drafter of a target, of which family and config are looked at -> as open_model.

    Raises CheckpointError where it is none or does not fit.
    """
    checkpoint, family, config = open_model(path, "drafter")
    if not any(map(family.owns, checkpoint.tensors)):
        raise CheckpointError(f"{checkpoint.folder} has no mtp.* tensors, so no drafter")
    if family.TARGET is not target.family:
        raise CheckpointError("drafter does not fit its target: it is another family's")
    family.check_fits(config, target.config)
    return checkpoint, family, config


def find_drafter(target):
    """The target's own checkpoint where it holds a drafter, else where the assistant beside it is, or None."""
    if target.has_mtp:
        return target.path
    found = [path for path in _beside(target) if path.exists()]
    if target.folder.suffix == ".gguf" and target.path.is_dir() and not found:
        found = _gguf_files(target.path, drafters=True)
        found = found if len(found) == 1 else []
    return found[0] if found else None


def _beside(target):
    """Where an assistant is looked for: beside the target's folder, or its GGUF file."""
    if target.folder.suffix != ".gguf" or target.folder.is_dir():
        path = target.folder.resolve()
        return [path.with_name(f"{path.name}-assistant")]
    stem, folder = PART.sub("", target.folder.stem), target.folder.parent
    return [folder / name for name in (f"{stem}-assistant.gguf", f"mtp-{stem}.gguf", f"{stem}-assistant")]


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


def fingerprint(checkpoint, *settings):
    """A hash of the configuration, the settings, and every tensor's name, shape and a sample of its bytes."""
    digest = hashlib.sha256(json.dumps([checkpoint.config, settings], sort_keys=True).encode())
    for name, raw in sorted(checkpoint.tensors.items()):
        digest.update(f"{name} {raw.dtype} {raw.shape}".encode())
        sample = (raw.data[:1024], raw.data[-1024:], raw.data[:: max(1, raw.data.size // 16)])
        digest.update(b"".join(part.tobytes() for part in sample))
        release(raw.data)
    return digest.hexdigest()


def _generation_config(checkpoint):
    """What generation_config.json says, nulls left out. Raises CheckpointError where its ids are none."""
    fields = {k: v for k, v in checkpoint.settings("generation_config").items() if v is not None}
    for name in ("eos_token_id", "suppress_tokens"):
        ids = fields.get(name, [])
        ids = [ids] if name == "eos_token_id" and type(ids) is int else ids
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise CheckpointError(f"{checkpoint.folder}: generation_config: {name} is {show(ids)}, expected token ids")
    return fields
