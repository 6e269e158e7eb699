"""Hostile names, run on the real cluster: values reach sbatch and Python byte for byte, and nothing runs."""

import re
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.slurm import queue
from pipeline.slurm.cluster import Cluster
from pipeline.slurm.script import END, SETTINGS, JobSpec, render
from stages.base import StageError
from tests.pipeline_harness import REPOSITORY, TINY, inline_json, write_recipe
from tests.slurm_cluster import SlurmCluster

HOSTILE = "a b\"c'd$(touch PWNED)`touch PWNED`;touch PWNED&touch PWNED|x>PWNED*?[!]{a,b}%j%#~ ü图像!"
BACKSLASHED = HOSTILE + "\\e\\"

# In the place of Python: notes its arguments and environment as begin, end or a rank.
PYTHON = """\
#!/bin/bash
set -eu
notes=${0%/*}/../notes
for ((place = 1; place <= $#; place++)); do [ "${!place}" = -m ] && break; done
module=${*:place + 1:1} what=${*:place + 2:1}
[ "$module" = pipeline.slurm.rank ] && what=rank$SLURM_PROCID
printf '%s\\0' "$@" >"$notes/$what.arguments"
env -0 >"$notes/$what.environment"
if [ "$what" = begin ]; then cat "$notes/directory"; fi
"""


@dataclass(frozen=True)
class Place:
    """Where a hostile job has its things: all below folders with hostile names."""

    base: Path

    @property
    def venv(self) -> Path:
        return self.base / f"venv {BACKSLASHED}"

    @property
    def root(self) -> Path:
        return self.base / f"runs {HOSTILE}"

    @property
    def directory(self) -> Path:
        """Of the stage."""
        return self.base / f"stage {BACKSLASHED}"

    def make(self, program: str = "python") -> None:
        for folder in (self.venv / "bin", self.venv / "notes", self.root / "log", self.directory / "log"):
            folder.mkdir(parents=True)
        path = self.venv / "bin" / program
        path.write_text(PYTHON)
        path.chmod(0o755)
        (self.venv / "notes" / "directory").write_text(f"{self.directory}\n")

    def arguments(self, what: str) -> list[str]:
        return (self.venv / "notes" / f"{what}.arguments").read_text().split("\0")[:-1]

    def environment(self, what: str) -> dict[str, str]:
        rows = (self.venv / "notes" / f"{what}.environment").read_text().split("\0")[:-1]
        return dict(row.split("=", 1) for row in rows)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path)


def cluster_of(environment: dict[str, Any], **others: Any) -> Cluster:
    return Cluster.model_validate(
        {
            "name": "hostile",
            "train": {"nodes": 2, "gpus_per_node": 2, "cpus_per_gpu": 1, "time_limit": "01:00:00"},
            "data": {"time_limit": "01:00:00"},
            "environment": environment,
            **others,
        }
    )


def recipe_of(place: Place) -> str:
    return f"{place.base}/recipes {BACKSLASHED}.yaml"


def spec_of(place: Place, cluster: Cluster) -> JobSpec:
    return JobSpec(
        name=f"job {BACKSLASHED}",
        comment=f"tandem:{BACKSLASHED}",
        log=place.root / "log" / "train-%j.log",
        arguments=(recipe_of(place), "train", "--root", str(place.root), "--set", BACKSLASHED),
        placement=cluster.train,
        working_directory=place.root,
        python="/nowhere/python",
    )


def run(client: SlurmCluster, place: Place, cluster: Cluster) -> dict[str, str]:
    """Render, submit and wait; the job's record."""
    script = place.root / "train.sbatch"
    script.write_text(render(spec_of(place, cluster), cluster), encoding="utf-8")
    job = queue.submit(script)
    states = client.wait(job)
    log = place.root / "log" / f"train-{job}.log"
    assert states == ["COMPLETED"], log.read_text() if log.is_file() else client.job(job)
    return client.job(job)


