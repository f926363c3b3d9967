"""The cache contract: what is read is held, what is un-read leaves no bit behind, what is final is bounded.

A state machine drives caches against a list of everything ever read; models check the same through their logits.
"""

from contextlib import suppress
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test
from tiny import MODELS, pair, random_ids, same_bits

from minimtp import gemma4
from minimtp.cache import Cache, CacheError
from minimtp.checkpoint import CheckpointError, read_safetensors, write_safetensors
from minimtp.kv import SLACK, FullKV, SlidingKV
from minimtp.kv_storage import STORAGES
from minimtp.layers import Blocks

CAPACITY = 4000
HEADS, WIDTH = 2, 3
every_model = pytest.mark.parametrize("name", MODELS)


# Memories by themselves, against a list


def entries(ids):
    """(keys, values) [T, G, K] that name their token: its digits in base 32, which every storage tells apart."""
    digits_TK = np.array(ids, np.int64).reshape(-1, 1) // 32 ** np.arange(WIDTH) % 32
    k_TGK = np.stack([digits_TK + 1 + 32 * g for g in range(HEADS)], axis=1).astype(np.float32)
    return k_TGK, -k_TGK


def keys_of(v_GBK, position):
    """The keys of such values."""
    return -v_GBK


def kept(storage, x_TGK):
    """What a storage makes of x, each token by itself."""
    return np.concatenate([storage.decode(storage.encode(x_1GK), x_TGK.dtype) for x_1GK in x_TGK[:, None]])


def floats(x_GSK):
    """What a memory gives to read, as an array."""
    return x_GSK.rows(0, x_GSK.shape[1]) if isinstance(x_GSK, Blocks) else x_GSK


def append(memory, ids):
    memory.append(*entries(ids))


class Forgetful(SlidingKV):
    """Un-reads one token too few."""

    def rollback(self, n):
        super().rollback(max(0, n - 1))


