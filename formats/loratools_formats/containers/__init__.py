"""Containers of tensors: safetensors, GGUF and bounded pickles."""
