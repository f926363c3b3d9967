"""Whole models on the Host device, whose passes are the GPU's kernels: against NumPy, and against themselves."""

import sys
from functools import cache
from itertools import islice

import numpy as np
import pytest
from random_qwen import write_qwen
from random_sizes import write_pair
from tiny import FOLDER, same_bits

import minimtp
from minimtp import device_kv, kernel_ops, plan
from minimtp.backend import BackendError
from minimtp.checkpoint import CheckpointError
from minimtp.device import Arena, Device, Host
from minimtp.device_state import DeviceState
from minimtp.kv import CacheError

BUNDLED = ["tiny-gemma4", "tiny-qwen35"]
every_family = pytest.mark.parametrize("name", BUNDLED)
CLOSE = 1e-4  # of logits of the order of 10


@cache
def target(name, device=True, kv=None):
    return minimtp.load(name, backend=Host() if device else "numpy", keep="packed", kv=kv)


@cache
def drafter(name, device=True):
    return minimtp.load_drafter("auto", target(name, device))


def ids_for(name, count, seed=0):
    return np.random.RandomState(seed).randint(100, 1000, count).tolist()


def read(model, ids, widths, cache=None, **options):
    """Read ids in passes of these widths -> (logits, hidden states, the cache)."""
    cache = model.new_cache(128) if cache is None else cache
    outs, at = [], 0
    for width in widths:
        outs.append(model.forward(ids[at : at + width], cache, **options))
        at += width
    return np.concatenate([out.logits_TV for out in outs]), np.concatenate([out.hidden_TD for out in outs]), cache


def close(a, b):
    return a.shape == b.shape and np.abs(a - b).max() < CLOSE


# Against NumPy


@every_family
def test_passes_of_all_kinds_give_numpys_numbers(name):
    """Wide, narrow, captured and replayed, after un-reading and after a commit."""
    ids, found = ids_for(name, 40), []
    for device in (True, False):
        cache, model, outs = target(name, device).new_cache(128), target(name, device), []
        for width, unread in ((20, 0), (5, 3), (5, 0), (1, 0), (5, 5), (5, 1)):
            start = cache.length
            outs.append(model.forward(ids[start : start + width], cache))
            cache.rollback(unread)
            if unread != 3:
                cache.commit()
        found.append(outs)
    for ours, theirs in zip(*found):
        assert close(ours.logits_TV, theirs.logits_TV) and close(ours.hidden_TD, theirs.hidden_TD)


@every_family
def test_drafts_and_text_are_numpys(name, monkeypatch):
    """In buffers that grow on the way, the drafter's too, after a prompt in two chunks."""
    monkeypatch.setattr(sys.modules["minimtp.generate"], "DEVICE_CHUNK", 5)
    prompt, steps = ids_for(name, 10), []
    for device in (True, False):
        cache = target(name, device).new_cache()
        generation = minimtp.generate(target(name, device), prompt, drafter(name, device), cache=cache, num_draft=4)
        steps.append(list(islice(generation, 5)))
    assert [step.tokens for step in steps[0]] == [step.tokens for step in steps[1]]
    assert [step.draft.tokens for step in steps[0]] == [step.draft.tokens for step in steps[1]]
    assert sum(step.accepted for step in steps[0])


@pytest.mark.parametrize("name", ["everything_int4", "e2b_int4", "moe_int4"])
def test_experts_shared_keys_inputs_of_layers_and_clusters_are_numpys(name):
    folder = FOLDER_OF(name)
    ours, theirs = (minimtp.load(folder, backend=backend) for backend in (Host(), "numpy"))
    path = folder.parent / "assistant" if (folder.parent / "assistant").exists() else "auto"
    ids, steps = [5, 9, 20, 3, 11], []
    for model in (ours, theirs):
        generation = minimtp.generate(model, ids, minimtp.load_drafter(path, model), num_draft=4, max_new_tokens=30)
        steps.append(list(islice(generation, 2)))
    for mine, other in zip(*steps):
        assert mine.tokens == other.tokens and list(mine.draft.tokens) == list(other.draft.tokens)
    assert close(*(read(model, ids, [5])[0] for model in (ours, theirs)))


