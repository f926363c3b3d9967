"""A run to look at: the loop's own steps, and for every token what decided its fate."""

from dataclasses import asdict, dataclass, field, replace

import numpy as np

from .acceptance import RULES, one_hot, relaxed_candidates, residual, typical_threshold
from .bench import summarize, tokens_of
from .display import CODE, FATES, escaped, fated, framed, legend, pale, visible
from .drafting import Draft
from .generate import GREEDY, generate
from .sampling import Sampling, draw

EMITTED = ("accepted", "correction", "bonus")
KEPT = " \n"  # blanks that a text is shown with
JOINTLY = ("block",)  # rules that look at every draft token whatever became of those before it


def fates(step, rule="rejection"):
    """[(fate, token)] of a round: its draft tokens, then the one after them, unless a stop token ended the text."""
    accepted = step.accepted
    ended = len(step.tokens) == accepted  # by a stop token inside the draft: nothing came after it
    later = "rejected" if rule in JOINTLY and not ended else "unread"
    names = ["accepted"] * accepted + ["unread" if ended else "rejected"] + [later] * step.drafted
    found = [*zip(names, step.draft.tokens)]
    if not ended:
        found.append(("correction" if accepted < step.drafted else "bonus", step.verdict.token))
    return found


@dataclass(frozen=True)
class Place:
    """One token of a run, or one that was drafted in vain, and what decided that.

    round, position (in the whole sequence) and depth (among the draft tokens, from 1; None for the token after them).
    text: what it adds to the text; label: how it is called. p, q: its chances in the laws that were compared; u: the
    uniform that decided, and `kept`, the part [low, high) of the line from 0 to 1 on which it is emitted; None where no
    uniform was needed. bars: (token, p, q) of the top entries, at temperature 0 of the softmax of the logits; q is None
    where nothing was drafted. drawn_from: (token, chance) of the law that a correction was drawn from.
    """

    round: int
    position: int
    depth: int | None
    fate: str
    token: int
    text: str
    label: str
    p: float
    q: float | None
    u: float | None
    kept: tuple | None
    says: str
    bars: tuple
    drawn_from: tuple = ()

    @property
    def emitted(self):
        return self.fate in EMITTED


@dataclass(eq=False)
class Run:
    """A run as it happened. steps: as `generate` yields them, without the drafts' laws; places: every token of them.

    settings: what it was run with, in words; argmax: whether at temperature 0. A Run fills while its steps are
    followed; `watch` does that to the end.
    """

    settings: dict
    argmax: bool
    prompt: tuple
    tokenizer: object = field(repr=False)
    steps: list = field(default_factory=list, repr=False)
    places: list = field(default_factory=list, repr=False)

    @property
    def tokens(self):
        return tokens_of(self.steps)

    @property
    def text(self):
        return "".join(place.text for place in self.places if place.emitted)

    @property
    def summary(self):
        """As bench.summarize."""
        return summarize(self.steps)

    def label(self, token):
        """How a token is called: its text, or where that alone says nothing, what the vocabulary calls it."""
        if self.tokenizer is None:
            return f"#{token}"
        text = self.tokenizer.decode([token], special=True)
        return text if text and "\ufffd" not in text else self.tokenizer.token(token) or f"#{token}"

    def _repr_html_(self):
        if not self.steps:
            return framed("nothing was run yet")
        prompt = "" if self.tokenizer is None else self.tokenizer.decode(self.prompt)
        tokens = "".join(fated(shown(place), place.fate, _tip(place)) for place in self.places)
        found = self.summary
        rate = f"{found['tokens']} tokens in {found['passes']} target passes: {found['tokens_per_pass']:.2f} a pass"
        settings = " · ".join(f"{name} {value}" for name, value in self.settings.items())
        present = [fate for fate in FATES if any(place.fate == fate for place in self.places)]
        return framed(
            f'<div style="{CODE};white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.9">'
            f'<span style="opacity:.6">{escaped(visible(prompt, KEPT))}</span>{tokens}</div>',
            f'<div style="margin:.4em 0">{legend(present)}</div>',
            f"<div><b>{rate}</b></div>",
            pale(escaped(visible(settings, " "))),
        )


