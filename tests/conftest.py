"""Skips become failures where they must not be: TANDEM_REQUIRE=chromium,tmpfs names what has to be there."""

import os
from collections.abc import Generator

import pytest

REQUIRED = [name for name in os.environ.get("TANDEM_REQUIRE", "").split(",") if name]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = str(report.longrepr).lower()
        missing = [name for name in REQUIRED if name in reason]
        if missing:
            report.outcome = "failed"
            report.longrepr = f"skipped, but TANDEM_REQUIRE names {', '.join(missing)}: {reason}"
    return report
