"""Every Gemma 4 size against transformers, live: random pairs of each shape, layers of published width, templates.

transformers runs in double as the truth (see double.py), and in float32 as the yardstick for our float32.
"""

import json
from itertools import chain
from math import sqrt
from pathlib import Path

import numpy as np
import pytest
import torch
from double import load_reference
from make_size_vectors import load_target
from random_models import QUANTIZATION, bfloat16_bits, bfloat16_value, write
from random_sizes import MATRICES, SIZES, prompt, write_assistant, write_pair, write_target
from test_chat import BRIEF, HELLO, PUBLISHED, TALK
from test_live import WAYS, Pair, check_assistant, check_double, check_float32, transformers_generates
from transformers.models.gemma4 import modeling_gemma4 as gemma4
from transformers.utils.chat_template_utils import render_jinja_template

import minimtp
from minimtp import loading
from minimtp.checkpoint import Checkpoint

torch.set_num_threads(1)


class SizePair(Pair):
    """A target and its assistant in both engines; the reference may need the same numbers in another layout."""

    def __init__(self, folders, ids_T, target):
        self.folders, self.ids_T, self.target = folders, ids_T, target
        self.assistant = load_reference(folders[1])
        self.window = target.config.get_text_config().sliding_window


@pytest.fixture(scope="module", params=SIZES)
def pair(request, tmp_path_factory):
    """Of another seed than the committed vectors."""
    name, seed = request.param, 100 + SIZES[request.param]["seed"]
    folders = write_pair(name, tmp_path_factory.mktemp(name), seed)
    return SizePair(folders, prompt(name, seed), load_target(name, folders[0], seed))


@pytest.mark.parametrize("way", WAYS)
def test_target_in_double(pair, way):
    check_double(pair, way)


def test_target_in_float32(pair):
    check_float32(pair)


def test_assistant_in_double(pair):
    """Logits, with the fill of a centroid head, and fed-back hidden states, after partial acceptances too."""
    check_assistant(pair, [1, pair.window - 1, pair.window + 1, len(pair.ids_T) - 2])


# Generation ----------------------------------------------------------------------------------------------------------

LIKES_ITSELF = ("e2b", "e4b_qat", "26b", "26b_int4", "12b", "sharing_alone", "everything")


@pytest.mark.parametrize("name", LIKES_ITSELF)
def test_assisted_generation(name, tmp_path):
    """A target that likes to repeat itself and an assistant that bets on it: transformers emits the same tokens."""
    seed, echo, options = 31, 0.3, SIZES[name]["target"]
    config = write_target(tmp_path / "target", seed, echo=echo, **options)
    head = SIZES[name]["assistant"] | dict(hidden_size=options["hidden_size"], repeat=2.0)
    write_assistant(tmp_path / "assistant", config, seed, **head)
    folders = tmp_path / "target", tmp_path / "assistant"
    pair = SizePair(folders, prompt(name, seed), load_target(name, folders[0], seed, echo=echo))
    target, drafter = pair.ours()
    steps = list(minimtp.generate(target, pair.ids_T[:5], drafter, num_draft=4, max_new_tokens=40))
    assert 0 < sum(step.accepted for step in steps) < sum(step.drafted for step in steps)
    tokens = list(chain.from_iterable(step.tokens for step in steps))
    assert tokens == transformers_generates(pair, pair.ids_T[:5], 40, 4) and len(set(tokens)) > 10


# Layers at their published width -------------------------------------------------------------------------------------

S, F = "sliding_attention", "full_attention"
WIDE, NARROW = 20, 3  # tokens of a pass computed by GEMM, and of one computed row by row
VOCAB, WINDOW = 64, 7
PUBLISHED_WIDTHS = {
    "gemma-4-31b": dict(layer_types=[S, F]),
    "gemma-4-26b-a4b": dict(layer_types=[F]),
    "gemma-4-e4b": dict(layer_types=[S, F, S, F], num_kv_shared_layers=2),
}
NIBBLES = np.arange(256)[:, None] >> np.array([0, 4]) & 15  # the two codes in a byte, as code + 8
PAIRS = (NIBBLES - 8).astype(np.float32).view(np.complex64).ravel()  # looked up as one item: ten times faster
BALANCED = (np.where(NIBBLES, NIBBLES, 8) @ [1, 16]).astype(np.uint8)  # without the code -8, the mean is 0