def shown(place):
    """A token's text where the whole text is shown: line ends by a sign, and broken where they were emitted."""
    text = visible(place.text or place.label, KEPT)
    return text.replace("\n", "\u23ce\n" if place.emitted else "\u23ce")


def _tip(place):
    return f"round {place.round}, position {place.position}, {place.fate}: {place.says}"


# Watching


@dataclass(frozen=True)
class _Noting(Sampling):
    """A Sampling that also notes the laws it gives, each with the one to look at: at temperature 0 the softmax."""

    noted: list = field(default_factory=list, compare=False, repr=False)

    def law(self, logits_TV, history=()):
        law_TV = seen_TV = super().law(logits_TV, history)
        if self.temperature == 0:
            soft = Sampling(suppress=self.suppress, presence_penalty=self.presence_penalty)
            seen_TV = soft.law(logits_TV, history)
        self.noted.extend(zip(np.atleast_2d(law_TV), np.atleast_2d(seen_TV)))
        return law_TV

    def take(self):
        """What was noted since the last time."""
        noted = self.noted.copy()
        self.noted.clear()
        return noted


def watch(*arguments, **options):
    """As `generate`, run to its end -> Run; top: how many entries of every law it keeps. See `watching`."""
    run, steps = watching(*arguments, **options)
    for _ in steps:
        pass
    return run


def watching(
    target,
    prompt_ids,
    drafter=None,
    num_draft=4,
    rule="rejection",
    sampling=GREEDY,
    draft_sampling=None,
    max_new_tokens=128,
    stop=(),
    seed=0,
    cache=None,
    top=10,
    **parameters,
):
    """(Run, iterator of the very steps that `generate` yields); the Run fills as they are taken.

    Whole laws are held for one round: of each, the `top` entries are kept, and those of drafted and emitted tokens.
    Raises ValueError as `generate`.
    """
    p_side, q_side = (_Noting(**asdict(one)) for one in (sampling, draft_sampling or sampling))
    start = 0 if cache is None else cache.length
    options = {"max_new_tokens": max_new_tokens, "stop": stop, "seed": seed, "cache": cache}
    steps = generate(target, prompt_ids, drafter, num_draft, rule, p_side, q_side, **options, **parameters)
    run = Run(
        settings=_settings(target, drafter, num_draft, rule, parameters, sampling, draft_sampling, seed),
        argmax=sampling.temperature == 0,
        prompt=tuple(map(int, prompt_ids)),
        tokenizer=target.tokenizer,
    )
    write = (lambda token: f"#{token} ") if run.tokenizer is None else run.tokenizer.stream()

    def followed():
        position = start + len(run.prompt)
        for step in steps:
            laws = _laws(step.draft, rule, p_side.take(), q_side.take())
            run.places += _places(run, step, laws, rule, parameters, position, write, top)
            run.steps.append(replace(step, draft=Draft(step.draft.tokens)))
            position += len(step.tokens)
            yield step

    return run, followed()


def _settings(target, drafter, num_draft, rule, parameters, sampling, draft_sampling, seed):
    """What a run was run with, in words."""
    given = ", ".join(f"{name} {value:g}" for name, value in parameters.items())
    words = {
        "model": getattr(getattr(target, "path", None), "name", type(target).__name__),
        "drafter": "none" if drafter is None else type(drafter).__name__,
        "rule": f"{rule} ({given})" if given else rule,
        "sampling": _in_words(sampling),
    }
    if draft_sampling is not None and _in_words(draft_sampling) != words["sampling"]:
        words["drafts"] = _in_words(draft_sampling)
    return words | {"k": num_draft, "seed": seed}


def _in_words(sampling):
    names = ("top_k", "top_p", "min_p", "presence_penalty")
    filters = [f"{name.replace('_', '-')} {getattr(sampling, name):g}" for name in names if getattr(sampling, name)]
    if sampling.temperature == 0:
        return "temperature 0, the argmax"
    return ", ".join([f"temperature {sampling.temperature:g}", *filters])


# One round


@dataclass(frozen=True)
class _Laws:
    """Of one round: the laws that the rule compared, and those to look at."""

    p_JV: np.ndarray
    q_KV: np.ndarray
    p_seen_JV: np.ndarray
    q_seen_KV: np.ndarray
    argmax: bool  # whether the draft is of point masses


