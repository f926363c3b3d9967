"""The tokenizer and the token ids that the metadata of a GGUF file describe."""

from .checkpoint import CheckpointError, show
from .gguf_file import Numbers, Texts

SPECIAL = {2: True, 3: True, 4: False}  # types of tokens that are found whole in any text -> whether they are special
UNUSED = 5
MAX_TOKENS = 1 << 20  # or merges; the largest vocabulary has a quarter of it, and half as many merges
GEMMA_SPECIAL = """<|tool> <tool|> <|tool_call> <tool_call|> <|tool_response> <tool_response|> <|"|> <|think|>
    <|channel> <channel|> <|turn> <turn|> <|image> <|image|> <image|> <|audio> <|audio|> <audio|> <|video|>""".split()
QWEN_SHOWN = "<|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|>".split()
SPELLED = dict.fromkeys(GEMMA_SPECIAL, True) | dict.fromkeys(QWEN_SHOWN, False)  # converters do not keep these types
LETTERS = {"qwen35": r"\p{L}\p{M}", "qwen2": r"\p{L}"}  # what words are made of, by tokenizer.ggml.pre
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[%s]+|\p{N}| ?[^\s%s\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _gemma_bpe(vocabulary, merges, pre):
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


def _byte_bpe(vocabulary, merges, pre):
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    words = pre_tokenizers.Split(Regex(WORDS % (LETTERS[pre], LETTERS[pre])), "isolated")
    tokenizer.normalizer, tokenizer.decoder = normalizers.NFC(), decoders.ByteLevel()  # llama.cpp has no NFC
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


TOKENIZERS = {"gemma4": _gemma_bpe, "gpt2": _byte_bpe}


def build_tokenizer(metadata):
    """The header of a GGUF file -> tokenizers.Tokenizer, or None where it has no tokens."""
    tokens, merges, types, model, pre = (
        metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "merges", "token_type", "model", "pre")
    )
    if tokens is None:
        return None
    if not isinstance(tokens, Texts) or not isinstance(merges, Texts) or not isinstance(types, Numbers):
        raise CheckpointError("tokenizer.ggml.tokens, merges and token_type are not there as lists")
    if max(len(tokens), len(merges)) > MAX_TOKENS:
        raise CheckpointError(f"{len(tokens)} tokens and {len(merges)} merges, more than {MAX_TOKENS}")
    model = "gemma4" if (model, pre) == ("llama", "gemma4") else model  # as Ollama writes it
    if model != "gemma4" and (model != "gpt2" or not isinstance(pre, str) or pre not in LETTERS):
        raise CheckpointError(f"a tokenizer like {show(model)} with {show(pre)} is not known")
    from tokenizers import AddedToken, processors

    texts, types = tokens.list(), types.list()
    vocabulary = {text: i for i, (text, type) in enumerate(zip(texts, types)) if type != UNUSED}
    if len(types) != len(texts) or len(vocabulary) + types.count(UNUSED) != len(texts):
        raise CheckpointError(f"{len(texts)} tokens of {len(types)} types, some of them there twice")
    special = {text: SPELLED.get(text, SPECIAL.get(types[i])) for text, i in vocabulary.items()}
    has_bos = model == "gemma4" or metadata.get("tokenizer.ggml.add_bos_token")  # so does llama.cpp for Gemma
    bos = _token_ids(metadata, "bos") if has_bos else []
    if has_bos and not bos:
        raise CheckpointError("tokenizer.ggml.bos_token_id is missing")
    try:
        tokenizer = TOKENIZERS[model](vocabulary, list(map(_merged, merges.list())), pre)
        tokenizer.add_tokens([AddedToken(t, special=s, normalized=False) for t, s in special.items() if s is not None])
        for id in bos:
            pair = [texts[id], "$A", f"{texts[id]}:1", "$B:1"]
            tokenizer.post_processor = processors.TemplateProcessing(pair[:2], pair, [(texts[id], id)])
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"not a tokenizer: {show(str(error))}") from None
    return tokenizer


def _merged(merge):
    cut = merge.find(" ", 1)  # in front it would be part of the first
    return merge[:cut], merge[cut + 1 :]


def _token_ids(metadata, *names):
    """The ids of the tokens that the header names, of those that it does."""
    ids = [metadata[key] for name in names if (key := f"tokenizer.ggml.{name}_token_id") in metadata]
    tokens = metadata.get("tokenizer.ggml.tokens")
    count = len(tokens) if isinstance(tokens, Texts) else 0
    if not all(type(id) is int and 0 <= id < count for id in ids):
        raise CheckpointError(f"token ids {show(ids)} of {count} tokens")
    return ids


def spelled(metadata, texts):
    """The ids of tokens -> [id, or None for one that is not there]"""
    tokens = metadata.get("tokenizer.ggml.tokens")
    return [tokens.index(text) if isinstance(tokens, Texts) else None for text in texts]


def tokenizer_config(metadata):
    """What a folder's tokenizer_config.json would say, as far as the header of a GGUF file does."""
    names = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    ids = {field_: id for field_, name in names.items() for id in _token_ids(metadata, name)}
    texts, template = metadata["tokenizer.ggml.tokens"].list() if ids else [], metadata.get("tokenizer.chat_template")
    config = {field_: texts[id] for field_, id in ids.items()}
    return config | {"chat_template": template} if isinstance(template, str) else config


def generation_config(metadata, stops):
    """What generation_config.json would say; `stops` are further tokens, as they are spelled, that end a text."""
    prefix, suppressed = "general.sampling.", metadata.get("tokenizer.ggml.suppress_tokens")
    config = {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}
    ids = dict.fromkeys(_token_ids(metadata, "eos", "eot", "eom") + spelled(metadata, stops))
    config |= {"temperature": config.pop("temp", None), "eos_token_id": [id for id in ids if id is not None]}
    config["suppress_tokens"] = suppressed.list() if isinstance(suppressed, Numbers) else None
    return {key: value for key, value in config.items() if not isinstance(value, Numbers | Texts | None)}
