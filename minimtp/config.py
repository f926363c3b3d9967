"""Fields of a published config.json, believed after a check; what one asks for and no forward knows is refused."""

import re

from .checkpoint import CheckpointError, show

MAX_STEPS = 10_000_000  # to match one name of a module with patterns: some hundredths of a second
NAME_LENGTH = 50
MAX_LAYERS = 1000  # a config that claims more is not believed: a plan and a table are made before any weight is read

_REQUIRED = object()


def config_value(table, key, kind, default=_REQUIRED):
    """A field of a configuration, or the default where it is absent or null.

    kind: int (1 to 2^31 - 1), float (1e-30 to 1e30), bool, str, list or dict. Raises CheckpointError naming the field;
    without a default it must be there.
    """
    value = table.get(key)
    if value is None:
        if default is _REQUIRED:
            raise CheckpointError(f"config: {key} is missing")
        return default
    if kind is float:
        fits = type(value) in (int, float) and 1e-30 <= value <= 1e30  # nothing here is NaN, below 0, or past float32
    else:
        fits = type(value) is kind and (kind is not int or 1 <= value < 2**31)
    if not fits:
        wanted = {int: "a positive integer", float: "a positive number", dict: "an object"}.get(
            kind, f"a {kind.__name__}"
        )
        raise CheckpointError(f"config: {key} is {show(value)}, expected {wanted}")
    return float(value) if kind is float else value


def config_size(table, key, default=0):
    """A size that may be 0."""
    return 0 if table.get(key) == 0 else config_value(table, key, int, default)


def layer_count(text):
    """num_hidden_layers, if it is to be believed."""
    count = config_value(text, "num_hidden_layers", int)
    if count > MAX_LAYERS:
        raise CheckpointError(f"config: num_hidden_layers {count} is more than {MAX_LAYERS}")
    return count


def layer_kinds(types, count, kinds):
    """The published layer_types -> the kinds they are called here. Raises CheckpointError unless there are `count`."""
    if len(types) != count or any(not isinstance(kind, str) or kind not in kinds for kind in types):
        raise CheckpointError(f"config: layer_types must name {count} layers, each one of {', '.join(kinds)}")
    return [kinds[kind] for kind in types]


def name_patterns(texts, where, prefix="", suffix=""):
    """Regular expressions over names of modules, from a config.json -> {text: pattern}, between prefix and suffix.

    Raises CheckpointError for what is none, or could take long: Python's matching is exponential in repeats of groups,
    so there may be none, and a power of a name's length in the number of other repeats.
    """
    if sum(max(1000, NAME_LENGTH ** _repeats(text, where)) for text in texts) > MAX_STEPS:
        raise CheckpointError(f"{where}: patterns that could take long: too many, or with too many repeats")
    try:
        return {text: re.compile(f"{prefix}{text}{suffix}") for text in texts}
    except (re.error, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{where}: not a pattern: {show(str(error))}") from None


def _repeats(text, where):
    """How many repeats are in a pattern. CheckpointError for one of groups, and for what looks otherwise odd."""
    if not isinstance(text, str) or len(text) > 1000:
        raise CheckpointError(f"{where}: {show(text)} is not a pattern")
    bare = re.sub(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", "x", text, flags=re.DOTALL)  # escapes and sets: one character
    bare = re.sub(r"\(\?(?:[:=!]|<[=!])", "(", bare)
    if re.search(r"\)[*+{]|\(\?", bare):
        raise CheckpointError(f"{where}: pattern {show(text)} repeats a group, or is of an unknown kind")
    return len(re.findall(r"[*+?{]", bare))


def refuse_unsupported(text, supported):
    """Raise CheckpointError for a field that would change the numbers; supported: {field: the values that are known}"""
    for name, values in supported.items():
        if text.get(name) not in values:
            raise CheckpointError(f"config: {name} {show(text[name])} is not supported")


def placeholders(raw, vocab_size):
    """{id: what it stands for} of the tokens whose embedding another tower would provide."""
    names = {"image_token_id": "an image", "video_token_id": "a video", "audio_token_id": "a sound"}
    ids = {config_value(raw, name, int, None): meaning for name, meaning in names.items()}
    return {token: meaning for token, meaning in ids.items() if token is not None and token < vocab_size}
