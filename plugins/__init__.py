"""The custom operator headfold::GroupedQueryAttention, defined once: schema, numpy reference, torch op, ONNX bodies."""
