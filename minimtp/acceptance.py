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
from functools import partial
from numbers import Integral, Real

import numpy as np

from .display import FATES, escaped, fated, framed
from .sampling import draw


@dataclass(frozen=True)
class Verdict:
    """accepted: how many draft tokens stand; token: what follows them, a correction, or the bonus after all K."""

    accepted: int
    token: int

    def _repr_html_(self):
        kept = "".join(fated(f"{FATES['accepted'].mark}{j + 1}", "accepted") for j in range(self.accepted))
        return framed(f"{kept or 'no draft token'} accepted, then token <b>{escaped(self.token)}</b>")


@dataclass(frozen=True)
class Rule:
    """emits: the law of its output, "p", "argmax p" or "not p"; soft: whether it judges by draft.soft_KV, not q_KV."""

    accept: Callable
    law: Callable
    emits: str = "p"
    soft: bool = False


def accept(rule, p_JV, draft, u_J, **parameters):
    """The verdict of `rule` on a draft: draft.tokens (K ids), and draft.q_KV, the laws they were drawn from.

    p_JV: laws [K + 1, V]; draft.q_KV: laws [K, V], or None for point masses (tokens drafted by argmax);
    u_J: K + 1 uniforms in [0, 1).  ValueError: a wrong shape, an entry that is no law (finite, >= 0, sum within 1e-6
    of 1), a token outside the vocabulary or that its own q could not have drawn, an unknown rule or parameter, a
    parameter out of its range, a draft without the soft laws that `hf-gemma4` looks at.
    """
    decide = decision(rule, p_JV, draft, **parameters)
    K = len(draft.tokens)
    u_J = np.asarray(u_J, dtype=np.float64)
    if u_J.shape != (K + 1,) or not ((0 <= u_J) & (u_J < 1)).all():
        raise ValueError(f"u_J is {u_J.tolist()}; wanted {K + 1} uniforms in [0, 1) for {K} draft tokens")
    return decide(u_J)


def decision(rule, p_JV, draft, **parameters):
    """All of `accept` but the uniforms: a function u_J -> Verdict, which checks nothing more."""
    found = _lookup(rule, parameters)
    tokens_K = np.asarray(draft.tokens).tolist()
    K = len(tokens_K)
    p_JV = _laws("p_JV", p_JV, (K + 1, None))
    V = p_JV.shape[1]
    for token in tokens_K:
        _check_token("a draft token", token, V)
    name = "soft_KV" if found.soft else "q_KV"
    if found.soft and draft.soft_KV is None and K:
        raise ValueError(f"rule {rule!r} judges by draft.soft_KV, the drafter's soft law; this draft has none")
    q_KV = _drafter_laws(name, getattr(draft, name), tokens_K, V)
    return partial(found.accept, p_JV, q_KV, tokens_K, **parameters)


def exact_law(rule, p_V, q, **parameters):
    """The law [V] of the first token that `rule` emits where the target's law is p_V, by enumeration.

    q: the drafter's law [V], or a token id for a point mass.  A rule is lossless where this equals p_V.  `block` over
    one draft token; `hf-gemma4` drafts the argmax of q.
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


def block(p_JV, q_KV, tokens_K, u_J):
    """Keep the longest prefix n with u[n - 1] < h(n), then draw from norm[rho(n) p - q]+: tests of a block as a whole.

    Sun et al. 2403.10444, algorithm 2; vLLM's `block`.  rho(n) = min(1, rho(n - 1) p/q) is what the target leaves of
    the first n tokens, and h(n) = S / (S + 1 - rho(n)) with S = sum [rho(n) p - q]+; after the last token h = rho.
    """
    rho, K = block_rho(p_JV, q_KV, tokens_K), len(tokens_K)
    if K == 0 or u_J[K - 1] < rho[K]:
        return Verdict(K, draw(p_JV[K], u_J[-1]))
    for n in range(K - 1, 0, -1):
        spare = np.maximum(rho[n] * p_JV[n] - q_KV[n], 0).sum()
        if u_J[n - 1] * (spare + 1 - rho[n]) < spare:
            return Verdict(n, draw(residual(rho[n] * p_JV[n], q_KV[n]), u_J[-1]))
    return Verdict(0, draw(residual(p_JV[0], q_KV[0]), u_J[-1]))


def block_rho(p_JV, q_KV, tokens_K):
    """[rho(0) = 1, .., rho(K)]: what the target leaves of the first n tokens."""
    rho = [1.0]
    for j, token in enumerate(tokens_K):
        rho.append(min(1.0, rho[j] * p_JV.item(j, token) / q_KV.item(j, token)))
    return rho


def typical(p_JV, q_KV, tokens_K, u_J, *, epsilon=0.09, delta=0.3):
    """Keep a draft token with p > min(epsilon, delta exp(-entropy of p)), else draw from p (Medusa, 2401.10774)."""
    for j, token in enumerate(tokens_K):
        if not p_JV[j, token] > typical_threshold(p_JV[j], epsilon, delta):
            return Verdict(j, draw(p_JV[j], u_J[-1]))
    return Verdict(len(tokens_K), draw(p_JV[-1], u_J[-1]))


def typical_law(p_V, q_V, *, epsilon=0.09, delta=0.3):
    """What is probable enough stands as drafted, the rest is drawn anew: neither part knows of p's proportions."""
    kept_V = q_V * (p_V > typical_threshold(p_V, epsilon, delta))
    return kept_V + (q_V - kept_V).sum() * p_V


