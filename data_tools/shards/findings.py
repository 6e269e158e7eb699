"""What is said of a shard: its sound samples, its lost ones, and findings; and the names of members."""

from dataclasses import dataclass, field
from pathlib import PurePosixPath

HARMLESS = frozenset({"padding", "bytes"})  # no sample is changed


@dataclass(frozen=True, slots=True)
class Finding:
    """Something wrong in a shard: its kind, the sample's key ("" for none), the byte, and words."""

    shard: str
    kind: str
    key: str
    offset: int
    detail: str

    @property
    def harmless(self) -> bool:
        return self.kind in HARMLESS


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a shard."""

    offset: int
    size: int
    extension: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """A sound sample: where its bytes are, and their checksums."""

    key: str
    image: Place
    record: Place
    sha256: str
    crc32: int
    listed: bool  # in the index, as a sample of this shard
    others: tuple[Place, ...] = ()


@dataclass
class Examined:
    """What one shard holds."""

    shard: str
    bytes: int = 0
    sha256: str = ""
    findings: list[Finding] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)  # key: why
    keys: int = 0  # sound or not

    def say(self, kind: str, key: str, offset: int, detail: str) -> None:
        self.findings.append(Finding(self.shard, kind, printable(key), offset, printable(detail)))

    def lose(self, kind: str, key: str, offset: int, detail: str) -> None:
        self.say(kind, key, offset, detail)
        self.lost.setdefault(printable(key), f"{kind}: {printable(detail)}")


def split_name(name: str) -> tuple[str, str]:
    """Key and extension as webdataset reads them: at the first dot after the last slash."""
    folder, slash, last = name.rpartition("/")
    base, _, extension = last.partition(".")
    return f"{folder}{slash}{base}", extension.lower()


def safe_name(name: str) -> bool:
    """Whether a name stays below a directory wherever it is unpacked, and prints as it is."""
    path = PurePosixPath(name)
    return (
        name == printable(name)
        and name.isprintable()
        and not path.is_absolute()
        and ".." not in path.parts
        and "\\" not in name
        and bool(split_name(name)[0])
    )


def printable(text: str) -> str:
    """A text without bytes that are no UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
