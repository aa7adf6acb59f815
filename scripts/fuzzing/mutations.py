"""Valid JSON and bytes in, nearly valid ones out."""

import copy
import json
from collections.abc import Sequence
from random import Random
from typing import Any


class Raw(str):
    """Text that stands in JSON as it is."""


# fmt: off
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 255, 65536, 2**31 - 1, 2**31, -(2**31), 2**40, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**30,
    0.0, -0.0, 0.5, -1.5, 8192.0, 1e-320, 1e-30, 1e30, 1e308, Raw("NaN"), Raw("Infinity"), Raw("-Infinity"), Raw("1e999"),
    Raw("9" * 5000), Raw("01"), Raw("undefined"), "", " ", "0", "x", "x" * 100_000, "\0", "\ud800", "\x1b[31m", "\N{PILE OF POO}",
    "../../etc/passwd", "/dev/zero", "{{ 7 * 7 }}", "default", "float32", "torch.float16",
    [], {}, [None], [[]], [0], [-1], [2**70], ["x"], {"": {}}, {"x": None}, {"content": None}, {"content": 3}, [0] * 5000,
    Raw("[" * 200 + "]" * 200), Raw("[" * 100_000 + "]" * 100_000), Raw('{"a":' * 900 + "1" + "}" * 900),
)
INTEGERS = (0, 1, 2, 3, 4, 7, 8, 31, 32, 33, 127, 128, 255, 256, 65535, 65536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62,
            2**63 - 1, 2**63, 2**64 - 1)
# fmt: on
_LARGEST = 1 << 20  # bytes of a damaged file: large inputs are slow, and find no more


def damaged_json(rng: Random, content: Any, fields: Sequence[str] = ()) -> bytes:
    """A JSON document with one to four changes of its structure; sometimes its bytes are damaged, too.

    Args:
        rng: is drawn from.
        content: is not changed.
        fields: names that readers look for, some of which it may not have.
    """
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 1, 2, 2, 4))):
        content = _changed(rng, content, fields)
    data = dump(content).encode(errors="surrogatepass")
    return damaged_bytes(rng, data) if rng.random() < 0.1 else data


def damaged_bytes(rng: Random, data: bytes) -> bytes:
    """Bytes with one to four changes, as disks, editors and attackers make them."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(changed) + 1)
        size = min(rng.choice((1, 2, 4, 8, 8, 64, 1000)), len(changed) - at)
        match rng.randrange(9):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + size]
            case 3:
                changed[at:at] = changed[at : at + size]
            case 4:
                changed[at:at] = rng.randbytes(size)
            case 5:
                number = rng.choice(INTEGERS).to_bytes(8, rng.choice(("little", "big")))
                changed[at : at + size] = number[: min(size, 8)]
            case 6:
                changed[at:at] = rng.choice((b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b'"', b"{", b"]", b","))
            case 7 if rng.random() < 0.3:
                changed = bytearray(rng.choice((b"", b"{}", b"[]", b"null", bytes(1000), bytes(changed) * 2)))
            case _:
                start = rng.randrange(len(changed) + 1)
                changed[at : at + size] = changed[start : start + size]
    return bytes(changed[:_LARGEST])


def dump(value: Any) -> str:
    """JSON that may hold `Raw` text, and so the same key twice."""
    match value:
        case Raw():
            return value
        case dict():
            return "{" + ",".join(f"{dump(key)}:{dump(item)}" for key, item in value.items()) + "}"
        case list():
            return "[" + ",".join(map(dump, value)) + "]"
        case _:
            return json.dumps(value)


def _changed(rng: Random, content: Any, fields: Sequence[str]) -> Any:
    """One change at a place that is found by walking in from the top, so that the top is changed as often as what is deep."""
    parent: Any = [content]
    root, key = parent, 0
    while isinstance(parent[key], dict | list) and parent[key] and (parent is root or rng.random() < 0.65):
        parent = parent[key]
        key = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
    value = parent[key]
    match rng.randrange(10):
        case 0 if parent is not root:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[Raw(json.dumps(key))] = rng.choice((value, _odd(rng)))  # the same key once more
        case 2 if isinstance(parent, dict) and fields:
            parent[rng.choice(fields)] = rng.choice((value, _odd(rng)))
        case 3:
            parent[key] = rng.choice(([value], {"x": value}, {str(key): value}, [value, value]))
        case 4 | 5:
            parent[key] = _bent(rng, value)
        case 6 if len(parent) > 1:
            other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
            parent[key], parent[other] = parent[other], value
        case _:
            parent[key] = _odd(rng)
    return root[0] if root else None


def _odd(rng: Random) -> Any:
    """A copy: what is put into a document may be changed there, or be put into itself."""
    return copy.deepcopy(rng.choice(ODD))


def _bent(rng: Random, value: Any) -> Any:
    """A value of the same type, not far from this one."""
    match value:
        case bool():
            return not value
        case int():
            return rng.choice(
                (value + 1, value - 1, -value, value * 2, value * 1000, float(value), value + 0.5, str(value))
            )
        case float():
            return rng.choice((-value, value * 1000, value / 1000, 1 - value, int(value)))
        case str():
            at = rng.randrange(len(value) + 1)
            return rng.choice(
                (value[:at], value[at:], value * 2, value.upper(), f"{value[:at]}\0{value[at:]}", f" {value}")
            )
        case list():
            return rng.choice((value[:-1], value[::-1], value * 2, value + [None], (value * 200)[:20_000]))
        case dict():
            return rng.choice(({**value, "": 1}, dict(list(value.items())[:-1]), list(value.items()), list(value)))
        case _:
            return _odd(rng)
