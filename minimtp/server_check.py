"""Checking an engine that runs: its greedy text and its log-probabilities against ours.

Its text is read here teacher-forced, so that one difference does not make the next. Log-probabilities are those of the
raw logits, which is what servers report for a request at temperature 0. What differs is judged by our float64 logits:
by how much they part two tokens, and how much of that the server's precision explains (oracle_logits).
"""

import os

import numpy as np

from .checkpoint import show
from .expected import expected
from .generate import GREEDY, spans
from .oracle_logits import EPSILON, MARGIN, allowance
from .server import ask, base_url, served_name

BITS = {name: 1 - float(np.log2(epsilon)) for name, epsilon in EPSILON.items()}  # of the significand
FLOOR = -9999.0, -80.0  # what servers write for a probability of 0, and the largest that float32 makes 0 of
MEASURED = 50  # log-probabilities that tell how precise a server is
PLAIN = {"speculative.n_max": 0}  # llama.cpp, where it lets a request say so
WIDTH = 64  # logit rows at a time


# Which tokens these are


class Pieces:
    """The ids that a piece of text may be: those that read so inside a text."""

    def __init__(self, tokenizer, vocab_size):
        self._tokenizer, self._size, self._ids = tokenizer, vocab_size, None

    def ids(self, piece):
        if isinstance(piece, int):
            if not 0 <= piece < self._size:
                raise ValueError(f"token {show(piece)} is outside the vocabulary of {self._size}")
            return [piece]
        if self._ids is None:
            self._ids = {}
            before = self._tokenizer.encode("a", special=False)  # a decoder may strip what stands first
            start = len(self._tokenizer.decode(before, special=True))
            for id in range(self._size):
                text = self._tokenizer.decode([*before, id], special=True)[start:]
                self._ids.setdefault(_whole(text), []).append(id)
        found = self._ids.get(_whole(piece), [])
        if len(found) > 1:  # that which the text itself is read as, not the bare byte
            read = self._tokenizer.encode(piece, special=False)
            found = read if len(read) == 1 and read[0] in found else found
        return found


def _whole(text):
    """Without the marks for pieces of characters, which some servers write and some leave out."""
    return text.replace("\ufffd", "")


def identify(answer, tokenizer, pieces):
    """(ids of the answer's tokens as far as they are certain, {id: log-probability} of each, a note or None)."""
    again = tokenizer.encode(answer.text, special=False)
    if answer.pieces is None:
        count = answer.count if answer.count is not None else len(again)
        sure = len(again) in (count, count - answer.stopped)
        return again, [{}] * len(again), None if sure else f"{count} tokens, but its text makes {len(again)}"
    ids, note = [], None
    for i, piece in enumerate(answer.pieces):
        found = pieces.ids(piece)
        if len(found) > 1:  # the same text: then the one that the whole text is made of
            found = [id for id in again[i : i + 1] if id in found and again[:i] == ids]
        if not found:
            note = f"which token {show(piece)} is cannot be said: not looked at from token {i} on"
            break
        ids += found
    tops = [{found[0]: x for p, x in top.items() if len(found := pieces.ids(p)) == 1} for top in answer.tops]
    return ids, [*tops, *[{}] * len(ids)][: len(ids)], note


# Ours


def rows(target, prompt_ids, ids):
    """Iterator of the logits that predict each of the ids, and what comes after them, teacher-forced."""
    cache, text = target.new_cache(), [*prompt_ids, *ids]
    for start, stop in spans(len(text), WIDTH):
        kept = stop - max(start, len(prompt_ids) - 1)
        yield from target.forward(text[start:stop], cache, last=max(kept, 0)).logits_TV
        cache.commit()


