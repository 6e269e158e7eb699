"""Cluster files: those shipped are valid; each mistake is named with its line, field and what is allowed."""

import json
from pathlib import Path

import pytest

from pipeline.slurm import cluster
from pipeline.slurm.cluster import Cluster, load, seconds_of
from stages.base import StageError
from tests.pipeline_harness import inline

SHIPPED = sorted(cluster.FOLDER.glob("*.yaml"))
SMALL = """\
name: small
train:
  partition: gpu
  nodes: 2
  gpus_per_node: 4
  time_limit: 1-00:00:00
data:
  partition: cpu
  time_limit: '12:00:00'
environment:
  variables: {NCCL_DEBUG: INFO}
save_s: 300
"""


def write(folder: Path, text: str = SMALL, name: str = "small.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def message(path: Path) -> str:
    with pytest.raises(StageError) as caught:
        load(path)
    return str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_file_is_valid_and_its_name_alone_finds_it(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = load(Path(path.stem))
    assert found == load(path)
    assert found.name == path.stem


def test_the_examples_have_the_papers_numbers_of_gpus() -> None:
    cookie, r2d2 = load(Path("v100_6x8")).train, load(Path("a100_8x8")).train
    assert (cookie.nodes * cookie.gpus_per_node, cookie.gpu_type) == (48, "v100")
    assert (r2d2.nodes * r2d2.gpus_per_node, r2d2.gpu_type) == (64, "a100")


def test_a_file_here_comes_before_a_shipped_one_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, SMALL, "test")
    assert load(Path("test")).name == "small"


@pytest.mark.parametrize(
    ("before", "after", "parts"),
    [
        # keys: misspelt at two depths, missing
        (
            "save_s: 300",
            "safe_s: 300",
            [":12: safe_s: unknown key (its value is 300)", "did you mean 'save_s'?"],
        ),
        (
            "partition: gpu",
            "partitoin: gpu",
            [":3: train.partitoin: unknown key", "did you mean 'partition'?", "allowed: partition, qos"],
        ),
        ("  gpus_per_node: 4\n", "", [":2: train.gpus_per_node: missing; it has no default"]),
        ("name: small", "description: small", [": name: missing"]),
        # values
        ("nodes: 2", "nodes: two", [":4: train.nodes: 'two': it should be a valid integer"]),
        ("nodes: 2", "nodes: 0", [":4: train.nodes: 0: it should be greater than or equal to 1"]),
        (
            "partition: gpu",
            "partition: gpu queue",
            [":3: train.partition: 'gpu queue': write one name: letters, digits and _ . @ + : -"],
        ),
        (
            "partition: gpu",
            "constraint: a b",
            [":3: train.constraint: 'a b': write features joined by & or |"],
        ),
        ("partition: gpu", "constraint: 'a&$(x)'", [":3: train.constraint: 'a&$(x)': write features"]),
        ("partition: gpu", "exclude: 'n1;n2'", [":3: train.exclude: 'n1;n2': write names with commas"]),
        ("partition: gpu", f"qos: {'q' * 129}", [":3: train.qos: 'qqq", "129 characters; at most 128"]),
        (
            "partition: gpu",
            "memory_per_node: 480 GB",
            [":3: train.memory_per_node: '480 GB': write a whole number and K, M, G or T: 480G"],
        ),
        # times: YAML takes 12:00:00 without quotes for a number
        (
            "'12:00:00'",
            "12:00:00",
            [":9: data.time_limit: 43200 is a number: write [days-]hours", "in quotes"],
        ),
        ("'12:00:00'", "'12:00'", [":9: data.time_limit: '12:00': write [days-]hours:minutes:seconds"]),
        ("'12:00:00'", "'12:60:00'", [":9: data.time_limit: '12:60:00': write"]),
        (
            "'12:00:00'",
            "'00:09:59'",
            [
                ":9: data.time_limit: 00:09:59 is under twice save_s (300 s)",
                "raise the limit or lower save_s",
            ],
        ),
        (
            "save_s: 300",
            "save_s: 300\nstages: {crawl: {time_limit: '00:01:00'}}",
            [":13: stages.crawl.time_limit: 00:01:00 is under twice save_s"],
        ),
        ("save_s: 300", "save_s: 5", [":12: save_s: 5: it should be greater than or equal to 30"]),
        # options of sbatch that submit says itself, whole, shortened or by a synonym
        (
            "save_s: 300",
            "sbatch_options:\n- --mail-type=FAIL\n- --nodes=3",
            [":14: sbatch_options.1: '--nodes=3': --nodes is said by `train`, `data` or submit itself"],
        ),
        ("save_s: 300", "sbatch_options: [--arr=0-9]", ["'--arr=0-9': --array is said by"]),
        ("save_s: 300", "sbatch_options: [--no-requeue]", ["--no-requeue is said by"]),
        ("save_s: 300", "sbatch_options: ['-N 3']", ["'-N 3': write a long option of sbatch: --name"]),
        ("save_s: 300", "sbatch_options: ['--nice 5']", ["'--nice 5': write a long option of sbatch"]),
        # what is set up: two Pythons, places that depend on where the job runs, names
        (
            "environment:",
            "environment:\n  venv: /v\n  conda: {root: /c, name: n}",
            [":12: environment.conda: venv and conda both give the Python; leave one out"],
        ),
        (
            "environment:",
            "environment:\n  venv: /v\n  container: {kind: pyxis, image: a#b}",
            ["environment.container: venv and container both give the Python"],
        ),
        (
            "environment:",
            "environment:\n  venv: .venv",
            ["environment.venv: '.venv': write a path from the root"],
        ),
        (
            "environment:",
            "environment:\n  source: ~/setup.sh",
            ["environment.source: '~/setup.sh': write a path"],
        ),
        (
            "environment:",
            "environment:\n  container: {kind: apptainer, image: tandem.sif}",
            [":11: environment.container.image: 'tandem.sif': write a path from the root or an address"],
        ),
        (
            "environment:",
            "environment:\n  container: {kind: docker, image: /a.sif}",
            [":11: environment.container.kind: 'docker' is not allowed", "'apptainer' or 'pyxis'"],
        ),
        (
            "environment:",
            "environment:\n  container: {kind: pyxis, image: a, mounts: [/ok, '/a,b']}",
            [":11: environment.container.mounts.1: '/a,b': write a path from the root without a comma"],
        ),
        ("NCCL_DEBUG:", "NCCL-DEBUG:", [":11: environment.variables.NCCL-DEBUG", "write a variable's name"]),
        ("NCCL_DEBUG:", "UID:", [":11: environment.variables.UID", "none of BASHOPTS"]),
        ("INFO", "true", [":11: environment.variables.NCCL_DEBUG: True: it should be a valid string"]),
        ("INFO", '"a\\nb"', [":11: environment.variables.NCCL_DEBUG: 'a\\nb': write text of one line"]),
        ("name: small", "name: [small", ["not valid YAML"]),
    ],
)
def test_each_mistake_has_its_message(tmp_path: Path, before: str, after: str, parts: list[str]) -> None:
    assert before in SMALL
    path = write(tmp_path, SMALL.replace(before, after, 1))
    found = message(path)
    assert found.startswith(str(path))
    assert "\n" not in found, "one mistake is one line"
    for part in parts:
        assert part in found, found


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    wrong = SMALL.replace("nodes: 2", "nodes: two").replace("partition: cpu", "partition: c p")
    assert [line.split(": ")[1] for line in message(write(tmp_path, wrong)).splitlines()] == [
        "train.nodes",
        "data.partition",
    ]


def test_a_file_that_is_not_there_names_those_beside_it(tmp_path: Path) -> None:
    write(tmp_path)
    found = message(tmp_path / "smal.yaml")
    assert "cluster file" in found
    assert "did you mean 'small.yaml'?" in found


@pytest.mark.parametrize("control", ["\\x07", "\\t", "\\x7f", "\\n"])
@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("scratch", 'scratch: "/a{}b"\n'),
        ("sbatch_options.0", 'sbatch_options: ["--mail-user=a{}b"]\n'),
        ("environment.modules.0", 'environment: {{modules: ["a{}b"]}}\n'),
        ("environment.venv", 'environment: {{venv: "/a{}b"}}\n'),
        ("environment.conda.name", 'environment: {{conda: {{root: /c, name: "a{}b"}}}}\n'),
        ("environment.container.image", 'environment: {{container: {{kind: pyxis, image: "a{}b"}}}}\n'),
        ("environment.variables.N", 'environment: {{variables: {{N: "a{}b"}}}}\n'),
    ],
)
def test_control_characters_are_refused_with_the_fields_name(
    tmp_path: Path, field: str, text: str, control: str
) -> None:
    base = SMALL.replace("environment:\n  variables: {NCCL_DEBUG: INFO}\n", "")
    assert f"small.yaml:11: {field}: " in message(write(tmp_path, base + text.format(control)))


