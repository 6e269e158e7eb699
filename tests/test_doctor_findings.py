"""What `tandem doctor` makes of its job's report, and the parts of its measurements that need no job."""

import copy
import socket
import threading
import time
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest

from pipeline.slurm.doctor_checks import Finding
from pipeline.slurm.doctor_findings import GIB, job_findings
from pipeline.slurm.doctor_probes import clock_offset, ping_pong, time_server, tournament
from pipeline.slurm.meeting import Meeting, Outcome, RanksMissingError

Report = dict[str, Any]

HEALTHY: Report = {
    "complete": True,
    "world_size": 4,
    "missing": [],
    "errors": [],
    "step": "leave the network",
    "ranks": [
        {
            "rank": rank,
            "host": f"n{rank // 2}",
            "gpus": ["H100", "H100"],
            "cpu_asked_for": False,
            "cuda_visible_devices": "0,1",
            "slurm_gpus": "0,1",
            "versions": {"python": "3.11.7", "torch": "2.15.0", "NCCL": "2.30.7"},
            "free_bytes": {"/shared": 500 * GIB, "/tmp": 50 * GIB},
        }
        for rank in range(4)
    ],
    "clocks": {"n0": {"offset_s": 0.0, "bound_s": 1e-5}, "n1": {"offset_s": 0.2, "bound_s": 1e-4}},
    "files": {"n0": {"n0": 0.0, "n1": 0.1}, "n1": {"n0": 0.1, "n1": 0.0}},
    "locks": [{"holder": "n0", "seen": {"n1": True}}, {"holder": "n1", "seen": {"n0": True}}],
    "backend": "nccl",
    "all_reduce": {
        "bytes": 2**24,
        "wrong_ranks": [],
        "seconds": 0.001,
        "gb_per_s": 16.8,
        "bus_gb_per_s": 25.2,
    },
    "pairs": [{"a": "n0", "b": "n1", "gb_per_s": 20.0}],
}


def _changed(change: Callable[[Report], object]) -> dict[str, Finding]:
    report = copy.deepcopy(HEALTHY)
    change(report)
    return {finding.check: finding for finding in job_findings(report)}


def test_a_healthy_report_is_ok_in_every_check() -> None:
    findings = job_findings(HEALTHY)
    assert {finding.state for finding in findings} == {"ok"}
    assert [finding.check for finding in findings] == [
        *(
            "ranks",
            "GPUs",
            "versions",
            "disk",
            "disk",
            "clocks",
            "shared files",
            "locks",
            "all-reduce",
            "pairs",
        )
    ]


def _one_gpu_more(report: Report) -> None:
    for rank in report["ranks"]:
        rank["gpus"] = ["H100"] * 2 if rank["host"] == "n0" else ["H100"] * 3


def _blind(report: Report) -> None:
    report["ranks"][3]["gpus"] = []


def _crowded(report: Report) -> None:
    report["ranks"].append({**report["ranks"][3], "rank": 4})


def _pairs(report: Report) -> None:
    report["pairs"] = [
        {"a": f"n{a}", "b": f"n{b}", "gb_per_s": 4.0 if 2 in (a, b) else 20.0}
        for a, b in combinations(range(5), 2)
    ]


def _old_torch(report: Report) -> None:
    report["ranks"][2]["versions"] = {"python": "3.11.7", "torch": "2.14.0", "NCCL": "2.30.7"}


def _free(size: int) -> Callable[[Report], object]:
    return lambda report: report["ranks"][3]["free_bytes"].update({"/tmp": size})


def _clock(offset_s: float, bound_s: float = 1e-4) -> Callable[[Report], object]:
    return lambda report: report["clocks"]["n1"].update(offset_s=offset_s, bound_s=bound_s)


def _file_of_n1_after(seconds: float | None) -> Callable[[Report], object]:
    return lambda report: report["files"]["n0"].update(n1=seconds)


def _unlocked(report: Report) -> None:
    report["locks"][1]["seen"]["n0"] = False


def _garbled(report: Report) -> None:
    report["all_reduce"]["wrong_ranks"] = [2]


