"""Random models of every architecture that isotone knows, small enough for a test to train and export."""

from typing import Any

import torch
from transformers import (
    ArceeConfig,
    ArceeForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from isotone.constraint.feed_forward import probe_logits

VOCABULARY = 64
_PLAIN = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_GPT = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "resid_pdrop": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_OPT = {k: v for k, v in _PLAIN.items() if k != "intermediate_size"} | {"ffn_dim": 32, "dropout": 0.0}
_T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
_GROUPED = _PLAIN | {"num_key_value_heads": 1}

MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, _PLAIN),
    "gpt_neox_sequential": (GPTNeoXConfig, GPTNeoXForCausalLM, _PLAIN | {"use_parallel_residual": False}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, _GPT),
    "opt": (OPTConfig, OPTForCausalLM, _OPT | {"word_embed_proj_dim": 16}),
    "opt_post_norm": (OPTConfig, OPTForCausalLM, _OPT | {"word_embed_proj_dim": 8, "do_layer_norm_before": False}),
    "phi": (PhiConfig, PhiForCausalLM, _PLAIN),
    "gptj": (GPTJConfig, GPTJForCausalLM, _GPT | {"rotary_dim": 4}),
    "bloom": (BloomConfig, BloomForCausalLM, {"hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "arcee": (ArceeConfig, ArceeForCausalLM, _GROUPED | {"hidden_act": "relu", "head_dim": 8}),
    "llama": (LlamaConfig, LlamaForCausalLM, _GROUPED | {"head_dim": 8}),
    "mistral": (MistralConfig, MistralForCausalLM, _GROUPED | {"head_dim": 8}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, _GROUPED),
    "gemma": (GemmaConfig, GemmaForCausalLM, _GROUPED | {"head_dim": 8}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, _GROUPED | {"head_dim": 8}),
    "gemma3_text": (Gemma3TextConfig, Gemma3ForCausalLM, _GROUPED | {"head_dim": 8}),
    "t5": (T5Config, T5ForConditionalGeneration, _T5),
    "t5_gated": (T5Config, T5ForConditionalGeneration, _T5 | {"feed_forward_proj": "gated-gelu", "num_layers": 1}),
}
LAYER_NORM = ("gpt_neox", "gpt_neox_sequential", "gpt2", "opt", "opt_post_norm", "phi", "gptj", "bloom")


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Return a random model in eval mode whose norms have random positive gains and random biases."""
    config_class, model_class, arguments = MODELS[name]
    torch.manual_seed(seed)
    model = model_class(config_class(**({"vocab_size": VOCABULARY} | arguments | changes))).to(dtype).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
            elif "RMSNorm" in type(module).__name__ or type(module).__name__ == "T5LayerNorm":
                module.weight.add_(torch.rand_like(module.weight) - 0.5)
            elif getattr(module, "bias", None) is not None:
                module.bias.normal_(0, 0.1)
    model.config.use_cache = False
    return model


def tokens(rows: int = 2, length: int = 12, seed: int = 0) -> torch.Tensor:
    """Return random token ids [rows, length]."""
    return torch.randint(VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the logits [rows, length, vocabulary] of random tokens, without gradient."""
    with torch.no_grad():
        return probe_logits(model, tokens() if ids is None else ids)
