"""Fewer key/value heads, and gates: heads, layers, statistics, checkpoint to checkpoint. May import graph, data and below."""
