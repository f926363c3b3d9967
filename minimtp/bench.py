"""What a run came to, and how long passes take."""

import sys
import time
from statistics import median

import numpy as np

from .drafting import Scripted
from .generate import generate


def summarize(steps):
    """What a run came to, as a JSON-able dict.

    acceptance[i]: the share of rounds that kept i + 1 tokens, of those that drafted as many.
    """
    tokens, seconds = len(tokens_of(steps)), sum(step.seconds for step in steps)
    depth = max(step.drafted for step in steps)
    rounds = [[step for step in steps if step.drafted > i] for i in range(depth)]
    return {
        "tokens": tokens,
        "passes": len(steps),
        "tokens_per_pass": tokens / len(steps),
        "acceptance": [sum(step.accepted > i for step in some) / len(some) for i, some in enumerate(rounds)],
        "seconds": seconds,
    }


def tokens_of(steps):
    """All tokens of the steps, in order."""
    return [token for step in steps for token in step.tokens]


def measure(target, drafter, prompts, num_draft, max_new_tokens, acceptance=None):
    """Greedy decoding, plain and with drafts, and passes by width -> a JSON-able dict.

    acceptance: decode with scripted drafts, too, each token of them right with that chance.
    """
    if acceptance is not None and not 0 <= acceptance <= 1:
        raise ValueError(f"acceptance is {acceptance}, wanted 0 to 1")
    report = {"model": str(target.folder), "kv": target.kv, "prompts": len(prompts)}
    report |= rates(target, drafter, prompts, num_draft, max_new_tokens, acceptance)
    return {**report, "passes": pass_costs(target, prompts[0], num_draft + 1), "peak_bytes": peak_bytes()}


def rates(target, drafter, prompts, num_draft, max_new_tokens, acceptance=None):
    """The runs of `measure`, on the same prompts in turn."""
    settings, scripted = {"num_draft": num_draft, "max_new_tokens": max_new_tokens}, []
    plain, drafted = [], []
    for prompt in prompts:
        plain.append(list(generate(target, prompt, max_new_tokens=max_new_tokens)))
        if drafter:
            drafted.append(list(generate(target, prompt, drafter, **settings)))
        if acceptance is not None:
            script = scripted_drafter(target, [*prompt, *tokens_of(plain[-1])], acceptance)
            scripted.append(list(generate(target, prompt, script, **settings)))
    report, runs = {"plain": _rates(plain)}, {"drafted": drafted, "scripted": scripted}
    for name, found in runs.items():
        if found:
            report |= {"k": num_draft, name: _rates(found)}
            same = list(map(tokens_of, plain)) == list(map(tokens_of, found))
            report["identical"] = report.get("identical", True) and same
            speedup = report[name]["tokens_per_second"] / report["plain"]["tokens_per_second"]
            report["speedup" if name == "drafted" else "scripted_speedup"] = speedup
    return report if acceptance is None else {**report, "scripted_acceptance": acceptance}


def scripted_drafter(target, tokens, acceptance, seed=0):
    """Drafts the tokens that greedy decoding is known to give, each with that chance, else another one."""
    right = np.random.default_rng(seed).random(len(tokens)) < acceptance
    never = target.config.placeholders
    others = [token for token in range(len(never) + 2) if token not in never][:2]
    script = [token if kept else others[token == others[0]] for token, kept in zip(tokens, right)]
    return Scripted(lambda position, count: script[position : position + count])


def _rates(runs):
    """All runs together, without the passes that read the prompts; the rate is the median of the runs'."""
    decoding = [run[1:] for run in runs if len(run) > 1]
    if not decoding:
        raise ValueError("nothing was decoded after the prompt: ask for more tokens")
    summary = summarize([step for run in decoding for step in run])
    rates = [len(tokens_of(run)) / sum(step.seconds for step in run) for run in decoding]
    return {**summary, "tokens_per_second": median(rates)}


def pass_costs(target, prompt, widest, repeats=30):
    """Time of passes of each width after the same prompt: medians of passes taken in turn, and over that of width 1.

    The tokens are the prompt's last ones; with experts, also how many of them each width reads.
    """
    cache = target.new_cache()
    target.forward(prompt, cache, last=0)
    cache.commit()
    times, experts = {width: [] for width in range(1, widest + 1)}, {}
    for _ in range(repeats):
        for width in times:
            start = time.perf_counter()
            out = target.forward((prompt * width)[-width:], cache)
            times[width].append(time.perf_counter() - start)
            cache.rollback(width)
            experts[width] = out.experts_read
    seconds = {width: median(taken) for width, taken in times.items()}
    cost = {width: taken / seconds[1] for width, taken in seconds.items()}
    report = {"seconds_by_width": seconds, "cost_by_width": cost, "cost_of_verification": cost[widest]}
    return {**report, "experts_by_width": experts} if any(experts.values()) else report


def peak_bytes():
    """The most memory this process has held resident, or None where the system does not tell."""
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
