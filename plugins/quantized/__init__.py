"""The custom operators headfold::for matrices of few bits, defined once: schema, numpy reference, ONNX bodies."""
