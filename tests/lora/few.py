"""How hypothesis runs in these tests."""

from hypothesis import HealthCheck, settings


def few(examples):
    """A seeded, database-free hypothesis run; `device` is the same object for each example."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )
