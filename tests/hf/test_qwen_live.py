"""minimtp's Qwen 3.5 against transformers, live: random checkpoints of every configuration, two seeds each.

As test_live. transformers has no MTP layer: that reference is put together from its parts (qwen_reference.py).
"""

from functools import cached_property
from itertools import chain

import numpy as np
import pytest
import torch
from double import double
from make_qwen_vectors import STEPS, float32_ways, load_config, make
from make_vectors import FOLDER as VECTORS
from qwen_reference import load_qwen, mtp_draft, read
from random_qwen import CONFIGS, WITH_MTP, prompt, write_qwen
from safetensors.numpy import load_file
from test_live import TOLERANCE, WAYS, WEIGHTS, odd_chunks, ours_reads, worst

import minimtp
from minimtp.checkpoint import CheckpointError

torch.set_num_threads(1)
GREEDY, SOFT = minimtp.Sampling(temperature=0.0), minimtp.Sampling(temperature=1.0)
CASES = [(name, seed) for name in CONFIGS for seed in (CONFIGS[name]["seed"], 100 + CONFIGS[name]["seed"])]
CASES += [("bundled", 0)]


class Model:
    """A checkpoint in both engines, and what transformers says about one prompt."""

    def __init__(self, name, seed, folder):
        self.reference, self.folder = load_config(name, folder, seed)
        self.ids_T = prompt(name, seed)

    @classmethod
    def bundled(cls):
        """The trained one, on held-out text: the int4 checkpoint comes through compressed-tensors."""
        model = cls.__new__(cls)
        model.folder = WEIGHTS / "tiny-qwen35"
        model.reference = load_qwen(model.folder)
        model.ids_T = model.ours().tokenizer.encode((WEIGHTS / "heldout.txt").read_text())[:150]
        return model

    @cached_property
    def truth(self):
        with double(self.reference):
            return read(self.reference, self.ids_T)

    def ours(self, dtype="float64"):
        return minimtp.load(self.folder, dtype=dtype)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def model(request, tmp_path_factory):
    name, seed = request.param
    return Model.bundled() if name == "bundled" else Model(name, seed, tmp_path_factory.mktemp(name))


# The reference is sound ----------------------------------------------------------------------------------------------


def test_the_reference_is_double(model):
    """Its result does not depend on chunks, to rounding of double."""
    with double(model.reference):
        again = read(model.reference, model.ids_T, odd_chunks(len(model.ids_T)))
    assert worst(again.logits_TV, model.truth.logits_TV) < 1e-11
    assert worst(again.hidden_TD, model.truth.hidden_TD) < 1e-11


@pytest.mark.parametrize("name", CONFIGS)
def test_the_vectors_are_what_transformers_computes(name):
    """make_qwen_vectors.py, run again on this machine, gives the committed vectors."""
    committed = load_file(VECTORS / f"qwen_{name}.safetensors")
    vectors, _ = make(name)
    assert {key for key in committed if not key.startswith("error.")} == set(vectors)
    for key, value in vectors.items():
        assert worst(value, committed[key]) < 1e-10, key


def test_the_twin_holds_what_compressed_tensors_unpacks(tmp_path):
    packed = load_qwen(write_qwen("int4", tmp_path / "packed")).state_dict()
    plain = load_qwen(write_qwen("int4", tmp_path / "plain", twin=True)).state_dict()
    assert packed.keys() == plain.keys() and all((packed[key] == plain[key]).all() for key in packed)


# Random checkpoints --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_target_in_double(model, way):
    logits_TV, hidden_TD, _ = ours_reads(model.ours(), model.ids_T, WAYS[way](len(model.ids_T)))
    assert worst(logits_TV, model.truth.logits_TV) <= TOLERANCE
    assert worst(hidden_TD, model.truth.hidden_TD) <= TOLERANCE


def test_target_in_float32(model):
    """Our float32 error is at most twice transformers' own, the worst of its ways."""
    theirs = list(float32_ways(model.reference, model.ids_T, single=False))
    target, length = model.ours("float32"), len(model.ids_T)
    for chunks in ([length], odd_chunks(length)):
        logits_TV, hidden_TD, _ = ours_reads(target, model.ids_T, chunks)
        for ours, key in ((logits_TV, "logits_TV"), (hidden_TD, "hidden_TD")):
            truth = getattr(model.truth, key)
            assert worst(ours, truth) <= 2 * max(worst(getattr(each, key), truth) for each in theirs)


