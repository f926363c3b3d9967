"""Models larger than memory: packed weights pass through a few buffers, and pages of their file do not stay; what is
written is complete or not there.
"""

import json
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tiny import same_bits

import minimtp
from minimtp import convert, synth
from minimtp.backend import POOL_BYTES, arithmetic, matmul, tiles
from minimtp.checkpoint import CheckpointError, map_file, new_file, release
from minimtp.ggml import TYPES, Blocks
from minimtp.loading import published
from minimtp.quant import Plain, Quantized

ROOT = Path(minimtp.__file__).parents[1]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")


def config_file(folder, name="gemma-4-12b", **sizes):
    raw = {key: value for key, value in published(name).items() if not key.endswith("token_id")}
    vocab = {key: 1024 for key in ("vocab_size", "vocab_size_per_layer_input")}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(raw | {"text_config": raw["text_config"] | vocab | sizes}))
    return path


def weights(rows, columns):
    """A weight of every storage that is unpacked where it is used."""
    r = np.random.RandomState(0)
    scales = Plain((r.rand(rows, columns // 32) / 64).astype(np.float16), "F16")
    yield Quantized(r.randint(0, 256, (rows, columns // 2), np.uint8), scales)
    yield Plain(r.randint(0, 1 << 14, (rows, columns)).astype(np.uint16), "BF16")
    for type in ("Q4_0", "Q6_K"):
        data = r.randint(0, 256, (rows, TYPES[type].row_bytes(columns)), np.uint8)
        data.view(TYPES[type].record)["d"] = 1 / 64
        yield Blocks(data, type, (rows, columns))


# Buffers


@pytest.mark.parametrize("at", range(4), ids=["int4", "bf16", "Q4_0", "Q6_K"])
def test_tiles_are_unpacked_into_buffers_that_stay(at):
    w = list(weights(2200, 1280))[at]
    assert w.shape[0] * w.shape[1] * 4 > POOL_BYTES and len(tiles(*w.shape)) > 2
    x_TI = np.random.RandomState(1).standard_normal((5, 1280)).astype(np.float32)
    with arithmetic():
        first_TO, dense_OI = matmul(x_TI, w), w.dequantize(np.float32)
        for _ in range(3):
            matmul(x_TI, w)  # by now every thread of the pool has its own
        tracemalloc.start()
        assert same_bits(matmul(x_TI, w), first_TO)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1.5e6  # a tile is 4 MB
        assert same_bits(first_TO, matmul(x_TI, dense_OI))


def test_an_error_in_a_thread_is_raised():
    class Broken:
        shape = 4096, 1024

        def rows(self, start, stop, dtype, out):
            if start:
                raise CheckpointError("gone")
            return out

    with pytest.raises(CheckpointError, match="gone"):
        matmul(np.ones((1, 1024), np.float32), Broken())


def test_five_tokens_cost_little_more_than_one():
    """Weights are unpacked once for all. Quietly measured it is 1.3 to 1.4; a machine may be busy."""
    w = list(weights(2048, 2048))[2]
    x_TI = np.ones((5, 2048), np.float32)

    def seconds(x_TI):
        start = time.perf_counter()
        matmul(x_TI, w)
        return time.perf_counter() - start

    with arithmetic():
        assert min(seconds(x_TI) for _ in range(12)) < 2.5 * min(seconds(x_TI[:1]) for _ in range(12))


def test_progress_counts_layers(tmp_path):
    for name in ("tiny-gemma4", "tiny-qwen35"):
        target, seen = minimtp.load(name), []
        count = len(target.config.layers)
        target.forward([1, 2], target.new_cache(), progress=lambda *done: seen.append(done))  # noqa: B023
        assert seen == [(i + 1, count) for i in range(count)]


# Pages


def resident(key="RssFile"):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) << 10


@linux
def test_released_pages_are_not_resident_and_read_the_same(tmp_path):
    (tmp_path / "file").write_bytes(os.urandom(1 << 24))
    data = map_file(tmp_path / "file")
    part = data[5000:-5000].view("<u2").reshape(2, -1)[1]
    before, total = resident(), int(part.sum())
    assert resident() - before > 7 << 20
    release(part)
    assert resident() - before < 1 << 20 and int(part.sum()) == total
    release(np.zeros(9)), release(np.zeros((3, 3))[1:, ::2]), release(data[:0])  # what no file is under stays


MEASURED = """
import os
import sys
from pathlib import Path
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])  # every thread has buffers of its own
import numpy as np
import minimtp
from minimtp import convert, synth
command, *paths = sys.argv[1:]
if command == "synth":
    synth.synthesize(paths[0], paths[1], "q4_0", layers=6)
if command == "convert":
    convert.convert(paths[0], paths[1], "compressed-tensors")
if command == "forward":
    target = minimtp.load(paths[0], keep="packed")
    for ids in (range(5), range(40)):
        logits_TV = target.forward(np.array(ids), target.new_cache()).logits_TV
        assert np.isfinite(logits_TV).all()
status = Path("/proc/self/status").read_text().splitlines()
print(next(line for line in status if line.startswith("VmHWM")).split()[1])
"""


def peak_of(*arguments):
    """Peak resident memory in bytes of a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURED, *map(str, arguments)]
    return int(subprocess.run(command, check=True, capture_output=True, env=environment).stdout) << 10


@linux
def test_memory_does_not_grow_with_the_file(tmp_path):
    config = config_file(tmp_path, hidden_size=1024, intermediate_size=12288)
    path, bare = tmp_path / "model.gguf", peak_of("nothing")
    made = peak_of("synth", config, path)
    size = path.stat().st_size
    assert size > 160 << 20  # and as int4 in safetensors nearly as much
    used = {"synth": made, "forward": peak_of("forward", path), "convert": peak_of("convert", path, tmp_path / "c")}
    assert all(peak - bare < size / 3 for peak in used.values()), (size, bare, used)


# Interrupted


KILLED = """
import os, signal, sys, time
from pathlib import Path
import minimtp
from minimtp import convert, synth
source, to = sys.argv[1:3]
dst, expected = Path(sys.argv[3]), Path(sys.argv[4])
def make(path):
    if source.endswith(".json"):
        synth.synthesize(source, path, to, layers=6)
    else:
        convert.convert(source, path, to)
read = lambda path: b"".join(f.read_bytes() for f in (sorted(path.iterdir()) if path.is_dir() else [path]))
make(expected)
start = time.perf_counter()
make(dst)
whole, right, there = time.perf_counter() - start, read(expected), 0
os.rename(dst, dst.with_name("again"))
for i in range(20):
    pid = os.fork()
    if not pid:
        signal.setitimer(signal.ITIMER_REAL, whole * (i + 1) / 15)  # nobody handles it: it kills like -9
        make(dst)
        os._exit(0)
    os.waitpid(pid, 0)
    left = [path for path in dst.parent.iterdir() if path.name.startswith(f".{dst.name}.")]
    assert len(left) <= 1, left
    if dst.exists():
        assert read(dst) == right
        there += 1
        os.rename(dst, dst.with_name(f"done-{i}"))
make(dst)
assert read(dst) == right and not [path for path in dst.parent.iterdir() if path.name.startswith(".")]
assert there < 20
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("command", ["synth", "convert"])
def test_what_a_kill_leaves_is_complete_or_not_there(command, tmp_path):
    config = config_file(tmp_path, hidden_size=64, intermediate_size=256)
    source, to = config, "q4_0"
    if command == "convert":
        synth.synthesize(config, tmp_path / "source.gguf", "q4_0", layers=6)
        source, to = tmp_path / "source.gguf", "compressed-tensors"
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
    name = "m.gguf" if command == "synth" else "m"  # which is written in the file, too
    arguments = [str(source), to, str(tmp_path / "x" / name), str(tmp_path / "y" / name)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    """The second neither sweeps away what the first is writing, nor mixes with it."""
    with new_file(tmp_path / "x") as first:
        first.write(b"1" * 9)
        with new_file(tmp_path / "x") as second:
            second.write(b"2" * 5)
        assert (tmp_path / "x").read_bytes() == b"2" * 5 and len(list(tmp_path.iterdir())) == 2
    assert (tmp_path / "x").read_bytes() == b"1" * 9 and len(list(tmp_path.iterdir())) == 1


def test_what_others_left_for_another_name_stays(tmp_path):
    names = [".x.0123abcd.tmp", ".x.gguf.0123abcd.tmp", ".x.notours!.tmp", ".y.0123abcd.tmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"half")
    with new_file(tmp_path / "x"):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*names[1:], "x"])


def test_nothing_that_appears_meanwhile_is_overwritten(tmp_path, monkeypatch):
    path = tmp_path / "x.gguf"
    config = config_file(tmp_path, hidden_size=64, intermediate_size=64)
    check = convert._check_bytes
    monkeypatch.setattr(convert, "_check_bytes", lambda *_: (check(*_), path.write_bytes(b"mine")))
    with pytest.raises(CheckpointError, match="is already there"):
        synth.synthesize(config, path, "q4_0", layers=6)
    assert path.read_bytes() == b"mine" and sorted(p.name for p in tmp_path.iterdir()) == [config.name, "x.gguf"]
