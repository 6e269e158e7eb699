"""One form of texts that differ in nothing but writing: what counts as the same caption."""

import hashlib
import unicodedata

# Of Unicode's general categories: punctuation, separators, control and format characters (joiners, direction
# marks). Letters, marks, numbers and symbols (emoji) stay.
_LEFT_OUT = ("P", "Z", "C")
_SELECTORS = range(0xFE00, 0xFE10)  # variation selectors: an emoji with and without them is one


def same_form(text: str) -> str:
    """NFKC (full-width forms become narrow ones), case folded, without white space and punctuation.

    White space goes altogether, as Chinese is written with and without it. "" for a text of nothing else.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(
        c for c in folded if unicodedata.category(c)[0] not in _LEFT_OUT and ord(c) not in _SELECTORS
    )


def text_key(text: str) -> int | None:
    """A 64-bit number of a text's form; None for one without any letter, number or symbol.

    Among 10^8 texts that are compared with 10^5 the chance that any two differ and agree here is under 10^-6.
    """
    form = same_form(text)
    return int.from_bytes(hashlib.blake2b(form.encode(), digest_size=8).digest(), "little") if form else None
