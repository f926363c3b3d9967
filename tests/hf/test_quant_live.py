"""Against compressed-tensors itself: its packed weights are read, and ours are written, bit for bit."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from minimtp.checkpoint import float_to_bf16, open_checkpoint, write_safetensors  # noqa: E402
from minimtp.formats import FORMATS, parse_quantization, read_weight  # noqa: E402
from minimtp.quant import pack  # noqa: E402

ARGS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
SCHEME = QuantizationScheme(targets=["Linear"], weights=ARGS)
CONFIG = QuantizationConfig(
    config_groups={"group_0": SCHEME}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
)
SIZES = [(1, 32), (3, 64), (64, 96), (65, 512), (130, 1024)]


def random_weight(rows, columns, seed=0):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns) * torch.randn(rows, 1).exp()
    weight[0, :32] = 0 if columns > 32 else weight[0, :32]
    return weight


def minmax_scale(weight):
    """The scales of compressed-tensors' symmetric minmax, in float32 [out, in/32]."""
    groups = weight.unflatten(1, (-1, 32))
    return calculate_qparams(groups.amin(-1), groups.amax(-1), ARGS)[0]


def theirs(weight, scale_dtype):
    """compressed-tensors' own state dict of a weight, and what it decompresses to."""
    scale = minmax_scale(weight).to(scale_dtype)
    packed = PackedQuantizationCompressor.compress({"weight": weight.to(scale_dtype), "weight_scale": scale}, SCHEME)
    return packed, PackedQuantizationCompressor.decompress(packed, SCHEME)["weight"]


def same_bits(a, b):
    """Equal to the last bit: -0 is not 0."""
    as_integers = {4: torch.int32, 2: torch.int16}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.view(as_integers), b.view(as_integers))


def opened(folder, state):
    save_file({f"q_proj.{name}": value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": CONFIG.to_dict()}))
    checkpoint = open_checkpoint(folder)
    return read_weight(checkpoint.tensors, "q_proj", parse_quantization(checkpoint.config))[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_we_read_what_compressed_tensors_packs(tmp_path, size, scale_dtype):
    packed, weight = theirs(random_weight(*size), scale_dtype)
    ours = opened(tmp_path, packed)
    exact = ours.dequantize(np.float64)
    assert weight.dtype == scale_dtype and ours.shape == size
    # it multiplies in the scales' type, so with 16-bit scales its weights are ours, rounded once more
    assert same_bits(torch.from_numpy(exact).to(scale_dtype), weight)
    wide = {**packed, "weight_scale": packed["weight_scale"].float()}
    in_float32 = PackedQuantizationCompressor.decompress(wide, SCHEME)["weight"]
    assert same_bits(torch.from_numpy(ours.dequantize(np.float32)), in_float32)


@pytest.mark.parametrize("size", SIZES)
def test_we_pack_as_compressed_tensors_does(tmp_path, size):
    """Rounding to its own scales, and writing: the same bytes in all three tensors."""
    weight = random_weight(*size, seed=1)
    ours = pack(weight.numpy(), name="q_proj")
    scale = minmax_scale(weight).bfloat16()
    # float weights over bf16 scales: the quotient is taken in float32
    packed = PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, SCHEME)
    write_safetensors(tmp_path / "ours.safetensors", FORMATS["pack-quantized"].write("q_proj", ours))
    written = load_file(tmp_path / "ours.safetensors")
    assert sorted(written) == ["q_proj.weight_packed", "q_proj.weight_scale", "q_proj.weight_shape"]
    for name, value in packed.items():
        mine = written[f"q_proj.{name}"]
        assert mine.dtype == value.dtype and torch.equal(mine, value), name


def test_bf16_is_rounded_as_torch_rounds_it():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)[~np.isnan(bits.view(np.float32))]
    assert np.array_equal(float_to_bf16(x).view(np.int16), torch.from_numpy(x).bfloat16().view(torch.int16).numpy())
