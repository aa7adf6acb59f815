"""The tensors that a model has, by name and shape, reckoned from its configuration: nothing is built or allocated."""

from headfold.export.model.config import ModelConfig

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: ModelConfig) -> Shapes:
    """Name and shape of every tensor a checkpoint of this model must have, in the order of the decoder's state dict."""
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in _layer(config).items()}
    shapes |= _norm("model.norm", config)
    if not config.tie_word_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return shapes


def _layer(config: ModelConfig) -> Shapes:
    hidden, inner, head = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    shapes = _norm("input_layernorm", config) | _norm("post_attention_layernorm", config)
    for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
        shapes |= _linear(f"self_attn.{name}", rows, hidden, config.qkv_bias)
    shapes |= _linear("self_attn.o_proj", hidden, queries, config.output_bias)
    if config.qk_norm:
        shapes |= {"self_attn.q_norm.weight": (head,), "self_attn.k_norm.weight": (head,)}
    for name in ("gate_proj", "up_proj") if config.gated else ("up_proj",):
        shapes |= _linear(f"mlp.{name}", inner, hidden, config.mlp_bias)
    return shapes | _linear("mlp.down_proj", hidden, inner, config.mlp_bias)


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | ({f"{name}.bias": (rows,)} if bias else {})


def _norm(name: str, config: ModelConfig) -> Shapes:
    names = ("weight",) if config.norm == "rms_norm" else ("weight", "bias")
    return {f"{name}.{part}": (config.hidden_size,) for part in names}
