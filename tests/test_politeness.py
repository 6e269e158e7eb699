"""When a host is asked: limits, turns, waits and robots.txt, by a clock that the tests turn."""

import pytest

from data_tools.web.connect import FetchError
from data_tools.web.opener import Answer, Redirected
from data_tools.web.politeness import MAX_BACKOFF_S, Item, Limits, Schedule, pause_s
from data_tools.web.robots import Robots

BUSY = FetchError("http_error", "HTTP Error 503: ", temporary=True)


def item(host: str, key: int = 0, free: bool = False) -> Item:
    return Item(0, key, f"http://{host}/{key}", host, free)


def schedule(items: list[Item], *, probe: bool = False, per_host: int = 2, delay_s: float = 1.0) -> Schedule:
    found = Schedule(Limits(per_host=per_host, host_delay_s=delay_s), probe=probe)
    for each in items:
        found.add(each)
    return found


def take_all(waiting: Schedule, now: float) -> list[Item]:
    found = []
    while (each := waiting.take(now)) is not None:
        found.append(each)
    return found


def test_a_host_has_so_many_requests_running_and_so_long_between_starts() -> None:
    items = [item("a", key) for key in range(4)]
    waiting = schedule(items)
    assert take_all(waiting, 0.0) == [items[0]]
    assert waiting.wait_s(0.25) == 0.75
    assert take_all(waiting, 0.9) == []
    assert take_all(waiting, 1.0) == [items[1]]
    assert take_all(waiting, 9.0) == []  # two are running
    assert waiting.wait_s(9.0) is None  # nothing can start before one of them ends
    waiting.ended(items[0])
    assert take_all(waiting, 9.0) == [items[2]]


def test_a_host_with_many_urls_holds_no_other_up() -> None:
    crowd = [item("crowd", key) for key in range(10_000)]
    others = [item(f"host{key}", key) for key in range(50)]
    waiting = schedule([*crowd, *others])
    started = take_all(waiting, 0.0)
    assert started == [crowd[0], *others]
    order = []
    for now in range(1, 20):  # all end at once: the crowd has one turn a second, and no more
        for each in started:
            waiting.ended(each)
        started = take_all(waiting, float(now))
        order += started
    assert order == crowd[1:20]


def test_the_stages_own_site_has_no_limits() -> None:
    items = [item("own", key, free=True) for key in range(100)]
    assert take_all(schedule(items, probe=True), 0.0) == items


def test_until_its_robots_txt_is_read_a_host_has_one_request() -> None:
    items = [item("a", key) for key in range(4)]
    waiting = schedule(items, probe=True, delay_s=0.1)
    first = take_all(waiting, 0.0)
    assert first == items[:1]
    assert take_all(waiting, 5.0) == []
    waiting.open(items[0], 0.0)
    waiting.ended(items[0])
    waiting.add(items[0], front=True)
    assert take_all(waiting, 5.0) == [items[0]]  # the one that asked for robots.txt is the next
    assert take_all(waiting, 5.1) == [items[1]]


def test_a_crawl_delay_is_kept_up_to_a_bound_and_leaves_one_request_at_a_time() -> None:
    items = [item("a", key) for key in range(4)]
    waiting = Schedule(Limits(per_host=4, host_delay_s=0.1, crawl_delay_max_s=10), probe=True)
    for each in items:
        waiting.add(each)
    assert take_all(waiting, 0.0) == items[:1]
    waiting.open(items[0], 3600.0)
    waiting.ended(items[0])
    assert take_all(waiting, 9.9) == []
    assert take_all(waiting, 10.0) == [items[1]]
    assert take_all(waiting, 30.0) == []
    waiting.open(items[1], 0.0)  # another site of that host (https, say) asks for nothing: no matter
    waiting.ended(items[1])
    assert take_all(waiting, 20.0) == [items[2]]


def test_a_turn_without_a_request_costs_the_host_no_time() -> None:
    items = [item("a", key) for key in range(3)]
    waiting = schedule(items, delay_s=60.0)
    for each in items:
        assert take_all(waiting, 0.0) == [each]
        waiting.ended(each, asked=False)  # its robots.txt forbids it
    assert take_all(waiting, 0.0) == []


def test_a_held_host_waits_with_all_its_urls_and_dropped_ones_are_left_out() -> None:
    items = [item("a", key) for key in range(3)]
    waiting = schedule(items, delay_s=0.0)
    first = waiting.take(0.0)
    assert first is items[0]
    waiting.hold(first, 30.0)
    waiting.ended(first)
    first.not_before = 30.0
    waiting.add(first)
    assert take_all(waiting, 29.0) == []
    items[1].dropped = True
    assert take_all(waiting, 30.0) == [items[2], items[0]]


