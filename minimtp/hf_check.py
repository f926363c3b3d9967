"""A checkpoint against transformers, layer by layer, on the reader's own disk; for any size one layer of which fits.

Both read the same tensors.  Each layer of theirs is given what went into ours, so one layer's error is not another's;
beside it, in the same batch, transformers goes its own way from the embedding to the logits.  The truth is transformers
in double on our input: from it follows transformers' own float32 error, and from that what is explained of ours.
Memory: one layer of theirs, and what every layer put out, at most 48 bytes a token, layer and hidden unit.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np

from .backend import BackendError
from .checkpoint import FLOATS, CheckpointError, show
from .drafting import GemmaAssistant
from .formats import parse_quantization, read_weight
from .gemma4 import lendable_kv
from .loading import find_drafter, load, load_drafter, open_model
from .oracle_logits import allowance, differences
from .parameters import find_prefix

PARTS, CHAINED = ("attn", "mlp", "out"), ("final_norm", "logits")
STEPS = 2  # of an assistant
TIE = 1e-4  # experts whose router logits differ by less may be chosen either way in float32
ROWS = 16  # positions, the last ones, whose logits are compared
HEAD_ROWS = 1 << 14  # rows of the head held at a time
LUCK = {"float32": 2, "float64": 8}  # times what one run's errors say of another's; a slip in double is 1e6 times that
LARGEST = 1e300  # stands for infinity, which JSON has not


def check(path, ids_T, reference=None, draft="auto"):
    """Compare our reading of a checkpoint with transformers' -> a JSON-able report; "first" is the first difference.

    reference: the checkpoint that transformers reads, where it is another: to check a conversion, or to see a
    difference found.  draft: a Gemma assistant to compare too, "auto" for the one beside path, or "none"; transformers
    has no MTP layer.  Raises BackendError without torch and transformers, CheckpointError as loading does.
    """
    _libraries()
    checkpoint, _, config = open_model(path if reference is None else reference, "target")
    ours, drafts = {}, {}
    for dtype in ("float32", "float64"):
        ours[dtype], drafts[dtype], draft = _ours(path, dtype, ids_T, draft)
    weights = _Weights(checkpoint)
    rows = _compared(weights, ids_T, ours, config.experts is not None)
    rows += _assistant_rows(draft, drafts) if draft else []
    failed = next((row for row in rows if not row["passed"]), None)
    window = getattr(config, "sliding_window", None)
    return {
        "passed": failed is None,
        "first": failed,
        "model": str(path),
        "reference": str(checkpoint.folder),
        "tokens": len(ids_T),
        "window": window,
        "past_window": window is None or len(ids_T) > window,
        "unpacked": sorted(weights.unpacked),
        "kinds": [layer.kind for layer in config.layers],
        "drafter": draft and str(draft),
        "rows": rows,
    }


def _compared(weights, ids_T, ours, mixture):
    """The rows of the report, each made as soon as transformers' double has come by."""
    single, rows, chained, ties = {}, [], [], {}

    def keep(name, x_BTD, gap_N=None):
        single[name] = x_BTD[0].copy()
        if name in CHAINED:
            single[f"chained {name}"] = x_BTD[1].copy()

    def compare(name, x_BTD, gap_N=None):
        layer, _, part = name.rpartition(".")
        if part == "experts":
            ties[layer] = _ties(ours["float32"][name], x_BTD, gap_N)
            return
        excused_T = ties.get(layer, False) if part in ("mlp", "out") else False
        rows.append(_row(name, name, ours, single.pop(name), x_BTD[:2], excused_T))
        if name in CHAINED:  # a tie between experts, decided otherwise, is carried on to the end
            title = f"chained {name}"
            chained.append(_row(title, name, ours, single.pop(title), x_BTD[[2, 2]], mixture))

    _theirs(weights, ids_T, [ours["float32"]], "float32", keep)
    _theirs(weights, ids_T, list(ours.values()), "float64", compare)
    return rows + chained


