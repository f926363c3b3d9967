"""Conversations: how they are written down, what the cache keeps of them, and how they survive what happens to them."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys
from copy import copy
from functools import cache
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
from test_numerical import worst

import minimtp
from minimtp import chat, cli
from minimtp.cache import Cache
from minimtp.chat import Conversation
from minimtp.checkpoint import Checkpoint, CheckpointError
from minimtp.generate import generate
from minimtp.layers import Output, token_ids
from minimtp.loading import Target, bundled
from minimtp.sampling import Sampling, recommended
from minimtp.text import load_chat_template

FOLDER = bundled("tiny-gemma4")
BOS, TURN, END, CHANNEL, CHANNEL_END, LOOK = 2, 105, 106, 100, 101, 89
WORDS = range(5, 46)  # ids of <unused5> and so on: what they spell is encoded as they were

# The turns of the published templates of the large sizes, without tools and media: a system turn that may switch
# thinking on, thoughts taken out of earlier answers, and an empty thought before an answer without thinking.
PUBLISHED = """
{%- macro spoken(text) -%}
    {%- for part in text.split('<channel|>') -%}{{- part.split('<|channel>')[0] -}}{%- endfor -%}
{%- endmacro -%}
{{- bos_token -}}
{%- set system = messages[0]['role'] == 'system' -%}
{%- if enable_thinking or system -%}
    {{- '<|turn>system\n' -}}
    {%- if enable_thinking -%}{{- '<|think|>' -}}{%- endif -%}
    {%- if system -%}{{- messages[0]['content'] | trim -}}{%- endif -%}
    {{- '<turn|>\n' -}}
{%- endif -%}
{%- for message in messages[1 if system else 0:] -%}
    {%- if message['role'] == 'assistant' -%}
        {{- '<|turn>model\n' + spoken(message['content']) | trim + '<turn|>\n' -}}
    {%- else -%}
        {{- '<|turn>' + message['role'] + '\n' + message['content'] | trim + '<turn|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|turn>model\n' -}}
    {%- if not enable_thinking | default(false) -%}{{- '<|channel>thought\n<channel|>' -}}{%- endif -%}
{%- endif -%}
"""
SYSTEM, USER, MODEL = "<|turn>system\n", "<|turn>user\n", "<|turn>model\n"
QUIET = "<|channel>thought\n<channel|>"
HELLO = {"role": "user", "content": " Hello\n"}
TALK = [
    HELLO,
    {"role": "assistant", "content": "<|channel>thought\nwell<channel|>Hi "},
    {"role": "user", "content": "Bye"},
]
BRIEF = {"role": "system", "content": "Be brief."}


@pytest.fixture
def folder_with(tmp_path):
    """A function: a chat template, and changes of generation_config.json -> a copy of the bundled model with them."""

    def write(template=None, **generation):
        folder = shutil.copytree(FOLDER, tmp_path / "model", dirs_exist_ok=True)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)
        path = folder / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | generation))
        return folder

    return write


@pytest.fixture
def template_of(tmp_path):
    """A function: the source of a chat template -> ChatTemplate, with a bos_token."""

    def load(source):
        (tmp_path / "chat_template.jinja").write_text(source)
        (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<bos>"}')
        return load_chat_template(Checkpoint(tmp_path, {}, {}))

    return load


# Templates -----------------------------------------------------------------------------------------------------------

WRITTEN = {
    "a question": ([HELLO], {}, f"{USER}Hello<turn|>\n{MODEL}{QUIET}"),
    "with thinking": ([HELLO], dict(enable_thinking=True), f"{SYSTEM}<|think|><turn|>\n{USER}Hello<turn|>\n{MODEL}"),
    "thinking off": ([HELLO], dict(enable_thinking=False), f"{USER}Hello<turn|>\n{MODEL}{QUIET}"),
    "system": ([BRIEF, HELLO], {}, f"{SYSTEM}Be brief.<turn|>\n{USER}Hello<turn|>\n{MODEL}{QUIET}"),
    "both": (
        [BRIEF, HELLO], dict(enable_thinking=True),
        f"{SYSTEM}<|think|>Be brief.<turn|>\n{USER}Hello<turn|>\n{MODEL}",
    ),
    "history": (TALK, {}, f"{USER}Hello<turn|>\n{MODEL}Hi<turn|>\n{USER}Bye<turn|>\n{MODEL}{QUIET}"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITTEN)
def test_the_published_form_of_turns(template_of, case):
    messages, options, expected = WRITTEN[case]
    assert template_of(PUBLISHED).render(messages, **options) == "<bos>" + expected


def test_the_bundled_template_writes_turns_of_that_form():
    text = load_chat_template(Checkpoint(FOLDER, {}, {})).render(
        [BRIEF, HELLO, {"role": "assistant", "content": "Hi"}, HELLO]
    )
    assert text == f"<bos>{SYSTEM}Be brief.<turn|>\n{USER}Hello<turn|>\n{MODEL}Hi<turn|>\n{USER}Hello<turn|>\n{MODEL}"
    ids = target().tokenizer.encode(text, special=False)
    assert [ids.count(token) for token in (BOS, TURN, END)] == [1, 5, 4]


def test_where_templates_are_found(tmp_path):
    """chat_template.jinja before tokenizer_config.json, a list of them by the name "default", tokens as objects."""
    settings = tmp_path / "tokenizer_config.json"
    assert load_chat_template(Checkpoint(tmp_path, {}, {})) is None
    settings.write_text(json.dumps({"chat_template": "{{ bos_token }}a", "bos_token": {"content": "<bos>"}}))
    assert load_chat_template(Checkpoint(tmp_path, {}, {})).render([]) == "<bos>a"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "b"}]
    settings.write_text(json.dumps({"chat_template": named}))
    assert load_chat_template(Checkpoint(tmp_path, {}, {})).render([]) == "b"
    (tmp_path / "chat_template.jinja").write_text("c")
    assert load_chat_template(Checkpoint(tmp_path, {}, {})).render([]) == "c"


def test_what_templates_are_given_as_transformers_gives_it(template_of):
    helpers = "{{ [1, 'ä<'] | tojson }} {{ strftime_now('%Y') | length }}{% for i in range(9) %}{% break %}{% endfor %}"
    assert template_of(helpers).render([]) == '[1, "ä<"] 4'
    assert template_of("{% if true %}\n  a\n{% endif %}\n").render([]) == "  a\n"  # blocks trimmed
    assert template_of("{{ add_generation_prompt }}{{ nothing }}").render([]) == "True"


FORBIDDEN = {
    "class": "{{ messages.__class__ }}",
    "class by item": "{{ messages['__class__'] }}",
    "class by filter": "{{ messages | attr('__class__') }}",
    "class of each": "{{ messages | map(attribute='__class__') | list }}",
    "class in a test": "{% if messages.__class__ %}yes{% endif %}",
    "class in a format": "{{ '{0.__class__}'.format(messages) }}",
    "class in a mapped format": "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['sys'] }}",
    "globals of jinja": "{{ lipsum.__globals__['os'].popen('true').read() }}",
    "init": "{{ cycler.__init__.__globals__.os }}",
    "context": "{{ self._TemplateReference__context }}",
    "code": "{{ raise_exception.__code__ }}",
    "import": "{% import 'os' as os %}{{ os }}",
    "file": "{% include '/etc/hostname' %}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update({'a': 1}) }}",
    "assignment": "{% set messages.x = 1 %}",
}
BROKEN = {
    "its own words": ("{{ raise_exception('roles must\nalternate') }}", "roles must"),
    "no such name": ("{{ nothing.at.all }}", "'nothing' is undefined"),
    "no such filter": ("{{ 1 | wrong }}", "wrong"),
    "syntax": ("{% for %}", "Expected"),
    "division": ("{{ 1 / 0 }}", "division"),
    "types": ("{{ 'a' + 1 }}", "concatenate"),
    "a call": ("{{ messages() }}", "not callable"),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
    "a long range": ("{% for i in range(10**9) %}x{% endfor %}", "[Rr]ange"),
    "deep nesting": ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "recursion"),
    "deep loops": ("{% for i in [1] %}" * 30 + "x" + "{% endfor %}" * 30, "nested"),
}  # fmt: skip


def rendering(template_of, source):
    def render():
        return template_of(source).render([dict(HELLO)])

    return render


@pytest.mark.parametrize("case", FORBIDDEN)
def test_a_template_reaches_nothing_outside_its_sandbox(template_of, case):
    with pytest.raises(ValueError, match="chat template: "):
        rendering(template_of, FORBIDDEN[case])()


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_template_says_what_is_wrong(template_of, case):
    source, message = BROKEN[case]
    with pytest.raises(ValueError, match=f"(?s)chat template: .*{message}"):
        rendering(template_of, source)()


def test_a_template_that_is_no_text_is_named(tmp_path):
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe{{ 1 }}")
    with pytest.raises(CheckpointError, match="chat.template.*utf-8"):
        load_chat_template(Checkpoint(tmp_path, {}, {}))


def test_messages_are_as_before_whatever_the_template_tried(template_of):
    messages = [dict(HELLO)]
    for case in ("append", "update", "assignment"):
        with pytest.raises(ValueError):
            template_of(FORBIDDEN[case]).render(messages)
    assert messages == [HELLO]


ENDLESS = """
import sys
from pathlib import Path
from minimtp.checkpoint import Checkpoint
from minimtp.text import load_chat_template
try:
    load_chat_template(Checkpoint(Path(sys.argv[1]), {}, {})).render([])
except ValueError as error:
    print(error)
"""


def test_endless_text_ends(tmp_path):
    """A template that writes 100 GB, in a process of its own."""
    source = "{% for i in range(99999) %}{% for j in range(99999) %}ten bytes.{% endfor %}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(source)
    command = [sys.executable, "-c", ENDLESS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    assert done.stdout.startswith("chat template: ") and not done.stderr


# A target that betrays what it has read ------------------------------------------------------------------------------


@cache
def target():
    return minimtp.load("tiny-gemma4")


@cache
def heads():
    """What an answer may begin after, as ids."""
    return [target().tokenizer.encode(text, special=False) for text in (MODEL + QUIET, MODEL)]


class Parrot:
    """In the bundled model's place: what it says next depends on every token that the cache has read.

    An answer is a few words and <turn|>; thoughtful ones begin with a thought. `read` is how much each pass read.
    """

    def __init__(self, template=None, words=5, thoughtful=False, capacity=2000):
        self.template, self.words, self.thoughtful, self.capacity, self.read = template, words, thoughtful, capacity, []

    def __getattr__(self, name):
        return getattr(target(), name)

    def chat_template(self):
        return self.template or target().chat_template()

    def new_cache(self, capacity=None):
        return Cache([], capacity or self.capacity)

    def forward(self, ids_T, cache, taps=(), last=None):
        ids_T = token_ids(ids_T, self.config.vocab_size)
        with cache.reading(ids_T) as start:
            tokens = [*cache.tokens, *ids_T]
        self.read.append(len(ids_T))
        ends = range(start + 1, len(tokens) + 1)[-last if last else 0 :]
        logits_TV = np.zeros((len(ends), self.config.vocab_size))
        logits_TV[np.arange(len(ends)), [self.next(tokens[:end]) for end in ends]] = 1
        return Output(logits_TV, np.zeros((len(ids_T), 1)), {})

    def next(self, tokens):
        """The token after these; the answer begins where the template's last turn ends."""
        said = tokens[len(tokens) - tokens[::-1].index(TURN) - 1 :]
        head = next((head for head in heads() if said[: len(head)] == head), [])
        place = len(said) - len(head)
        if self.thoughtful and place in (0, 2):
            return (CHANNEL, None, CHANNEL_END)[place]
        if place >= self.words:
            return END
        return WORDS[crc32(np.array(tokens).tobytes()) % len(WORDS)]


