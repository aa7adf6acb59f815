"""Renders chat templates in a process of its own, which `chat_template` kills when it takes too long.

A template is a program of strangers, and no bound holds within a process: `'x' * 10**9`, or text made of a list that holds itself
twice, forty deep, is one call of C that nothing interrupts. Each line of standard input is a request, each line of output its answer.
"""

import datetime
import functools
import json
import signal
import sys
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
import jinja2.utils

try:
    import resource
except ImportError:  # Windows: there its time alone is bounded
    resource = None  # type: ignore[assignment]

READY = b"ready\n"
MEMORY_BYTES = 1 << 29
OUTPUT_CHARACTERS = 1 << 23
SECONDS = 3  # of one rendering, which takes milliseconds


def environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """What transformers gives its chat templates: extensions, filters and functions."""
    made = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    made.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace}
    made.filters["tojson"] = _to_json
    return made


def main() -> None:
    """Answer requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    if resource is not None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    output = sys.stdout.buffer
    output.write(READY)
    output.flush()
    for line in sys.stdin.buffer:
        if hasattr(signal, "setitimer"):  # the end, should the parent be killed meanwhile
            signal.setitimer(signal.ITIMER_REAL, 2 * SECONDS)
        output.write(json.dumps(_answer(**json.loads(line))).encode() + b"\n")
        output.flush()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(template: str, variables: dict[str, Any]) -> dict[str, str]:
    """The rendered `text`; the `error` of a template that fails; or the `bound` that it broke."""
    parts, size = [], 0
    try:
        for part in _compiled(template).generate(**variables):
            parts.append(part)
            size += len(part)
            if size > OUTPUT_CHARACTERS:
                return {"bound": f"writes more than {OUTPUT_CHARACTERS:,} characters"}
        return {"text": "".join(parts)}
    except MemoryError:
        return {"bound": f"takes more than {MEMORY_BYTES >> 20} MiB of memory"}
    except RecursionError:
        return {"bound": "calls itself too often"}
    except Exception as error:  # a template is a program and can fail like one
        return {"error": str(error) or type(error).__name__}


@functools.lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return environment().from_string(template)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant says, for training; here it is only text."""

    tags = {"generation"}  # noqa: RUF012 jinja's own way

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """Keeps no attribute that Python itself would look for."""

    def __init__(*args: Any, **attributes: Any) -> None:  # so that `self` may be an attribute, as in jinja's own
        self, *given = args
        attributes = dict(*given, **attributes)
        for name in attributes:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot have the attribute {name!r}")


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Unlike jinja's own, escapes nothing for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


if __name__ == "__main__":
    main()
