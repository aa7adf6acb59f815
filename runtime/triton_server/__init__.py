"""What NVIDIA Triton Inference Server runs of a bundle, in its Python backend. `headfold package --for triton` writes the rest."""
