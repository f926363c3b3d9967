#!/usr/bin/env python3
"""Train the tiny Gemma 4 family of this folder from one text file.

    python weights/train.py TEXT [--out weights] [--work DIR]

tokenizer -> float target -> int4 QAT target -> MTP assistant -> export -> report.json.
Every stage leaves its result in --work and is skipped when that result is already there.
Needs torch, transformers 5.22.2, safetensors, tokenizers and tqdm; one CPU core is enough.
"""

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.func import functional_call
from tqdm import tqdm
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

# ---------------------------------------------------------------- shapes

VOCAB, WINDOW, GROUP, NUM_DRAFT = 1216, 32, 32, 4
PAD, EOS, BOS, TURN_END = 0, 1, 2, 106
LAYER_TYPES = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]

TEXT_CONFIG = {  # spelled as in the published config.json files
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_k_eq_v": True,
    "bos_token_id": BOS,
    "dtype": "bfloat16",
    "enable_moe_block": False,
    "eos_token_id": EOS,
    "final_logit_softcapping": 30.0,
    "global_head_dim": 64,
    "head_dim": 32,
    "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 256,
    "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02,
    "intermediate_size": 320,
    "layer_types": LAYER_TYPES,
    "max_position_embeddings": 2048,
    "model_type": "gemma4_text",
    "moe_intermediate_size": None,
    "num_attention_heads": 4,
    "num_experts": None,
    "num_global_key_value_heads": 1,
    "num_hidden_layers": 5,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 0,
    "pad_token_id": PAD,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "full_attention": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window": WINDOW,
    "tie_word_embeddings": True,
    "top_k_experts": None,
    "use_bidirectional_attention": None,
    "use_cache": True,
    "use_double_wide_mlp": False,
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
}

ASSISTANT_TEXT_CONFIG = TEXT_CONFIG | {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 4,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    "final_logit_softcapping": None,
    "vocab_size_per_layer_input": 0,
}

# Not one, so that a reader that forgets layer_scalar fails on these weights as it would on the published ones.
LAYER_SCALARS = [0.625, 0.75, 0.875, 1.125, 1.25]

# ---------------------------------------------------------------- text and tokenizer


def split_text(text):
    """-> (train, validation, heldout): the last 5 % is never trained on; its end, cut at a speech, is heldout.txt."""
    cut = text.index("\n\n", int(len(text) * 0.95)) + 2
    tail = text.index("\n\n", len(text) - 19_000) + 2
    return text[:cut], text[cut:tail], text[tail:]


def special_tokens():
    """Gemma 4's control tokens at Gemma 4's own ids 0..106; ids without a name here are <unusedN>, as there."""
    named = {
        0: "<pad>",
        1: "<eos>",
        2: "<bos>",
        3: "<unk>",
        4: "<mask>",
        46: "<|tool>",
        47: "<tool|>",
        48: "<|tool_call>",
        49: "<tool_call|>",
        50: "<|tool_response>",
        51: "<tool_response|>",
        52: '<|"|>',
        88: "<|image>",
        89: "<|image|>",
        90: "<image|>",
        91: "<|audio>",
        92: "<|audio|>",
        93: "<audio|>",
        94: "<|video|>",
        98: "<|think|>",
        100: "<|channel>",
        101: "<channel|>",
        105: "<|turn>",
        TURN_END: "<turn|>",
    }
    return [named.get(i, f"<unused{i}>") for i in range(TURN_END + 1)]


def learn_pieces(text, count):
    """BPE within words (a word carries the ▁ before it) and within nothing else -> (characters, merges)."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\n+"), "removed"), pre_tokenizers.Split("▁", "merged_with_next")]
    )
    tok.train_from_iterator([text], trainers.BpeTrainer(vocab_size=count, show_progress=False))
    learned = json.loads(tok.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    made = {a + b for a, b in merges}
    return [piece for piece in learned["vocab"] if piece not in made], merges


def build_tokenizer(train_text):
    """Gemma's form: spaces become ▁, one BPE over the whole text, bytes for what has no piece, bos in front."""
    runs = [c * n for c in "\n▁" for n in range(1 if c == "\n" else 2, 9)]
    run_merges = [(c * a, c * (n - a)) for c in "\n▁" for n in range(2, 9) for a in range(n - 1, 0, -1)]
    fixed = special_tokens() + runs + [f"<0x{b:02X}>" for b in range(256)]
    letters, merges = learn_pieces(train_text, VOCAB - len(fixed))
    pieces = fixed + letters + [a + b for a, b in merges]
    assert len(pieces) == len(set(pieces)) == VOCAB, (len(pieces), len(set(pieces)))
    tok = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=run_merges + merges,
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tok.normalizer = normalizers.Replace(" ", "▁")
    tok.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")  # no-op after the normalizer; Gemma has it
    tok.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tok.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    tok.add_special_tokens(special_tokens())
    return tok


CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<|turn>' + role + '\\n' + message['content'] | trim + '<turn|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|turn>model\\n' -}}{%- endif -%}
"""


def conversations(text, turns=4):
    """The play's successive speeches as user and model turns, `turns` speeches to a conversation."""
    speeches = [speech.strip() for speech in text.split("\n\n") if speech.strip()]
    for at in range(0, len(speeches) - turns, turns):
        yield "<bos>" + "".join(
            f"<|turn>{('user', 'model')[n % 2]}\n{speech}<turn|>\n"
            for n, speech in enumerate(speeches[at : at + turns])
        )


class Corpus:
    """Token streams of one text, and random windows of them that begin with <bos>."""

    def __init__(self, tok, text):
        def encode(s):
            return tok.encode(s, add_special_tokens=False).ids

        self.plain = torch.tensor(encode(text))
        chats = [encode(chat) for chat in conversations(text)]
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
        return torch.cat([torch.tensor([BOS]), self.plain[start : start + length - 1]])

    def batch(self, tokens=2048):
        """Short windows mostly; longer ones so that positions far past the sliding window are learned."""
        length = (128, 128, 256, 512)[self.pick(4)]
        return torch.stack([self.window(length + 1) for _ in range(tokens // length)])


def heldout_windows(ids, length=256):
    """All of ids once, as [N, length] rows of <bos> + text (a short rest is dropped)."""
    rows = ids[: len(ids) // (length - 1) * (length - 1)].view(-1, length - 1)
    return torch.cat([torch.full((len(rows), 1), BOS), rows], dim=1)


# ---------------------------------------------------------------- target: float training


def new_target():
    return started(Gemma4ForCausalLM(Gemma4TextConfig(**TEXT_CONFIG)))


def started(model):
    """Set the layer scalars; and, as attention has no 1/sqrt(head_dim), start the q and k norms with that factor."""
    for layer, scalar in zip(model.model.layers, LAYER_SCALARS):
        layer.layer_scalar.fill_(scalar)
        for name in ("q_norm", "k_norm"):
            if norm := getattr(layer.self_attn, name, None):
                torch.nn.init.constant_(norm.weight, layer.self_attn.head_dim**-0.25)
    return model


def add_dropout(model, p):
    """Dropout on the embedding and on what each block adds to the residual stream; returns its hooks."""

    def drop(module, args, out):
        return F.dropout(out, p, model.training)

    blocks = [
        norm
        for layer in model.model.layers
        for norm in (layer.post_attention_layernorm, layer.post_feedforward_layernorm)
    ]
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
def heldout_loss(model, ids, weights=None):
    """Mean cross entropy in nats per token over ids, in windows of 256."""
    model.eval()
    total = count = 0
    for rows in heldout_windows(ids).split(8):
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


def own_state(model):
    """A copy of the weights, without the tied head and without what the config already says."""
    return {
        name: value.detach().clone().contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight" and "inv_freq" not in name and "embed_scale" not in name
    }


def train_float(corpus, validation, steps):
    model = new_target()
    hooks = add_dropout(model, 0.1)

    def step_loss():
        rows = corpus.batch()
        return F.cross_entropy(logits_of(model, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    state = optimise(
        "float",
        list(model.parameters()),
        steps,
        3e-3,
        step_loss,
        lambda: heldout_loss(model, validation.plain),
        lambda: own_state(model),
    )
    for hook in hooks:
        hook.remove()
    return state


# ---------------------------------------------------------------- target: int4 quantization-aware training


def is_linear(name):
    """The matrices stored in int4: every Linear of the decoder layers, so neither the embedding nor the tied head."""
    return name.endswith("_proj.weight")


def quantize_int4(weight):
    """-> (codes in -8..7 [out, in], bf16 scales [out, in/32]) as compressed-tensors' symmetric minmax makes them."""
    groups = weight.unflatten(1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 7.5).clamp_min(1e-8).bfloat16()
    codes = (groups / scale.float().unsqueeze(-1)).round().clamp(-8, 7)
    return codes.flatten(1), scale


def dequantize_int4(codes, scale):
    return (codes.unflatten(1, (-1, GROUP)) * scale.float().unsqueeze(-1)).flatten(1)


def rounded(name, weight):
    """The value the shipped checkpoint will hold: int4 for the Linears, bf16 for everything else."""
    return dequantize_int4(*quantize_int4(weight)) if is_linear(name) else weight.bfloat16().float()


def straight_through(params):
    """Rounded weights whose gradient reaches the unrounded ones."""
    return {name: p + (rounded(name, p) - p).detach() for name, p in params.items()}


def round_state(state, how):
    return {name: how(name, value) for name, value in state.items()}


def to_bf16(name, value):
    return value.bfloat16().float()


def with_weights(model, state):
    """The model with these weights; its head is tied to the embedding and not among them."""
    missing, unknown = model.load_state_dict(state, strict=False)
    assert not unknown and set(missing) <= {"lm_head.weight"}, (missing, unknown)
    model.tie_weights()
    return model


def target_from(state):
    return with_weights(new_target(), state)


def train_qat(float_state, corpus, validation, steps):
    """Fine-tune the float model through the rounding -> unrounded weights."""
    model = target_from(float_state)
    params = dict(model.named_parameters())
    hooks = add_dropout(model, 0.1)

    def step_loss():
        rows = corpus.batch()
        return F.cross_entropy(
            logits_of(model, rows[:, :-1], straight_through(params)).flatten(0, 1), rows[:, 1:].flatten()
        )

    def validate():
        return heldout_loss(model, validation.plain, {name: rounded(name, p.detach()) for name, p in params.items()})

    state = optimise("qat", list(params.values()), steps, 8e-4, step_loss, validate, lambda: own_state(model))
    for hook in hooks:
        hook.remove()
    return state


# ---------------------------------------------------------------- assistant: what it learns from


@torch.no_grad()
def write_texts(target, corpus, rows, length=256, batch=128):
    """Continuations the target writes after training prompts of 16..96 tokens, greedy or at a low temperature.

    Acceptance is measured on the target's own text, so that is what the assistant must know best.
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
                pad_token_id=PAD,
                max_length=length,
                **sampling,
            )
        )
    return torch.cat(written)


@torch.no_grad()
def read_with_target(target, rows):
    """-> hidden states after the final norm [B,T,H], logits [B,T,V], the KV the assistant borrows."""
    out = target.model(input_ids=rows, use_cache=False, return_shared_kv_states=True)
    logits = target.lm_head(out.last_hidden_state)
    cap = TEXT_CONFIG["final_logit_softcapping"]
    return out.last_hidden_state, cap * (logits / cap).tanh(), dict(out.shared_kv_states)


# ---------------------------------------------------------------- assistant: forward and training


def assistant_config():
    return Gemma4AssistantConfig(
        text_config=Gemma4TextConfig(**ASSISTANT_TEXT_CONFIG),
        tie_word_embeddings=True,
        backbone_hidden_size=TEXT_CONFIG["hidden_size"],
        use_ordered_embeddings=False,
    )


def new_assistant():
    return started(Gemma4AssistantForCausalLM(assistant_config()).float())  # the config's dtype is the files'


def borrowed_masks(anchors, length):
    """Which of the target's keys each anchor's query sees, [B,1,A,T] per layer kind.

    anchors [B,A]: the position P of the last emitted token, which the target has not read: keys j < P.
    The sliding layers see window + 1 of them, as transformers' mask for the assistant does.
    """
    distance = anchors.unsqueeze(-1) - torch.arange(length)
    return {
        "full_attention": (distance > 0).unsqueeze(1),
        "sliding_attention": ((distance > 0) & (distance <= WINDOW + 1)).unsqueeze(1),
    }


def own_text(rows, anchors):
    """-> what a drafter is fed: at every anchor and step, the text's own token."""
    batch = torch.arange(len(rows)).unsqueeze(1)
    return lambda step, _: rows[batch, anchors + step]


def draft_logits(assistant, target, anchors, hidden, kv, tokens):
    """Yield the logits [B,A,V] of each draft step; tokens(step, logits of the step before) -> ids [B,A] to feed.

    All anchors of all rows are drafted from at once. Position and keys stay those of the anchor in every step;
    what changes is the token and the hidden state, which after the first step is the assistant's own.
    """
    masks = borrowed_masks(anchors, kv["full_attention"][0].shape[2])
    batch = torch.arange(len(anchors)).unsqueeze(1)
    behind, logits = hidden[batch, anchors - 1], None
    for step in range(NUM_DRAFT):
        both = torch.cat([target.model.embed_tokens(tokens(step, logits)), behind], dim=-1)
        out = assistant.model(
            inputs_embeds=assistant.pre_projection(both),
            attention_mask=masks,
            position_ids=anchors,
            shared_kv_states=kv,
            use_cache=False,
        )
        behind, logits = assistant.post_projection(out.last_hidden_state), assistant.lm_head(out.last_hidden_state)
        yield logits


def anchors_of(rows, count=None):
    """Positions with a hidden state before and NUM_DRAFT laws from them on: all, or `count` random ones per row."""
    usable = rows.shape[1] - NUM_DRAFT
    if count is None:
        return torch.arange(1, usable + 1).expand(len(rows), -1)
    return torch.stack([torch.randperm(usable)[:count] + 1 for _ in range(len(rows))])


def assistant_loss(assistant, target, rows, count):
    """Cross entropy to the target's law and to its argmax, half each, over the draft steps.

    A step weighs as much as it is likely to be reached: by the assistant's own law of the tokens fed before it.
    """
    hidden, logits, kv = read_with_target(target, rows)
    anchors, batch = anchors_of(rows, count), torch.arange(len(rows)).unsqueeze(1)
    text = own_text(rows, anchors)
    loss, reach = 0, torch.ones(anchors.numel())
    for step, drafted in enumerate(draft_logits(assistant, target, anchors, hidden, kv, text)):
        law, log_q = logits[batch, anchors + step].flatten(0, 1), drafted.flatten(0, 1).log_softmax(-1)
        to_law, to_argmax = -(law.softmax(-1) * log_q).sum(-1), F.nll_loss(log_q, law.argmax(-1), reduction="none")
        loss = loss + (reach * 0.5 * (to_law + to_argmax)).mean()
        if step + 1 < NUM_DRAFT:
            reach = (reach * log_q.detach().gather(1, text(step + 1, None).view(-1, 1)).squeeze(1).exp()).clamp_min(0.1)
    return loss


def train_assistant(target, texts, corpus, validation, steps):
    """Three quarters on the target's own texts, a quarter on the training text."""
    model = new_assistant()
    target.requires_grad_(False)
    unseen = write_texts(target, validation, 32, batch=32)

    def step_loss():
        if corpus.pick(4):
            rows = texts[torch.randint(len(texts), (8,), generator=corpus.random)]
        else:
            rows = torch.stack([corpus.window(256) for _ in range(8)])
        return assistant_loss(model, target, rows, count=96)

    def rejected():
        """Of NUM_DRAFT tokens drafted greedily from unseen prompts, how many the target would not accept."""
        return NUM_DRAFT - accepted_lengths(model, target, unseen).float().mean().item()

    return optimise(
        "assistant",
        list(model.parameters()),
        steps,
        3e-3,
        step_loss,
        rejected,
        lambda: own_state(model),
        weight_decay=0.05,
    )


# ---------------------------------------------------------------- measuring


@torch.no_grad()
def accepted_lengths(assistant, target, rows):
    """How many greedy draft tokens the target would accept at every anchor of its own greedy text, [B,A]."""
    hidden, logits, kv = read_with_target(target, rows)
    anchors, batch = anchors_of(rows), torch.arange(len(rows)).unsqueeze(1)

    def own(step, drafted):
        return drafted.argmax(-1) if step else rows[batch, anchors]

    right = [
        drafted.argmax(-1) == logits[batch, anchors + step].argmax(-1)
        for step, drafted in enumerate(draft_logits(assistant, target, anchors, hidden, kv, own))
    ]
    return torch.stack(right).cumprod(0).sum(0)


def heldout_prompts(tok, text, count=32, length=48):
    """`count` prompts of `length` tokens, each from the start of a speech, spread over the held-out text."""
    starts = [0] + [i + 2 for i in range(len(text) - 400) if text[i : i + 2] == "\n\n"]
    chosen = [starts[n * len(starts) // count] for n in range(count)]
    return torch.tensor([tok.encode(text[at : at + 400]).ids[:length] for at in chosen])


@torch.no_grad()
def measure_acceptance(assistant, target, prompts, new_tokens=128):
    """Greedy speculative decoding, replayed: the output is the target's greedy text, so only round lengths are open."""
    rows = target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        eos_token_id=None,
        pad_token_id=PAD,
        max_new_tokens=new_tokens + NUM_DRAFT + 1,
    )
    first = prompts.shape[1]  # the pass over the prompt emits the token at this index
    lengths = accepted_lengths(assistant, target, rows)
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
def measure_on_text(assistant, target, ids):
    """Expectation with the true text fed in: per depth, sum of min(p, q), p of the drafted argmax, argmax agreement."""
    sums, count = torch.zeros(3, NUM_DRAFT), 0
    for rows in heldout_windows(ids).split(8):
        hidden, logits, kv = read_with_target(target, rows)
        anchors, batch = anchors_of(rows), torch.arange(len(rows)).unsqueeze(1)
        text = own_text(rows, anchors)
        for step, drafted in enumerate(draft_logits(assistant, target, anchors, hidden, kv, text)):
            p, q = logits[batch, anchors + step].softmax(-1), drafted.softmax(-1)
            best = q.argmax(-1, keepdim=True)
            sums[:, step] += torch.stack(
                [torch.minimum(p, q).sum(), p.gather(-1, best).sum(), (best.squeeze(-1) == p.argmax(-1)).sum()]
            )
        count += anchors.numel()
    return dict(zip(("sum_min_p_q", "p_of_argmax_draft", "argmax_agreement"), (sums / count).tolist()))


# ---------------------------------------------------------------- export

ARCHITECTURE = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "vision_config": None,
    "boi_token_id": 88,
    "image_token_id": 89,
    "eoi_token_id": 90,
    "boa_token_id": 91,
    "audio_token_id": 92,
    "eoa_token_id": 93,
    "eoa_token_index": 93,
    "video_token_id": 94,
    "dtype": "bfloat16",
    "eos_token_id": [EOS, TURN_END],
    "initializer_range": 0.02,
    "model_type": "gemma4",
    "tie_word_embeddings": True,
    "transformers_version": "5.22.2",
}

QUANTIZATION_CONFIG = {
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
    "ignore": [
        "lm_head",
        "re:.*embed.*",
        "re:.*vision_tower.*",
        "re:.*vision_embedder.*",
        "re:.*audio_tower.*",
        "re:.*router.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}

SAMPLING = {
    "bos_token_id": BOS,
    "do_sample": True,
    "eos_token_id": [EOS, TURN_END, 50],
    "pad_token_id": PAD,
    "temperature": 1.0,
    "top_k": 64,
    "top_p": 0.95,
    "transformers_version": "5.22.2",
}

TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "<mask>",
    "clean_up_tokenization_spaces": False,
    "model_max_length": TEXT_CONFIG["max_position_embeddings"],
    "padding_side": "left",
    "tokenizer_class": "GemmaTokenizer",
}


def pack_int32(codes):
    """codes [out, in] in -8..7 -> int32 [out, in/8]: each stored as code + 8, the first in the lowest bits."""
    nibbles = (codes.to(torch.int64) + 8).unflatten(1, (-1, 8))
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def packed_tensors(name, weight):
    codes, scale = quantize_int4(weight)
    return {f"{name}_packed": pack_int32(codes), f"{name}_scale": scale, f"{name}_shape": torch.tensor(weight.shape)}


def published_names(state, int4):
    """transformers' text-only names -> those of a published checkpoint, in bf16 or int4."""
    tensors = {}
    for name, value in state.items():
        name = name.replace("model.", "model.language_model.", 1)
        tensors |= packed_tensors(name, value) if int4 and is_linear(name) else {name: value.bfloat16()}
    return tensors


def write_folder(folder, tensors, config, generation, tok):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # save_file leaves it readable by its owner alone
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", TOKENIZER_CONFIG),
    ):
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    tok.save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def export(out, tok, float_state, qat_state, assistant_state):
    config = ARCHITECTURE | {"text_config": TEXT_CONFIG}
    write_folder(out / "tiny-gemma4-float", published_names(float_state, int4=False), config, SAMPLING, tok)
    write_folder(
        out / "tiny-gemma4",
        published_names(qat_state, int4=True),
        config | {"quantization_config": QUANTIZATION_CONFIG},
        SAMPLING,
        tok,
    )
    drafter = {key: ARCHITECTURE[key] for key in ARCHITECTURE if key.endswith(("token_id", "version"))} | {
        "architectures": ["Gemma4AssistantForCausalLM"],
        "backbone_hidden_size": TEXT_CONFIG["hidden_size"],
        "centroid_intermediate_top_k": 32,
        "dtype": "bfloat16",
        "model_type": "gemma4_assistant",
        "num_centroids": 2048,
        "text_config": ASSISTANT_TEXT_CONFIG,
        "tie_word_embeddings": True,
        "use_ordered_embeddings": False,
    }
    drafting = SAMPLING | {
        "is_assistant": True,
        "num_assistant_tokens": NUM_DRAFT,
        "num_assistant_tokens_schedule": "constant",
    }
    write_folder(
        out / "tiny-gemma4-assistant",
        {name: value.bfloat16() for name, value in assistant_state.items()},
        drafter,
        drafting,
        tok,
    )


# ---------------------------------------------------------------- stages


def stage(path, seed, corpus, make):
    """make() once, from its own seed; afterwards what it made is read back from path."""
    if not path.exists():
        torch.manual_seed(seed)
        corpus.random.manual_seed(seed)
        save_file(make(), path)
    return load_file(path)


def report(tok, validation_text, heldout_text, float_state, qat_state, assistant_state):
    def encode(text):
        return torch.tensor(tok.encode(text, add_special_tokens=False).ids)

    parts = {"validation": encode(validation_text), "heldout": encode(heldout_text)}
    assistant = with_weights(new_assistant(), round_state(assistant_state, to_bf16)).eval()
    targets = {
        "float": target_from(round_state(float_state, to_bf16)),
        "float_rounded_to_int4_afterwards": target_from(round_state(float_state, rounded)),
        "qat_int4": target_from(round_state(qat_state, rounded)),
    }
    losses = {part: {name: heldout_loss(model, ids) for name, model in targets.items()} for part, ids in parts.items()}
    target = targets["qat_int4"].eval()
    return {
        "tokens": {part: len(ids) for part, ids in parts.items()},
        "parameters": {"target": count(qat_state), "assistant": count(assistant_state)},
        "loss_nats_per_token": losses,
        "greedy": measure_acceptance(assistant, target, heldout_prompts(tok, heldout_text)),
        "heldout_text": measure_on_text(assistant, target, parts["heldout"]),
    }


def count(state):
    return sum(value.numel() for value in state.values())


def main():
    args = arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    def steps(full):
        return max(2, round(full * args.effort))

    def made(name, seed, make):
        return stage(args.work / f"{name}.safetensors", seed, corpus, make)

    train_text, validation_text, heldout_text = split_text(Path(args.text).read_text(encoding="utf-8"))
    tok = build_tokenizer(train_text)
    corpus, validation = Corpus(tok, train_text), Corpus(tok, validation_text)

    float_state = made("float", 0, lambda: train_float(corpus, validation, steps(1200)))
    qat_state = made("qat", 1, lambda: train_qat(float_state, corpus, validation, steps(300)))
    target = target_from(round_state(qat_state, rounded)).eval()
    texts = made("texts", 2, lambda: {"ids": write_texts(target, corpus, steps(1536))})["ids"]
    assistant_state = made("assistant", 3, lambda: train_assistant(target, texts, corpus, validation, steps(1600)))

    export(args.out, tok, float_state, qat_state, assistant_state)
    (args.out / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    figures = report(tok, validation_text, heldout_text, float_state, qat_state, assistant_state)
    (args.out / "report.json").write_text(json.dumps(figures, indent=2) + "\n")
    print(json.dumps(figures, indent=2))


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", help="a plain text file; its last 5 % is held out")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="where the three folders go")
    parser.add_argument("--work", type=Path, default=Path("train-work"), help="unrounded weights of finished stages")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--effort", type=float, default=1.0, help="share of the full number of steps (for a trial run)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
