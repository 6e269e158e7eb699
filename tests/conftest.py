"""The tests' SLURM cluster; what TANDEM_REQUIRE="chromium slurm spark" names must not be skipped."""

import os
import re
import shutil
from collections import Counter
from collections.abc import Generator, Iterator
from importlib.util import find_spec

import pytest

from tests import slurm_cluster
from tests.slurm_cluster import SlurmCluster

REQUIRED = re.findall(r"\w+", os.environ.get("TANDEM_REQUIRE", ""))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most slow tests first: one that comes last leaves the other test processes idle."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])  # stable: within a file the order stays


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        # of a skip: (file, line, reason); the file's name must not count
        told = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        reason = str(told).lower()
        missing = [name for name in REQUIRED if name in reason]
        if missing:
            report.outcome = "failed"
            report.longrepr = f"skipped, but TANDEM_REQUIRE names {', '.join(missing)}: {reason}"
    return report


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """8 nodes of 8 simulated GPUs; each test finds it idle and whole (see `_mend_slurm`)."""
    missing = slurm_cluster.missing()
    if missing:
        pytest.skip(f"no slurm cluster here: {'; '.join(missing)}")
    with SlurmCluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture
def spark() -> None:
    """For tests that start a Spark of their own."""
    missing = [f"no {name}" for name in ("java", "pyspark") if not (shutil.which(name) or find_spec(name))]
    if missing:
        pytest.skip(f"no spark here: {'; '.join(missing)}")


@pytest.fixture
def client(slurm: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> SlurmCluster:
    """The cluster, with this process as its user: for code that calls SLURM's commands itself."""
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm.environment[name])
    return slurm


@pytest.fixture(autouse=True)
def _mend_slurm(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that used the cluster: no job is left, and what was broken is up again."""
    if "slurm" not in request.fixturenames:
        yield
        return
    cluster: SlurmCluster = request.getfixturevalue("slurm")
    yield
    cluster.reset()
