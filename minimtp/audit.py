"""What a rule really emits: acceptance integrated over its uniforms, no sampling; and the audit of every rule.

A language here is a function: prefix (a tuple of token ids) -> law [V].  P is the target's, Q the drafter's.  A judge
is the name of a rule, or a function (p_JV, tokens_K, q_KV or None, u_J) -> (accepted, token), another engine's as well.
"""

from collections import defaultdict
from functools import partial
from itertools import product
from types import SimpleNamespace

import numpy as np

from .acceptance import RULES, decision, exact_law, one_hot
from .display import VERMILLION, escaped, framed, pale, table
from .sampling import softmax

NARROW = 1e-13  # intervals of a uniform that only rounding made
MOST = 2000  # changes along one uniform: more, and it is no test and no draw
SAME = 1e-10  # laws nearer than this, in total variation, are the same law


def total_variation(p, q):
    return float(np.abs(np.asarray(p) - q).sum() / 2)


# --- integration over the uniforms ---


def integrate(decide, J, pieces=1, known=None):
    """{decide(u_J): probability} for J independent uniforms, each place where the answer changes found by bisection.

    Exact to about 1e-13 a place, given that along each uniform, within each of `pieces` equal parts, no answer comes
    back once it has gone: so it is for tests u < x, and for draws by inverse CDF.  decide must be a function.
    known: a dict to keep the last places found in, for calls with much the same ones: they cost least.
    ValueError: more than 2,000 such places along one uniform.
    """
    law, known = defaultdict(float), {} if known is None else known
    ends = [*np.linspace(0, 1, pieces + 1)[:-1].tolist(), np.nextafter(1, 0)]

    def descend(fixed, mass):
        j, rest = len(fixed), J - len(fixed)
        if rest == 0:
            law[decide(np.array(fixed))] += mass
            return

        def answer(u, later):
            return decide(np.array([*fixed, u, *[later] * (rest - 1)]))

        found = set()
        for later in (ends[-1], 0.25)[:rest]:  # of the uniforms to come: no test passes, or most do
            likely = [u for place in known.get(j, ()) for u in (place - 1e-16, place) if 0 < u < ends[-1]]
            found |= _changes(partial(answer, later=later), sorted({*ends, *likely}))
            known[j] = [*found, *(place for place in known.get(j, ()) if place not in found)][:12]
        start = 0.0
        for place in sorted({*found, 1.0}):
            if place - start > NARROW:
                descend([*fixed, (start + place) / 2], mass * (place - start))
                start = place

    descend([], 1.0)
    return dict(law)


def _changes(answer, ends):
    """Where answer(u) changes, between neighbours in `ends`."""
    places, here = set(), answer(ends[0])
    for low, end in zip(ends, ends[1:]):
        last = answer(end)
        while here != last:
            high, there = end, last
            while high - low > 1e-16 and low < (middle := (low + high) / 2) < high:
                said = answer(middle)
                if said == here:
                    low = middle
                else:
                    high, there = middle, said
            places.add(high)
            if len(places) > MOST:
                raise ValueError(f"more than {MOST:,} changes along one uniform")
            low, here = high, there
    return places


# --- laws of rounds ---


def emitted(judge, P, Q, K, drawn=None, pieces=1, **parameters):
    """{emitted tokens: probability} of one round: K tokens drafted from Q, judged, cut, and one token more.

    Q may give token ids instead of laws: point masses.  drawn: the language that drafts are really drawn from where
    that is not Q, as in engines that report another law than they drew from.
    """
    law, known, V = defaultdict(float), {}, len(P(()))
    point = np.ndim(Q(())) == 0
    drawn = drawn or Q
    for tokens_K in product(range(V), repeat=K):
        prefixes = [tokens_K[:j] for j in range(K + 1)]
        chance = np.prod([_chance(drawn(prefix), token) for prefix, token in zip(prefixes, tokens_K)])
        if chance:
            p_JV = np.array([P(prefix) for prefix in prefixes])
            q_KV = None if point or K == 0 else np.array([Q(prefix) for prefix in prefixes[:K]])
            decide = deciding(judge, p_JV, list(tokens_K), q_KV, parameters)
            for (accepted, token), mass in integrate(decide, K + 1, pieces, known).items():
                law[(*tokens_K[:accepted], token)] += chance * mass
    return dict(law)