class Shortsighted(SlidingKV):
    """Keeps one entry too few."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.keep -= 1


class Greedy(SlidingKV):
    """Never frees anything."""

    commit = FullKV.commit

    def _first_needed(self):
        return self.start


class Machine(RuleBasedStateMachine):
    """Caches of a full and two sliding memories; the model is the list of ids, and the committed count."""

    full, sliding, storage = FullKV, SlidingKV, STORAGES["float32"]

    def new(self):
        layers = [type(self).full(HEADS, WIDTH, storage=self.storage)]
        layers += [self.sliding(HEADS, WIDTH, window, storage=self.storage) for window in (1, 9)]
        return Cache(layers, CAPACITY, "this model")

    def __init__(self):
        super().__init__()
        self.cache, self.ids, self.committed, self.most = self.new(), [], 0, 0
        self.kept = [x_TGK[:0] for x_TGK in entries([0])]  # of every id there was: its key and value, as they are kept

    def fresh(self, count):
        ids = list(range(len(self.kept[0]), len(self.kept[0]) + count))
        self.kept = [np.concatenate([all_TGK, kept(self.storage, x)]) for all_TGK, x in zip(self.kept, entries(ids))]
        return ids

    @rule(count=st.integers(1, 20) | st.integers(1, 200))
    def read(self, count):
        with self.cache.reading(ids := self.fresh(count)) as start:
            assert start == len(self.ids)
            for layer in self.cache.layers:
                append(layer, ids)
        self.ids += ids
        self.most = max(self.most, len(self.ids) - self.committed)

    @rule(count=st.integers(1, 200), reached=st.integers(0, 3))
    def read_and_be_interrupted(self, count, reached):
        with suppress(KeyboardInterrupt), self.cache.reading(ids := self.fresh(count)):
            for layer in self.cache.layers[:reached]:
                append(layer, ids)
            raise KeyboardInterrupt
        self.most = max(self.most, len(self.ids) + count - self.committed)

    @rule(data=st.data())
    def roll_back(self, data):
        n = data.draw(st.integers(0, len(self.ids) - self.committed))
        self.cache.rollback(n)
        self.ids = self.ids[: len(self.ids) - n]

    @rule(beyond=st.integers(1, 300), negative=st.booleans())
    def roll_back_too_far(self, beyond, negative):
        n = -beyond if negative else len(self.ids) - self.committed + beyond
        with pytest.raises(CacheError, match="roll back"):
            self.cache.rollback(n)

    @rule()
    def commit(self):
        self.cache.commit()
        self.committed, self.most = len(self.ids), 0

    @rule()
    def save_and_load(self):
        arrays = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("minimtp.cache.write_safetensors", lambda path, tensors, meta: arrays.update(tensors))
            patch.setattr("minimtp.cache.read_safetensors", lambda path: (stored(arrays), self.metadata()))
            self.cache.save("a file")
            self.cache = self.new()
            self.cache.restore("a file")
        self.committed, self.most = len(self.ids), 0

    def metadata(self):
        return {"format": "minimtp-cache", "fingerprint": "this model"}

    @invariant()
    def holds_what_was_read(self):
        assert (self.cache.tokens, self.cache.length, self.cache.committed) == (self.ids, len(self.ids), self.committed)
        for layer in self.cache.layers:
            assert layer.length == len(self.ids)
            expected = (all_TGK[self.ids[layer.start :]] for all_TGK in self.kept)
            assert all(same_bits(floats(held).swapaxes(0, 1), e) for held, e in zip(layer.read(), expected))

    @invariant()
    def holds_all_that_can_be_needed_and_little_more(self):
        for layer, needed in zip(self.cache.layers, (CAPACITY, 2, 10)):
            assert layer.start <= max(0, self.committed - needed)
            slots = layer.slots
            kinds = 2 if layer.keys_of is None else 1
            assert layer.nbytes == kinds * slots * HEADS * self.storage.row_bytes(WIDTH)
            if needed < CAPACITY:
                assert slots <= needed + SLACK + 2 * self.most


def stored(arrays):
    """What read_safetensors would give for these arrays, copies of them."""
    return {name: SimpleNamespace(stored=array.copy) for name, array in arrays.items()}


def run(machine, phases=tuple(Phase), examples=60):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=40, deadline=None, database=None, derandomize=True,
            phases=phases, suppress_health_check=list(HealthCheck),
        ),
    )  # fmt: skip


def test_caches_hold_what_a_list_of_everything_says():
    run(Machine)


@pytest.mark.parametrize("wrong", [Forgetful, Shortsighted, Greedy])
def test_wrong_caches_are_caught_by_the_same_machine(wrong):
    with pytest.raises(AssertionError):
        run(type("Wrong", (Machine,), {"sliding": wrong}), phases=[Phase.generate])


@pytest.mark.parametrize("width", [1, 3, 16, 100])
def test_a_long_run_takes_bounded_memory_and_seldom_moves_it(width, monkeypatch):
    kv, moves, move = SlidingKV(HEADS, WIDTH, 32), [], SlidingKV._move
    monkeypatch.setattr(SlidingKV, "_move", lambda *args: (moves.append(1), move(*args)))
    for start in range(0, 3000, width):
        append(kv, range(start, start + width))
        kv.rollback(width // 2)
        append(kv, range(start + width - width // 2, start + width))
        kv.commit()
        assert kv.slots <= 33 + SLACK
    assert len(moves) <= 2 * (3000 // width) * min(1, (width + 1) / SLACK) + 2


def test_uncommitted_entries_cost_few_moves(monkeypatch):
    kv, moves, move = SlidingKV(HEADS, WIDTH, 32), [], SlidingKV._move
    monkeypatch.setattr(SlidingKV, "_move", lambda *args: (moves.append(1), move(*args)))
    for i in range(2000):
        append(kv, [i])
    assert len(moves) < 30 and kv.start == 0


# Models: after narrow passes and rollback, not a bit is left


def contents(cache):
    """Everything that can be read from the cache from now on, as arrays."""
    return {f"{i}.{key}": array for i, layer in enumerate(cache.layers) for key, array in layer.state().items()}


def same_contents(a, b):
    return a.tokens == b.tokens and all(same_bits(x, y) for x, y in zip(contents(a).values(), contents(b).values()))


def read(target, cache, ids_T, width=1, commit=False):
    """Read ids_T in passes of `width` -> logits [T, V]."""
    rows = []
    for start in range(0, len(ids_T), width):
        rows.append(target.forward(ids_T[start : start + width], cache).logits_TV)
        if commit:
            cache.commit()
    return np.concatenate(rows) if rows else rows


def read_with_detours(target, cache, ids_T, k, commit, rollback=Cache.rollback):
    """Read ids_T in passes of k + 1 tokens, of which only some are right and the rest un-read -> logits [T, V]."""
    random, rows = np.random.default_rng(k), []
    while len(rows) < len(ids_T):
        at, accepted = len(rows), int(random.integers(k + 1))
        right = ids_T[at : at + 1 + accepted]
        wrong = random.integers(target.config.vocab_size, size=k + 1 - len(right)).tolist()
        out = target.forward([*right, *wrong], cache)
        rows.extend(out.logits_TV[: len(right)])
        first = int(random.integers(len(wrong) + 1))
        rollback(cache, first)
        rollback(cache, len(wrong) - first)
        if commit:
            cache.commit()
    return np.stack(rows)


@every_model
def test_rejected_tokens_leave_no_bit_behind(name):
    target, _ = pair(name)
    ids_T = random_ids(70, target.config.vocab_size)
    plain = target.new_cache()
    expected = read(target, plain, ids_T)
    for k in (1, 2, 3, 4, 6, 9, 15):
        cache = target.new_cache(capacity=(None, 300)[k % 2])
        assert same_bits(read_with_detours(target, cache, ids_T, k, commit=k % 4 < 2), expected)
        assert same_contents(cache, plain)


def keep_one(cache, n):
    """A rollback that forgets to cut one rejected entry of every layer."""
    for layer in cache.layers:
        layer.rollback(max(0, n - 1))
    del cache.tokens[cache.length - n :]


def cut_ids_only(cache, n):
    """A rollback that forgets the layers."""
    del cache.tokens[cache.length - n :]


@every_model
@pytest.mark.parametrize("wrong", [keep_one, cut_ids_only])
def test_a_rollback_that_forgets_is_caught(name, wrong):
    target, _ = pair(name)
    ids_T = random_ids(40, target.config.vocab_size)
    expected = read(target, target.new_cache(), ids_T)
    rows = read_with_detours(target, target.new_cache(), ids_T, 5, commit=False, rollback=wrong)
    assert not same_bits(rows, expected)


@every_model
def test_a_detour_of_many_windows_can_be_unread(name):
    target, _ = pair(name)
    ids_T, detour = random_ids(30, target.config.vocab_size), random_ids(150, target.config.vocab_size, seed=1)
    plain, cache = target.new_cache(), target.new_cache()
    expected = read(target, plain, ids_T)
    rows = [read(target, cache, ids_T[:15], commit=True)]
    read(target, cache, detour, width=16)
    for n in (100, 0, 49, 1):
        cache.rollback(n)
    rows.append(read(target, cache, ids_T[15:]))
    assert same_bits(np.concatenate(rows), expected) and same_contents(cache, plain)


@every_model
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-4), ("float64", 1e-11)])
def test_after_wide_passes_rollback_is_exact_to_rounding(name, dtype, tolerance):
    target, _ = pair(name, dtype)
    ids_T, wrong = random_ids(90, target.config.vocab_size), random_ids(60, target.config.vocab_size, seed=1)
    expected = read(target, target.new_cache(), ids_T)
    cache = target.new_cache()
    for start in range(0, 90, 30):
        right = ids_T[start : start + 30]
        rows = target.forward([*right, *wrong], cache).logits_TV[:30]
        np.testing.assert_allclose(rows, expected[start : start + 30], rtol=0, atol=tolerance)
        cache.rollback(60)
        cache.commit()
    assert cache.tokens == ids_T


def test_the_cache_of_a_model_stays_bounded():
    target, _ = pair("window_4")
    cache, ids_T = target.new_cache(capacity=400), random_ids(400, 50)
    before, sizes = cache.layers[1].nbytes, []
    for start in range(0, 400, 8):
        read(target, cache, ids_T[start : start + 8], width=8, commit=True)
        sizes.append(cache.layers[0].nbytes)
    assert max(sizes) == sizes[10] == (5 + SLACK) * 2 * 2 * 8 * 4
    assert cache.layers[1].nbytes == before and cache.nbytes == before + sizes[-1]


# Errors change nothing


def test_rollback_past_the_commit_changes_nothing():
    target, _ = pair("window_4")
    cache, twin = target.new_cache(), target.new_cache()
    for one in (cache, twin):
        read(target, one, random_ids(20, 50), commit=True)
        read(target, one, [1, 2, 3])
    for n in (4, 100, -1, -100):
        with pytest.raises(CacheError, match=f"cannot roll back {n} tokens: 3 were read since the last commit"):
            cache.rollback(n)
        assert same_contents(cache, twin) and cache.committed == 20
    cache.commit()
    with pytest.raises(CacheError):
        cache.rollback(1)
    cache.rollback(0)


@pytest.mark.parametrize("n", [1.0, 0.5, "1", None])
def test_rollback_by_no_integer_changes_nothing(n):
    target, _ = pair("window_4")
    cache = target.new_cache()
    read(target, cache, [1, 2, 3])
    with pytest.raises((TypeError, ValueError)):
        cache.rollback(n)
    assert cache.length == 3 and all(layer.length == 3 for layer in cache.layers)


def test_a_new_cache_has_nothing_to_roll_back():
    for cache in (pair("window_4")[0].new_cache(), Cache([], 10)):
        assert (cache.length, cache.tokens, cache.committed) == (0, [], 0)
        for n in (1, -1):
            with pytest.raises(CacheError):
                cache.rollback(n)


def test_a_rollback_that_is_interrupted_can_be_repeated():
    target, _ = pair("window_7")
    cache, twin = target.new_cache(), target.new_cache()
    for one in (cache, twin):
        read(target, one, random_ids(20, 37))
        one.commit()
    read(target, cache, [1, 2, 3])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(cache.layers[1], "rollback", lambda n: (_ for _ in ()).throw(KeyboardInterrupt))
        cache.rollback(3)
    cache.rollback(cache.length - 20)
    assert same_contents(cache, twin)


def failing_in(layer, error):
    """A feed_forward that fails in that layer, whose keys are in the cache by then."""
    real = gemma4.feed_forward

    def feed_forward(x_TD, w, *others):
        if w is layer:
            raise error
        return real(x_TD, w, *others)

    return feed_forward


@every_model
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_pass_leaves_no_trace(name, error, monkeypatch):
    target, _ = pair(name)
    vocab_size = target.config.vocab_size
    ids_T = random_ids(21, vocab_size)
    plain = target.new_cache()
    expected = read(target, plain, ids_T)
    for layer in target.params.layers:
        cache, rows = target.new_cache(), []
        for at, width in enumerate((1, 16, 40) * 7):
            with monkeypatch.context() as patch, pytest.raises(error):
                patch.setattr(gemma4, "feed_forward", failing_in(layer, error))
                target.forward(random_ids(width, vocab_size, seed=at), cache)
            assert cache.tokens == ids_T[:at] and all(memory.length == at for memory in cache.layers)
            rows.append(target.forward(ids_T[at : at + 1], cache).logits_TV)
            if at % 3 == 0:
                cache.commit()
        assert same_bits(np.concatenate(rows), expected) and same_contents(cache, plain)


def test_an_append_that_finds_no_memory_leaves_no_trace(monkeypatch):
    target, _ = pair("window_7")
    cache, twin = target.new_cache(), target.new_cache()
    for one in (cache, twin):
        read(target, one, random_ids(20, 37))
    with monkeypatch.context() as patch:
        patch.setattr("minimtp.kv.FullKV.new_buffers", lambda *args: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            target.forward(random_ids(30, 37), cache)
    assert same_contents(cache, twin)
    assert same_bits(read(target, cache, [5] * 40), read(target, twin, [5] * 40))


def test_more_tokens_than_the_capacity_are_refused_and_leave_no_trace():
    target, _ = pair("window_4")
    cache = target.new_cache(capacity=10)
    target.forward(random_ids(8, 50), cache)
    with pytest.raises(CacheError, match="11 tokens do not fit a context of 10"):
        target.forward([1, 2, 3], cache)
    assert cache.length == 8
    target.forward([1, 2], cache)
    for capacity in (0, -1, 10**9):
        with pytest.raises(CacheError):
            target.new_cache(capacity)


@pytest.mark.parametrize("ids_T", [[], [50], [-1], [1.5], [[1]]])
def test_ids_that_are_no_tokens_leave_no_trace(ids_T):
    target, _ = pair("window_4")
    cache = target.new_cache()
    target.forward([1], cache)
    with pytest.raises(ValueError):
        target.forward(ids_T, cache)
    assert cache.tokens == [1] and all(layer.length == 1 for layer in cache.layers)


# Saved caches


def saved(tmp_path, name="window_7", length=40, uncommitted=3):
    target, _ = pair(name)
    cache = target.new_cache()
    ids_T = random_ids(length, target.config.vocab_size)
    read(target, cache, ids_T[: length - uncommitted], commit=True)
    read(target, cache, ids_T[length - uncommitted :])
    cache.save(tmp_path / "cache")
    return target, cache, tmp_path / "cache"


@every_model
@pytest.mark.parametrize("length, uncommitted", [(0, 0), (1, 1), (8, 3), (40, 0), (40, 3), (40, 40)])
def test_a_loaded_cache_continues_bit_for_bit(tmp_path, name, length, uncommitted):
    target, cache, path = saved(tmp_path, name, length, uncommitted)
    loaded = target.load_cache(path)
    assert same_contents(loaded, cache) and loaded.committed == length and cache.committed == length - uncommitted
    more = random_ids(30, target.config.vocab_size, seed=9)
    expected = read(target, cache, more)
    assert same_bits(read_with_detours(target, loaded, more, 4, commit=True), expected)
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_loading_a_long_sequence_takes_no_more_memory_than_it_needs(tmp_path, monkeypatch):
    target, cache, path = saved(tmp_path, "window_4", 600)
    sizes, move = [], SlidingKV._move
    monkeypatch.setattr(SlidingKV, "_move", lambda kv, start, slots: (sizes.append(slots), move(kv, start, slots)))
    target.load_cache(path)
    assert max(sizes) <= 2 * (5 + SLACK)


def test_a_loaded_cache_cannot_be_rolled_back_and_a_saved_one_still_can(tmp_path):
    target, cache, path = saved(tmp_path)
    with pytest.raises(CacheError):
        target.load_cache(path).rollback(1)
    cache.rollback(3)
    assert cache.length == 37


def test_saving_replaces_the_file_at_once_or_not_at_all(tmp_path, monkeypatch):
    target, cache, path = saved(tmp_path)
    before = path.read_bytes()
    cache.rollback(1)
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OSError):
            cache.save(path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1
    cache.save(path)
    assert target.load_cache(path).length == 39


def test_a_saved_cache_is_refused_by_another_model_or_dtype(tmp_path):
    _, _, path = saved(tmp_path)
    for other in (pair("window_4"), pair("window_20"), pair("window_7", "float64")):
        with pytest.raises(CacheError, match="another model"):
            other[0].load_cache(path)
    assert pair("window_7", keep="packed")[0].load_cache(path).length == 40


def rewrite(path, change):
    """The saved cache with its {name: array} and metadata changed."""
    tensors, metadata = read_safetensors(path)
    arrays = {name: np.array(tensor.stored()) for name, tensor in tensors.items()}
    change(arrays, metadata)
    write_safetensors(path, arrays, metadata)


DAMAGE = {
    "missing ids": lambda arrays, metadata: arrays.pop("tokens"),
    "missing keys": lambda arrays, metadata: arrays.pop("layers.0.k"),
    "missing length": lambda arrays, metadata: arrays.pop("layers.1.length"),
    "missing layer": lambda arrays, metadata: [arrays.pop(f"layers.2.{key}") for key in ("k", "v", "length")],
    "one more tensor": lambda arrays, metadata: arrays.update(more=arrays["tokens"]),
    "fewer ids": lambda arrays, metadata: arrays.update(tokens=arrays["tokens"][:-1]),
    "other length": lambda arrays, metadata: arrays.update({"layers.2.length": np.array([39])}),
    "negative length": lambda arrays, metadata: arrays.update({"layers.2.length": np.array([-1])}),
    "other shape": lambda arrays, metadata: arrays.update({"layers.0.k": arrays["layers.0.k"][:, :-1].copy()}),
    "other shape of both": lambda arrays, metadata: arrays.update(
        {f"layers.2.{key}": arrays[f"layers.2.{key}"][:, :-1].copy() for key in "kv"}
    ),
    "swapped axes": lambda arrays, metadata: arrays.update({"layers.0.v": arrays["layers.0.v"].swapaxes(0, 2).copy()}),
    "length of no number": lambda arrays, metadata: arrays.update({"layers.2.length": np.array(40)}),
    "ids in two dimensions": lambda arrays, metadata: arrays.update(tokens=arrays["tokens"][:, None].copy()),
    "ids that are no integers": lambda arrays, metadata: arrays.update(tokens=arrays["tokens"] + 0.5),
    "keys that are no floats": lambda arrays, metadata: arrays.update(
        {"layers.0.k": arrays["layers.0.k"].astype(np.int32)}
    ),
    "no format": lambda arrays, metadata: metadata.pop("format"),
    "no fingerprint": lambda arrays, metadata: metadata.pop("fingerprint"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_cache_is_refused(tmp_path, damage):
    target, _, path = saved(tmp_path)
    rewrite(path, DAMAGE[damage])
    with pytest.raises(CacheError, match="cache|saved|tensor|sequence"):
        target.load_cache(path)


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_a_truncated_cache_is_refused(tmp_path, keep):
    target, _, path = saved(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="cache: "):
        target.load_cache(path)


def test_what_is_no_cache_is_refused(tmp_path):
    target, _ = pair("window_7")
    with pytest.raises(CheckpointError, match="no such file"):
        target.load_cache(tmp_path / "nothing")
    with pytest.raises(CacheError, match="not a saved cache"):
        target.load_cache(target.folder / "model.safetensors")
    (tmp_path / "noise").write_bytes(np.random.default_rng(0).bytes(4096))
    with pytest.raises(CheckpointError):
        target.load_cache(tmp_path / "noise")
