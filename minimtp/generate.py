"""The one loop: draft, verify, accept, un-read what was rejected."""

import time
from dataclasses import dataclass

import numpy as np

from .acceptance import Verdict, accept, exact_law
from .backend import ROWS
from .drafting import Draft
from .layers import token_ids
from .sampling import Sampling

CHUNK = 512  # prompt tokens read at a time
NO_DRAFT = Draft(())
GREEDY = Sampling(temperature=0.0)


@dataclass(frozen=True)
class Step:
    """One round of the loop: the tokens it emitted, and everything that decided them.

    tokens: ids; drafted, accepted: how many tokens; seconds: wall time of the round; uniforms: the verdict's, as
    acceptance.accept takes them; draft_uniforms: those the draft was drawn with.
    """

    tokens: tuple
    drafted: int
    accepted: int
    seconds: float
    draft: Draft
    verdict: Verdict
    uniforms: tuple
    draft_uniforms: tuple


def spans(length, size):
    """(start, stop) of consecutive chunks of at most `size`."""
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def generate(
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
    **parameters,
):
    """Generate after prompt_ids -> an iterator of Steps, the first of them from reading the prompt.

    Without a drafter every step emits one token. draft_sampling: None is as `sampling`; at temperature 0 drafts are
    point masses. stop: ids that end the text, emitted last. parameters: the rule's own. One seed replays a run exactly.
    cache: continue it with prompt_ids; after every step it has read all tokens but the last one emitted. Generation
    ends early where the cache is full.

    Raises ValueError, before anything is read, for arguments that make no sense or a prompt that does not fit.
    """
    prompt_ids = token_ids(prompt_ids, target.config.vocab_size)
    cache = target.new_cache() if cache is None else cache
    exact_law(rule, np.ones(1), 0, **parameters)  # raises for an unknown rule or parameter
    if not 1 <= num_draft < ROWS:
        raise ValueError(f"num_draft must be between 1 and {ROWS - 1}, got {num_draft}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    room = cache.capacity - cache.length - len(prompt_ids)
    if room < 0:
        raise ValueError(f"a prompt of {len(prompt_ids)} tokens is {-room} longer than the context has room for")
    rng = np.random.default_rng(seed)
    emitted = []

    def decide(logits_JV, draft):
        u_J = rng.random(len(draft.tokens) + 1)
        return accept(rule, _laws(sampling, logits_JV, emitted, draft), draft, u_J, **parameters), u_J

    def rounds():
        remaining, draft, draft_u = min(max_new_tokens, room + 1), NO_DRAFT, ()
        clock = time.perf_counter()
        unread, out = _read_prompt(target, prompt_ids, drafter, draft_sampling or sampling, cache)
        while True:
            verdict, u_J = decide(out.logits_TV, draft)
            tokens = _until_stop([*draft.tokens[: verdict.accepted], verdict.token], stop)
            cache.rollback(len(draft.tokens) + 1 - len(tokens))  # the last token emitted is always left to be read
            cache.commit()
            emitted.extend(tokens)
            remaining -= len(tokens)
            news, done = [*unread, *tokens], remaining == 0 or tokens[-1] in stop
            if done and drafter:
                drafter.propose(news, out.hidden_TD[: len(news)], cache, 0, draft_sampling or sampling, ())
                cache.commit()
            accepted = min(verdict.accepted, len(tokens))
            seconds = time.perf_counter() - clock
            yield Step(tuple(tokens), len(draft.tokens), accepted, seconds, draft, verdict, tuple(u_J), tuple(draft_u))
            if done:
                return
            clock = time.perf_counter()
            if drafter:
                draft_u = rng.random(min(num_draft, remaining - 1))
                behind_ND = out.hidden_TD[: len(news)]
                draft = drafter.propose(news, behind_ND, cache, len(draft_u), draft_sampling or sampling, draft_u)
            unread, out = [], target.forward([tokens[-1], *draft.tokens], cache)

    return _clean(rounds(), cache)


def _clean(steps, cache):
    """The steps; wherever they end, by whatever exception, the cache is back at its last commit."""
    try:
        yield from steps
    finally:
        cache.rollback(cache.length - cache.committed)


def _read_prompt(target, prompt_ids, drafter, draft_sampling, cache):
    """Read the prompt, the drafter along with it -> (what the drafter has yet to read, the last chunk's output)."""
    for start, stop in spans(len(prompt_ids), CHUNK):
        out = target.forward(prompt_ids[start:stop], cache, last=1)
        cache.commit()
        news = prompt_ids[start + 1 : stop + 1]
        if drafter and stop < len(prompt_ids):
            drafter.propose(news, out.hidden_TD, cache, 0, draft_sampling, ())
            cache.commit()
    return news, out


def _laws(sampling, logits_JV, emitted, draft):
    """The target's law of each row; a presence penalty sees the draft tokens before it."""
    if not sampling.presence_penalty:
        return sampling.law(logits_JV)
    history = [*emitted, *draft.tokens]
    return np.stack([sampling.law(logits_JV[j], history[: len(emitted) + j]) for j in range(len(logits_JV))])


def _until_stop(tokens, stop):
    return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in stop), tokens)
