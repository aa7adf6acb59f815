"""Requests that schemathesis makes of the OpenAPI document: none finds an error of the server's, and answers are as described."""

import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from script_engine import script_model
from serving import serving

from headfold.runtime.server.settings import Limits, Settings

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def test_no_request_is_too_much(tmp_path) -> None:
    limits = Settings(limits=Limits(answers=4, new_tokens=24))
    with script_model(tmp_path / "script", lambda _: "yes") as model, serving({"script": model}, limits) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        for operation in schema.get_all_operations():

            @settings(max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            @schemathesis.hypothesis_given(operation.ok()) if hasattr(schemathesis, "hypothesis_given") else (lambda f: f)
            def run(case) -> None:
                case.call_and_validate(checks=CHECKS)

            run()
