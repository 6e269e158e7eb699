"""slurm/spark.sbatch on a real SLURM: the filter stage on a Spark that begins and ends with its job."""

import contextlib
import hashlib
import shlex
import sys
from pathlib import Path

import pytest

from tests.hostile_log import write_hostile_log
from tests.pipeline_harness import REPOSITORY, inline_json, tandem, write_recipe
from tests.slurm_cluster import SlurmCluster

FILES = ("pairs.parquet", "dropped.parquet", "measures.parquet")
SCRIPT = REPOSITORY / "slurm" / "spark.sbatch"

RECIPE = """
name: sparked
tracking: {uri: "off"}
stages:
  filter:
    {kind: filter, click_log: log, min_show: 1, listed_words: words.txt,
     spark: {conf: {spark.sql.shuffle.partitions: "4"}}}
"""


@pytest.mark.slow
@pytest.mark.usefixtures("spark")
def test_the_filter_runs_on_a_spark_of_its_own_job(slurm: SlurmCluster, tmp_path: Path) -> None:
    place = tmp_path / "it's $HOME; a place"  # no value is read by the shell
    place.mkdir()
    write_hostile_log(place / "log", 300, seed=6)
    recipe = write_recipe(place, RECIPE, "sparked.yaml")
    log = tmp_path / "job.log"
    job = slurm.run(
        *("sbatch", "--parsable", "--nodes=2", "--cpus-per-task=1", "--mem=13000", f"--output={log}"),
        *(str(_script(tmp_path)), str(recipe), "filter", "--root", str(place / "by spark")),
        cwd=REPOSITORY,
    ).strip()
    assert slurm.wait(job, timeout_s=300) == ["COMPLETED"], log.read_text(errors="replace")[-4000:]
    tandem("run", recipe, "--root", place / "by duckdb", cwd=place)
    made = [_hashes(recipe, root) for root in (place / "by spark", place / "by duckdb")]
    assert made[0] == made[1]
    printed = log.read_text(errors="replace")
    assert printed.count("Successfully registered with master") == 2
    assert not Path(f"/tmp/tandem-spark-{job}").exists()
    master = f"--port {20000 + int(job) * 7 % 12000} "
    assert not [line for line in _spark_processes() if master in line or f"{master[7:-1]} --cores" in line]


@pytest.mark.slow
def test_too_little_memory_is_said_at_once(slurm: SlurmCluster, tmp_path: Path) -> None:
    log = tmp_path / "job.log"
    options = ("--parsable", "--nodes=1", "--mem=9000", f"--output={log}")
    job = slurm.run("sbatch", *options, str(SCRIPT), "a.yaml", "filter", cwd=REPOSITORY).strip()
    assert slurm.wait(job) == ["FAILED"]
    assert slurm.job(job)["ExitCode"] == "2:0"
    assert "ask for 12288 MB or more" in log.read_text()


def _script(folder: Path) -> Path:
    """The script with this Python in its settings, as a user would write another one there."""
    text = SCRIPT.read_text(encoding="utf-8")
    setting = "python=(.venv/bin/python)"
    assert setting in text
    path = folder / "spark.sbatch"
    path.write_text(text.replace(setting, f"python=({shlex.quote(sys.executable)})"), encoding="utf-8")
    return path


def _hashes(recipe: Path, root: Path) -> dict[str, str]:
    out = Path(inline_json("results", recipe, "--root", root, cwd=root)["directories"]["filter"]) / "out"
    return {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in FILES}


def _spark_processes() -> list[str]:
    """Command lines of Spark's daemons on this machine."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            found.append(path.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
    return [line for line in found if "org.apache.spark.deploy" in line]