def answer(conversation, content, **options):
    """The ids of the answer to a message."""
    options = {"stop": target().stop_ids, "max_new_tokens": 40} | options
    return [token for step in conversation.ask(content, **options) for token in step.tokens]


def afresh(conversation):
    """A conversation that has read nothing of the same messages."""
    parrot = copy(conversation.target)
    parrot.read = []
    again = Conversation(parrot, **conversation.template_options)
    again.messages = [dict(message) for message in conversation.messages]
    return again


def in_cache(conversation):
    return [*conversation.cache.tokens, *conversation.pending]


def check_goes_on(conversation, content="And then?"):
    """The next answer is the one that a conversation gives which reads everything afresh."""
    again = afresh(conversation)
    assert answer(conversation, content) == answer(again, content)
    assert conversation.messages == again.messages
    assert in_cache(conversation) == in_cache(again)


# The cache between turns ---------------------------------------------------------------------------------------------


def test_an_answer_depends_on_all_that_was_read():
    """Or the comparisons below would show nothing."""
    answers = []
    for first in ("One", "Two"):
        conversation = Conversation(Parrot())
        answer(conversation, first)
        answers.append(answer(conversation, "Same"))
    assert answers[0] != answers[1] and len(answers[0]) == len(answers[1]) == 6


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_every_token_is_read_once(system):
    conversation = Conversation(Parrot(), system)
    for number, content in enumerate(("Hello", "How are you?", "Good.\n", "Bye")):
        before = conversation.cache.length
        reply = answer(conversation, content)
        assert reply[-1] == END and conversation.messages[-1]["content"] == target().tokenizer.decode(reply[:-1], True)
        assert sum(conversation.target.read) == conversation.cache.length > before
        assert len(conversation.messages) == 2 * number + 2 + (system is not None)
    text = conversation.template.render(conversation.messages).removesuffix(MODEL).removesuffix("\n")
    assert in_cache(conversation) == target().tokenizer.encode(text, special=False)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_every_answer_is_as_from_reading_everything_afresh(system):
    conversation = Conversation(Parrot(), system)
    for content in ("Hello", "How are you?", "  <unused9> \n", "Bye"):
        check_goes_on(conversation, content)