def test_extends_changes_a_file_and_the_line_is_that_of_the_file_that_says_it(tmp_path: Path) -> None:
    write(tmp_path)
    changed = load(write(tmp_path, "extends: small.yaml\nname: large\ntrain: {nodes: 9}\n", "large.yaml"))
    assert (changed.name, changed.train.nodes, changed.train.gpus_per_node) == ("large", 9, 4)
    wrong = write(tmp_path, "extends: small.yaml\n\ntrain: {nodes: none}\n", "wrong.yaml")
    assert message(wrong).startswith(f"{wrong}:3: train.nodes: 'none'")
    base = write(tmp_path, SMALL.replace("nodes: 2", "nodes: none"))
    assert message(write(tmp_path, "extends: small.yaml\n", "on_top.yaml")).startswith(
        f"{base}:4: train.nodes"
    )


def test_a_stage_differs_where_the_file_says_so_alone() -> None:
    made = Cluster.model_validate(
        {
            "name": "c",
            "train": {"nodes": 6, "gpus_per_node": 8, "partition": "gpu", "time_limit": "2-00:00:00"},
            "data": {"time_limit": "12:00:00", "tasks": 200},
            "stages": {"evaluate": {"nodes": 1, "partition": "short"}, "shard": {"cpus": 3}},
        }
    )
    assert made.train_placement("pretrain_1") == made.train
    assert made.train_placement("evaluate") == made.train.model_copy(
        update={"nodes": 1, "partition": "short"}
    )
    assert made.data_placement("shard") == made.data.model_copy(update={"cpus": 3})


