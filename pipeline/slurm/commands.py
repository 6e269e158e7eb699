"""The commands for SLURM: `tandem submit | cancel | doctor`."""

import sys
from typing import Annotated

import typer

from pipeline.cli_options import (
    ROOT,
    UNCHANGED,
    ClusterOption,
    JsonOption,
    RecipeArgument,
    RootOption,
    SetOption,
    console,
    print_json,
)


def submit(
    recipe: RecipeArgument,
    cluster: ClusterOption,
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    from_: Annotated[
        str | None, typer.Option("--from", help="begin with this stage", metavar="STAGE")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="print the jobs and their scripts; send nothing")
    ] = False,
    json_: JsonOption = False,
) -> None:
    """Send the recipe to SLURM: one job a stage, each after those that it reads.

    What is done or has live jobs is not sent again: after a failure, or `tandem cancel`, submit once more and
    what is missing runs.

      tandem submit recipes/demo.yaml --cluster slurm/clusters/a100_8x8.yaml --dry-run

      tandem submit recipes/demo.yaml --cluster slurm/clusters/a100_8x8.yaml
    """
    from pipeline.slurm import submit as submitting

    request = submitting.Request(
        recipe, root, cluster, tuple(overrides), from_, dry_run, python=sys.executable
    )
    sent = submitting.submit(request)
    if json_:
        print_json({"recipe": str(recipe), "stages": [one.as_json() for one in sent]})
        return
    for one in sent:
        sys.stdout.write(f"{one.stage:16} {one.action:10} {one.what}\n")
        if dry_run:
            for name, text in one.scripts.items():
                sys.stdout.write(f"\n---- {name}\n{text}\n")


def cancel(recipe: RecipeArgument, root: RootOption = ROOT, overrides: SetOption = UNCHANGED) -> None:
    """Cancel the recipe's jobs. What runs is told to save; `tandem submit` goes on from there.

    tandem cancel recipes/demo.yaml
    """
    from pipeline import results as viewing
    from pipeline.slurm import submit as submitting

    cancelled = submitting.cancel(viewing.view(recipe, root, overrides))
    for job in cancelled:
        sys.stdout.write(f"job {job.id} cancelled ({job.state.lower()})\n")
    if not cancelled:
        sys.stdout.write("no live job\n")


def doctor(
    cluster: ClusterOption,
    root: RootOption = ROOT,
    login_only: Annotated[bool, typer.Option("--login-only", help="ask SLURM alone; send no job")] = False,
    wait_s: Annotated[
        float, typer.Option("--wait-s", help="for the job, queue and all", metavar="SECONDS")
    ] = 3600.0,
    json_: JsonOption = False,
) -> None:
    """See whether a cluster is fit for what its file says: from the login node, then from a job.

    Exit code 0: nothing is wrong (warnings are told), 2: something is.

      tandem doctor --cluster slurm/clusters/a100_8x8.yaml
    """
    from dataclasses import asdict

    from pipeline.slurm import cluster as clusters
    from pipeline.slurm import doctor as doctors

    say = console(stderr=True).print
    findings = doctors.examine(
        clusters.load(cluster), root, sys.executable, say, wait_s=wait_s, login_only=login_only
    )
    if json_:
        print_json([asdict(finding) for finding in findings])
    else:
        console().print(doctors.table(findings))
    raise typer.Exit(2 if any(finding.state == "failure" for finding in findings) else 0)
