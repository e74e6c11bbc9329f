"""Tiny models as transformers saves them, a directory each."""

from pathlib import Path
from typing import Any

SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 10, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 96, "max_position_embeddings": 64,
}  # fmt: skip


def save_all(root: Path) -> None:
    """Makes llama-a, -b, -f16, -f32, tied-a, -b, qwen2, qwen2-sliding, qwen3, gemma2, mixtral and gpt2 below `root`."""
    import torch
    import transformers as t

    def save(name: str, config: Any, model: Any, seed: int, dtype: Any = torch.bfloat16) -> None:
        torch.manual_seed(seed)
        made = model(config).to(dtype)
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.dim() == 1:  # norms are all ones otherwise, and equal in all models
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        made.save_pretrained(root / name)

    def llama(name: str, seed: int, dtype: Any = torch.bfloat16, **more: Any) -> None:
        save(name, t.LlamaConfig(**SIZES, **more), t.LlamaForCausalLM, seed, dtype)

    llama("llama-a", 1)
    llama("llama-b", 2)
    llama("llama-f16", 3, torch.float16)
    llama("llama-f32", 4, torch.float32)
    llama("tied-a", 5, tie_word_embeddings=True)
    llama("tied-b", 6, tie_word_embeddings=True)
    save("qwen2", t.Qwen2Config(**SIZES), t.Qwen2ForCausalLM, 7)
    sliding = {"use_sliding_window": True, "max_window_layers": 5, "sliding_window": 16}
    save("qwen2-sliding", t.Qwen2Config(**SIZES, **sliding), t.Qwen2ForCausalLM, 8)
    save("qwen3", t.Qwen3Config(**SIZES, head_dim=8), t.Qwen3ForCausalLM, 9)
    save("gemma2", t.Gemma2Config(**SIZES, head_dim=8), t.Gemma2ForCausalLM, 10)
    mixtral = t.MixtralConfig(**{**SIZES, "num_hidden_layers": 4}, num_local_experts=4)
    save("mixtral", mixtral, t.MixtralForCausalLM, 11)
    gpt2 = t.GPT2Config(n_embd=32, n_layer=6, n_head=4, vocab_size=96, n_positions=64)
    save("gpt2", gpt2, t.GPT2LMHeadModel, 12)
