"""What a decoder is: configuration, torch modules, RoPE, fresh weights. May import only plugins and runtime.errors."""