@cache
def FOLDER_OF(name):
    from pathlib import Path

    path = Path(FOLDER.name) / "device" / name
    return write_qwen(name, path, head_dim=16) if name.startswith("moe") else write_pair(name, path)[0]


@pytest.mark.parametrize("kv", ["int8-v", "bf16"])
def test_storages_of_keys_and_values_are_numpys(kv):
    ids = ids_for("tiny-gemma4", 30)
    ours, theirs = (read(target("tiny-gemma4", device, kv), ids, [20, 5, 5])[0] for device in (True, False))
    plain = read(target("tiny-gemma4", False), ids, [20, 5, 5])[0]
    assert np.abs(ours - theirs).max() < 0.1 * np.abs(plain - theirs).max() > 0


def test_taps_see_what_numpys_see():
    taps = ["embed", "layer.0.attn", "layer.1.mlp", "layer.2.out", "final_norm"]
    ours, theirs = (
        target("tiny-gemma4", device).forward(ids_for("", 5), target("tiny-gemma4", device).new_cache(64), taps)
        for device in (True, False)
    )
    assert all(close(ours.taps[tap], theirs.taps[tap]) for tap in taps)


@every_family
def test_a_saved_cache_goes_on_either_way(name, tmp_path):
    ids = ids_for(name, 30)
    expected = read(target(name, False), ids, [20, 5, 5])[0][-5:]
    for first in (True, False):
        cache = read(target(name, first), ids, [20, 5])[2]
        cache.save(tmp_path / "cache")
        other = target(name, not first)
        again = other.load_cache(tmp_path / "cache", 128)
        assert close(other.forward(ids[25:], again).logits_TV, expected)
        with pytest.raises(CacheError):
            again.rollback(6)


# Against itself, bit for bit


@every_family
def test_a_pass_of_five_is_five_passes_and_a_graph_is_its_launches(name):
    ids = ids_for(name, 15)
    alone, hidden_TD, _ = read(target(name), ids, [1] * 15)
    together, behind_TD, cache = read(target(name), ids, [5, 5, 5])
    assert same_bits(together, alone) and same_bits(behind_TD, hidden_TD)
    assert any(replay for _, replay, _ in cache._captured.values())
    cache = target(name).new_cache(128)
    cache.graphs = False
    assert same_bits(read(target(name), ids, [5, 5, 5], cache)[0], alone)
    assert not any(replay for _, replay, _ in cache._captured.values())


@every_family
@pytest.mark.parametrize("order", ["backward", "shuffled"])
def test_the_order_of_threads_changes_no_bit(name, order):
    device, ids = target(name).device, ids_for(name, 6)
    expected = read(target(name), ids, [1, 5])[0]
    device.order = order
    try:
        assert same_bits(read(target(name), ids, [1, 5])[0], expected)
    finally:
        device.order = "forward"


@every_family
def test_what_was_unread_leaves_no_bit(name):
    ids, others = ids_for(name, 16), ids_for(name, 5, seed=1)
    straight = read(target(name), ids, [1, 5, 5, 5])[0][-5:]
    cache = target(name).new_cache(128)
    target(name).forward(ids[:1], cache)
    for first in (1, 6):
        target(name).forward(others, cache)
        cache.rollback(5)
        target(name).forward(ids[first : first + 5], cache)
    cache.commit()
    assert same_bits(target(name).forward(ids[11:], cache).logits_TV, straight)


@pytest.mark.parametrize("wrong", [
    ("tiny-qwen35", DeviceState, "rollback", lambda self, n: None),
    ("tiny-qwen35", DeviceState, "commit", lambda self: setattr(self, "committed", self.length)),
    ("tiny-gemma4", kernel_ops, "SPLIT", {False: 64, True: 64}),
], ids=["state", "commit", "nothing"])  # fmt: skip
def test_memories_that_forget_to_unread_are_seen(wrong, monkeypatch):
    name, where, what, value = wrong
    ids = ids_for(name, 11)
    expected = read(target(name, False), ids, [1, 5, 5])[0][-5:]
    monkeypatch.setattr(where, what, value)
    cache = target(name).new_cache(128)
    target(name).forward([*ids[:1], 7, 7, 7, 7], cache)
    cache.rollback(4)
    target(name).forward(ids[1:6], cache)
    cache.commit()
    found = target(name).forward(ids[6:], cache).logits_TV
    assert close(found, expected) == (what == "SPLIT")  # which changes rounding alone


