"""Weights in four and eight bits: what they cost, measured on the kernels that run them, and the gate that judges it."""