def _chance(q, token):
    return float(q == token) if np.ndim(q) == 0 else q[token]


def deciding(judge, p_JV, tokens_K, q_KV, parameters):
    """A judge of one draft, as a function u_J -> (accepted, token)."""
    if not isinstance(judge, str):
        return partial(judge, p_JV, tokens_K, q_KV, **parameters)
    decide = decision(judge, p_JV, SimpleNamespace(tokens=tokens_K, q_KV=q_KV, soft_KV=q_KV), **parameters)

    def plain(u_J):
        verdict = decide(u_J)
        return verdict.accepted, verdict.token

    return plain


def continuation(P, prefix, n):
    """Joint law [V, ...] of the n tokens after a prefix, by the chain rule."""
    if n == 0:
        return np.array(1.0)
    return np.stack([p * continuation(P, (*prefix, t), n - 1) for t, p in enumerate(P(prefix))])


def completed(law, P, n):
    """Joint law [V, ...] of n tokens out of {emitted tokens: probability}: what is shorter goes on from P."""
    joint = np.zeros((len(P(())),) * n)
    for tokens, mass in law.items():
        joint[tokens] += mass * continuation(P, tokens, n - len(tokens))
    return joint


def block_law(judge, P, Q, K, drawn=None, **parameters):
    """Joint law [V] * (K + 1) of a round's tokens, shorter rounds completed from P.

    A judge is lossless where this equals continuation(P, (), K + 1).  For small vocabularies and K <= 4.
    """
    return completed(emitted(judge, P, Q, K, drawn, **parameters), P, K + 1)


def tokens_per_round(law):
    """Mean length of {emitted tokens: probability}: the accepted draft tokens and one more."""
    return sum(len(tokens) * mass for tokens, mass in law.items())


# --- bounds from the literature ---


def expected_tokens(alpha, K):
    """Tokens a round of K drafts emits where each stands with probability alpha (Leviathan et al., equation 1)."""
    return K + 1.0 if alpha == 1 else (1 - alpha ** (K + 1)) / (1 - alpha)


def coupled(p_V, q_V):
    """Chance of each token to be drawn from both laws with the same Gumbel noise -> [V].

    1 / sum over y of max(p(y)/p(x), q(y)/q(x)): Daliri et al. 2408.07978; mlx-vlm with its random streams in step.
    """
    both = np.flatnonzero((p_V > 0) & (q_V > 0))
    order = both[np.argsort(p_V[both] / q_V[both], kind="stable")]
    p_N, q_N = p_V[order], q_V[order]
    above_N = p_N[::-1].cumsum()[::-1] + p_V[q_V == 0].sum()  # of y with p_y/q_y >= p_x/q_x
    below_N = q_N.cumsum() - q_N + q_V[p_V == 0].sum()
    out_V = np.zeros(len(p_V))
    out_V[order] = 1 / (above_N / p_N + below_N / q_N)
    return out_V


def coupling_acceptance(p_V, q_V):
    """Probability that target and drafter agree when both draw with the same Gumbel noise."""
    return float(coupled(p_V, q_V).sum())


# --- the audit ---


_P, _Z = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([2, 1.5, 1, 0.5, 0])
CASES = {  # name: p, q
    "A": (_P, np.array([0.5, 0.2, 0.15, 0.1, 0.05])),
    "B": (_P, _P),  # a perfect drafter
    "C": (softmax(_Z / 0.7), softmax(_Z)),  # a temperature that only the target knows of
    "D": (softmax(_Z), softmax(_Z / 0.5)),
    "E": (np.array([0.1, 0.5, 0.2, 0.1, 0.1]), np.array([0.6, 0.1, 0.1, 0.1, 0.1])),
}
SETTINGS = {  # of the rules that have parameters: those audited
    "typical": [{"epsilon": 0.09, "delta": 0.3}],
    "ensemble": [{"assistant_ensemble_weight": 0.5}],
    "threshold": [
        {"threshold_single": 1.0, "threshold_acc": 1.0},
        {"threshold_acc": 0.8},
        {"threshold_acc": 0.5},
        {"threshold_single": 0.4},
    ],
    "relaxed": [{"relaxed_topk": 1, "relaxed_delta": 0.0}, {"relaxed_topk": 2, "relaxed_delta": 0.2}],
}


