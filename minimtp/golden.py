"""Golden vectors: a run that another engine can replay without this project, and what it gets wrong, named.

A folder of golden.json (prompt, drafts, uniforms, decisions, cache lengths) and golden.safetensors (hidden states by
layer, logits, laws). docs/oracle.md says what each field is. Reference values are those of a float64 run; beside each
row stands its noise, the largest error of a float32 run, from which follows what another precision explains.
"""

import json
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np

from .acceptance import RULES, accept
from .checkpoint import FLOATS, CheckpointError, new_file, read_json, read_safetensors, show, write_safetensors
from .drafting import Draft, choose
from .expected import Watched
from .generate import generate, without_placeholders
from .oracle_logits import EPSILON, allowance, differences
from .sampling import Sampling

FORMAT = "minimtp-golden 1"
TOP = 64  # logits kept of each row where rows are not kept whole
WHOLE = 1 << 16  # the largest vocabulary whose rows are
TOPS = "", ".top", ".logsumexp"  # whole rows, or what is kept of them
LARGEST = 1e300  # stands for infinity, which JSON has not
LOGITS, LAWS, EXACT = ("logits", "draft.logits"), ("p", "q"), ("draft", "decisions", "cache_lengths")
PRECISIONS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def tap_names(layers):
    """The taps of a golden run, in the order in which a pass computes them."""
    parts = [f"layer.{i}.{part}" for i in range(layers) for part in ("attn", "mlp", "out")]
    return ["embed", *parts, "final_norm"]


# Making


def record(target, drafter, prompt_ids, num_draft, rule, sampling, draft_sampling, max_new_tokens, seed, **parameters):
    """Run the loop -> what golden.json says of it, but for the laws' entries, which `make` adds."""
    draft_sampling = draft_sampling or sampling
    options = dict(sampling=sampling, draft_sampling=draft_sampling, max_new_tokens=max_new_tokens, seed=seed)
    steps, text, at, row, draft_row = [], list(prompt_ids), 0, 0, 0
    for step in generate(target, prompt_ids, drafter, num_draft, rule, **options, **parameters):
        read = list(prompt_ids) if not steps else [text[-1], *step.draft.tokens]
        text += step.tokens
        place = {"read": read, "position": at, "row": row, "draft": list(step.draft.tokens), "draft_row": draft_row}
        at, row, draft_row = len(text) - 1, row + len(read), draft_row + len(step.draft.tokens)
        decided = {"accepted": step.verdict.accepted, "token": step.verdict.token, "cache_length": at}
        uniforms = {"draft_uniforms": list(step.draft_uniforms)[: step.drafted], "uniforms": list(step.uniforms)}
        steps.append({**place, **uniforms, **decided})
    return {
        "format": FORMAT,
        "model": {
            "name": target.path.name,
            "family": target.family.__name__.rpartition(".")[2],
            "fingerprint": target.fingerprint,
            "kv": target.kv,
            "vocab_size": target.config.vocab_size,
            "hidden_size": target.config.hidden_size,
            "layers": len(target.config.layers),
        },
        "num_draft": num_draft,
        "rule": rule,
        "parameters": parameters,
        "sampling": asdict(sampling),
        "draft_sampling": asdict(draft_sampling),
        "seed": seed,
        "prompt": list(prompt_ids),
        "text": text,
        "steps": steps,
    }


