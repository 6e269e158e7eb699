"""`tandem corpus explain | whatif`: questions about a filtered and crawled corpus."""

from typing import Annotated

import typer

from pipeline.cli_options import (
    ROOT,
    UNCHANGED,
    JsonOption,
    RecipeArgument,
    RootOption,
    SetOption,
    console,
    print_json,
)

app = typer.Typer(help="Ask about a corpus: what became of a row, what other rules would leave.")


@app.callback()
def _corpus() -> None:
    """Ask about a corpus: what became of a row, what other rules would leave."""


@app.command()
def explain(
    recipe: RecipeArgument,
    text: Annotated[
        str, typer.Argument(help="a URL or a query of the log", metavar="URL-or-QUERY", show_default=False)
    ],
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    json_: JsonOption = False,
) -> None:
    """Say what became of each row of a URL or a query: where it was dropped, by which rule, by what numbers.

    It asks the stages that are done: filter, crawl, and what stands between them and the shards.

      tandem corpus explain recipes/demo.yaml "red panda"

      tandem corpus explain recipes/demo.yaml http://pictures.example/noto/1f43c.webp
    """
    from pipeline import corpus_explain, corpus_tables

    answers = corpus_explain.explain(recipe, root, overrides, text)
    if json_:
        print_json({"text": text, "answers": [answer.as_json() for answer in answers]})
        return
    for answer in answers:
        console().print(corpus_tables.of_fates(answer, text))


@app.command()
def whatif(
    recipe: RecipeArgument,
    root: RootOption = ROOT,
    overrides: SetOption = UNCHANGED,
    json_: JsonOption = False,
) -> None:
    """Say how much other rules of the filter would leave, now beside then, without running it.

    The counts are those of a new run: they come from the measures that the filter stored.

      tandem corpus whatif recipes/demo.yaml --set filter.min_ctr=0.02

      tandem corpus whatif recipes/demo.yaml --set filter.min_show=50 --set filter.best_per_query=null
    """
    from pipeline import corpus_tables, corpus_whatif

    answers = corpus_whatif.what_if(recipe, root, overrides)
    if json_:
        print_json({"answers": [answer.as_json() for answer in answers]})
        return
    for answer in answers:
        console().print(corpus_tables.of_what_if(answer))
