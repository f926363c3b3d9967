"""Expected acceptance: against counts of `generate`, and against every text and every draft of small languages."""

from functools import cache
from itertools import product

import numpy as np
import pytest
from tiny import Chain, ChainDrafter

import minimtp
from minimtp import PromptLookup, Sampling, Scripted, audit, generate
from minimtp.bench import summarize
from minimtp.expected import (
    argmax_round,
    coupled,
    drawn_round,
    expected,
    given_costs,
    measured_costs,
    plot,
    read,
    run,
    stands,
    table,
    with_costs,
)

GREEDY, PLAIN = Sampling(temperature=0.0), Sampling()
RULES = ("rejection", "block", "match", "gumbel")


@cache
def pair(name):
    target = minimtp.load(name)
    return target, minimtp.load_drafter("auto", target)


@cache
def own_text(name, k, temperature=0.0, count=40):
    """(prompt, steps after the prompt's, all ids) of a run."""
    target, drafter = pair(name)
    prompt = target.tokenizer.encode("ROMEO:\nBut soft! What light through yonder window breaks?")
    options = dict(sampling=Sampling(temperature), max_new_tokens=count, seed=2)
    steps = list(generate(target, prompt, drafter, k, **options))
    return prompt, steps[1:], prompt + [token for step in steps for token in step.tokens]


# Counts of real runs


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_on_a_targets_own_greedy_text_expectation_is_the_count(name):
    target, drafter = pair(name)
    prompt, _, ids = own_text(name, 4)
    report = expected(target, drafter, ids, 6, first=len(prompt))
    assert report["impossible"] == {"count": 0, "first": None} and report["emitted"] == len(ids) - 1 - len(prompt)
    assert list(report["rules"]) == ["argmax"]
    for k in (2, 4, 6):
        _, steps, again = own_text(name, k)
        found, counted = report["rules"]["argmax"]["run"][k - 1], summarize(steps)
        assert again == ids
        assert (found["passes"], found["deviation"]) == (counted["passes"], 0)
        assert found["acceptance"] == counted["acceptance"]
        assert found["tokens_per_pass"] == counted["tokens_per_pass"]


def test_prompt_lookup_is_counted_with_drafts_as_short_as_they_come():
    target, _ = pair("tiny-gemma4")
    prompt, _, ids = own_text("tiny-gemma4", 4)
    steps = list(generate(target, prompt, PromptLookup(), 4, max_new_tokens=40))[1:]
    report = expected(target, PromptLookup(), ids, 4, first=len(prompt))["rules"]["argmax"]
    assert min(step.drafted for step in steps) == 0 < max(step.drafted for step in steps)
    assert report["run"][3]["passes"] == len(steps)
    assert report["run"][3]["acceptance"] == summarize(steps)["acceptance"]


def test_a_drafter_without_laws_draws_nothing():
    p_VV, _ = chains(4)
    for ids in ([0, 1, 2, 2, 1, 0], [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]):  # nothing recurs; something does, later on
        assert list(expected(Chain(p_VV), PromptLookup(), ids, 2, PLAIN, first=1)["rules"]) == ["argmax"]


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_drafts_led_along_a_text_have_the_laws_of_drafts_that_took_that_way(name):
    target, drafter = pair(name)
    prompt, steps, ids = own_text(name, 3, temperature=0.7)
    rounds = {n: rest for n, *rest in read(target, drafter, ids, len(prompt), 3, PLAIN, led=True)}
    n, seen = len(prompt), 0
    for step in steps:
        text_K, q_logits, _ = rounds[n]
        for j in range(min(step.accepted + 1, step.drafted)):
            assert list(text_K[:j]) == list(step.draft.tokens[:j])
            q_V = Sampling(0.7).law(q_logits[j])
            np.testing.assert_allclose(q_V, step.draft.q_KV[j], atol=1e-6)
            seen += j > 0
        n += len(step.tokens)
    assert seen > 10


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_counts_of_a_drawn_run_lie_within_what_its_text_allows(name):
    target, drafter = pair(name)
    prompt, steps, ids = own_text(name, 3, temperature=0.7)
    sampling = Sampling(0.7)
    found = expected(target, drafter, ids, 3, sampling, first=len(prompt))["rules"]["rejection"]["run"][2]
    assert abs(len(steps) - found["passes"]) < 4 * found["deviation"]


