"""The custom operator headfold::MixtureOfExperts, defined once: schema, numpy reference, torch op, ONNX bodies."""
