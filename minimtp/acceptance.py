"""Acceptance rules: the target's laws, a draft and uniforms in; how many draft tokens stand, and one token more, out.

p is the target's law, q the drafter's.  K draft tokens, J = K + 1 rows of p: row j is the law of the token in draft
token j's place, row K that of the bonus token.  No logits, models or random state here: the uniforms are arguments,
so every decision can be replayed in another engine.  Of u_J, u[:K] are the tests and u[K] draws the last token.

A rule is a function (p_JV, q_KV, tokens_K, u_J, **its parameters) -> Verdict, beside its exact law, a function
(p_V, q_V, **its parameters) -> r_V: the law of the first emitted token when the draft token has law q_V, summed over
every draft token and every outcome of its test.  Both see a point mass as the one-hot q that it is.  RULES lists them.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .sampling import draw


@dataclass(frozen=True)
class Verdict:
    """accepted: how many draft tokens stand; token: what follows them, a correction, or the bonus after all K."""

    accepted: int
    token: int


@dataclass(frozen=True)
class Rule:
    accept: Callable
    law: Callable


def accept(rule, p_JV, draft, u_J, **parameters):
    """The verdict of `rule` on a draft: draft.tokens (K ids), and draft.q_KV, the laws they were drawn from.

    p_JV: laws [K + 1, V]; draft.q_KV: laws [K, V], or None for point masses (tokens drafted by argmax);
    u_J: K + 1 uniforms in [0, 1).  ValueError: a wrong shape, an entry that is no law (finite, >= 0, sum within 1e-6
    of 1), a token outside the vocabulary or that its own q could not have drawn, an unknown rule or parameter.
    """
    accept_rule = _lookup(rule, parameters).accept
    tokens_K = np.asarray(draft.tokens).tolist()
    K = len(tokens_K)
    p_JV = _laws("p_JV", p_JV, (K + 1, None))
    V = p_JV.shape[1]
    for token in tokens_K:
        _check_token("a draft token", token, V)
    q_KV = _drafter_laws(draft.q_KV, tokens_K, V)
    u_J = np.asarray(u_J, dtype=np.float64)
    if u_J.shape != (K + 1,) or not ((0 <= u_J) & (u_J < 1)).all():
        raise ValueError(f"u_J is {u_J.tolist()}; wanted {K + 1} uniforms in [0, 1) for {K} draft tokens")
    return accept_rule(p_JV, q_KV, tokens_K, u_J, **parameters)


def exact_law(rule, p_V, q, **parameters):
    """The law [V] of the first token that `rule` emits where the target's law is p_V, by enumeration.

    q: the drafter's law [V], or a token id for a point mass.  A rule is lossless where this equals p_V.
    ValueError as in `accept`.
    """
    law_of_rule = _lookup(rule, parameters).law
    p_V = _laws("p_V", p_V, (None,))
    if np.ndim(q) == 0:
        _check_token("q", q, len(p_V))
        return law_of_rule(p_V, one_hot(q, len(p_V)), **parameters)
    return law_of_rule(p_V, _laws("q", q, p_V.shape), **parameters)


# --- the rules ---


def greedy(p_JV, q_KV, tokens_K, u_J):
    """Keep a draft token while it is the target's argmax, then emit the argmax (every engine at temperature 0)."""
    for j, token in enumerate(tokens_K):
        best = p_JV[j].argmax()
        if token != best:
            return Verdict(j, int(best))
    return Verdict(len(tokens_K), int(p_JV[-1].argmax()))


def greedy_law(p_V, q_V):
    """A draft token that is the argmax stands, any other is replaced by it."""
    best_V = one_hot(p_V.argmax(), len(p_V))
    return q_V * best_V + (q_V * (1 - best_V)).sum() * best_V


def rejection(p_JV, q_KV, tokens_K, u_J):
    """Keep draft token d with probability min(1, p(d)/q(d)), else draw from norm[p - q]+.

    Leviathan et al. 2211.17192, algorithm 1; Chen et al. 2302.01318.  For a point mass these are p(d), and p without d
    (vLLM's and SGLang's default for MTP drafts).  The bonus token comes from p.
    """
    for j, token in enumerate(tokens_K):
        if not u_J[j] < p_JV.item(j, token) / q_KV.item(j, token):  # Python floats: over a tiny q, inf, no warning
            return Verdict(j, draw(residual(p_JV[j], q_KV[j]), u_J[-1]))
    return Verdict(len(tokens_K), draw(p_JV[-1], u_J[-1]))