def replay(golden, target, drafter):
    """Read what a golden run read, along its drafts and decisions -> {name: array}, as another engine would dump them.

    Each decision is made anew from the laws found here, on the golden draft and uniforms.
    """
    sampling = without_placeholders(Sampling(**golden["sampling"]), target)
    draft_sampling = without_placeholders(Sampling(**golden["draft_sampling"]), target)
    names, found, cache = tap_names(len(target.config.layers)), defaultdict(list), target.new_cache()
    text, news, behind_ND = golden["text"], None, None
    for step in golden["steps"]:
        draft, K = step["draft"], len(step["draft"])
        watched = Watched(draft_sampling, draft)
        if drafter is not None and news:
            own = list(drafter.propose(news, behind_ND, cache, K, watched, np.zeros(K)).tokens)
            if len(watched.logits) == K:
                pairs = zip(watched.logits, step["draft_uniforms"])
                own = [choose(logits_V, draft_sampling, u)[0] for logits_V, u in pairs]
                found["draft.logits"] += watched.logits
            found["draft"] += (own + [-1] * K)[:K]
        out = target.forward(step["read"], cache, taps=names)
        for name in names:
            found[name] += list(out.taps[name])
        found["logits"] += list(out.logits_TV)
        q_KV = draft_sampling.law(np.stack(watched.logits)) if watched.logits and draft_sampling.temperature else None
        p_JV = sampling.law(out.logits_TV[-K - 1 :])
        verdict = accept(golden["rule"], p_JV, Draft(draft, q_KV), step["uniforms"], **golden["parameters"])
        found["decisions"].append([verdict.accepted, verdict.token])
        found["p"] += list(p_JV)
        found["q"] += [] if q_KV is None else list(q_KV)
        behind_ND, news = out.hidden_TD, text[step["position"] + 1 : step["cache_length"] + 1]
        cache.rollback(cache.length - step["cache_length"])
        behind_ND = behind_ND[: len(news)]
        found["cache_lengths"].append(cache.length)
        cache.commit()
    return {name: np.array(rows) for name, rows in found.items() if len(rows)}


def make(folder, golden, plain, precise, whole=None):
    """Write a golden run: `golden` from record, `plain` and `precise` its replays in float32 and in float64.

    whole: keep rows of logits and laws whole, rather than their top entries; None: where the vocabulary is small.
    Raises ValueError where the float64 run decides otherwise: a tie, which would make a poor reference.
    """
    whole = golden["model"]["vocab_size"] <= WHOLE if whole is None else whole
    for name in ("decisions", "draft"):
        if name in plain and not np.array_equal(plain[name], precise[name]):
            raise ValueError("float32 and float64 decide differently in this run: take another prompt or seed")
    floats = [name for name in precise if name not in EXACT and (whole or name not in LAWS)]
    arrays = {f"noise.{name}": differences(plain[name], precise[name])[0] for name in floats}
    for name in floats:
        arrays |= top_entries(name, precise[name]) if name in LOGITS and not whole else {name: precise[name]}
    arrays = {name: x.astype(np.float32) if x.dtype.kind == "f" else x for name, x in arrays.items()}
    arrays |= {name: precise[name] for name in LAWS if name in floats}
    row = 0
    for step in golden["steps"]:
        at = np.arange(len(step["draft"]))
        step["p"] = precise["p"][row + at, step["draft"]].tolist() if len(at) else []
        drawn = "q" in precise and len(at)
        step["q"] = precise["q"][step["draft_row"] + at, step["draft"]].tolist() if drawn else None
        step["law_row"], row = row, row + len(at) + 1
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "golden.json").unlink(missing_ok=True)  # without it, there is no run
    write_safetensors(folder / "golden.safetensors", arrays, {"format": FORMAT})
    with new_file(folder / "golden.json") as file:
        file.write(f"{json.dumps(golden, indent=1)}\n".encode())


def top_entries(name, logits_TV, count=TOP):
    """The `count` largest logits of each row, largest first, of equal ones the lower id, and what normalizes them."""
    ids_TM = np.stack([_largest(-logits_V, count) for logits_V in logits_TV])
    return {f"{name}.top_ids": ids_TM, **_at(name, logits_TV, ids_TM)}


def _largest(negative_V, count):
    """np.argsort(negative_V, kind="stable")[:count], most of it not sorted."""
    last = np.partition(negative_V, count - 1)[count - 1]
    ids_N = np.flatnonzero(~(negative_V > last))
    return ids_N[np.argsort(negative_V[ids_N], kind="stable")[:count]]


