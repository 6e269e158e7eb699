"""Rendered scripts of the 48- and the 64-GPU cluster equal tests/golden; clusters of that shape take them.

After a change that is meant, TANDEM_RENEW_GOLDEN=1 writes the golden files anew: `git diff` shows it.
"""

import difflib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline import recipe as recipes
from pipeline.fingerprint import identities
from pipeline.slurm.cluster import load
from pipeline.slurm.submit import Request, submit
from tests import slurm_cluster
from tests.pipeline_harness import REPOSITORY
from tests.slurm_cluster import SlurmCluster, SlurmError
from tests.slurm_conf import Partition

GOLDEN = Path(__file__).parent / "golden"
RENEW = "TANDEM_RENEW_GOLDEN=1 python -m pytest tests/test_slurm_scripts.py"
PARTITIONS = (Partition("gpu", default=True), Partition("cpu"))
# The machines that the cluster files are written for.
SHAPES = {
    "v100_6x8": {"nodes": 6, "gpu_type": "v100", "cpus": 40, "memory_mb": 384_000},
    "a100_8x8": {
        "nodes": 8,
        "gpu_type": "a100",
        "cpus": 96,
        "memory_mb": 1_000_000,
        "features": "a100_80g",
    },
}
# recipe, cluster file; a training stage, one with other nodes, data stages: whole, an array, what joins it
CASES = [
    ("cookie", "v100_6x8", ["ingest", "crawl-tasks-0", "crawl-finish", "pretrain_1", "evaluate"]),
    ("demo", "a100_8x8", ["shard", "crawl-tasks-0", "crawl-finish", "finetune"]),
]
NAMES = [
    (recipe, cluster, f"{recipe}.{cluster}.{part}.sbatch")
    for recipe, cluster, parts in CASES
    for part in parts
]


def render_all(recipe: str, cluster: str, place: Path) -> dict[str, str]:
    """`tandem submit --dry-run` of a shipped recipe: its scripts by name, as of /data/tandem and /data/runs.

    What differs from machine to machine, or with any change of a stage's code, is made equal: the folder, the
    fingerprints, the root's hash. The files that the recipe names are there, but empty.
    """
    house, root = place / "tandem", place / "runs"
    for folder in ("recipes", "ds_configs"):
        shutil.copytree(REPOSITORY / folder, house / folder)
    path = house / "recipes" / f"{recipe}.yaml"
    known = identities(recipes.load(path), root)
    for absent in [path for identity in known.values() for path in identity.absent]:
        absent.parent.mkdir(parents=True, exist_ok=True)
        absent.touch()
    overrides = ("seed=3", "description=it's $HOME; 100% of 图像")
    request = Request(
        path, root, Path(cluster), overrides, dry_run=True, python=str(house / "bin" / "python")
    )
    scripts = {}
    for stage in submit(request):
        for name, text in stage.scripts.items():
            fingerprint = re.search(r"--fingerprint ([0-9a-f]+)", text)
            assert fingerprint, text
            part = name.removesuffix(".sbatch").replace(f"-{fingerprint[1]}", "")
            text = text.replace(str(place), "/data").replace(fingerprint[1], "0123456789")
            text, count = re.subn(r"(comment=\S+@)[0-9a-f]{8}/", r"\g<1>01234567/", text)
            assert count == 1, text
            scripts[f"{recipe}.{cluster}.{part}.sbatch"] = text
    return scripts


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """All scripts of all cases, rendered where there is no SLURM."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path_factory.mktemp("empty")))
        scripts: dict[str, str] = {}
        for recipe, cluster, _ in CASES:
            scripts |= render_all(recipe, cluster, tmp_path_factory.mktemp(recipe))
    return scripts


@pytest.mark.parametrize("name", [name for _, _, name in NAMES])
def test_a_script_equals_its_golden_file(rendered: dict[str, str], name: str) -> None:
    path = GOLDEN / name
    if os.environ.get("TANDEM_RENEW_GOLDEN"):
        path.write_text(rendered[name], encoding="utf-8")
    golden = path.read_text(encoding="utf-8") if path.is_file() else ""
    if rendered[name] != golden:
        lines = difflib.unified_diff(
            golden.splitlines(), rendered[name].splitlines(), f"golden/{name}", "rendered", lineterm=""
        )
        pytest.fail("\n".join([*lines, "", f"if that is meant: {RENEW}"]), pytrace=False)


def test_every_golden_file_is_of_a_script() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(name for _, _, name in NAMES)


@pytest.mark.parametrize("name", [name for _, _, name in NAMES])
def test_a_golden_file_is_bash(name: str) -> None:
    checks = [["bash", "-n"]]
    if shutil.which("shellcheck"):
        checks.append(["shellcheck", "--severity=warning"])
    for check in checks:
        done = subprocess.run([*check, str(GOLDEN / name)], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_template_by_hand_is_bash() -> None:
    done = subprocess.run(["bash", "-n", str(REPOSITORY / "slurm" / "stage.sbatch")], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("cluster", SHAPES)
def test_a_cluster_of_that_shape_takes_them_and_none_smaller(cluster: str, tmp_path: Path) -> None:
    """The golden files as they are, every script of them; a node, GPU, core or GiB less is too little."""
    missing = slurm_cluster.missing()
    if missing:
        pytest.skip(f"no slurm cluster here: {'; '.join(missing)}")
    scripts = [GOLDEN / name for _, of, name in NAMES if of == cluster]
    placement = load(Path(cluster)).train
    assert placement.gpu_type == SHAPES[cluster]["gpu_type"]
    with SlurmCluster(tmp_path, **SHAPES[cluster], partitions=PARTITIONS) as machine:
        for script in scripts:
            machine.run("sbatch", "--test-only", script)
        training = next(path for path in scripts if re.search("pretrain|finetune", path.name))
        for option in (
            f"--nodes={placement.nodes + 1}",
            f"--gres=gpu:{placement.gpu_type}:9",
            f"--cpus-per-task={placement.cpus_per_gpu + 1}",
            "--mem=1100G",
            "--constraint=h100_80g",
            "--partition=nowhere",
        ):
            with pytest.raises(SlurmError):
                machine.run("sbatch", "--test-only", option, training)
