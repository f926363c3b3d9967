"""Against compressed-tensors itself: its packed weights are read, and ours are written, bit for bit."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor  # noqa: E402
from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme  # noqa: E402
from compressed_tensors.quantization.utils import calculate_qparams  # noqa: E402
from double import double, load_reference  # noqa: E402
from random_models import CONFIGS, write_target  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from test_loading import edit_tensors  # noqa: E402

import minimtp  # noqa: E402
from minimtp.checkpoint import float_to_bf16, open_checkpoint, write_safetensors  # noqa: E402
from minimtp.formats import FORMATS, parse_quantization, read_weight  # noqa: E402
from minimtp.quant import pack  # noqa: E402

ARGS = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=32)
SCHEME = QuantizationScheme(targets=["Linear"], weights=ARGS)
CONFIG = QuantizationConfig(
    config_groups={"group_0": SCHEME}, format="pack-quantized", quantization_status="compressed", ignore=["lm_head"]
)
VARIANTS = [  # bits, group (None: a whole row), symmetric
    (4, 32, True), (4, 32, False), (4, 64, False), (4, 128, True), (4, 128, False), (4, None, True), (4, None, False),
    (8, 32, False), (8, 128, True), (8, None, True), (8, None, False), (2, 64, True), (2, 64, False), (2, None, False),
]  # fmt: skip
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


def opened(folder, state, config=CONFIG):
    save_file({f"q_proj.{name}": value.contiguous() for name, value in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config.to_dict()}))
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


def scheme_of(bits, group, symmetric, targets=("Linear",)):
    args = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    args = QuantizationArgs(num_bits=bits, type="int", symmetric=symmetric, **args)
    return QuantizationScheme(targets=list(targets), weights=args)


def packed_by(scheme, weight, scale_dtype):
    """compressed-tensors' own state dict, with its own scales and zero points."""
    args = scheme.weights
    groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": weight.to(scale_dtype), "weight_scale": scale.to(scale_dtype)}
    if not args.symmetric:
        state["weight_zero_point"] = zero_point.to(torch.int8)
    return PackedQuantizationCompressor.compress(state, scheme)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_variant_unpacks_to_the_same_bits(tmp_path, variant, scale_dtype):
    """67 rows: a remainder in the words of zero points, whatever their bits."""
    scheme, weight = scheme_of(*variant), random_weight(67, 384, seed=2) + torch.rand(67, 1)
    packed = packed_by(scheme, weight, scale_dtype)
    if not variant[2]:
        assert packed["weight_zero_point"].dtype == torch.int32 and packed["weight_zero_point"].any()
    config = QuantizationConfig(
        config_groups={"all": scheme}, format="pack-quantized", quantization_status="compressed"
    )
    ours = opened(tmp_path, packed, config)
    # it computes in the scales' type, so with 16-bit scales its weights are ours, rounded once more
    theirs = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert same_bits(torch.from_numpy(ours.dequantize(np.float64)).to(scale_dtype), theirs)
    wide = {**packed, "weight_scale": packed["weight_scale"].float()}
    theirs = PackedQuantizationCompressor.decompress(wide, scheme)["weight"]
    assert same_bits(torch.from_numpy(ours.dequantize(np.float32)), theirs)
    assert same_bits(torch.from_numpy(ours.rows(5, 66, np.float32)), theirs[5:66].clone())
    assert same_bits(torch.from_numpy(ours.take([66, 0, 9], np.float32)), theirs[[66, 0, 9]])


TARGETS = {
    "by_class": (4, 32, True, ["Linear"]),
    "by_pattern": (8, None, True, ["re:.*down_proj", "re:.*layers.1.*gate"]),
    "by_earlier_pattern": (8, 64, False, ["re:.*0.mlp.*up"]),
    "by_later_pattern": (2, 64, True, ["re:.*up_proj$"]),
    "by_name": (4, None, False, ["layers.1.mlp.up_proj"]),
    "again_by_class": (4, 128, True, ["Embedding"]),
}


def test_targets_choose_as_theirs_do():
    """Names before patterns, patterns by the alphabet, classes last; of the same target twice, the last."""
    from compressed_tensors.quantization import apply_quantization_config

    model = torch.nn.ModuleDict({"embed_tokens": torch.nn.Embedding(9, 128), "layers": torch.nn.ModuleList()})
    for _ in range(3):
        mlp = {name: torch.nn.Linear(128, 128) for name in ("gate_proj", "up_proj", "down_proj")}
        model["layers"].append(torch.nn.ModuleDict({"mlp": torch.nn.ModuleDict(mlp)}))
    groups = {name: scheme_of(*variant) for name, variant in TARGETS.items()}
    config = QuantizationConfig(config_groups=groups, format="pack-quantized", quantization_status="compressed")
    apply_quantization_config(model, config)
    ours, chosen = parse_quantization({"quantization_config": json.loads(json.dumps(config.to_dict()))}), set()
    for name, module in model.named_modules():
        if hasattr(module, "quantization_scheme"):
            args, scheme = module.quantization_scheme.weights, ours.scheme_of(name)
            assert (scheme.bits, scheme.group, scheme.symmetric) == (args.num_bits, args.group_size, args.symmetric), (
                name
            )
            chosen.add(scheme.field)
    assert len(chosen) == 6


def test_a_stored_head_that_is_not_its_embedding_is_used_as_transformers_uses_it(tmp_path):
    """It warns, and does not tie what config.json says is tied."""
    config = CONFIGS["int4_sharded"]["target"] | dict(shards=1, int4=False, store="F32", store_lm_head=True)
    write_target(tmp_path, 3, **config)

    def another(tensors):
        tensors["lm_head.weight"] = ("F32", tensors["lm_head.weight"][1][::-1].copy())

    edit_tensors(tmp_path, another)
    ids_T, target = list(range(20)), minimtp.load(tmp_path, dtype="float64")
    model = load_reference(tmp_path)
    with torch.no_grad(), double(model):
        theirs_TV = model(torch.tensor([ids_T])).logits[0].numpy()
    assert target.config.tied and np.abs(target.forward(ids_T, target.new_cache()).logits_TV - theirs_TV).max() < 1e-9


def test_bf16_is_rounded_as_torch_rounds_it():
    bits = np.random.default_rng(0).integers(0, 2**32, 200_000, dtype=np.uint32)
    x = bits.view(np.float32)[~np.isnan(bits.view(np.float32))]
    assert np.array_equal(float_to_bf16(x).view(np.int16), torch.from_numpy(x).bfloat16().view(torch.int16).numpy())