def turning(law_V):
    """The language whose law moves on by one place with each token, and by as many as the token's id."""
    return lambda prefix: np.roll(law_V, len(prefix) + sum(prefix))


BLOCKS = {  # name: P, Q, K
    "block of 2": (lambda prefix: np.array([1, 2]) / 3, lambda prefix: np.array([2, 1]) / 3, 2),  # Sun et al.'s example
    "block of 3": (turning(np.array([0.5, 0.3, 0.2])), turning(np.array([0.2, 0.5, 0.3])), 3),
    "block of 4": (turning(np.array([0.7, 0.3])), turning(np.array([0.4, 0.6])), 4),
}


def audit(rule="all"):
    """Every named case under one rule or all -> a JSON-able report; report["passed"]: nothing is other than it claims.

    Each law twice, by the rule's own formula and by integrating what it does: they must agree, and be p, or the argmax
    of p, where the rule says so.  ValueError: an unknown rule.
    """
    if rule != "all" and rule not in RULES:
        raise ValueError(f"unknown acceptance rule {rule!r}; known: all, {', '.join(RULES)}")
    names = list(RULES) if rule == "all" else [rule]
    rules = [_audit_rule(name, setting) for name in names for setting in SETTINGS.get(name, [{}])]
    return Audit(passed=not any(entry["faults"] for entry in rules), rules=rules)


class Audit(dict):
    """The report: a dict, which a notebook shows as a table."""

    def _repr_html_(self):
        head = ["total variation from p", "emits", *CASES, *BLOCKS, "accepted"]
        rows = [_html_row(entry, draft) for entry in self["rules"] for draft in ("drawn", "argmax")
                if any(case["draft"] == draft for case in entry["cases"])]  # fmt: skip
        faults = [f"{entry['rule']}: {fault}" for entry in self["rules"] for fault in entry["faults"]]
        verdict = "Every rule emits what it says." if self["passed"] else escaped("FAULT: " + "; ".join(faults))
        note = "A to E: one draft token, drawn from q or its argmax; accepted: how likely, on average over A to E."
        return framed(table(head, rows), pale(note), f"<b>{verdict}</b>")


def _html_row(entry, draft):
    cases = [case for case in entry["cases"] if case["draft"] == draft]
    own = draft == ("argmax" if RULES[entry["rule"]].soft else "drawn")  # how the blocks are drafted
    blocks = [_html_tv(block) for block in entry["blocks"]] if own else [""] * len(BLOCKS)
    name = escaped(f"{_setting(entry['rule'], entry['parameters'])}, {draft}")
    accepted = sum(case["acceptance"] for case in cases) / len(cases)
    return [name, escaped(entry["emits"]), *map(_html_tv, cases), *blocks, f"{accepted:.0%}"]


def _html_tv(case):
    """A total variation, on a ground that is stronger the larger it is."""
    apart = case["total_variation"]
    if apart < SAME:
        return "0"
    strength = int(30 + 150 * min(apart / 0.5, 1))
    return f'<span style="background:{VERMILLION}{strength:02x};padding:.1em .4em">{apart:.3f}</span>'


def _audit_rule(rule, parameters):
    drafts = ("argmax",) if RULES[rule].soft else ("drawn", "argmax")
    cases = [_audit_case(rule, parameters, case, draft) for case in CASES for draft in drafts]
    blocks = [_audit_block(rule, parameters, name) for name in BLOCKS]
    return {
        "rule": rule,
        "parameters": parameters,
        "emits": RULES[rule].emits,
        "lossless": all(entry["total_variation"] < SAME for entry in cases + blocks),
        "cases": cases,
        "blocks": blocks,
        "faults": [f"{entry['case']}: {fault}" for entry in cases + blocks for fault in entry.pop("faults")],
    }