def _laws(draft, rule, p_noted, q_noted):
    p_JV, p_seen_JV = map(np.stack, zip(*p_noted))
    V, law_KV = p_JV.shape[1], draft.soft_KV if RULES[rule].soft else draft.q_KV
    point_KV = np.array([one_hot(token, V) for token in draft.tokens]).reshape(-1, V)
    noted = len(q_noted) == len(draft.tokens) > 0
    soft_KV = np.stack([seen_V for _, seen_V in q_noted]) if noted else point_KV
    seen_KV = next((law for law in (draft.q_KV, draft.soft_KV) if law is not None), soft_KV)
    return _Laws(p_JV, point_KV if law_KV is None else law_KV, p_seen_JV, seen_KV, law_KV is None)


def _places(run, step, laws, rule, parameters, position, write, top):
    """The Places of one round; write: the stream that turns emitted tokens into text."""
    draft_K, made = step.draft.tokens, []
    tests = _tests(run, step, laws, rule, parameters)
    for j, (fate, token) in enumerate(fates(step, rule)):
        drafted = j < len(draft_K)
        row = j if drafted else step.accepted
        u, kept, says, law_V = tests[j] if drafted else _closing(run, step, laws, rule, parameters)
        marked = {token, *draft_K[row : row + 1], *[step.verdict.token] * (row == step.verdict.accepted)}
        label = run.label(token)
        made.append(
            Place(
                round=len(run.steps),
                position=position + row,
                depth=j + 1 if drafted else None,
                fate=fate,
                token=int(token),
                text=write(token) if fate in EMITTED else label,
                label=label,
                p=float(laws.p_JV[row, token]),
                q=float(laws.q_KV[row, token]) if row < len(draft_K) else None,
                u=u,
                kept=kept,
                says=says,
                bars=_bars(laws, row, marked, top),
                drawn_from=() if law_V is None else _entries(law_V, top, {token}),
            )
        )
    return made


def _bars(laws, row, marked, top):
    """((token, p, q), ...) of the largest entries of either law, and of the tokens marked."""
    p_V = laws.p_seen_JV[row]
    if row >= len(laws.q_seen_KV):
        return tuple((token, p, None) for token, p in _entries(p_V, top, marked))
    q_V = laws.q_seen_KV[row]
    tokens = [token for token, _ in _entries(np.maximum(p_V, q_V), top, marked)]
    return tuple(sorted(((token, p_V.item(token), q_V.item(token)) for token in tokens), key=lambda bar: -bar[1]))


def _entries(law_V, top, marked):
    """((token, chance), ...), largest first, of the `top` largest entries and of the tokens marked."""
    count = min(top, len(law_V))
    least = np.partition(law_V, -count)[-count]
    ids = np.flatnonzero(law_V >= least)
    ids = [*ids[np.argsort(-law_V[ids], kind="stable")[:count]].tolist()]
    ids += sorted(set(map(int, marked)) - set(ids), key=lambda token: -law_V[token])
    return tuple((token, law_V.item(token)) for token in ids)


# What decided: (u, the part of the line from 0 to 1 on which the token stands, a sentence, the law it came from)


def _tests(run, step, laws, rule, parameters):
    """Of every draft token."""
    said, accepted, uniforms_J = [], step.verdict.accepted, list(map(float, step.uniforms))
    for j, token in enumerate(step.draft.tokens):
        name, u = _quoted(run, token), uniforms_J[j]
        if len(step.tokens) == step.accepted <= j:
            said.append((None, None, "The text ended before it, at a stop token.", None))
        elif rule in JOINTLY:
            said.append((u, *_block_test(laws, step, j), None))
        elif j > accepted:
            said.append((None, None, "Not looked at: a token before it was rejected.", None))
        else:
            judge = JUDGES.get(rule, _judged)
            kept, why = judge(laws, j, token, u, run, **parameters)
            verdict = "kept" if j < accepted else "rejected"
            said.append((None if kept is None else u, kept, f"{name} is {verdict}: {why}.", None))
    return said


def _judged(laws, j, token, u, run, **parameters):
    """For a rule that has no sentence of its own."""
    return None, "so the rule decides"