@pytest.mark.parametrize(
    ("stages", "parts"),
    [
        (
            "{crawl: {nodes: 3}}",
            [":13: stages.crawl.nodes: not a field of a data stage; allowed: partition", "cpus"],
        ),
        (
            "{pretrain_1: {tasks: 3}}",
            [":13: stages.pretrain_1.tasks: not a field of a training stage", "nodes"],
        ),
        (
            "{pretrian_1: {nodes: 1}}",
            [
                ":13: stages.pretrian_1: the recipe has no such stage; did you mean 'pretrain_1'?",
                "crawl, pretrain_1",
            ],
        ),
    ],
)
def test_stages_are_held_against_the_recipes(tmp_path: Path, stages: str, parts: list[str]) -> None:
    path = write(tmp_path, SMALL + f"stages: {stages}\n")
    with pytest.raises(StageError) as caught:
        load(path).check_stages({"crawl": False, "pretrain_1": True}, path)
    for part in (str(path), *parts):
        assert part in str(caught.value), str(caught.value)


def test_a_wrong_stage_of_a_shipped_file_is_placed_in_that_file() -> None:
    with pytest.raises(StageError, match=r"clusters/v100_6x8\.yaml:\d+: stages\.flickr30k_crawl: the recipe"):
        load(Path("v100_6x8")).check_stages({"evaluate": True}, Path("v100_6x8"))


def test_time_limits_are_counted_in_seconds() -> None:
    assert [seconds_of(limit) for limit in ("2-00:00:00", "1-02:03:04", "01:30:00", "100:00:00")] == [
        172_800,
        93_784,
        5_400,
        360_000,
    ]


def test_the_schema_is_for_editors(tmp_path: Path) -> None:
    schema = json.loads(inline("schema", "--cluster", cwd=tmp_path).stdout)
    assert set(Cluster.model_fields) | {"extends"} == set(schema["properties"])
    assert schema["additionalProperties"] is False
    limit = schema["$defs"]["TrainPlacement"]["properties"]["time_limit"]
    assert limit["pattern"] == r"^(?:(\d{1,3}-)?\d{1,3}:[0-5]\d:[0-5]\d)$"
    assert "seconds" in limit["description"]
    assert schema["$defs"]["Container"]["properties"]["kind"]["enum"] == ["apptainer", "pyxis"]
    assert "epochs" not in json.dumps(schema), "that is a recipe's"
    assert '"contrastive_batch"' in inline("schema", cwd=tmp_path).stdout