def test_pauses_double_with_a_jitter_of_their_own_and_end() -> None:
    limits = Limits(retries=20, backoff_s=1.0)
    pauses = []
    for failures in range(1, 21):
        each = item("a")
        each.failures = failures
        pause = pause_s(each, BUSY, limits)
        assert pause == pause_s(each, BUSY, limits)  # of the URL and its failures alone
        assert pause is not None
        assert 0.5 <= pause / min(MAX_BACKOFF_S, 2.0 ** (failures - 1)) <= 1.5
        pauses.append(pause)
    assert len({pause / 2.0**n for n, pause in enumerate(pauses)}) == 20
    each.failures = 21
    assert pause_s(each, BUSY, limits) is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FetchError("http_error", "HTTP Error 403: "), None),
        (FetchError("private_address", "10.0.0.1"), None),
        (FetchError("too_many_requests", "HTTP Error 429: ", temporary=True, retry_after_s=60), 60),
        (FetchError("too_many_requests", "HTTP Error 429: ", temporary=True, retry_after_s=121), None),
    ],
)
def test_who_is_not_asked_again_and_who_says_when(error: FetchError, expected: float | None) -> None:
    each = item("a")
    each.failures = 1
    assert pause_s(each, error, Limits(retry_after_max_s=120)) == expected


class Sites:
    """Answers by URL, in place of an opener: what robots.txt gives is the subject, not how it comes."""

    def __init__(self, answers: dict[str, str | Exception]) -> None:
        self.answers, self.asked = answers, list[str]()

    def get(self, url: str, **_: object) -> Answer:
        self.asked.append(url)
        answer = self.answers[url]
        if isinstance(answer, Exception):
            raise answer
        return Answer({}, answer.encode())  # type: ignore[arg-type]


def robots(answers: dict[str, str | Exception]) -> tuple[Robots, Sites]:
    sites = Sites(answers)
    return Robots(sites, "tandem"), sites  # type: ignore[arg-type]


def test_rules_of_our_token_and_of_all() -> None:
    text = "User-agent: *\nDisallow: /\n\nUser-agent: Tandem\nDisallow: /private/\nCrawl-delay: 2.5\n"
    rules, sites = robots({"http://a.example:8080/robots.txt": text})
    url = "http://a.example:8080/x.webp"
    assert not rules.knows(url)
    rules.ask(url)
    assert rules.refuses(url) is None
    assert rules.delay_s(url) == 2.5
    refused = rules.refuses("http://a.example:8080/private/x.webp")
    assert refused is not None
    assert refused.reason == "robots"
    assert len(sites.asked) == 1
    assert not rules.knows("https://a.example:8080/x.webp")  # another site


@pytest.mark.parametrize("error", [("not_found", "HTTP Error 404: "), ("http_error", "HTTP Error 403: ")])
def test_a_4xx_allows_all(error: tuple[str, str]) -> None:
    rules, _ = robots({"http://a/robots.txt": FetchError(*error)})
    rules.ask("http://a/x")
    assert rules.refuses("http://a/x") is None
    assert rules.delay_s("http://a/x") == 0


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BUSY, "robots"),
        (FetchError("http_error", "HTTP Error 501: "), "robots"),
        (FetchError("too_many_requests", "HTTP Error 429: ", temporary=True), "robots"),
        (FetchError("unreachable", "refused", temporary=True), "unreachable"),
        (FetchError("private_address", "a is 10.0.0.1"), "private_address"),
    ],
)
def test_a_site_whose_rules_cannot_be_had_is_closed(error: FetchError, expected: str) -> None:
    rules, _ = robots({"http://a/robots.txt": error})
    with pytest.raises(FetchError):
        rules.ask("http://a/x")
    assert not rules.knows("http://a/x")
    assert rules.give_up("http://a/x", error).reason == expected
    refused = rules.refuses("http://a/y")
    assert refused is not None
    assert (refused.reason, refused.temporary) == (expected, False)


def test_five_redirects_of_robots_txt_are_followed() -> None:
    hops: dict[str, str | Exception] = {"http://a/robots.txt": Redirected("http://b/1")}
    hops |= {f"http://b/{i}": Redirected(f"http://b/{i + 1}") for i in range(1, 5)}
    rules, sites = robots(hops | {"http://b/5": "User-agent: *\nDisallow: /"})
    rules.ask("http://a/x")
    assert rules.refuses("http://a/x") is not None
    assert len(sites.asked) == 6
    rules, sites = robots(hops | {"http://b/5": Redirected("http://b/6"), "http://b/6": "Disallow: /"})
    rules.ask("http://a/x")  # RFC 9309: as if there were none
    assert rules.refuses("http://a/x") is None
    assert len(sites.asked) == 6
