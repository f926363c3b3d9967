"""A watched run: the decisions of `generate`, said rightly; its page and what notebooks show hold the data, escaped."""

import base64
import hashlib
import html
import json
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import pair

import minimtp
from minimtp import Draft, Sampling, Verdict, accept, memory
from minimtp.acceptance import RULES
from minimtp.audit import audit
from minimtp.display import FATES, visible
from minimtp.ggml import TYPES, Blocks
from minimtp.loading import published_config
from minimtp.page import data, page, write_page
from minimtp.plan import make_plan
from minimtp.quant import pack
from minimtp.watch import fates, watch

SOFT = {"hf-gemma4"}
EVERY = 1 << 20  # entries: all of them
RUNS = [*((rule, 1.0) for rule in RULES), ("greedy", 0.0), ("rejection", 0.0), ("block", 0.0), ("ensemble", 0.0)]
HOSTILE = '</script><img src=x onerror="alert(1)">&\u202e\n{TITLE}{DATA}'


@cache
def models():
    return pair("bundled")


def options(rule="rejection", temperature=1.0, **more):
    _, drafter = models()
    soft = rule in SOFT
    return {
        "drafter": replace(drafter, soft=True) if soft else drafter,
        "rule": rule,
        "sampling": Sampling(temperature, top_k=more.pop("top_k", None)),
        "draft_sampling": Sampling(0.0) if soft else None,
        "max_new_tokens": 8,
        "seed": 7,
    } | more


@cache
def run_of(rule="rejection", temperature=1.0, top=EVERY, **more):
    target, _ = models()
    return watch(target, target.tokenizer.encode("ROMEO:\n"), top=top, **options(rule, temperature, **more))


def plain(step):
    return replace(step, seconds=0, draft=step.draft.tokens)


@pytest.mark.parametrize(("rule", "temperature"), RUNS)
def test_watching_changes_no_decision(rule, temperature):
    target, _ = models()
    prompt = target.tokenizer.encode("ROMEO:\n")
    steps = list(minimtp.generate(target, prompt, **options(rule, temperature)))
    run = run_of(rule, temperature)
    assert not any(place.kept for place in run.places if run.argmax and rule not in ("block", "ensemble"))
    assert [plain(step) for step in steps] == [plain(step) for step in run.steps]
    assert run.text == target.tokenizer.decode(run.tokens)
    assert [place.token for place in run.places if place.emitted] == run.tokens


@pytest.mark.parametrize("rule", RULES)
def test_the_rule_on_the_kept_laws_gives_the_recorded_verdict(rule):
    """With every entry kept, a run holds all that `accept` is given."""
    target, _ = models()
    V, run = target.config.vocab_size, run_of(rule)
    for number, step in enumerate(run.steps):
        rows, laws = {}, {}
        for place in (place for place in run.places if place.round == number):
            row = place.depth - 1 if place.depth else step.accepted
            for name, column in (("p", 1), ("q", 2)):
                law_V = np.zeros(V)
                law_V[[bar[0] for bar in place.bars]] = [bar[column] or 0 for bar in place.bars]
                (rows if name == "p" else laws)[row] = law_V
        p_JV = np.stack([rows.get(j, np.full(V, 1 / V)) for j in range(step.drafted + 1)])
        q_KV = np.stack([laws[j] for j in range(step.drafted)]) if step.drafted else None
        draft = Draft(step.draft.tokens, None, q_KV) if rule in SOFT else Draft(step.draft.tokens, q_KV)
        assert accept(rule, p_JV, draft, step.uniforms) == step.verdict


@pytest.mark.parametrize(("rule", "temperature"), RUNS)
def test_a_token_stands_where_its_uniform_falls_in_the_part_that_keeps_it(rule, temperature):
    for place in run_of(rule, temperature).places:
        if place.kept and (rule != "block" or place.depth is None):
            assert (place.kept[0] <= place.u < place.kept[1]) == place.emitted
        if place.depth and place.fate != "unread" and rule != "block":
            assert (" is kept: " in place.says) == (place.fate == "accepted")
            assert (" not " in place.says) <= (place.fate == "rejected")
            assert (" at least 1, " in place.says) <= (place.fate == "accepted")


