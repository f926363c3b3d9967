"""Expected acceptance of a drafter over a text, with no sampling in it.

A round begins at every position n of the text: the target has read x_0 .. x_n-1, x_n is the newest token.

Drafts by argmax ("argmax") are verified as `generate` verifies them, in one pass over x_n and the draft. Draft token
d_j then stands with p_j(d_j), under every lossless rule alike. That is exact for any text, at every depth.

Drawn drafts ("rejection", "block", "match", "gumbel") are led along the text: the laws p_j and q_j are those after
x_n+1 .. x_n+j-1. Depth 1 is exact for any text. Deeper, the text stands for the paths that rounds take, each weighed by
how often it is kept: if the target wrote the text at this sampling, the mean has the right expectation; else it is a
statement about this text.

Two numbers come of each round. `kept` is the chance that at least j draft tokens stand. `given` is the same in a run
that emits this very text: a lossless rule leaves the text's law alone, so this is the share of "x_n+j emitted" which
came as a draft token. From `given` follows, for a whole run, the exact mean and standard deviation of its passes.
"""

import time
from dataclasses import replace
from statistics import median

import numpy as np

from .acceptance import RULES, decision, one_hot
from .audit import coupled
from .backend import ROWS
from .bench import pass_costs
from .drafting import Draft
from .generate import CHUNK, GREEDY, spans, without_placeholders

FOREIGN = 0.05  # a text is someone else's where more of its tokens than this could not come from the target


class Watched:
    """Stands for a Sampling in `propose`: keeps the drafter's logits, and draws `tokens` where they are given."""

    def __init__(self, sampling, tokens=None):
        self.logits, self._sampling, self._tokens = [], sampling, tokens
        self.temperature = sampling.temperature if tokens is None else 1.0  # above 0 a drafter draws

    def law(self, logits_V):
        self.logits.append(np.array(logits_V))
        if self._tokens is None:
            return self._sampling.law(logits_V)
        return one_hot(self._tokens[len(self.logits) - 1], len(logits_V))


# One round


def argmax_round(p_JV, draft_K, text_K):
    """A round whose draft is a point mass -> {"argmax": (test_K, kept_K, given_K)}; names: see drawn_round."""
    test_K = p_JV[np.arange(len(draft_K)), np.array(draft_K, int)]
    return {"argmax": (test_K, np.cumprod(test_K), np.cumprod(np.equal(draft_K, text_K), dtype=float))}


def lossy_round(rule, p_JV, draft, **parameters):
    """The same under a rule that changes the law: what it emits is not such a text, so nothing is given by one."""
    soft_KV = [None] * len(draft.tokens) if draft.soft_KV is None else draft.soft_KV
    test_K = np.array([stands(rule, *one, **parameters) for one in zip(p_JV, draft.tokens, soft_KV)])
    return {rule: (test_K, np.cumprod(test_K), None)}


def stands(rule, p_V, token, soft_V=None, **parameters):
    """The chance that one drafted token stands, to 1e-12: for rules that keep it below some value of its uniform."""
    draft = Draft((token,), soft_KV=None if soft_V is None else soft_V[None])
    decide = decision(rule, np.stack([p_V, p_V]), draft, **parameters)
    low, high = 0.0, np.nextafter(1.0, 0.0)
    if decide((high, 0.5)).accepted:
        return 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if decide((middle, 0.5)).accepted else (low, middle)
    return high


def drawn_round(p_JV, q_KV, text_K):
    """A round of drafts drawn from q_KV, led along the text -> {rule: (test_K, kept_K, given_K)}.

    test: the chance that draft token j stands where the ones before it are the text; kept, given: see the module.
    "rejection": Leviathan et al. 2211.17192; "block": Sun et al. 2403.10444; "match": two independent draws are equal;
    "gumbel": two draws with the same Gumbel noise are (Daliri et al. 2408.07978), which they are at least with "bound",
    (1 - TV) / (1 + TV): more no drafter that is told nothing of p can promise. That one is a test alone.
    """
    rows, text_K = np.arange(len(text_K)), np.array(text_K, int)
    p_KV, p_K, q_K = p_JV[: len(text_K)], p_JV[rows, text_K], q_KV[rows, text_K]
    ratio_K = np.divide(q_K, p_K, out=(q_K > 0).astype(float), where=p_K > 0)  # p = 0: see `impossible`
    overlap_K = np.minimum(p_KV, q_KV).sum(-1)
    same_KV = np.array([coupled(*pair) for pair in zip(p_KV, q_KV)]).reshape(p_KV.shape)
    same_K = np.divide(same_KV[rows, text_K], p_K, out=np.zeros(len(rows)), where=p_K > 0)
    rounds = {
        "rejection": (overlap_K, np.minimum(ratio_K, 1)),
        "match": ((p_KV * q_KV).sum(-1), q_K),
        "gumbel": (same_KV.sum(-1), same_K),
    }
    rounds = {rule: (test_K, _before(g := np.cumprod(w_K)) * test_K, g) for rule, (test_K, w_K) in rounds.items()}
    product_K = np.cumprod(ratio_K)
    given_K = np.minimum.accumulate(np.minimum(product_K, 1))
    kept_K = np.minimum(_before(given_K)[:, None] * p_KV, _before(product_K)[:, None] * q_KV).sum(-1)
    tv_K = 1 - overlap_K
    return {**rounds, "block": (overlap_K, kept_K, given_K), "bound": ((1 - tv_K) / (1 + tv_K), None, None)}