def check(place: Place, record: dict[str, str], python: list[str]) -> None:
    """What sbatch understood, and what each process was given; `python`: its own arguments, before ours."""
    assert record["JobName"] == f"job {BACKSLASHED}"
    assert record["Comment"].rstrip() == f"tandem:{BACKSLASHED}"  # scontrol puts a space after it
    assert record["WorkDir"] == str(place.root)
    assert (place.root / "log" / f"train-{record['JobId']}.log").is_file()
    options = ["--root", str(place.root), "--set", BACKSLASHED]
    worker = [recipe_of(place), "--stage", "train", *options]
    limits = ["--failures", "5", "--starts", "1000"]
    attempt = [*python, "-P", "-m", "pipeline.slurm.attempt"]
    assert place.arguments("begin") == [*attempt, "begin", *limits, "--", *worker]
    assert place.arguments("end") == [*attempt, "end", *limits, "--code", "0", "--", *worker]
    for rank in range(4):
        assert place.arguments(f"rank{rank}") == [*python, "-P", "-m", "pipeline.slurm.rank", *worker]
        own = place.environment(f"rank{rank}")
        assert own["TANDEM_STAGE_DIRECTORY"] == str(place.directory)
        assert own["MASTER_ADDR"] == "node1"
        assert (own["SLURM_PROCID"], own["SLURM_NTASKS"]) == (str(rank), "4")
    assert len(list((place.directory / "log").glob("srun.*.0.log"))) == 1
    assert not [path for path in place.base.rglob("*") if path.name.startswith("PWNED")]


