"""A running server: what it answers is understood in every form, and what it gets wrong is told from rounding."""

import json
import threading
import time
from contextlib import contextmanager
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import numpy as np
import pytest

import minimtp
from minimtp import server
from minimtp.server import Answer, exchange
from minimtp.server_check import BITS, Pieces, check, compare, identify, ours, report_text, rows

PROMPT, LENGTH, K = "ROMEO:\nBut soft, what", 12, 3
HEADERS = "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("MINIMTP_API_KEY", raising=False)


@cache
def targets(name="tiny-gemma4"):
    return [minimtp.load(name, dtype=dtype) for dtype in ("float64", "float32")]


@cache
def drafter():
    return minimtp.load_drafter("auto", targets()[1])


@cache
def written(seed=None):
    """(ids, their laws' logarithms_TV, drafted, accepted) of a speculative run of ours: greedy, or drawn by a seed."""
    target = targets()[1]
    prompt = target.tokenizer.encode(PROMPT)
    sampling = minimtp.Sampling(0.0 if seed is None else 1.0)
    options = dict(sampling=sampling, max_new_tokens=LENGTH, seed=seed or 0)
    steps = list(minimtp.generate(target, prompt, drafter(), K, **options))
    ids = [token for step in steps for token in step.tokens]
    logits_TV = np.stack(list(rows(target, prompt, ids))[:-1]).astype(np.float64)
    laws_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    return ids, laws_TV, sum(step.drafted for step in steps), sum(step.accepted for step in steps)


# A server


def completion(body, form="legacy", bend=lambda logs_TV: logs_TV, seed=None, drafts=False):
    """What a server of this kind answers a request with."""
    tokenizer = targets()[1].tokenizer
    ids, logs_TV, drafted, accepted = written(seed)
    logs_TV, top = bend(logs_TV), body.get("top_logprobs") or body.get("logprobs") or 0
    best_TM = np.argsort(-logs_TV, axis=-1)[:, :top]

    def name(id):
        if form == "ids":
            return f"token_id:{id}" if body.get("return_tokens_as_token_ids") else ""
        return tokenizer.decode([107, id], special=True)[1:]

    def entry(t, id):
        return {"id": int(id), "token": name(id), "logprob": float(logs_TV[t, id])}

    logprobs = None
    if form in ("chat", "mlx"):
        tops = [[entry(t, id) for id in best_TM[t]] for t in range(len(ids))]
        logprobs = {"content": [{**entry(t, id), "top_logprobs": tops[t]} for t, id in enumerate(ids)]}
    elif form != "text" and top:
        logprobs = {
            "tokens": list(map(name, ids)),
            "token_logprobs": [float(logs_TV[t, id]) for t, id in enumerate(ids)],
            "top_logprobs": [{name(id): float(logs_TV[t, id]) for id in best_TM[t]} for t in range(len(ids))],
            "text_offset": [0] * len(ids),
        }
    answer = {"choices": [{"text": tokenizer.decode(ids), "finish_reason": "length", "logprobs": logprobs}]}
    answer["usage"] = {"prompt_tokens": len(tokenizer.encode(PROMPT)), "completion_tokens": len(ids)}
    if drafts:
        off = drafts == "switched" and body.get("speculative.n_max") == 0
        answer["timings"] = {"draft_n": 0 if off else drafted, "draft_n_accepted": 0 if off else accepted}
    return answer


def refuse_lists(body):
    return 422 if isinstance(body["prompt"], list) else None


REFUSALS = {
    "legacy": refuse_lists,  # llama-cpp-python
    "ids": lambda body: None,  # vLLM
    "chat": lambda body: None,  # llama.cpp
    "mlx": lambda body: refuse_lists(body) or (400 if type(body.get("logprobs", True)) is not bool else None),
    "text": lambda body: 400 if set(body) - {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stream",
                                             "presence_penalty", "frequency_penalty"} else None,
}  # fmt: skip


