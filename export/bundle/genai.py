"""`genai_config.json`: what onnxruntime-genai needs to open a bundle as its own."""

from typing import Any

from headfold.export.exportables.facts import Facts
from headfold.plugins.names import cache_input, cache_output
from headfold.runtime.choosing.generation_settings import GenerationSettings

_TYPES = frozenset(  # decoders of text in onnxruntime-genai 0.18
    [
        "chatglm",
        "decoder",
        "ernie4_5",
        "gemma",
        "gemma2",
        "gemma3_text",
        "gpt2",
        "granite",
        "internlm2",
        "llama",
        "mistral",
        "nemotron",
        "olmo",
        "phi",
        "phi3",
        "phi3small",
        "phimoe",
        "qwen2",
        "qwen3",
        "smollm3",
    ]
)


def genai_refusal(facts: Facts) -> str | None:
    """Why onnxruntime-genai cannot open such a model, if it cannot."""
    if len(set(facts.cache_shapes)) > 1:
        return "onnxruntime-genai knows one shape of cache for all layers, and these have several"
    return None


def genai_type(facts: Facts) -> str:
    """Its type of a model. It only picks defaults for decoders like ours, so a model whose type it has not goes as a llama."""
    return facts.model_type if facts.model_type in _TYPES else "llama"


def genai_config(facts: Facts, capacity: int, settings: GenerationSettings) -> dict[str, Any]:
    """The configuration of onnxruntime-genai 0.18 for a bundle whose cache holds `capacity` tokens; greedy unless told otherwise.

    As in transformers, the tokens that begin, end and pad are those of the generation settings, and of the model where they name none.
    There must be no `genai_refusal`.
    """
    layer = facts.layers[0]
    ends = facts.eos_token_id if settings.eos_token_ids is None else settings.eos_token_ids
    pads = settings.pad_token_ids or (() if facts.pad_token_id is None else (facts.pad_token_id,))
    bos = facts.bos_token_id if settings.bos_token_id is None else settings.bos_token_id
    return {
        "model": {
            "type": genai_type(facts),
            "bos_token_id": bos or 0,
            "eos_token_id": list(ends) if len(ends) > 1 else (*ends, 0)[0],
            "pad_token_id": (*pads, *ends, 0)[0],
            "context_length": capacity,
            "vocab_size": facts.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": "model.onnx",
                "hidden_size": facts.hidden_size,
                "head_size": layer.head_dim,
                "num_attention_heads": layer.num_attention_heads,
                "num_key_value_heads": layer.num_key_value_heads,
                "num_hidden_layers": len(facts.layers),
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