def test_of_a_block_the_longest_prefix_that_stands_is_kept():
    run = run_of("block")
    for number, step in enumerate(run.steps):
        passes = [place.depth for place in run.places if place.round == number and place.depth
                  and place.kept[0] <= place.u < place.kept[1]]  # fmt: skip
        assert max(passes, default=0) == step.verdict.accepted
    assert any(step.verdict.accepted < step.drafted for step in run.steps)


def test_only_top_entries_are_kept_and_those_of_the_tokens_in_question():
    for place in run_of(top=3).places:
        assert 3 <= len(place.bars) <= 5 and len(place.drawn_from) <= 4
        assert place.token in [token for token, *_ in place.bars]
    assert all(step.draft.q_KV is None for step in run_of().steps)


def test_a_correction_shows_the_law_it_was_drawn_from():
    run = run_of()
    corrections = [place for place in run.places if place.fate == "correction"]
    for place in corrections:
        rest = {token: max(p - q, 0) for token, p, q in place.bars}
        total = sum(rest.values())
        assert dict(place.drawn_from) == pytest.approx({token: r / total for token, r in rest.items()}, abs=1e-12)
    assert corrections and not any(place.drawn_from for place in run.places if place.fate != "correction")


def test_at_temperature_0_bars_are_the_softmax_and_the_argmax_decides():
    run, target = run_of("rejection", 0.0), models()[0]
    first = run.places[0]
    logits_V = target.forward(run.prompt, target.new_cache(), last=1).logits_TV[0]
    law_V = Sampling(suppress=tuple(target.config.placeholders)).law(logits_V)
    assert dict(bar[:2] for bar in first.bars) == pytest.approx(dict(enumerate(law_V)), abs=1e-12)
    assert first.token == law_V.argmax() and "argmax" in first.says and first.u is None
    assert "softmax of the logits" in data(run)["note"] and "softmax" not in data(run_of())["note"]


def test_runs_without_a_drafter_with_prompt_lookup_and_with_a_stop_token():
    target, drafter = models()
    prompt = target.tokenizer.encode("ROMEO:\n")
    alone = watch(target, prompt, max_new_tokens=4)
    assert [place.fate for place in alone.places] == ["bonus"] * 4 and all(
        bar[2] is None for bar in alone.places[0].bars
    )
    twice = target.tokenizer.encode("ROMEO:\nI am\n\nROMEO:\n")
    looked = watch(target, twice, minimtp.load_drafter("lookup", target), max_new_tokens=6)
    assert any(place.q == 1 for place in looked.places)
    whole = watch(target, prompt, drafter, max_new_tokens=10)
    inside = next(place for place in whole.places if place.fate == "accepted" and place.depth == 2)
    ended = watch(target, prompt, drafter, max_new_tokens=10, stop=[inside.token])
    assert ended.tokens[-1] == inside.token and ended.tokens.count(inside.token) == 1
    last = ended.steps[-1]
    assert 2 == last.accepted == len(last.tokens) < last.drafted
    assert [fate for fate, _ in fates(last)] == ["accepted"] * 2 + ["unread"] * (last.drafted - 2)
    assert ended.places[-1].says == "The text ended before it, at a stop token."
    for run in (alone, looked, ended):
        assert page(run) and run._repr_html_()


def test_presence_penalty_and_filters_are_watched_as_they_are():
    target, drafter = models()
    prompt, sampling = target.tokenizer.encode("To be"), Sampling(0.8, top_k=5, presence_penalty=1.0)
    settings = {"sampling": sampling, "max_new_tokens": 12, "seed": 1}
    steps = list(minimtp.generate(target, prompt, drafter, **settings))
    run = watch(target, prompt, drafter, **settings)
    assert [step.tokens for step in steps] == [step.tokens for step in run.steps]
    assert all(sum(bar[1] > 0 for bar in place.bars) <= 5 for place in run.places)


