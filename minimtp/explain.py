"""What decided about a token, in numbers and a sentence, rule by rule: the explanations of a watched run."""

from dataclasses import dataclass

import numpy as np

from .acceptance import (
    RULES,
    block_rho,
    one_hot,
    point_masses,
    relaxed_candidates,
    residual,
    typical_threshold,
)
from .display import visible
from .sampling import draw

JOINTLY = ("block",)  # rules that look at every draft token whatever became of those before it


@dataclass(frozen=True)
class Laws:
    """Of one round: the laws that the rule compared, and those to look at."""

    p_JV: np.ndarray
    q_KV: np.ndarray
    p_seen_JV: np.ndarray
    q_seen_KV: np.ndarray
    argmax: bool  # whether the draft is of point masses


def laws_of(draft, rule, p_noted, q_noted):
    p_JV, p_seen_JV = map(np.stack, zip(*p_noted))
    V, law_KV = p_JV.shape[1], draft.soft_KV if RULES[rule].soft else draft.q_KV
    point_KV = point_masses(list(draft.tokens), V)
    noted = len(q_noted) == len(draft.tokens) > 0
    soft_KV = np.stack([seen_V for _, seen_V in q_noted]) if noted else point_KV
    seen_KV = next((law for law in (draft.q_KV, draft.soft_KV) if law is not None), soft_KV)
    return Laws(p_JV, point_KV if law_KV is None else law_KV, p_seen_JV, seen_KV, law_KV is None)


# What decided: (u, the part of the line from 0 to 1 on which the token stands, a sentence, the law it came from)


def of_drafts(step, laws, rule, parameters, label):
    """Of every draft token."""
    said, accepted, uniforms_J = [], step.verdict.accepted, list(map(float, step.uniforms))
    for j, token in enumerate(step.draft.tokens):
        name, u = _quoted(label, token), uniforms_J[j]
        if len(step.tokens) == step.accepted <= j:
            said.append((None, None, "The text ended before it, at a stop token.", None))
        elif rule in JOINTLY:
            said.append((u, *_block_test(laws, step, j), None))
        elif j > accepted:
            said.append((None, None, "Not looked at: a token before it was rejected.", None))
        else:
            judge = JUDGES.get(rule, _judged)
            kept, why = judge(laws, j, token, u, label, **parameters)
            verdict = "kept" if j < accepted else "rejected"
            said.append((None if kept is None else u, kept, f"{name} is {verdict}: {why}.", None))
    return said


def _judged(laws, j, token, u, label, **parameters):
    """For a rule that has no sentence of its own."""
    return None, "so the rule decides"


def _greedy(laws, j, token, u, label):
    best = int(laws.p_JV[j].argmax())
    return None, "it is the target's argmax" if best == token else f"the target's argmax is {_quoted(label, best)}"


def _rejection(laws, j, token, u, label):
    if laws.p_JV[j].max() == 1:
        return _greedy(laws, j, token, u, label)
    return _ratio_test(laws, j, token, u)


def _ratio_test(laws, j, token, u, least=0.0, weight=1.0, form="p/q"):
    """u below least + weight · p/q."""
    p, q = laws.p_JV.item(j, token), laws.q_KV.item(j, token)
    ratio = least + weight * (p / q)
    what = f"{form} = {_number(p)}/{_number(q)}" if form == "p/q" else form
    if laws.argmax and form == "p/q":
        what = "p (an argmax draft has q = 1)"
    if ratio >= 1 and form == "p/q" and not laws.argmax:
        return (0.0, 1.0), f"{what} is at least 1, so that any u keeps it"
    u_text, ratio_text = _apart(u, ratio)
    return (0.0, min(ratio, 1.0)), f"u = {u_text} is {'' if u < ratio else 'not '}below {what} = {ratio_text}"


def _match(laws, j, token, u, label):
    p_V = laws.p_JV[j]
    if p_V.max() == 1:
        return _greedy(laws, j, token, u, label)
    own = draw(p_V, u)
    drawn = "it" if own == token else _quoted(label, own)
    return _piece(p_V, token), f"u = {_number(u)} draws {drawn} from the target's law"


def _typical(laws, j, token, u, label, epsilon=0.09, delta=0.3):
    p, bar = laws.p_JV.item(j, token), typical_threshold(laws.p_JV[j], epsilon, delta)
    p_text, bar_text = _apart(p, bar)
    above = "above" if p > bar else "not above"
    return None, f"p = {p_text} is {above} min(epsilon, delta · exp(-entropy of p)) = {bar_text}"


def _ensemble(laws, j, token, u, label, assistant_ensemble_weight=0.5):
    w = assistant_ensemble_weight
    return _ratio_test(laws, j, token, u, 1 - w, w, f"1 - w + w · p/q with w = {w:g}")