def _audit_case(rule, parameters, case, draft):
    """One round of one draft token: drawn from q, or its argmax."""
    p_V, q_V = CASES[case]
    soft, q = RULES[rule].soft, int(q_V.argmax()) if draft == "argmax" else q_V
    law_V = exact_law(rule, p_V, q_V if soft else q, **parameters)
    rounds = emitted(rule, lambda x: p_V, lambda x: q_V if soft else q, 1, lambda x: q, **parameters)
    did_V = completed(rounds, lambda x: p_V, 2).sum(1)
    wanted_V = {"p": p_V, "argmax p": one_hot(p_V.argmax(), len(p_V))}.get(RULES[rule].emits)
    faults = []
    if total_variation(law_V, did_V) > SAME:
        faults.append(f"{draft} drafts: its exact law is not what it does")
    if wanted_V is not None and total_variation(did_V, wanted_V) > SAME:
        faults.append(f"{draft} drafts: its output is not {RULES[rule].emits}")
    return {
        "case": case,
        "draft": draft,
        "total_variation": total_variation(did_V, p_V),
        "acceptance": tokens_per_round(rounds) - 1,
        "law": did_V.tolist(),
        "faults": faults,
    }


def _audit_block(rule, parameters, name):
    """One round of several draft tokens, drawn from Q; their argmax where the rule judges that by Q."""
    P, Q, K = BLOCKS[name]
    drawn = (lambda prefix: int(Q(prefix).argmax())) if RULES[rule].soft else None
    rounds = emitted(rule, P, Q, K, drawn, **parameters)
    apart = total_variation(completed(rounds, P, K + 1), continuation(P, (), K + 1))
    faults = ["its tokens together do not have the target's law"] if RULES[rule].emits == "p" and apart > SAME else []
    return {"case": name, "total_variation": apart, "tokens_per_round": tokens_per_round(rounds), "faults": faults}


def explanations(law_V, p_V, q_V):
    """[(total variation, what would emit such a first token)], nearest first: every rule audited, however it drafts.

    law_V: an engine's law, or the frequencies of its tokens, where the target's law is p_V and the drafter's q_V.
    """
    best, found = int(q_V.argmax()), [(total_variation(law_V, q_V), "the drafter alone")]
    for rule in RULES:
        for parameters in SETTINGS.get(rule, [{}]):
            drafts = [("argmax", q_V)] if RULES[rule].soft else [("drawn", q_V), ("argmax", best)]
            for draft, q in drafts:
                apart = total_variation(law_V, exact_law(rule, p_V, q, **parameters))
                found.append((apart, f"{_setting(rule, parameters)}, {draft} drafts"))
    return sorted(found)


def _setting(rule, parameters):
    given = ", ".join(f"{name} {value:g}" for name, value in parameters.items())
    return f"{rule} ({given})" if given else rule


def audit_text(report):
    """The report as lines for a terminal; what begins with + is lossless, with x is not."""
    lines = [f"  {'case':6}{'p, the target':36}q, the drafter"]
    lines += [f"  {case:6}{_chances(p_V)}  {_chances(q_V)}" for case, (p_V, q_V) in CASES.items()]
    for entry in report["rules"]:
        lines += ["", _verdict(entry), f"  {'case':13}draft       TV  accepted" + _if_lossy(entry, "law of its output")]
        for case in entry["cases"]:
            row = f"  {case['case']:13}{case['draft']:6}  {case['total_variation']:.4f}    {case['acceptance']:.4f}"
            lines.append(row + _if_lossy(entry, _chances(case["law"])))
        for case in entry["blocks"]:
            rate = f"{case['tokens_per_round']:.4f} tokens a round"
            lines.append(f"  {case['case']:21}{case['total_variation']:.4f}    {rate}")
        lines += [f"  FAULT: {fault}" for fault in entry["faults"]]
    if len(report["rules"]) > 1:
        lines += ["", "in short", *map(_verdict, report["rules"])]
    return "\n".join(lines)


def _verdict(entry):
    name = _setting(entry["rule"], entry["parameters"])
    if entry["lossless"]:
        return f"+ {name}: lossless"
    largest = max(case["total_variation"] for case in entry["cases"] + entry["blocks"])
    greedy = " (lossless at temperature 0)" if entry["emits"] == "argmax p" else ""
    return f"x {name}: not lossless{greedy}, TV up to {largest:.4f}"


def _chances(law_V):
    return " ".join(f"{chance:.4f}" for chance in law_V)


def _if_lossy(entry, text):
    return "" if entry["lossless"] else f"  {text}"
