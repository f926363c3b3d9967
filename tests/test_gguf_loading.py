"""GGUF files as models: what is loaded from one computes, drafts and speaks as the folder that it was made of."""

import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import random_models
import random_qwen
from random_gguf import int4_blocks, is_kept, read_folder, two_heads, unpacked, write_gguf
from tiny import FOLDER, emitted, greedy, same_bits

import minimtp
from minimtp import ggml
from minimtp.checkpoint import CheckpointError
from minimtp.cli import main
from minimtp.gguf_model import open_gguf
from minimtp.loading import bundled, find_drafter, open_model

PROMPT = "ROMEO:\nHow now, my lord?"
MESSAGES = [{"role": "user", "content": "Good morrow!"}]
MODELS = {"tiny-gemma4": "tiny-gemma4-assistant", "tiny-qwen35": None}


def written(name, store="F32"):
    """The bundled model's file, Gemma's assistant beside it -> the target's path."""
    return _written(name, store)


@cache
def _written(name, store):
    folder = Path(FOLDER.name) / f"loading-{name}-{store}"
    folder.mkdir()
    path = write_gguf(folder / f"{name}.gguf", bundled(name), store=lambda *_: store, tokenizer=bundled(name))
    if MODELS[name]:
        write_gguf(folder / f"mtp-{name}.gguf", bundled(MODELS[name]), store=lambda *_: store)
    return path


@cache
def loaded(path, keep="auto"):
    return minimtp.load(path, keep=keep)


def ids(target, text=PROMPT):
    return target.tokenizer.encode(text)


def logits(target, prompt=None):
    prompt = prompt or ids(target)
    return target.forward(prompt[:14], target.new_cache()).logits_TV


def refused(message, call, *arguments):
    with pytest.raises(CheckpointError, match=message) as caught:
        call(*arguments)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 1000


# The bundled models


@pytest.mark.parametrize("name", MODELS)
def test_a_file_in_f32_computes_and_speaks_as_its_folder(name):
    ours, theirs = loaded(written(name)), loaded(name)
    assert ids(ours) == ids(theirs) and same_bits(logits(ours), logits(theirs))
    assert ours.chat_template().render(MESSAGES) == theirs.chat_template().render(MESSAGES)
    assert sorted(ours.stop_ids) == sorted(theirs.stop_ids) and ours.config.placeholders == theirs.config.placeholders
    assert ours.folder == ours.path == written(name) and ours.fingerprint != theirs.fingerprint


@pytest.mark.parametrize("store", ["F32", "Q8_0", "Q4_0"])
@pytest.mark.parametrize("name", MODELS)
def test_greedy_decoding_with_the_drafter_found_is_that_without(name, store):
    path = written(name, store)
    target = loaded(path, "packed")
    assert find_drafter(target) == (path.with_name(f"mtp-{path.name}") if MODELS[name] else path)
    drafter = minimtp.load_drafter("auto", target, keep="packed")
    steps = list(minimtp.generate(target, ids(target), drafter, max_new_tokens=20))
    assert emitted(steps) == greedy(target, ids(target), 20)[0]
    assert sum(step.accepted for step in steps) > 5


def test_what_a_file_has_in_blocks_stays_packed():
    target = loaded(written("tiny-gemma4", "Q4_0"), "packed")
    weights = [target.params.embed_tokens, *(layer.q_proj for layer in target.params.layers)]
    assert all(isinstance(weight, ggml.Blocks) and weight.type == "Q4_0" for weight in weights)
    assert all(isinstance(layer.q_norm, np.ndarray) for layer in target.params.layers)


def test_q4_0_of_the_published_codes_and_steps_is_the_published_model(tmp_path):
    """Rounding the same weights to Q4_0, as ggml does, is another: blocks whose largest code is not -8 are moved."""
    blocks = int4_blocks(bundled("tiny-gemma4"))
    assert len(blocks) == 33
    path = write_gguf(
        tmp_path / "x.gguf", bundled("tiny-gemma4"), store=lambda name, _: blocks.get(name, "F32"),
        tokenizer=bundled("tiny-gemma4"),
    )  # fmt: skip
    ours, theirs = minimtp.load(path, keep="packed"), loaded("tiny-gemma4")
    assert isinstance(ours.params.layers[0].q_proj, ggml.Blocks)
    assert same_bits(logits(ours), logits(theirs))
    rounded = logits(loaded(written("tiny-gemma4", "Q4_0")))
    assert np.abs(rounded - logits(theirs)).max() > 0.1


# Every type


@cache
def wide(family):
    """A checkpoint whose rows are whole blocks of 256; the value heads of Qwen's are not."""
    folder = Path(FOLDER.name) / f"wide-{family}"
    if family == "gemma":
        random_models.write_target(
            folder, 4, hidden_size=256, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2,
            num_global_key_value_heads=1, head_dim=64, global_head_dim=128, sliding_window=6, vocab_size=40,
            layer_types=random_models.layers("sf"), rope_parameters=random_models.rope(), attention_k_eq_v=True,
            final_logit_softcapping=30.0,
        )  # fmt: skip
    else:
        random_qwen.write_model(
            folder, 5, hidden_size=256, num_attention_heads=4, num_key_value_heads=1, head_dim=64, vocab_size=40,
            linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=64,
            rope_parameters=random_qwen.rope(), layer_types=random_qwen.layers("lf"), num_experts=2,
            num_experts_per_tok=1, moe_intermediate_size=256, shared_expert_intermediate_size=256, mtp=False,
        )  # fmt: skip
    return folder


@pytest.mark.parametrize("type", [*ggml.TYPES, "F16", "BF16"])
@pytest.mark.parametrize("family", ["gemma", "qwen"])
def test_a_model_of_any_type_is_that_of_the_numbers_it_stands_for(family, type, tmp_path):
    def unpack(tensors):
        for name, array in tensors.items():
            if not is_kept(name, array):
                tensors[name] = unpacked(array, type)

    packed = write_gguf(tmp_path / "packed.gguf", wide(family), store=lambda *_: type)
    plain = write_gguf(tmp_path / "plain.gguf", wide(family), edit=unpack)
    ours, theirs = minimtp.load(packed, keep="packed"), minimtp.load(plain, keep="packed")
    stored, size = open_gguf(packed).stored, packed.stat().st_size
    assert stored.keys() == {"F32", type} and size * 0.9 < sum(stored.values()) < size < plain.stat().st_size * 0.6
    found, expected = (logits(target, list(range(14))) for target in (ours, theirs))
    assert same_bits(found, expected) and np.isfinite(found).all() and found.std() > 1e-3
    assert same_bits(logits(minimtp.load(packed, keep="dense"), list(range(14))), expected)
    assert same_bits(ours.embed([3, 1]), theirs.embed([3, 1]))


# Both heads in one file


def both(path, **options):
    return write_gguf(path, bundled("tiny-gemma4"), tokenizer=bundled("tiny-gemma4"), **options)


def test_a_file_with_two_heads_holds_the_target_and_its_drafter(tmp_path):
    path = both(tmp_path / "x.gguf", **two_heads(bundled("tiny-gemma4-assistant")))
    target = minimtp.load(path)
    assert same_bits(logits(target), logits(loaded("tiny-gemma4"))) and ids(target) == ids(loaded("tiny-gemma4"))
    assert target.has_mtp and find_drafter(target) == path
    ours, theirs = (minimtp.load_drafter(path, target) for path in ("auto", "tiny-gemma4-assistant"))
    assert ours.config.layers == theirs.config.layers and ours.config.ropes == theirs.config.ropes
    steps, expected = (list(minimtp.generate(target, ids(target), d, max_new_tokens=20)) for d in (ours, theirs))
    assert emitted(steps) == emitted(expected) == greedy(target, ids(target), 20)[0]
    assert [step.draft.tokens for step in steps] == [step.draft.tokens for step in expected]
    assert sum(step.accepted for step in steps) > 5


WRONG = [
    (dict(unheard_of=1), "'gemma4.unheard_of' is not known"),
    ({"rope.dimension_count": 64}, "rope.dimension_count is 64, supported: 16"),
    (dict(embedding_length=None), "key 'embedding_length' is missing"),
    (dict(block_count=None), "num_hidden_layers is missing"),
    (dict(block_count=2**31 - 1), "num_hidden_layers 2147483647 is more than 1000"),
    (dict(block_count=3), "attention.sliding_window_pattern has 4 values for 3 layers"),
    ({"attention.key_length": "64"}, "is missing, or not half of F32"),
    (dict(use_ordered_embeddings=True), "n_centroids is 2048, and there are None"),
]


@pytest.mark.parametrize("changes, message", WRONG)
def test_a_drafter_inside_that_is_not_sound_is_refused(changes, message, tmp_path):
    options = two_heads(bundled("tiny-gemma4-assistant"), **changes)
    refused(message, open_gguf, both(tmp_path / "x.gguf", **options))


def test_two_heads_in_a_layout_that_nobody_is_known_to_write_are_refused(tmp_path):
    def add(tensors):
        tensors["nextn.pre_projection.weight"] = np.ones((4, 4), np.float32)

    path = both(tmp_path / "x.gguf", edit=add)
    refused("unknown tensor 'nextn.pre_projection.weight' in a file of gemma4", open_gguf, path)


# Where files are


