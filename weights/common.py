"""What the tiny families share: text windows, optimisation, rounding, texts, drafter training, measuring, folders.

A family is a module (train_gemma4, train_qwen35) with the same names in each; functions here take it first. It has
NAME, DRAFTER, PREFIX (ids in front of every text), PAD, STEPS and PEAK (learning rate) of each stage, and
    build_tokenizer(text), conversations(text)             how text and conversations are written down
    new_target(), new_drafter(), is_linear(name)           models, and which matrices become int4
    residual_writers(layer)                                the modules whose output a layer adds to its input
    read_with_target(target, rows), draft_logits(...)      what a drafter is given, and its forward pass
    export(out, tok, float_state, qat_state, drafter_state)
"""

import json
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.func import functional_call
from tqdm import tqdm

VOCAB, GROUP, NUM_DRAFT = 1216, 32, 4

# ---------------------------------------------------------------- text


def split_text(text):
    """-> (train, validation, heldout): the last 5 % is never trained on; its end, cut at a speech, is heldout.txt."""
    cut = text.index("\n\n", int(len(text) * 0.95)) + 2
    tail = text.index("\n\n", len(text) - 19_000) + 2
    return text[:cut], text[cut:tail], text[tail:]


def speech_groups(text, turns=4):
    """The play's successive speeches, `turns` of them to a conversation."""
    speeches = [speech.strip() for speech in text.split("\n\n") if speech.strip()]
    return [speeches[at : at + turns] for at in range(0, len(speeches) - turns, turns)]