@pytest.mark.parametrize("draft", ["lookup", "auto", None])
def test_the_bundled_model_goes_on_as_if_it_had_read_everything_afresh(draft):
    """Real weights: turn by turn, with drafts, the tokens of one plain run over the same ids."""
    drafter = draft and minimtp.load_drafter(draft, target())
    conversation = Conversation(target(), "Speak.")
    for content in ("Good morrow, sir.", "What news?", "Farewell!"):
        unread, options = [], dict(stop=target().stop_ids, max_new_tokens=20)

        def note(prompt_ids, **_):
            unread[:] = prompt_ids  # noqa: B023

        before = list(conversation.cache.tokens)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat, "generate", lambda t, ids, **o: (note(ids), generate(t, ids, **o))[1])  # noqa: B023
            reply = answer(conversation, content, max_new_tokens=20, drafter=drafter, num_draft=3)
        plain = generate(target(), before + unread, **options)
        assert reply == [token for step in plain for token in step.tokens]
        assert in_cache(conversation) == before + unread + reply


def test_an_answer_cut_by_the_budget_is_closed_by_the_next_turn():
    conversation = Conversation(Parrot())
    reply = answer(conversation, "Hello", max_new_tokens=3)
    assert len(reply) == 3 and END not in reply
    check_goes_on(conversation)
    assert sum(conversation.target.read) == conversation.cache.length


def test_an_answer_of_nothing_but_its_end():
    conversation = Conversation(Parrot(words=0))
    assert answer(conversation, "Hello") == [END] and conversation.messages[-1]["content"] == ""
    check_goes_on(conversation)


def test_reset_forgets_everything_but_the_system_prompt():
    conversation = Conversation(Parrot(), "Be brief.")
    first = answer(conversation, "Hello")
    assert answer(conversation, "Hello") != first
    conversation.reset()
    assert conversation.messages == [BRIEF] and conversation.cache.length == 0
    assert answer(conversation, "Hello") == first


@pytest.mark.parametrize("stop", [(), (END,), (1, END, 50)])
def test_stop_ids_end_an_answer_and_are_not_its_text(stop):
    conversation = Conversation(Parrot())
    reply = answer(conversation, "Hello", stop=stop, max_new_tokens=9)
    assert (END in reply[:-1]) == (not stop) and len(reply) == (6 if stop else 9)
    if stop:
        assert "<turn|>" not in conversation.messages[-1]["content"]


# Templates that write the past anew ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, dict(enable_thinking=True), dict(enable_thinking=False)])
def test_thoughts_taken_out_of_the_past_are_read_no_more(template_of, options):
    """The published form: an answer that thought is written anew without its thought, and read anew."""
    conversation = Conversation(Parrot(template_of(PUBLISHED), thoughtful=True), "Be brief.", **options)
    for content in ("Hello", "How are you?", "Bye"):
        check_goes_on(conversation, content)
        text = conversation.template.render(conversation.messages[:-1], **options)
        assert in_cache(conversation)[: len(target().tokenizer.encode(text, False))] == target().tokenizer.encode(
            text, False
        )
        assert conversation.messages[-1]["content"].startswith("<|channel>")


def test_with_the_published_form_only_the_last_turns_are_read_again(template_of):
    """The past up to the last question stands as it was written: it should not be read a second time."""
    conversation = Conversation(Parrot(template_of(PUBLISHED)))
    answer(conversation, "A long question. " * 20)
    for content in ("Hello", "How are you?"):
        answer(conversation, content)
        del conversation.target.read[:]
    answer(conversation, "Bye")
    assert conversation.target.read[0] < 50 < conversation.cache.length


def test_a_template_that_writes_everything_anew_is_read_anew(template_of):
    counting = "{{ messages | length }}:{% for m in messages %}<|turn>{{ m.content }}<turn|>{% endfor %}" + MODEL
    conversation = Conversation(Parrot(template_of(counting)))
    for content in ("Hello", "How are you?"):
        check_goes_on(conversation, content)
    del conversation.target.read[:]
    answer(conversation, "Bye")
    whole = conversation.template.render(conversation.messages[:-1])
    assert conversation.target.read[0] == len(target().tokenizer.encode(whole, special=False))


