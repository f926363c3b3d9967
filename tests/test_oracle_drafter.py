"""check_drafter: our own drafters pass, and each planted defect is named; minimtp.oracle needs nothing but NumPy."""

import subprocess
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import tiny
import tiny_qwen

import minimtp
from minimtp.oracle import check_drafter, expectations
from minimtp.oracle_drafter import OPTIONS
from minimtp.sampling import draw

PLAIN, GREEDY = minimtp.Sampling(), minimtp.Sampling(temperature=0.0)


# --- our own ---


class Ours:
    """One sequence of ours, as the check drives it."""

    def __init__(self, target, drafter, sampling, before_norm=False):
        self.target, self.drafter, self.sampling = target, drafter, sampling
        self.cache, self.hidden = target.new_cache(), []
        self.tap = f"layer.{len(target.config.layers) - 1}.out" if before_norm else None

    def read(self, ids):
        out = self.target.forward(ids, self.cache, taps=[self.tap] if self.tap else (), last=0)
        self.hidden += list(out.taps[self.tap] if self.tap else out.hidden_TD)

    def propose(self, text, num_draft, u_K):
        self.text = text
        rejected = max(0, self.cache.length - (len(text) - 1))
        self.cache.rollback(rejected)
        self.hidden = self.hidden[: self.cache.length]
        if unread := text[self.cache.length : -1]:
            self.read(unread)
        news, behind_ND = text[1:], np.stack(self.hidden)
        draft = self.drafter.propose(news, behind_ND, self.cache, num_draft, self.sampling, u_K)
        return draft.tokens, draft.q_KV

    def verify(self, tokens):
        self.read([self.text[-1], *tokens])


class Borrowing(Ours):
    """The same, which lets the check see what its drafter borrows."""

    def borrowed(self):
        return self.cache.layers[-1].read() if self.cache.length else ()


def gemma(name="window_4"):
    return tiny.pair(name)


def prompt(target, count=9):
    return tiny.random_prompt(target, count)


def test_our_assistant_drawn():
    target, drafter = gemma()
    expected = expectations(target, drafter, PLAIN)
    options = dict(num_draft=2, rounds=5, expected=expected, options=OPTIONS)
    claim = check_drafter(partial(Borrowing, target, drafter, PLAIN), prompt(target), 50, **options)
    assert claim.startswith("in 5 rounds, 3 with rejected drafts, it drafts as if afresh; draws each of 2 tokens from")
    assert claim.endswith("its drafts are those of 'as published'; the keys and values it borrows stay as they were")


@pytest.mark.parametrize("make", [gemma, lambda: tiny_qwen.pair("dense")], ids=["gemma", "qwen"])
def test_our_drafters_by_argmax(make):
    target, drafter = make()
    expected = expectations(target, drafter, PLAIN)
    claim = check_drafter(partial(Ours, target, drafter, GREEDY), prompt(target), 50, rounds=6, expected=expected)
    assert "drafts are point masses; its drafts are those of 'as published'" in claim


def test_our_mtp_layer_drawn():
    target, drafter = tiny_qwen.pair("dense")
    options = dict(num_draft=2, rounds=4, expected=expectations(target, drafter, PLAIN))
    assert "'as published'" in check_drafter(partial(Ours, target, drafter, PLAIN), prompt(target), 50, **options)


def test_prompt_lookup():
    target, _ = gemma()
    check_drafter(partial(Ours, target, minimtp.PromptLookup(), GREEDY), [3, 4, 5, 6, 3, 4, 5, 6, 3], 50)


@pytest.mark.parametrize("make", [gemma, lambda: tiny_qwen.pair("dense")], ids=["gemma", "qwen"])
def test_the_hidden_state_before_the_norm_is_a_defect(make):
    target, drafter = make()
    options = dict(num_draft=1, rounds=3, expected=expectations(target, drafter, PLAIN), options=OPTIONS)
    with pytest.raises(AssertionError, match="known defect: hidden state before the final norm"):
        check_drafter(partial(Ours, target, drafter, PLAIN, True), prompt(target), 50, **options)


def test_another_position_is_an_option():
    target, drafter = gemma()
    options = dict(num_draft=1, rounds=3, expected=expectations(target, drafter, PLAIN))
    other = partial(Ours, target, replace(drafter, position="committed"), PLAIN)
    assert "those of 'position P - 1'" in check_drafter(other, prompt(target), 50, **options, options=OPTIONS)
    with pytest.raises(AssertionError, match="it drafts like this known defect: position P - 1"):
        check_drafter(other, prompt(target), 50, **options)


def test_a_drafter_of_another_kind_is_like_none():
    target, drafter = gemma()
    halved = minimtp.Sampling(temperature=0.5)
    options = dict(num_draft=1, rounds=3, expected=expectations(target, drafter, PLAIN))
    with pytest.raises(AssertionError, match="at 9 tokens it drafts like none of .*, 0.[0-9]+ from the first in total"):
        check_drafter(partial(Ours, target, drafter, halved), prompt(target), 50, **options)


# --- a foreign drafter, and what can be wrong with it ---

V = 6
LAWS = np.random.RandomState(3).dirichlet(np.ones(V), 11)


