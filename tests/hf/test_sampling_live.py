"""Laws against transformers' own logits processors, built and ordered by generate's own code."""

from functools import cache, partial
from itertools import product

import numpy as np
import pytest

from minimtp.sampling import Sampling

torch = pytest.importorskip("torch")
GenerationConfig = pytest.importorskip("transformers").GenerationConfig
GenerationMixin = pytest.importorskip("transformers.generation.utils").GenerationMixin

COMBINATIONS = [dict(zip(("temperature", "top_k", "top_p", "min_p"), values)) for values in product(
    (1.0, .6, 1.9), (None, 1, 7, 5000), (None, .05, .7, .95, 1.0), (None, 0.0, .1, 1.0))]


@cache
def processors(temperature, top_k, top_p, min_p, suppress=()):
    config = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k or 0, top_p=top_p or 1.0,
                              min_p=min_p, suppress_tokens=list(suppress) or None)
    built = GenerationMixin()._get_logits_processor(config, input_ids_seq_length=1, device="cpu")
    wanted = [temperature != 1, top_k is not None, top_p is not None and top_p < 1, min_p is not None, bool(suppress)]
    assert len(built) == sum(wanted)
    return built


def transformers_law(logits_TV, **how):
    """softmax of what generate would sample from, in the dtype of the logits."""
    ids = torch.zeros((len(logits_TV), 1), dtype=torch.long)
    return processors(**how)(ids, torch.from_numpy(logits_TV)).softmax(-1).numpy()


def logits_with_ties(rng, T, V):
    """Rows from all different to nearly all equal, some ids at -inf."""
    z_TV = rng.normal(size=(T, V)) * rng.choice([.5, 2, 5], (T, 1))
    for z_V, steps in zip(z_TV, rng.choice([0, 1, 2, 8], T)):
        if steps:
            z_V[:] = np.round(z_V * steps) / steps
        z_V[rng.random(V) < .1] = -np.inf
        z_V[rng.integers(V)] = 1
    return z_TV


def assert_same(ours, theirs, atol):
    np.testing.assert_array_equal(ours > 0, theirs > 0)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("V", [1, 2, 5, 16])
def test_small_vocabularies_ties_included(V):
    """torch sorts up to 16 entries stably, so here even top-p's choice among equals is transformers' own."""
    z_TV = logits_with_ties(np.random.default_rng(V), 24, V)
    for how in COMBINATIONS:
        assert_same(Sampling(**how).law(z_TV), transformers_law(z_TV, **how), 1e-14)


@pytest.mark.parametrize("V", [17, 300, 4001])
def test_large_vocabularies_ties_included(V, monkeypatch):
    """Beyond 16 entries torch's default sort leaves the order of equals open; with its stable sort the laws agree."""
    z_TV = logits_with_ties(np.random.default_rng(V), 4, V)
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))
    for how in COMBINATIONS:
        assert_same(Sampling(**how).law(z_TV), transformers_law(z_TV, **how), 1e-14)


def test_an_unstable_sort_changes_which_of_equals_and_nothing_else():
    z_TV = logits_with_ties(np.random.default_rng(0), 6, 300)
    for how in COMBINATIONS:
        ours, theirs = Sampling(**how).law(z_TV), transformers_law(z_TV, **how)
        np.testing.assert_allclose(np.sort(ours), np.sort(theirs), rtol=0, atol=1e-14)
        differ = ours != theirs
        assert not (differ & (ours > 0) & (theirs > 0) & (abs(ours - theirs) > 1e-14)).any()


def test_suppressed_tokens():
    z_TV = logits_with_ties(np.random.default_rng(1), 8, 16)
    z_TV[:, 5] = 1
    for how in COMBINATIONS[::7]:
        how = how | {"suppress": (0, 3, 15)}
        assert_same(Sampling(**how).law(z_TV), transformers_law(z_TV, **how), 1e-14)


def test_float32_as_generate_computes_it_agrees_to_its_rounding():
    z_TV = np.random.default_rng(2).normal(size=(4, 500)).astype(np.float32) * 3
    for how in COMBINATIONS:
        assert_same(Sampling(**how).law(z_TV), transformers_law(z_TV, **how), 2e-6)


def test_the_full_vocabulary_of_gemma():
    z_TV = np.random.default_rng(3).normal(size=(2, 262_144)) * 3
    for how in ({"temperature": 1.0, "top_k": 64, "top_p": .95, "min_p": None},
                {"temperature": .7, "top_k": None, "top_p": .95, "min_p": .01}):
        assert_same(Sampling(**how).law(z_TV), transformers_law(z_TV, **how), 1e-13)
