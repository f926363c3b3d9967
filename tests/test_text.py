"""Text and token ids: what goes in comes out, and in a stream no character is shown before it is whole."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimtp.checkpoint import Checkpoint, CheckpointError
from minimtp.loading import bundled
from minimtp.text import load_tokenizer

FOLDER = bundled("tiny-gemma4")
VOCAB = json.loads((FOLDER / "config.json").read_text())["text_config"]["vocab_size"]
TOKENIZER = load_tokenizer(Checkpoint(FOLDER, {}, {}), VOCAB)
BYTES = [TOKENIZER.id(f"<0x{byte:02X}>") for byte in range(256)]
TEXTS = ["a", "Hello there", " leading", "  two", "trailing ", "a  b   c", "a\nb\n\nc\n", "\n", "\t\tx", "\r\n", "café",
         "naïve Ångström", "日本語のテキスト", "🙂", "🙂👩‍👩‍👧x", "\u200b", "\x00", "e\u0301", "\U0010ffff", "<0x41>",
         "<not a token>", "ROMEO:\nBut, soft! what light"]  # fmt: skip
# what a tokenizer of this form may not give back: its own special tokens, and ▁, which is its space
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁<\ufffd"), max_size=30)


def streamed(ids, special=False):
    return "".join(map(TOKENIZER.stream(special), ids))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text == streamed(ids)
    assert all(0 <= id < VOCAB for id in ids)


@settings(max_examples=200, deadline=None)
@given(text=texts)
def test_any_text_comes_back(text):
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text == streamed(ids)


def test_characters_outside_the_vocabulary_become_their_bytes():
    assert TOKENIZER.encode("語", special=False) == [BYTES[byte] for byte in "語".encode()]


@pytest.mark.parametrize("text", ["", *TEXTS[:4]])
def test_bos_is_added_once_and_only_where_asked(text):
    bos = TOKENIZER.id("<bos>")
    ids = TOKENIZER.encode(text)
    assert ids[0] == bos and ids.count(bos) == 1
    assert TOKENIZER.encode(text, special=False) == ids[1:]


def test_nothing_is_nothing():
    assert TOKENIZER.encode("", special=False) == []
    assert TOKENIZER.decode([]) == TOKENIZER.decode([], special=True) == ""


def test_special_tokens_are_hidden_or_shown():
    ids = [TOKENIZER.id(token) for token in ("<bos>", "<eos>", "<pad>")]
    hello = TOKENIZER.encode("Hello", special=False)
    assert TOKENIZER.decode([*ids, *hello]) == streamed([*ids, *hello]) == "Hello"
    shown = "<bos><eos><pad>Hello"
    assert TOKENIZER.decode([*ids, *hello], special=True) == streamed([*ids, *hello], special=True) == shown


def test_special_tokens_in_a_text_are_those_tokens():
    ids = TOKENIZER.encode("a<eos>b", special=False)
    assert TOKENIZER.id("<eos>") in ids and TOKENIZER.decode(ids, special=True) == "a<eos>b"


def test_tokens_by_name_and_id():
    for id in (0, 1, 2, VOCAB - 1):
        assert TOKENIZER.id(TOKENIZER.token(id)) == id
    assert TOKENIZER.id("no such token at all") is None


def test_a_character_of_several_bytes_is_streamed_whole():
    ids = [BYTES[byte] for byte in "é🙂".encode()]
    step = TOKENIZER.stream()
    assert [step(id) for id in ids] == ["", "é", "", "", "", "🙂"]


def test_streams_do_not_share_their_state():
    first, second = TOKENIZER.stream(), TOKENIZER.stream()
    a, b = (BYTES[byte] for byte in "é".encode())
    assert [first(a), second(a), first(b), second(b)] == ["", "", "é", "é"]


any_ids = st.lists(st.integers(0, VOCAB - 1) | st.sampled_from(BYTES), max_size=30)


@settings(max_examples=300, deadline=None)
@given(ids=any_ids, special=st.booleans())
def test_any_ids_can_be_streamed(ids, special):
    """Sampling at a high temperature gives bytes that are no text; the rest must not suffer."""
    text = streamed([*ids, TOKENIZER.id("a")], special)
    whole = TOKENIZER.decode([*ids, TOKENIZER.id("a")], special)
    assert text.endswith("a")
    if "\ufffd" not in whole:
        assert text == whole


def test_broken_bytes_do_not_spoil_what_follows():
    cut = [BYTES[byte] for byte in b"\xf0\x9f"]
    hello = TOKENIZER.encode("Hello there", special=False)
    for ids in (cut + hello, [BYTES[0x41], *cut, *hello], [*hello, *cut, *hello]):
        assert streamed(ids).endswith("Hello there") and "\ufffd" in streamed(ids)


@pytest.mark.parametrize("text", ["caf\udce9", "\ud800"])
def test_text_that_is_no_unicode_is_refused(text):
    with pytest.raises(ValueError):
        TOKENIZER.encode(text)


def test_no_tokenizer_is_none(tmp_path):
    assert load_tokenizer(Checkpoint(tmp_path, {}, {}), 10) is None


def test_a_tokenizer_may_be_smaller_than_the_model_but_not_larger():
    assert load_tokenizer(Checkpoint(FOLDER, {}, {}), VOCAB + 100)
    with pytest.raises(CheckpointError, match="tokenizer.json: .* tokens, the model has 100"):
        load_tokenizer(Checkpoint(FOLDER, {}, {}), 100)


BROKEN = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "not a tokenizer": lambda text: '{"model": {"type": "BPE"}}',
    "a list": lambda text: "[]",
    "merge of no token": lambda text: text.replace('"merges"', '"merges": [["x\\ny", "z"]], "m"', 1),
    "escape sequences": lambda text: text.replace('"merges"', '"merges": [["\\u001b[31m", "z"]], "m"', 1),
    "no UTF-8": lambda text: "\udcff" + text,
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_tokenizer_is_refused_in_one_line(tmp_path, how):
    shutil.copy(FOLDER / "tokenizer.json", tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(BROKEN[how](path.read_text(encoding="utf-8")), encoding="utf-8", errors="surrogateescape")
    with pytest.raises(CheckpointError, match="tokenizer.json: not a tokenizer") as caught:
        load_tokenizer(Checkpoint(tmp_path, {}, {}), VOCAB)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 500
