"""How fast the bundled models are: greedy decoding, ours and transformers' in turn (eager, float32, the same weights
unpacked); and our prompt in one pass, against one token a pass.

python tests/hf/speed.py [tiny-gemma4|tiny-qwen35] [TOKENS] [ROUNDS]
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch

import minimtp
from minimtp.loading import bundled

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from double import load_reference  # noqa: E402

PROMPT = 512


def ours(target, prompt, count):
    for _ in minimtp.generate(target, prompt, max_new_tokens=count):
        pass


@torch.no_grad()
def theirs(model, prompt, count):
    """The plain loop, without what `generate` adds to it."""
    out = model(torch.tensor([prompt]), use_cache=True)
    for _ in range(count - 1):
        token = out.logits[:, -1:].argmax(-1)
        out = model(token, past_key_values=out.past_key_values, use_cache=True)


def read(target, prompt, width):
    """The prompt in passes of `width` tokens."""
    cache = target.new_cache()
    for start in range(0, len(prompt), width):
        target.forward(prompt[start : start + width], cache, last=1)
        cache.commit()


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def in_turn(rounds, first, second):
    """Times of two calls, taken in turn -> (median of each, median ratio of second to first)."""
    pairs = [(seconds(*first), seconds(*second)) for _ in range(rounds + 1)][1:]  # the first pair warms up
    return *map(median, zip(*pairs)), median(b / a for a, b in pairs)


def main(name="tiny-gemma4", count=100, rounds=7):
    target, model = minimtp.load(name), load_reference(bundled(name))
    model.set_attn_implementation("eager")
    prompt = target.tokenizer.encode("ROMEO:\n")
    a, b, ratio = in_turn(rounds, (ours, target, prompt, count), (theirs, model, prompt, count))
    print(f"decoding: minimtp {count / a:.1f} tokens/s, transformers {count / b:.1f}: {ratio:.2f} times as fast")
    text = target.tokenizer.encode(bundled("heldout.txt").read_text(encoding="utf-8"))[:PROMPT]
    a, b, ratio = in_turn(rounds, (read, target, text, PROMPT), (read, target, text, 1))
    print(f"a prompt of {PROMPT}: {1e3 * a:.0f} ms in one pass, {1e3 * b:.0f} one by one: {ratio:.2f} times as fast")
    print(f"(medians of {rounds} pairs, {torch.get_num_threads()} torch threads)")


if __name__ == "__main__":
    main(*sys.argv[1:2], *map(int, sys.argv[2:]))
