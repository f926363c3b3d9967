"""Google's mobile layout against transformers' Gemma quantizer, live: weights bit for bit, layers, whole models.

Rounding activations makes results jump: where sums differ in the last bit, a value in the middle between two steps is
rounded up by one engine and down by the other, and all that comes after differs. So in double, where the middle is
missed by both, whole models must agree to double precision; in float32 every layer by itself, given the same input,
up to such values, each of them shown to be one; and whole models wherever no value was near a middle.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers.integrations.gemma_quant")

from double import double  # noqa: E402
from make_mobile_vectors import load_mobile  # noqa: E402
from random_mobile import CASES, prompt, write_mobile  # noqa: E402
from transformers.integrations import gemma_quant  # noqa: E402

import minimtp  # noqa: E402
from minimtp.backend import Rounded, matmul  # noqa: E402
from minimtp.parameters import notes  # noqa: E402

torch.set_num_threads(1)


class Pair:
    """A case of random_mobile in both engines, of another seed than the committed vectors."""

    def __init__(self, name, folder):
        self.name, self.folder, self.seed = name, folder, 100 + CASES[name]["seed"]
        write_mobile(name, folder, self.seed)
        self.theirs = load_mobile(folder, CASES[name]["layout"])
        self.ids_T = prompt(name, self.seed)

    def modules(self):
        """(place in our parameters, their module) of everything quantized."""
        for name, module in self.theirs.named_modules():
            if isinstance(module, (gemma_quant.QuantizedLinear, gemma_quant.QuantizedEmbedding)):
                place = name.removeprefix("model.").removeprefix("language_model.")
                yield place.replace(".self_attn", "").replace(".mlp", ""), module

    def ours(self, **options):
        return minimtp.load(self.folder, **options)


@pytest.fixture(scope="module", params=CASES)
def pair(request, tmp_path_factory):
    return Pair(request.param, tmp_path_factory.mktemp(request.param))


def at(params, place):
    """The weight at a place like "layers.3.q_proj"; what it is Rounded by comes apart."""
    if place.startswith("layers."):
        _, index, place = place.split(".")
        params = params.layers[int(index)]
    weight = getattr(params, place)
    return weight if isinstance(weight, Rounded) else Rounded(weight, None, None)


def same_bits(a, b):
    return a.shape == b.shape and np.array_equal(a.view(np.int32), b.view(np.int32))


@pytest.mark.parametrize("keep", ["packed", "dense"])
def test_weights_are_theirs_bit_for_bit(pair, keep):
    params, widths = pair.ours(keep=keep).params, set()
    for place, module in pair.modules():
        ours = at(params, place).weight
        ours = ours if keep == "dense" else ours.dequantize("float32")
        theirs = module.weight if hasattr(module, "embedding_quantized") else module._dequantize_weights(torch.float32)
        assert same_bits(ours, theirs.detach().numpy()), place
        widths.add(module.num_bits)
    assert widths == {2, 4, 8}


@pytest.mark.parametrize("keep", ["packed", "dense"])
def test_whole_models_in_double(pair, keep):
    target = pair.ours(dtype="float64", keep=keep)
    with torch.no_grad(), double(pair.theirs):
        theirs_TV = pair.theirs(torch.tensor([pair.ids_T])).logits[0].numpy()
    wide_TV = target.forward(pair.ids_T, target.new_cache()).logits_TV
    cache = target.new_cache()
    narrow_TV = np.concatenate([target.forward(pair.ids_T[i : i + 5], cache).logits_TV for i in range(0, 30, 5)
                                if pair.ids_T[i : i + 5]])  # fmt: skip
    for ours_TV in (wide_TV, narrow_TV):
        assert np.abs(ours_TV - theirs_TV).max() < 1e-12 * np.abs(theirs_TV).max()


def test_activation_rounding_matters(pair):
    """Without it the logits are others."""
    rounded, plain = pair.ours(dtype="float64"), pair.ours(dtype="float64")
    for part in (plain.params, *plain.params.layers):
        for place, weight in vars(part).items():
            if isinstance(weight, Rounded):
                setattr(part, place, weight.weight)
    a, b = (target.forward(pair.ids_T, target.new_cache()).logits_TV for target in (rounded, plain))
    assert np.abs(a - b).max() > 0.1


def test_every_layer_in_float32(pair):
    """From the same input; what differs is one step apart, and was in the middle between the two."""
    params, seen, hooks = pair.ours().params, {}, []
    places = [(place, module) for place, module in pair.modules() if hasattr(module, "weight_scale")]
    for place, module in places:
        keep = lambda module, inputs, out, place=place: seen.update({place: (inputs[0][0].numpy(), out[0].numpy())})  # noqa: E731
        hooks.append(module.register_forward_hook(keep))
    with torch.no_grad():
        pair.theirs(torch.tensor([pair.ids_T]))
    for hook in hooks:
        hook.remove()
    assert len(seen) == len(places)
    total = flips = 0
    for place, (x_TD, theirs_TO) in seen.items():
        w, x_TD = at(params, place), np.ascontiguousarray(x_TD).reshape(len(pair.ids_T), -1)
        ours_TO = matmul(x_TD, w)
        off = np.abs(ours_TO - theirs_TO.reshape(ours_TO.shape)) > 1e-5 * np.abs(theirs_TO).max()
        total, flips = total + off.size, flips + off.sum()
        if w.output_scale is None:
            assert not off.any(), place
            continue
        exact_TO = matmul(x_TD.astype("float64"), w._replace(output_scale=None)) / w.output_scale
        middle_TO = np.abs(np.abs(exact_TO - np.rint(exact_TO)) - 0.5)
        assert (middle_TO[off] < 1e-4).all() and np.abs(ours_TO - theirs_TO)[off].max(
            initial=0
        ) < 1.001 * w.output_scale
    assert flips <= total / 2000


def test_whole_models_in_float32(pair, monkeypatch):
    """Short prompts: where no activation was within 1e-4 steps of a middle, logits agree as float32 sums do."""
    nearest, apply_srq = [], gemma_quant.apply_srq

    def watched(x, scale):
        if scale != 0:
            steps = x / scale
            distance = ((steps - steps.floor()) - 0.5).abs()
            nearest.append(distance[(steps.abs() < 127)].min().item())
        return apply_srq(x, scale)

    random = np.random.RandomState(pair.seed)
    target, vocabulary, undisturbed = pair.ours(), CASES[pair.name]["sizes"]["vocab_size"], 0
    for i in range(80):
        ids_T = random.randint(vocabulary, size=1 + i % 2).tolist()
        with torch.no_grad(), monkeypatch.context() as patch:
            patch.setattr(gemma_quant, "apply_srq", watched)
            theirs_TV = pair.theirs(torch.tensor([ids_T])).logits[0].numpy()
        ours_TV, near = target.forward(ids_T, target.new_cache()).logits_TV, min(nearest)
        nearest.clear()
        if near > 1e-4:
            assert np.abs(ours_TV - theirs_TV).max() < 2e-5 * np.abs(theirs_TV).max()
            undisturbed += 1
    assert undisturbed >= 5


def test_cache_scales_and_rounding_are_reported(pair):
    target = pair.ours()
    scales = sum(scale is not None for place, _ in pair.modules() for scale in at(target.params, place)[1:])
    rounded, cached = notes(target.checkpoint, target.family, target.config)
    assert f": {scales} scales" in rounded and cached.startswith("2 cache scales")
