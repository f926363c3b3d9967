"""Text to token ids and back: the checkpoint's own tokenizer, and its chat template in a sandbox."""

import json
from dataclasses import dataclass
from datetime import datetime

from .checkpoint import CheckpointError, show
from .gguf_model import GgufCheckpoint

MAX_TEXT = 10_000_000  # characters that a chat template may write
MAX_PENDING = 8  # a character has at most four bytes; more that make none are shown as they are


class ChatTemplateError(ValueError):
    """A chat template that refuses a conversation, or cannot write it down."""


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer."""

    backend: object  # tokenizers.Tokenizer

    def encode(self, text, special=True):
        """Token ids of the text, with the tokens that the tokenizer itself puts around it (`<bos>`) where special.

        Raises ValueError for a string that is not Unicode text (lone surrogates, as from undecodable input).
        """
        text.encode()
        return self.backend.encode(text, add_special_tokens=special).ids

    def decode(self, ids, special=False):
        """Text of the ids, with or without special tokens."""
        return self.backend.decode(list(ids), skip_special_tokens=not special)

    def token(self, id):
        """The token itself, as the vocabulary spells it."""
        return self.backend.id_to_token(id)

    def id(self, token):
        """Id of a token spelled as in the vocabulary, or None."""
        return self.backend.token_to_id(token)

    def stream(self, special=False):
        """A function from the next id to the text that it completes ("" inside a character of several bytes)."""
        before, pending = [], []  # the ids of the text shown last, for a tokenizer that strips what it decodes first

        def step(id):
            nonlocal before, pending
            pending.append(id)
            text = self.decode(before + pending, special)[len(self.decode(before, special)) :]
            broken = text.endswith("\ufffd")  # the middle of a character, or bytes that are none
            if broken and len(pending) < MAX_PENDING:
                return ""
            before, pending = [] if broken else pending, []
            return text

        return step


@dataclass(frozen=True)
class ChatTemplate:
    """A checkpoint's chat template, which says how a conversation is written down. It runs in a sandbox."""

    template: object
    tokens: dict  # bos_token and the like, which templates name

    def render(self, messages, **options):
        """Text of a conversation up to where the model's answer begins.

        messages: [{"role": ..., "content": ...}]; options: the template's own, like enable_thinking. Raises
        ChatTemplateError with the template's words where it refuses the messages.
        """
        import jinja2

        defaults = {"add_generation_prompt": True, "tools": None, "documents": None}
        names = {"messages": messages, **defaults, **self.tokens, **options}
        text = ""
        try:
            for piece in self.template.generate(**names):
                text += piece
                if len(text) > MAX_TEXT:
                    raise ValueError(f"more than {MAX_TEXT} characters")
        except (jinja2.TemplateError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
            raise ChatTemplateError(f"chat template: {error}") from None
        except RecursionError:
            raise ChatTemplateError("chat template: endless recursion") from None
        except MemoryError:
            raise ChatTemplateError("chat template: more text than there is memory for") from None
        return text


def load_tokenizer(checkpoint, vocab_size):
    """The checkpoint's tokenizer, or None where it has none. Raises CheckpointError if it is broken or too large."""
    path = checkpoint.folder / "tokenizer.json"
    if isinstance(checkpoint, GgufCheckpoint):
        path, backend = checkpoint.folder, checkpoint.tokenizer()
    else:
        backend = _read_tokenizer(path) if path.is_file() else None
    if backend is None:
        return None
    if backend.get_vocab_size() > vocab_size:
        raise CheckpointError(f"{path}: {backend.get_vocab_size()} tokens, the model has {vocab_size}")
    return Tokenizer(backend)


def _read_tokenizer(path):
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer: {show(str(error))}") from None


def load_chat_template(checkpoint):
    """The checkpoint's chat template (chat_template.jinja, else tokenizer_config's), or None where it has none.

    Raises CheckpointError where it does not compile.
    """
    import jinja2

    settings = checkpoint.settings("tokenizer_config")
    path = checkpoint.folder / "chat_template.jinja"
    try:
        source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
        if isinstance(source, list):  # several by name; the conversation's is called "default"
            source = next(
                (e.get("template") for e in source if isinstance(e, dict) and e.get("name") == "default"), None
            )
        if source is None:
            return None
        template = _environment().from_string(source)
    except (jinja2.TemplateError, TypeError, SyntaxError, RecursionError, UnicodeError) as error:
        raise CheckpointError(f"{checkpoint.folder}: chat template: {error}") from None
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    return ChatTemplate(template, {name: _content(settings[name]) for name in names if settings.get(name)})


def _content(token):
    return token.get("content", "") if isinstance(token, dict) else token


def _environment():
    """Jinja as transformers sets it up for chat templates."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj, attribute):  # Jinja would write nothing in its place, and go on
            raise SecurityError(f"access to attribute {attribute!r} of {type(obj).__name__!r} object is unsafe.")

    class Generation(Extension):  # {% generation %} marks what a model said, for training: here it is just text
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(["name:endgeneration"], drop_needle=True), lineno=line)

    def refuse(message):
        raise TemplateError(message)

    def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation])
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment
