"""Text to token ids and back: the checkpoint's own tokenizer, and its chat template in a sandbox."""

from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers.decoders import DecodeStream

from .checkpoint import CheckpointError


@dataclass(frozen=True)
class Tokenizer:
    """A checkpoint's tokenizer.json."""

    backend: Backend

    def encode(self, text, special=True):
        """Token ids of the text, with the tokens that the tokenizer itself puts around it (`<bos>`) where special."""
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
        decoder = DecodeStream(skip_special_tokens=not special)
        return lambda id: decoder.step(self.backend, id) or ""


def load_tokenizer(folder, vocab_size):
    """The folder's tokenizer, or None where it has none. Raises CheckpointError if it is broken or too large."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer(Backend.from_file(str(path)))
    except Exception as error:  # the library raises plain Exception
        raise CheckpointError(f"{path}: not a tokenizer: {error}") from None
    if tokenizer.backend.get_vocab_size() > vocab_size:
        raise CheckpointError(f"{path}: {tokenizer.backend.get_vocab_size()} tokens, the model has {vocab_size}")
    return tokenizer