# Every text of a small language


def chains(seed, size=3):
    random = np.random.default_rng(seed)
    p_VV, q_VV = (random.dirichlet(np.full(size, 0.8), size) for _ in range(2))
    return p_VV, 0.5 * p_VV + 0.5 * q_VV


def mean_passes(rule, p_VV, q_VV, emit, k, point=False):
    """Passes to emit so many tokens after token 0, over everything that can happen, by enumeration of rounds."""

    @cache
    def after(token, left):
        if left <= 0:
            return 0.0

        def follow(law_VV):
            return lambda prefix: law_VV[(token, *prefix)[-1]]

        drafted = (lambda prefix: int(follow(q_VV)(prefix).argmax())) if point else follow(q_VV)
        rounds = audit.emitted(rule, follow(p_VV), drafted, min(k, left - 1))
        return 1 + sum(mass * after(tokens[-1], left - len(tokens)) for tokens, mass in rounds.items())

    return after(0, emit)


@pytest.mark.parametrize("rule", ["rejection", "block", "match", "argmax"])
def test_over_all_texts_the_passes_given_each_text_are_the_passes_of_the_rule(rule):
    emit, k = 3, 3
    p_VV, q_VV = chains(1)
    target, drafter, total = Chain(p_VV), ChainDrafter(q_VV), 0.0
    for rest in product(range(3), repeat=emit):
        ids = [0, 0, *rest]
        chance = np.prod([p_VV[pair] for pair in zip(ids[1:], rest)])
        total += chance * expected(target, drafter, ids, k, PLAIN)["rules"][rule]["run"][-1]["passes"]
    real = mean_passes("rejection" if rule == "argmax" else rule, p_VV, q_VV, emit, k, point=rule == "argmax")
    assert total == pytest.approx(real, abs=1e-9)


@pytest.mark.parametrize("rule", RULES)
def test_kept_is_given_over_all_next_tokens(rule):
    random = np.random.default_rng(3)
    p_JV, q_KV = random.dirichlet(np.full(5, 0.5), 4), random.dirichlet(np.full(5, 0.5), 3)
    for before in product(range(5), repeat=2):
        kept = drawn_round(p_JV, q_KV, [*before, 0])[rule][1][2]
        given = [drawn_round(p_JV, q_KV, [*before, token])[rule][2][2] for token in range(5)]
        assert kept == pytest.approx(p_JV[2] @ given, abs=1e-12)


def test_rounds_of_argmax_drafts_keep_what_the_target_gives_them():
    p_JV = np.array([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [1, 0, 0]])
    test_K, kept_K, given_K = argmax_round(p_JV, (0, 2), (0, 1))["argmax"]
    np.testing.assert_allclose((test_K, kept_K, given_K), [(0.7, 0.3), (0.7, 0.21), (1, 0)])


@pytest.mark.parametrize("seed", range(5))
def test_the_gumbel_coupling_is_its_formula(seed):
    random = np.random.default_rng(seed)
    p_V, q_V = random.dirichlet(np.full(7, 0.4), 2)
    p_V[1], q_V[2] = 0, 0
    p_V, q_V = p_V / p_V.sum(), q_V / q_V.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        terms_VV = np.fmax(p_V[None] / p_V[:, None], q_V[None] / q_V[:, None])  # of x, then y
        formula_V = np.where((p_V > 0) & (q_V > 0), 1 / terms_VV.sum(1), 0)
    np.testing.assert_allclose(coupled(p_V, q_V), formula_V, atol=1e-12)
    tv = np.abs(p_V - q_V).sum() / 2
    assert (1 - tv) / (1 + tv) <= coupled(p_V, q_V).sum() <= 1 - tv + 1e-12


def test_the_coupling_of_equal_laws_never_parts():
    p_V = np.array([0.5, 0.3, 0.2, 0])
    np.testing.assert_allclose(coupled(p_V, p_V), p_V)