# What may happen -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(1, 6))
def test_a_reader_who_leaves_mid_answer(steps):
    """What was answered stays, as far as it was seen."""
    conversation = Conversation(Parrot())
    answer(conversation, "Hello")
    replies = conversation.ask("How are you?", stop=(END,))
    seen = [token for _ in range(steps) for token in next(replies).tokens]
    replies.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": target().tokenizer.decode(seen, True)}
    check_goes_on(conversation)


class Interrupting(Parrot):
    """Ctrl-C comes during one of its passes, before or after it has read."""

    def __init__(self, at, late):
        super().__init__()
        self.at, self.late = at, late

    def forward(self, *arguments, **options):
        if len(self.read) == self.at and not self.late:
            self.at = None
            raise KeyboardInterrupt
        out = super().forward(*arguments, **options)
        if self.late and len(self.read) - 1 == self.at:
            self.at = None
            raise KeyboardInterrupt
        return out


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", range(6, 13))
def test_ctrl_c_at_any_pass_of_an_answer(at, late):
    conversation = Conversation(Interrupting(at, late))
    answer(conversation, "Hello")
    with pytest.raises(KeyboardInterrupt):
        answer(conversation, "How are you?")
        answer(conversation, "And you?")
    roles = [message["role"] for message in conversation.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    check_goes_on(conversation)


class LateInterrupt:
    """A drafter in whose last reading, after the last token is decided, Ctrl-C comes."""

    def propose(self, new_tokens_N, hidden_ND, cache, num_draft, sampling, u_K):
        if num_draft == 0:
            raise KeyboardInterrupt
        return minimtp.Draft(())


def test_ctrl_c_while_the_drafter_reads_along():
    conversation = Conversation(Parrot())
    with pytest.raises(KeyboardInterrupt):
        answer(conversation, "Hello", drafter=LateInterrupt())
    assert len(conversation.messages) == 2
    check_goes_on(conversation)


@pytest.mark.parametrize("reading", range(1, 12))
def test_ctrl_c_between_a_decision_and_its_telling(monkeypatch, reading):
    """It comes as the clock is read: the cache may then hold a token more than was told."""
    conversation, readings = Conversation(Parrot()), iter(range(1, 1000))

    def read_clock():
        if next(readings) == reading:
            raise KeyboardInterrupt
        return 0.0

    monkeypatch.setattr(sys.modules["minimtp.generate"], "time", SimpleNamespace(perf_counter=read_clock))
    with pytest.raises(KeyboardInterrupt):
        answer(conversation, "Hello")
    check_goes_on(conversation)


def test_a_question_without_any_answer_is_dropped():
    conversation = Conversation(Interrupting(0, late=False))
    with pytest.raises(KeyboardInterrupt):
        answer(conversation, "Hello")
    assert conversation.messages == []
    check_goes_on(conversation)


def test_an_answer_that_is_not_asked_for_asks_nothing():
    conversation = Conversation(Parrot())
    conversation.ask("Hello")
    assert conversation.messages == [] and conversation.target.read == []


def test_a_full_context_is_an_error_that_leaves_the_conversation_as_it_was():
    conversation = Conversation(Parrot(capacity=60))
    answer(conversation, "Hello")
    before = [*conversation.messages]
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens is \d+ longer than the context has room for"):
        answer(conversation, "word " * 60)
    assert conversation.messages == before
    check_goes_on(conversation, "Bye")


def test_an_answer_ends_where_the_context_is_full():
    conversation = Conversation(Parrot(words=100, capacity=40))
    reply = answer(conversation, "Hello", max_new_tokens=200)
    assert conversation.cache.length == 40 and END not in reply
    with pytest.raises(ValueError, match="longer than the context"):
        answer(conversation, "Bye")
    conversation.reset()
    assert answer(conversation, "Hello", max_new_tokens=200) == reply


def test_a_template_that_refuses_a_message_leaves_the_conversation_as_it_was(template_of):
    picky = "{% if messages | length > 2 %}{{ raise_exception('enough') }}{% endif %}" + USER + MODEL
    conversation = Conversation(Parrot(template_of(picky)))
    answer(conversation, "Hello")
    before = [*conversation.messages]
    with pytest.raises(ValueError, match="chat template: enough"):
        answer(conversation, "More")
    assert conversation.messages == before


@pytest.mark.parametrize("file", ["chat_template.jinja", "tokenizer.json"])
def test_without_a_template_or_a_tokenizer_there_is_no_conversation(folder_with, file):
    folder = folder_with()
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match="no chat template or no tokenizer.json"):
        Conversation(minimtp.load(folder))


