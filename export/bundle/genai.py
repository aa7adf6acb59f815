"""`genai_config.json`: what onnxruntime-genai needs to open a bundle as its own."""

from typing import Any

from headfold.export.model.config import ModelConfig
from headfold.plugins.names import cache_input, cache_output


def genai_config(config: ModelConfig, capacity: int) -> dict[str, Any]:
    """The configuration of onnxruntime-genai 0.18 for a bundle whose cache holds `capacity` tokens; greedy unless told otherwise.

    Its model type only picks defaults for decoders like ours, so a model no Hugging Face family can express goes as a llama.
    """
    eos: int | list[int] | None = list(config.eos_token_id) if len(config.eos_token_id) > 1 else None
    if eos is None:
        eos = config.eos_token_id[0] if config.eos_token_id else 0
    pad = config.pad_token_id if config.pad_token_id is not None else (config.eos_token_id or (0,))[0]
    return {
        "model": {
            "type": "llama" if config.model_type == "headfold" else config.model_type,
            "bos_token_id": config.bos_token_id if config.bos_token_id is not None else 0,
            "eos_token_id": eos,
            "pad_token_id": pad,
            "context_length": capacity,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "hidden_size": config.hidden_size,
                "head_size": config.head_dim,
                "num_attention_heads": config.num_attention_heads,
                "num_key_value_heads": config.num_key_value_heads,
                "num_hidden_layers": config.num_hidden_layers,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": cache_input("%d", "key"),
                    "past_value_names": cache_input("%d", "value"),
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": cache_output("%d", "key"),
                    "present_value_names": cache_output("%d", "value"),
                },
            },
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": capacity,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 1,
            "top_p": 1.0,
        },
    }
