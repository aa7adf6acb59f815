"""Values that a caller in Python gives, held to the types that a dataclass names for them, before any work is done with them."""

from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from headfold.runtime.errors import ConfigError


def check_types(instance: Any) -> None:
    """Raise ConfigError for the first field of a dataclass that has a value of another type, or out of its bounds."""
    for name, hint in get_type_hints(type(instance), include_extras=True).items():
        value = getattr(instance, name)
        try:
            TypeAdapter(hint).validate_python(value, strict=True)  # so "5" is no number, and a list no tuple
        except ValidationError as error:
            says = error.errors()[0]["msg"]
            raise ConfigError(f"is {value!r}", where=f"{type(instance).__name__}.{name}", fix=f"{says}.") from error