def test_the_published_coupling():
    p_V, q_V = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([0.5, 0.2, 0.15, 0.1, 0.05])
    assert coupled(p_V, q_V).sum() == pytest.approx(0.8727, abs=5e-5)


def test_a_text_that_the_target_could_not_emit_is_said_and_still_counted():
    p_VV = np.array([[0, 1, 0], [0, 0, 1], [1, 0, 0.0]])  # 0 1 2 0 1 2 ...
    ids = [0, 1, 2, 1, 2, 0, 1, 2, 0, 1]
    report = expected(Chain(p_VV), ChainDrafter(p_VV), ids, 2)
    assert report["impossible"] == {"count": 1, "first": 3}
    assert report["rules"]["argmax"]["kept"] == [1, 1]  # rounds do not care where the text goes
    assert report["rules"]["argmax"]["run"][1]["passes"] == 3  # 2 1, 2 0 1, 2 0 1
    assert with_costs(report, [1, 1])["rules"]["argmax"]["basis"] == "positions"
    assert "emitting this text" not in table(report)
    assert with_costs({**report, "positions": 20}, [1, 1])["rules"]["argmax"]["basis"] == "text"
    assert "emitting this text" in table({**report, "positions": 20})
    drawn = drawn_round(np.array([[0, 1.0], [0, 1]]), np.array([[0.5, 0.5]]), [0])
    assert all(np.isfinite(numbers).all() for numbers in drawn["block"])


def test_passes_and_their_deviation_are_those_of_the_chain():
    given = [np.array([0.6, 0.3]), np.array([0.5, 0.1]), np.array([0.4]), np.array([])]

    def outcomes(i, chance=1.0, passes=0):
        if i == len(given):
            yield chance, passes
        else:
            for kept, share in enumerate(-np.diff([1, *given[i], 0])):
                yield from outcomes(i + kept + 1, chance * share, passes + 1)

    chances, passes = map(np.array, zip(*outcomes(0)))
    found = run(given)
    assert found["passes"] == pytest.approx(chances @ passes)
    assert found["deviation"] == pytest.approx((chances @ passes**2 - (chances @ passes) ** 2) ** 0.5)
    assert found["tokens_per_pass"] == pytest.approx(4 / (chances @ passes))


# Lossy rules


def test_a_lossy_rule_is_tested_as_it_tests():
    p_V, q_V = np.array([0.2, 0.5, 0.3]), np.array([0.6, 0.3, 0.1])
    assert stands("hf-gemma4", p_V, 0, q_V) == pytest.approx(0.2 / 0.6, abs=1e-9)
    assert stands("threshold", p_V, 2, threshold_acc=0.5) == pytest.approx(0.6, abs=1e-9)
    assert stands("typical", p_V, 0) == 1.0
    assert stands("typical", np.array([0.99, 0.01]), 1) == pytest.approx(0, abs=1e-9)
    p_VV, q_VV = chains(4)
    report = expected(Chain(p_VV), ChainDrafter(q_VV), [0, 1, 2, 0, 1, 1], 2, PLAIN, lossy={"hf-gemma4": {}})
    rules = report["rules"]
    assert rules["hf-gemma4"]["kept"][0] > rules["argmax"]["kept"][0] and "run" not in rules["hf-gemma4"]
    with pytest.raises(ValueError, match="soft"):
        expected(Chain(p_VV), PromptLookup(), [0, 1, 0, 1, 0, 1], 2, PLAIN, lossy={"hf-gemma4": {}})


# Options, costs, looks


@pytest.mark.parametrize("name", ["tiny-gemma4", "tiny-qwen35"])
def test_every_third_round_is_the_same_round(name):
    target, drafter = pair(name)
    prompt, _, ids = own_text(name, 4)
    every, third = (list(read(target, drafter, ids[:40], 5, 3, GREEDY, stride=stride)) for stride in (1, 3))
    assert [n for n, *_ in third] == [n for n, *_ in every][::3]
    for (_, tokens, q_logits, logits_JV), (_, tokens_3, q_logits_3, logits_3_JV) in zip(every[::3], third):
        assert tokens == tokens_3 and np.array_equal(logits_JV, logits_3_JV)
        assert np.array_equal(q_logits, q_logits_3)
    assert "run" not in expected(target, drafter, ids[:12], 2, stride=3)["rules"]["argmax"]