def _row(title, name, ours, single_TD, truths, excused_T=False):
    """What differs of one array; single_TD: transformers' float32, truths: its double, for each of our precisions.

    excused_T: where float32 may differ at will.
    """
    noise_T, row = differences(single_TD, truths[0])[0], {"name": title, "passed": True}
    for dtype, truth_TD in zip(ours, truths):
        off_T = differences(ours[dtype][name], truth_TD)[0]
        allowed_T = LUCK[dtype] * allowance(truth_TD, dtype, noise_T)
        if dtype == "float32":
            allowed_T[excused_T] = np.inf
        ratio_T = np.divide(off_T, allowed_T, out=np.where(off_T > 0, np.inf, 0.0), where=allowed_T > 0)
        t = int(ratio_T.argmax())
        size = {"difference": off_T.max(), "scale": np.abs(truth_TD).max(), "ratio": ratio_T[t]}
        row[dtype] = {**{key: min(LARGEST, float(value)) for key, value in size.items()}, "position": t}
        row["passed"] &= bool(ratio_T[t] <= 1)
    return row


def _ties(ours_TX, theirs_NX, gap_N):
    """Where [T] our float32 chose other experts than the truth, the batch's first row, two of them being a tie."""
    T = len(ours_TX)
    return (np.sort(ours_TX) != np.sort(theirs_NX[:T])).any(-1) & (gap_N[:T] < TIE)


def _ours(path, dtype, ids_T, draft):
    """({tap: [T, D]} of our forward, what an assistant drafted after it, its path), the last two None without one."""
    target = load(path, dtype=dtype, keep="packed")
    layers, cache = range(len(target.config.layers)), target.new_cache()
    parts = (*PARTS, "experts") if target.config.experts else PARTS
    names = ["embed", *(f"layer.{i}.{part}" for i in layers for part in parts), "final_norm"]
    out = target.forward(ids_T, cache, taps=names, last=ROWS)
    draft = find_drafter(target) if draft == "auto" else None if draft == "none" else draft
    drafter = draft and load_drafter(draft, target, keep="packed")
    taps = {**out.taps, "logits": out.logits_TV}
    if not isinstance(drafter, GemmaAssistant):
        return taps, None, None
    return taps, _drafted(drafter, cache, ids_T, out.hidden_TD[-1]), draft


# Weights


@dataclass
class _Weights:
    """A checkpoint's tensors for torch, under transformers' names.  Floats pass as they are stored, bit for bit."""

    checkpoint: object

    def __post_init__(self):
        self.tensors, self.unpacked = self.checkpoint.tensors, set()  # unpacked: stored otherwise, so by our own code
        self.quantization, self.prefix = parse_quantization(self.checkpoint.config), find_prefix(self.checkpoint)

    def their_config(self):
        """The checkpoint's configuration as transformers reads it, without its word on quantization."""
        _, transformers = _libraries()
        raw = {key: value for key, value in self.checkpoint.config.items() if key != "quantization_config"}
        if raw["model_type"] not in transformers.CONFIG_MAPPING:
            raise BackendError(f"transformers {transformers.__version__} does not know {show(raw['model_type'])}")
        return transformers.CONFIG_MAPPING[raw["model_type"]].from_dict(raw)

    @property
    def head(self):
        """Name of the output matrix."""
        return "lm_head.weight" if "lm_head.weight" in self.tensors else f"{self.prefix}embed_tokens.weight"

    def named(self, name, dtype):
        """A parameter of a whole model, by its full name."""
        raw = self.tensors.get(name)
        if raw is not None and raw.dtype == "I64":
            return _libraries()[0].from_numpy(np.array(raw.stored()))
        return self.rows(name, slice(None), dtype)

    def whole(self, name, shape, dtype):
        """A parameter of the text model, of this shape."""
        stem, _, last = name.rpartition("experts.")
        if last in ("gate_up_proj", "down_proj") and self.prefix + name not in self.tensors:
            return self._stacked(f"{stem}experts.", last, shape, dtype)
        found = self.rows(self.prefix + name, slice(None), dtype)
        if found.shape != shape:
            raise CheckpointError(f"{show(self.prefix + name)} is {list(found.shape)}, transformers has {list(shape)}")
        return found

    def _stacked(self, stem, last, shape, dtype):
        """All experts in one tensor, from one tensor for each."""
        torch, parts = _libraries()[0], ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
        size = shape[1] // len(parts), shape[2]
        names = [[f"{stem}{e}.{part}.weight" for part in parts] for e in range(shape[0])]
        return torch.stack([torch.cat([self.whole(name, size, dtype) for name in each]) for each in names])

    def rows(self, name, rows, dtype):
        """Rows of a stored tensor; rows: a slice, or ids."""
        torch, raw = _libraries()[0], self.tensors.get(name)
        wanted = getattr(torch, dtype)
        if raw is not None and raw.dtype in FLOATS:
            stored = np.array(raw.stored()[rows])
            bfloat16 = raw.dtype == "BF16"
            value = torch.from_numpy(stored.view(np.int16) if bfloat16 else stored)
            value = (value.view(torch.bfloat16) if bfloat16 else value).to(wanted)
            return value - 1 if getattr(raw, "plus_one", False) else value
        weight = read_weight(self.tensors, name.removesuffix(".weight"), self.quantization)[0]
        if getattr(weight, "input_scale", None) or getattr(weight, "output_scale", None):
            raise CheckpointError(f"{show(name)}: activations are rounded to 8 bits here, which is not compared")
        self.unpacked.add(name)
        ids = np.arange(weight.shape[0])[rows]
        return torch.from_numpy(np.array(weight.take(ids, np.dtype(dtype))))