def _before(x_K):
    return np.concatenate([[1.0], x_K])[:-1]


# A text


def read(target, drafter, ids_T, first, num_draft, draft_sampling, led=False, stride=1):
    """Every `stride`-th round of a text, from position `first` on -> iterator of (n, tokens_K, q logits_KV, logits_JV).

    Where `led`, the draft is the text. Rounds are verified as in `generate`, and so to the same bits; each has at most
    as many draft tokens as leave one to emit before the text ends.
    """
    cache = target.new_cache()
    for start, stop in spans(first, CHUNK):
        behind_ND, news = target.forward(ids_T[start:stop], cache, last=0).hidden_TD, ids_T[start + 1 : stop + 1]
        if stop < first:
            drafter.propose(news, behind_ND, cache, 0, GREEDY, ())
            cache.commit()
    for n in range(first, len(ids_T) - 1, stride):
        text_K = ids_T[n + 1 : n + 1 + min(num_draft, len(ids_T) - 2 - n)]
        watched = Watched(draft_sampling, text_K if led else None)
        tokens = drafter.propose(news, behind_ND, cache, len(text_K), watched, np.zeros(len(text_K))).tokens
        out = target.forward([ids_T[n], *tokens], cache)
        cache.rollback(len(tokens))
        yield n, tokens, watched.logits, out.logits_TV
        news, rest, behind_ND = ids_T[n + 1 : n + 1 + stride], ids_T[n + 1 : n + stride], out.hidden_TD[:1]
        if rest:
            behind_ND = np.concatenate([behind_ND, target.forward(rest, cache, last=0).hidden_TD])
        cache.commit()


def expected(target, drafter, ids_T, num_draft=8, sampling=GREEDY, draft_sampling=None, first=1, stride=1, lossy=None):
    """Expected acceptance over a text -> a JSON-able dict; its fields are described in docs/oracle.md.

    first: tokens of the prompt. draft_sampling: the law that drafts are drawn from, None for `sampling`. Argmax drafts
    are looked at always, drawn ones where neither temperature is 0, unless the drafter draws none. lossy: {rule:
    parameters} of rules that change the law, for argmax drafts. Raises ValueError for a text of fewer than first + 3.
    """
    if not (1 <= num_draft < ROWS and stride >= 1):
        raise ValueError(f"num_draft is {num_draft}, stride {stride}: wanted 1 to {ROWS - 1}, and at least 1")
    if not 1 <= first <= len(ids_T) - 3:
        raise ValueError(f"{len(ids_T)} tokens of text with a prompt of {first}: wanted at least 1 and 3 more")
    draft_sampling = without_placeholders(draft_sampling or sampling, target)
    sampling = without_placeholders(sampling, target)
    ids_T, rounds, impossible = list(map(int, ids_T)), {}, []
    greedy = replace(draft_sampling, temperature=0.0)
    for n, tokens, q_logits, logits_JV in read(target, drafter, ids_T, first, num_draft, greedy, stride=stride):
        p_JV = sampling.law(logits_JV)
        impossible += [n + 1] * bool(p_JV[0, ids_T[n + 1]] == 0)
        _collect(rounds, argmax_round(p_JV, tokens, ids_T[n + 1 : n + 1 + len(tokens)]))
        for rule, parameters in (lossy or {}).items():
            soft_KV = draft_sampling.law(np.stack(q_logits)) if RULES[rule].soft and q_logits else None
            _collect(rounds, lossy_round(rule, p_JV, Draft(tokens, soft_KV=soft_KV), **parameters))
    if sampling.temperature and draft_sampling.temperature:
        rounds |= _drawn_rounds(target, drafter, ids_T, first, num_draft, sampling, draft_sampling, stride)
    rooms = [min(num_draft, len(ids_T) - 2 - n) for n in range(first, len(ids_T) - 1, stride)]
    return {
        "positions": len(rooms),
        "emitted": len(ids_T) - 1 - first,
        "impossible": {"count": len(impossible), "first": impossible[0] if impossible else None},
        "rules": {rule: _summary(of_rule, rooms, stride == 1) for rule, of_rule in rounds.items()},
    }


