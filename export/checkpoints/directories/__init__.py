"""Hugging Face directories below a checkpoint: where they come from, their tensors by name, an adapter over another one."""
