"""Keys and values in every storage: what a number becomes, the cache contract, keys made of values, greedy text.

What a cache holds of a token must depend on that token alone; then nothing else of the contract can change.
"""

import json
import tracemalloc
from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import tiny_qwen
from hypothesis import Phase
from test_cache import Machine, contents, floats, keys_of, read, read_with_detours, rewrite, run, same_contents
from tiny import Recorded, Restless, emitted, folders, greedy, pair, random_ids, random_prompt, same_bits

import minimtp
from minimtp import gemma4, kv_storage, layers
from minimtp.cache import CacheError
from minimtp.checkpoint import bf16_to_float
from minimtp.cli import main
from minimtp.kv import FullKV
from minimtp.kv_storage import NAMES, STORAGES, half_to_float
from minimtp.layers import KV_BLOCK, Blocks
from minimtp.loading import published_config

SHARED_KV = ("window_4", "window_20", "experts", "bundled")  # models with attention_k_eq_v
OTHERS = tuple(name for name in NAMES if name not in ("float32", "float64", "float64-v"))
every_storage = pytest.mark.parametrize("kv", OTHERS)
each_storage_once = pytest.mark.parametrize("kv", ["float32-v", "float16", "bf16-v", "int8", "int8-v"])


@cache
def pair_with(name, kv):
    """(target, drafter) of a random model of either family, or of the bundled pair, with that storage."""
    target, drafter = tiny_qwen.pair(name) if name in tiny_qwen.MODELS and name != "experts" else pair(name)
    target = replace(target, kv=kv)
    return target, replace(drafter, target=target)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that short texts have several."""
    monkeypatch.setattr(layers, "KV_BLOCK", 16)
    monkeypatch.setattr(gemma4, "KV_BLOCK", 16)


# Numbers


def rows(scale=1.0, dtype="float32"):
    return (np.random.default_rng(0).normal(size=(50, 3, 64)) * scale).astype(dtype)


def through(name, x):
    return STORAGES[name].decode(STORAGES[name].encode(x), x.dtype)


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_row_is_kept_as_if_it_were_alone(name, dtype):
    x_TGK, storage = rows(dtype=dtype), STORAGES[name]
    together = storage.encode(x_TGK)
    for t in range(0, 50, 7):
        alone = storage.encode(x_TGK[t : t + 1, 1:2])
        assert all(same_bits(together[suffix][t : t + 1, 1:2], alone[suffix]) for suffix in storage.parts)
        assert same_bits(storage.decode(alone, dtype), storage.decode(together, dtype)[t : t + 1, 1:2])
    assert sum(part.nbytes for part in together.values()) == 150 * storage.row_bytes(64)


def test_every_float16_comes_back_as_numpy_says():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(halves)
    assert same_bits(half_to_float(halves[finite]), halves[finite].astype(np.float32))
    np.testing.assert_array_equal(half_to_float(halves), halves.astype(np.float32))
    assert half_to_float(halves[:0]).size == 0


def test_float16_and_bf16_round_to_nearest():
    x = rows(dtype="float64")
    assert same_bits(through("float16", x), x.astype(np.float16).astype(np.float64))
    below = bf16_to_float((x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16), np.float64)
    above = bf16_to_float((x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16) + np.uint16(1), np.float64)
    assert (np.abs(through("bf16", x) - x) == np.minimum(np.abs(below - x), np.abs(above - x))).all()


@pytest.mark.parametrize("scale", [1e-2, 1.0, 300.0, 1e6])
def test_int8_is_off_by_half_a_scale_at_most(scale):
    x = rows(scale, "float64")
    parts = STORAGES["int8"].encode(x)
    step = parts["_scale"].astype(np.float64)
    np.testing.assert_allclose(step[..., 0], np.abs(x).max(-1) / 127, rtol=2**-11)
    assert (np.abs(parts[""]).max(-1) == 127).all() and (np.abs(through("int8", x) - x) <= step / 2).all()


def test_ties_of_int8_go_to_the_even_code():
    assert STORAGES["int8"].encode(np.array([127, 0.5, 1.5, 2.5, -0.5, -1.5]))[""].tolist() == [127, 0, 2, 2, 0, -2]


def test_rows_at_the_ends_of_int8s_scale():
    x = np.array([[0.0, 0.0], [1e-7, -1e-7], [1e-3, -1e-3], [8e6, 0.0]], np.float32)
    assert through("int8", x)[:2].tolist() == [[0, 0], [0, 0]]
    np.testing.assert_allclose(through("int8", x)[2:], x[2:], rtol=1e-2)


@pytest.mark.parametrize("name", STORAGES)
def test_what_is_no_number_stays_none(name):
    x = np.array([[1.0, np.nan, 2.0], [1.0, 2.0, 3.0]], np.float32)
    with np.errstate(invalid="ignore"):
        assert np.isnan(through(name, x)).any(-1).tolist() == [True, False]
    with np.errstate(over="ignore", invalid="ignore"):
        assert not np.isfinite(through(name, np.array([[np.inf, 1.0]], np.float32))).all()


# The cache contract


class Overwritten(FullKV):
    """The last of a rolled back entry's parts has overwritten the same part of the last that stands."""

    def rollback(self, n):
        super().rollback(n)
        if n and self.length:
            last = list(self.buffers.values())[-1]
            last[:, self.length - 1] = last[:, self.length]


