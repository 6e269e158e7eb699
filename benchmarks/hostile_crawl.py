"""A crawl of a hostile web with 10,000 pictures on one host: `python -m benchmarks.hostile_crawl [URLS]`.

The web of tests/hostile_world.py (429 with Retry-After, hung sockets, drips of headers and bodies, redirects
to private addresses, endless bodies, bombs, pages as pictures, robots.txt) and a crowd of pictures on one
host, two times, with other numbers of processes, threads and pieces. It runs in a network namespace with a
loopback device alone, where the system allows one, and under a guard that counts connections to anywhere
else. About 5 minutes.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.hostile_world import CONFIG, EXPECTED, run

RUNS: tuple[dict[str, int], ...] = (
    {"processes": 2, "threads": 8, "urls_per_piece": 500},
    {"processes": 1, "threads": 16, "urls_per_piece": 300},
)
PACE = {"per_host": 4, "host_delay_s": 0.01}


def main() -> None:
    crowd = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    good = crowd + list(EXPECTED.values()).count("ok")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        for number, settings in enumerate(RUNS):
            found.append(run(Path(directory) / str(number), crowd, **settings, **PACE))
    same = all(each["shards"] == found[0]["shards"] for each in found)
    rows: list[tuple[str, list[object]]] = [
        ("URLs, of them good pictures", [f"{each['urls']:,}, {good:,}" for each in found]),
        ("pictures kept", [f"{each['counts']['kept']:,}" for each in found]),
        ("URLs with another status than expected", [len(each["wrong"]) for each in found]),
        ("requests", [f"{each['requests']:,}" for each in found]),
        ("most at once to one host (limit 4)", [max(each["most_at_once"].values()) for each in found]),
        (
            "mean s between starts on the crowd's host (limit 0.01)",
            [f"{each['gaps_s']['crowd.test']['mean']:.4f}" for each in found],
        ),
        ("connections that the guard blocked", [len(each["blocked"]) for each in found]),
        ("a network of its own", ["yes" if each["namespace"] else "no" for each in found]),
        ("shards byte for byte those of the first run", ["-", "yes" if same else "NO"]),
    ]
    print(f"| {CONFIG['timeout_s']:g} s a wait, {CONFIG['request_deadline_s']:g} s in all | run 1 | run 2 |")
    print("|---|---|---|")
    for name, values in rows:
        print(f"| {name} | {' | '.join(map(str, values))} |")
    fine = same and not any(each["wrong"] or each["blocked"] for each in found)
    sys.exit(0 if fine and all(each["counts"]["kept"] == good for each in found) else 1)


if __name__ == "__main__":
    main()