def rejection_law(p_V, q_V):
    """Draft token d has probability q(d) and stands with min(1, p(d)/q(d)): min(p, q) in all."""
    kept_V = np.minimum(p_V, q_V)
    return kept_V + (q_V - kept_V).sum() * residual(p_V, q_V)


def match(p_JV, q_KV, tokens_K, u_J):
    """Draw from p, token j from u[j], and go on while the draw equals the draft (llama.cpp, mlx-vlm, TensorRT-LLM)."""
    for j, token in enumerate(tokens_K):
        own = draw(p_JV[j], u_J[j])
        if own != token:
            return Verdict(j, own)
    return Verdict(len(tokens_K), draw(p_JV[-1], u_J[-1]))


def match_law(p_V, q_V):
    """Draft token and target's own draw are independent: t stands with q(t) p(t), or replaces what differs from it."""
    return q_V * p_V + (q_V.sum() - q_V) * p_V


RULES = {
    "greedy": Rule(greedy, greedy_law),
    "rejection": Rule(rejection, rejection_law),
    "match": Rule(match, match_law),
}


# --- their parts ---


def residual(p_V, q_V):
    """norm[p - q]+ [V]; p where nothing is left, which is where p and q are equal to rounding."""
    rest_V = np.maximum(p_V - q_V, 0)
    total = rest_V.sum()
    return rest_V / total if total > 0 else p_V


def one_hot(token, V):
    law_V = np.zeros(V)
    law_V[token] = 1
    return law_V


# --- checks at the edge: one minimum and one sum over every law ---


def _lookup(rule, parameters):
    if rule not in RULES:
        raise ValueError(f"unknown acceptance rule {rule!r}; known: {', '.join(RULES)}")
    if parameters:
        known = list(inspect.signature(RULES[rule].law).parameters)[2:]
        unknown = [name for name in parameters if name not in known]
        if unknown:
            raise ValueError(f"rule {rule!r} has no parameter {unknown[0]!r}; it has {', '.join(known) or 'none'}")
    return RULES[rule]


def _drafter_laws(q_KV, tokens_K, V):
    """q_KV checked, or the one-hot rows of a point-mass draft."""
    K = len(tokens_K)
    if q_KV is None or K == 0:
        q_KV = np.zeros((K, V))  # zeroed lazily by the system: a row costs nothing until it is used
        q_KV[np.arange(K), tokens_K] = 1
        return q_KV
    q_KV = _laws("q_KV", q_KV, (K, V))
    for j, token in enumerate(tokens_K):
        if q_KV[j, token] == 0:
            raise ValueError(f"draft token {j} is {token}, but its law q_KV[{j}] gives it no probability")
    return q_KV


def _laws(name, p, shape):
    """p as float64 laws of the wanted shape, whose None stands for any vocabulary size."""
    p = np.asarray(p, dtype=np.float64)
    if p.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, p.shape)) or not p.shape[-1]:
        raise ValueError(f"{name} has shape {list(p.shape)}; wanted [{', '.join(str(n or 'V') for n in shape)}]")
    with np.errstate(invalid="ignore"):
        least, total = p.min(-1), p.sum(-1)
    bad = np.argwhere(~((least >= 0) & (abs(total - 1) <= 1e-6)))  # NaN and inf fail one of these too
    if len(bad):
        at = tuple(bad[0].tolist())
        raise ValueError(
            f"{name}{list(at) or ''} is no law: least entry {least[at]:g}, sum {total[at]:.9g}; "
            "wanted finite entries >= 0 that sum to 1"
        )
    return p


def _check_token(name, token, V):
    if not (isinstance(token, (int, np.integer)) and 0 <= token < V):
        raise ValueError(f"{name} is {token!r}; wanted a token id in [0, {V})")