def test_a_venv_modules_a_file_of_your_own_and_variables(
    client: SlurmCluster, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.make()
    own = place.base / f"setup {BACKSLASHED}.sh"
    scratch = place.base / f"scratch {BACKSLASHED}"
    scratch.mkdir()
    # as login shells have it
    monkeypatch.setenv("BASH_FUNC_module%%", f"() {{ printf '%s\\0' \"$@\" >>'{place.base}/modules'; }}")
    own.write_text('export SOURCED="after the modules$NEVER_SET"\n')
    values = {"HOSTILE": BACKSLASHED, "EMPTY": "", "NUMBER": 1, "DOLLAR": "$HOME"}
    cluster = cluster_of(
        {
            "venv": str(place.venv),
            "modules": ["cuda/12.4", BACKSLASHED],
            "source": str(own),
            "variables": values,
        },
        scratch=str(scratch),
        sbatch_options=[f"--mail-user={BACKSLASHED}"],
    )
    check(place, run(client, place, cluster), [])
    assert (place.base / "modules").read_text().split("\0") == ["load", "cuda/12.4", "load", BACKSLASHED, ""]
    for what in ("begin", "rank0", "rank3", "end"):
        found = place.environment(what)
        assert {name: found[name] for name in values} == {k: str(v) for k, v in values.items()}
        assert found["SOURCED"] == "after the modules"
        assert found["TMPDIR"] == str(scratch)


def test_conda(client: SlurmCluster, place: Place) -> None:
    place.make()
    root = place.base / f"conda {BACKSLASHED}"
    (root / "etc/profile.d").mkdir(parents=True)
    (root / "etc/profile.d/conda.sh").write_text(
        'conda() { export ACTIVATED="$*$NEVER_SET"; PATH=$CONDA_ENVIRONMENT/bin:$PATH; }\n'
        f"CONDA_ENVIRONMENT=$(echo {place.base}/venv*)\n"
    )
    cluster = cluster_of({"conda": {"root": str(root), "name": BACKSLASHED}})
    check(place, run(client, place, cluster), [])
    assert place.environment("rank3")["ACTIVATED"] == f"activate {BACKSLASHED}"


def test_apptainer(client: SlurmCluster, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program itself is not here: one that notes how it is called stands in for it."""
    place.make("apptainer")
    monkeypatch.setenv("PATH", f"{place.venv}/bin:{client.environment['PATH']}")
    image, mount, scratch = f"/{BACKSLASHED}.sif", f"/{HOSTILE}:/inside".replace(",", ""), "/local disk"
    container = {"kind": "apptainer", "image": image, "mounts": [mount], "python": BACKSLASHED}
    cluster = cluster_of({"container": container}, scratch=scratch)
    python = ["exec", "--nv", "--bind", mount, "--bind", scratch, image, BACKSLASHED]
    check(place, run(client, place, cluster), python)


@pytest.mark.slow
def test_a_whole_recipe_below_hostile_folders(
    client: SlurmCluster, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`tandem submit` itself, with nothing in Python's place: recipe, root, --set and cluster file."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    folder = place.base / f"recipes {BACKSLASHED}"
    folder.mkdir()
    text = TINY.partition("  train:")[0]
    recipe = write_recipe(folder, text, f"{BACKSLASHED}.yaml")
    cluster = write_recipe(
        folder,
        "name: plain\n"
        "train: {nodes: 1, gpus_per_node: 1, time_limit: '01:00:00'}\n"
        "data: {cpus: 1, time_limit: '01:00:00'}\n",
        f"cluster {BACKSLASHED}.yaml",
    )
    given = (recipe, "--root", place.root, "--set", f"description='{HOSTILE.replace(chr(39), '')}'")
    (sent,) = inline_json("submit", *given, "--cluster", cluster, cwd=place.base)["stages"]
    (job,) = sent["jobs"]
    log = place.root / "tiny" / "slurm" / "log" / f"numbers-{job}.log"
    assert client.wait(job) == ["COMPLETED"], log.read_text() if log.is_file() else client.job(job)
    (row,) = inline_json("status", *given, cwd=place.base)["stages"]
    assert row["state"] == "done"
    (again,) = inline_json("submit", *given, "--cluster", cluster, cwd=place.base)["stages"]
    assert again["action"] == "done"
    assert not [path for path in place.base.rglob("*") if path.name.startswith("PWNED")]


@pytest.mark.parametrize(
    "value",
    [
        HOSTILE,
        BACKSLASHED,
        "plain",
        "two words",
        " leading and trailing ",
        "#comment",
        "a #comment",
        '"',
        "'",
        "''",
        "\\",
        "\\\\",
        '\\"',
        "a\\ b",
        "\"quoted\" 'twice'",
        "no\u00a0break\u3000space\u2028",
        "=x",
        "%j%%",
        ":",
        "x" * 1000,
    ],
)
def test_sbatch_reads_an_option_as_it_was_meant(client: SlurmCluster, place: Place, value: str) -> None:
    place.make()
    cluster = cluster_of({})
    spec = replace(spec_of(place, cluster), name=value, comment=value)
    script = place.base / "job.sbatch"
    script.write_text(render(spec, cluster), encoding="utf-8")
    job = client.run("sbatch", "--parsable", "--hold", script).strip()
    assert client.run("squeue", "--noheader", "--job", job, "--format", "%j\n%k") == f"{value}\n{value}\n"


PRINTABLE = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=40)
SHOW = """
printf '%s\\0' "${python[@]}" "${step_options[@]}" "$TMPDIR" "$X" "$@"
"""


@settings(max_examples=40, deadline=None)
@given(st.lists(PRINTABLE, min_size=5, max_size=5))
def test_bash_reads_the_settings_as_they_were_meant(values: list[str]) -> None:
    image, python, scratch, variable, argument = values
    container = {"kind": "pyxis", "image": image, "python": python}
    cluster = cluster_of({"container": container, "variables": {"X": variable}}, scratch=f"/{scratch}")
    spec = replace(spec_of(Place(Path("/a")), cluster), arguments=(argument, "train", "--set", argument))
    part = render(spec, cluster).partition(SETTINGS)[2].partition(END)[0]
    done = subprocess.run(["bash", "-euc", part + SHOW], capture_output=True)
    assert done.stderr == b""
    mounts = f"--container-mounts=/{scratch}" + ("" if ":" in scratch else f":/{scratch}")
    assert done.stdout.decode().split("\0")[:-1] == [
        *(python, f"--container-image={image}", mounts),
        *(f"/{scratch}", variable, argument, "train", "--set", argument),
    ]


@pytest.mark.parametrize("control", ["\n", "\r", "\t", "\0", "\x1b", "\x7f", "\udce9"])
@pytest.mark.parametrize(
    ("field", "changed"),
    [
        ("job-name", {"name": "a{}"}),
        ("comment", {"comment": "a{}"}),
        ("the recipe's path", {"arguments": ("a{}", "train")}),
        ("--root", {"arguments": ("a", "train", "--root", "b{}")}),
        ("--set", {"arguments": ("a", "train", "--root", "b", "--set", "c{}")}),
        ("chdir", {"working_directory": "/a{}"}),
        ("python", {"python": "/a{}"}),
    ],
)
def test_what_no_line_can_hold_is_refused_with_the_fields_name(
    field: str, changed: dict[str, Any], control: str
) -> None:
    def fill(value: Any) -> Any:
        return tuple(map(fill, value)) if isinstance(value, tuple) else value.replace("{}", control)

    filled = {name: fill(value) for name, value in changed.items()}
    if "working_directory" in filled:
        filled["working_directory"] = Path(filled["working_directory"])
    cluster = cluster_of({})
    with pytest.raises(StageError, match=f"^{re.escape(field)}: .*a job's script cannot hold"):
        render(replace(spec_of(Place(Path("/a")), cluster), **filled), cluster)


def test_a_root_below_which_slurm_cannot_write_logs_is_refused() -> None:
    cluster, spec = cluster_of({}), spec_of(Place(Path("/a")), cluster_of({}))
    with pytest.raises(StageError, match=r"--root: .*a folder with a backslash"):
        render(replace(spec, log=Path("/a\\b/log/x-%j.log")), cluster)
