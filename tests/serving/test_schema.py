"""The answers to requests generated from the OpenAPI document agree with it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import msflow_ext as mx
from msflow_ext import serving

schemathesis = pytest.importorskip("schemathesis")
pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.family("service")]


@pytest.fixture(scope="module")
def document(run, start) -> Any:
    url = start(serving.application(mx.load(run, device="cpu")))
    return schemathesis.openapi.from_url(f"{url}openapi.json")


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize("number", range(5))  # all paths except that of the document
def test_answers_to_generated_requests_agree_with_the_document(document, number, data):
    operations = [found.ok() for found in document.get_all_operations()]
    assert len(operations) == 5
    # A schema cannot require that bytes are an image of at least 8x8 pixels.
    any_bytes = schemathesis.specs.openapi.checks.positive_data_acceptance
    case = data.draw(operations[number].as_strategy())
    case.call_and_validate(timeout=20, excluded_checks=[any_bytes])
