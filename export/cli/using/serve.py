"""`headfold serve`: bundles over HTTP."""

from contextlib import ExitStack
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import rich_click as click

from headfold.export.cli.shared import Range, refuse_idle
from headfold.export.cli.using.opening import DRAFT, PREFILL, Engine, engine_options, open_bundle
from headfold.plugins.attention.schema import Attention
from headfold.runtime.errors import InputError
from headfold.runtime.server.settings import KEY, WAITING, Limits, Settings


@click.command()
@click.argument("bundles", nargs=-1, required=True, metavar="BUNDLE...", type=click.Path(path_type=Path))
@click.option("--host", default="127.0.0.1", show_default=True, help="Any other address needs --api-key, or --no-auth.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 takes a free one.")
@click.option("--api-key", envvar=KEY, help=f"What clients must send. Better in {KEY}: other users see arguments.")
@click.option("--no-auth", is_flag=True, help="Let everybody ask who reaches --host.")
@click.option("--name", "names", multiple=True, help="Of each bundle, in order. [default: its directory's]")
@click.option("--slots", type=click.IntRange(1), help="Answers that are written together. [default: 16]")
@click.option("--waiting", type=click.IntRange(1), help="Answers that may wait beyond them; then 429. [default: 64]")
@click.option(
    "--keep-bytes", type=click.IntRange(0), help="Of the cache, for prompts that begin alike. [default: 1 GiB]"
)
@click.option(
    "--no-reuse", is_flag=True, help="Compute every prompt anew: how long one takes tells nothing of others'."
)
@click.option("--max-new-tokens", type=click.IntRange(1), help="Per answer. [default: what fits]")
@click.option("--max-seconds", type=Range(0, min_open=True), default=600, show_default=True, help="Per request.")
@click.option("--max-body", type=click.IntRange(1), default=8 << 20, show_default=True, help="Bytes of a request.")
@click.option(
    "--drain-seconds",
    type=click.IntRange(0),
    default=60,
    show_default=True,
    help="For answers on their way when it ends.",
)
@DRAFT
@PREFILL
@engine_options
def serve(
    bundles: tuple[Path, ...],
    host: str,
    port: int,
    api_key: str | None,
    no_auth: bool,
    names: tuple[str, ...],
    slots: int | None,
    waiting: int | None,
    keep_bytes: int | None,
    no_reuse: bool,
    max_new_tokens: int | None,
    max_seconds: float,
    max_body: int,
    drain_seconds: int,
    draft: Path | None,
    prefill: Path | None,
    backend: Engine,
    provider: str,
    attention: Attention | None,
    threads: int | None,
) -> None:
    """Answer OpenAI's clients with each BUNDLE, and people with a page at /.

    **Examples**

    `headfold serve smol` and then `OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="-")`

    `HEADFOLD_API_KEY=$(openssl rand -hex 24) headfold serve smol qwen --host 0.0.0.0`

    SIGTERM and Ctrl-C end it once what is being answered is complete; a second one at once.
    """
    from headfold.runtime.server.app import make_app
    from headfold.runtime.server.running import listen, run
    from headfold.runtime.server.served import names_of

    local = _is_loopback(host)
    _check_access(local, host, api_key, no_auth)
    refuse_idle(no_reuse, "keep_bytes", why="is of prompts that are kept", fix="Leave out --no-reuse.")
    for option, of_one in (("--draft", draft), ("--prefill", prefill)):
        if of_one is not None and len(bundles) > 1:
            fix = f"Serve it alone, or leave {option} out."
            raise InputError(f"{option} is of one bundle, and several are given", fix=fix)
    given = {"slots": slots, "waiting": WAITING if waiting is None else waiting, "keep_bytes": keep_bytes}
    scheduling: Any = {name: value for name, value in given.items() if value is not None}
    settings = Settings(
        key=api_key,
        hosts=frozenset({"localhost", "127.0.0.1", "::1", host}) if local and not (api_key or no_auth) else None,
        limits=Limits(body_bytes=max_body, new_tokens=max_new_tokens, seconds=max_seconds),
        reuse=not no_reuse,
    )
    models = {}
    with listen(host, port) as opened, ExitStack() as loaded:
        for name, bundle in zip(names_of(list(bundles), list(names)), bundles, strict=True):
            others = {"draft": draft, "prefill": prefill}
            model = open_bundle(bundle, backend, provider, attention, threads, **others, **scheduling)
            models[name] = loaded.enter_context(model)
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{opened.getsockname()[1]}/"

        def started() -> None:
            if no_auth:
                click.echo(f"headfold: warning: whoever reaches {host} can use it, and see how busy it is", err=True)
            click.echo(f"headfold: {', '.join(models)} at {address}", err=True)

        run(make_app(models, settings), opened, drain_seconds, started, loaded.close)


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def _check_access(local: bool, host: str, api_key: str | None, no_auth: bool) -> None:
    """Nobody opens a server to others without saying so."""
    if api_key is not None and no_auth:
        raise InputError("--api-key and --no-auth contradict each other", fix="Give one of them.")
    if not local and api_key is None and not no_auth:
        raise InputError(
            "others can reach this address",
            where=f"--host {host}",
            fix=f"Set {KEY}, which they must send, or --no-auth to let everybody in.",
        )