class ForgetsScales(FullKV):
    """Moves the scales one entry too far."""

    def _move(self, start, slots):
        scales = {name: buffer for name, buffer in self.buffers.items() if name.endswith("_scale")}
        super()._move(start, slots)
        for name, scale in scales.items():
            self.buffers[name][:, : scale.shape[1]] = np.roll(scale, 1, axis=1)[:, :slots]


def machine(name, full=FullKV):
    storage, values_only = kv_storage.parse(name, "float32")
    full = partial(full, keys_of=keys_of) if values_only else full
    return type("WithStorage", (Machine,), {"full": staticmethod(full), "storage": storage})


@each_storage_once
def test_caches_in_every_storage_hold_what_a_list_of_everything_says(kv):
    run(machine(kv), examples=10)


@pytest.mark.parametrize("kv, wrong", [
    ("bf16", Overwritten), ("int8", Overwritten), ("int8-v", Overwritten), ("int8", ForgetsScales),
])  # fmt: skip
def test_wrong_memories_are_caught_by_the_same_machine(kv, wrong):
    with pytest.raises(AssertionError):
        run(machine(kv, wrong), phases=[Phase.generate], examples=15)


# Models


def leaves_no_bit(name, kv, k):
    """Whether narrow passes with rejected tokens give the logits and leave the cache of single ones."""
    target, _ = pair_with(name, kv)
    ids_T = random_prompt(target, 50)
    plain, detoured = target.new_cache(), target.new_cache()
    expected = read(target, plain, ids_T)
    same = same_bits(read_with_detours(target, detoured, ids_T, k, commit=True), expected)
    return same and same_contents(detoured, plain)


@each_storage_once
@pytest.mark.parametrize("name, k", [("window_20", 15), ("shared_kv", 4), ("dense", 6)])
def test_rejected_tokens_leave_no_bit_behind(kv, name, k, small_blocks):
    assert leaves_no_bit(name, kv, k)


def test_a_pass_whose_scores_are_too_many_makes_blocks_again_and_no_other_bits(small_blocks, monkeypatch):
    target, _ = pair_with("window_20", "int8-v")
    ids_T, made, each = random_prompt(target, 40), [], Blocks.each
    monkeypatch.setattr(Blocks, "each", lambda *args: (made.append(1), each(*args))[1])
    expected = read(target, target.new_cache(), ids_T, width=10)
    at_once = len(made)
    monkeypatch.setattr(layers, "ATTEND_ELEMENTS", 1000)
    assert same_bits(read(target, target.new_cache(), ids_T, width=10), expected) and len(made) > 3 * at_once


@pytest.mark.parametrize("width", [1, 5])
def test_no_float_copy_of_the_cache_is_made(width):
    """Beyond the scores, a pass takes a few blocks of floats."""
    count, heads, K = 20 * KV_BLOCK, 4, 64
    memory = FullKV(heads, K, slots=count, storage=STORAGES["int8"], keys_of=lambda v_GBK, position: v_GBK * 2)
    for _ in range(20):
        x_TGK = np.ones((KV_BLOCK, heads, K), np.float32)
        memory.append(x_TGK, x_TGK)
    q_THK, high_T = np.ones((width, heads, K), np.float32), np.arange(count - width, count) + 1
    tracemalloc.start()
    layers.attend(q_THK, *memory.read(), 0 * high_T, high_T)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    block, scores = 4 * heads * K * KV_BLOCK, 4 * heads * count
    assert peak < 5 * block + (width + 3) * scores < 4 * heads * K * count


def one_scale(x):
    """One scale for all tokens of a pass."""
    scale = np.broadcast_to(np.abs(x).max() / 127, (*x.shape[:-1], 1)).astype(np.float16)
    return {"": np.rint(x / scale).astype(np.int8), "_scale": scale}


