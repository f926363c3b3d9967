"""transformers in double precision.

Its float32 results carry noise of 1e-4 and more, which hides bugs. `model.double()` alone is not enough: norms, RoPE
and softmax cast down to float32 wherever the model does so for bfloat16's sake. `double` lifts those casts for the
duration of a call. RoPE's inverse frequencies are float32 by definition and stay so, but correctly rounded.
"""

import json
import warnings
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
import transformers

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@contextmanager
def double(*models):
    """Inside the block the models (loaded in float32) and all their arithmetic are float64; afterwards float32."""
    for model in models:
        assert model.dtype == torch.float32, f"load the reference in float32, not {model.dtype}"
        model.set_attn_implementation("sdpa")  # eager attention adds a float32 mask
        model.double()
        set_embed_scale(model)
        check_all_double(model)
    to, softmax = torch.Tensor.to, torch.nn.functional.softmax
    casts = [
        patch.object(torch.Tensor, "float", torch.Tensor.double),
        patch.object(torch.Tensor, "to", lambda x, *args, **kwargs: to(x, *lift(args), **lift(kwargs))),
        patch.object(torch.nn.functional, "softmax", lambda *args, **kwargs: softmax(*lift(args), **lift(kwargs))),
    ]
    try:
        for cast in casts:
            cast.start()
        yield
    finally:
        for cast in reversed(casts):
            cast.stop()
        for model in models:
            model.float()


def lift(arguments):
    """float32 among positional or keyword arguments becomes float64."""
    if isinstance(arguments, dict):
        return dict(zip(arguments, lift(arguments.values()), strict=True))
    return [torch.float64 if argument is torch.float32 else argument for argument in arguments]


def set_embed_scale(model):
    """sqrt(hidden) to double precision; the buffer holds it rounded to float32."""
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):
            module.embed_scale.fill_(module.scalar_embed_scale)


def check_all_double(model):
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        assert not tensor.is_floating_point() or tensor.dtype == torch.float64, f"{name} stayed {tensor.dtype}"


def load_reference(folder, model_class=None):
    """The transformers model of a checkpoint folder, float32, every tensor accounted for.

    model_class: another than the checkpoint names.
    """
    config = json.loads((Path(folder) / "config.json").read_text())
    model_class = model_class or getattr(transformers, config["architectures"][0])
    if "quantization_config" in config:
        return round_frequencies(load_dequantized(folder, model_class))
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    return round_frequencies(model.eval())


def load_dequantized(folder, model_class):
    """Int4 weights as compressed-tensors unpacks them, in a plain model (compressed-tensors' own modules cannot be
    turned to double)."""
    unpack, config = transformers.CompressedTensorsConfig(dequantize=True), own_config(folder, model_class)
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # that `unpack` adds to the folder's config
        packed = model_class.from_pretrained(folder, config=config, dtype=torch.float32, quantization_config=unpack)
    weights = {k: v for k, v in packed.state_dict().items() if not k.endswith(("weight_scale", "weight_shape"))}
    config = own_config(folder, model_class)
    del config.quantization_config
    plain = model_class._from_config(config, dtype=torch.float32)  # in the config's own bfloat16 weights are rounded
    plain.load_state_dict(weights)
    return plain.eval()


def own_config(folder, model_class):
    """The folder's configuration, or the text model's out of it, as the class wants it."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if isinstance(config, model_class.config_class):
        return config
    text = config.get_text_config()
    text.quantization_config = config.quantization_config
    return text


def round_frequencies(model):
    """Correctly rounded inverse frequencies; -> the model.

    float32 `pow` is a unit in the last place off here and there, and where depends on the machine (torch with AVX2: in
    1 of 128 entries at head width 256): so would the reference, by 1e-7.
    """
    for rope in model.modules():
        for kind, function in getattr(rope, "rope_init_fns", {}).items():
            with double_pow():
                frequencies, _ = function(rope.config.per_layer_config[kind], layer_type=kind)
            replace_rounded(getattr(rope, f"{kind}_inv_freq"), frequencies)
        if hasattr(rope, "compute_default_rope_parameters") and hasattr(rope, "inv_freq"):  # of one kind in all layers
            with double_pow():
                frequencies, _ = rope.compute_default_rope_parameters(rope.config)
            replace_rounded(rope.inv_freq, frequencies)
    return model


def replace_rounded(buffer, frequencies):
    torch.testing.assert_close(frequencies, buffer, rtol=2**-23, atol=0)
    buffer.copy_(frequencies)


@contextmanager
def double_pow():
    """Powers of a float by a float32 tensor, computed in double and rounded once."""
    power = torch.Tensor.__rpow__

    def rounded_power(exponents, base):
        return power(exponents.double(), torch.tensor(base).item()).to(exponents.dtype)

    with patch.object(torch.Tensor, "__rpow__", rounded_power):
        yield