def _at(name, logits_TV, ids_TM):
    logits_TV = np.asarray(logits_TV, np.float64)
    high_T = logits_TV.max(-1)
    sum_T = np.exp(logits_TV - high_T[:, None]).sum(-1)
    top_TM = np.take_along_axis(logits_TV, ids_TM, axis=-1)
    return {f"{name}.top": top_TM, f"{name}.logsumexp": (high_T + np.log(sum_T))[:, None]}


# Reading


def read_golden(folder):
    """(golden.json as a dict, {name: array}) of a folder. Raises CheckpointError: which file, which thing."""
    folder = Path(folder)
    path, golden = folder / "golden.json", read_json(folder / "golden.json")
    if golden.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format is {show(golden.get('format'))}, expected {FORMAT!r}")
    try:
        rows, drafts = _check(golden)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: not a golden run: {type(error).__name__} {error}") from None
    file = folder / "golden.safetensors"
    arrays = {name: raw.stored() for name, raw in read_safetensors(file)[0].items()}
    for name, array in arrays.items():
        stem, noise, ids = _stem(name.removeprefix("noise.")), name.startswith("noise."), name.endswith(".top_ids")
        wanted = {"draft.logits": drafts, "q": drafts, "p": drafts + len(golden["steps"])}.get(stem, rows)
        if array.shape[:1] != (wanted,) or array.ndim != 2 - noise or array.dtype.kind != ("i" if ids else "f"):
            raise CheckpointError(f"{file}: {show(name)} is {array.dtype} {array.shape}, expected {wanted} rows")
        if ids and not ((array >= 0) & (array < golden["model"]["vocab_size"])).all():
            raise CheckpointError(f"{file}: {show(name)} has a token outside the vocabulary")
        if not noise and f"noise.{stem}" not in arrays:
            raise CheckpointError(f"{file}: no noise.{stem}")
    return golden, arrays


def _stem(name):
    """The array that a name belongs to: its own, or that of which it holds the top entries."""
    return name.removesuffix(".top_ids").removesuffix(".top").removesuffix(".logsumexp")


def _check(golden):
    """(rows, draft tokens) of a run whose steps follow one another. Raises KeyError, TypeError or ValueError."""
    V, text, length, row, draft_row = golden["model"]["vocab_size"], list(golden["prompt"]), 0, 0, 0
    if golden["rule"] not in RULES or not golden["steps"] or type(golden["model"]["layers"]) is not int:
        raise ValueError("rule, steps or layers")
    for name in ("sampling", "draft_sampling"):
        Sampling(**golden[name])
    for i, step in enumerate(golden["steps"]):
        read, draft, K = step["read"], step["draft"], len(step["draft"])
        _ids(f"step {i}", [*read, *draft, step["token"]], V)
        uniforms, q = [*step["uniforms"], *step["draft_uniforms"]], step["q"] or [1.0] * K
        if not all(type(x) is float and 0 <= x <= 1 for x in [*uniforms, *step["p"], *q]) or 1.0 in uniforms:
            raise ValueError(f"step {i} has uniforms or chances outside [0, 1)")
        if (len(step["uniforms"]), len(step["draft_uniforms"]), len(step["p"]), len(q)) != (K + 1, K, K, K):
            raise ValueError(f"step {i} has other uniforms or chances than its {K} draft tokens")
        if read != [*text[length:], *draft] or len(read) <= K or step["accepted"] not in range(K + 1):
            raise ValueError(f"step {i} does not read what was emitted, and its draft")
        if [step["position"], step["row"], step["draft_row"]] != [length, row, draft_row]:
            raise ValueError(f"step {i} does not follow the one before")
        length, row, draft_row = length + len(read) - K + step["accepted"], row + len(read), draft_row + K
        text += [*draft[: step["accepted"]], step["token"]]
        if step["cache_length"] != length:
            raise ValueError(f"step {i} leaves a cache of {step['cache_length']}, expected {length}")
    if golden["text"] != text:
        raise ValueError("its text is not what its steps emit")
    return row, draft_row


