"""Fuzzing of everything that reads bytes of strangers: `scripts/fuzz`, and a short run of it in the tests."""

NAMES = ("safetensors", "gguf", "alike", "torch", "pickle", "index")