def ours(targets, prompt_ids, ids, wanted):
    """What our logits say at each position -> (best_T, [{id: logit}], logsumexp_T, size_T, noise_T, spread_T).

    targets: the same model in float64 and float32. wanted: ids of interest by position. What rounding to float32 does:
    noise, the largest error of a logit; spread, the root mean square error of a log-probability.
    """
    found = []
    for want, row_V, single_V in zip(wanted, *(rows(target, prompt_ids, ids) for target in targets)):
        row_V, off_V = np.asarray(row_V, np.float64), np.asarray(single_V, np.float64) - row_V
        best, total = int(row_V.argmax()), row_V.max() + np.log(np.exp(row_V - row_V.max()).sum())
        spread = np.sqrt(np.mean((off_V - np.exp(row_V - total) @ off_V) ** 2))
        logits = {id: float(row_V[id]) for id in {best, *want}}
        found.append((best, logits, total, np.abs(row_V).max(), np.abs(off_V).max(), spread))
    best_T, logits, *numbers = zip(*found)
    return best_T, logits, *map(np.array, numbers)


# Comparing


def compare(targets, prompt_ids, ids, tops, ends, bits, others=()):
    """A server's text and log-probabilities against ours -> (a JSON-able report, [{id: logit}], explained_T).

    ends: the tokens of which one came after the text, where it ended by itself. others: other ids of interest by
    position. What `bits` of precision explain: for one number the allowance of oracle_logits, twice as it is of two
    logits; for all together that they are as far off, root mean square, as rounding to so many bits makes ours. Where
    they are closer than that, so much closer must two logits be to be a tie.
    """
    tokens = [[id] for id in ids] + [list(ends)] * bool(ends)
    if not tokens:
        raise ValueError("the server wrote nothing that can be looked at")
    tops = [*tops, *[{}] * len(tokens)][: len(tokens)]
    wanted = [{*sum(some, []), *top} for *some, top in zip(tokens, [*others, *[[]] * len(tokens)], tops)]
    best_T, logits, total_T, size_T, noise_T, spread_T = ours(targets, prompt_ids, ids, wanted)
    explained_T = 2 * allowance(size_T[:, None], "float16", noise_T) * 2.0 ** (BITS["float16"] - bits)
    off, offs = [], []
    for i, top in enumerate(tops):
        for id, theirs in top.items():
            mine = float(logits[i][id] - total_T[i])
            offs.append(min(mine, FLOOR[1]) - mine if theirs <= FLOOR[0] else theirs - mine)
            if not abs(offs[-1]) <= explained_T[i]:
                one = {"position": i, "token": id, "logprob": theirs, "ours": mine}
                off.append({**one, "explained": float(explained_T[i])})
    found = {"compared": len(offs), "positions": sum(map(bool, tops)), "differing": off}
    if offs:
        found |= _sizes(offs, spread_T[[bool(top) for top in tops]])
    enough = found.get("bits", bits) >= bits - np.log2(MARGIN["float16"])
    if len(offs) >= MEASURED:  # a tie, at the precision that it was seen to have
        explained_T = explained_T * min(1.0, 2.0 ** (bits - found["bits"]))
    parts = []
    for i, some in enumerate(tokens):
        token = max(some, key=logits[i].get)
        if token != best_T[i]:
            margin = logits[i][best_T[i]] - logits[i][token]
            parts.append({"position": i, "token": token, "ours": best_T[i], **_judged(margin, explained_T[i])})
    passed = bool(not off and enough and all(part["tie"] for part in parts))
    return {"positions": len(tokens), "differing": parts, "logprobs": found, "passed": passed}, logits, explained_T


def _sizes(offs, spread_T):
    """How large differences are, also in bits: of the precision that makes errors of this size in our logits."""
    rms, noise = float(np.sqrt(np.mean(np.square(offs)))), float(np.sqrt(np.mean(np.square(spread_T))))
    bits = BITS["float32"] - np.log2(max(rms, 1e-300) / noise) if noise else BITS["float64"]
    return {"largest": max(map(abs, offs)), "rms": rms, "bits": float(min(bits, BITS["float64"]))}