# transformers


def _libraries():
    try:
        import torch
        import transformers
    except ImportError as error:
        raise BackendError(f"this check needs {error.name}: pip install 'minimtp[hf]'") from None
    transformers.logging.set_verbosity_error()
    return torch, transformers


def _theirs(weights, ids_T, runs, dtype, seen):
    """transformers over a batch of len(runs) + 1, one layer in memory at a time; seen(tap, array) for each of our taps.

    In row b every layer is given what it was given in runs[b] (of ours); the last row is transformers' own way.
    """
    torch, _ = _libraries()
    model = _empty_model(weights, dtype)

    def keep(name, x_BTD, *gap_N):
        seen(name, x_BTD.detach().numpy(), *(gap_N.detach().numpy() for gap_N in gap_N))

    def ours_instead(name):
        def replace(module, arguments):
            x_BTD = arguments[0].clone()
            for b, run in enumerate(runs):
                x_BTD[b] = torch.from_numpy(run[name])
            return x_BTD, *arguments[1:]

        return replace

    def loaded(prefix):
        def fill(module, arguments):
            _fill(module, prefix, weights, dtype)

        return fill

    last = "embed"
    model.embed_tokens.register_forward_hook(lambda module, arguments, out: keep("embed", out))
    for i, layer in enumerate(model.layers):
        layer.register_forward_pre_hook(loaded(f"layers.{i}."))
        layer.register_forward_pre_hook(ours_instead(last))
        _watch(layer, f"layer.{i}", keep)
        layer.register_forward_hook(lambda module, *_: module.to("meta") and None)
        last = f"layer.{i}.out"
    model.norm.register_forward_pre_hook(ours_instead(last))
    model.norm.register_forward_hook(lambda module, arguments, out: keep("final_norm", out))
    ids, places_T = np.unique(ids_T, return_inverse=True)
    _fill_embeddings(model, weights, ids, dtype)
    batch_BT = torch.from_numpy(places_T.reshape(1, -1)).repeat(len(runs) + 1, 1)
    with torch.no_grad(), _double() if dtype == "float64" else nullcontext():
        hidden_BTD = model(batch_BT, use_cache=False).last_hidden_state
        (hidden_BTD,) = ours_instead("final_norm")(None, (hidden_BTD,))
        keep("logits", _logits(hidden_BTD[:, -ROWS:], model.config, weights, dtype))


def _empty_model(weights, dtype):
    """The text model without its layers' weights, of the configuration as transformers reads it."""
    torch, transformers = _libraries()
    config = weights.their_config().get_text_config()
    with torch.device("meta"):
        model = transformers.AutoModel.from_config(config).eval()
    model.set_attn_implementation("sdpa")  # the eager one adds a float32 mask
    model.set_experts_implementation("eager")  # the others do not work in double
    with _exact_powers():
        model.rotary_emb = type(model.rotary_emb)(config).to(getattr(torch, dtype))
    for name, module in model.named_children():
        if name not in ("layers", "rotary_emb") and "embed" not in name:
            _fill(module, f"{name}.", weights, dtype)
    return model


def _fill(module, prefix, weights, dtype):
    shapes = {name: tuple(value.shape) for name, value in module.state_dict().items()}
    values = {name: weights.whole(prefix + name, shape, dtype) for name, shape in shapes.items()}
    module.load_state_dict(values, assign=True)


