"""What a server is told when it starts."""

from dataclasses import dataclass


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
