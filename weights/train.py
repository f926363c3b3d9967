#!/usr/bin/env python3
"""Train the tiny models of this folder from one text file, one family at a time.

    python weights/train.py TEXT --work DIR [--family gemma4|qwen35] [--out weights]

tokenizer -> float target -> int4 QAT target -> its texts -> drafter -> export -> report.json.
Every stage leaves its result in --work and is skipped when that result is already there.
Needs torch, transformers 5.22.2, safetensors, tokenizers and tqdm; one CPU core is enough.
"""

import argparse
import json
from pathlib import Path

import torch
import train_gemma4
import train_qwen35
from common import (
    Corpus,
    bf16_state,
    heldout_loss,
    heldout_prompts,
    int4_state,
    measure_acceptance,
    measure_on_text,
    split_text,
    stage,
    train_drafter,
    train_float,
    train_qat,
    with_weights,
    write_texts,
)

FAMILIES = {family.NAME: family for family in (train_gemma4, train_qwen35)}


def report(family, tok, validation_text, heldout_text, float_state, qat_state, drafter_state):
    def encode(text):
        return torch.tensor(tok.encode(text, add_special_tokens=False).ids)

    def target_of(state):
        return with_weights(family.new_target(), state)

    parts = {"validation": encode(validation_text), "heldout": encode(heldout_text)}
    drafter = with_weights(family.new_drafter(), bf16_state(drafter_state)).eval()
    targets = {
        "float": target_of(bf16_state(float_state)),
        "float_rounded_to_int4_afterwards": target_of(int4_state(family, float_state)),
        "qat_int4": target_of(int4_state(family, qat_state)),
    }
    losses = {
        part: {name: heldout_loss(family, model, ids) for name, model in targets.items()} for part, ids in parts.items()
    }
    target = targets["qat_int4"].eval()
    return {
        "tokens": {part: len(ids) for part, ids in parts.items()},
        "parameters": {"target": count(qat_state), family.DRAFTER: count(drafter_state)},
        "loss_nats_per_token": losses,
        "greedy": measure_acceptance(family, drafter, target, heldout_prompts(tok, heldout_text)),
        "heldout_text": measure_on_text(family, drafter, target, parts["heldout"]),
    }


def count(state):
    return sum(value.numel() for value in state.values())


def write_report(path, family, figures):
    """report.json holds one entry per family; the others' stay."""
    reports = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(reports | {family.NAME: figures}, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def train(family, args):
    work = args.work / family.NAME
    work.mkdir(parents=True, exist_ok=True)

    def steps(name):
        return max(2, round(family.STEPS[name] * args.effort))

    def made(name, seed, make):
        return stage(work / f"{name}.safetensors", seed, corpus, make)

    train_text, validation_text, heldout_text = split_text(Path(args.text).read_text(encoding="utf-8"))
    tok = family.build_tokenizer(train_text)
    corpus, validation = Corpus(family, tok, train_text), Corpus(family, tok, validation_text)

    float_state = made("float", 0, lambda: train_float(family, corpus, validation, steps("float")))
    qat_state = made("qat", 1, lambda: train_qat(family, float_state, corpus, validation, steps("qat")))
    target = with_weights(family.new_target(), int4_state(family, qat_state)).eval()
    texts = made("texts", 2, lambda: {"ids": write_texts(family, target, corpus, steps("texts"))})["ids"]
    drafter_state = made(
        family.DRAFTER, 3, lambda: train_drafter(family, target, texts, corpus, validation, steps(family.DRAFTER))
    )

    family.export(args.out, tok, float_state, qat_state, drafter_state)
    (args.out / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    figures = report(family, tok, validation_text, heldout_text, float_state, qat_state, drafter_state)
    write_report(args.out / "report.json", family, figures)


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a plain text file; its last 5 %% is held out")
    parser.add_argument("--family", choices=FAMILIES, default="gemma4")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the family's folders go")
    parser.add_argument("--work", type=Path, default=Path("train-work"), help="unrounded weights of finished stages")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--effort", type=float, default=1.0, help="share of the full number of steps (for a trial run)")
    return parser.parse_args()


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    train(FAMILIES[args.family], args)


if __name__ == "__main__":
    main()