@pytest.mark.parametrize("grows", [True, False])
def test_a_ring_grows_and_keeps_what_a_window_needs(grows, monkeypatch):
    """One that does not grow loses entries that uncommitted tokens still see."""
    name, ids = "tiny-gemma4", ids_for("tiny-gemma4", 100)
    cache = target(name).new_cache(200)
    ring = next(memory for memory in cache.layers if memory.keep)
    before = ring.slots
    if not grows:
        monkeypatch.setattr(device_kv.DeviceKV, "make_room", lambda self, count: None)
    ours = read(target(name), ids, [20] * 5, cache)[0]
    assert (ring.slots > before) == bool(ring.moves) == grows and len(ids) > before
    assert close(ours, read(target(name, False), ids, [20] * 5)[0]) == grows


# What a capture may not do


def test_a_capture_refuses_what_a_gpu_would():
    device = Host()
    a = device.array(np.ones((2, 16), np.float32))
    for start in (lambda: device.zeros(3, np.float32), a.get, lambda: a.set(np.ones(32)), device.synchronize,
                  lambda: device.product(a, a, a)):  # fmt: skip
        with pytest.raises(RuntimeError, match="while a graph is captured"):
            device.capture(start)
    assert (a.get() == 1).all()  # and goes on afterwards


def test_what_a_graph_reads_may_change_between_replays():
    device = Host()
    a, b = (device.array(np.full((2, 40), x, np.float32)) for x in (1, 2))
    arena = device.arena()
    with device.working(arena):
        kernel_ops.elementwise("x * y", a, b)
    with device.working(arena):
        replay, out = device.capture(lambda: kernel_ops.elementwise("x * y", a, b))
    for x in (3, 5):
        a.set(np.full((2, 40), x))
        replay()
        assert (out.get() == 2 * x).all()


def test_an_arena_gives_the_same_places_again_once_it_is_large_enough():
    class Counting(Device):
        made = 0

        def allocate(self, size):
            self.made += 1
            return object(), 4096 * self.made

    device = Counting()
    arena, seen = Arena(device), []
    for _ in range(3):
        with device.working(arena):
            seen.append([device.empty(size, np.float32).address for size in (10, 100, 3)])
    assert seen[1] == seen[2] and device.made == 4 and arena.generation == 1
    assert np.diff(seen[1]).tolist() == [256, 512]


# Refusals


def test_a_gpu_that_is_not_there_is_one_line(capsys):
    with pytest.raises(BackendError, match="CuPy|no GPU") as refused:
        minimtp.load("tiny-gemma4", backend="cupy")
    assert len(str(refused.value).splitlines()) == 1
    with pytest.raises(BackendError, match="'tpu'"):
        minimtp.load("tiny-gemma4", backend="tpu")


def test_a_device_computes_in_float32_and_for_some_widths_only(tmp_path):
    with pytest.raises(BackendError, match="float32"):
        minimtp.load("tiny-gemma4", backend=Host(), dtype="float64")
    with pytest.raises(BackendError, match="width 24 have no kernel"):
        device_kv.DeviceKV(Host(), 2, 24, "float32", 10)


def test_a_model_that_does_not_fit_is_refused_with_its_numbers():
    device = Host()
    device.memory = plan.DRIVER + (3 << 20)
    with pytest.raises(plan.DoesNotFit, match="weights"):
        minimtp.load("tiny-gemma4", backend=device)
    device.memory = plan.DRIVER + (1 << 30)
    minimtp.load("tiny-gemma4", backend=device).new_cache(64)
    roomy = minimtp.load("tiny-gemma4", backend=device)
    device.memory = plan.DRIVER + sum(roomy.checkpoint.stored_bytes().values()) + (1 << 20)
    with pytest.raises(plan.DoesNotFit, match="at 2,048 tokens"):
        roomy.new_cache(2048)


def test_weights_without_a_kernel_are_named():
    from minimtp.device_weights import weight_on
    from minimtp.quant import Plain

    with pytest.raises(CheckpointError, match="no kernel"):
        weight_on(Host(), Plain(np.zeros((4, 4)), "F64"))
