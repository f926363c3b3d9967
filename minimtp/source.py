"""What is to be converted: a configuration, its weights one after the other, and the small files beside them."""

import json
from dataclasses import dataclass, field
from functools import cached_property

from . import qwen35, qwen35_mtp
from .backend import Rounded
from .encode import is_int4, some_rows
from .gguf_model import GgufCheckpoint
from .gguf_write import copied_keys
from .loading import open_model
from .parameters import find_prefix, read_weights
from .text import load_tokenizer

MATRICES = ("linear", "experts", "embedding")
CLASSES = {  # of transformers
    "gemma4_text": "Gemma4ForCausalLM", "gemma4_assistant": "Gemma4AssistantForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM", "qwen3_5_moe_text": "Qwen3_5MoeForCausalLM",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Source:
    """What is to be written: a configuration, and weights that need not exist before they are asked for.

    tensors: (published name, kind as in a family's table or "plus_one", its weights), in turn: one weight, or of
    "experts" all matrices in the order of the published tensor (gate 0, up 0, gate 1 …; down 0, down 1 …), or one array
    for a "permutation". A weight has shape and rows(start, stop, dtype); Plain, Quantized and Blocks keep what they
    hold, and any other may have part(start, stop), which gives one of these for some of its rows.
    """

    config: dict  # config.json
    parsed: object  # the same, as its family has it
    tensors: list
    prefix: str = "model."
    files: dict = field(default_factory=dict)  # of a folder, {name: bytes}, config.json left out
    keys: dict | None = None  # of a GGUF file, those of its text; None: made from the files
    others: dict = field(default_factory=dict)  # tensors that are no part of the language model, for folders
    notes: list = field(default_factory=list)  # for the report

    @cached_property
    def has_int4(self):
        """Whether some weights are int4 already: then those that are not were left alone for a reason."""
        return any(is_int4(some_rows(weights[0], 0, 1)) for _, kind, weights in self.tensors if kind in MATRICES)


def open_source(path):
    """A checkpoint -> Source."""
    checkpoint, family, config = open_model(path)
    models = [(family, config)]
    if family is qwen35 and any(map(qwen35_mtp.owns, checkpoint.tensors)):
        models.append((qwen35_mtp, qwen35_mtp.parse_config(checkpoint.config)))
    raws = checkpoint.tensors.items()
    others = {name: raw for name, raw in raws if not any(each.owns(name) for each, _ in models)}
    found = [entry for model in models for entry in read_weights(checkpoint, *model) if entry[2]]
    tensors = [(name, kind, _stacked([value for _, value in values])) for name, kind, values in found]
    rounded = sum(isinstance(value, Rounded) for _, _, values in found for _, value in values)
    notes = [f"activations of {rounded} layers are no longer rounded to 8 bits"] if rounded else []
    if isinstance(checkpoint, GgufCheckpoint):
        files, keys = _files_of_gguf(checkpoint, config), copied_keys(checkpoint.metadata)
        return Source(_folder_config(checkpoint.config, config), config, tensors, "model.", files, keys, {}, notes)
    prefix, files = find_prefix(checkpoint), _files_of_folder(checkpoint)
    return Source(checkpoint.config, config, tensors, prefix, files, None, others, notes)


def _stacked(values):
    """What read_weights found -> the weights, of experts all matrices in the published order."""
    if isinstance(values[0], list):
        return [weight for each in zip(*values) for weight in each]
    return [value.weight if isinstance(value, Rounded) else value for value in values]


def _files_of_folder(checkpoint):
    """Everything small that is not the configuration or an index of shards."""
    kept = [p for p in checkpoint.folder.iterdir() if p.suffix in (".json", ".jinja", ".txt", ".model") and p.is_file()]
    skipped = ("config.json", "model.safetensors.index.json")
    return {path.name: path.read_bytes() for path in kept if path.name not in skipped}


def _files_of_gguf(checkpoint, config):
    settings, files = checkpoint.settings("tokenizer_config"), {}
    if template := settings.pop("chat_template", None):
        files["chat_template.jinja"] = template
    if tokenizer := load_tokenizer(checkpoint, config.vocab_size):
        files["tokenizer.json"] = tokenizer.backend.to_str(pretty=True)
        files["tokenizer_config.json"] = as_json({"tokenizer_class": "PreTrainedTokenizerFast", **settings})
    generation = checkpoint.settings("generation_config")
    files["generation_config.json"] = as_json(({"do_sample": True} if "top_k" in generation else {}) | generation)
    return {name: text.encode() for name, text in files.items()}


def _folder_config(raw, config):
    """The configuration that a GGUF file was read as, in the fields that published ones have."""
    raw = {k: v for k, v in raw.items() if v is not None}
    raw |= {"architectures": [CLASSES[raw["model_type"]]], "dtype": "bfloat16"}
    if isinstance(raw.get("text_config"), dict):
        text = _folder_config(raw["text_config"], config)
        return raw | {"text_config": {**text, "vocab_size_per_layer_input": 0}}  # an assistant, of which this is asked
    if raw.pop("per_layer_config", None):
        kinds = {layer.kind: layer for layer in config.layers}
        full, short = kinds["full"], kinds.get("sliding", kinds["full"])
        raw |= {"head_dim": short.head_dim, "global_head_dim": full.head_dim, "num_key_value_heads": short.kv_heads}
        if raw.get("attention_k_eq_v"):
            raw["num_global_key_value_heads"] = full.kv_heads
    return raw


def as_json(table):
    return json.dumps(table, indent=2, ensure_ascii=False) + "\n"
