"""Google's mobile layout: int2, int4 and int8 weights, one scale a row, and activations rounded by fixed scales.

As transformers 5.22 reads it (quant_method "gemma", integrations/gemma_quant.py). Codes of 2 and 4 bits are packed in
uint8 along `in`, the first lowest, as code + 2^(bits-1), those of 8 bits are int8. A linear layer X is X.weight,
X.weight_scale [out, 1], X.input_activation_scale and X.output_activation_scale (0: not rounded); an embedding
X.embedding_quantized, X.embedding_scale [V, blocks]. The k_cache_scale and v_cache_scale of a layer are for caches in 8
bits: transformers reads none, and here they are only reported.
"""

from dataclasses import dataclass

import numpy as np

from .backend import Rounded
from .checkpoint import FLOATS, CheckpointError, show
from .config import name_patterns
from .quant import Plain, Quantized, find_tensor

WIDTHS = (2, 4, 8)
SCALES = ("BF16", "F16", "F32")
ACTIVATION_SCALES = (".input_activation_scale", ".output_activation_scale")
CACHE_SCALES = (".k_cache_scale", ".v_cache_scale")
WHERE = "config: quantization_config"


# What config.json says


@dataclass(frozen=True)
class MobileConfig:
    """Which modules are quantized, and to how many bits; the tensors must agree."""

    bits: int
    overrides: list  # of (pattern, bits)
    kept: dict  # text -> its pattern, of modules left as they are
    embeddings: bool
    quant_method = "gemma"

    def bits_of(self, name):
        """-> (bits of a module's weight, or None: not quantized; which field says so), as transformers decides it.

        Of patterns that match, the one that does so first in the name wins, then the first in the table.
        """
        for text, pattern in self.kept.items():
            if pattern.match(name) or name.endswith(text):
                return None, f"modules_to_not_convert {show(text)}"
        if is_embedding(name) and not self.embeddings:
            return None, "quantize_embeddings"
        found = [(match.start(), i) for i, (pattern, _) in enumerate(self.overrides) if (match := pattern.search(name))]
        if found:
            pattern, bits = self.overrides[min(found)[1]]
            return bits, f"module_quant_configs {show(pattern.pattern)}"
        return self.bits, "num_bits"

    def check(self, name, raw):
        """Raise CheckpointError, with both sides, unless the tensor has the type that config.json gives the module."""
        bits, field = self.bits_of(name)
        dtypes = {None: FLOATS, 8: ("I8",)}.get(bits, ("U8",))
        suffix = "embedding_quantized" if bits and is_embedding(name) else "weight"
        if raw.dtype not in dtypes or raw.name != f"{name}.{suffix}":
            wanted = f"{bits} bits, {show(f'{name}.{suffix}')} in {dtypes[0]}" if bits else "not quantized"
            found = f"{raw.file}: {show(raw.name)} is {raw.dtype}"
            raise CheckpointError(f"{found}, but quantization_config.{field} says {wanted}")

    def describe(self, name):
        bits, field = self.bits_of(name)
        return f" ({bits} bits, quantization_config.{field} says)"


def is_embedding(name):
    return name.rpartition(".")[2].startswith("embed_tokens")


