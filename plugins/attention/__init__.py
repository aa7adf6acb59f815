"""Attention, once: schema, numpy reference, torch op, ONNX bodies, TensorRT plugin, Triton kernels and what launches them.

May import the root of plugins; torch, onnx, tensorrt and triton each only in the file that is named after it."""
