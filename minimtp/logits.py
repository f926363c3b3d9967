"""A prompt's logits and taps in one safetensors file, for prompts of any length; what is interrupted can be continued.

The prompt is read in chunks that begin at fixed places, so a run that was interrupted ends with the same bits as one
that was not. Until all is there the file is called NAME.partial: its layout is final, its rows are filled in as they
come. After each chunk the cache is saved beside it, as NAME.partial-cache. It says how far the rows can be trusted, so
they are on the disk before it is. With the last chunk the file takes its name, and the cache goes.
"""

import hashlib
import os
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # not on Windows: there two runs of the same file are not kept apart
    fcntl = None

from . import __version__
from .checkpoint import CheckpointError, read_safetensors, safetensors_header, sweep
from .generate import CHUNK, placeholders, spans
from .golden import TOP, WHOLE, tap_names, top_entries
from .layers import token_ids

FORMAT = "minimtp-logits 1"
BLOCK = 16  # rows whose largest entries are looked for at a time, in float64


def write_logits(target, ids_T, path, taps=(), rows=None, top=None, chunk=CHUNK, restart=False, progress=None):
    """Read a prompt and write what the target makes of it to a safetensors file -> a report, as a dict.

    taps: names as in golden runs. rows: logits of the last so many positions only (None: of all). top: the largest so
    many of each row and its logsumexp; 0: whole rows; None: whole ones where the vocabulary is small. chunk: tokens
    read at a time. restart: forget what an interrupted run left. progress is called with the layers done of all chunks,
    and those there are.

    A file that is there is left as it is, if this run would make it. Raises CheckpointError where it, or what an
    interrupted run left, is another run's; ValueError for what cannot be read or asked for; OSError if the disk will
    not have it: what was done by then can be continued.
    """
    config, path = target.config, Path(path)
    ids_T = token_ids(ids_T, config.vocab_size, placeholders(target))
    if len(ids_T) > (context := config.max_position_embeddings):
        raise ValueError(f"a prompt of {len(ids_T)} tokens does not fit a context of {context}")
    if chunk < 1 or (rows is not None and rows < 1) or (top is not None and top < 0):
        raise ValueError(f"chunk {chunk}, rows {rows}, top {top}: expected at least 1, 1 and 0")
    rows = len(ids_T) if rows is None else min(rows, len(ids_T))
    top = (0 if config.vocab_size <= WHOLE else TOP) if top is None else min(top, config.vocab_size)
    taps = _in_order(taps, len(config.layers))
    layout, job = _layout(config, len(ids_T), taps, rows, top), _job(target, ids_T, taps, rows, top, chunk)
    unfinished, saved = (path.with_name(path.name + end) for end in (".partial", ".partial-cache"))
    report = {"output": str(path), "tokens": len(ids_T), "rows": rows, "continued_at": len(ids_T)}
    if path.exists():
        _check_job(path, job)
        saved.unlink(missing_ok=True)
        return report
    with _alone_with(unfinished) as file:
        if restart:
            file.truncate(0)
        places = _begin(file, unfinished, saved, layout, job, ids_T)
        cache = _cache_after(target, ids_T, chunk, saved)
        report["continued_at"] = cache.length
        chunks = spans(len(ids_T), chunk)
        for i in range(cache.length // chunk, len(chunks)):
            counted = None if progress is None else partial(_count, progress, i, len(chunks))
            _put_all(file, places, _read_chunk(target, ids_T, chunks[i], cache, taps, rows, top, counted))
            _to_disk(file)
            cache.commit()
            if cache.length < len(ids_T):
                cache.save(saved)
        os.replace(unfinished, path)
    saved.unlink(missing_ok=True)
    return report


def _count(progress, chunk, chunks, done, layers):
    progress(chunk * layers + done, chunks * layers)


def _read_chunk(target, ids_T, span, cache, taps, rows, top, progress):
    """Read a chunk -> {name: (number of the first row, rows)} of all that is kept of it."""
    start, stop = span
    first = max(start, len(ids_T) - rows)  # of the positions whose logits are kept
    out = target.forward(ids_T[start:stop], cache, taps, max(0, stop - first), progress)
    found = {name: (start, out.taps[name]) for name in taps}
    if first < stop:
        found |= {name: (first + rows - len(ids_T), x) for name, x in _kept(out.logits_TV, top).items()}
    return found


# What is in the file


def _in_order(taps, layers):
    """The taps that were asked for, in the order of a pass, each once. Raises ValueError for one that is none."""
    known = [*tap_names(layers), *(f"layer.{i}.in" for i in range(layers))]
    if unknown := set(taps) - set(known):
        raise ValueError(f"unknown tap {min(unknown)!r}: expected embed, layer.N.in|attn|mlp|out or final_norm")
    return [name for name in known if name in taps]


def _layout(config, tokens, taps, rows, top):
    """{name: (stored dtype, shape)} of everything in the file."""
    layout = {"ids": ("I64", (tokens,)), **{name: ("F32", (tokens, config.hidden_size)) for name in taps}}
    if not top:
        return {**layout, "logits": ("F32", (rows, config.vocab_size))}
    tops = {"logits.top": ("F32", (rows, top)), "logits.top_ids": ("I64", (rows, top))}
    return {**layout, **tops, "logits.logsumexp": ("F32", (rows, 1))}


def _kept(logits_TV, top):
    """What is kept of rows of logits -> {name: [T, ...]}."""
    if not top:
        return {"logits": logits_TV}
    blocks = [top_entries("logits", logits_TV[a:b], top) for a, b in spans(len(logits_TV), BLOCK)]
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _job(target, ids_T, taps, rows, top, chunk):
    """Everything the bits depend on, as the file's metadata: two runs are the same where this is."""
    return {
        "format": FORMAT,
        "model": target.path.name,
        "fingerprint": target.fingerprint,
        "dtype": str(target.dtype),
        "prompt": hashlib.sha256(np.array(ids_T, "<i8").tobytes()).hexdigest(),
        "rows": str(rows),
        "top": str(top),
        "taps": ",".join(taps),
        "chunk": str(chunk),
        "versions": f"minimtp {__version__}, numpy {np.__version__}",
    }


def _check_job(path, job):
    """Raise CheckpointError unless the file is this run's."""
    found = read_safetensors(path)[1]
    if other := [name for name, value in job.items() if found.get(name) != value]:
        what = "what another run left" if path.suffix == ".partial" else "there already, another run's"
        raise CheckpointError(f"{path}: {what} (other {', '.join(other)}): delete it, or choose another output")


# How it gets there


@contextmanager
def _alone_with(path):
    """The file of that name, made where there is none, for this process alone. Raises CheckpointError."""
    with open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.path.samestat(os.stat(path), os.fstat(file.fileno()))
        except (BlockingIOError, FileNotFoundError):
            mine = False
        if not mine:
            raise CheckpointError(f"{path}: another run is at work on it")
        yield file


def _begin(file, unfinished, saved, layout, job, ids_T):
    """Lay the file out, or go on with what is laid out -> {name: (begin, end)} of its tensors' bytes.

    All its room is taken now, so a disk that is too small says so now. The file's first bytes are written last.
    """
    header, places = safetensors_header(layout, job)
    if any(file.read(8)):
        _check_job(unfinished, job)
        sweep(saved)
        return places
    saved.unlink(missing_ok=True)
    size = max(end for _, end in places.values())
    try:
        file.truncate(0)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        file.truncate(size)
    except OSError as error:
        unfinished.unlink()
        raise OSError(error.errno, f"{error.strerror}: {size} bytes are needed", str(unfinished)) from None
    file.seek(8)
    file.write(header[8:])
    _put(file, places["ids"], 0, np.array(ids_T, "<i8"))
    _to_disk(file)
    file.seek(0)
    file.write(header[:8])
    return places


def _put_all(file, places, found):
    for name, (row, x) in found.items():
        _put(file, places[name], row, x.astype(np.int64 if name.endswith("_ids") else np.float32, copy=False))


def _put(file, place, row, array):
    """Write rows of a tensor, the first of them its row-th."""
    file.seek(place[0] + row * array[:1].nbytes)
    file.write(np.ascontiguousarray(array))


def _to_disk(file):
    file.flush()
    os.fsync(file.fileno())


def _cache_after(target, ids_T, chunk, saved):
    """The cache as an interrupted run left it, or a new one; room for all at once, so that both are laid out alike."""
    if not saved.exists():
        return target.new_cache(len(ids_T))
    cache = target.load_cache(saved, len(ids_T))
    if cache.tokens != ids_T[: cache.length] or cache.length % chunk:
        raise CheckpointError(f"{saved}: not what a run of this prompt left: delete it, or restart")
    return cache
