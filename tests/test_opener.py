"""How a crawl opens URLs: limits on size and time, and no way to a private address, redirects included."""

import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.web import connect
from data_tools.web.connect import FetchError, is_public
from data_tools.web.local_site import LocalSite
from data_tools.web.opener import Guard, Mirror, Opener, Redirected, url_problem
from tests.data_helpers import picture
from tests.hostile_site import HostileSite

OPEN = Guard(timeout_s=1.0, max_bytes=1_000_000, request_deadline_s=2.0, allow_private=True)


def fetch(url: str, guard: Guard) -> bytes:
    return Opener(guard).get(url).body


def failure(url: str, guard: Guard) -> FetchError:
    with pytest.raises(FetchError) as caught:
        fetch(url, guard)
    return caught.value


def reason(url: str, guard: Guard) -> str:
    return failure(url, guard).reason


@pytest.fixture(scope="module")
def site() -> Iterator[HostileSite]:
    with HostileSite({"/good.webp": picture()}) as running:
        yield running


def test_good_and_redirected(site: HostileSite) -> None:
    assert fetch(site.url + "/good.webp", OPEN) == site.files["/good.webp"]
    for path, location in (("/redirect", site.url + "/good.webp"), ("/local-file", "file:///etc/hostname")):
        with pytest.raises(Redirected) as redirected:  # for the caller to check, whatever it is
            fetch(site.url + path, OPEN)
        assert redirected.value.location == location
    assert reason(redirected.value.location, OPEN) == "bad_url"


@pytest.mark.parametrize(
    ("path", "expected", "temporary"),
    [
        ("/nothing", "not_found", False),
        ("/403", "http_error", False),
        ("/500", "http_error", True),
        ("/closed", "too_many_requests", True),
        ("/promised", "too_large", False),
        ("/big", "too_large", False),
        ("/short", "truncated", True),
        ("/drip", "timeout", True),
        ("/headers", "timeout", True),
        ("/hung", "timeout", True),
        ("/gzip-bomb", "too_large", False),
        ("/br", "unsupported_format", False),
    ],
)
def test_failures_have_a_reason(site: HostileSite, path: str, expected: str, temporary: bool) -> None:
    began = time.monotonic()
    error = failure(site.url + path, OPEN)
    assert (error.reason, error.temporary) == (expected, temporary)
    assert time.monotonic() - began < 3


def test_a_body_that_nobody_asked_to_be_packed_is_unpacked(site: HostileSite) -> None:
    assert fetch(site.url + "/gzip", OPEN) == site.files["/good.webp"]


def test_a_url_of_other_scripts_is_sent_as_http_wants_it(site: HostileSite) -> None:
    site.files["/%E7%86%8A/a.webp"] = b"panda"
    assert fetch(site.url + "/熊/a.webp", OPEN) == b"panda"


def test_retry_after_is_read_as_seconds_and_as_a_date(site: HostileSite) -> None:
    assert failure(site.url + "/busy", OPEN).retry_after_s == 1
    asked = failure(site.url + "/busy-date", OPEN).retry_after_s
    assert asked is not None
    assert 0.5 < asked <= 2
    assert failure(site.url + "/flaky", OPEN).retry_after_s is None


def test_a_tls_handshake_without_end_is_cut_off() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dripping = threading.Thread(target=_drip_into, args=(silent,), daemon=True)
        dripping.start()
        began = time.monotonic()
        assert reason(f"https://127.0.0.1:{silent.getsockname()[1]}/", OPEN) == "timeout"
        assert 1 < time.monotonic() - began < 3


def _drip_into(server: socket.socket) -> None:
    connection, _ = server.accept()
    for byte in b"\x16\x03\x03\x3f\xff" + bytes(1000):  # a record of 16 KB, a byte at a time
        time.sleep(0.3)
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return


def test_a_name_service_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(connect, "LOOKUPS_AT_ONCE", 2)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: ended.wait(30) and [])
    opener = Opener(replace(OPEN, timeout_s=0.2))
    began = time.monotonic()
    for i in range(4):  # two hang, and the ones after them find no thread free
        with pytest.raises(FetchError, match="timeout: name"):
            opener.get(f"http://name{i}.example/")
    assert time.monotonic() - began < 2
    ended.set()


def test_of_many_addresses_a_few_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def connected(address: tuple[str, int], timeout: float) -> socket.socket:
        tried.append(address[0])
        raise ConnectionRefusedError(111, "refused")

    found = [(2, 1, 6, "", (f"93.184.{i}.1", 0)) for i in range(200)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: found)
    monkeypatch.setattr(socket, "create_connection", connected)
    assert reason("http://many.example/", replace(OPEN, allow_private=False)) == "unreachable"
    assert tried == [f"93.184.{i}.1" for i in range(connect.MOST_ADDRESSES)]


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
        with pytest.raises(Redirected) as redirected:
            fetch("http://public.example/away", guard)
        assert reason(redirected.value.location, guard) == "private_address"
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
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("100.64.0.1", False),
        ("192.168.1.1", False),
        ("224.0.0.1", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("::ffff:93.184.216.34", True),
        ("64:ff9b::169.254.169.254", False),
        ("64:ff9b::93.184.216.34", True),
        ("2002:a00:1::", False),
    ],
)
def test_public_addresses_and_those_that_embed_a_private_one(address: str, public: bool) -> None:
    assert is_public(address) == public


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
