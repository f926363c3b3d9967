"""Drafts, which carry the law they were drawn from, and the drafters that make them.

A drafter holds no state of a sequence: what it needs to know of one is in the target's cache.
"""

import operator
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from zlib import crc32

import numpy as np

from . import gemma4, gemma4_assistant, qwen35, qwen35_mtp
from .backend import to_host
from .cache import CacheError
from .layers import token_ids
from .sampling import Sampling, draw


@dataclass(frozen=True, eq=False)
class Draft:
    """Draft tokens and their law: q_KV [K, V] that they were drawn from, or None for point masses (argmax drafts).

    soft_KV: the drafter's soft law beside a point mass; only the rule "hf-gemma4" looks at it.
    """

    tokens: tuple
    q_KV: np.ndarray | None = None
    soft_KV: np.ndarray | None = None

    def __post_init__(self):
        object.__setattr__(self, "tokens", tuple(map(operator.index, self.tokens)))


class Drafter(Protocol):
    """What `generate` asks of a drafter."""

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        """Read the new tokens and draft at most num_draft more -> Draft.

        new_tokens_N are the tokens the target has emitted or been given since the last call, the last of them not yet
        read by the target; hidden_ND [N, D] are the target's final-norm hidden states that each of them came from.
        u_K are uniforms for drafts that are drawn. num_draft 0 reads only. Raises ValueError unless what the drafter
        has read and new_tokens_N are what the cache has read and one token more.
        """


def check_news(new_tokens_N, hidden_ND, cache, num_draft):
    """Raise ValueError unless the new tokens continue the sequence in the cache, each with its hidden state."""
    if operator.index(num_draft) < 0:
        raise ValueError(f"num_draft is {num_draft}, wanted 0 or more")
    count = len(new_tokens_N)
    if not count or len(hidden_ND) != count:
        raise ValueError(f"{count} new tokens with {len(hidden_ND)} hidden states: expected one for each, at least one")
    if count > cache.length or list(new_tokens_N[:-1]) != cache.tokens[cache.length - count + 1 :]:
        raise ValueError(f"the {count} new tokens do not continue the {cache.length} tokens that the cache has read")


def choose(logits_V, sampling, u=None):
    """(token, law it was drawn from): by argmax, with law None, at temperature 0; else by inverse CDF of u."""
    law_V = sampling.law(logits_V)
    return (int(law_V.argmax()), None) if sampling.temperature == 0 else (draw(law_V, u), law_V)


@dataclass(frozen=True, eq=False)
class GemmaAssistant:
    """Drafts with a Gemma 4 assistant. Reads nothing: its last new token and hidden state suffice.

    soft: argmax drafts carry the softmax of the logits as well (Draft.soft_KV).
    """

    params: object
    config: gemma4_assistant.Config
    target: object
    position: str = "bonus"
    window_edge: str = "inclusive"
    unchosen: str = "transformers"
    soft: bool = False

    def __post_init__(self):
        _check_option("position", self.position, ("bonus", "committed"))
        _check_option("window_edge", self.window_edge, ("inclusive", "exclusive"))
        _check_option("unchosen", self.unchosen, tuple(gemma4_assistant.UNCHOSEN))

    def forward(self, token, hidden_D, cache):
        """One step after `token` -> (logits [V], hidden [D] to feed back)."""
        at, window = gemma4_assistant.query(self.config, cache.length, self.position, self.window_edge)
        lent = gemma4.lendable_kv(self.target.config, cache)
        by_clusters = self.config.clusters is not None and self.unchosen != "none"
        step = partial(gemma4_assistant.step, self.params, self.config, self.target.embed, lent, window, by_clusters)
        inputs = [token], np.asarray(hidden_D)[None], np.array([at]), np.array([cache.length])
        scores_1C, x_1D, hidden_1D = cache.run(step, *inputs, key=("assistant", self, window))
        if not by_clusters:
            return scores_1C[0], hidden_1D[0]
        ids = gemma4_assistant.ids_of_best(self.params, self.config, scores_1C[0])
        head = partial(gemma4_assistant.logits_of, self.params)
        (chosen_1N,) = cache.run(head, x_1D, ids, key=("clusters", self))
        return gemma4_assistant.filled(self.config, ids, chosen_1N[0], self.unchosen), hidden_1D[0]

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        _check_inputs(self.target, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K)
        token, hidden_D, tokens, laws, softs = new_tokens_N[-1], hidden_ND[-1], [], [], []
        for j in range(num_draft):
            logits_V, hidden_D = self.forward(token, hidden_D, cache)
            token, law_V = choose(logits_V, sampling, None if sampling.temperature == 0 else u_K[j])
            tokens.append(token)
            laws.append(law_V)
            softs += [Sampling().law(logits_V)] * self.soft
        return _draft(tokens, laws, softs)


