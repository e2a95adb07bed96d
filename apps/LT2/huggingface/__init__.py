"""Folders that Hugging Face transformers loads: tokenizer, model card, upload."""
