"""Chat templates: damaged ones of real shapes, and programs drawn from Jinja's grammar, some of which want far too much."""

from random import Random

REAL = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m.content }} [/INST]{{ eos_token }}{% endfor %}",
    "{%- macro tool(t) -%}{{ t | tojson(indent=2) }}{%- endmacro -%}{%- set ns = namespace(n=0, last='') -%}"
    "{%- for m in messages -%}{%- set ns.n = ns.n + 1 -%}{%- if m.content is string -%}{{ m.content }}{%- else -%}"
    "{%- for p in m.content -%}{{ p['text'] if p.type == 'text' else '<image>' }}{%- endfor -%}{%- endif -%}{%- endfor -%}"
    "{%- if tools is defined and tools -%}{{ tool(tools[0]) }}{%- endif -%}{{ strftime_now('%d %b %Y') }} {{ ns.n }}",
)
_NAMES = (
    "messages",
    "m",
    "x",
    "ns",
    "loop",
    "bos_token",
    "eos_token",
    "tools",
    "self",
    "caller",
    "none",
    "undefined_name",
)
_FILTERS = """
    trim upper length list tojson join(',') replace('a','aa') first last sort reverse string int
    float abs sum unique map('upper') select batch(3) slice(3) center(30) indent(4) format(1)
    attr('x') default(1) items dictsort groupby('role') round(2) random wordwrap(5) pprint xmlattr
    safe e  urlize striptags truncate(3) filesizeformat rejectattr('role') nothing_of_that_name
""".split()
_NUMBERS = ("0", "1", "-1", "2", "3.5", "1e308", "10", "9" * 40)
_TOO_MUCH = (
    "{{ 7 ** (7 ** 9) }}",
    "{{ 'x' * 10 ** 10 }}",
    "{{ [0] * 10 ** 9 }}",
    "{{ range(10 ** 12) | list | length }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) }}{% endmacro %}{{ f(60) }}",
    "{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
    "{{ '%1000000000d' % 1 }}",
    "{{ '{:>1000000000}'.format(1) }}",
    "{{ 'x'.center(10 ** 10) }}{{ 'a' | center(10 ** 10) }}",
    "{{ 'ab' | replace('', 'x' * 99999) | replace('', 'y' * 99999) }}",
    "{{ lipsum(n=1000000) }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}",
    "{{ namespace.__init__.__globals__ }}",
    "{% include 'etc/passwd' %}",
    "{% extends 'x' %}{% import 'y' as z %}",
    "{{ messages.append(1) }}{{ messages | tojson(indent=10 ** 9) }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{{ " + "-" * 5000 + "1 }}",
    "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{{ 1" + " + 1" * 20_000 + " }}",
    "{{ strftime_now('%Y' * 999999) }}",
    "{{ strftime_now('\ud800') }}",
    "{{ raise_exception('x' * 10 ** 6) }}{{ raise_exception() }}",
    "{{ '\ud800' }}",
)


def template(rng: Random) -> str:
    """A template; few are valid, fewer are harmless."""
    draw = rng.random()
    if draw < 0.03:
        return rng.choice(_TOO_MUCH)
    if draw < 0.5:
        return "".join(_block(rng, 3) for _ in range(rng.randrange(1, 6)))
    return _damaged(rng, rng.choice(REAL))


def _damaged(rng: Random, text: str) -> str:
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        at, size = rng.randrange(len(text) + 1), rng.choice((1, 2, 5, 20))
        piece = rng.choice(
            ("", "{%", "%}", "{{", "}}", "{#", "'", "|", ".", "\0", "\ud800", "[", _expression(rng, 2), _block(rng, 2))
        )
        text = text[:at] + piece + text[at + rng.choice((0, size)) :]
    return text


def _block(rng: Random, depth: int) -> str:
    def inner() -> str:
        return _block(rng, depth - 1) if depth > 0 else "text"

    def value() -> str:
        return _expression(rng, depth)

    match rng.randrange(12):
        case 0:
            return f"{{% for x in {value()} %}}{inner()}{{% else %}}{inner()}{{% endfor %}}"
        case 1:
            return f"{{% if {value()} %}}{inner()}{{% elif {value()} %}}{inner()}{{% endif %}}"
        case 2:
            return f"{{% set {rng.choice(_NAMES)} = {value()} %}}"
        case 3:
            return f"{{% macro f(x, y={value()}) %}}{inner()}{{% endmacro %}}{{{{ f({value()}) }}}}"
        case 4:
            return f"{{% set ns = namespace(a={value()}) %}}{{% set ns.a = {value()} %}}{{{{ ns.a }}}}"
        case 5:
            return f"{{% filter {rng.choice(_FILTERS)} %}}{inner()}{{% endfilter %}}"
        case 6:
            return f"{{% call f({value()}) %}}{inner()}{{% endcall %}}{{% generation %}}{inner()}{{% endgeneration %}}"
        case 7:
            return f"{{% for x in messages %}}{{% {rng.choice(('break', 'continue'))} %}}{inner()}{{% endfor %}}"
        case 8:
            return f"{{% with x = {value()} %}}{inner()}{{% endwith %}}{{# {inner()} #}}"
        case _:
            return f"{{{{ {value()} }}}}"


def _expression(rng: Random, depth: int) -> str:
    if depth <= 0:
        return rng.choice((*_NAMES, *_NUMBERS, "'text'", "[]", "{}", "true"))

    def part() -> str:
        return _expression(rng, depth - 1)

    match rng.randrange(11):
        case 0:
            operator = rng.choice(
                ("+", "-", "*", "/", "//", "%", "**", "~", "==", "<", "in", "not in", "and", "or", "is")
            )
            return f"({part()} {operator} {part()})"
        case 1 | 2:
            return f"{part()} | {rng.choice(_FILTERS)}"
        case 3:
            return f"{part()}.{rng.choice(('role', 'content', 'items()', 'strip()', 'split()', 'a', '__class__', 'format(1)'))}"
        case 4:
            return f"{part()}[{rng.choice((part(), '0', '-1', '1:', '::0', '::-1', ':'))}]"
        case 5:
            return f"[{part()}, {part()}]"
        case 6:
            return f"{{'a': {part()}, {part()}: 1}}"
        case 7:
            called = rng.choice(
                ("range", "namespace", "dict", "raise_exception", "strftime_now", "cycler", "joiner", "lipsum", "loop")
            )
            return f"{called}({rng.choice(('', part(), f'{part()}, {part()}', f'x={part()}'))})"
        case 8:
            return f"({part()} if {part()} else {part()})"
        case 9:
            return f"{part()} is {rng.choice(('defined', 'string', 'none', 'mapping', 'iterable', 'divisibleby(0)', 'nosuch'))}"
        case _:
            return part()
