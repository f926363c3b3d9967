"""Do the bits hold on this machine: what `matmul` promises of narrow passes, and what follows from it for the models.

Another BLAS, another processor may break it, and then a verified draft need no longer be the text without drafts.
"""

import numpy as np

from .backend import ROWS, arithmetic, matmul
from .generate import generate
from .loading import load, load_drafter
from .quant import pack

MODELS = ("tiny-gemma4", "tiny-qwen35")
SHAPES = [(1, 5), (3, 7), (64, 64), (65, 1), (65, 4096), (129, 257), (193, 1500), (1216, 65), (4096, 512)]
TEXT, TOKENS, ROUND = "ROMEO:\nWhat light is this that comes from yonder window?", 48, 5


def self_check():
    """-> [{"check", "passed"}] of every property; the bundled models are what they are tried on."""
    checks = {}
    with arithmetic():
        for dtype in ("float32", "float64"):
            checks[f"a token's product does not depend on the pass's width, {dtype}"] = all(
                _independent_of_width(_normal(shape, dtype)) for shape in SHAPES
            )
        checks["packed weights multiply as dense ones"] = all(_packed_is_dense(shape) for shape in SHAPES)
    for name in MODELS:
        for keep in ("dense", "packed"):
            target = load(name, keep=keep)
            drafter, ids = load_drafter("auto", target), target.tokenizer.encode(TEXT)
            what, passes = f"{name}, {keep}", f"a pass of {ROUND} tokens gives the logits of {ROUND} passes"
            checks[f"{what}: {passes}"] = _wide_is_narrow(target, ids)
            checks[f"{what}: what was un-read leaves no trace"] = _leaves_no_trace(target, ids)
            checks[f"{what}: drafts do not change the text"] = _drafts_change_nothing(target, drafter, ids)
    return [{"check": name, "passed": passed} for name, passed in checks.items()]


def _normal(shape, dtype):
    return np.random.RandomState(sum(shape)).normal(size=shape).astype(dtype)


def _independent_of_width(w_OI):
    x_TI = _normal((ROWS, w_OI.shape[1]), w_OI.dtype)
    alone_TO = np.concatenate([matmul(x_TI[t : t + 1], w_OI) for t in range(ROWS)])
    return all(_same(matmul(x_TI[:width], w_OI), alone_TO[:width]) for width in (2, ROUND, ROWS))


def _packed_is_dense(shape):
    w = pack(_normal((shape[0], shape[1] // 32 * 32 or 32), "float32"))
    x_TI = _normal((ROUND, w.shape[1]), "float32")
    return _same(matmul(x_TI, w), matmul(x_TI, w.dequantize("float32")))


def _same(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def _wide_is_narrow(target, ids):
    wide, narrow = target.new_cache(), target.new_cache()
    for cache in (wide, narrow):
        target.forward(ids[:-ROUND], cache, last=0)
    alone = [target.forward([token], narrow).logits_TV for token in ids[-ROUND:]]
    return _same(target.forward(ids[-ROUND:], wide).logits_TV, np.concatenate(alone))


def _leaves_no_trace(target, ids):
    straight, winding = target.new_cache(), target.new_cache()
    for token in ids:
        target.forward([token], straight, last=0)
        target.forward([token, *ids[:3]], winding, last=0)
        winding.rollback(3)
    return _same(target.forward(ids[:1], straight).logits_TV, target.forward(ids[:1], winding).logits_TV)


def _drafts_change_nothing(target, drafter, ids):
    texts = [
        [token for step in generate(target, ids, each, max_new_tokens=TOKENS) for token in step.tokens]
        for each in (None, drafter)
    ]
    return texts[0] == texts[1]


def report_text(checks):
    """A line for each."""
    lines = [f"{'holds ' if check['passed'] else 'BROKEN'}  {check['check']}" for check in checks]
    broken = sum(not check["passed"] for check in checks)
    return "\n".join([*lines, "", f"{broken} of {len(checks)} properties are broken" if broken else "all hold here"])
