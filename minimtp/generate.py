"""The one loop: draft, verify, accept, un-read what was rejected."""

import time
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from .acceptance import Verdict, accept, exact_law
from .backend import ROWS
from .drafting import Draft
from .layers import token_ids
from .plan import CHUNK
from .sampling import Sampling

DEVICE_CHUNK = 128  # on a device, whose rings and logs of states must hold them all
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
    commit=True,
    **parameters,
):
    """Generate after prompt_ids -> an iterator of Steps, the first of them from reading the prompt.

    Without a drafter every step emits one token. draft_sampling: None is as `sampling`; at temperature 0 drafts are
    point masses. stop: ids that end the text, emitted last. parameters: the rule's own. One seed replays a run exactly.
    cache: continue it with prompt_ids; after every step it has read all tokens but the last one emitted. So it has
    where a round fails or is interrupted, unless after its commit: then it is one round further than the steps told.
    Generation ends early where the cache is full. commit: whether rounds commit; without, the caller can un-read them,
    and the last 512 tokens of the prompt.

    Raises ValueError, before anything is read, for arguments that make no sense or a prompt that does not fit.
    """
    prompt_ids, stop = token_ids(prompt_ids, target.config.vocab_size, placeholders(target)), frozenset(stop)
    exact_law(rule, np.ones(1), 0, **parameters)  # raises for an unknown rule or parameter
    _check_numbers(num_draft, max_new_tokens, seed)
    cache = _new_cache(target, len(prompt_ids) + max_new_tokens) if cache is None else cache
    room = cache.capacity - cache.length - len(prompt_ids)
    if room < 0:
        raise ValueError(f"a prompt of {len(prompt_ids)} tokens is {-room} longer than the context has room for")
    draft_sampling = without_placeholders(draft_sampling or sampling, target)
    sampling = without_placeholders(sampling, target)
    rng, budget = np.random.default_rng(seed), min(max_new_tokens, room + 1)

    def rounds():
        draft, draft_u, emitted, done = NO_DRAFT, (), [], False
        news, behind_ND = [], ()  # what the drafter has yet to read, and the hidden states that these tokens came from
        while not done:
            clock = time.perf_counter()
            if emitted and drafter is not None:  # the first round only reads the prompt
                draft_u = rng.random(min(num_draft, budget - len(emitted) - 1))
                draft = drafter.propose(news, behind_ND, cache, len(draft_u), draft_sampling, draft_u)
                if len(draft.tokens) > len(draft_u):
                    raise ValueError(f"the drafter drafted {len(draft.tokens)} tokens, asked for {len(draft_u)}")
            with _all_or_nothing(cache):
                if emitted:
                    news, out = [], target.forward([emitted[-1], *draft.tokens], cache)
                else:
                    news, out = _read_prompt(target, prompt_ids, drafter, draft_sampling, cache)
                u_J = rng.random(len(draft.tokens) + 1)
                verdict = accept(rule, _laws(sampling, out.logits_TV, emitted, draft), draft, u_J, **parameters)
                tokens = _until_stop([*draft.tokens[: verdict.accepted], verdict.token], stop)
                cache.rollback(len(draft.tokens) + 1 - len(tokens))  # the last token emitted is always left to be read
                emitted += tokens
                news, done = [*news, *tokens], len(emitted) == budget or tokens[-1] in stop
                behind_ND = out.hidden_TD[: len(news)]
                if done and drafter is not None:
                    drafter.propose(news, behind_ND, cache, 0, draft_sampling, ())
                if commit:
                    cache.commit()
            accepted, seconds = min(verdict.accepted, len(tokens)), time.perf_counter() - clock
            yield Step(tuple(tokens), len(draft.tokens), accepted, seconds, draft, verdict, tuple(u_J), tuple(draft_u))

    return rounds()


def placeholders(target):
    """The tokens that stand for an image or a sound, which can be neither read nor drafted."""
    return getattr(target.config, "placeholders", {})


def without_placeholders(sampling, target):
    """The same Sampling, which never gives one of them."""
    return replace(sampling, suppress=(*sampling.suppress, *placeholders(target)))


def _on_device(target):
    return getattr(target, "device", None) is not None


def _new_cache(target, count):
    """A cache for so many tokens; on a device with room for all of them at once, since growing moves what is there."""
    if not _on_device(target):
        return target.new_cache()
    return target.new_cache(min(target.config.max_position_embeddings, count + ROWS))


def _check_numbers(num_draft, max_new_tokens, seed):
    for name, value in (("num_draft", num_draft), ("max_new_tokens", max_new_tokens), ("seed", seed)):
        if not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be an integer, got {value!r}")
    if not 1 <= num_draft < ROWS:
        raise ValueError(f"num_draft must be between 1 and {ROWS - 1}, got {num_draft}")
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")


@contextmanager
def _all_or_nothing(cache):
    """Whatever goes wrong inside, the cache afterwards is as before, or at its last commit where that is later."""
    length = cache.length
    try:
        yield
    except BaseException:
        cache.rollback(cache.length - max(length, cache.committed))
        raise


def _read_prompt(target, prompt_ids, drafter, draft_sampling, cache):
    """Read the prompt, the drafter along with it, and commit all but the last chunk.

    -> (what the drafter has yet to read, the last chunk's output)
    """
    chunk = DEVICE_CHUNK if _on_device(target) else CHUNK
    for start, stop in spans(len(prompt_ids), chunk):
        out = target.forward(prompt_ids[start:stop], cache, last=int(stop == len(prompt_ids)))
        news = prompt_ids[start + 1 : stop + 1]
        if stop < len(prompt_ids):
            if drafter is not None:
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
