"""A run to look at: the loop's own steps, and for every token what decided its fate."""

from dataclasses import asdict, dataclass, field, replace

import numpy as np

from . import explain
from .bench import summarize, tokens_of
from .display import CODE, FATES, escaped, fated, framed, legend, pale, visible
from .drafting import Draft
from .generate import GREEDY, generate
from .sampling import Sampling

EMITTED = ("accepted", "correction", "bonus")
KEPT = " \n"  # blanks that a text is shown with


def fates(step, rule="rejection"):
    """[(fate, token)] of a round: its draft tokens, then the one after them, unless a stop token ended the text."""
    accepted = step.accepted
    ended = len(step.tokens) == accepted  # by a stop token inside the draft: nothing came after it
    later = "rejected" if rule in explain.JOINTLY and not ended else "unread"
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
            laws = explain.laws_of(step.draft, rule, p_side.take(), q_side.take())
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


def _places(run, step, laws, rule, parameters, position, write, top):
    """The Places of one round; write: the stream that turns emitted tokens into text."""
    draft_K, made = step.draft.tokens, []
    tests = explain.of_drafts(step, laws, rule, parameters, run.label)
    for j, (fate, token) in enumerate(fates(step, rule)):
        drafted = j < len(draft_K)
        row = j if drafted else step.accepted
        u, kept, says, law_V = tests[j] if drafted else explain.of_last(step, laws, rule, not run.steps, run.label)
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
