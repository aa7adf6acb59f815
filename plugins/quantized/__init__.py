"""The custom operators headfold::QuantizedMatMul and QuantizedGather, defined once: schema, numpy reference, ONNX bodies."""