def _judged(gap, explained):
    """Two tokens that our logits part by so much: a tie, where rounding explains it."""
    return {"margin": float(gap), "explained": float(explained), "tie": bool(gap <= explained)}


def check(targets, drafter, url, plain_url=None, prompt="", length=64, top=5, bits=BITS["float16"], num_draft=4,
          name=None, timeout=120):  # fmt: skip
    """A running server, and the same without speculation where that can be had -> a JSON-able report.

    targets: the model in float64 and float32. plain_url: a server without speculation; without one, a server that
    counts drafts is asked not to draft. bits: of precision that the server computes with. drafter, num_draft: what its
    draft counters are set against.
    Raises ValueError for a server that does not answer, or not in this form.
    """
    texts, notes = _texts(targets[0], url, plain_url, prompt, length, top, name, timeout)
    prompt_ids, answer, ids = targets[0].tokenizer.encode(prompt), *texts["server"][:2]
    at = _parting(*texts.values()) if "plain" in texts else None
    next_at = [_next(text, at) for text in texts.values()] if at is not None else []
    others, reports, same = [[]] * (at or 0) + [sum(next_at, [])], {}, None
    if "plain" in texts:
        same = {"identical": True} if at is None else {"identical": False, "position": at, "tokens": [], "tie": False}
    for which, (one, one_ids, tops, ends) in texts.items():
        found, logits, explained_T = compare(targets, prompt_ids, one_ids, tops, ends, bits, others)
        reports[which] = {"text": one.text, "ids": one_ids, **found}
        if missing := found["positions"] - found["logprobs"]["positions"]:
            notes.append(f"{which}: no log-probabilities of {missing} of {found['positions']} tokens")
        if at is not None and at < len(logits) and all(next_at):
            tokens = [max(tokens, key=logits[at].get) for tokens in next_at]
            margin = abs(logits[at][tokens[0]] - logits[at][tokens[1]])
            same |= {"tokens": tokens, **_judged(margin, explained_T[at])}
    counted = answer.drafts and answer.drafts[0] and drafter is not None and len(ids) > 2
    agreed = answer.prompt in (None, len(prompt_ids))
    if not agreed:
        notes.append(f"it read {answer.prompt} tokens of the prompt, ours are {len(prompt_ids)}")
    return {
        "server": url,
        "prompt": {"ids": prompt_ids, "sent": answer.sent, "read": answer.prompt},
        "bits": bits,
        "texts": reports,
        "same": same,
        "drafts": drafts(answer.drafts, targets[-1], drafter, prompt_ids, ids, num_draft) if counted else None,
        "notes": notes,
        "passed": agreed and (not same or same.get("tie", True)) and all(one["passed"] for one in reports.values()),
    }


def _texts(target, url, plain_url, prompt, length, top, name, timeout):
    """({"server" and, where it can be had, "plain": (answer, ids, tops, ends)}, notes)"""
    pieces, notes = Pieces(target.tokenizer, target.config.vocab_size), []

    def asked(url, **options):
        url = base_url(url)
        model = name or served_name(url, timeout)
        answer = ask(url, prompt, target.tokenizer.encode(prompt), length, top, model, timeout, **options)
        ids, tops, note = identify(answer, target.tokenizer, pieces)
        if note:
            notes.append(f"{url}: {note}")
        if len(ids) > 2 * length:
            raise ValueError(f"{url}: {len(ids)} tokens, asked for {length}")
        ended = answer.stopped and not note and not (ids and ids[-1] in target.stop_ids)
        return answer, ids, tops, target.stop_ids if ended else ()

    texts = {"server": asked(url)}
    if plain_url:
        texts["plain"] = asked(plain_url)
    elif _drafted(texts["server"]):
        texts["plain"] = asked(url, **PLAIN)
        if _drafted(texts["plain"]):
            del texts["plain"]
            notes.append("a request cannot switch its speculation off: start one without, for --plain-server")
    return texts, notes