def typical_threshold(p_V, epsilon, delta):
    some_N = p_V[p_V > 0]
    return min(epsilon, delta * np.exp((some_N * np.log(some_N)).sum()))


def ensemble(p_JV, q_KV, tokens_K, u_J, *, assistant_ensemble_weight=0.5):
    """`rejection` with w p + (1 - w) q in p's place: keep with probability min(1, 1 - w + w p/q), else norm[p - q]+.

    DIVERSED, 2604.07622; transformers' assistant_ensemble_weight, which has no default there.  The bonus is p's.
    """
    w = assistant_ensemble_weight
    for j, token in enumerate(tokens_K):
        if not u_J[j] < 1 - w + w * (p_JV.item(j, token) / q_KV.item(j, token)):
            return Verdict(j, draw(residual(p_JV[j], q_KV[j]), u_J[-1]))
    return Verdict(len(tokens_K), draw(p_JV[-1], u_J[-1]))


def ensemble_law(p_V, q_V, *, assistant_ensemble_weight=0.5):
    """min(q, w p + (1 - w) q) stands; the residual of the mixture against q is that of p against q."""
    kept_V = np.minimum(q_V, assistant_ensemble_weight * p_V + (1 - assistant_ensemble_weight) * q_V)
    return kept_V + (q_V - kept_V).sum() * residual(p_V, q_V)


def threshold(p_JV, q_KV, tokens_K, u_J, *, threshold_single=1.0, threshold_acc=1.0):
    """Keep a draft token with p >= threshold_single, or with probability min(1, p / threshold_acc); else p without it.

    SGLang's tree_speculative_sampling_target_only for one draft token a depth; it never looks at q.  Lossless only at
    both defaults: then it is `rejection` for point masses.
    """
    for j, token in enumerate(tokens_K):
        p = p_JV.item(j, token)
        if not (p > 0 and (p >= threshold_single or u_J[j] < p / max(threshold_acc, 1e-9))):
            return Verdict(j, draw(residual(p_JV[j], one_hot(token, p_JV.shape[1])), u_J[-1]))
    return Verdict(len(tokens_K), draw(p_JV[-1], u_J[-1]))


def threshold_law(p_V, q_V, *, threshold_single=1.0, threshold_acc=1.0):
    """A draft token that falls, d, leaves p(t) / (1 - p(d)) to every other token t."""
    sure_V = (p_V > 0) & (p_V >= threshold_single)
    kept_V = q_V * np.where(sure_V, 1, np.minimum(1, p_V / max(threshold_acc, 1e-9)))
    fallen_V = (q_V - kept_V) / np.where(p_V < 1, 1 - p_V, 1)
    return kept_V + (fallen_V.sum() - fallen_V) * p_V


def relaxed(p_JV, q_KV, tokens_K, u_J, *, relaxed_topk=1, relaxed_delta=0.0):
    """Keep a draft token among p's relaxed_topk with p >= max p - relaxed_delta, else draw from p.

    TensorRT-LLM's use_relaxed_acceptance_for_thinking, at its defaults; of equals the lowest ids are the top.
    """
    for j, token in enumerate(tokens_K):
        if not relaxed_candidates(p_JV[j], relaxed_topk, relaxed_delta)[token]:
            return Verdict(j, draw(p_JV[j], u_J[-1]))
    return Verdict(len(tokens_K), draw(p_JV[-1], u_J[-1]))


