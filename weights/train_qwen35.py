"""The tiny Qwen 3.5: gated DeltaNet and full attention layers, and the MTP layer that drafts for them."""

import torch
from common import NUM_DRAFT, VOCAB, Read, published_tensors, quantization_config, speech_groups, write_folder
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5DecoderLayer, Qwen3_5RMSNorm
from transformers.models.qwen3_5.tokenization_qwen3_5 import PRETOKENIZE_REGEX

NAME, DRAFTER = "qwen35", "mtp"
STEPS = {"float": 1050, "qat": 200, "texts": 1536, "mtp": 1200}
PEAK = {"float": 3e-3, "qat": 2e-4, "mtp": 3e-3}

# ---------------------------------------------------------------- shapes

SPECIAL = [  # in the published order; the published vocabulary ends with them too
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]
SHOWN = {token for token in SPECIAL if "|" not in token} | {token for token in SPECIAL[16:22]}  # as published
SPARE = 6  # rows of the embedding and the head without a token, as the published models have some
PIECES = VOCAB - len(SPECIAL) - SPARE
ID = {token: PIECES + n for n, token in enumerate(SPECIAL)}
PREFIX, PAD = [], ID["<|endoftext|>"]

TEXT_CONFIG = {  # spelled as in the published config.json files
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "dtype": "bfloat16",
    "eos_token_id": ID["<|endoftext|>"],
    "full_attention_interval": 4,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 2048,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": VOCAB,
}

# ---------------------------------------------------------------- tokenizer and conversations


def build_tokenizer(train_text):
    """Qwen's form: NFC, Qwen's own split into words, BPE over bytes, nothing in front."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFC()
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False),
        ]
    )
    tok.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    tok.decoder = decoders.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)
    trainer = trainers.BpeTrainer(
        vocab_size=PIECES, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tok.train_from_iterator([train_text], trainer)
    for token in SPECIAL:
        tok.add_tokens([AddedToken(token, special=token not in SHOWN, normalized=False)])
    assert {token: tok.token_to_id(token) for token in SPECIAL} == ID, tok.get_vocab_size()
    return tok


THINKING_OFF = "<think>\n\n</think>\n\n"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}
"""


def conversations(text):
    """The play's successive speeches as user and assistant turns; every other last answer begins with no thoughts."""
    for n, speeches in enumerate(speech_groups(text)):
        turns = [
            f"<|im_start|>{('user', 'assistant')[at % 2]}\n{speech}<|im_end|>\n" for at, speech in enumerate(speeches)
        ]
        if n % 2:
            turns[-1] = turns[-1].replace("\n", f"\n{THINKING_OFF}", 1)
        yield "".join(turns)


# ---------------------------------------------------------------- target


def new_target():
    return started(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**TEXT_CONFIG)))


def started(model):
    """Start each DeltaNet head with a memory of its own length, as Mamba does: steps of 0.001 to 0.1 (log-uniform)."""
    for layer in model.model.layers:
        if layer.block_type == "linear_attention":
            bias = layer.linear_attn.dt_bias
            step = 0.001 * 100 ** torch.rand_like(bias)
            bias.data.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of it is the step
    return model


def residual_writers(layer):
    if layer.block_type == "linear_attention":
        return layer.linear_attn.out_proj, layer.mlp.down_proj
    return layer.self_attn.o_proj, layer.mlp.down_proj


INT4 = "q_proj k_proj v_proj o_proj in_proj_qkv in_proj_z out_proj gate_proj up_proj down_proj".split()


def is_linear(name):
    """The matrices stored in int4: the decoder layers' Linears, but not in_proj_a and in_proj_b, which make gates."""
    return name.endswith(tuple(f".{matrix}.weight" for matrix in INT4))


# ---------------------------------------------------------------- MTP layer


class Mtp(torch.nn.Module):
    """The layer that drafts; its parameters are named as the checkpoint's `mtp.*`."""

    def __init__(self, config):
        super().__init__()
        self.config, size = config, config.hidden_size
        self.fc = torch.nn.Linear(2 * size, size, bias=False)
        self.pre_fc_norm_embedding = Qwen3_5RMSNorm(size, config.rms_norm_eps)
        self.pre_fc_norm_hidden = Qwen3_5RMSNorm(size, config.rms_norm_eps)
        self.layers = torch.nn.ModuleList([Qwen3_5DecoderLayer(config, 0)])
        self.norm = Qwen3_5RMSNorm(size, config.rms_norm_eps)
        for module in self.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(self, embedded, hidden, rotary, mask, kv):
        both = torch.cat([self.pre_fc_norm_embedding(embedded), self.pre_fc_norm_hidden(hidden)], dim=-1)
        return self.norm(self.layers[0](self.fc(both), rotary, attention_mask=mask, past_key_values=kv))


class EntriesSoFar:
    """The MTP layer's keys and values, one step's entries behind the other's; what its attention calls its cache."""

    def __init__(self):
        self.steps = []

    def update(self, keys, values, layer):
        self.steps.append((keys, values))
        return tuple(torch.cat(both, dim=2) for both in zip(*self.steps))


def new_drafter():
    shape = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
    return Mtp(Qwen3_5TextConfig(**TEXT_CONFIG | shape, attn_implementation="sdpa"))


@torch.no_grad()
def read_with_target(target, rows):
    hidden = target.model(input_ids=rows, use_cache=False).last_hidden_state
    return Read(rows, hidden, target.lm_head(hidden))


def draft_logits(mtp, target, anchors, read, tokens):
    """Yield the logits [B,A,V] of each draft step; tokens(step, logits of the step before) -> ids [B,A] to feed.

    All anchors of all rows are drafted from at once. The first step is made at every position, from the text's tokens
    and the target's hidden states: its entries are what the layer's cache holds. A later step of an anchor is fed the
    layer's own output; it sees those entries up to the anchor, and the ones that the anchor's steps before it made.
    """
    batch, everywhere = torch.arange(len(anchors)).unsqueeze(1), torch.arange(1, read.rows.shape[1])
    kv = EntriesSoFar()

    def run(ids, hidden, at, mask):
        rotary = target.model.rotary_emb(hidden, at)
        return mtp(target.model.embed_tokens(ids), hidden, rotary, mask.unsqueeze(1), kv)

    positions = everywhere.expand(len(anchors), -1)
    out = run(read.rows[:, 1:], read.hidden[:, :-1], positions, everywhere <= positions.unsqueeze(-1))
    out = out[batch, anchors - 1]
    yield (logits := target.lm_head(out))
    seen, own = everywhere <= anchors.unsqueeze(-1), torch.eye(anchors.shape[1], dtype=torch.bool)
    for step in range(1, NUM_DRAFT):
        seen = torch.cat([seen, own.expand(len(anchors), -1, -1)], dim=-1)
        out = run(tokens(step, logits), out, anchors + step, seen)
        yield (logits := target.lm_head(out))


# ---------------------------------------------------------------- export

CONFIG = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": ID["<|image_pad|>"],
    "model_type": "qwen3_5",
    "text_config": TEXT_CONFIG,
    "tie_word_embeddings": False,
    "transformers_version": "5.22.2",
    "video_token_id": ID["<|video_pad|>"],
    "vision_config": None,
    "vision_end_token_id": ID["<|vision_end|>"],
    "vision_start_token_id": ID["<|vision_start|>"],
    "quantization_config": quantization_config(
        [
            "lm_head",
            "re:.*embed.*",
            "re:.*visual.*",
            "re:.*linear_attn\\.in_proj_[ab]$",
            "re:.*mtp.*",
        ]
    ),
}

SAMPLING = {
    "do_sample": True,
    "eos_token_id": [ID["<|im_end|>"], ID["<|endoftext|>"]],
    "pad_token_id": PAD,
    "temperature": 1.0,
    "top_k": 20,
    "top_p": 0.95,
    "transformers_version": "5.22.2",
}

TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "add_prefix_space": False,
    "bos_token": None,
    "clean_up_tokenization_spaces": False,
    "eos_token": "<|im_end|>",
    "errors": "replace",
    "model_max_length": TEXT_CONFIG["max_position_embeddings"],
    "pad_token": "<|endoftext|>",
    "split_special_tokens": False,
    "tokenizer_class": "Qwen2Tokenizer",
    "unk_token": None,
}


def export(out, tok, float_state, qat_state, mtp_state):
    """One folder: the int4 target, and in the same file its MTP layer in bf16."""
    tensors = published_tensors(qat_state, is_linear)
    tensors |= {f"mtp.{name}": value.bfloat16() for name, value in mtp_state.items()}
    write_folder(
        out / "tiny-qwen35",
        tensors,
        tok,
        CHAT_TEMPLATE,
        config=CONFIG,
        generation_config=SAMPLING,
        tokenizer_config=TOKENIZER_CONFIG,
    )