def _fill_embeddings(model, weights, ids, dtype):
    """The rows of these ids for the whole vocabulary: token ids become places among them."""
    torch, _ = _libraries()
    for name, module in model.named_children():
        if name.startswith("embed_tokens"):
            rows = weights.rows(f"{weights.prefix}{name}.weight", ids, dtype)
            module.weight, module.padding_idx = torch.nn.Parameter(rows, requires_grad=False), None
            if hasattr(module, "scalar_embed_scale"):
                module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=rows.dtype)


def _watch(layer, name, keep):
    """Keep what our taps are called: the outputs of attention and feed-forward before what norms them, and the layer's.

    Gemma's experts join its dense branch outside `mlp`: there it is what the next norm is given.
    """

    def output(part):
        return lambda module, arguments, out: keep(f"{name}.{part}", out[0] if isinstance(out, tuple) else out)

    def choice(logits_NE, chosen_NX):
        """The experts, and how far behind the next one came; N: the tokens of the whole batch."""
        X = chosen_NX.shape[-1]
        best_NE = logits_NE.sort(descending=True).values
        keep(f"{name}.experts", chosen_NX, best_NE[:, X - 1] - best_NE[:, min(X, best_NE.shape[1] - 1)])

    mixer = layer.self_attn if hasattr(layer, "self_attn") else layer.linear_attn
    mixer.register_forward_hook(output("attn"))
    if hasattr(layer, "post_feedforward_layernorm"):
        norm = layer.post_feedforward_layernorm
        norm.register_forward_pre_hook(lambda module, arguments: keep(f"{name}.mlp", arguments[0]))
    else:
        layer.mlp.register_forward_hook(output("mlp"))
    layer.register_forward_hook(output("out"))
    if hasattr(layer, "router"):  # Gemma's says chances, Qwen's logits
        layer.router.register_forward_hook(lambda module, arguments, out: choice(out[0].log(), out[-1]))
    elif hasattr(layer.mlp, "gate"):
        layer.mlp.gate.register_forward_hook(lambda module, arguments, out: choice(out[0], out[-1]))


def _logits(hidden_BTD, config, weights, dtype):
    """The head, some rows at a time, and the soft cap: what transformers' ForCausalLM adds to its text model."""
    torch, _ = _libraries()

    def some(start):
        return weights.rows(weights.head, slice(start, start + HEAD_ROWS), dtype)

    parts = (hidden_BTD @ some(start).T for start in range(0, config.vocab_size, HEAD_ROWS))
    logits_BTV = torch.cat(list(parts), dim=-1)
    cap = getattr(config, "final_logit_softcapping", None)
    return logits_BTV if cap is None else torch.tanh(logits_BTV / cap) * cap


@contextmanager
def _double():
    """Lifts the casts to float32 that norms, RoPE and softmax make for bfloat16's sake: all arithmetic is double."""
    torch, _ = _libraries()
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax

    def lift(arguments, named):
        one = {torch.float32: torch.float64}
        lifted = [one.get(x, x) if isinstance(x, torch.dtype) else x for x in arguments]
        return lifted, {key: one.get(x, x) if isinstance(x, torch.dtype) else x for key, x in named.items()}

    def lifting(function):
        def call(x, *arguments, **named):
            arguments, named = lift(arguments, named)
            return function(x, *arguments, **named)

        return call

    with (
        patch.object(torch.Tensor, "to", lifting(to)),
        patch.object(torch.Tensor, "float", torch.Tensor.double),
        patch.object(torch.nn.functional, "softmax", lifting(softmax)),
    ):
        yield


@contextmanager
def _exact_powers():
    """RoPE's frequencies, float32 by definition, correctly rounded: torch's own power is not, on every machine."""
    torch, _ = _libraries()
    power = torch.Tensor.__rpow__

    def rounded(exponents, base):
        return power(exponents.double(), torch.tensor(base).item()).to(exponents.dtype)

    with patch.object(torch.Tensor, "__rpow__", rounded):
        yield


# The assistant