def parse_mobile(table, tied):
    """quantization_config -> MobileConfig. tied: whether the head is the embedding. CheckpointError names a field."""
    embeddings, overrides = table.get("quantize_embeddings", False), table.get("module_quant_configs") or {}
    if type(embeddings) is not bool:
        raise CheckpointError(f"{WHERE}.quantize_embeddings is {show(embeddings)}, expected true or false")
    if not isinstance(overrides, dict):
        raise CheckpointError(f"{WHERE}.module_quant_configs is {show(overrides)}, expected a table")
    bits, found, at = _width(table, WHERE), [], f"{WHERE}.module_quant_configs"
    for text, pattern in name_patterns(overrides, at).items():
        options = overrides[text]
        if not isinstance(options, dict) or options.keys() - {"num_bits"}:
            raise CheckpointError(f"{at}.{show(text)} is {show(options)}, expected num_bits alone")
        found.append((pattern, _width({"num_bits": bits, **options}, f"{at}.{show(text)}")))
    kept = table.get("modules_to_not_convert")
    if kept is None:  # what transformers then keeps of a text model
        kept = ["lm_head", "embed_tokens"] if tied else ["lm_head"]
    at = f"{WHERE}.modules_to_not_convert"
    if not isinstance(kept, list):
        raise CheckpointError(f"{at} is {show(kept)}, expected a list")
    until_boundary = {"prefix": "(?:", "suffix": r")(?:(?<=\.)|(?=\.|$))"}
    return MobileConfig(bits, found, name_patterns(kept, at, **until_boundary), embeddings)


def _width(table, where):
    bits = table.get("num_bits", 4)
    if type(bits) is not int or bits not in WIDTHS:
        raise CheckpointError(f"{where}.num_bits is {show(bits)}, supported: 2, 4, 8")
    return bits


# What the tensors say; as the readers of formats.py


def read_linear(tensors, name, quantization):
    """X.weight, X.weight_scale and the scales of X's input and output -> Quantized, perhaps Rounded."""
    weight, names = _read(tensors, name, "weight", "weight_scale", quantization)
    scales = [_activation_scale(tensors, name + suffix) for suffix in ACTIVATION_SCALES]
    names += tuple(name + suffix for suffix in ACTIVATION_SCALES if name + suffix in tensors)
    return Rounded(weight, *scales) if any(scales) else weight, names


def read_embedding(tensors, name, quantization):
    """X.embedding_quantized, X.embedding_scale -> Quantized, in as many groups as there are scales for a row."""
    return _read(tensors, name, "embedding_quantized", "embedding_scale", quantization)


def _read(tensors, name, codes, scales, quantization):
    raw, bits = tensors[f"{name}.{codes}"], quantization.bits_of(name)[0]
    if len(raw.shape) != 2 or not raw.data.size:
        raise CheckpointError(f"{raw.file}: {show(raw.name)} is {list(raw.shape)}, expected rows")
    rows, columns = raw.shape[0], raw.shape[1] * 8 // bits
    found = tensors.get(f"{name}.{scales}")
    blocks = found.shape[1] if codes != "weight" and found is not None and len(found.shape) == 2 else 1
    scale = find_tensor(tensors, f"{name}.{scales}", SCALES, (rows, blocks))
    if not blocks or columns % blocks:
        raise CheckpointError(f"{scale.file}: {show(scale.name)} has {blocks} blocks for rows of {columns}")
    packed = raw.stored() ^ np.int8(-128) if bits == 8 else raw.stored()  # two's complement: code + 128
    plain = Plain(scale.stored(), scale.dtype, scale.name)
    return Quantized(packed.view(np.uint8), plain, columns // blocks, bits, raw.name), (raw.name, scale.name)


def _activation_scale(tensors, name):
    """-> float, None where it is 0 or absent: not calibrated, so not applied."""
    if name not in tensors:
        return None
    scale = read_scalar(tensors[name])
    if scale < 0:
        raise CheckpointError(f"{tensors[name].file}: {show(name)} is {scale}, expected a scale, or 0 for none")
    return scale or None


def read_scalar(raw):
    """A tensor of one float. CheckpointError for another, or one that is not finite."""
    if raw.dtype not in SCALES or raw.shape not in ((), (1,)) or not np.isfinite(value := raw.to("float64").item()):
        raise CheckpointError(
            f"{raw.file}: {show(raw.name)}: expected one finite float, not {raw.dtype} {list(raw.shape)}"
        )
    return value


def cache_scales(tensors):
    """{name: value} of the cache scales among tensors."""
    return {name: read_scalar(raw) for name, raw in tensors.items() if name.endswith(CACHE_SCALES)}
