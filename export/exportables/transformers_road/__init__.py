"""Whatever transformers loads: its attention, caches and experts traced into our ops, and its own word on what is right.

The only room that may import transformers, beside what exportables may.
"""