def relaxed_law(p_V, q_V, *, relaxed_topk=1, relaxed_delta=0.0):
    """As `typical`, with another set of tokens that stand."""
    kept_V = q_V * relaxed_candidates(p_V, relaxed_topk, relaxed_delta)
    return kept_V + (q_V - kept_V).sum() * p_V


def relaxed_candidates(p_V, topk, delta):
    """True where a draft token would stand."""
    last = np.partition(p_V, -min(topk, len(p_V)))[-min(topk, len(p_V))]
    stands_V = p_V > last
    stands_V[np.flatnonzero(p_V == last)[: topk - np.count_nonzero(stands_V)]] = True
    return stands_V & (p_V >= p_V.max() - delta)


def hf_gemma4(p_JV, soft_KV, tokens_K, u_J):
    """An exhibit: argmax drafts judged as if they had been drawn from the drafter's soft law.

    transformers 5.8 to 5.23, SinglePositionMultiTokenCandidateGenerator with _speculative_sampling (issue 47932), whose
    test is u <= p/q, so that u = 0 keeps even an impossible token.
    """
    for j, token in enumerate(tokens_K):
        if not u_J[j] <= p_JV.item(j, token) / soft_KV.item(j, token):
            return Verdict(j, draw(residual(p_JV[j], soft_KV[j]), u_J[-1]))
    return Verdict(len(tokens_K), draw(p_JV[-1], u_J[-1]))


def hf_gemma4_law(p_V, soft_V):
    """All that `rejection` keeps of many drafts falls to one token: the better the drafter, the greedier the output."""
    best = int(soft_V.argmax())
    keep = min(1, p_V.item(best) / soft_V.item(best))
    return keep * one_hot(best, len(p_V)) + (1 - keep) * residual(p_V, soft_V)


RULES = {
    "greedy": Rule(greedy, greedy_law, "argmax p"),
    "rejection": Rule(rejection, rejection_law),
    "match": Rule(match, match_law),
    "block": Rule(block, rejection_law),  # over one draft token the two rules are one
    "typical": Rule(typical, typical_law, "not p"),
    "ensemble": Rule(ensemble, ensemble_law, "not p"),
    "threshold": Rule(threshold, threshold_law, "not p"),
    "relaxed": Rule(relaxed, relaxed_law, "not p"),
    "hf-gemma4": Rule(hf_gemma4, hf_gemma4_law, "not p", soft=True),
}
PARAMETERS = {  # kind, least and most
    "epsilon": (Real, 0, 1),
    "delta": (Real, 0, np.inf),
    "assistant_ensemble_weight": (Real, 0, 1),
    "threshold_single": (Real, 0, 1),
    "threshold_acc": (Real, 0, 1),
    "relaxed_topk": (Integral, 1, np.inf),
    "relaxed_delta": (Real, 0, 1),
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
    known = list(inspect.signature(RULES[rule].law).parameters)[2:] if parameters else []
    for name, value in parameters.items():
        if name not in known:
            raise ValueError(f"rule {rule!r} has no parameter {name!r}; it has {', '.join(known) or 'none'}")
        kind, least, most = PARAMETERS.get(name, (Real, -np.inf, np.inf))
        if not (isinstance(value, kind) and least <= value <= most):
            wanted = "an integer" if kind is Integral else "a number"
            raise ValueError(f"{name} is {value!r}; wanted {wanted} in [{least}, {most}]")
    return RULES[rule]


def point_masses(tokens_K, V):
    """The one-hot laws [K, V] of tokens drafted by argmax."""
    K = len(tokens_K)
    q_KV = np.zeros((K, V))  # zeroed lazily by the system: a row costs nothing until it is used
    q_KV[np.arange(K), tokens_K] = 1
    return q_KV


def _drafter_laws(name, q_KV, tokens_K, V):
    """q_KV checked, or the one-hot rows of a point-mass draft."""
    if q_KV is None or not tokens_K:
        return point_masses(tokens_K, V)
    q_KV = _laws(name, q_KV, (len(tokens_K), V))
    for j, token in enumerate(tokens_K):
        if q_KV[j, token] == 0:
            raise ValueError(f"draft token {j} is {token}, but its law {name}[{j}] gives it no probability")
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