def published_text(name):
    """The text config of a published size, with fewer layers, a small vocabulary, a window that a test can pass."""
    table = json.loads((Path(loading.__file__).parent / "published.json").read_text())
    layers = PUBLISHED_WIDTHS[name]
    sizes = dict(vocab_size=VOCAB, vocab_size_per_layer_input=VOCAB, sliding_window=WINDOW, pad_token_id=0)
    return table[name]["text_config"] | layers | sizes | {"num_hidden_layers": len(layers["layer_types"])}


def random_int4(rng, rows, columns):
    """(int32 words, bf16 scale bits) of a matrix whose products keep their scale."""
    words = BALANCED[np.frombuffer(rng.bytes(rows * columns // 2), np.uint8)].view(np.int32).reshape(rows, -1)
    scales = (0.75 + rng.random((rows, columns // 32), np.float32) / 2) / np.float32(4.6 * sqrt(columns))
    return words, bfloat16_bits(scales)


def floats(words, scale_bits, rows=64):
    """The float32 matrix, a few rows at a time."""
    out = np.empty((len(words), words.shape[1] * 8), np.float32)
    for start in range(0, len(words), rows):
        block = slice(start, start + rows)
        np.take(PAIRS, words[block].view(np.uint8), out=out[block].view(np.complex64), mode="clip")
        out[block].reshape(*scale_bits[block].shape, 32)[...] *= bfloat16_value(scale_bits[block])[..., None]
    return out


class Streamed:
    """A transformers text model that holds one layer's weights at a time; all of its matrices are random int4."""

    def __init__(self, config):
        with torch.device("meta"):
            self.model = gemma4.Gemma4TextModel(config).eval()
        self.model.set_attn_implementation("sdpa")
        self.model.set_experts_implementation("eager")
        self.model.rotary_emb = gemma4.Gemma4TextRotaryEmbedding(config)
        rng, state = np.random.default_rng(0), self.model.state_dict()
        self.shapes = {name: tuple(value.shape) for name, value in state.items()}
        self.stored = {name: self.random(rng, name, shape) for name, shape in self.shapes.items()}
        small = {name: self.value(name) for name in self.shapes if not name.startswith("layers.")}
        self.model.load_state_dict(small, strict=False, assign=True)
        for module in self.model.children():
            if isinstance(module, gemma4.Gemma4TextScaledWordEmbedding):
                module.embed_scale = torch.tensor(module.scalar_embed_scale)
        for i, layer in enumerate(self.model.layers):
            layer.register_forward_pre_hook(self.loader(f"layers.{i}."))
            layer.register_forward_hook(lambda layer, *_: layer.to("meta") and None)

    def random(self, rng, name, shape):
        """A tensor as it is stored. Scores of attention are kept from being so sharp that they magnify rounding."""
        if any(matrix in name for matrix in MATRICES) or ".experts." in name:
            return random_int4(rng, int(np.prod(shape[:-1])), shape[-1])
        scale = {"embed_tokens.weight": 1 / sqrt(shape[-1]), "embed_tokens_per_layer.weight": 1 / 16}.get(name)
        noise = rng.standard_normal(shape, np.float32)
        if scale or name.endswith("router.proj.weight"):
            return noise * np.float32(scale or 1 / sqrt(shape[-1]))
        mean = {"q_norm.weight": (16 / shape[0]) ** 0.25, "k_norm.weight": (16 / shape[0]) ** 0.25}
        mean["router.scale"] = 2 * sqrt(shape[0])
        return np.float32(mean.get(".".join(name.split(".")[-2:]), 1)) * (1 + noise / 8)

    def value(self, name):
        stored = self.stored[name]
        return torch.from_numpy(floats(*stored).reshape(self.shapes[name]) if isinstance(stored, tuple) else stored)

    def loader(self, prefix):
        def load(layer, *_):
            names = [name for name in self.shapes if name.startswith(prefix)]
            layer.load_state_dict({name.removeprefix(prefix): self.value(name) for name in names}, assign=True)

        return load

    def write(self, folder, text):
        """The same weights as a compressed-tensors checkpoint, one tensor for each expert."""
        encoded = {}
        for name, stored in self.stored.items():
            if isinstance(stored, tuple):
                for part, words, scale_bits in split(name, self.shapes[name], *stored):
                    encoded[f"{part}_packed"], encoded[f"{part}_scale"] = ("I32", words), ("BF16", scale_bits)
                    encoded[f"{part}_shape"] = ("I64", np.array([len(words), words.shape[1] * 8]))
            else:
                encoded[name] = ("F32", stored)
        write(folder, text | {"quantization_config": QUANTIZATION}, {f"model.{n}": v for n, v in encoded.items()}, 1)

    @torch.no_grad()
    def read(self, ids_T):
        """Output of each layer, and hidden states after the final norm, all [T, D]."""
        outs = []
        hooks = [layer.register_forward_hook(lambda _, __, out: outs.append(out[0])) for layer in self.model.layers]
        hidden = self.model(torch.tensor([ids_T]), use_cache=False).last_hidden_state[0]
        for hook in hooks:
            hook.remove()
        return [out.numpy() for out in [*outs, hidden]]


def split(name, shape, words, scale_bits):
    """(name, words, scale bits) of a matrix, or of each expert's matrices."""
    if ".experts." not in name:
        yield name, words, scale_bits
        return
    stem, last = name.rsplit(".", 1)
    parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
    height = shape[1] // len(parts)
    for i in range(shape[0] * len(parts)):
        rows = slice(i * height, (i + 1) * height)
        yield f"{stem}.{i // len(parts)}.{parts[i % len(parts)]}.weight", words[rows], scale_bits[rows]


def differences(ours, theirs):
    """Largest difference of each pair of arrays, relative to the largest number in it."""
    return [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(ours, theirs, strict=True)]


@pytest.mark.parametrize("name", PUBLISHED_WIDTHS)
def test_layers_at_their_published_width(name, tmp_path):
    """In float32, over packed weights: in a wide pass and a narrow one, past the window."""
    text = published_text(name)
    reference = Streamed(gemma4.Gemma4TextConfig(**text))
    reference.write(tmp_path, text)
    ids_T = np.random.default_rng(1).integers(VOCAB, size=WIDE + NARROW).tolist()
    theirs = reference.read(ids_T)
    del reference
    target = minimtp.load(tmp_path, keep="packed")
    taps = [f"layer.{i}.out" for i in range(len(text["layer_types"]))]
    kv = target.new_cache()
    outs = [target.forward(part, kv, taps=taps, last=1) for part in (ids_T[:WIDE], ids_T[WIDE:])]
    ours = [np.concatenate([out.taps[tap] for out in outs]) for tap in taps]
    hidden = np.concatenate([out.hidden_TD for out in outs])
    found = differences([*ours, hidden], theirs)
    assert max(found) < 1e-5


# Templates -----------------------------------------------------------------------------------------------------------

BUNDLED = (loading.bundled("tiny-gemma4") / "chat_template.jinja").read_text()


@pytest.mark.parametrize("messages", [[HELLO], TALK, [BRIEF, *TALK]], ids=len)
@pytest.mark.parametrize("options", [{}, dict(enable_thinking=True), dict(enable_thinking=False)], ids=str)
@pytest.mark.parametrize("source", [BUNDLED, PUBLISHED], ids=["bundled", "published"])
def test_templates_write_what_transformers_writes(source, messages, options, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(source)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
    ours = minimtp.text.load_chat_template(Checkpoint(tmp_path, {}, {})).render(messages, **options)
    (theirs,), _ = render_jinja_template(
        [messages], chat_template=source, add_generation_prompt=True, bos_token="<bos>", **options
    )
    assert ours == theirs
