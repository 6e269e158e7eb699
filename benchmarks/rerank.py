"""Re-ranking the first k answers: quality and time beside cross-encoding all pairs, in one run.

    python -m benchmarks.rerank --model <finetune stage directory> --corpus <shard stage directory>/out \
        --split test [--texts captions] [--relevance concept] [--top-k 16 64 128] [--score match]

--model: a finished training stage of a method that judges pairs. --corpus: a shard stage's out/. Each row is
a whole evaluation, the embedding of the gallery included; time is its share of the time of the last row, in
which every picture is judged with every text. Recalls and ceilings (queries with a right answer among the
candidates) in percent.
"""

import argparse
import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from data_tools.shards import ShardIndex
from learning import model_files
from learning.evaluation.rerank import RerankConfig
from learning.evaluation.validate import evaluate_gallery
from learning.model_files import RetrievalModel

SHOWN = ("r@m", "i2t_r@1", "t2i_r@1", "ceiling_i2t", "ceiling_t2i")


def evaluated(
    model: RetrievalModel, index: ShardIndex, options: argparse.Namespace, rerank_by: RerankConfig | None
) -> tuple[dict[str, float], float, int]:
    """Metrics, seconds, and how many pairs were judged."""
    with Progress(transient=True) as progress:
        name = "by cosine" if rerank_by is None else f"{rerank_by.top_k} candidates"
        task = progress.add_task(f"{name}: images, texts, pairs", total=None)
        begun = time.perf_counter()
        outcome = evaluate_gallery(
            model.method,
            model.tokenizer,
            model.transform,
            index,
            options.texts,
            options.relevance,
            batch=options.batch,
            device=model.device,
            max_length=model.max_length,
            rerank_by=rerank_by,
            advance=lambda count: progress.advance(task, count),
        )
        seconds = time.perf_counter() - begun
        done = int(progress.tasks[0].completed)
    return outcome.metrics, seconds, done - len(outcome.images) - len(outcome.texts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--split", required=True)
    parser.add_argument("--texts", nargs="+", default=["title"])
    parser.add_argument("--relevance")
    parser.add_argument("--top-k", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--score", choices=["match+cosine", "match"], default="match+cosine")
    parser.add_argument("--batch", type=int, default=256, help="images, texts or pairs at a time")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    model = model_files.load(options.model, options.device)
    index = ShardIndex.open(options.corpus, options.split)
    evaluated(model, index, options, None)  # start-up of the libraries, the files in memory
    rows = {"by cosine": evaluated(model, index, options, None)}
    for top_k in options.top_k:
        config = RerankConfig(top_k=top_k, score=options.score, batch=options.batch)
        rows[f"first {top_k}"] = evaluated(model, index, options, config)
    everything = int(rows["by cosine"][0]["images"] + rows["by cosine"][0]["texts"])  # of either side
    config = RerankConfig(top_k=everything, score=options.score, batch=options.batch)
    rows["all pairs"] = evaluated(model, index, options, config)
    _, whole_s, _ = rows["all pairs"]

    sizes = f"{rows['by cosine'][0]['images']:,.0f} images, {rows['by cosine'][0]['texts']:,.0f} texts"
    table = Table("re-ranked", *SHOWN, "pairs", "time / all pairs", title=f"{options.split}: {sizes}")
    for name, (metrics, seconds, pairs) in rows.items():
        recalls = [f"{metrics[shown]:.2f}" if shown in metrics else "" for shown in SHOWN]
        table.add_row(name, *recalls, f"{pairs:,}", f"{seconds / whole_s:.3f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