class Toy:
    """Draws from a law that depends on all it has read, the KV of its target."""

    def __init__(self, defect=None, random=None):
        self.defect, self.random, self.read = defect, random, []

    def propose(self, text, num_draft, u_K):
        keep = len(self.read) if self.defect == "rejected tokens stay" else len(text) - 1
        self.read = [*text[:-1], *self.read[len(text) - 1 : keep]]
        tokens, laws, seen = [], [], sum(self.read) + text[-1]
        u_K = u_K if self.random is None else self.random.random_sample(num_draft)
        for j in range(num_draft):
            law = said = LAWS[(seen + sum(tokens)) % len(LAWS)]
            if self.defect == "top-2 drawn":
                law = np.where(law >= np.sort(law)[-2], law, 0)
            u = u_K[0] if self.defect == "one uniform" else u_K[(j + 1) % len(u_K)] if self.defect == "next" else u_K[j]
            greedy = self.defect in ("soft q", "argmax")
            token = int(law.argmax()) if greedy else draw(law / law.sum(), u)
            tokens.append(token)
            laws.append({"q after": LAWS[(seen + sum(tokens)) % len(LAWS)], "raw": said * 2}.get(self.defect, said))
        if self.defect == "writes" and num_draft:
            self.read[-1] = (self.read[-1] + 1) % V
        if self.defect == "one more" and num_draft:
            tokens, laws = [*tokens, 0], [*laws, laws[-1]]
        return tokens, None if self.defect == "argmax" else np.array(laws).reshape(-1, V)

    def verify(self, tokens):
        self.read += [self.read[-1], *tokens]

    def borrowed(self):
        return [np.array(self.read)]


def test_a_toy_that_is_right():
    claim = check_drafter(Toy, [1, 2, 3], V, num_draft=3)
    assert "draws each of 3 tokens from the law it says, by 256 uniforms each, with a uniform of its own" in claim
    assert "point masses" in check_drafter(partial(Toy, "argmax"), [1, 2, 3], V)


@pytest.mark.parametrize(
    "defect, said",
    [
        ("rejected tokens stay", "drafts depend on rejected tokens: a new sequence drafts otherwise, .*at 4 tokens"),
        ("soft q", "soft q on argmax drafts: draft token 0 is always the argmax, token . at 1.000 of all unif"),
        ("one uniform", r"shared uniforms: draft token 1 is drawn with u\[0\], not with u\[1\]"),
        ("next", r"shared uniforms: draft token 0 is drawn with u\[1\], not with u\[0\]"),
        ("top-2 drawn", "draft token 0 is not drawn from the law it is said to be: token . at "),
        ("q after", "draft token 0 is not drawn from the law it is said to be"),
        ("raw", "a row of q is no law: sums .2.0"),
        ("writes", "^KV written by a borrower: array 0 is another after drafting"),
        ("one more", "at 3 tokens: drafted .*, at most 3 of 6 were asked for"),
    ],
)
def test_defects_are_named(defect, said):
    with pytest.raises(AssertionError, match=said):
        check_drafter(partial(Toy, defect), [1, 2, 3], V, num_draft=3)


def test_drafts_without_laws_may_not_depend_on_rejected_tokens_either():
    class Pointwise(Toy):
        def propose(self, *arguments):
            return super().propose(*arguments)[0], None

    assert check_drafter(Pointwise, [1, 2, 3], V).startswith("in 8 rounds, 5 with rejected drafts")
    with pytest.raises(AssertionError, match=r"drafts depend on rejected tokens: a new sequence drafts otherwise, \["):
        check_drafter(partial(Pointwise, "rejected tokens stay"), [1, 2, 3], V)


def test_random_numbers_of_its_own():
    options = dict(num_draft=2, uniforms=False, samples=2000)
    random = np.random.RandomState(0)
    assert "what it draws: 2000 rows" in check_drafter(partial(Toy, None, random), [1, 2, 3], V, **options)
    for defect, said in (
        ("soft q", "soft q on argmax drafts: "),
        ("one uniform", "not drawn from the laws it says: position 1"),
        ("top-2 drawn", "not drawn from the laws it says: position 0"),
        ("rejected tokens stay", "drafts depend on rejected tokens: a new sequence drafts otherwise, by laws"),
    ):
        with pytest.raises(AssertionError, match=said):
            check_drafter(partial(Toy, defect, random), [1, 2, 3], V, **options)


# --- what it needs ---

ALONE = """
import sys

class OnlyNumPy:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] not in {"numpy", "minimtp", *sys.stdlib_module_names}:
            raise ModuleNotFoundError(f"no {name}: there is only NumPy here")

sys.meta_path.insert(0, OnlyNumPy())
import numpy as np
from minimtp import oracle

def fn(p_JV, tokens_K, q_KV, u_J):
    return int(u_J[0] < 0.5), 0

class Rows:
    def __init__(self):
        self.k, self.v = np.zeros((2, 0, 2, 4), np.float32)
    def append(self, k, v):
        self.k, self.v = np.concatenate([self.k, k]), np.concatenate([self.v, v])
    def rollback(self, n):
        self.k, self.v = self.k[:len(self.k) - n], self.v[:len(self.v) - n]
    def commit(self):
        pass
    def read(self):
        return self.k, self.v

class Drafter:
    def propose(self, text, num_draft, u_K):
        return [3] * num_draft, None

print(oracle.check_cache(Rows, refuses=False, rounds=10))
print(oracle.check_drafter(Drafter, [1, 2], 5))
oracle.assert_logits_close(np.ones((2, 3)), np.ones((2, 3)))
oracle.assert_same_law(np.array([0.5, 0.5]), np.array([0.5, 0.5]))
try:
    oracle.check_acceptance(fn)
except AssertionError as error:
    print(str(error)[:13])
print(sorted({name.split(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)))
"""


def test_numpy_is_all_the_oracle_needs():
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, timeout=60)
    assert not done.returncode, done.stderr
    cache, drafter, acceptance, modules = done.stdout.splitlines()
    assert cache.startswith("cache: after each of 10 rounds") and drafter.endswith("point masses")
    assert acceptance == "not rejection" and "'minimtp', 'numpy'" in modules
    assert not any(name in modules for name in ("tokenizers", "threadpoolctl", "jinja2", "torch"))
