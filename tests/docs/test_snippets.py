"""The Python that a document shows runs from its top to its end, and prints what stands below it."""

import contextlib
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from commands import PROJECT, documents

import minimtp
from minimtp.kv import SlidingKV

SNIPPET = re.compile(r"```py(?:thon)?\n(.*?)```\n(?:\n```\n(.*?)```)?", re.S)


class Done:
    """The README's loop is done when this many tokens have been said; the text is gathered as it asks."""

    def __init__(self, names, length=24):
        self.names, self.length, self.text = names, length, []

    def __bool__(self):
        self.text += self.names["news"] if self.text else [self.names["token"]]
        return len(self.text) >= self.length


def loop_names():
    """What the README's loop starts from: a prompt that was read, and the first token after it."""
    target = minimtp.load("tiny-gemma4")
    prompt, cache, sampling = target.tokenizer.encode("ROMEO:\n"), target.new_cache(), minimtp.Sampling(temperature=0.0)
    out = target.forward(prompt, cache)
    cache.commit()
    token = int(out.logits_TV[-1].argmax())
    names = dict(
        target=target, drafter=minimtp.load_drafter("auto", target), cache=cache, token=token, num_draft=4,
        news=[*prompt[1:], token], behind=out.hidden_TD, rule="rejection", sampling=sampling, draft_sampling=sampling,
        rng=np.random.default_rng(0), accept=minimtp.accept,
    )  # fmt: skip
    names["done"] = Done(names)
    return names


class EnginesCache:
    """An engine's own cache of a window of 512 tokens, the newest among them, behind other names."""

    def __init__(self, heads, head_dim, window=512):
        self.kv, self.before = SlidingKV(heads, head_dim, window), window - 1
        self.write, self.trim, self.accept = self.kv.append, self.kv.rollback, self.kv.commit

    def visible(self):
        return [x_GSK[:, -self.before :].swapaxes(0, 1) for x_GSK in self.kv.read()]


def oracle_names():
    """An engine whose cache is right, and whose logits are rounded to bfloat16."""
    target, ids = minimtp.load("tiny-gemma4", dtype="float64"), list(range(300, 308))
    expected_TV = target.forward(ids, target.new_cache()).logits_TV
    found_TV = (np.float32(expected_TV).view(np.uint32) & 0xFFFF0000).view(np.float32)
    engine = SimpleNamespace(KVCache=EnginesCache)
    return {"found_TV": found_TV, "expected_TV": expected_TV, "noise": None, "my_engine": engine}


NAMES = {"README.md": loop_names, "docs/oracle.md": oracle_names}
SHOWN = [path for path in documents() if SNIPPET.search(path.read_text(encoding="utf-8"))]


def run_all(text, names):
    """Run a text's snippets one after the other; each must print what stands below it, if anything does."""
    for code, below in SNIPPET.findall(text):
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            exec(code, names)
        assert told.getvalue() == below or not below, told.getvalue()


@pytest.mark.parametrize("path", SHOWN, ids=lambda path: path.name)
def test_snippets_run(path, monkeypatch):
    monkeypatch.chdir(PROJECT)
    names = NAMES.get(path.relative_to(PROJECT).as_posix(), dict)()
    run_all(path.read_text(encoding="utf-8"), names)
    for test in [value for name, value in names.items() if name.startswith("test_")]:
        test()
    if (done := names.get("done")) is not None:
        target, prompt = names["target"], names["target"].tokenizer.encode("ROMEO:\n")
        text = [
            token for step in minimtp.generate(target, prompt, max_new_tokens=len(done.text)) for token in step.tokens
        ]
        assert done.text == text


def test_a_snippet_that_prints_something_else_is_noticed():
    with pytest.raises(AssertionError):
        run_all("```python\nprint(1)\n```\n\n```\n2\n```\n", {})
