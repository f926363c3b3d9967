"""Checkpoint files: what other programs wrote is read exactly, and whatever is wrong in one is said in one line."""

import json
import math
import os
import random
import re
import struct
import tracemalloc

import numpy as np
import pytest
import safetensors
from safetensors.numpy import load_file, save_file

from minimtp.checkpoint import (
    DTYPES,
    CheckpointError,
    bf16_to_float,
    float_to_bf16,
    open_checkpoint,
    read_safetensors,
    write_safetensors,
)
from minimtp.config import config_value

rng = np.random.default_rng(2)
KINDS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1")
ARRAYS = {f"a.{kind}": (100 * rng.standard_normal((3, 5))).astype(kind) for kind in KINDS} | {
    "scalar": np.array(2.5, np.float32),
    "empty": np.zeros((0, 7), np.float16),
    "four": rng.standard_normal((2, 1, 3, 2)).astype(np.float32),
}


def handmade(header, data=b"", length=None):
    """The bytes of a safetensors file with this header (a dict, or bytes that claim to be JSON)."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin=0, end=8, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def read_bytes(tmp_path, data):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    return read_safetensors(path)


def refused(message, call, *arguments):
    """The call raises CheckpointError, in one line that matches."""
    with pytest.raises(CheckpointError, match=message) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 800
    return str(caught.value)


# Right files


def test_reads_what_the_safetensors_library_wrote(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors", metadata={"format": "np"})
    tensors, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert metadata == {"format": "np"} and tensors.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        stored = tensors[name].stored()
        assert tensors[name].shape == stored.shape == array.shape
        assert stored.dtype == array.dtype and stored.tobytes() == array.tobytes()


def test_the_safetensors_library_reads_what_we_write(tmp_path):
    odd = {"transposed": ARRAYS["four"].transpose(3, 1, 0, 2), "big-endian": np.arange(5, dtype=">f4"), "": np.array(7)}
    write_safetensors(tmp_path / "x.safetensors", ARRAYS | odd, {"fingerprint": "é\n"})
    back = load_file(tmp_path / "x.safetensors")
    for name, array in (ARRAYS | odd).items():
        assert back[name].shape == array.shape and np.array_equal(back[name], array)
    with safetensors.safe_open(tmp_path / "x.safetensors", "np") as file:
        assert file.metadata() == {"fingerprint": "é\n"}
    for extra in range(8):  # however long the header is
        write_safetensors(tmp_path / "x.safetensors", ARRAYS, {"x": "x" * extra})
        ours = read_safetensors(tmp_path / "x.safetensors")[0]
        assert all(tensor.stored().flags.aligned for tensor in ours.values())


def test_bf16_and_bool_are_written_and_read_as_their_bits(tmp_path):
    bits = np.array([[0x3F80, 0xC040, 0x7F80]], np.uint16)
    write_safetensors(tmp_path / "x.safetensors", {"w": ("BF16", bits), "b": np.array([True, False])})
    raw = {name: spec for name, spec in safetensors.deserialize((tmp_path / "x.safetensors").read_bytes())}
    assert raw["w"]["dtype"] == "BF16" and raw["w"]["data"] == bits.tobytes() and raw["b"]["dtype"] == "BOOL"
    w = read_safetensors(tmp_path / "x.safetensors")[0]["w"]
    assert w.dtype == "BF16" and np.array_equal(w.stored(), bits)
    for dtype in ("float32", np.float64):
        assert w.to(dtype).dtype == dtype and np.array_equal(w.to(dtype), [[1.0, -3.0, np.inf]])


def test_floats_widen_exactly_and_integers_are_not_floats(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    tensors = read_safetensors(tmp_path / "x.safetensors")[0]
    for name in ("a.f2", "a.f4", "a.f8", "scalar", "empty"):
        wide = tensors[name].to("float64")
        assert wide.flags.writeable and wide.dtype == np.float64 and np.array_equal(wide, ARRAYS[name])
    refused("x.safetensors: 'a.i4' is I32, not a float", tensors["a.i4"].to, "float32")


def test_stored_is_a_read_only_view_of_the_mapped_file(tmp_path):
    save_file(ARRAYS, tmp_path / "x.safetensors")
    for tensor in read_safetensors(tmp_path / "x.safetensors")[0].values():
        stored = tensor.stored()
        assert not stored.flags.writeable and (np.shares_memory(stored, tensor.data) or not stored.size)
        with pytest.raises(ValueError, match="read-only"):
            stored.reshape(-1)[:] = 0


def test_opening_a_large_file_takes_neither_memory_nor_time(tmp_path):
    path, size = tmp_path / "x.safetensors", 1 << 32
    path.write_bytes(handmade({"a": entry(0, size, (size,), "U8")}))
    os.truncate(path, path.stat().st_size + size)  # a sparse file: 4 GiB that the disk does not hold
    tracemalloc.start()
    tensor = read_safetensors(path)[0]["a"]
    assert tensor.stored()[-1] == 0 and tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_a_header_may_name_tensors_in_any_order(tmp_path):
    tensors = read_bytes(tmp_path, handmade({"b": entry(8, 16), "a": entry(0, 8)}, bytes(range(16))))[0]
    assert tensors["a"].data.tolist() == list(range(8)) and tensors["b"].data.tolist() == list(range(8, 16))


def test_data_at_odd_positions(tmp_path):
    header = json.dumps({"a": entry(0, 1, (1,), "I8"), "b": entry(1, 9), "c": entry(9, 13, (2,), "BF16")}).encode()
    header += b" " * (len(header) % 2 == 0)  # the data begins at an odd byte
    data = struct.pack("<bff", -7, 1.5, -2.25) + struct.pack("<HH", 0x3F80, 0xC000)
    tensors = read_bytes(tmp_path, handmade(header, data))[0]
    assert tensors["a"].stored() == [-7]
    assert np.array_equal(tensors["b"].to("float32"), [1.5, -2.25])
    assert np.array_equal(tensors["b"].stored() * 2, [3, -4.5])
    assert np.array_equal(tensors["c"].to("float64"), [1.0, -2.0])


# bfloat16


def test_every_bf16_pattern_is_the_upper_half_of_a_float32():
    bits = np.arange(1 << 16, dtype=np.uint16)
    truth = [struct.unpack("<f", struct.pack("<HH", 0, b))[0] for b in range(1 << 16)]
    for dtype in (np.float32, np.float64):
        with np.errstate(invalid="ignore"):  # some of the patterns are signalling NaNs
            wide = bf16_to_float(bits, dtype)
        assert wide.dtype == dtype and np.array_equal(wide, np.array(truth, dtype), equal_nan=True)
    back = float_to_bf16(bf16_to_float(bits))
    nan = np.isnan(truth)
    assert np.array_equal(back[~nan], bits[~nan]) and np.isnan(bf16_to_float(back[nan])).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_to_bf16_is_to_nearest_even(dtype):
    values = np.array([struct.unpack("<f", struct.pack("<HH", 0, b))[0] for b in range(0x7F80)])  # 0 and up, finite
    at = rng.integers(0, len(values) - 1, 5000)
    middle = (values[at] + values[at + 1]) / 2  # exact in double, and in float32
    even = at + at % 2
    tiny = np.spacing(middle.astype(dtype)).astype(np.float64)
    for x, nearest in ((middle, even), (middle + tiny, at + 1), (middle - tiny, at)):
        assert np.array_equal(float_to_bf16(x.astype(dtype)), nearest)
        assert np.array_equal(float_to_bf16(-x.astype(dtype)), nearest + 0x8000)
    assert np.array_equal(float_to_bf16(np.array([3.4e38, -np.inf, 0.0, -0.0], dtype)), [0x7F80, 0xFF80, 0, 0x8000])
    assert float_to_bf16(np.float64(1e300)) == 0x7F80 and float_to_bf16(np.float16(1.5)) == 0x3FC0
    nans = np.array([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000], np.uint32).view(np.float32)  # none may round away
    with np.errstate(invalid="ignore"):
        assert np.isnan(bf16_to_float(float_to_bf16(nans.astype(dtype)))).all()


# Wrong files

A, B = entry(0, 8), entry(8, 16)
DATA = bytes(range(16))
WRONG = {
    "empty file": (b"", "truncated: 0 bytes"),
    "no room for a length": (b"\1\0\0", "truncated: 3 bytes"),
    "length beyond the file": (handmade({"a": A}, DATA[:8], 5000), "truncated: header of 5000 bytes in a file of"),
    "length a little beyond the file": (handmade({}, b"", 3), "truncated: header of 3 bytes in a file of 10"),
    "absurd length": (handmade({"a": A}, DATA[:8], 2**63 + 5), f"header length {2**63 + 5} is above"),
    "just too long": (handmade({"a": A}, DATA[:8], 100_000_001), "header length 100000001 is above"),
    "not JSON": (handmade(b'{"a": '), "header: not JSON"),
    "not UTF-8": (handmade(b'{"\xff": 1}'), "header: not JSON"),
    "UTF-16": (handmade('{"a": 1}'.encode("utf-16")), "header: not JSON"),
    "nested too deeply": (handmade(b"[" * 100_000), "header: not JSON"),
    "too many digits": (handmade(b'{"a": ' + b"9" * 5000 + b"}"), "header: not JSON"),
    "a list": (handmade([1]), r"header: a JSON object was expected, not \[1\]"),
    "key twice": (handmade(b'{"a": 1, "a": 1}'), "header: key 'a' appears twice"),
    "inner key twice": (
        handmade(b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [8], "data_offsets": [0, 8]}}', DATA[:8]),
        "header: key 'dtype' appears twice",
    ),
    "metadata not texts": (handmade({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata not a table": (handmade({"__metadata__": "a"}), "__metadata__"),
    "entry not a table": (handmade({"a": 5}), "'a': not a table of dtype, shape and data_offsets: 5"),
    "entry incomplete": (handmade({"a": {"dtype": "F32", "shape": [0]}}), "'a': not a table of dtype"),
    "entry with more": (handmade({"a": A | {"strides": [1]}}, DATA[:8]), "'a': not a table of dtype"),
    "unknown dtype": (handmade({"a": A | {"dtype": "F31"}}, DATA[:8]), "'a': unknown dtype 'F31'"),
    "wrong shape": (handmade({"a": A | {"shape": [3]}}, DATA[:8]), r"'a': F32 \[3\] does not fill data_offsets"),
    "wrong width": (handmade({"a": A | {"dtype": "F64"}}, DATA[:8]), "'a': F64 .* does not fill"),
    "outside": (handmade({"a": A, "b": entry(8, 16)}, DATA[:12]), "'b' ends at byte 16 of 12"),
    "far outside": (handmade({"a": entry(2**62, 2**62 + 8)}, DATA[:8]), "'a' ends at byte"),
    "overlap": (handmade({"a": A, "b": entry(4, 12)}, DATA[:12]), "'b' overlaps"),
    "overlap inside": (handmade({"a": entry(0, 16, (4,)), "b": entry(4, 12)}, DATA), "'b' overlaps"),
    "hole": (handmade({"a": A, "b": entry(12, 20)}, DATA + DATA), "4 bytes before 'b' belong to no tensor"),
    "begins late": (handmade({"b": B}, DATA), "8 bytes before 'b' belong to no tensor"),
    "bytes behind": (handmade({"a": A}, DATA), "8 bytes after the last tensor"),
    "backwards": (handmade({"a": entry(8, 0)}, DATA[:8]), r"does not fill data_offsets \[8, 0\]"),
    "negative sizes": (handmade({"a": entry(0, 8, (-1, -2))}, DATA[:8]), "'a': shape .* is not a list of sizes"),
    "too many dimensions": (handmade({"a": entry(0, 4, (1,) * 65)}, DATA[:4]), "'a': shape .* is not a list of sizes"),
    "empty but vast": (handmade({"a": entry(0, 0, (0, 2**40, 2**40))}), "'a': shape .* is too large"),
    "a hostile name": (handmade({"a\n\x1b\ud800" * 500: A}), r"'a\\n\\x1b\\ud800a.*'.* ends at byte"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file_is_refused_in_one_line(tmp_path, case):
    data, message = WRONG[case]
    assert "x.safetensors: " in refused(message, read_bytes, tmp_path, data)


NUMBERS = [-1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, -(2**63), 10**300, 0.0, 8.0, 0.5, math.nan, math.inf, True, None]
HOSTILE = [*NUMBERS, "8", "F32", "", [], [[]], {}, [0], [0, 8], [0, 8, 8], [1e9], ["a"], {"a": 1}]


def test_hostile_values_anywhere_in_the_header(tmp_path):
    def outcome(entry):
        data = handmade({"a": entry, "b": entry_b}, DATA)
        try:
            tensors = read_bytes(tmp_path, data)[0]
        except CheckpointError:
            return "refused"
        return sorted((name, t.dtype, t.shape, t.stored().tobytes()) for name, t in tensors.items())

    entry_b = B
    right = outcome(A)
    assert right == [("a", "F32", (2,), DATA[:8]), ("b", "F32", (2,), DATA[8:])]
    variants = [value for value in HOSTILE]
    variants += [A | {key: value} for key in A for value in HOSTILE]
    variants += [A | {"data_offsets": pair} for value in HOSTILE for pair in ([value, 8], [0, value])]
    variants += [A | {"shape": shape} for value in HOSTILE for shape in ([value], [2, value], [value, 2])]
    results = [(variant, outcome(variant)) for variant in variants if variant != A]
    accepted = [variant for variant, result in results if result != "refused"]
    assert [str(variant["shape"]) for variant in accepted] == ["[2]"] * len(accepted), accepted  # A itself, no other


def test_hostile_numbers_are_not_quietly_equal(tmp_path):
    """8.0 == 8 and True == 1 in Python, not in the format."""
    refused("data_offsets", read_bytes, tmp_path, handmade({"a": A | {"data_offsets": [False, 8]}}, DATA[:8]))
    refused("data_offsets", read_bytes, tmp_path, handmade({"a": A | {"data_offsets": [0, 8.0]}}, DATA[:8]))
    refused("shape", read_bytes, tmp_path, handmade({"a": A | {"shape": [2, True]}}, DATA[:8]))


# Folders


def folder(path, config='{"model_type": "x"}', **files):
    """A model folder; files: name (without .safetensors) -> {tensor: array}; index: a weight_map, a text, or None."""
    path.mkdir(exist_ok=True)
    index = files.pop("index", None)
    if config is not None:
        (path / "config.json").write_text(config)
    for name, arrays in files.items():
        save_file(arrays, path / f"{name}.safetensors")
    if index is not None:
        text = index if isinstance(index, str) else json.dumps({"metadata": {}, "weight_map": index})
        (path / "model.safetensors.index.json").write_text(text)
    return path


ONE, TWO = {"a": np.arange(3.0)}, {"b": np.arange(4.0), "c": np.arange(5.0)}
SHARDS = {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}


def test_open_a_folder_a_file_and_shards(tmp_path):
    single = folder(tmp_path / "single", model=ONE | TWO)
    sharded = folder(tmp_path / "sharded", one=ONE, two=TWO, index=SHARDS)
    both = folder(tmp_path / "both", model=ONE | TWO, index={"x": "elsewhere.safetensors"})  # as transformers chooses
    for path in (single, sharded, both, single / "model.safetensors", str(single)):
        checkpoint = open_checkpoint(path)
        assert checkpoint.config == {"model_type": "x"} and checkpoint.folder.name in str(path)
        assert sorted(checkpoint.tensors) == ["a", "b", "c"]
        assert all(np.array_equal(checkpoint.tensors[name].stored(), array) for name, array in (ONE | TWO).items())
    assert sorted(open_checkpoint(sharded / "two.safetensors").tensors) == ["b", "c"]


def test_a_hub_cache_of_symlinks_is_read(tmp_path):
    blobs = folder(tmp_path / "blobs", one=ONE, two=TWO, index=SHARDS)
    (tmp_path / "snapshot").mkdir()
    for file in blobs.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../blobs/{file.name}")
    assert sorted(open_checkpoint(tmp_path / "snapshot").tensors) == ["a", "b", "c"]


INDEX = "model.safetensors.index.json: "
WRONG_FOLDERS = {
    "no config": (dict(config=None, model=ONE), "config.json: no such file"),
    "config not JSON": (dict(config="{", model=ONE), "config.json: not JSON"),
    "config empty": (dict(config="", model=ONE), "config.json: not JSON"),
    "config a list": (dict(config="[]", model=ONE), r"config.json: a JSON object was expected, not \[\]"),
    "config key twice": (dict(config='{"a": 1, "a": 2}', model=ONE), "config.json: key 'a' appears twice"),
    "no weights": (dict(other=ONE), "no model.safetensors and no model.safetensors.index.json"),
    "index not JSON": (dict(index="]"), INDEX + "not JSON"),
    "index without map": (dict(index="{}"), INDEX + "weight_map is not a table"),
    "index map of numbers": (dict(index={"a": 1}), INDEX + "weight_map is not a table"),
    "index of no file": (dict(index={"a": "one.safetensors"}), "one.safetensors: no such file"),
    "index of the folder": (dict(index={"a": "."}), "no such file"),
    "tensor not in shard": (dict(one=ONE, two=TWO, index=SHARDS | {"d": "one.safetensors"}), "one.*: no tensor 'd'"),
    "tensor in other shard": (dict(one=ONE, two=TWO, index=SHARDS | {"c": "one.safetensors"}), "'c' is not in the"),
    "tensor not in index": (dict(two=TWO, index={"b": "two.safetensors"}), "'c' is not in the index"),
    "tensor in both": (dict(one=ONE, two=TWO | ONE, index=SHARDS), "two.safetensors: 'a' is also in one.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FOLDERS)
def test_a_wrong_folder_is_refused_in_one_line(tmp_path, case):
    files, message = WRONG_FOLDERS[case]
    refused(message, open_checkpoint, folder(tmp_path / "model", **files))


OUTSIDE = ["../x.safetensors", "sub/../../x.safetensors", "{}/x.safetensors", "..\\x.safetensors", "C:x.safetensors",
           "\\\\host\\share\\x.safetensors", "x\0.safetensors", "x\n.safetensors", "\ud800.safetensors",
           "x" * 5000]  # fmt: skip


@pytest.mark.parametrize("file", OUTSIDE)
def test_an_index_may_not_point_outside_its_folder(tmp_path, file):
    save_file(ONE, tmp_path / "x.safetensors")
    path = folder(tmp_path / "model", index={"a": file.format(tmp_path)})
    refused("index.json: .* is not a file inside the folder", open_checkpoint, path)


def test_missing_and_unreadable_paths(tmp_path):
    refused("nowhere: no such file or folder", open_checkpoint, tmp_path / "nowhere")
    refused("no such file or folder", open_checkpoint, tmp_path / ("x" * 300))
    refused("no such file or folder", open_checkpoint, str(tmp_path / "x") + "\0")
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait forever
    refused("no such file", open_checkpoint, tmp_path / "pipe.safetensors")
    refused("one.safetensors: no such file", open_checkpoint, folder(tmp_path / "model", index=SHARDS))


# Writing


def test_writing_replaces_whole_files_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ONE)
    before = path.read_bytes()
    mislabelled = [("BF16", np.zeros(2, np.float32)), ("F32", np.zeros(2, np.int32)), ("BF16", np.zeros(2, np.float16))]
    for wrong in (np.zeros(2, complex), np.array(["a"]), np.array([None]), ("Q4", b""), *mislabelled):
        refused("cannot store 'w'", write_safetensors, path, {"a": np.zeros(3), "w": wrong})
    refused("cannot store '__metadata__'", write_safetensors, path, {"__metadata__": np.zeros(3)})
    refused("metadata", write_safetensors, path, ONE, {"step": 3})

    def full(*_):
        raise OSError(28, "No space left on device")

    for function in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, function, full)
            write_safetensors(path, TWO)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]
    write_safetensors(path, TWO)
    assert sorted(load_file(path)) == ["b", "c"] and os.listdir(tmp_path) == ["x.safetensors"]


def test_nothing_reaches_the_name_before_it_is_on_the_disk(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: (events.append("fsync"), fsync(*a)))
    monkeypatch.setattr(os, "replace", lambda *a: (events.append("replace"), replace(*a)))
    write_safetensors(tmp_path / "x.safetensors", ONE)
    assert events == ["fsync", "replace"]


# Damage: hundreds of cut, flipped, extended and spliced files


def damage(data, header_end, random):
    """One random injury, most of them where the structure is (a flipped weight is just another weight)."""
    data, kind = bytearray(data), random.choice(("cut", "flip", "extend", "splice", "digit", "swap"))
    at = random.randrange(header_end) if random.random() < 0.8 else random.randrange(len(data))
    if kind == "cut":
        del data[at : at + random.choice((1, 2, 8, 64, len(data)))]
    elif kind == "flip":
        data[at] ^= 1 << random.randrange(8)
    elif kind == "extend":
        data[at:at] = random.choice((b" ", b"0", b'"', b"}", b"[", b"9" * 30, os.urandom(8)))
    elif kind == "splice":
        other = random.randrange(header_end)
        data[at : at + random.randrange(40)] = data[other : other + random.randrange(40)]
    elif kind == "digit":
        digits = [i for i in range(8, header_end) if chr(data[i]).isdigit()]
        data[random.choice(digits or [at])] = random.choice(b"0123456789-.e")
    else:
        other = random.randrange(header_end)
        data[at], data[other] = data[other], data[at]
    return bytes(data)


def test_a_damaged_file_is_refused_or_read_as_the_library_reads_it(tmp_path):
    """Two independent readers: what ours accepts, the safetensors library accepts too, with the same content."""
    small = {"w.weight_packed": np.arange(24, dtype=np.int32).reshape(3, 8), "w.weight_shape": np.array([3, 64])}
    save_file(small | {"n": np.ones(5, np.float16)}, tmp_path / "right.safetensors", metadata={"format": "pt"})
    right = (tmp_path / "right.safetensors").read_bytes()
    header_end = 8 + struct.unpack("<Q", right[:8])[0]
    chance, accepted, refusals = random.Random(5), 0, set()
    tracemalloc.start()
    for _ in range(800):
        data = damage(right, header_end, chance)
        tracemalloc.reset_peak()
        try:
            tensors, _ = read_bytes(tmp_path, data)
        except CheckpointError as error:
            refusals.add(re.sub(r"'.*?'|\d+|\[.*?\]|0x\w+", "_", str(error).rsplit("x.safetensors: ", 1)[1]))
            ours = None
        else:
            ours = {name: (t.dtype, list(t.shape), t.stored().tobytes()) for name, t in tensors.items()}
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        if ours is not None:
            accepted += 1
            theirs = safetensors.deserialize(data)
            assert ours == {name: (spec["dtype"], spec["shape"], bytes(spec["data"])) for name, spec in theirs}
    tracemalloc.stop()
    assert 20 < accepted < 600 and len(refusals) > 15, (accepted, refusals)


def test_a_damaged_index_or_config_is_refused_or_read(tmp_path):
    path = folder(tmp_path / "model", one=ONE, two=TWO, index=SHARDS)
    chance, accepted = random.Random(6), 0
    for name in ("model.safetensors.index.json", "config.json"):
        right = (path / name).read_bytes()
        for _ in range(150):
            (path / name).write_bytes(damage(b"[0000000" + right, 8 + len(right), chance)[8:])
            try:
                checkpoint = open_checkpoint(path)
            except CheckpointError as error:
                assert len(str(error).splitlines()) == 1
            else:
                accepted += 1
                assert checkpoint.tensors.keys() == SHARDS.keys() and isinstance(checkpoint.config, dict)
                assert all(tensor.file.parent == path for tensor in checkpoint.tensors.values())
        (path / name).write_bytes(right)
    assert 20 < accepted < 280


# Configurations


def test_config_values_are_what_they_must_be():
    config = {"layers": 3, "eps": 1, "tied": False, "none": None}
    assert config_value(config, "layers", int) == 3 and config_value(config, "tied", bool) is False
    assert config_value(config, "eps", float) == 1.0 and type(config_value(config, "eps", float)) is float
    assert config_value(config, "none", int, 7) == config_value(config, "other", int, 7) == 7
    refused("config: other is missing", config_value, config, "other", int)
    refused("config: none is missing", config_value, config, "none", int)
    for value, kind in ((True, int), (0, int), (-2, int), (2.0, int), ("2", int), (1, bool), ([], dict), ({}, list),
                        (math.nan, float), (math.inf, float), (10**400, float), (True, float)):  # fmt: skip
        refused("config: x is .*, expected", config_value, {"x": value}, "x", kind)


def test_every_dtype_has_its_size():
    bits = {name: 8 if name == "BOOL" else int(re.search(r"[0-9]+", name)[0]) for name in DTYPES}
    assert {name: 8 * np.dtype(DTYPES[name]).itemsize for name in DTYPES} == bits
