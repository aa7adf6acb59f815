"""What `serve run`, `serve deploy` and `serve.run` are given: the deployments of one bundle, checked before a replica starts."""

from collections.abc import Mapping
from typing import Any

import click
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from headfold.runtime.errors import HeadfoldError
from headfold.runtime.manifest import check_files, read_manifest
from headfold.runtime.scheduling.drafting import check_draft
from headfold.runtime.scheduling.reading import check_reader
from headfold.runtime.server.ray.arguments import Arguments
from headfold.runtime.server.ray.deployments import Ingress, ModelServer
from headfold.runtime.text import Text

_ROUTER = "headfold.runtime.server.ray.routing:PrefixRouter"


def app(arguments: Mapping[str, Any]) -> Application:
    """The application of these `Arguments`.

    Raises:
        InputError: an argument is unknown, missing or wrong, or the draft cannot guess for the bundle, or another not read its prompts.
        BundleError: one of the bundles is none, or altered. Under a command of Ray's, each is one line and an exit code.
    """
    try:
        return _application(Arguments.read(arguments))
    except HeadfoldError as error:
        if click.get_current_context(silent=True) is None:
            raise
        raise _Told(error) from error


class _Told(click.ClickException):
    """One line, and the exit code, for Ray's commands, which are click's, too."""

    def __init__(self, error: HeadfoldError) -> None:
        super().__init__(str(error))
        self.exit_code = error.exit_code  # type: ignore[misc]  # click says that instances may have their own


def _check_bundles(given: Arguments) -> None:
    """What a replica would refuse, again and again. Raises BundleError, InputError."""
    manifest = read_manifest(given.bundle)
    check_files(given.bundle, manifest)
    if given.draft is not None:
        check_files(given.draft, read_manifest(given.draft))
        check_draft(Text(given.bundle), manifest.logits == "all", Text(given.draft))
    if given.prefill is not None:
        reader = read_manifest(given.prefill)
        check_files(given.prefill, reader)
        check_reader(given.bundle, manifest, given.prefill, reader)


def _application(given: Arguments) -> Application:
    _check_bundles(given)
    name, settings = given.name or given.bundle.resolve().name, given.settings
    slack = max(1, given.slots // 2)  # requests more than another replica has, for a beginning that is computed
    at_once = 2 * given.slots  # of a replica: beside those that are written, some that need not be sent for
    resources = {"num_cpus": given.threads, "num_gpus": int(given.on_gpu)}
    servers = serve.deployment(
        ModelServer,
        num_replicas=None if given.autoscaling_config is not None else given.replicas,
        autoscaling_config=given.autoscaling,
        max_ongoing_requests=at_once,
        max_queued_requests=given.waiting,
        graceful_shutdown_timeout_s=given.drain_seconds,
        ray_actor_options=resources,
        request_router_config=RequestRouterConfig(
            request_router_class=_ROUTER, request_router_kwargs={"slack": slack}, max_backoff_s=0.1
        ),
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        num_replicas=given.ingresses,
        max_ongoing_requests=2 * (given.most_replicas * at_once + given.waiting),  # the router refuses, not this
        graceful_shutdown_timeout_s=given.drain_seconds,
        ray_actor_options={"num_cpus": 0},
    )
    model = servers.bind(given.bundle, name, settings, **given.loading)
    return ingress.bind(model, settings)
