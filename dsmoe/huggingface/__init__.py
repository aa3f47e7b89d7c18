"""Hugging Face checkpoints of DeepSeek models: reading, importing, exporting, comparing them."""

from dsmoe.huggingface.loading import load_pretrained

__all__ = ["load_pretrained"]
