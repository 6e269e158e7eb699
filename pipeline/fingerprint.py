"""Fingerprints: a stage's directory is named by everything that shapes its result, and by nothing else."""

import glob
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.remote import Remote, RemoteError
from pipeline.recipe import Recipe
from stages.base import StageConfig, StageError

ABSENT = "absent"  # stands for the hash of a file that is not there (yet)
REMEMBERED_BYTES = 1 << 20  # smaller files are hashed each time
_BLOCK = 1 << 22


@dataclass(frozen=True)
class Identity:
    """What a stage's fingerprint was made of."""

    stage: str
    kind: str
    version: int
    seed: int
    config: Mapping[str, Any]  # all fields as they count: without cosmetic ones, files by name
    files: Mapping[str, str]  # field name: sha256 of the content, or ABSENT
    inputs: Mapping[str, str]  # role: fingerprint
    input_stages: Mapping[str, str]  # role: stage; a stage's name is no part of the fingerprint
    fingerprint: str  # sha256, hexadecimal
    absent: tuple[Path, ...] = ()  # files that this stage needs and that are not there

    @property
    def short(self) -> str:
        """What names the directory."""
        return self.fingerprint[:12]


def identities(recipe: Recipe, root: Path) -> dict[str, Identity]:
    """The identity of every stage of the recipe, in order. Absent files are listed, not an error."""
    cache = HashCache(root / ".hashes.json")
    found: dict[str, Identity] = {}
    for name, config in recipe.stages.items():
        inputs = {role: found[other].fingerprint for role, other in config.inputs.items()}
        found[name] = _identity(name, config, inputs, recipe, cache)
    cache.save()
    return found


def absent_message(recipe: Recipe, identity: Identity) -> str:
    """Names each field whose file is not there."""
    named = recipe.stages[identity.stage].files()
    lines = []
    for path in identity.absent:
        field = next((f for f, p in named.items() if (recipe.directory / p).resolve() == path), "files")
        parts = [int(part) if part.isdigit() else part for part in field.split(".")]  # of a list: its place
        where = recipe.source.where(("stages", identity.stage, *parts))
        lines.append(
            f"{where}: stages.{identity.stage}.{field}: {path} is not there; make it or name another file"
        )
    return "\n".join(lines)


def stage_files(config: StageConfig, directory: Path) -> dict[str, Path]:
    """The files outside the run directory that the stage reads, as absolute paths."""
    return {name: (directory / path).resolve() for name, path in config.files().items()}


def _identity(
    name: str, config: StageConfig, inputs: Mapping[str, str], recipe: Recipe, cache: "HashCache"
) -> Identity:
    paths = stage_files(config, recipe.directory)
    files = {field: _sha256(config, field, path, cache) for field, path in paths.items()}
    files |= {field: _sha256_at(address, name, field) for field, address in config.addresses().items()}
    # The content of a file counts, not where it is: its path in the config is replaced by the field's name.
    written = {str(path): f"<file {field}>" for field, path in config.files().items()}
    left_out = {*config.cosmetic, "kind", "inputs"}
    values = _replaced(_without(config.model_dump(mode="json"), left_out), written)
    # Without what is left at its default: a later Tandem with another field goes on with the same runs
    chosen = _replaced(_without(config.model_dump(mode="json", exclude_defaults=True), left_out), written)
    whole = {
        "kind": config.kind,
        "version": type(config).version,
        "seed": recipe.head.seed,
        "config": chosen,
        "files": files,
        "inputs": dict(inputs),
    }
    text = json.dumps(whole, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return Identity(
        name,
        config.kind,
        type(config).version,
        recipe.head.seed,
        values,
        files,
        inputs,
        dict(config.inputs),
        hashlib.sha256(text.encode()).hexdigest(),
        tuple(path for field, path in paths.items() if files[field] == ABSENT),
    )


def _sha256_at(address: str, stage: str, field: str) -> str:
    """Of the file at an address. Raises StageError when it cannot be read: no plan can do without it."""
    directory, _, file = address.rpartition("/")
    try:
        return hashlib.sha256(Remote(directory).read(file)).hexdigest()
    except RemoteError as error:
        raise StageError(f"stages.{stage}.{field}: {error}") from error


def _sha256(config: StageConfig, field: str, path: Path, cache: "HashCache") -> str:
    part = config.what_counts(field, path)
    return cache.sha256(path) if part is None else hashlib.sha256(part.encode()).hexdigest()


def _without(values: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """The values without the fields named; `data.workers` names a nested one."""
    kept = {}
    for key, value in values.items():
        if key in left_out:
            continue
        nested = {name[len(key) + 1 :] for name in left_out if name.startswith(f"{key}.")}
        kept[key] = _without(value, nested) if nested and isinstance(value, Mapping) else value
    return kept


def _replaced(value: Any, written: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _replaced(item, written) for key, item in value.items()}
    if isinstance(value, list):
        return [_replaced(item, written) for item in value]
    return written.get(value, value) if isinstance(value, str) else value


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def file_hashes(directory: Path) -> dict[str, dict[str, Any]]:
    """{relative path: {bytes, sha256}} of all files under the directory; threads share the work."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(file_sha256, paths))
    return {
        path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, digests, strict=True)
    }


def is_glob(path: Path) -> bool:
    """Whether a path names files by a pattern (`logs/day-*.parquet`), and no file of that very name."""
    return glob.has_magic(str(path)) and not path.exists()


def _fixed_part(pattern: Path) -> Path:
    """The directory above a pattern's first wildcard."""
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))


class HashCache:
    """Hashes of big files, remembered by path, size and time of change."""

    def __init__(self, path: Path):
        self.path = path
        self.changed = False
        self.known: dict[str, list[Any]] = {}
        try:
            loaded = json.loads(path.read_text())
            self.known = loaded if isinstance(loaded, dict) else {}
        except (OSError, ValueError):
            pass  # no cache yet, or a damaged one: hashing again is all it costs

    def sha256(self, path: Path) -> str:
        """Of a file's content, or of the names and contents of a directory's files or a glob's; ABSENT if
        there is none of these."""
        if path.is_dir() or is_glob(path):
            base = path if path.is_dir() else _fixed_part(path)
            found = path.rglob("*") if path.is_dir() else base.glob(str(path.relative_to(base)))
            files = [file for file in sorted(found) if file.is_file()]
            if not files and not path.is_dir():
                return ABSENT
            lines = [f"{file.relative_to(base).as_posix()} {self.sha256(file)}" for file in files]
            return hashlib.sha256("\n".join(lines).encode()).hexdigest()
        if not path.is_file():
            return ABSENT
        status = path.stat()
        if status.st_size < REMEMBERED_BYTES:
            return file_sha256(path)
        stamp = [status.st_size, status.st_mtime_ns]
        known = self.known.get(str(path))
        if isinstance(known, list) and known[:2] == stamp:
            return str(known[2])
        digest = file_sha256(path)
        self.known[str(path)] = [*stamp, digest]
        self.changed = True
        return digest

    def save(self) -> None:
        """Keep it for the next time, if the root is there and can be written."""
        if not self.changed or not self.path.parent.is_dir():
            return
        temporary = self.path.with_name(f"{self.path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_text(json.dumps(self.known))
            temporary.replace(self.path)
        except OSError:
            temporary.unlink(missing_ok=True)  # a cache: a read-only or full disk must not stop a plan
