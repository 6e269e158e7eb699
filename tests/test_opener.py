"""How a crawl opens URLs: limits on size and time, and no way to a private address, redirects included."""

import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.local_site import LocalSite
from data_tools.opener import Guard, Mirror, failure_reason, install, url_problem
from tests.data_helpers import picture
from tests.hostile_site import HostileSite

OPEN = Guard(timeout_s=1.0, max_bytes=1_000_000, allow_private=True)


@pytest.fixture(autouse=True)
def own_opener() -> Iterator[None]:
    before = urllib.request._opener  # type: ignore[attr-defined]
    yield
    urllib.request._opener = before  # type: ignore[attr-defined]


def fetch(url: str, guard: Guard) -> bytes:
    install(guard)
    with urllib.request.urlopen(url, timeout=guard.timeout_s) as response:
        return bytes(response.read())


def reason(url: str, guard: Guard) -> str:
    with pytest.raises(Exception) as caught:  # img2dataset catches all, and keeps the text
        fetch(url, guard)
    return failure_reason(str(caught.value))


@pytest.fixture(scope="module")
def site() -> Iterator[HostileSite]:
    with HostileSite({"/good.webp": picture()}) as running:
        yield running


def test_good_and_redirected(site: HostileSite) -> None:
    assert fetch(site.url + "/good.webp", OPEN) == site.files["/good.webp"]
    assert fetch(site.url + "/redirect", OPEN) == site.files["/good.webp"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/nothing", "not_found"),
        ("/500", "http_error"),
        ("/loop", "http_error"),
        ("/promised", "too_large"),
        ("/big", "too_large"),
        ("/short", "truncated"),
        ("/drip", "timeout"),
        ("/local-file", "http_error"),
    ],
)
def test_failures_have_a_reason(site: HostileSite, path: str, expected: str) -> None:
    assert reason(site.url + path, OPEN) == expected


def test_nobody_listens() -> None:
    with HostileSite({}) as gone:
        url = gone.url
    assert reason(url, OPEN) == "unreachable"


def test_silence_is_a_timeout(site: HostileSite) -> None:
    with HostileSite({}, delay_s=1.0) as slow:
        assert reason(slow.url, replace(OPEN, timeout_s=0.2)) == "timeout"


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "[::1]", "0.0.0.0", "10.0.0.1", "169.254.169.254", "[::ffff:127.0.0.1]"],
)
def test_private_addresses_are_refused(site: HostileSite, host: str) -> None:
    port = site.url.rpartition(":")[2]
    before = sum(site.hits.values())
    assert reason(f"http://{host}:{port}/good.webp", replace(OPEN, allow_private=False)) == "private_address"
    assert sum(site.hits.values()) == before


def test_a_redirect_to_a_private_address_is_refused(tmp_path: Path, site: HostileSite) -> None:
    with HostileSite({}, away=site.url + "/good.webp") as public:
        port = int(public.url.rpartition(":")[2])
        mirror = Mirror("http://public.example/", ("127.0.0.1", port))
        guard = replace(OPEN, allow_private=False, mirror=mirror)
        before = site.hits["/good.webp"]
        assert reason("http://public.example/away", guard) == "private_address"
        assert site.hits["/good.webp"] == before
        assert public.hits["/away"] == 1


def test_mirror_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    (folder / "a b").mkdir(parents=True)
    (folder / "a b" / "x.webp").write_bytes(b"one")
    (tmp_path / "secret").write_bytes(b"two")
    with LocalSite(folder) as local:
        guard = Guard(1.0, 1000, mirror=Mirror("http://site.example/pics/", local.address))
        assert fetch("http://site.example/pics/a%20b/x.webp?size=1", guard) == b"one"
        for path in ("nothing", "../secret", "%2e%2e/secret", "..%2fsecret", "%00", "a%20b"):
            assert reason(f"http://site.example/pics/{path}", guard) == "not_found"


@pytest.mark.parametrize(
    ("url", "fine"),
    [
        ("http://site.example/x.webp", True),
        ("HTTPS://site.example:8443/x?y#z", True),
        ("ftp://site.example/x", False),
        ("file:///etc/passwd", False),
        ("data:image/png;base64,xx", False),
        ("site.example/x", False),
        ("http://", False),
        ("http://site.example:notaport/", False),
        ("http://[::1", False),
        ("http://site.example/a b", False),
        ("http://site.example/\r\nHost: x", False),
        ("", False),
    ],
)
def test_urls_that_are_tried(url: str, fine: bool) -> None:
    assert (url_problem(url) is None) == fine