# Recommended sampling ------------------------------------------------------------------------------------------------


RECOMMENDED = [
    ({}, Sampling(), []),
    (dict(do_sample=True, temperature=1.0, top_k=64, top_p=0.95), Sampling(1.0, 64, 0.95), []),
    (dict(do_sample=True, temperature=0.7, top_k=20, top_p=0.8, min_p=0.1, presence_penalty=1.5),
     Sampling(0.7, 20, 0.8, 0.1, (), 1.5), []),
    (dict(top_k=64, suppress_tokens=[258883, 258882]), Sampling(1.0, 64, suppress=(258883, 258882)), []),
    (dict(do_sample=False, temperature=0.7, top_k=20), Sampling(0.0, 20), []),
    (dict(temperature=0, top_k=20), Sampling(0.0, 20), []),
    (dict(top_k=0, top_p=1.0, min_p=None, suppress_tokens=[]), Sampling(1.0, None, 1.0), []),
    (dict(bos_token_id=2, eos_token_id=[1, 106], pad_token_id=0, transformers_version="5.22.2", max_new_tokens=9,
          num_assistant_tokens=6, is_assistant=True, num_assistant_tokens_schedule="constant"), Sampling(), []),
    (dict(repetition_penalty=1.0, typical_p=1.0, num_beams=1, no_repeat_ngram_size=0), Sampling(), []),
    (dict(repetition_penalty=1.1, bad_words_ids=[[3]], num_beams=4, top_k=3), Sampling(1.0, 3),
     ["bad_words_ids", "num_beams", "repetition_penalty"]),
    (dict(begin_suppress_tokens=[5], epsilon_cutoff=None), Sampling(), ["begin_suppress_tokens"]),
]  # fmt: skip


@pytest.mark.parametrize("config, sampling, ignored", RECOMMENDED)
def test_recommended_sampling(config, sampling, ignored):
    assert recommended(config) == (sampling, ignored)


def test_what_is_asked_for_comes_before_what_is_recommended():
    config = dict(do_sample=False, temperature=0.7, top_k=20, suppress_tokens=[7])
    assert recommended(config, temperature=0.3, top_k=None, top_p=0.5)[0] == Sampling(0.3, 20, 0.5, suppress=(7,))
    assert recommended(dict(temperature=0.7), temperature=0.0)[0] == Sampling(0.0)


NONSENSE = [dict(temperature="hot"), dict(temperature=-1), dict(top_k=-3), dict(top_k="64"), dict(top_p=1.5),
            dict(suppress_tokens=["abc"]), dict(suppress_tokens=[[1]]), dict(presence_penalty=[1])]  # fmt: skip


@pytest.mark.parametrize("config", NONSENSE, ids=str)
def test_nonsense_is_named(config):
    name = next(iter(config)).removesuffix("_tokens")
    with pytest.raises(ValueError, match=name):
        recommended(config)


