"""The engine held against the reference model, bounded; `scripts/stress` does it for as long as one likes."""

import logging

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.hub import Hub
from tests.reference_model import Engine

BOUNDED = settings(
    max_examples=8,
    stateful_step_count=25,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def test_the_engine_serves_what_the_reference_model_holds(hub: Hub, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    run_state_machine_as_test(lambda: Engine(hub), settings=BOUNDED)
