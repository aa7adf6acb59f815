"""What a server is told when it starts."""

from dataclasses import dataclass

from headfold.runtime.errors import InputError

KEY = "HEADFOLD_API_KEY"  # in the environment: other users see arguments
WAITING = 64  # answers that may wait by default: whoever waits longer than for so many others had rather be told


@dataclass(frozen=True)
class Limits:
    """Of one request; what is over them is refused."""

    body_bytes: int = 8 << 20
    body_seconds: float = 60.0  # until all of the body is there
    answers: int = 128  # prompts times `n`
    new_tokens: int | None = None  # per answer; by default what fits
    seconds: float = 600.0  # until the answers are complete


@dataclass(frozen=True)
class Settings:
    """`key`: what clients must send, if they must. `hosts`: names it is asked by, where nothing else tells friends from others."""

    key: str | None = None
    hosts: frozenset[str] | None = None
    limits: Limits = Limits()
    reuse: bool = True  # of the cache among requests: see Options in headfold.runtime.generate
    announces: bool = True  # whether a stream says that it begins, before its first token

    def __post_init__(self) -> None:
        """Raises InputError: no client could send this key."""
        key = self.key
        if key is not None and not (key.isascii() and key.isprintable() and key.strip() == key != ""):
            raise InputError("the API key is empty, or not of ASCII", fix="Take one as of: openssl rand -hex 24")