def running_scale(most):
    """A scale for the largest number so far, which un-reading does not take back."""

    def encode(x):
        most.append(max([np.abs(x).max(), *most[-1:]]))
        scale = np.full((*x.shape[:-1], 1), most[-1] / 127, np.float16)
        return {"": np.rint(x / scale).astype(np.int8), "_scale": scale}

    return encode


@pytest.mark.parametrize("name", ["window_20", "dense"])
@pytest.mark.parametrize("encode", [one_scale, running_scale([])])
def test_a_scale_of_several_tokens_is_caught(name, encode, monkeypatch):
    monkeypatch.setitem(STORAGES, "int8", STORAGES["int8"]._replace(encode=encode))
    assert not leaves_no_bit(name, "int8", 6)


def from_the_first_slot_seen(self, low, high):
    """Blocks cut from `low` on, wherever that lies."""
    for first in range(low, high, 16):
        yield first, min(first + 16, high), self.rows(first, min(first + 16, high))


def test_blocks_that_depend_on_the_pass_are_caught(small_blocks, monkeypatch):
    monkeypatch.setattr(Blocks, "each", from_the_first_slot_seen)
    assert not leaves_no_bit("window_20", "bf16", 15)


def speculates_losslessly(name, kv, k, prompt_length, count=45):
    target, drafter = pair_with(name, kv)
    prompt = random_prompt(target, prompt_length, seed=k)
    kind = Recorded if name == "bundled" else Restless
    tokens, expected = greedy(kind(target), prompt, count)
    watched = kind(target)
    steps = list(minimtp.generate(watched, prompt, drafter, num_draft=k, max_new_tokens=count))
    assert sum(step.drafted for step in steps) > sum(step.accepted for step in steps) > 0
    found = [watched.rows[len(prompt) - 1 + i] for i in range(count)]
    return emitted(steps) == tokens and same_bits(found, expected)


@every_storage
@pytest.mark.parametrize("name, k, prompt_length", [("bundled", 4, 40), ("window_4", 5, 3), ("dense", 5, 20)])
def test_greedy_text_with_drafts_is_greedy_text(kv, name, k, prompt_length, small_blocks):
    assert speculates_losslessly(name, kv, k, prompt_length)


@each_storage_once
@pytest.mark.parametrize("name", ["window_20", "dense"])
def test_wide_passes_are_narrow_ones_to_rounding(kv, name, small_blocks, monkeypatch):
    target, _ = pair_with(name, kv)
    ids_T = random_prompt(target, 70)
    narrow = read(target, target.new_cache(), ids_T)
    monkeypatch.setattr(layers, "ATTEND_ELEMENTS", 4000)
    wide = target.forward(ids_T, cache := target.new_cache()).logits_TV
    in_two = np.concatenate([read(target, cache := target.new_cache(), ids_T[:9]), target.forward(ids_T[9:], cache)[0]])
    off = 0.3 if "int8" in kv else 0.03 if kv.startswith(("bf16", "float16")) else 2e-4  # a number may round elsewhere
    assert all(np.abs(found - narrow).max() < off for found in (wide, in_two))


@every_storage
def test_storages_keep_what_they_say_and_lend_it(kv):
    """In order: the drafter reads the same keys and values as the target's last layers, and the bytes are counted."""
    target, drafter = pair_with("bundled", kv)
    storage, values_only = kv_storage.parse(kv, "float32")
    cache = target.new_cache(capacity=100)
    out = target.forward(random_prompt(target, 60), cache)
    for layer, memory in zip(target.config.layers, cache.layers):
        kinds = 1 if values_only and layer.k_eq_v else 2
        assert memory.nbytes == kinds * layer.kv_heads * storage.row_bytes(layer.head_dim) * memory.slots
    lent = gemma4.lendable_kv(target.config, cache)
    plain = gemma4.new_cache(target.config, target.dtype, 100, target.fingerprint)
    for layer, memory in zip(target.config.layers, cache.layers):
        k_GSK, v_GSK = map(floats, memory.read())
        plain.layers[layer.kv].append(k_GSK.swapaxes(0, 1), v_GSK.swapaxes(0, 1))
    plain.tokens[:] = cache.tokens
    assert {kind: memory.length for kind, memory in lent.items()} == {"sliding": 60, "full": 60}
    found, expected = (drafter.forward(5, out.hidden_TD[-1], one)[0] for one in (cache, plain))
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


# Keys made of values