def _drafted(drafter, cache, ids_T, hidden_B):
    """Steps of our assistant: what each was given [S, 2 B], its hidden states and logits; the KV it saw, the position.

    The tokens fed are the prompt's first ones: any will do.
    """
    given, hidden, logits, window = [], [], [], drafter.config.sliding_window
    for token in ids_T[:STEPS]:
        given.append(np.concatenate([drafter.target.embed([token])[0], hidden_B]))
        logits_V, hidden_B = drafter.forward(token, hidden_B, cache)
        hidden.append(hidden_B)
        logits.append(logits_V)
    lent = {kind: memory.read() for kind, memory in lendable_kv(drafter.target.config, cache).items()}
    newest = {"sliding": slice(-window - 1, None), "full": slice(None)}
    kv = {f"{kind}_attention": [x_GSK[:, newest[kind]] for x_GSK in pair] for kind, pair in lent.items()}
    steps = {"drafter hidden": np.stack(hidden), "drafter logits": np.stack(logits)}
    return {"given": np.stack(given), **steps, "kv": kv, "position": cache.length}


def _assistant_rows(draft, ours):
    """transformers' assistant, held whole, on our inputs and our keys and values."""
    weights = _Weights(open_model(draft, "drafter")[0])
    single = _assistant_steps(weights, ours["float32"], "float32")
    double = [_assistant_steps(weights, given, "float64") for given in ours.values()]
    names = "drafter hidden", "drafter logits"
    return [_row(name, name, ours, single[name], [each[name] for each in double]) for name in names]


def _assistant_steps(weights, ours, dtype):
    torch, transformers = _libraries()
    config = weights.their_config()
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.set_attn_implementation("sdpa")
    with _exact_powers():
        model.model.rotary_emb = type(model.model.rotary_emb)(config.get_text_config()).to(getattr(torch, dtype))
    values = {name: weights.named(name, dtype) for name in model.state_dict() if name != "lm_head.weight"}
    values["lm_head.weight"] = values["model.embed_tokens.weight"]
    model.load_state_dict(values, assign=True)
    hidden, logits, wanted = [], [], getattr(torch, dtype)
    kv = {kind: [torch.from_numpy(np.array(x_GSK)[None]).to(wanted) for x_GSK in p] for kind, p in ours["kv"].items()}
    for given in ours["given"]:
        with torch.no_grad(), _double() if dtype == "float64" else nullcontext():
            out = model(
                inputs_embeds=torch.from_numpy(given).to(wanted)[None, None], shared_kv_states=kv, use_cache=False,
                position_ids=torch.tensor([[ours["position"]]]), attention_mask=None,
            )  # fmt: skip
        hidden.append(out.last_hidden_state[0, 0].numpy())
        logits.append(out.logits[0, 0].numpy())
    return {"drafter hidden": np.stack(hidden), "drafter logits": np.stack(logits)}


# The report


def report_text(report):
    """The report as a table: the largest difference, of what rounding explains, in both precisions."""
    kinds, lines = report["kinds"], [f"{'':30}{'float32':>10}  of explained{'float64':>13}  of explained"]
    for row in report["rows"]:
        kind = kinds[int(row["name"].split(".")[1])] if row["name"].startswith("layer.") else ""
        numbers = "".join(f"{row[d]['difference']:>{w}.1e}{row[d]['ratio']:>14.2g}" for d, w in WIDTHS.items())
        lines.append(f"{row['name']:20}{kind:10}{numbers}" + ("" if row["passed"] else "  differs"))
    if not report["past_window"]:
        lines.append(f"{report['tokens']} tokens do not reach past the sliding window of {report['window']}")
    if report["drafter"]:
        lines.append(f"drafter: {report['drafter']}")
    if report["unpacked"]:
        count = len(report["unpacked"])
        lines.append(f"{count} quantized tensors were unpacked for transformers by minimtp's own code")
    return "\n".join([*lines, first_line(report)])


WIDTHS = {"float32": 10, "float64": 13}


def first_line(report):
    """What differs first, in one line."""
    first = report["first"]
    if first is None:
        return f"no difference beyond rounding over {report['tokens']} tokens and {len(report['kinds'])} layers"
    dtype = "float64" if first["float64"]["ratio"] > 1 else "float32"
    size = first[dtype]
    return (
        f"first difference: {first['name']}, position {size['position']}: off by {size['difference']:.3g} "
        f"where the largest is {size['scale']:.3g}, {size['ratio']:.3g} times what {dtype} explains"
    )
