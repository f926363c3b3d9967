"""From logits to a probability law, and from a law and a uniform to a token.  T positions, V vocabulary."""

import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np


@dataclass(frozen=True)
class Sampling:
    """How logits become a law.  None leaves a filter out; temperature 0 is the argmax law, whatever the filters say.

    Order and thresholds are those of transformers 5.22.2 (generation/logits_process.py): suppress, presence penalty,
    temperature, top-k, top-p, min-p.  Two things differ: the arithmetic is float64, where transformers' generate
    rounds logits and probabilities to float32 and may put a token on the other side of a threshold; and of equal
    logits on top-p's edge the lowest ids go first, where transformers' unstable sort leaves that open for V > 16.

    suppress: ids that get no probability.  presence_penalty: subtracted once from the logit of every id in
    the history, as in OpenAI's API and vLLM.  ValueError names a parameter out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    suppress: tuple[int, ...] = ()
    presence_penalty: float = 0.0

    def __post_init__(self):
        _require("temperature", self.temperature, Real, lambda v: v >= 0, "a finite number >= 0")
        _require("presence_penalty", self.presence_penalty, Real, lambda v: True, "a finite number")
        if self.top_k is not None:
            _require("top_k", self.top_k, Integral, lambda v: v >= 1, "None or an integer >= 1")
        if self.top_p is not None:
            _require("top_p", self.top_p, Real, lambda v: 0 < v <= 1, "None or a number in (0, 1]")
        if self.min_p is not None:
            _require("min_p", self.min_p, Real, lambda v: 0 <= v <= 1, "None or a number in [0, 1]")
        object.__setattr__(self, "suppress", tuple(self.suppress))  # a list is welcome; frozen things hold tuples
        for token in self.suppress:
            _require("suppress", token, Integral, lambda v: v >= 0, "token ids >= 0")

    def law(self, logits_TV, history=()):
        """The float64 law of each row: logits [T, V] or [V] -> the same shape.

        history: token ids that the presence penalty counts, the same for every row.
        ValueError: a NaN or +inf logit or a row of -inf, by position; an id outside the vocabulary.
        """
        z_TV = np.array(logits_TV, dtype=np.float64)  # a copy, changed in place from here on
        if z_TV.ndim not in (1, 2) or z_TV.shape[-1] == 0:
            raise ValueError(f"logits have shape {z_TV.shape}; wanted [V] or [T, V] with V >= 1")
        z_TV[..., _ids("suppress", self.suppress, z_TV.shape[-1])] = -np.inf
        if self.presence_penalty:
            z_TV[..., _ids("history", history, z_TV.shape[-1])] -= self.presence_penalty
        _check(z_TV)
        if self.temperature == 0:
            return (np.arange(z_TV.shape[-1]) == z_TV.argmax(-1)[..., None]).astype(np.float64)
        with np.errstate(over="ignore"):
            z_TV /= self.temperature
        if not (z_TV.max(-1) < np.inf).all():
            raise ValueError(f"temperature {self.temperature!r} is too small for these logits: they overflow")
        if self.top_k is not None and self.top_k < z_TV.shape[-1]:
            z_TV[z_TV < np.partition(z_TV, -self.top_k)[..., [-self.top_k]]] = -np.inf  # ties with the k-th stay
        if self.top_p is not None and self.top_p < 1:
            for z_V in z_TV.reshape(-1, z_TV.shape[-1]):  # views: rows are filtered in place
                z_V[~_nucleus(z_V, self.top_p)] = -np.inf
        p_TV = softmax(z_TV)
        if self.min_p is not None:
            p_TV *= p_TV >= self.min_p * p_TV.max(-1, keepdims=True)
            p_TV /= p_TV.sum(-1, keepdims=True)
        return p_TV


IGNORED = {  # fields of generation_config.json that say nothing about the law, or what a caller decides
    *(
        "_from_model_config",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "transformers_version",
        "cache_implementation",
    ),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "max_new_tokens", "max_length"),
}
NEUTRAL = {
    "repetition_penalty": 1.0,
    "typical_p": 1.0,
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "frequency_penalty": 0.0,
}


def recommended(config, **overrides):
    """The Sampling that a checkpoint's generation_config.json recommends -> (Sampling, names of fields not honoured).

    overrides: Sampling's own parameters; None leaves the recommendation. do_sample false means temperature 0; absent,
    that the checkpoint means to be sampled from (transformers takes it for greedy). ValueError names what is
    out of its range.
    """
    names = ("temperature", "top_p", "min_p", "presence_penalty")
    fields = {name: config[name] for name in names if config.get(name) is not None}
    if config.get("top_k"):  # 0 is transformers' "no top-k"
        fields["top_k"] = config["top_k"]
    if config.get("suppress_tokens"):
        fields["suppress"] = tuple(config["suppress_tokens"])
    if config.get("do_sample") is False:
        fields["temperature"] = 0.0
    fields |= {name: value for name, value in overrides.items() if value is not None}
    honoured = {"temperature", "top_k", "top_p", "min_p", "presence_penalty", "suppress_tokens", "do_sample"} | IGNORED
    unknown = {name for name, value in config.items() if value is not None and NEUTRAL.get(name) != value}
    return Sampling(**fields), sorted(unknown - honoured)


def draw(p_V, u):
    """The token that uniform u in [0, 1) picks from law [V] by inverse CDF: the first with u < cdf, and p > 0.

    The cdf is divided by its last entry, so that p may sum to 1 only up to rounding.
    """
    if not 0 <= u < 1:
        raise ValueError(f"the uniform is {u!r}; wanted 0 <= u < 1")
    cdf_V = np.cumsum(p_V, dtype=np.float64)
    if not (cdf_V.size and 0 < cdf_V[-1] < np.inf):
        raise ValueError(f"cannot draw from a law of {cdf_V.size} entries with sum {cdf_V[-1:].sum()}")
    return int(np.searchsorted(cdf_V / cdf_V[-1], u, side="right"))  # where the cdf steps past u, p > 0


def softmax(z_TV):
    """Over the last axis."""
    e_TV = np.exp(z_TV - z_TV.max(-1, keepdims=True))
    return e_TV / e_TV.sum(-1, keepdims=True)


def _nucleus(z_V, top_p):
    """True where top-p keeps a token: logits are dropped from the lowest while their sum stays <= 1 - top_p."""
    rising = np.sort(z_V[z_V > -np.inf])  # after top-k only k are left to sort
    drop = min(np.count_nonzero(np.cumsum(softmax(rising)) <= 1 - top_p), len(rising) - 1)
    keep_V, edge_N = z_V > rising[drop], np.flatnonzero(z_V == rising[drop])
    keep_V[edge_N[drop - np.searchsorted(rising, rising[drop]) :]] = True
    return keep_V


def _ids(name, tokens, V):
    ids_N = np.unique(np.asarray(list(tokens), dtype=np.int64))
    if ids_N.size and not 0 <= ids_N[0] <= ids_N[-1] < V:
        raise ValueError(f"{name} holds token {ids_N[0] if ids_N[0] < 0 else ids_N[-1]}; the vocabulary has {V}")
    return ids_N


def _check(z_TV):
    """One pass where all is well: a row's maximum is finite unless it holds NaN, +inf, or nothing but -inf."""
    if np.isfinite(z_TV.max(-1)).all():
        return
    bad = np.argwhere(~(z_TV < np.inf))
    if len(bad):
        raise ValueError(f"logits{bad[0].tolist()} is {z_TV[tuple(bad[0])]}; wanted finite logits, or -inf for never")
    row = np.argwhere(z_TV.max(-1) == -np.inf)[0].tolist()
    raise ValueError(f"logits{row or ''} are all -inf: no token is left")


def _require(name, value, kind, fine, wanted):
    if not (isinstance(value, kind) and math.isfinite(value) and fine(value)):
        raise ValueError(f"{name} is {value!r}; wanted {wanted}")