@dataclass(frozen=True, eq=False)
class MtpLayer:
    """Drafts with the target's MTP layer. Reads every token; what it keeps of them is in cache.drafter.

    hidden: which of the target's hidden states it is given: "post-norm", after the final norm, as vLLM, SGLang, mlx-vlm
    and llama.cpp do, or "pre-norm" (mlx-lm's open pull request 990). Deeper drafts get its own, after its norm.
    """

    params: object
    config: object
    target: object
    hidden: str = "post-norm"

    def __post_init__(self):
        _check_option("hidden", self.hidden, ("post-norm", "pre-norm"))

    @property
    def maker(self):
        """Says in a cache whose entries are there: the option, and a checksum of the layer's norms."""
        norms = self.params.pre_fc_norm_embedding, self.params.pre_fc_norm_hidden, self.params.norm
        return f"{self.hidden} {crc32(np.concatenate([to_host(norm) for norm in norms]).tobytes()):08x}"

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        """As Drafter.propose; it also reads what was not read along, while the hidden states are still in the cache."""
        _check_inputs(self.target, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K)
        memory, tokens, laws = cache.drafter, [], []
        hidden_ND = np.asarray(hidden_ND, self.target.dtype)
        try:
            out_ND = self._read_along(new_tokens_N, hidden_ND, cache)
            for j in range(num_draft):
                if tokens:
                    out_ND = self._read(tokens[-1:], out_ND[-1:], cache)
                head = partial(qwen35_mtp.logits, self.target.params, self.config)
                (logits_1V,) = cache.run(head, out_ND[-1:], key=("mtp head", self))
                token, law_V = choose(logits_1V[0], sampling, None if sampling.temperature == 0 else u_K[j])
                tokens.append(token)
                laws.append(law_V)
        finally:
            memory.cut(cache.length)  # entries of drafts are made from drafted hidden states
        return _draft(tokens, laws)

    def _read_along(self, new_tokens_N, hidden_ND, cache):
        """Make the entries that are missing, at least the newest -> the layer's output for each."""
        length, memory = cache.length, cache.drafter

        def token(position):
            return new_tokens_N[-1] if position == length else cache.tokens[position]

        start, given = min(memory.holding(token, self.maker), length - 1), length - len(new_tokens_N)
        if self.hidden == "pre-norm":
            hidden_ND = memory.hidden(start, length)
        elif start < given:
            noted_ND = memory.hidden(start, given)
            (noted_ND,) = cache.run(lambda x_ND: [qwen35.final_norm(self.target.params, self.config, x_ND)], noted_ND)
            hidden_ND = np.concatenate([noted_ND, hidden_ND])
        memory.cut(start)
        return self._read([token(p + 1) for p in range(start, length)], hidden_ND[start - length :], cache)

    def _read(self, tokens_N, hidden_ND, cache):
        memory = cache.drafter
        read = partial(qwen35_mtp.read, self.params, self.config, self.target.embed, memory.kv)
        inputs = tokens_N, hidden_ND, np.arange(memory.kv.length, memory.kv.length + len(tokens_N))
        (out_ND,) = cache.run(read, *inputs, writes=[memory.kv], key=("mtp", self))
        memory.append(tokens_N, self.maker)
        return out_ND


def _draft(tokens, laws, softs=()):
    """The Draft of tokens, the laws they were drawn from (None where by argmax), and the soft laws beside those."""
    return Draft(tokens, None if not laws or laws[0] is None else np.stack(laws), np.stack(softs) if softs else None)


def _check_option(name, value, known):
    if value not in known:
        raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")


def _check_inputs(target, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
    """Raise ValueError for what a target's drafter cannot take: another's cache, tokens, shapes, too few uniforms."""
    if cache.fingerprint != target.fingerprint:
        raise CacheError("this cache belongs to another model, or to other weights, another dtype or KV storage")
    check_news(new_tokens_N, hidden_ND, cache, num_draft)
    token_ids(new_tokens_N, target.config.vocab_size, target.config.placeholders)
    wanted = (len(new_tokens_N), target.config.hidden_size)
    if np.shape(hidden_ND) != wanted:
        raise ValueError(f"hidden_ND has shape {np.shape(hidden_ND)}, wanted {wanted}")
    if sampling.temperature and len(u_K) < num_draft:
        raise ValueError(f"{len(u_K)} uniforms for {num_draft} drawn draft tokens")


@dataclass(frozen=True)
class PromptLookup:
    """Drafts what followed the last occurrence of the newest n-gram, longest n first; needs no weights.

    After Saxena's prompt lookup decoding (2023). The draft is a point mass, and empty where nothing recurs.
    """

    max_ngram: int = 3

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        check_news(new_tokens_N, hidden_ND, cache, num_draft)
        tokens = np.array([*cache.tokens, new_tokens_N[-1]])
        return Draft(self._continuation(tokens)[:num_draft])

    def _continuation(self, tokens_T):
        for n in range(min(self.max_ngram, len(tokens_T) - 1), 0, -1):
            windows = np.lib.stride_tricks.sliding_window_view(tokens_T[:-1], n)
            found = np.flatnonzero((windows == tokens_T[-n:]).all(axis=1))
            if len(found):
                return tokens_T[found[-1] + n :]
        return tokens_T[:0]


@dataclass(frozen=True)
class Scripted:
    """Drafts what it is told: `script(position, count)` -> at most `count` tokens from that position on.

    For tests and benchmarks; the position counts all tokens of the sequence from 0. The draft is a point mass.
    """

    script: object

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        check_news(new_tokens_N, hidden_ND, cache, num_draft)
        return Draft(self.script(cache.length + 1, num_draft)[:num_draft])