@pytest.fixture
def place(tmp_path):
    """Make a folder with copies of files, by name -> the folder."""

    def make(**files):
        folder = tmp_path / "repository"
        folder.mkdir(exist_ok=True)
        for name, source in files.items():
            shutil.copy(source, folder / f"{name.replace('_', '-')}.gguf")
        return folder

    return make


TARGET, DRAFTER = "tiny-gemma4", "mtp-tiny-gemma4.gguf"


def test_a_folder_with_one_target_is_opened_as_that(place):
    file = written(TARGET)
    drafter, folder = (
        file.with_name(DRAFTER),
        place(gemma_it_Q4=file, mmproj_F16=file, mtp_gemma=file.with_name(DRAFTER)),
    )
    target = minimtp.load(folder)
    assert target.folder == folder / "gemma-it-Q4.gguf" and same_bits(logits(target), logits(loaded(TARGET)))
    assert find_drafter(target) == folder / "mtp-gemma.gguf"
    place(gemma_it_Q4_assistant=drafter)
    assert find_drafter(target) == folder / "gemma-it-Q4-assistant.gguf"
    (folder / "gemma-it-Q4-assistant.gguf").rename(folder / "other-assistant.gguf")
    assert find_drafter(target) is None  # which of two?
    place(gemma_it_Q8=file)
    refused("several models: open one of gemma-it-Q4.gguf, gemma-it-Q8.gguf", minimtp.load, folder)
    assert find_drafter(minimtp.load(folder / "gemma-it-Q8.gguf")) is None
    refused(
        "no mtp.* tensors in it, and no gemma-it-Q8-assistant.gguf or mtp-gemma-it-Q8.gguf or gemma-it-Q8-assistant "
        "beside it", minimtp.load_drafter, "auto", minimtp.load(folder / "gemma-it-Q8.gguf"),
    )  # fmt: skip


def test_a_folder_with_a_drafter_alone_is_that_and_no_target(place):
    folder = place(mtp_gemma=written(TARGET).with_name(DRAFTER))
    minimtp.load_drafter(folder, loaded(TARGET))
    refused("'gemma4_assistant' is not a target", minimtp.load, folder)


def test_a_file_behind_a_link_has_its_neighbours_where_the_link_is(place):
    folder = place(mtp_x=written(TARGET).with_name(DRAFTER))
    (folder / "x.gguf").symlink_to(written(TARGET))
    assert find_drafter(minimtp.load(folder / "x.gguf")) == folder / "mtp-x.gguf"


def test_parts_have_the_drafter_of_the_whole(tmp_path):
    first = write_gguf(tmp_path / "x.gguf", bundled(TARGET), parts=40)
    shutil.copy(written(TARGET).with_name(DRAFTER), tmp_path / "x-assistant.gguf")
    assert len(list(tmp_path.glob("x-0000*"))) > 1
    for path in (first, tmp_path):
        target = minimtp.load(path)
        assert target.folder == first and find_drafter(target) == tmp_path / "x-assistant.gguf"


def test_an_assistant_in_a_folder_beside_the_file_is_found(tmp_path):
    path = Path(shutil.copy(written(TARGET), tmp_path / "x.gguf"))
    shutil.copytree(bundled("tiny-gemma4-assistant"), tmp_path / "x-assistant")
    assert find_drafter(minimtp.load(path)) == tmp_path / "x-assistant"


def test_files_of_other_things_say_what_they_are(tmp_path):
    def of(type=None, architecture=None):
        def change(writer):
            if type:
                writer.kv_data[0]["general.type"].value = type
            if architecture:
                writer.kv_data[0]["general.architecture"].value = architecture

        return write_gguf(tmp_path / "x.gguf", wide("gemma"), extra=change)

    refused("x.gguf: not a language model: its general.type is 'mmproj'", minimtp.load, of("mmproj", "clip"))
    refused("unknown architecture 'clip': expected one of gemma4, ", minimtp.load, of(architecture="clip"))
    refused("unknown architecture 'gemma3': expected one of gemma4, ", open_model, of(architecture="gemma3"))


# Commands


def test_commands_take_files(capsys):
    path = str(written("tiny-gemma4", "Q4_0"))
    assert main(["run", "ROMEO:", "--model", path, "-n", "6"]) == 0
    text = capsys.readouterr()
    assert text.out.strip() and "a pass, accepted by depth" in text.err
    assert main(["show", path, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    config, tensors = read_folder(bundled("tiny-gemma4"))
    matrices = sum(array.size for array in tensors.values() if array.ndim == 2)
    assert report["stored_bytes"]["Q4_0"] == matrices * 18 // 32 and report["model"] == path
    assert main(["bench", path, "--prompts", "1", "-n", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["identical"]