@pytest.mark.parametrize("hidden", ("post-norm", "pre-norm"))
def test_mtp_in_double(model, hidden):
    """Drafts of four tokens after prefixes reached by plain reading and through partial acceptances."""
    target, ids_T = model.ours(), model.ids_T
    if model.reference.mtp is None:
        with pytest.raises(CheckpointError, match="mtp"):
            minimtp.load_drafter("auto", target)
        return
    drafter = minimtp.load_drafter("auto", target, hidden=hidden)
    theirs_TD = model.truth.hidden_TD if hidden == "post-norm" else model.truth.before_norm_TD
    for accepted, length in enumerate((1, 3, len(ids_T) // 3, 20, len(ids_T) - 3, len(ids_T) - 1), start=-1):
        with double(model.reference):
            tokens, logits_KV = mtp_draft(model.reference, theirs_TD, ids_T, length, STEPS)
        cache, news, behind = (read_prefix if accepted < 0 else accept_some)(target, drafter, ids_T, length, accepted)
        assert cache.length == length
        p_KV = SOFT.law(logits_KV)
        u_K = [p_V[:token].sum() + p_V[token] / 2 for token, p_V in zip(tokens, p_KV, strict=True)]
        drawn = drafter.propose(news, behind, cache, STEPS, SOFT, u_K)
        assert list(drawn.tokens) == tokens and worst(drawn.q_KV, p_KV) <= TOLERANCE, length
        drafted = drafter.propose(news[-1:], behind[-1:], cache, STEPS, GREEDY, ())
        assert list(drafted.tokens) == tokens, length


def read_prefix(target, drafter, ids_T, length, accepted):
    cache = target.new_cache()
    return cache, ids_T[1 : length + 1], target.forward(ids_T[:length], cache).hidden_TD


def accept_some(target, drafter, ids_T, length, accepted):
    """A round that drafts four tokens and accepts so many, or as many as fit behind a first token."""
    accepted = min(accepted, length - 2)
    start = length - 1 - accepted
    cache, news, behind = read_prefix(target, drafter, ids_T, start, accepted)
    drafter.propose(news, behind, cache, 4, GREEDY, ())
    cache.commit()
    wrong = [(ids_T[length] + 1 + j) % target.config.vocab_size for j in range(4 - accepted)]
    hidden_ND = target.forward(ids_T[start:length] + wrong, cache).hidden_TD[: accepted + 1]
    cache.rollback(len(wrong))
    return cache, ids_T[start + 1 : length + 1], hidden_ND


# Generation ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def transformers_generates(model, ids_T, count):
    """transformers' own greedy generation, in double; with a recurrent state it does not draft."""
    model.generation_config.eos_token_id = None
    prompt_T = torch.tensor([ids_T])
    out = model.generate(prompt_T, attention_mask=torch.ones_like(prompt_T), do_sample=False, max_new_tokens=count)
    return out[0, len(ids_T) :].tolist()


@pytest.mark.parametrize("name, num_draft", [
    ("dense", 1), ("dense", 4), ("int4", 3), ("three_to_one", 2), ("moe", 4), ("moe_int4", 3), ("moe_one_expert", 5),
])  # fmt: skip
def test_generation_with_drafts(name, num_draft, tmp_path):
    """Our tokens are transformers' own; every draft of ours is what the MTP reference drafts from scratch."""
    assert name in WITH_MTP
    model = Model(name, 40, tmp_path)
    target = model.ours()
    drafter, prompt_T = minimtp.load_drafter("auto", target), model.ids_T[:20]
    steps = list(minimtp.generate(target, prompt_T, drafter, num_draft=num_draft, max_new_tokens=50))
    tokens = list(chain.from_iterable(step.tokens for step in steps))
    assert 0 < sum(step.accepted for step in steps) < sum(step.drafted for step in steps)
    with double(model.reference):
        assert tokens == transformers_generates(model.reference, prompt_T, 50)
        hidden_TD, done = read(model.reference, prompt_T + tokens).hidden_TD, len(prompt_T)
        for step in steps:
            if step.drafted:
                read_by_then = done - 1  # all but the newest token
                drafted, _ = mtp_draft(model.reference, hidden_TD, prompt_T + tokens, read_by_then, step.drafted)
                assert list(step.draft.tokens) == drafted, done
            done += len(step.tokens)


def test_errors_are_found(tmp_path):
    """Negative control: entries made from drafted hidden states instead of true ones draft by other laws."""
    model = Model("dense", 50, tmp_path)
    ids_T, length = model.ids_T, 30
    stale_TD = model.truth.hidden_TD.copy()
    stale_TD[length - 3 : length - 1] = stale_TD[length - 4]
    with double(model.reference):
        _, logits_KV = mtp_draft(model.reference, model.truth.hidden_TD, ids_T, length, STEPS)
        _, other_KV = mtp_draft(model.reference, stale_TD, ids_T, length, STEPS)
    assert np.abs(logits_KV - other_KV)[0].max() > 1e-3