def made_again(target):
    """(keys that were kept, the same made of their values) of every full layer after 50 tokens, some in wide passes."""
    cache, maker = target.new_cache(), replace(target, kv=f"{target.dtype.name}-v").new_cache()
    for width in (1, 20, 3, 26):
        target.forward(random_prompt(target, width, seed=width), cache)
    for layer, memory, twin in zip(target.config.layers, cache.layers, maker.layers):
        if twin.keys_of is not None:
            assert layer.k_eq_v and layer.kind == "full"
            k_GSK, v_GSK = memory.read()
            twin.append(v_GSK.swapaxes(0, 1) * np.nan, v_GSK.swapaxes(0, 1))
            again = Blocks.each(twin.read()[0], 0, 50)
            yield k_GSK, np.concatenate([k_GBK for *_, k_GBK in again], axis=1)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", SHARED_KV)
def test_keys_are_made_again_to_the_bit(name, dtype, small_blocks):
    found = list(made_again(pair(name, dtype)[0]))
    assert found and all(np.array_equal(kept_GSK, made_GSK) for kept_GSK, made_GSK in found)


@pytest.mark.parametrize("name", ["gemma-4-31b", "gemma-4-26b-a4b", "gemma-4-12b"])
def test_keys_of_the_published_shapes_are_made_again_to_the_bit(name):
    """At the rotary frequencies of the real models, a quarter of which turn, and far out."""
    _, config = published_config(name)
    layer, dtype = next(layer for layer in config.layers if layer.k_eq_v), np.dtype("float32")
    random, first = np.random.default_rng(0), 1000 * KV_BLOCK + 7
    weight_K = random.normal(size=layer.head_dim).astype(dtype)
    projected_TGK = random.normal(size=(100, layer.kv_heads, layer.head_dim)).astype(dtype)
    positions_T = np.arange(first, first + 100)
    rope = gemma4.rope_tables(config, positions_T, dtype)["full"]
    k_TGK = layers.rotate(layers.rms_norm(projected_TGK, weight_K, config.rms_norm_eps), rope)
    v_GTK = layers.rms_norm(projected_TGK, eps=config.rms_norm_eps).swapaxes(0, 1)
    made_GTK = gemma4.keys_of_values(weight_K, partial(gemma4.turning_table, config, dtype), v_GTK, first)
    assert np.array_equal(made_GTK.swapaxes(0, 1), k_TGK)


WRONG_KEYS = {
    "a block off": lambda weight_K, table, v, position: KEYS_OF_VALUES(weight_K, table, v, position + 16),
    "no weight": lambda weight_K, table, v, position: KEYS_OF_VALUES(np.ones_like(weight_K), table, v, position),
    "positions from nought in every block": lambda weight_K, table, v, position: KEYS_OF_VALUES(weight_K, table, v, 0),
    "not turned": lambda weight_K, table, v, position: v * weight_K,
}
KEYS_OF_VALUES = gemma4.keys_of_values


@pytest.mark.parametrize("wrong", WRONG_KEYS)
def test_wrong_keys_are_caught(wrong, small_blocks, monkeypatch):
    monkeypatch.setattr(gemma4, "keys_of_values", WRONG_KEYS[wrong])
    with pytest.raises(AssertionError):
        for kept_GSK, made_GSK in made_again(pair("window_4")[0]):
            np.testing.assert_allclose(made_GSK, kept_GSK, rtol=1e-3)


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-5), ("float64", 1e-13)])
@pytest.mark.parametrize("name", SHARED_KV)
def test_values_alone_give_the_logits_of_keys_and_values(name, dtype, tolerance, small_blocks):
    target, _ = pair(name, dtype)
    ids_T = random_prompt(target, 60)
    alone = replace(target, kv=f"{dtype}-v")
    for width in (1, 16, 60):
        found, expected = (read(one, one.new_cache(), ids_T, width) for one in (alone, target))
        assert np.abs(found - expected).max() <= tolerance * max(1, np.abs(expected).max() / 10)


def test_only_what_shares_its_projection_keeps_values_alone():
    kinds = {}
    for name in ("window_4", "window_7", "shared_kv"):
        target = pair_with(name, "bf16-v")[0]
        kinds[name] = [sorted(memory.buffers) for memory in target.new_cache().layers]
    assert kinds["window_4"][1] == ["v"] and kinds["window_4"][0] == ["k", "v"]
    assert all(held == ["k", "v"] for name in ("window_7", "shared_kv") for held in kinds[name])


# Loading, saving, commands


