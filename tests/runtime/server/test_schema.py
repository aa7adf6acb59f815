"""Requests that schemathesis makes of the OpenAPI document: none finds an error of the server's, and answers are as described."""

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
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
    statuses = set()
    with script_model(tmp_path / "script", lambda _: "yes") as model, serving({"script": model}, limits) as address:
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) == 8
        for operation in operations:
            for mode in GenerationMode if operation.method == "post" else [GenerationMode.POSITIVE]:

                @settings(
                    max_examples=40 if operation.method == "post" else 5,
                    deadline=None,
                    derandomize=True,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                )
                @given(operation.as_strategy(mode))
                def ask(case) -> None:
                    response = case.call(timeout=60)
                    statuses.add(response.status_code)
                    case.validate_response(response, checks=CHECKS)

                ask()
        assert (model.status().live, model.status().waiting) == (0, 0)
    assert {200, 400, 404, 422} <= statuses