def _drawn_rounds(target, drafter, ids_T, first, num_draft, sampling, draft_sampling, stride):
    """{rule: its rounds}; none for a drafter without laws, as prompt lookup: a point mass whatever the sampling."""
    rounds, drawn = {}, 0
    led = read(target, drafter, ids_T, first, num_draft, draft_sampling, led=True, stride=stride)
    for _, text_K, q_logits, logits_JV in led:
        if len(q_logits) != len(text_K):
            return {}
        drawn += len(text_K)
        q_KV = draft_sampling.law(np.stack(q_logits)) if text_K else np.zeros((0, logits_JV.shape[1]))
        _collect(rounds, drawn_round(sampling.law(logits_JV), q_KV, text_K))
    return rounds if drawn else {}


def _collect(rounds, one):
    for rule, numbers in one.items():
        rounds.setdefault(rule, []).append(numbers)


def _summary(rounds, rooms, whole):
    """What the rounds of one rule come to, by depth 1 .. K and by k = 1 .. K; rooms: what each could draft at most."""
    counts = [sum(room > j for room in rooms) for j in range(max(rooms))]

    def by_depth(which):
        return [[r[which][j] for r in rounds if len(r[which]) > j] for j in range(len(counts))]

    report = {"test": [float(np.mean(tests)) if tests else 0.0 for tests in by_depth(0)]}
    if rounds[0][1] is not None:
        report["kept"] = [float(sum(kept) / count) for kept, count in zip(by_depth(1), counts)]
        report["tokens_per_pass"] = (1 + np.cumsum(report["kept"])).tolist()
    if whole and rounds[0][2] is not None:
        report["run"] = [run([r[2][:k] for r in rounds]) for k in range(1, len(counts) + 1)]
    return report


def run(given):
    """A run that emits the text, the prompt's pass left out -> its expected passes, their deviation, acceptance.

    given[i]: for a round at the i-th position, the chance that at least 1, 2, ... of its draft tokens stand. A round
    that keeps a of them goes on at position i + a + 1: a Markov chain, so both moments come from one pass backwards.
    """
    exactly = [-np.diff([1.0, *given_K, 0.0]) for given_K in given]  # by number kept
    mean, square, visits = np.zeros(len(given) + 1), np.zeros(len(given) + 1), np.zeros(len(given) + 1)
    for i in reversed(range(len(given))):
        after = slice(i + 1, i + 1 + len(exactly[i]))
        mean[i] = 1 + exactly[i] @ mean[after]
        square[i] = 1 + exactly[i] @ (2 * mean[after] + square[after])
    visits[0] = 1
    for i, exactly_A in enumerate(exactly):
        visits[i + 1 : i + 1 + len(exactly_A)] += visits[i] * exactly_A
    depth = max(map(len, given))
    rounds = [[i for i in range(len(given)) if len(given[i]) > j] for j in range(depth)]
    return {
        "passes": float(mean[0]),
        "deviation": float(max(square[0] - mean[0] ** 2, 0) ** 0.5),
        "tokens_per_pass": len(given) / float(mean[0]),
        "acceptance": [
            float(sum(visits[i] * given[i][j] for i in at) / sum(visits[at])) for j, at in enumerate(rounds)
        ],
    }


# What it costs


def given_costs(ratio, num_draft):
    """Cost of a round at k = 1 .. K, in passes of the target: a draft token costs `ratio`, a wide pass one narrow."""
    return [1 + ratio * k for k in range(1, num_draft + 1)]


