"""TensorRT: options, lowering, preflight, network report, build, kernels, and a parsed network on the CPU. Imports bundle and below."""
