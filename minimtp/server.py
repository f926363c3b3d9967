"""Asking an engine that runs: any server with OpenAI's completions interface, and the forms in which they answer.

Nothing else here talks to a network, and this only to the address that a user names.
"""

import json
import os
import time
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException, RemoteDisconnected
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from .checkpoint import show

LARGEST = 1 << 24  # bytes of an answer
ELSEWHERE = 400, 413, 415, 422, 500, 501  # a server says no to the form of a request; another may do


# Asking


class Refused(ValueError):
    """A server that will not answer a request of this form."""


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *arguments):
        return None  # an error then: no key or prompt goes where nobody sent it


def exchange(url, body=None, timeout=60):
    """The JSON that a server answers: POST of a body, GET without. Raises ValueError: which URL, what happened.

    The key in the environment variable MINIMTP_API_KEY is sent, where there is one.
    """
    key = os.environ.get("MINIMTP_API_KEY")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    request = Request(url, None if body is None else json.dumps(body).encode(), headers)
    deadline = time.monotonic() + timeout
    try:
        with build_opener(_NoRedirect).open(request, timeout=timeout) as answer:
            data = _bounded(url, answer, deadline)
    except HTTPError as error:
        said = ""
        with suppress(OSError, HTTPException), error:
            said = show(error.read1(300).decode(errors="replace"))
        kind = Refused if error.code in ELSEWHERE else ValueError
        raise kind(f"{url}: HTTP status {error.code}, {said}") from None
    except RemoteDisconnected:
        raise Refused(f"{url}: hung up without an answer") from None
    except (OSError, HTTPException) as error:
        raise ValueError(f"{url}: {show(str(getattr(error, 'reason', error)) or type(error).__name__)}") from None
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ValueError(f"{url}: not JSON: {show(data[:60])}") from None


def _bounded(url, answer, deadline):
    data = bytearray()
    while piece := answer.read1(1 << 16):
        data += piece
        if len(data) > LARGEST or time.monotonic() > deadline:
            raise ValueError(f"{url}: the answer is longer than {LARGEST} bytes, or takes too long")
    return bytes(data)


def base_url(url):
    """The address that /completions is appended to. Raises ValueError for what is no http address."""
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and url.isprintable()
    except ValueError:
        good = False
    if not good or " " in url:
        raise ValueError(f"{show(url)}: expected an address like http://HOST:PORT")
    url = url.rstrip("/")
    return url if url.endswith("/v1") else f"{url}/v1"


def served_name(url, timeout):
    """The first model a server lists, or None."""
    try:
        name = exchange(f"{url}/models", None, timeout)["data"][0]["id"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return name if isinstance(name, str) else None


@dataclass(frozen=True)
class Answer:
    """What a server made of a prompt.

    pieces: its tokens, an id where it gives one, else text; None where it gives none. tops: of each position {piece:
    log-probability}, empty where it gives none. prompt, count: how many tokens it says that it read and wrote, or None.
    drafts: (draft tokens, accepted), or None. sent: how it was asked, "ids" or "text".
    """

    text: str
    pieces: list | None
    tops: list
    stopped: bool
    prompt: int | None
    count: int | None
    drafts: tuple | None
    sent: str


def ask(url, prompt, prompt_ids, length, top, name=None, timeout=60, **options):
    """A server's greedy text of `length` tokens -> Answer. Forms of the request are tried until one is taken."""
    plain = {"temperature": 0, "top_p": 1, "seed": 0, "presence_penalty": 0, "frequency_penalty": 0}
    common = {**({"model": name} if name else {}), "max_tokens": length, **plain, "stream": False}
    extra = {"min_p": 0, "repeat_penalty": 1, "repetition_penalty": 1, **options}  # not OpenAI's, but defaults of some
    ids = {"return_token_ids": True, "return_tokens_as_token_ids": True}  # vLLM
    forms = [
        {"prompt": prompt_ids, "logprobs": top, **extra, **ids},
        {"prompt": prompt, "logprobs": top, **extra, **ids},
        {"prompt": prompt, "logprobs": True, "top_logprobs": top, **extra},  # mlx-lm
        {"prompt": prompt, "logprobs": top},
        {"prompt": prompt, **extra},
        {"prompt": prompt},
    ]
    for form in forms:
        try:
            body = exchange(f"{url}/completions", {**common, **form}, timeout)
        except Refused as error:
            refused = error
            continue
        try:
            return read_answer(body, "text" if form["prompt"] is prompt else "ids")
        except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise ValueError(f"{url}/completions: not a completion: {type(error).__name__} {error}") from None
    raise refused


def read_answer(body, sent="text"):
    """The Answer in a completion. Raises what hostile shapes make Python raise: see ask."""
    choice, usage, timings = body["choices"][0], body.get("usage") or {}, body.get("timings") or {}
    pieces, tops = _read_logprobs(choice.get("logprobs") or {})
    if given := choice.get("token_ids"):  # vLLM
        pieces, tops = [_piece(token) for token in given], tops[: len(given)]
    choice["text"].encode()  # raises for what is no text
    counts = [usage.get("prompt_tokens"), usage.get("completion_tokens")]
    drafts = [timings.get("draft_n"), timings.get("draft_n_accepted")]  # llama.cpp
    if not all(n is None or type(n) is int and n >= 0 for n in counts + drafts):
        raise ValueError(f"counts {show(counts + drafts)}")
    stopped, drafts = choice.get("finish_reason") == "stop", None if None in drafts else tuple(drafts)
    return Answer(choice["text"], pieces, tops, stopped, *counts, drafts, sent)


def _read_logprobs(logprobs):
    """(pieces, tops) in the form of OpenAI's completions (llama-cpp-python, vLLM, SGLang) or its chats (llama.cpp)."""
    if "content" in logprobs:
        entries = logprobs["content"]
        tops = [_read_tops(entry.get("top_logprobs"), entry) for entry in entries]
        return [_piece(entry.get("id", entry.get("token"))) for entry in entries], tops
    if not logprobs.get("tokens"):
        return None, []
    pieces = [_piece(token) for token in logprobs["tokens"]]
    tops = logprobs.get("top_logprobs") or [None] * len(pieces)
    own = logprobs.get("token_logprobs") or [None] * len(pieces)
    if not len(pieces) == len(tops) == len(own):
        raise ValueError(f"{len(pieces)} tokens with {len(tops)} and {len(own)} log-probabilities")
    tops = [{_piece(token): _logprob(x) for token, x in (top or {}).items()} for top in tops]
    return pieces, [{**top, **({} if x is None else {p: _logprob(x)})} for p, x, top in zip(pieces, own, tops)]


def _read_tops(entries, own):
    """{piece: log-probability}; nothing where llama.cpp says 0 and lists none, as of tokens that were drafted."""
    return {_piece(e.get("id", e.get("token"))): _logprob(e["logprob"]) for e in [*entries, own]} if entries else {}


def _piece(token):
    if isinstance(token, str):
        number = token.removeprefix("token_id:")  # vLLM
        return int(number) if number != token else token
    if type(token) is not int:
        raise TypeError(f"token {show(token)}")
    return token


def _logprob(x):
    if type(x) not in (int, float) or not x <= 0.01:
        raise ValueError(f"log-probability {show(x)}")
    return float(x)
