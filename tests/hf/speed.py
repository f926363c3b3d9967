"""Greedy decoding of the bundled model, ours and transformers' (eager, float32) in turn: tokens/s and their ratio.

python tests/hf/speed.py [TOKENS] [ROUNDS]
"""

import sys
import time
from statistics import median

import torch
from transformers import AutoModelForCausalLM

import minimtp
from minimtp.loading import resolve


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


def seconds(function, *arguments):
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def main(count=100, rounds=7):
    target = minimtp.load("tiny-gemma4")
    model = AutoModelForCausalLM.from_pretrained(
        resolve("tiny-gemma4"), dtype=torch.float32, attn_implementation="eager"
    ).eval()
    prompt = target.tokenizer.encode("ROMEO:\n")
    pairs = [(seconds(ours, target, prompt, count), seconds(theirs, model, prompt, count)) for _ in range(rounds + 1)]
    pairs = pairs[1:]  # the first warms up
    print(f"minimtp      {count / median(a for a, _ in pairs):8.1f} tokens/s")
    print(f"transformers {count / median(b for _, b in pairs):8.1f} tokens/s")
    print(f"ratio        {median(b / a for a, b in pairs):8.2f} (median of {rounds} pairs)")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