# The command ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def talk(monkeypatch, capsys):
    """Run `chat` on lines of input -> (status, standard output, standard error)."""

    def run(lines, *arguments):
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        status = cli.main(["chat", "-n", "12", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


def spoken(contents, system=None, **options):
    """The texts that the bundled model answers, by the library."""
    conversation, drafter = Conversation(target(), system), minimtp.load_drafter("auto", target())
    options = dict(stop=target().stop_ids, max_new_tokens=12, drafter=drafter) | options
    replies = []
    for seed, content in enumerate(contents):
        ids = [token for step in conversation.ask(content, seed=seed, **options) for token in step.tokens]
        replies.append(target().tokenizer.decode(ids))
    return replies


CLOSING = re.compile(r"\d+ tokens in \d+ target passes: .* tokens/s\n")


def test_a_chat_by_pipe(talk):
    status, out, err = talk("Good morrow\n\n  \nWhat news?\n", "--temp", 0)
    assert status == 0
    assert out == "".join(reply + "\n" for reply in spoken(["Good morrow", "What news?"]))
    assert len(CLOSING.findall(err)) == 2 and CLOSING.sub("", err) == ""


def test_a_chat_in_a_process_of_its_own():
    command = [sys.executable, "-m", "minimtp", "chat", "-n", "12", "--temp", "0"]
    done = subprocess.run(command, input="Good morrow\nWhat news?", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Traceback" not in done.stderr
    assert done.stdout == "".join(reply + "\n" for reply in spoken(["Good morrow", "What news?"]))


def test_a_chat_samples_as_recommended_unless_told_otherwise(talk):
    recommendation = recommended(target().generation_config)[0]
    assert recommendation == Sampling(1.0, 64, 0.95)
    assert (
        talk("Hello\nHello\n")[1].splitlines() == "\n".join(spoken(["Hello"] * 2, sampling=recommendation)).splitlines()
    )
    told = Sampling(0.5, 3, 0.95, 0.01)
    expected = "\n".join(spoken(["Hello"], sampling=told)).splitlines()
    assert talk("Hello\n", "--temp", 0.5, "--top-k", 3, "--min-p", 0.01)[1].splitlines() == expected


@pytest.fixture
def asked(monkeypatch):
    """The messages that there were before each question."""
    seen, ask = [], Conversation.ask
    monkeypatch.setattr(Conversation, "ask", lambda self, *a, **o: seen.append([*self.messages]) or ask(self, *a, **o))
    return seen


def test_reset_and_exit(talk, asked):
    _, once, _ = talk("Hello\n", "--temp", 0)
    _, twice, _ = talk("Hello\n/reset\nHello\nHello\n/exit\nHello\n", "--temp", 0)
    assert twice.startswith(2 * once) and [len(messages) for messages in asked] == [0, 0, 0, 2]
    assert talk("", "--temp", 0) == (0, "", "") and talk("/reset\n/exit\n") == (0, "", "")


def test_a_chat_as_json(talk):
    status, out, err = talk("Hello\nBye\n", "--temp", 0, "--json", "-k", 2)
    steps = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and all(step["accepted"] <= len(step["draft"]) <= 2 for step in steps)
    texts = spoken(["Hello", "Bye"], num_draft=2)
    assert "".join(step["text"] for step in steps) == "".join(texts)
    assert sum(json.loads(line)["tokens"] for line in err.splitlines()) == sum(len(step["tokens"]) for step in steps)


@pytest.mark.parametrize("flag, options", [((), {}), (("--think",), dict(enable_thinking=True)),
                                           (("--no-think",), dict(enable_thinking=False))])  # fmt: skip
def test_system_prompt_and_thinking_reach_the_template(talk, folder_with, monkeypatch, flag, options):
    written, render = [], minimtp.text.ChatTemplate.render
    monkeypatch.setattr(
        minimtp.text.ChatTemplate, "render", lambda *a, **o: written.append(render(*a, **o)) or written[-1]
    )
    status, *_ = talk("Hello\n", "--model", folder_with(PUBLISHED), "--draft", "none", "--system", "Be brief.", *flag)
    think = "<|think|>" if options.get("enable_thinking") else ""
    quiet = "" if options.get("enable_thinking") else QUIET
    assert status == 0
    assert written == [f"<bos>{SYSTEM}{think}Be brief.<turn|>\n{USER}Hello<turn|>\n{MODEL}{quiet}"]


def test_fields_that_are_not_honoured_are_named(talk, folder_with):
    folder = folder_with(repetition_penalty=1.2, begin_suppress_tokens=[5])
    _, _, err = talk("", "--model", folder, "--draft", "none")
    assert err == "generation_config.json: not honoured: begin_suppress_tokens, repetition_penalty\n"


@pytest.mark.parametrize("command", ["chat", "run"])
def test_suppressed_tokens_are_not_said(talk, folder_with, command, capsys):
    """Suppress what greedy decoding says; something else is said then."""

    def say(folder):
        if command == "chat":
            talk_ = talk("Hello\n", "--model", folder, "--draft", "none", "--temp", 0, "--json")
            return [token for line in talk_[1].splitlines() for token in json.loads(line)["tokens"]]
        assert cli.main(["run", "Hello", "--model", str(folder), "--draft", "none", "-n", "12", "--json"]) == 0
        out = capsys.readouterr().out
        return [token for line in out.splitlines() for token in json.loads(line)["tokens"]]

    said = say(folder_with())
    silenced = say(folder_with(suppress_tokens=said))
    assert silenced and not set(said) & set(silenced)


SPOILT = [("chat", dict(suppress_tokens=5)), ("chat", dict(suppress_tokens=[10**6])), ("chat", dict(top_k=2.5)),
          ("chat", dict(temperature="hot")), ("run", dict(suppress_tokens=5)), ("run", dict(suppress_tokens=[10**6])),
          ]  # fmt: skip


@pytest.mark.parametrize("command, nonsense", SPOILT, ids=str)
def test_nonsense_in_the_generation_config_is_one_line(folder_with, capsys, monkeypatch, command, nonsense):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    prompt = ["Hello"] if command == "run" else []
    status = cli.main([command, *prompt, "-n", "3", "--model", str(folder_with(**nonsense)), "--draft", "none"])
    out, err = capsys.readouterr()
    assert status == 2 and not out.strip() and err.count("\n") == 1 and next(iter(nonsense)).split("_")[0] in err


def raise_signal_at(monkeypatch, number):
    """Ctrl-C during the pass of that number."""
    passes, forward = [], Target.forward

    def interrupted(*arguments, **options):
        passes.append(1)
        if len(passes) == number:
            signal.raise_signal(signal.SIGINT)
        return forward(*arguments, **options)

    monkeypatch.setattr(Target, "forward", interrupted)


def test_ctrl_c_ends_the_answer_and_not_the_chat(talk, monkeypatch):
    conversation, stop = Conversation(target()), target().stop_ids
    replies = [answer(conversation, "Hello", max_new_tokens=5), answer(conversation, "Bye", max_new_tokens=12)]
    raise_signal_at(monkeypatch, 6)
    status, out, err = talk("Hello\nBye\n", "--temp", 0, "--draft", "none")
    assert status == 0 and "Traceback" not in err and not set(replies[0]) & set(stop)
    assert out == "".join(target().tokenizer.decode(reply) + "\n" for reply in replies)
    assert "5 tokens in 5 target passes" in err


def test_ctrl_c_while_showing_leaves_a_conversation_in_step(talk, asked, monkeypatch):
    """It comes outside of the answer's own code: the answer so far is kept all the same."""
    shown, record = [], cli._step_record

    def interrupted(step, text):
        shown.append(step)
        if len(shown) == 3:
            signal.raise_signal(signal.SIGINT)
        return record(step, text)

    monkeypatch.setattr(cli, "_step_record", interrupted)
    status, _, err = talk("Hello\nBye\n", "--temp", 0, "--draft", "none", "--json")
    assert status == 0 and "Traceback" not in err
    assert [message["role"] for message in asked[1]] == ["user", "assistant"]


def test_ctrl_c_while_nothing_is_answered_ends_the_chat(talk, monkeypatch):
    class Interrupted(io.StringIO):
        def readline(self):
            raise KeyboardInterrupt

    monkeypatch.setattr(io, "StringIO", Interrupted)
    status, out, err = talk("")
    assert status == 130 and not out and "Traceback" not in err


LONG = "word " * 3000


@pytest.mark.parametrize("line", [LONG, "look: <|image|>"], ids=["context", "image"])
def test_a_line_that_cannot_be_read_is_one_line_of_error_and_the_chat_goes_on(talk, line):
    """Nothing that is typed should cost the conversation."""
    status, out, err = talk(f"Hello\n{line}\nBye\n", "--temp", 0)
    assert status == 2
    errors = [said for said in err.splitlines() if said.startswith("minimtp: ")]
    assert len(errors) == 1 and "Traceback" not in err
    assert re.search(r"longer than the context|stands for an image", errors[0])
    first, second = spoken(["Hello", "Bye"])
    assert out.startswith(first) and out.rstrip("\n").endswith(second.rstrip("\n"))


def test_a_template_without_a_chat_is_one_line(talk, folder_with):
    folder = folder_with()
    (folder / "chat_template.jinja").unlink()
    status, out, err = talk("Hello\n", "--model", folder, "--draft", "none")
    assert (status, out) == (2, "") and err.count("\n") == 1 and "no chat template" in err


def test_a_hostile_template_is_one_line(talk, folder_with):
    status, out, err = talk("Hello\n", "--model", folder_with(FORBIDDEN["subclasses"]), "--draft", "none")
    assert (status, out) == (2, "")
    assert err == "minimtp: chat template: access to attribute '__class__' of 'str' object is unsafe.\n"


def test_logits_of_a_kept_cache_are_those_of_a_fresh_one():
    """In numbers, not only in tokens: after three turns, to rounding."""
    double = minimtp.load("tiny-gemma4", dtype="float64")
    conversation = Conversation(double)
    for content in ("Good morrow", "What news?", "Farewell"):
        answer(conversation, content, max_new_tokens=10)
    kept = double.forward(conversation.pending, conversation.cache).logits_TV
    fresh = double.forward(conversation.cache.tokens, double.new_cache(), last=1).logits_TV
    assert worst(kept, fresh) < 1e-9