def measured_costs(target, drafter, prompt, num_draft, repeats=10):
    """Cost of a round at k = 1 .. K, in one-token passes of the target after this prompt, on this machine."""
    passes = pass_costs(target, prompt, num_draft + 1, repeats)["seconds_by_width"]
    cache, taken = target.new_cache(), {k: [] for k in range(1, num_draft + 1)}
    hidden_TD = target.forward(prompt, cache, last=0).hidden_TD
    drafter.propose([*prompt[1:], prompt[0]], hidden_TD, cache, 0, GREEDY, ())
    for _ in range(repeats):
        for k in taken:
            start = time.perf_counter()
            drafter.propose(prompt[:1], hidden_TD[-1:], cache, k, GREEDY, ())
            taken[k].append(time.perf_counter() - start)
    return [(median(taken[k]) + passes[k + 1]) / passes[1] for k in taken]


def with_costs(report, costs):
    """The report, each rule with its speed-up over plain decoding by k, and the best k: 0 where none is faster.

    Tokens a pass are those of a run that emits the text, where that may well be the target's.
    """
    rules = {}
    for rule, found in report["rules"].items():
        if "kept" in found:
            own = "run" in found and _may_be_own(report)
            rates = [one["tokens_per_pass"] for one in found["run"]] if own else found["tokens_per_pass"]
            speedup = [rate / cost for rate, cost in zip(rates, costs)]
            best = int(np.argmax(speedup)) + 1 if max(speedup) > 1 else 0
            found = {**found, "speedup": speedup, "best": best, "basis": "text" if own else "positions"}
        rules[rule] = found
    return {**report, "costs": list(costs), "rules": rules}


def _may_be_own(report):
    """Whether the text may be the target's own: near ties that rounding decides another way make a few exceptions."""
    return report["impossible"]["count"] <= FOREIGN * report["positions"]


# What it looks like

NAMES = {
    "argmax": "argmax drafts, lossless rules",
    "rejection": "drawn drafts, rejection",
    "block": "drawn drafts, block",
    "match": "drawn drafts, match",
    "gumbel": "drawn drafts, shared Gumbel",
    "bound": "(1 - TV)/(1 + TV), its least",
}


def table(report):
    """The report as text."""
    found, K = report["rules"], len(report["rules"]["argmax"]["kept"])
    lines = [f"rounds at {report['positions']} positions, {report['emitted']} tokens"]
    if count := report["impossible"]["count"]:
        lines.append(
            f"{count} of the tokens could not come from this target at this sampling,\n"
            f"  the first at position {report['impossible']['first']}"
        )
    blocks = [
        ("chance of the test at each depth", "depth", "test", "{:6.1%}"),
        ("at least so many draft tokens stand", "depth", "kept", "{:6.1%}"),
        ("tokens a pass, rounds at every position", "k", "tokens_per_pass", "{:6.2f}"),
        ("tokens a pass, emitting this text", "k", "run", "{0[tokens_per_pass]:6.2f}"),
        ("passes for this text", "k", "run", "{0[passes]:6.1f}"),
        ("their standard deviation", "k", "run", "{0[deviation]:6.1f}"),
        ("speed-up", "k", "speedup", "{:6.2f}"),
    ]
    for title, unit, key, form in blocks:
        rows = [(NAMES.get(rule, rule), numbers[key]) for rule, numbers in found.items() if key in numbers]
        if rows and (key != "run" or _may_be_own(report)):
            lines += ["", title, f"  {unit:29}" + "".join(f"{j:6}" for j in range(1, K + 1))]
            lines += [
                f"  {name:29}" + "".join(map(form.format, values)).replace("100.0%", "  100%") for name, values in rows
            ]
    best = [(NAMES.get(rule, rule), n["best"]) for rule, n in found.items() if "best" in n]
    if best:
        lines += ["", "best k"]
        lines += [f"  {name:29}{k:6}" + ("" if k else "  plain decoding is faster") for name, k in best]
    return "\n".join(lines)


def plot(report, path):
    """A picture of the report: acceptance by depth, and tokens a pass and speed-up by k. Needs matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ValueError("a picture needs matplotlib: pip install 'minimtp[docs]'") from None

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for rule, found in report["rules"].items():
        if "kept" in found:
            depths = range(1, len(found["kept"]) + 1)
            (line,) = left.plot(depths, found["kept"], marker="o", label=NAMES.get(rule, rule))
            right.plot(depths, found["tokens_per_pass"], marker="o", color=line.get_color())
            if "speedup" in found:
                right.plot(depths, found["speedup"], linestyle="dashed", color=line.get_color())
    left.set(xlabel="depth", ylabel="chance that at least so many stand", ylim=(0, 1), xticks=depths)
    right.set(xlabel="k", ylabel="tokens a pass (dashed: speed-up)", xticks=depths)
    left.legend(frameon=False, fontsize=8)
    figure.savefig(path)