def _ids(name, tokens, vocab_size):
    if not all(type(token) is int and 0 <= token < vocab_size for token in tokens):
        raise ValueError(f"{name} has a token outside the vocabulary of {vocab_size}")


def read_dump(path):
    """({name: array}, {name: precision}) of another engine's safetensors file."""
    tensors, _ = read_safetensors(path)
    tensors = {name: raw for name, raw in tensors.items() if raw.shape}
    floats = {name: raw.to(np.float64) for name, raw in tensors.items() if raw.dtype in FLOATS}
    others = {name: raw.stored() for name, raw in tensors.items() if raw.dtype not in FLOATS}
    return {**floats, **others}, {name: PRECISIONS[tensors[name].dtype] for name in floats}


# Comparing


def compare(golden, arrays, dump, precisions):
    """A dump against a golden run -> a JSON-able report; "first" is the first thing that differs, None where none does.

    precisions: {name of a float array: "float32" ...}, or one for all. Order: what a pass computes first, first; then
    drafts, decisions, cache lengths. Raises CheckpointError for a dump of another shape, or with nothing to compare.
    """
    findings, compared, places = [], [], _places(golden)
    dump = {name: np.asarray(array) for name, array in dump.items()}
    dump |= _like_top(golden, arrays, dump, places)
    names = [*tap_names(golden["model"]["layers"]), *(name + part for name in LOGITS for part in TOPS), *LAWS]
    for name in filter(lambda n: n in arrays and n in dump, names):
        truth_TD, found_TD, stem = arrays[name], dump[name], _stem(name)
        at = _rows_of(stem, found_TD, places)
        rows = [row for row, _, _ in at]
        truth_TD, noise_T = truth_TD[rows], arrays[f"noise.{stem}"][rows]
        if found_TD.shape != truth_TD.shape or found_TD.dtype.kind != "f":
            raise CheckpointError(f"{name} is {found_TD.dtype} {found_TD.shape}, expected floats {truth_TD.shape}")
        precision = precisions if isinstance(precisions, str) else precisions.get(name) or precisions[stem]
        stored_T = EPSILON["float32"] / 2 * np.abs(truth_TD).max(-1)
        allowed_T = allowance(truth_TD, precision, noise_T) + stored_T
        off_T, element_T = differences(found_TD, truth_TD)
        ratio_T = np.divide(off_T, allowed_T, out=np.where(off_T > 0, np.inf, 0.0), where=allowed_T > 0)
        bad, worst = np.flatnonzero(~(ratio_T <= 1)), min(float(ratio_T.max(initial=0)), LARGEST)
        compared.append({"name": name, "precision": precision, "worst": worst, "rows": len(at), "differing": len(bad)})
        if len(bad):
            t = bad[0]
            size = {"difference": off_T[t], "explained": allowed_T[t], "ratio": ratio_T[t]}
            size = {key: min(float(value), LARGEST) for key, value in size.items()}
            where = {"step": at[t][1], "position": at[t][2], "element": int(element_T[t])}
            findings.append({"name": name, **where, **size})
    for name in filter(lambda n: n in dump, EXACT):
        findings += _compare_exact(name, golden, dump[name], places["q" if name == "draft" else "steps"])
        compared.append({"name": name, "differing": int(bool(findings) and findings[-1]["name"] == name)})
    if not compared:
        raise CheckpointError(f"nothing to compare: the dump holds {show(sorted(dump))}")
    known = {entry["name"] for entry in compared} | set(LOGITS)
    first = findings[0] if findings else None
    return {"passed": not findings, "first": first, "compared": compared, "skipped": sorted(set(dump) - known)}


