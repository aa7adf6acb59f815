"""Which tokens a model of transformers lets each token see: learned from its mask, tried on numbers, not from what its layers say.

The mask is what transformers' eager attention obeys; some models tell their attention the window too, some do not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedConfig

from headfold.runtime.errors import ConfigError

CAUSAL = "headfold's attention op is causal, and sees all tokens before or a sliding window of them."


@dataclass(frozen=True)
class Visible:
    """What a model hands to its layers in place of a mask: a token sees itself and the `window` - 1 before it, all of them if -1.

    None: it sees others; a model may make such a mask and not use it.
    """

    window: int | None

    def __getitem__(self, _: Any) -> "Visible":
        """Models cut a mask to the length of their keys."""
        return self

    def __getattr__(self, name: str) -> Any:
        """Other models compute with it, as with a tensor."""
        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(f"computes with its attention mask (asks for its {name})", fix=CAUSAL)


def _mask(
    mask_function: Callable[..., Tensor], config: PreTrainedConfig, local_size: int | None = None, **_: Any
) -> Visible | None:
    """See transformers' AttentionMaskInterface; `local_size` is the window, if it is one."""
    if torch.compiler.is_exporting():  # by then it is known
        return None
    window = local_size if local_size is not None else -1
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    seen = _is_window(mask_function, window, positions if isinstance(positions, int) else _SOME)
    return Visible(window if seen else None)


_SOME = 4096  # positions that are tried of a model that does not say how many it can have


def _is_window(mask_function: Callable[..., Tensor], window: int, positions: int) -> bool:
    """Tries queries at small positions, around the window, at powers of two, and the last; keys at such distances from each."""
    powers = [1 << i for i in range(max(positions, 1).bit_length())]
    marked = torch.tensor([*range(64), *powers, window - 1, window, window + 1, 2 * window], device="cpu")
    queries = torch.cat((marked, positions - 1 - marked))
    queries = queries[(queries >= 0) & (queries < positions)][:, None]  # [Q, 1]
    keys = queries - torch.cat((-marked, marked))  # [Q, K]
    distances = queries - keys
    right = distances >= 0
    if window >= 0:
        right &= distances < window
    row = torch.zeros((), dtype=torch.long, device="cpu")
    try:
        found = mask_function(row, row, queries, keys)
    except RuntimeError:  # it asks for the tokens' content, which tensors on meta have not
        return False
    exist = (keys >= 0) & (keys < positions)
    return not found.is_meta and bool(((found == right) | ~exist).all())


def register(name: str) -> None:
    """For every model whose attention is the one of that name."""
    AttentionMaskInterface.register(name, _mask)
