"""GGUF files, in: a bounded look at the header, metadata to a configuration, tensors dequantized, vocabularies to tokenizer files."""
