"""Peak memory and speed of blockwise ranks against the size of the full score matrix.

python benchmarks/retrieval_memory.py --queries 20000 --gallery 100000 --dimension 256
"""

import argparse
import json
import resource
import time

import numpy as np
import torch

from learning.evaluation.retrieval import GALLERY_BLOCK, QUERY_BLOCK, RightAnswers, best_ranks


def random_unit_rows(rows: int, dimension: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    made = generator.standard_normal((rows, dimension), dtype=np.float32)
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts it in KiB


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=20_000)
    parser.add_argument("--gallery", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    queries = random_unit_rows(options.queries, options.dimension, seed=0)
    gallery = random_unit_rows(options.gallery, options.dimension, seed=1)
    right = RightAnswers.of([{i % options.gallery} for i in range(options.queries)])
    best_ranks(
        queries[:1], gallery[:1], RightAnswers.of([{0}]), device=options.device
    )  # start-up of the libraries
    before = peak_rss_bytes()
    started = time.perf_counter()
    ranks = best_ranks(queries, gallery, right, device=options.device)
    seconds = time.perf_counter() - started
    scores = options.queries * options.gallery
    print(
        json.dumps(
            {
                "queries": options.queries,
                "gallery": options.gallery,
                "dimension": options.dimension,
                "device": options.device,
                "threads": torch.get_num_threads(),
                "blocks": [QUERY_BLOCK, GALLERY_BLOCK],
                "seconds": round(seconds, 1),
                "scores_per_s": round(scores / seconds),
                "embeddings_mib": round((queries.nbytes + gallery.nbytes) / 2**20),
                "peak_rss_mib": round(peak_rss_bytes() / 2**20),
                "peak_rss_of_ranking_mib": round((peak_rss_bytes() - before) / 2**20),
                "full_matrix_float32_mib": round(scores * 4 / 2**20),
                "median_rank": float(np.median(ranks)),  # about half the gallery: the embeddings are random
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
