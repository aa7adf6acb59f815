"""The serving side of headfold: numpy, onnxruntime and tokenizers; never torch, never headfold.export."""

from headfold.runtime.errors import (
    BundleError,
    CapacityError,
    CheckpointError,
    ConfigError,
    HeadfoldError,
    InputError,
    ProviderError,
    VerificationError,
)

__all__ = [
    "BundleError",
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "HeadfoldError",
    "InputError",
    "ProviderError",
    "VerificationError",
]