def test_the_best_k_is_where_tokens_cost_least():
    report = {
        "positions": 4,
        "emitted": 4,
        "impossible": {"count": 0, "first": None},
        "rules": {"argmax": {"test": [0.5] * 3, "kept": [0.5] * 3, "tokens_per_pass": [1.6, 2.2, 2.4]}},
    }
    found = with_costs(report, given_costs(0.25, 3))
    assert found["costs"] == [1.25, 1.5, 1.75]
    assert found["rules"]["argmax"]["best"] == 2
    assert found["rules"]["argmax"]["speedup"] == pytest.approx([1.28, 2.2 / 1.5, 2.4 / 1.75])
    assert with_costs(report, given_costs(2, 3))["rules"]["argmax"]["best"] == 0


def test_costs_are_those_of_drafts_and_of_wide_passes(monkeypatch):
    """On a clock that passes and draft tokens move on."""
    p_VV, q_VV = chains(4)
    now = [0.0]

    class Slow(Chain):
        def forward(self, ids_T, *rest, **options):
            now[0] += 1 + 0.125 * (len(ids_T) - 1)
            return super().forward(ids_T, *rest, **options)

    class SlowDrafter(ChainDrafter):
        def propose(self, new_tokens_N, hidden_ND, cache, num_draft, *rest):
            now[0] += 0.25 * num_draft
            return super().propose(new_tokens_N, hidden_ND, cache, num_draft, *rest)

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert measured_costs(Slow(p_VV), SlowDrafter(q_VV), [0, 1, 2, 1], 3, repeats=2) == [1.375, 1.75, 2.125]


def test_the_table_names_what_it_shows():
    p_VV, q_VV = chains(4)
    report = expected(Chain(p_VV), ChainDrafter(q_VV), [0, 1, 2, 0, 1, 1, 2, 1], 2, PLAIN)
    text = table(with_costs(report, given_costs(0.1, 2)))
    assert "drawn drafts, rejection" in text and "best k\n  argmax drafts" in text
    shown = text.split("chance of the test")[1].splitlines()[3].split()
    assert shown[-2] == f"{report['rules']['rejection']['test'][0]:.1%}"


def test_the_picture_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    p_VV, q_VV = chains(4)
    report = expected(Chain(p_VV), ChainDrafter(q_VV), [0, 1, 2, 0, 1, 1, 2, 1], 2, PLAIN)
    plot(with_costs(report, given_costs(0.1, 2)), tmp_path / "picture.svg")
    assert "</svg>" in (tmp_path / "picture.svg").read_text()


@pytest.mark.parametrize(
    "name, value", [("first", 0), ("first", 4), ("num_draft", 0), ("num_draft", 16), ("stride", 0)]
)
def test_what_makes_no_sense_is_refused(name, value):
    p_VV, q_VV = chains(4)
    with pytest.raises(ValueError, match="wanted"):
        expected(Chain(p_VV), ChainDrafter(q_VV), [0, 1, 2, 0, 1, 1], **{name: value})


def test_a_drafter_may_draft_less_than_it_is_asked_for():
    p_VV, _ = chains(4)
    ids = [0, 1, 2, 0, 1, 1, 2, 1]
    report = expected(Chain(p_VV), Scripted(lambda at, count: ids[at : at + 1]), ids, 3, GREEDY)
    assert report["rules"]["argmax"]["kept"][1:] == [0, 0]
    assert report["rules"]["argmax"]["run"][2]["passes"] == 3  # two tokens each


def test_positions_without_a_draft_count():
    p_VV = np.eye(3)[[1, 2, 0]]
    ids = [0, 1, 2, 0, 1, 2, 0, 1]
    every_other = Scripted(lambda at, count: ids[at : at + 1] if at % 2 else [])
    found = expected(Chain(p_VV), every_other, ids, 1)["rules"]["argmax"]
    assert found["test"] == [1.0] and found["kept"] == [0.4] and found["tokens_per_pass"] == [1.4]  # at 3 and 5 of 2..6
