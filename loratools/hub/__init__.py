"""The Hugging Face Hub: references to what is on it, and publishing to it.

A reference becomes a local path before any other code sees it; `huggingface_hub` does the talking,
with its own cache, tokens and offline mode. It is imported inside functions: it is an extra.
"""