def _parting(text, other):
    """How many tokens two texts have in common before they part, None where they do not."""
    return None if text[0].text == other[0].text else len(os.path.commonprefix([text[1], other[1]]))


def _drafted(text):
    return bool(text[0].drafts and text[0].drafts[0])


def _next(text, at):
    """The token at a position: its id, or those that end a text, or nothing where that is not known."""
    _, ids, _, ends = text
    return [ids[at]] if at < len(ids) else list(ends)


def drafts(counted, target, drafter, prompt_ids, ids, num_draft):
    """A server's draft counters beside what our drafter would come to over its text.

    Passes are those after the prompt's: each emits one token more than it accepts. Rate: of the tokens drafted.
    """
    drafted, accepted = counted
    found = expected(target, drafter, [*prompt_ids, *ids], num_draft, GREEDY, first=len(prompt_ids))
    run = found["rules"]["argmax"].get("run", [None])[-1]
    return {
        "drafted": drafted,
        "accepted": accepted,
        "rate": accepted / drafted,
        "passes": len(ids) - 1 - accepted,
        "num_draft": num_draft,
        "expected": {"rate": float(np.mean(run["acceptance"])), "passes": run["passes"], "depths": run["acceptance"]},
    }


# What it looks like


def report_text(report, token=repr):
    """The report as text; token: id -> how it is shown."""
    sent, read = report["prompt"]["sent"], report["prompt"]["read"]
    lines = [f"prompt: {len(report['prompt']['ids'])} tokens, sent as {sent}" + (f", {read} read" if read else "")]
    lines += ["", f"{'text':8}{'tokens':>8}{'not ours':>10}{'ties':>6}{'log-probabilities':>19}{'differing':>11}"]
    lines[-1] += f"{'largest':>10}{'rms':>10}  as of"
    for name, one in report["texts"].items():
        ties, found = sum(part["tie"] for part in one["differing"]), one["logprobs"]
        line = f"{name:8}{one['positions']:8}{len(one['differing']):10}{ties:6}{found['compared']:19}"
        line += f"{len(found['differing']):11}"
        size = f"{found['largest']:10.2g}{found['rms']:10.2g}  {found['bits']:.1f} bits" if "bits" in found else ""
        lines.append(line + size)
    for name, one in report["texts"].items():
        for part in one["differing"][:1]:
            told = f"{name}: position {part['position']}: {token(part['token'])}, ours {token(part['ours'])}"
            lines.append(f"{told}: {_judgement(part)}")
        for off in one["logprobs"]["differing"][:1]:
            told = f"{name}: position {off['position']}: log-probability of {token(off['token'])} {off['logprob']:.5g}"
            lines.append(f"{told}, ours {off['ours']:.5g}, explained {off['explained']:.2g}")
    if same := report["same"]:
        where = "identical"
        if not same["identical"]:
            where = f"part at position {same['position']}"
            if same["tokens"]:
                where += f": {', '.join(map(token, same['tokens']))}: {_judgement(same)}"
        lines.append(f"with and without speculation: {where}")
    if told := report["drafts"]:
        ours = told["expected"]
        line = f"drafts: {told['accepted']} of {told['drafted']} accepted ({told['rate']:.1%}), {told['passes']} passes"
        wanted = f"expected at k = {told['num_draft']}: {ours['rate']:.1%}, {ours['passes']:.0f} passes"
        lines.append(f"{line}; {wanted}")
    lines += [f"note: {note}" for note in report["notes"]]
    verdict = "agrees with" if report["passed"] else "differs by more than"
    return "\n".join([*lines, f"{verdict} {report['bits']:g} bits of precision (float32 24, float16 11, bfloat16 8)"])


def _judgement(part):
    size = f"our logits part them by {part['margin']:.3g}, explained {part['explained']:.3g}"
    return f"{'a tie' if part['tie'] else 'a real difference'}, {size}"
