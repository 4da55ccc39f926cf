"""Requests drawn from the server's description of itself, by schemathesis, against a real server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies
from schemathesis.checks import not_a_server_error
from schemathesis.config import GenerationConfig, ProjectConfig, ProjectsConfig, SchemathesisConfig
from schemathesis.specs.openapi import checks

from tests.support.launch import TIMEOUT, Launcher
from tests.support.servers import RunningServer

EXAMPLES = 100  # of each endpoint
# What the description says is less than what is checked, so that a body that is valid by it may be refused, with 400.
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


@pytest.fixture(scope="module")
def server(
    mpirun: Launcher, cache: dict[str, str], smollm2: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningServer]:
    log = tmp_path_factory.mktemp("openapi") / "log"
    running = RunningServer(mpirun, 2, log, "--model", str(smollm2), "--context", "128", env=cache)
    running.until_ready()
    yield running
    running.close()


@pytest.mark.slow
@pytest.mark.any_mpi
def test_what_is_described_is_so(server: RunningServer) -> None:
    """No internal error, and no status or form of an answer that the description does not have."""
    said = server.said()
    generation = GenerationConfig(max_examples=EXAMPLES, deterministic=True)
    config = SchemathesisConfig(projects=ProjectsConfig(default=ProjectConfig(generation=generation)))
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json", config=config)

    @described.hook
    def map_body(context: Any, body: Any) -> Any:
        """Answers are short."""
        lengths = ("max_tokens", "max_output_tokens", "max_completion_tokens")
        return {**body, **dict.fromkeys(lengths, 1)} if isinstance(body, dict) else body

    asked: list[str] = []
    statuses: set[int] = set()
    for result in described.get_all_operations():
        operation = result.ok()
        asked.append(operation.path)
        cases = strategies.one_of(
            *(operation.as_strategy(generation_mode=mode) for mode in schemathesis.GenerationMode)
        )

        @hypothesis.settings(
            max_examples=EXAMPLES,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=cases)
        def check(case: schemathesis.Case) -> None:
            statuses.add(case.call_and_validate(checks=CHECKS, timeout=TIMEOUT).status_code)

        check()
    assert {"/v1/chat/completions", "/v1/messages", "/v1/models/{name}", "/metrics"} <= set(asked)
    assert {200, 400, 404} <= statuses
    assert server.said() == said
    found = server.client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})
    assert found.status_code == 200
