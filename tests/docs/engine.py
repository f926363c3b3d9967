"""An engine that serves the bundled Gemma 4 with its assistant, as llama.cpp's server answers."""

import sys
from functools import cache
from pathlib import Path

import numpy as np

import minimtp
from minimtp.bench import tokens_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_server import serving  # noqa: E402


@cache
def pair():
    target = minimtp.load("tiny-gemma4")
    return target, minimtp.load_drafter("auto", target)


def reply(path, body):
    """path, a request's body or None -> the answer."""
    if body is None:
        return {"data": [{"id": "tiny-gemma4"}]}
    target, drafter = pair()
    prompt = body["prompt"]
    ids = target.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    steps = list(minimtp.generate(target, ids, drafter, max_new_tokens=body["max_tokens"], stop=target.stop_ids))
    new = tokens_of(steps)
    logits_TV = target.forward([*ids, *new[:-1]], target.new_cache(), last=len(new)).logits_TV.astype(np.float64)
    logs_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))

    def entry(t, id):
        text = target.tokenizer.decode([107, id], special=True)[1:]
        return {"id": int(id), "token": text, "logprob": float(logs_TV[t, id])}

    def position(t, id):
        best = np.argsort(-logs_TV[t])[: body.get("top_logprobs") or body.get("logprobs") or 0]
        return {**entry(t, id), "top_logprobs": [entry(t, other) for other in best]}

    content = [position(t, id) for t, id in enumerate(new)]
    ended = "stop" if new[-1] in target.stop_ids else "length"
    choice = {"text": target.tokenizer.decode(new), "finish_reason": ended, "logprobs": {"content": content}}
    counts = {"draft_n": sum(s.drafted for s in steps), "draft_n_accepted": sum(s.accepted for s in steps)}
    if body.get("speculative.n_max") == 0:
        counts = dict.fromkeys(counts, 0)
    usage = {"prompt_tokens": len(ids), "completion_tokens": len(new)}
    return {"choices": [choice], "usage": usage, "timings": counts}


def running():
    """A context in which it serves; gives its address."""
    return serving(reply)
