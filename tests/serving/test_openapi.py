"""The OpenAPI document against the server that it describes (schemathesis)."""

import contextlib
import re
from collections import Counter
from typing import Any

import hypothesis
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serving_support import Server, request


def test_every_operation_answers_as_its_document_says(server: Server) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = {operation.ok().label for operation in schema.get_all_operations()}
    assert "POST /v1/images/generations" in operations and "POST /v1/batches" in operations

    before = answered(server)
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode:

            @settings(max_examples=5, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
            def check(case: Any) -> None:
                # What a model can do (sizes, steps, length of a prompt) is told by GET /v1/models, not by the document.
                case.call_and_validate(timeout=60, excluded_checks=[positive_data_acceptance])

            with contextlib.suppress(hypothesis.errors.Unsatisfiable):  # an operation without parameters has no wrong ones
                given(case=operation.as_strategy(generation_mode=mode))(check)()
    assert request(server, "/healthz")[0] == 200
    # A server that refused everything would agree with its document too.
    succeeded = {route for (route, status), count in (answered(server) - before).items() if status == "200"}
    assert succeeded >= {"/v1/images/generations", "/v1/files", "/v1/batches", "/v1/models"}


def answered(server: Server) -> Counter[tuple[str, str]]:
    """How many requests of each (route, status) the server has answered."""
    text = request(server, "/metrics")[2].decode()
    found = re.findall(r'^fluid_http_requests_total{route="(.*)",status="(.*)"} (.*)$', text, re.MULTILINE)
    return Counter({(route, status): int(float(count)) for route, status, count in found})