# The page


class Parsed(HTMLParser):
    """The elements of a page, and the text inside each kind."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.inside, self._open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag in self._open:
            while self._open.pop() != tag:
                pass

    def handle_data(self, text):
        if self._open:
            self.inside.setdefault(self._open[-1], []).append(text)


def hostile():
    """A run whose tokens are all called something hostile."""
    run = run_of(top=10)
    places = [replace(place, text=HOSTILE, label=HOSTILE, says=HOSTILE) for place in run.places]
    tokenizer = SimpleNamespace(decode=lambda ids, special=False: HOSTILE, token=lambda id: HOSTILE)
    return replace(
        run, places=places, tokenizer=tokenizer, settings={**run.settings, "model": HOSTILE, "rule": HOSTILE}
    )


def test_a_page_holds_the_run():
    run = run_of(top=10)
    parsed = Parsed(page(run, "minimtp run x"))
    record = json.loads(parsed.inside["script"][0])
    assert record == json.loads(json.dumps(data(run, "minimtp run x"))) and record["command"] == "minimtp run x"
    assert [place["id"] for place in record["places"]] == [place.token for place in run.places]
    assert [place["says"] for place in record["places"]] == [place.says for place in run.places]
    assert record["rate"] == f"{run.summary['tokens_per_pass']:.2f}"
    assert dict(record["settings"])["rule"] == "rejection" and record["model"] == "tiny-gemma4"


def test_a_page_needs_nothing_from_outside_and_runs_its_own_script_alone():
    text = page(run_of(top=10))
    assert not re.findall(r"https?:|//[a-z]|@import|url\(", text.replace("http-equiv", ""))
    parsed = Parsed(text)
    policy = next(element["content"] for tag, element in parsed.elements if "http-equiv" in element)
    assert policy.startswith("default-src 'none'")
    for kind, inside in (("script", parsed.inside["script"][-1]), ("style", parsed.inside["style"][0])):
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not any({"style", "onclick", "src", "href"} & set(element) for _, element in parsed.elements)


def test_hostile_tokens_stay_text():
    run = hostile()
    harmless, bad = (Parsed(page(one, HOSTILE)) for one in (run_of(top=10), run))
    kinds = [[tag for tag, _ in parsed.elements] for parsed in (harmless, bad)]
    assert kinds[0] == kinds[1] and kinds[1].count("script") == 2 and "img" not in kinds[1]
    assert json.loads(bad.inside["script"][0])["command"] == HOSTILE
    shown = Parsed(run._repr_html_())
    assert {tag for tag, _ in shown.elements} <= {"div", "span", "b"}
    assert not any(name.startswith("on") for _, element in shown.elements for name in element)
    assert (
        "\u202e" not in run._repr_html_() and "\u202e" not in json.loads(bad.inside["script"][0])["places"][0]["shown"]
    )


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "run.html"
    write_page(file, run_of(top=10))
    before = file.read_bytes()
    monkeypatch.setattr("minimtp.page.page", lambda *_: "half" + 1)
    with pytest.raises(TypeError):
        write_page(file, run_of(top=10))
    assert file.read_bytes() == before and [path.name for path in tmp_path.iterdir()] == ["run.html"]


def test_the_command_writes_a_page_beside_its_text(cli, tmp_path):
    file = tmp_path / "run.html"
    status, out, err = cli("run", "To be", "-n", 8, "--html", file)
    assert (status, out) == cli("run", "To be", "-n", 8)[:2] and err.count("\n") == 1
    record = json.loads(Parsed(file.read_text(encoding="utf-8")).inside["script"][0])
    assert record["command"].startswith("minimtp run 'To be' -n 8 --html ")
    assert record["prompt"] + "".join(
        place["shown"] for place in record["places"] if place["fate"] in ("accepted", "correction", "bonus")
    ).replace("\u23ce", "\n") == "<bos>To be" + out.removesuffix("\n")


@pytest.mark.parametrize("place", ["missing/run.html", "."])
def test_a_page_that_cannot_be_written_is_refused_before_anything_is_run(cli, tmp_path, place, monkeypatch):
    monkeypatch.setattr("minimtp.cli.load_pair", lambda *_: pytest.fail("loaded"))
    status, out, err = cli("run", "To be", "--html", tmp_path / place)
    assert (status, out, err.count("\n")) == (2, "", 1) and str(tmp_path) in err


# What notebooks show


def shown(thing):
    text = thing._repr_html_()
    parsed = Parsed(text)
    assert not {"script", "link", "img", "style"} & {tag for tag, _ in parsed.elements}
    return html.unescape(re.sub(r"<[^>]*>", "", text))


def test_a_run_is_shown_with_every_token_and_a_summary():
    run = run_of(top=10)
    text = shown(run)
    for place in run.places:
        assert visible(place.text, " ") in text.replace("\u23ce\n", "\u23ce")
    assert f"{run.summary['tokens_per_pass']:.2f} a pass" in text and FATES["correction"].mark in text
    assert repr(run).startswith("Run(settings=")


def test_a_verdict_is_shown_and_its_repr_is_as_before():
    assert shown(Verdict(2, 17)) == "+1+2 accepted, then token 17"
    assert repr(Verdict(2, 17)) == "Verdict(accepted=2, token=17)"


def test_an_audit_is_shown_and_is_still_a_dict():
    report = audit("typical")
    text, case = shown(report), report["rules"][0]["cases"][0]
    assert f"{case['total_variation']:.3f}" in text and "typical (epsilon 0.09, delta 0.3)" in text
    assert json.loads(json.dumps(report)) == report == dict(report) and repr(report) == repr(dict(report))


def test_a_plan_is_shown_in_bars_and_in_numbers():
    family, config = published_config("gemma-4-31b")
    weights = memory.stored_parts(family.tensors(config), "q4_0")
    plan = make_plan("<b>31b", config, weights, 8192, memory=24 << 30)
    text, widths = shown(plan), [float(w) for w in re.findall(r"width:([\d.]+)%", plan._repr_html_())]
    assert "<b>31b" in text and f"{plan.max_context:,}" in text and "fits" in text
    assert len(widths) == len(plan.stack()) and sum(widths) < 100
    assert sum(plan.stack().values()) == plan.driver + sum(plan.sums.values())
    assert all(f"{part.bytes / 2**20:,.1f}" in text for parts in plan.parts().values() for part in parts)


def test_a_quantized_weight_shows_its_first_rows_alone(monkeypatch):
    w_OI = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    weight = pack(w_OI, name="<i>w")
    text = shown(weight)
    assert "<i>w" in text and "64 × 64" in text and "4.50 bits" in text
    assert "".join(map(str, weight.codes()[0, :32])) in text
    monkeypatch.setattr("minimtp.quant._codes", lambda packed_RB, bits: pytest.fail("too much") if len(packed_RB) > 4
                        else np.zeros((len(packed_RB), 64), np.int8))  # fmt: skip
    weight._repr_html_()


def test_a_ggml_weight_is_shown():
    records = np.zeros(4, TYPES["Q4_0"].record)
    TYPES["Q4_0"].quantize(np.random.default_rng(1).normal(size=(4, 32)).astype(np.float32), records)
    weight = Blocks(records.view(np.uint8).reshape(2, -1), "Q4_0", (2, 64), "blk.0")
    assert f"{weight.dequantize('float64')[0, 1]:.2g}" in shown(weight) and "Q4_0" in shown(weight)
