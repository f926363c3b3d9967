"""The tiny Gemma 4: sliding and full attention layers, and the assistant model that drafts for them."""

import json

import torch
from common import NUM_DRAFT, VOCAB, Read, published_tensors, quantization_config, speech_groups, write_folder
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Gemma4AssistantConfig, Gemma4AssistantForCausalLM, Gemma4ForCausalLM, Gemma4TextConfig

NAME, DRAFTER = "gemma4", "assistant"
STEPS = {"float": 1200, "qat": 300, "texts": 1536, "assistant": 1600}
PEAK = {"float": 3e-3, "qat": 8e-4, "assistant": 3e-3}

# ---------------------------------------------------------------- shapes

WINDOW = 32
PAD, EOS, BOS, TURN_END = 0, 1, 2, 106
PREFIX = [BOS]
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

# ---------------------------------------------------------------- tokenizer and conversations


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


def conversations(text):
    """The play's successive speeches as user and model turns."""
    for speeches in speech_groups(text):
        yield "<bos>" + "".join(
            f"<|turn>{('user', 'model')[n % 2]}\n{speech}<turn|>\n" for n, speech in enumerate(speeches)
        )


# ---------------------------------------------------------------- target


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


def residual_writers(layer):
    return layer.post_attention_layernorm, layer.post_feedforward_layernorm


def is_linear(name):
    """The matrices stored in int4: every Linear of the decoder layers, so neither the embedding nor the tied head."""
    return name.endswith("_proj.weight")


@torch.no_grad()
def read_with_target(target, rows):
    out = target.model(input_ids=rows, use_cache=False, return_shared_kv_states=True)
    logits = target.lm_head(out.last_hidden_state)
    cap = TEXT_CONFIG["final_logit_softcapping"]
    return Read(rows, out.last_hidden_state, cap * (logits / cap).tanh(), dict(out.shared_kv_states))


# ---------------------------------------------------------------- assistant


def assistant_config():
    return Gemma4AssistantConfig(
        text_config=Gemma4TextConfig(**ASSISTANT_TEXT_CONFIG),
        tie_word_embeddings=True,
        backbone_hidden_size=TEXT_CONFIG["hidden_size"],
        use_ordered_embeddings=False,
    )


def new_drafter():
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


def draft_logits(assistant, target, anchors, read, tokens):
    """Yield the logits [B,A,V] of each draft step; tokens(step, logits of the step before) -> ids [B,A] to feed.

    All anchors of all rows are drafted from at once. Position and keys stay those of the anchor in every step;
    what changes is the token and the hidden state, which after the first step is the assistant's own.
    """
    masks = borrowed_masks(anchors, read.kv["full_attention"][0].shape[2])
    batch = torch.arange(len(anchors)).unsqueeze(1)
    behind, logits = read.hidden[batch, anchors - 1], None
    for step in range(NUM_DRAFT):
        both = torch.cat([target.model.embed_tokens(tokens(step, logits)), behind], dim=-1)
        out = assistant.model(
            inputs_embeds=assistant.pre_projection(both),
            attention_mask=masks,
            position_ids=anchors,
            shared_kv_states=read.kv,
            use_cache=False,
        )
        behind, logits = assistant.post_projection(out.last_hidden_state), assistant.lm_head(out.last_hidden_state)
        yield logits


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

UNQUANTIZED = [
    "lm_head",
    "re:.*embed.*",
    "re:.*vision_tower.*",
    "re:.*vision_embedder.*",
    "re:.*audio_tower.*",
    "re:.*router.*",
]

ASSISTANT_CONFIG = {key: ARCHITECTURE[key] for key in ARCHITECTURE if key.endswith(("token_id", "version"))} | {
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

ASSISTANT_SAMPLING = SAMPLING | {
    "is_assistant": True,
    "num_assistant_tokens": NUM_DRAFT,
    "num_assistant_tokens_schedule": "constant",
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


def export(out, tok, float_state, qat_state, assistant_state):
    def write(name, tensors, config, generation):
        configs = {"config": config, "generation_config": generation, "tokenizer_config": TOKENIZER_CONFIG}
        write_folder(out / name, tensors, tok, CHAT_TEMPLATE, **configs)

    config = ARCHITECTURE | {"text_config": TEXT_CONFIG}
    write("tiny-gemma4-float", published_tensors(float_state, lambda name: False), config, SAMPLING)
    int4_config = config | {"quantization_config": quantization_config(UNQUANTIZED)}
    write("tiny-gemma4", published_tensors(qat_state, is_linear), int4_config, SAMPLING)
    assistant_tensors = {name: value.bfloat16() for name, value in assistant_state.items()}
    write("tiny-gemma4-assistant", assistant_tensors, ASSISTANT_CONFIG, ASSISTANT_SAMPLING)
