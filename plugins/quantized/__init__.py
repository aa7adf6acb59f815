"""The custom operators of headfold for matrices of few bits, defined once: schema, numpy reference, ONNX bodies."""
