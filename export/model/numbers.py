"""Numbers in a configuration that no model has: refused before anything is made of them, whichever road it takes.

Python reads and writes Infinity and NaN where JSON has no such thing, and takes 10^39, which float32 cannot hold.
"""

import re
from collections.abc import Mapping
from typing import Any

from headfold.export.model.config import MOST_FLOAT, MOST_LAYERS, MOST_POSITIONS
from headfold.runtime.errors import ConfigError

_MOST_ITEMS = 1 << 16  # of a list
_COUNTS = {  # by the end of a name; lists and tables are made as long, before anybody can look
    "layers?$": MOST_LAYERS,
    "experts$": 1 << 14,
    "position": MOST_POSITIONS,
}
_ENDLESS = "time_step_limit"  # [0, Infinity] in models with a state, which are refused as such


def check_numbers(content: Mapping[str, Any], where: object) -> None:
    """Look through a configuration and the objects and lists in it; `where` is named in errors.

    Raises:
        ConfigError: a number is not finite in float32, a count is higher than any model's, or a list is longer.
    """
    open_: list[tuple[str, Any]] = list(content.items())
    while open_:
        name, value = open_.pop()
        if isinstance(value, Mapping):
            open_ += [(str(key), item) for key, item in value.items()]
        elif isinstance(value, list | tuple) and name != _ENDLESS:
            if len(value) > _MOST_ITEMS:
                raise ConfigError(f"{name} has {len(value):,} items", where=where, fix=f"It can have {_MOST_ITEMS:,}.")
            open_ += [(name, item) for item in value]
        elif isinstance(value, int | float):
            if not abs(value) <= MOST_FLOAT:  # NaN is not
                raise ConfigError(f"{name} is {value}", where=where, fix="It must be finite, in float32.")
            for pattern, most in _COUNTS.items():
                if value > most and re.search(pattern, name):
                    raise ConfigError(f"{name} is {value}", where=where, fix=f"It must be at most {most}.")