def _threshold(laws, j, token, u, label, threshold_single=1.0, threshold_acc=1.0):
    p = laws.p_JV.item(j, token)
    if p == 0:
        return None, "p is 0"
    if p >= threshold_single:
        return None, f"p = {_number(p)} reaches threshold_single = {threshold_single:g}"
    chance = p / max(threshold_acc, 1e-9)
    u_text, chance_text = _apart(u, chance)
    below = "below" if u < chance else "not below"
    return (0.0, min(chance, 1.0)), f"u = {u_text} is {below} p / threshold_acc = {chance_text}"


def _relaxed(laws, j, token, u, label, relaxed_topk=1, relaxed_delta=0.0):
    among = relaxed_candidates(laws.p_JV[j], relaxed_topk, relaxed_delta)[token]
    where = f"the target's {relaxed_topk} most likely tokens within {relaxed_delta:g} of the first"
    return None, f"p = {_number(laws.p_JV.item(j, token))} is {'' if among else 'not '}among {where}"


def _soft(laws, j, token, u, label):
    kept, why = _ratio_test(laws, j, token, u)
    return kept, f"{why} (q is the drafter's softmax, though it drafted its argmax)"


JUDGES = {
    "greedy": _greedy,
    "rejection": _rejection,
    "match": _match,
    "typical": _typical,
    "ensemble": _ensemble,
    "threshold": _threshold,
    "relaxed": _relaxed,
    "hf-gemma4": _soft,
}


def _block_test(laws, step, j):
    """The first j + 1 tokens as a block: acceptance.block's h."""
    n, K, u = j + 1, len(step.draft.tokens), float(step.uniforms[j])
    rho = block_rho(laws.p_JV, laws.q_KV, step.draft.tokens[:n])[n]
    chance = rho
    if n < K:
        spare = np.maximum(rho * laws.p_JV[n] - laws.q_KV[n], 0).sum()
        chance = float(spare / (spare + 1 - rho)) if spare else 0.0
    u_text, chance_text = _apart(u, chance)
    count = "The first token" if n == 1 else f"The first {n} tokens"
    passes = "stand" if u < chance else "do not stand"
    test = f"{count} as a block {passes}: u = {u_text} is {'' if u < chance else 'not '}below h = {chance_text}"
    longest = step.verdict.accepted
    return (0.0, chance), f"{test}. The longest block that stands has {longest} of {K}."


def of_last(step, laws, rule, first, label):
    """Of the correction or the bonus token."""
    a, K, token = step.verdict.accepted, len(step.draft.tokens), step.verdict.token
    name, p_V = _quoted(label, token), laws.p_JV[a]
    start = "Every draft token stands." if K else "Nothing was drafted: a token of the target's own."
    if a < K:
        start = f"In place of {_quoted(label, step.draft.tokens[a])}, which was rejected."
    elif first:
        start = "The first token, from reading the prompt."
    if rule == "greedy" or p_V.max() == 1:
        return None, None, f"{start} {name} is the target's argmax.", None
    law_V, law, u = p_V, "p", float(step.uniforms[-1])
    if a < K:
        law_V, law = _correction_law(laws, step, rule)
        u = float(step.uniforms[a]) if rule == "match" else u
    piece = _piece(law_V, token)
    says = f"{start} {name} is drawn from {law}: u = {_number(u)} falls in its part, {_span(piece)}."
    return u, piece, says, law_V if a < K else None


def _correction_law(laws, step, rule):
    """(the law that a correction is drawn from, its name)"""
    a = step.verdict.accepted
    p_V, q_V = laws.p_JV[a], laws.q_KV[a]
    if rule in ("typical", "relaxed", "match"):
        return p_V, "p"
    if rule == "threshold" or (laws.argmax and rule == "rejection"):
        return residual(p_V, one_hot(step.draft.tokens[a], len(p_V))), "p without the rejected token"
    if rule == "block":
        rho = block_rho(laws.p_JV, laws.q_KV, step.draft.tokens[:a])[a]
        return residual(rho * p_V, q_V), "norm[rho · p - q]+"
    return residual(p_V, q_V), "norm[p - q]+"


def _piece(law_V, token):
    """The part of the line from 0 to 1 that draws this token, as sampling.draw lays it."""
    cdf_V = np.cumsum(law_V)
    low = cdf_V[token - 1] / cdf_V[-1] if token else 0.0
    return float(low), float(cdf_V[token] / cdf_V[-1])


def _quoted(label, token):
    return f"\u201c{visible(label(token))}\u201d"


def _number(x, digits=3):
    return f"{x:.{digits}g}"


def _apart(x, y):
    """Two numbers with as few digits as tell them apart, at least three."""
    digits = next((n for n in range(3, 17) if _number(x, n) != _number(y, n)), 17)
    return _number(x, digits), _number(y, digits)


def _span(piece):
    low, high = _apart(*piece)
    return f"{low} to {high}"
