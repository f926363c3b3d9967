"""A conversation with a model, whose cache is kept between turns."""

from itertools import takewhile

from .checkpoint import CheckpointError
from .generate import generate


class Conversation:
    """The messages so far, and a cache that has read them as far as they are still written the same way.

    template_options go to the chat template (enable_thinking and the like). Raises CheckpointError without a template.
    """

    def __init__(self, target, system=None, **template_options):
        self.template = target.chat_template()
        if self.template is None or target.tokenizer is None:
            raise CheckpointError(f"{target.folder} has no chat template or no tokenizer.json")
        self.target, self.system, self.template_options = target, system, template_options
        self.reset()

    def reset(self):
        """Forget everything but the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []
        self._start_over()

    def ask(self, content, **options):
        """The model's answer to a message -> an iterator of Steps; options as for generate.

        An answer that is cut short stays in the conversation as far as it came; without any, the question is dropped.
        """
        self.messages.append({"role": "user", "content": content})
        emitted, text, read = [], "", 0
        try:
            text = self.template.render(self.messages, **self.template_options)
            unread = self._unread(text)
            read = self.cache.length + len(unread)
            for step in generate(self.target, unread, cache=self.cache, commit=False, **options):
                emitted += step.tokens
                yield step
        finally:
            self._take_answer(text, emitted, read)

    def _unread(self, text):
        """Ids of the text that the cache has not read.

        A template may write the last answer anew, without its thoughts for one: then it is un-read back to where the
        texts part, which is why `ask` leaves it uncommitted. Where they part even earlier, all is read again.
        """
        encode, cache = self.target.tokenizer.encode, self.cache
        if self.written and text.startswith(self.written):
            ids = [*self.pending, *encode(text[len(self.written) :], special=False)]
        else:
            ids = encode(text, special=False)
            same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(cache.tokens, ids[:-1])))
            if same < cache.committed:
                self._start_over()
                return ids
            cache.rollback(cache.length - same)
            ids = ids[same:]
        cache.commit()
        return ids

    def _take_answer(self, text, emitted, read):
        """Note what was emitted after a text with which the cache had read that many tokens."""
        decode = self.target.tokenizer.decode
        if emitted:
            said = emitted[:-1] if emitted[-1] in self.target.stop_ids else emitted
            self.messages.append({"role": "assistant", "content": decode(said, special=True)})
            self.written, self.pending = text + decode(emitted, special=True), emitted[-1:]
        else:
            self.messages.pop()
        untold = self.cache.length != read + len(emitted) - 1  # interrupted between a round and the telling of it
        if untold or not emitted:
            self._start_over()

    def _start_over(self):
        self.cache, self.written, self.pending = self.target.new_cache(), "", []