def _greedy(laws, j, token, u, run):
    best = int(laws.p_JV[j].argmax())
    return None, "it is the target's argmax" if best == token else f"the target's argmax is {_quoted(run, best)}"


def _rejection(laws, j, token, u, run):
    if laws.p_JV[j].max() == 1:
        return _greedy(laws, j, token, u, run)
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


def _match(laws, j, token, u, run):
    p_V = laws.p_JV[j]
    if p_V.max() == 1:
        return _greedy(laws, j, token, u, run)
    own = draw(p_V, u)
    drawn = "it" if own == token else _quoted(run, own)
    return _piece(p_V, token), f"u = {_number(u)} draws {drawn} from the target's law"


def _typical(laws, j, token, u, run, epsilon=0.09, delta=0.3):
    p, bar = laws.p_JV.item(j, token), typical_threshold(laws.p_JV[j], epsilon, delta)
    p_text, bar_text = _apart(p, bar)
    above = "above" if p > bar else "not above"
    return None, f"p = {p_text} is {above} min(epsilon, delta · exp(-entropy of p)) = {bar_text}"


def _ensemble(laws, j, token, u, run, assistant_ensemble_weight=0.5):
    w = assistant_ensemble_weight
    return _ratio_test(laws, j, token, u, 1 - w, w, f"1 - w + w · p/q with w = {w:g}")


def _threshold(laws, j, token, u, run, threshold_single=1.0, threshold_acc=1.0):
    p = laws.p_JV.item(j, token)
    if p == 0:
        return None, "p is 0"
    if p >= threshold_single:
        return None, f"p = {_number(p)} reaches threshold_single = {threshold_single:g}"
    chance = p / max(threshold_acc, 1e-9)
    u_text, chance_text = _apart(u, chance)
    below = "below" if u < chance else "not below"
    return (0.0, min(chance, 1.0)), f"u = {u_text} is {below} p / threshold_acc = {chance_text}"


def _relaxed(laws, j, token, u, run, relaxed_topk=1, relaxed_delta=0.0):
    among = relaxed_candidates(laws.p_JV[j], relaxed_topk, relaxed_delta)[token]
    where = f"the target's {relaxed_topk} most likely tokens within {relaxed_delta:g} of the first"
    return None, f"p = {_number(laws.p_JV.item(j, token))} is {'' if among else 'not '}among {where}"


def _soft(laws, j, token, u, run):
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
    rho = _rho(laws, step.draft.tokens[:n])
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


def _rho(laws, tokens):
    rho = 1.0
    for j, token in enumerate(tokens):
        rho = min(1.0, rho * laws.p_JV.item(j, token) / laws.q_KV.item(j, token))
    return rho


def _closing(run, step, laws, rule, parameters):
    """Of the correction or the bonus token."""
    a, K, token = step.verdict.accepted, len(step.draft.tokens), step.verdict.token
    name, p_V = _quoted(run, token), laws.p_JV[a]
    start = "Every draft token stands." if K else "Nothing was drafted: a token of the target's own."
    if a < K:
        start = f"In place of {_quoted(run, step.draft.tokens[a])}, which was rejected."
    elif not run.steps:
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
        return residual(_rho(laws, step.draft.tokens[:a]) * p_V, q_V), "norm[rho · p - q]+"
    return residual(p_V, q_V), "norm[p - q]+"


def _piece(law_V, token):
    """The part of the line from 0 to 1 that draws this token, as sampling.draw lays it."""
    cdf_V = np.cumsum(law_V)
    low = cdf_V[token - 1] / cdf_V[-1] if token else 0.0
    return float(low), float(cdf_V[token] / cdf_V[-1])


def _quoted(run, token):
    return f"\u201c{visible(run.label(token))}\u201d"


def _number(x, digits=3):
    return f"{x:.{digits}g}"


def _apart(x, y):
    """Two numbers with as few digits as tell them apart, at least three."""
    digits = next((n for n in range(3, 17) if _number(x, n) != _number(y, n)), 17)
    return _number(x, digits), _number(y, digits)


def _span(piece):
    low, high = _apart(*piece)
    return f"{low} to {high}"
