"""What a site's robots.txt (RFC 9309) allows: asked once a site, by way of the crawl's own guard.

Memory grows with the number of sites that have rules: their texts, packed; the parsed rules of the last
1,000.
"""

import threading
import zlib
from collections import OrderedDict
from urllib.parse import urlsplit

from protego import Protego

from data_tools.web.connect import FetchError
from data_tools.web.opener import Opener, Redirected

MAX_BYTES = 500 * 1024  # RFC 9309, 2.5: as much must be read at the least
MAX_REDIRECTS = 5  # RFC 9309, 2.3.1.2
_PARSED = 1000
_NO_RULES = b""


class Robots:
    """The rules of the sites that were asked. Safe to use from many threads."""

    def __init__(self, opener: Opener, token: str) -> None:
        """`token`: the product token of the crawler, which a robots.txt names in its User-agent lines."""
        self._opener, self._token = opener, token
        self._texts: dict[str, bytes | FetchError] = {}  # packed, or why the site is closed to us
        self._parsed: OrderedDict[str, Protego] = OrderedDict()
        self._lock = threading.Lock()

    def knows(self, url: str) -> bool:
        """Whether the robots.txt of the URL's site was asked for."""
        return site_of(url) in self._texts

    def ask(self, url: str) -> None:
        """Fetch the robots.txt of the URL's site: one request and up to five redirects.

        A 4xx allows all (but 429: the site is there and busy). A 5xx or no answer closes the site for the
        crawl, with `give_up`; until then FetchError is raised, `temporary` where another try may go well.
        """
        site = site_of(url)
        location = f"{site}/robots.txt"
        for _ in range(MAX_REDIRECTS + 1):
            try:
                body = self._opener.get(location, max_bytes=MAX_BYTES, cut=True).body
                self._texts[site] = zlib.compress(body) if body.strip() else _NO_RULES
                return
            except Redirected as redirected:
                location = redirected.location
            except FetchError as error:
                unavailable = error.reason in ("not_found", "http_error", "bad_url")
                if error.temporary or not unavailable or error.detail.startswith("HTTP Error 5"):
                    raise
                break
        self._texts[site] = _NO_RULES

    def give_up(self, url: str, error: FetchError) -> FetchError:
        """Close the URL's site, whose robots.txt cannot be had; what each of its URLs fails with."""
        nobody = error.reason in ("unreachable", "timeout", "private_address")
        reason = error.reason if nobody else "robots"
        closed = FetchError(reason, f"robots.txt: {error.detail}")
        self._texts[site_of(url)] = closed
        return closed

    def refuses(self, url: str) -> FetchError | None:
        """Why a URL of a known site must not be fetched; None: it may."""
        site = site_of(url)
        text = self._texts[site]
        if isinstance(text, FetchError):
            return text
        if text is _NO_RULES or self._rules(site, text).can_fetch(url, self._token):
            return None
        return FetchError("robots", "robots.txt of the site disallows it")

    def delay_s(self, url: str) -> float:
        """The Crawl-delay of a known site, in seconds; 0 where it names none."""
        site = site_of(url)
        text = self._texts[site]
        if isinstance(text, FetchError) or text is _NO_RULES:
            return 0.0
        return float(self._rules(site, text).crawl_delay(self._token) or 0.0)

    def _rules(self, site: str, packed: bytes) -> Protego:
        with self._lock:
            rules = self._parsed.pop(site, None)
            if rules is None:
                rules = Protego.parse(zlib.decompress(packed).decode("utf-8", "replace"))
            self._parsed[site] = rules
            if len(self._parsed) > _PARSED:
                self._parsed.popitem(last=False)
            return rules


def site_of(url: str) -> str:
    """Scheme, host and port: what a robots.txt holds for."""
    parts = urlsplit(url)
    return f"{parts.scheme.lower()}://{parts.netloc.rpartition('@')[2].lower()}"