@contextmanager
def serving(reply):
    """A server; reply: (path, body or None) -> a dict, a status, or the bytes to send. Yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self._send(reply(self.path, None))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            key = self.headers["Authorization"]
            self._send(reply(self.path, {**body, "key": key} if key else body))

        def _send(self, said):
            status, said = (said, {"error": "no\n\x1b[2J"}) if isinstance(said, int) else (200, said)
            if isinstance(said, dict):
                data = json.dumps(said).encode()
                said = HEADERS.replace("200 OK", f"{status} so").encode() + b"\r\n" + data
            for piece in said if isinstance(said, list) else [said]:
                self.wfile.write(piece)
                self.wfile.flush()
                time.sleep(0.05 * isinstance(said, list))

        def log_message(self, *arguments):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments):  # whoever asked has left
            pass

    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield "http://{}:{}".format(*running.server_address)
        finally:
            running.shutdown()
            thread.join()


def of_kind(form, seen=None, **options):
    def reply(path, body):
        if body is None:
            return {"data": [{"id": "the model"}]}
        assert path == "/v1/completions" and body["model"] == "the model" and body["temperature"] == 0
        if status := REFUSALS[form](body):
            return status
        if seen is not None:
            seen.append(body)
        return completion(body, form, **options)

    return serving(reply)


def checked(url, plain=None, **options):
    """The report, which must be JSON and readable too."""
    report = check(targets(), options.pop("drafter", None), url, plain, PROMPT, LENGTH, num_draft=K, **options)
    assert report == json.loads(json.dumps(report, allow_nan=False))
    assert ("agrees" in report_text(report)) == report["passed"]
    return report


# Every form of answer


@pytest.mark.parametrize("form, sent", [("legacy", "text"), ("ids", "ids"), ("chat", "ids"), ("mlx", "text")])
def test_a_server_that_is_right_agrees_to_float32(form, sent):
    with of_kind(form) as url:
        report = checked(url, bits=BITS["float32"])
    found = report["texts"]["server"]
    assert report["passed"] and report["prompt"]["sent"] == sent and report["same"] is report["drafts"] is None
    assert found["ids"] == written()[0] and found["differing"] == []
    assert found["logprobs"]["compared"] == 5 * LENGTH and found["logprobs"]["bits"] > 22


def test_a_server_without_log_probabilities_is_judged_by_its_text():
    with of_kind("text") as url:
        report = checked(url)
    assert report["passed"] and report["texts"]["server"]["logprobs"]["compared"] == 0
    assert report["notes"] == [f"server: no log-probabilities of {LENGTH} of {LENGTH} tokens"]


def test_a_server_is_asked_for_greedy_text_and_told_the_key(monkeypatch):
    asked = []
    monkeypatch.setenv("MINIMTP_API_KEY", "secret")
    with of_kind("legacy", asked) as url:
        checked(f"{url}/v1/", top=2)
    assert len(asked) == 1 and asked[0]["key"] == "Bearer secret"
    assert [asked[0][name] for name in ("repeat_penalty", "max_tokens", "logprobs")] == [1, LENGTH, 2]


# What is wrong


@pytest.mark.parametrize(
    "bend, bits",
    [
        (lambda x: x / 1.02, 11),  # a temperature, a wrong soft cap
        (lambda x: x + np.random.RandomState(0).normal(0, 0.1, x.shape), 11),  # coarser weights
        (lambda x: x + np.random.RandomState(0).normal(0, 1e-4, x.shape), 24),
        (lambda x: np.where(np.arange(len(x))[:, None] == 7, np.roll(x, 1, 0), x), 8),  # one row is another's
    ],
)
def test_wrong_log_probabilities_are_found(bend, bits):
    with of_kind("chat", bend=bend) as url:
        assert not checked(url, bits=bits)["passed"]


def test_differences_are_told_in_bits():
    """Noise as that of arithmetic with so many bits is found to be it."""
    prompt, (ids, logs_TV, *_) = targets()[1].tokenizer.encode(PROMPT), written()
    spread_T = ours(targets(), prompt, ids, [[]] * LENGTH)[-1]
    noise_TV = np.random.RandomState(1).normal(0, 1, logs_TV.shape) * spread_T[:, None]
    for bits in (20, 16, 11, 8):
        with of_kind("chat", bend=lambda x, bits=bits: x + noise_TV * 2.0 ** (24 - bits)) as url:
            report = checked(url, bits=bits)
        assert abs(report["texts"]["server"]["logprobs"]["bits"] - bits) < 0.5 and report["passed"]


def test_another_text_is_a_real_difference():
    with of_kind("chat", seed=1) as url, of_kind("chat") as plain:
        report = checked(url, plain)
    first, same = report["texts"]["server"]["differing"][0], report["same"]
    at = next(i for i, pair in enumerate(zip(written()[0], written(1)[0])) if pair[0] != pair[1])
    assert not report["passed"] and first["position"] == at and not first["tie"] and first["ours"] == written()[0][at]
    assert (same["position"], same["tokens"], same["tie"]) == (at, [written(1)[0][at], written()[0][at]], False)
    assert same["margin"] == pytest.approx(first["margin"]) and report["texts"]["plain"]["passed"]
    assert report["texts"]["server"]["logprobs"]["differing"] == []  # its numbers are right: teacher-forced on its text


def test_a_prompt_read_otherwise_is_a_difference():
    with serving(lambda path, body: {**completion(body or {}), "usage": {"prompt_tokens": 99}}) as url:
        report = checked(url)
    assert not report["passed"] and any("it read 99 tokens" in note for note in report["notes"])


def test_texts_that_part_where_nobody_can_say_how_differ():
    def reply(path, body):
        answer = completion(body or {"logprobs": 5})
        answer["choices"][0]["text"] += "!"
        answer["choices"][0]["logprobs"]["tokens"][-1] = "no such piece"
        return answer

    with serving(reply) as url, of_kind("legacy") as plain:
        report = checked(url, plain)
    assert report["same"] == {"identical": False, "position": LENGTH - 1, "tokens": [], "tie": False}
    assert not report["passed"] and all(one["passed"] for one in report["texts"].values())


def test_an_end_that_is_among_the_tokens_is_no_second_one():
    def reply(path, body):
        answer = completion(body or {"logprobs": 5}, "ids")
        answer["choices"][0] |= {"token_ids": [*written()[0][:3], 1], "finish_reason": "stop"}  # vLLM
        return answer

    with serving(reply) as url:
        assert checked(url)["texts"]["server"]["positions"] == 4


# Speculation


def test_a_server_that_can_be_asked_not_to_draft_is(tmp_path):
    asked = []
    with of_kind("chat", asked, drafts="switched") as url:
        report = checked(url, drafter=drafter())
    assert [body.get("speculative.n_max") for body in asked] == [None, 0] and report["same"] == {"identical": True}
    found, steps = report["drafts"], LENGTH - 1 - written()[3]
    assert (found["drafted"], found["accepted"], found["passes"]) == (*written()[2:], steps)
    assert found["expected"]["passes"] == pytest.approx(steps)


def test_a_server_that_cannot_be_is_told_of():
    with of_kind("chat", drafts=True) as url, of_kind("chat") as plain:
        alone, both = checked(url), checked(url, plain)
    assert alone["passed"] and alone["same"] is None and "cannot switch" in alone["notes"][0]
    assert both["same"] == {"identical": True} and both["notes"] == []


def test_tokens_that_llama_cpp_drafted_have_no_log_probability():
    def reply(path, body):
        answer = completion(body or {"logprobs": 5}, "chat")
        for entry in answer["choices"][0]["logprobs"]["content"][1:]:
            entry |= {"logprob": 0.0, "top_logprobs": []}
        return answer

    with serving(reply) as url:
        report = checked(url)
    assert report["passed"] and report["texts"]["server"]["logprobs"]["positions"] == 1
    assert report["notes"] == [f"server: no log-probabilities of {LENGTH - 1} of {LENGTH} tokens"]


# Ties, ends, floors: on logits given


class Told:
    """Stands for a target whose logits are given, whatever it reads."""

    def __init__(self, logits_TV, noise=0.0):
        self.logits_TV = logits_TV + noise * np.random.RandomState(0).normal(size=logits_TV.shape)

    def new_cache(self):
        return SimpleNamespace(commit=lambda: None)

    def forward(self, ids, cache, last):
        return SimpleNamespace(logits_TV=self.logits_TV[:last])


def told(rows, ids, tops=(), ends=(), bits=24):
    """compare on two targets of which the second is off by 1e-6."""
    logits_TV = np.array(rows, float)
    return compare([Told(logits_TV), Told(logits_TV, 1e-6)], [0], ids, tops, ends, bits)[0]


@pytest.mark.parametrize("gap, tie", [(1e-6, True), (1e-2, False)])
def test_a_tie_is_within_rounding(gap, tie):
    report = told([[3.0, 3.0 - gap, 1.0], [0.0, 5.0, 1.0]], [1, 1])
    (part,) = report["differing"]
    assert (part["position"], part["token"], part["ours"], part["tie"]) == (0, 1, 0, tie) and report["passed"] == tie
    assert part["margin"] == pytest.approx(gap) and (part["explained"] > gap) == tie


def test_one_number_far_off_is_found_among_many():
    tops = [{0: -np.log1p(np.exp(-2))} for _ in range(400)]
    assert told([[3.0, 1.0]] * 400, [0] * 400, tops)["passed"]
    tops[77][0] += 3e-5
    report = told([[3.0, 1.0]] * 400, [0] * 400, tops)
    assert not report["passed"] and report["logprobs"]["bits"] > 23
    assert [one["position"] for one in report["logprobs"]["differing"]] == [77]


def test_what_softmax_does_not_see_is_no_error():
    logits_TV = np.random.RandomState(0).normal(size=(3, 50))
    spread_T = ours([Told(logits_TV), Told(logits_TV + 0.5)], [0], [1, 2, 3], [[]] * 3)[-1]
    assert spread_T.max() < 1e-12


def test_a_tie_is_judged_at_the_precision_that_was_seen():
    """A server says to be coarse, but its numbers are fine: a token so far from ours is no rounding."""
    rows, own = [[3.0, 2.99, -9.0]] * 60, np.log(np.exp([3.0, 2.99, -9.0]).sum())
    exact = [{0: 3.0 - own}] * 60
    assert told(rows, [1] * 60, bits=11)["passed"]
    report = told(rows, [0] * 59 + [1], exact, bits=11)
    assert not report["passed"] and not report["differing"][0]["tie"] and report["logprobs"]["bits"] > 24
    assert told(rows, [0] * 59 + [1], [{0: 3.0 - own + 2e-3}] * 60, bits=11)["passed"]
    coarse, none = (told(rows, [1] * 60, tops)["differing"][0] for tops in ([{0: 3.1 - own}] * 60, ()))
    assert coarse == none  # never wider than the one given


def test_precision_is_that_of_the_positions_looked_at():
    logits_TV = np.zeros((60, 3)) + [3.0, 1.0, 0.0]
    single_TV = logits_TV + 1e-6 * np.random.RandomState(0).normal(size=(60, 3)) * np.r_[1, [100] * 59][:, None]
    tops = [{0: 3.0 - np.log(np.exp(logits_TV[0]).sum()) + 1e-6}]
    report = compare([Told(logits_TV), Told(single_TV)], [0], [0] * 60, tops, (), 24)[0]
    assert abs(report["logprobs"]["bits"] - 24) < 2


def test_a_text_that_ends_must_end_there():
    rows = [[9.0, 0.0, 1.0], [0.0, 5.0, 1.0]]
    assert told(rows, [0], ends=(1, 2))["passed"] and told(rows, [0])["passed"]
    (part,) = told(rows, [0], ends=(0, 2))["differing"]
    assert (part["position"], part["token"], part["ours"]) == (1, 2, 1)
    with pytest.raises(ValueError, match="wrote nothing"):
        told(rows, [])


def test_a_probability_of_nothing_is_what_servers_write_for_it():
    rows = [[200.0, 0.0, 199.0]]
    own = -np.log1p(np.exp(-1))
    for written, passed in ((-9999.0, True), (-3.4e38, True), (float("-inf"), True), (-50.0, False)):
        assert told(rows, [0], [{0: own, 1: written}])["passed"] == passed
    assert not told(rows, [0], [{0: own, 2: -9999.0}])["passed"]


# Which tokens these are


def identified(text, pieces, tops=(), **options):
    target = targets()[1]
    answer = Answer(text, pieces, [*tops], **{"stopped": False, "prompt": 1, "count": None, "drafts": None,
                                            "sent": "text", **options})  # fmt: skip
    return identify(answer, target.tokenizer, Pieces(target.tokenizer, target.config.vocab_size))


def test_pieces_of_characters_are_told_by_the_whole_text():
    encode, id = targets()[1].tokenizer.encode, targets()[1].tokenizer.id
    ids = encode("I \U0001f600 am", special=False)
    assert ids[-5:-1] == [id(f"<0x{byte:02X}>") for byte in (0xF0, 0x9F, 0x98, 0x80)]
    for broken in ("", "\ufffd"):
        pieces = ["I", " ", *[broken] * 4, " am"]
        assert identified("I \U0001f600 am", pieces)[::2] == (ids, None)
    ids, _, note = identified("I am\U0001f600", ["I", " a", "m", *[""] * 4])  # read otherwise: " am"
    assert len(ids) == 3 and "from token 3 on" in note
    assert identified("I, I", ["I", ",", " I"])[0] == encode("I, I", special=False)  # not <0x2C>


def test_what_cannot_be_told_is_not_guessed():
    ids, tops, note = identified("I am", ["I", "no such piece", " am"], [{"I": -1.0, "": -2.0}])
    assert len(ids) == 1 and tops == [{ids[0]: -1.0}] and "from token 1 on" in note
    assert "3 tokens" in identified("I am", None, count=3)[2] and identified("I am", None, count=2)[2] is None
    assert identified("I am", None, count=3, stopped=True)[2] is None
    for piece in (-1, 1216, 10**30):
        with pytest.raises(ValueError, match="vocabulary of 1216"):
            identified("I", [piece])


# Servers that are broken, or hostile


def choice(**options):
    logprobs = {"tokens": ["I"], "token_logprobs": [-1.0], "top_logprobs": [{"I": -1.0}]}
    return {"choices": [{"text": "I", "finish_reason": "length", "logprobs": {**logprobs, **options}}]}


BROKEN = {
    "nothing": b"",
    "no HTTP": b"hello\r\n\r\n",
    "no JSON": HEADERS.encode() + b"\r\n<html>",
    "no UTF-8": HEADERS.encode() + b'\r\n{"a": "\xff"}',
    "deep": HEADERS.encode() + b"\r\n" + b"[" * 100_000,
    "a list": HEADERS.encode() + b"\r\n[]",
    "short": HEADERS.encode() + b'Content-Length: 50\r\n\r\n{"choices": [',
    "status": 503,
    "refused": 400,
    "key": 401,
    "redirect": b"HTTP/1.1 307 so\r\nLocation: /v1/elsewhere\r\nContent-Length: 0\r\n\r\n",
    "see other": b"HTTP/1.1 303 so\r\nLocation: /v1/elsewhere\r\nContent-Length: 0\r\n\r\n",
    "error": {"error": "\x1b[2J"},
    "no choices": {"choices": []},
    "choices": {"choices": 3},
    "no text": {"choices": [{"text": None}]},
    "text": {"choices": [{"text": "\ud800"}]},
    "logprobs": {"choices": [{"text": "I", "logprobs": 7}]},
    "content": {"choices": [{"text": "I", "logprobs": {"content": [3]}}]},
    "NaN": choice(token_logprobs=[float("nan")]),
    "infinite": choice(token_logprobs=[float("inf")]),
    "positive": choice(top_logprobs=[{"I": 3}]),
    "words": choice(top_logprobs=[{"I": "-1"}]),
    "huge": choice(token_logprobs=[-(10**400)]),
    "lengths": choice(token_logprobs=[-1.0, -1.0]),
    "token": choice(tokens=[None]),
    "outside": choice(tokens=["token_id:1216"]),
    "no number": choice(tokens=["token_id:x"]),
    "endless": choice(tokens=["I"] * 99, token_logprobs=[-1.0] * 99, top_logprobs=[{}] * 99),
    "unknown": choice(tokens=["no such piece"]),
    "counts": {**choice(), "usage": {"prompt_tokens": "3"}},
    "usage": {**choice(), "usage": [1]},
    "drafts": {**choice(), "timings": {"draft_n": 3, "draft_n_accepted": -1}},
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_server_is_one_line(name):
    seen = []

    def reply(path, body):
        seen.append(path)
        return BROKEN[name]

    with serving(reply) as url, pytest.raises(ValueError) as error:
        check(targets(), None, url, prompt=PROMPT, length=LENGTH, timeout=5)
    assert str(error.value).isprintable() and len(str(error.value)) < 400
    assert "/v1/elsewhere" not in seen  # nowhere but where it was sent


@pytest.mark.parametrize(
    "url", ["file:/etc/hostname", "ftp://x", "x", "http://", "http://x:y", "http://a b", "", "http://x\n"]
)  # noqa: E501
def test_an_address_must_be_one(url):
    with pytest.raises(ValueError, match="expected an address"):
        check(targets(), None, url, prompt=PROMPT)


def test_nobody_there():
    with serving(lambda path, body: {}) as url:
        pass
    with pytest.raises(ValueError, match="refused"):
        exchange(url)


def test_waiting_ends(monkeypatch):
    def slow(path, body):
        time.sleep(0.5)
        return {}

    drip = [HEADERS.encode() + b"\r\n", *[b" "] * 40]
    start = time.monotonic()
    for reply in (slow, lambda path, body: drip):
        with serving(reply) as url, pytest.raises(ValueError, match="timed out|too long"):
            exchange(url, None, 0.2)
    assert time.monotonic() - start < 4
    monkeypatch.setattr(server, "LARGEST", 1000)
    with serving(lambda path, body: HEADERS.encode() + b"\r\n" + b" " * 5000) as url:
        with pytest.raises(ValueError, match="longer than 1000"):
            exchange(url)