def test_a_storage_is_part_of_what_a_cache_belongs_to(tmp_path):
    path = folders("window_20")[0]
    plain, named, bf16, alone = (minimtp.load(path, kv=kv) for kv in (None, "float32", "bf16", "bf16-v"))
    assert plain.fingerprint == named.fingerprint and len({plain.fingerprint, bf16.fingerprint, alone.fingerprint}) == 3
    cache = bf16.new_cache()
    bf16.forward([1, 2, 3], cache)
    cache.save(tmp_path / "cache")
    assert bf16.load_cache(tmp_path / "cache").length == 3
    for other in (plain, alone):
        with pytest.raises(CacheError, match="KV storage"):
            other.load_cache(tmp_path / "cache")
        with pytest.raises(CacheError, match="KV storage"):
            other.forward([4], cache)


@pytest.mark.parametrize("kv", ["int4", "-v", 8, ["int8"], "float32-v-v"])
def test_a_storage_that_is_none_is_refused(kv):
    with pytest.raises(ValueError, match="kv is .*expected one of float64, .*int8-v"):
        minimtp.load("tiny-gemma4", kv=kv)


@each_storage_once
@pytest.mark.parametrize("name", ["window_20", "dense"])
def test_a_loaded_cache_continues_bit_for_bit(tmp_path, kv, name):
    target, drafter = pair_with(name, kv)
    cache = target.new_cache()
    out = target.forward(random_prompt(target, 33), cache)
    drafter.propose([*cache.tokens[1:], 3], out.hidden_TD, cache, 0, minimtp.Sampling(temperature=0.0), ())
    cache.save(tmp_path / "cache")
    loaded = target.load_cache(tmp_path / "cache")
    assert same_contents(loaded, cache)
    assert all(x.dtype == y.dtype for x, y in zip(contents(loaded).values(), contents(cache).values()))
    if cache.drafter:
        held, again = cache.drafter.state(), loaded.drafter.state()
        assert held.keys() == again.keys() and all(same_bits(held[key], again[key]) for key in held)
    more = random_ids(20, 40, seed=9)
    assert same_bits(read_with_detours(target, loaded, more, 4, commit=True), read(target, cache, more))


DAMAGE = {
    "no scales": lambda arrays: arrays.pop("layers.1.v_scale"),
    "scales in float32": lambda arrays: arrays.update({"layers.1.v_scale": np.float32(arrays["layers.1.v_scale"])}),
    "fewer scales": lambda arrays: arrays.update({"layers.0.k_scale": arrays["layers.0.k_scale"][:, 1:].copy()}),
    "a scale a number": lambda arrays: arrays.update(
        {"layers.0.k_scale": np.repeat(arrays["layers.0.k_scale"], arrays["layers.0.k"].shape[2], 2)}
    ),
    "codes without sign": lambda arrays: arrays.update({"layers.0.v": arrays["layers.0.v"].view(np.uint8)}),
    "keys where only values are kept": lambda arrays: arrays.update({"layers.0.k": arrays["layers.0.v"]}),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused(tmp_path, damage):
    target, _ = pair_with("window_20", "int8-v" if "only values" in damage else "int8")
    cache = target.new_cache()
    target.forward(random_ids(9, 60), cache)
    cache.save(tmp_path / "cache")
    rewrite(tmp_path / "cache", lambda arrays, metadata: DAMAGE[damage](arrays))
    with pytest.raises(CacheError, match="tensor|sequence"):
        target.load_cache(tmp_path / "cache")


def test_run_and_bench_keep_keys_and_values_as_asked(capsys, monkeypatch):
    seen, new_cache = [], gemma4.new_cache
    monkeypatch.setattr(gemma4, "new_cache", lambda *args: (seen.append(args[5]), new_cache(*args))[1])
    assert main(["run", "--kv", "int8-v", "-n", "4"]) == 0 and set(seen) == {"int8-v"}
    capsys.readouterr()
    assert main(["bench", "--kv", "bf16", "-n", "3", "--prompts", "1", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kv"] == "bf16" and report["identical"] and set(seen) == {"int8-v", "bf16"}
    with pytest.raises(SystemExit) as end:
        main(["run", "--kv", "int9"])
    assert end.value.code == 2


def test_a_golden_run_knows_its_storage(tmp_path, capsys):
    assert main(["golden", "-o", str(tmp_path / "run"), "--kv", "int8", "-n", "4"]) == 0
    assert main(["check", "--golden", str(tmp_path / "run")]) == 0
    run = json.loads((tmp_path / "run" / "golden.json").read_text())
    run["model"]["kv"] = "bf16"
    (tmp_path / "run" / "golden.json").write_text(json.dumps(run))
    assert main(["check", "--golden", str(tmp_path / "run")]) == 1
