"""Ahead of time: model definition, checkpoints, ONNX export, parity, bundles and the command line."""