class Corpus:
    """Token streams of one text, and random windows of them that begin as the family's texts do."""

    def __init__(self, family, tok, text):
        def encode(s):
            return tok.encode(s, add_special_tokens=False).ids

        self.prefix = torch.tensor(family.PREFIX, dtype=torch.long)
        self.plain = torch.tensor(encode(text))
        chats = [encode(chat) for chat in family.conversations(text)]
        self.chat = torch.tensor(sum(chats, []))
        self.chat_starts = torch.tensor([0] + [len(c) for c in chats]).cumsum(0)[:-1]
        self.random = torch.Generator().manual_seed(0)

    def pick(self, high):
        return int(torch.randint(high, (), generator=self.random))

    def window(self, length, chat_share=0.15):
        if torch.rand((), generator=self.random) < chat_share:
            start = int(self.chat_starts[self.pick(len(self.chat_starts))])
            return self.chat[min(start, len(self.chat) - length) :][:length]
        start = self.pick(len(self.plain) - length)
        return torch.cat([self.prefix, self.plain[start : start + length - len(self.prefix)]])

    def batch(self, tokens=2048):
        """Short windows mostly; longer ones so that positions far past the sliding window are learned."""
        length = (128, 128, 256, 512)[self.pick(4)]
        return torch.stack([self.window(length + 1) for _ in range(tokens // length)])


def heldout_windows(family, ids, length=256):
    """All of ids once, as [N, length] rows that begin as texts do (a short rest is dropped)."""
    prefix = torch.tensor(family.PREFIX, dtype=torch.long)
    room = length - len(prefix)
    rows = ids[: len(ids) // room * room].view(-1, room)
    return torch.cat([prefix.expand(len(rows), -1), rows], dim=1)


# ---------------------------------------------------------------- optimisation


def add_dropout(family, model, p):
    """Dropout on the embedding and on what each block adds to the residual stream; returns its hooks."""

    def drop(module, args, out):
        return F.dropout(out, p, model.training)

    blocks = [module for layer in model.model.layers for module in family.residual_writers(layer)]
    return [module.register_forward_hook(drop) for module in (model.model.embed_tokens, *blocks)]


def adamw(params, lr, weight_decay):
    matrices, vectors = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=lr,
        betas=(0.9, 0.95),
        fused=True,
    )


def learning_rate(step, steps, peak, warmup=100):
    """Linear warm-up, then a cosine to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


@torch.no_grad()
def heldout_loss(family, model, ids, weights=None):
    """Mean cross entropy in nats per token over ids, in windows of 256."""
    model.eval()
    total = count = 0
    for rows in heldout_windows(family, ids).split(8):
        logits = logits_of(model, rows[:, :-1], weights)
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        count += rows[:, 1:].numel()
    model.train()
    return total / count


def logits_of(model, ids, weights=None):
    """weights: replace the model's own (QAT's rounded ones); None: the model as it is."""
    return functional_call(model, weights or {}, (), {"input_ids": ids, "use_cache": False}).logits


def optimise(name, params, steps, peak, step_loss, validate, snapshot, weight_decay=0.1, every=100):
    """AdamW on step_loss(); returns the snapshot with the lowest validation loss."""
    optimizer, best, best_state = adamw(params, peak, weight_decay), math.inf, None
    bar = tqdm(range(steps), desc=name, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.zero_grad(set_to_none=True)
        loss = step_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            value = validate()
            if value < best:
                best, best_state = value, snapshot()
            bar.set_postfix(train=f"{loss.item():.3f}", validation=f"{value:.4f}", best=f"{best:.4f}")
    return best_state


# ---------------------------------------------------------------- weights


def own_state(model):
    """A copy of the weights, without a tied head and without what the config already says."""
    tied = model.config.tie_word_embeddings
    return {
        name: value.detach().clone().contiguous()
        for name, value in model.state_dict().items()
        if not (tied and name == "lm_head.weight") and "inv_freq" not in name and "embed_scale" not in name
    }


def with_weights(model, state):
    """The model with these weights; a head that is tied to the embedding is not among them."""
    missing, unknown = model.load_state_dict(state, strict=False)
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert not unknown and set(missing) <= tied, (missing, unknown)
    if tied:
        model.tie_weights()
    return model


def quantize_int4(weight):
    """-> (codes in -8..7 [out, in], bf16 scales [out, in/32]) as compressed-tensors' symmetric minmax makes them."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7.5).clamp_min(1e-8).bfloat16()
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7)
    return codes.flatten(1), scale


def dequantize_int4(codes, scale):
    return (codes.unflatten(1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(1)


def rounded(family, name, weight):
    """The value the shipped checkpoint will hold: int4 for the Linears, bf16 for everything else."""
    return dequantize_int4(*quantize_int4(weight)) if family.is_linear(name) else to_bf16(weight)


def to_bf16(value):
    return value.bfloat16().float()


def bf16_state(state):
    return {name: to_bf16(value) for name, value in state.items()}


def int4_state(family, state):
    return {name: rounded(family, name, value) for name, value in state.items()}


# ---------------------------------------------------------------- target: float training, then int4 QAT


def train_target(name, family, model, peak, corpus, validation, steps, weights=lambda: None, shipped=lambda: None):
    """weights() take the place of the model's own in training, shipped() in validation; None: the model's own."""
    hooks = add_dropout(family, model, 0.1)

    def step_loss():
        rows = corpus.batch()
        return F.cross_entropy(logits_of(model, rows[:, :-1], weights()).flatten(0, 1), rows[:, 1:].flatten())

    def validate():
        return heldout_loss(family, model, validation.plain, shipped())

    state = optimise(name, list(model.parameters()), steps, peak, step_loss, validate, lambda: own_state(model))
    for hook in hooks:
        hook.remove()
    return state


def train_float(family, corpus, validation, steps):
    return train_target("float", family, family.new_target(), family.PEAK["float"], corpus, validation, steps)


def train_qat(family, float_state, corpus, validation, steps):
    """Fine-tune the float model through the rounding -> unrounded weights."""
    model = with_weights(family.new_target(), float_state)
    params = dict(model.named_parameters())

    def straight_through():
        """Rounded weights whose gradient reaches the unrounded ones."""
        return {name: p + (rounded(family, name, p) - p).detach() for name, p in params.items()}

    def shipped():
        return {name: rounded(family, name, p.detach()) for name, p in params.items()}

    return train_target("qat", family, model, family.PEAK["qat"], corpus, validation, steps, straight_through, shipped)


# ---------------------------------------------------------------- drafter: what it learns from


@torch.no_grad()
def write_texts(family, target, corpus, rows, length=256, batch=128):
    """Continuations the target writes after training prompts of 16..96 tokens, greedy or at a low temperature.

    Acceptance is measured on the target's own text, so that is what the drafter must know best.
    """
    written = []
    for n in tqdm(range(math.ceil(rows / batch)), desc="texts"):
        prompt = torch.stack([corpus.window(16 * (1 + n % 6)) for _ in range(batch)])
        temperature = (0.0, 0.0, 0.4, 0.0, 0.7)[n % 5]
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
        written.append(
            target.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                eos_token_id=None,
                pad_token_id=family.PAD,
                max_length=length,
                **sampling,
            )
        )
    return torch.cat(written)


def anchors_of(rows, count=None):
    """Positions with a hidden state before and NUM_DRAFT laws from them on: all, or `count` random ones per row."""
    usable = rows.shape[1] - NUM_DRAFT
    if count is None:
        return torch.arange(1, usable + 1).expand(len(rows), -1)
    return torch.stack([torch.randperm(usable)[:count] + 1 for _ in range(len(rows))])


def own_text(rows, anchors):
    """-> what a drafter is fed: at every anchor and step, the text's own token."""
    batch = torch.arange(len(rows)).unsqueeze(1)
    return lambda step, _: rows[batch, anchors + step]


# ---------------------------------------------------------------- drafter: training


@dataclass(frozen=True)
class Read:
    """A text that the target has read, as far as drafters are concerned with it."""

    rows: torch.Tensor  # [B,T]
    hidden: torch.Tensor  # [B,T,H] after the final norm
    logits: torch.Tensor  # [B,T,V]
    kv: dict | None = None  # what an assistant borrows


def drafter_loss(family, drafter, target, rows, count):
    """Cross entropy to the target's law and to its argmax, half each, over the draft steps.

    A step weighs as much as it is likely to be reached: by the drafter's own law of the tokens fed before it.
    """
    read = family.read_with_target(target, rows)
    anchors, batch = anchors_of(rows, count), torch.arange(len(rows)).unsqueeze(1)
    text = own_text(rows, anchors)
    loss, reach = 0, torch.ones(anchors.numel())
    for step, drafted in enumerate(family.draft_logits(drafter, target, anchors, read, text)):
        law, log_q = read.logits[batch, anchors + step].flatten(0, 1), drafted.flatten(0, 1).log_softmax(-1)
        to_law, to_argmax = -(law.softmax(-1) * log_q).sum(-1), F.nll_loss(log_q, law.argmax(-1), reduction="none")
        loss = loss + (reach * 0.5 * (to_law + to_argmax)).mean()
        if step + 1 < NUM_DRAFT:
            reach = (reach * log_q.detach().gather(1, text(step + 1, None).view(-1, 1)).squeeze(1).exp()).clamp_min(0.1)
    return loss


def train_drafter(family, target, texts, corpus, validation, steps):
    """Three quarters on the target's own texts, a quarter on the training text."""
    model = family.new_drafter()
    target.requires_grad_(False)
    unseen = write_texts(family, target, validation, 32, batch=32)

    def step_loss():
        if corpus.pick(4):
            rows = texts[torch.randint(len(texts), (8,), generator=corpus.random)]
        else:
            rows = torch.stack([corpus.window(256) for _ in range(8)])
        return drafter_loss(family, model, target, rows, count=96)

    def rejected():
        """Of NUM_DRAFT tokens drafted greedily from unseen prompts, how many the target would not accept."""
        return NUM_DRAFT - accepted_lengths(family, model, target, unseen).float().mean().item()

    return optimise(
        family.DRAFTER,
        list(model.parameters()),
        steps,
        family.PEAK[family.DRAFTER],
        step_loss,
        rejected,
        lambda: own_state(model),
        weight_decay=0.05,
    )


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def accepted_lengths(family, drafter, target, rows):
    """How many greedy draft tokens the target would accept at every anchor of its own greedy text, [B,A]."""
    read = family.read_with_target(target, rows)
    anchors, batch = anchors_of(rows), torch.arange(len(rows)).unsqueeze(1)

    def own(step, drafted):
        return drafted.argmax(-1) if step else rows[batch, anchors]

    right = [
        drafted.argmax(-1) == read.logits[batch, anchors + step].argmax(-1)
        for step, drafted in enumerate(family.draft_logits(drafter, target, anchors, read, own))
    ]
    return torch.stack(right).cumprod(0).sum(0)


def heldout_prompts(tok, text, count=32, length=48):
    """`count` prompts of `length` tokens, each from the start of a speech, spread over the held-out text."""
    starts = [0] + [i + 2 for i in range(len(text) - 400) if text[i : i + 2] == "\n\n"]
    chosen = [starts[n * len(starts) // count] for n in range(count)]
    return torch.tensor([tok.encode(text[at : at + 400]).ids[:length] for at in chosen])


@torch.no_grad()
def measure_acceptance(family, drafter, target, prompts, new_tokens=128):
    """Greedy speculative decoding, replayed: the output is the target's greedy text, so only round lengths are open."""
    rows = target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=family.PAD,
        max_new_tokens=new_tokens + NUM_DRAFT + 1,
    )
    first = prompts.shape[1]  # the pass over the prompt emits the token at this index
    lengths = accepted_lengths(family, drafter, target, rows)
    rounds = []
    for row in lengths.tolist():
        at = first
        while at < first + new_tokens - 1:
            rounds.append(row[at - 1])  # anchors begin at 1
            at += row[at - 1] + 1
    rounds = torch.tensor(rounds).float()
    return {
        "rounds": len(rounds),
        "tokens_per_pass": rounds.mean().item() + 1,
        "accepted_at_least": [(rounds >= depth).float().mean().item() for depth in range(1, NUM_DRAFT + 1)],
    }


@torch.no_grad()
def measure_on_text(family, drafter, target, ids):
    """Expectation with the true text fed in: per depth, sum of min(p, q), p of the drafted argmax, argmax agreement."""
    sums, count = torch.zeros(3, NUM_DRAFT), 0
    for rows in heldout_windows(family, ids).split(8):
        read = family.read_with_target(target, rows)
        anchors, batch = anchors_of(rows), torch.arange(len(rows)).unsqueeze(1)
        text = own_text(rows, anchors)
        for step, drafted in enumerate(family.draft_logits(drafter, target, anchors, read, text)):
            p, q = read.logits[batch, anchors + step].softmax(-1), drafted.softmax(-1)
            best = q.argmax(-1, keepdim=True)
            sums[:, step] += torch.stack(
                [torch.minimum(p, q).sum(), p.gather(-1, best).sum(), (best.squeeze(-1) == p.argmax(-1)).sum()]
            )
        count += anchors.numel()
    return dict(zip(("sum_min_p_q", "p_of_argmax_draft", "argmax_agreement"), (sums / count).tolist()))


# ---------------------------------------------------------------- export


def quantization_config(ignore):
    return {
        "config_groups": {
            "group_0": {
                "format": "pack-quantized",
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "block_structure": None,
                    "dynamic": False,
                    "group_size": GROUP,
                    "num_bits": 4,
                    "observer": "memoryless_minmax",
                    "observer_kwargs": {},
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ignore,
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def pack_int32(codes):
    """codes [out, in] in -8..7 -> int32 [out, in/8]: each stored as code + 8, the first in the lowest bits."""
    nibbles = (codes.to(torch.int64) + 8).unflatten(1, (-1, 8))
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def packed_tensors(name, weight):
    codes, scale = quantize_int4(weight)
    return {f"{name}_packed": pack_int32(codes), f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}


def published_tensors(state, is_int4):
    """transformers' text-only names -> those of a published checkpoint; int4 where is_int4(name), else bf16."""
    tensors = {}
    for name, value in state.items():
        name = name.replace("model.", "model.language_model.", 1)
        tensors |= packed_tensors(name, value) if is_int4(name) else {name: value.bfloat16()}
    return tensors


def write_folder(folder, tensors, tok, template, **configs):
    """configs: the JSON files by name (config, generation_config, tokenizer_config)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable by its owner alone
    for name, content in configs.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(template)


# ---------------------------------------------------------------- stages


def stage(path, seed, corpus, make):
    """make() once, from its own seed; afterwards what it made is read back from path."""
    if not path.exists():
        torch.manual_seed(seed)
        corpus.random.manual_seed(seed)
        save_file(make(), path)
    return load_file(path)
