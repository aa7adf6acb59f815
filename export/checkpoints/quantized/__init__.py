"""Quantized checkpoints, read: a file per format says which stored tensors make which tensor; one class says how."""
