"""`genai_config.json`: what onnxruntime-genai needs to open a bundle as its own."""

from typing import Any

from headfold.export.model.config import ModelConfig
from headfold.plugins.names import cache_input, cache_output
from headfold.runtime.generation_settings import GenerationSettings


def genai_config(config: ModelConfig, capacity: int, settings: GenerationSettings) -> dict[str, Any]:
    """The configuration of onnxruntime-genai 0.18 for a bundle whose cache holds `capacity` tokens; greedy unless told otherwise.

    Its model type only picks defaults for decoders like ours, so a model no Hugging Face family can express goes as a llama.
    As in transformers, the tokens that begin, end and pad are those of the generation settings, and of the model where they name none.
    """
    ends = config.eos_token_id if settings.eos_token_ids is None else settings.eos_token_ids
    pads = settings.pad_token_ids or (() if config.pad_token_id is None else (config.pad_token_id,))
    bos = config.bos_token_id if settings.bos_token_id is None else settings.bos_token_id
    return {
        "model": {
            "type": "llama" if config.model_type == "headfold" else config.model_type,
            "bos_token_id": bos or 0,
            "eos_token_id": list(ends) if len(ends) > 1 else (*ends, 0)[0],
            "pad_token_id": (*pads, *ends, 0)[0],
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