@pytest.mark.parametrize(
    ("check", "state", "told", "change"),
    [
        ("GPUs", "failure", "no GPU on n1 (SLURM gives 0,1", _blind),
        ("GPUs", "failure", "n1: 2 GPUs for 3 tasks", _crowded),
        ("GPUs", "warning", "2 x H100 on n0; 3 x H100 on n1", _one_gpu_more),
        ("versions", "failure", "torch: 2.15.0 on n0, n1; 2.14.0 on n1", _old_torch),
        ("disk", "warning", "10.0 GiB free in /tmp on n1", _free(10 * GIB)),
        ("disk", "failure", "0.5 GiB free in /tmp on n1", _free(GIB // 2)),
        ("clocks", "warning", "n1 +2.000 s", _clock(2.0)),
        ("clocks", "failure", "n1 -30.000 s", _clock(-30.0)),
        ("clocks", "ok", "n1 is off", _clock(2.0, bound_s=1.5)),
        ("shared files", "failure", "n0 does not see what n1 wrote", _file_of_n1_after(None)),
        ("shared files", "warning", "(n0, of n1)", _file_of_n1_after(6.5)),
        ("locks", "failure", "n0 does not see that n1 holds one", _unlocked),
        ("all-reduce", "failure", "a wrong sum on rank 2", _garbled),
        ("pairs", "warning", "slow: n0 - n2 4.00 GB/s", _pairs),
    ],
)
def test_what_is_wrong_is_named(
    check: str, state: str, told: str, change: Callable[[Report], object]
) -> None:
    finding = _changed(change)[check]
    assert finding.state == state, finding
    assert told in finding.seen
    assert bool(finding.remedy) == (state != "ok")


def test_the_node_that_slow_pairs_share_is_named_first() -> None:
    assert "n2 first: it is in 4 of these 4" in _changed(_pairs)["pairs"].remedy


def test_a_dead_rank_is_named_and_later_steps_are_not_judged() -> None:
    report = {
        **{key: HEALTHY[key] for key in ("world_size", "ranks")},
        "complete": False,
        "step": "clocks",
        "missing": [{"rank": 3, "host": "n1", "step": "clocks"}],
        "errors": [{"rank": 2, "host": "n1", "step": "clocks", "message": "OSError: no route"}],
    }
    findings = {finding.check: finding for finding in job_findings(report)}
    assert findings["ranks"].state == "failure"
    assert findings["ranks"].seen == "rank 3 on n1 did not answer in step 'clocks'"
    assert findings["step 'clocks'"].seen == "rank 2 on n1: OSError: no route"
    assert "pairs" not in findings


def test_a_report_that_ends_in_the_middle_says_where() -> None:
    finding = _changed(lambda report: report.update(complete=False, step="all-reduce"))["ranks"]
    assert (finding.state, finding.seen) == ("failure", "the report ends in step 'all-reduce'")


@pytest.mark.parametrize("skew_s", [0.0, 30.0, -2.5])
def test_a_clock_that_is_ahead_has_a_positive_offset_within_the_bound(skew_s: float) -> None:
    with time_server() as port:
        measured = clock_offset("127.0.0.1", port, timeout_s=5)
        with socket.create_connection(("127.0.0.1", port)):  # a silent client holds nobody up
            again = clock_offset("127.0.0.1", port, timeout_s=5)
    for clock in (measured, again):
        assert abs(clock["offset_s"]) <= clock["bound_s"] < 0.1
    now_s = iter(range(1000))
    # each reading of any clock is a second after the last: the truth is in the middle of a round trip
    offset_s, bound_s = ping_pong(lambda: float(next(now_s)), lambda: next(now_s) + skew_s)
    assert (offset_s, bound_s) == (skew_s, 1.0)


@pytest.mark.parametrize("members", [2, 3, 4, 7, 8])
def test_in_a_tournament_each_pair_meets_once_and_nobody_twice_at_a_time(members: int) -> None:
    rounds = tournament(range(10, 10 + members))
    assert len(rounds) == members - 1 + members % 2
    for pairs in rounds:
        present = [member for pair in pairs for member in pair]
        assert len(present) == len(set(present))
    met = sorted(pair for pairs in rounds for pair in pairs)
    assert met == list(combinations(range(10, 10 + members), 2))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_a_step_that_hangs_or_raises_on_one_rank_is_an_error_that_all_ranks_see() -> None:
    port, released, seen = _free_port(), threading.Event(), {}

    def fail() -> None:
        raise TimeoutError("the disk is gone")

    def take_part(rank: int) -> None:
        meeting = Meeting(rank, 2, "127.0.0.1", port, join_s=10)
        seen[rank] = [
            meeting.together("say", lambda: rank, 5),
            meeting.together("fail", fail if rank == 0 else lambda: rank, 5),
            meeting.together("hang", released.wait if rank == 1 else lambda: rank, 0.3),
            meeting.together("after", lambda: rank, 5),
        ]
        meeting.leave()

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    released.set()
    assert (
        seen[0]
        == seen[1]
        == [
            [Outcome(0), Outcome(1)],
            [Outcome(error="TimeoutError: the disk is gone"), Outcome(1)],
            [Outcome(0), Outcome(error="not done in 0.3 s")],
            [Outcome(0), Outcome(error="not tried: this rank hangs in an earlier step")],
        ]
    )


def test_a_rank_that_never_comes_is_named_in_bounded_time() -> None:
    meeting, began = Meeting(0, 2, "127.0.0.1", _free_port(), join_s=10), time.monotonic()
    with pytest.raises(RanksMissingError, match="step 'say': no answer from rank 1") as caught:
        meeting.together("say", lambda: "here", 0.2)
    assert caught.value.outcomes == [Outcome("here"), None]
    assert time.monotonic() - began < 10


def test_a_rank_that_finds_no_rank_0_says_where_it_looked() -> None:
    port, began = _free_port(), time.monotonic()
    with pytest.raises(ConnectionError, match=f"rank 1 does not reach rank 0 at 127.0.0.1:{port}"):
        Meeting(1, 2, "127.0.0.1", port, join_s=1)
    assert time.monotonic() - began < 10