def _places(golden):
    """What each row of an array is of: (row, step, position), by array, and for rows by position of the final text."""
    rows, drafts, laws, steps, latest = [], [], [], [], {}
    for i, step in enumerate(golden["steps"]):
        start, K = step["position"], len(step["draft"])
        steps.append((i, i, start + len(step["read"]) - K))
        laws += [(len(laws) + j, i, steps[i][2] + j) for j in range(K + 1)]
        drafts += [(len(drafts) + j, i, start + 1 + j) for j in range(K)]
        for j in range(len(step["read"])):
            latest[start + j] = len(rows), i, start + j
            rows.append(latest[start + j])
    text = [latest[position] for position in range(golden["steps"][-1]["cache_length"])]
    return {"rows": rows, "text": text, "draft.logits": drafts, "q": drafts, "p": laws, "steps": steps}


def _rows_of(stem, found_TD, places):
    """What the rows of a dumped array are of: all that the golden one has, or one for each position of the text."""
    every = places.get(stem, places["rows"])
    return places["text"] if every is places["rows"] and len(found_TD) == len(places["text"]) else every


def _like_top(golden, arrays, dump, places):
    """Of a dump's whole rows of logits: the entries that the golden run keeps."""
    found = {}
    for name in LOGITS:
        if name in dump and f"{name}.top_ids" in arrays:
            rows = [row for row, _, _ in _rows_of(name, dump[name], places)]
            if dump[name].shape != (len(rows), golden["model"]["vocab_size"]):
                raise CheckpointError(f"{name} has shape {dump[name].shape}, expected {len(rows)} rows, whole")
            found |= _at(name, dump[name], arrays[f"{name}.top_ids"][rows])
    return found


def _compare_exact(name, golden, found, places):
    """The first entry that is not the golden one, as a finding, or nothing."""
    steps = golden["steps"]
    wanted = {
        "draft": [token for step in steps for token in step["draft"]],
        "decisions": [[step["accepted"], step["token"]] for step in steps],
        "cache_lengths": [step["cache_length"] for step in steps],
    }[name]
    if np.shape(found) != np.shape(wanted):
        raise CheckpointError(f"{name} has shape {np.shape(found)}, expected {np.shape(wanted)}")
    for at, (ours, theirs) in enumerate(zip(wanted, np.asarray(found).tolist())):
        if ours != theirs:
            _, i, position = places[at]
            finding = {"name": name, "step": i, "position": position, "found": theirs, "expected": ours}
            return [{**finding, **_why(name, steps[i], ours, theirs)}]
    return []


def _why(name, step, ours, theirs):
    """The test at which two decisions part, where it is one."""
    if name != "decisions" or ours[0] == theirs[0]:
        return {}
    j = min(ours[0], theirs[0])
    return {"test": {"draft": j, "u": step["uniforms"][j], "p": step["p"][j], "q": step["q"][j] if step["q"] else 1.0}}


def report_text(report):
    """The report as text, the first difference first."""
    lines = [f"{'name':24}{'rows':>6}{'differing':>11}  largest difference, of what is explained"]
    for one in report["compared"]:
        worst = f"  {one['worst']:.2g} ({one['precision']})" if "worst" in one else ""
        lines.append(f"{one['name']:24}{one.get('rows', ''):>6}{one['differing']:>11}{worst}")
    if report["skipped"]:
        lines.append(f"not compared: {', '.join(report['skipped'])}")
    return "\n".join([*lines, first_line(report["first"])])


def first_line(first):
    """What differs first, in one line."""
    if first is None:
        return "no difference beyond what precision explains"
    where = f"first difference: {first['name']}, position {first['position']} (step {first['step']})"
    if "ratio" in first:
        size = f"off by {first['difference']:.3g}, explained {first['explained']:.3g}: {first['ratio']:.3g} times that"
        return f"{where}: element {first['element']} is {size}"
    line = f"{where}: {first['found']}, expected {first['expected']}"
    if test := first.get("test"):
        line += f"; draft token {test['draft']}: u = {test['u']:.6f}, p = {test['p']:.6f}, q = {test['q']:.6f}"
    return line
