"""Where a stage's corpus is, when no stage of its recipe makes it: fields of a recipe, and how to open it."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from data_tools.remote import is_address
from data_tools.shards import ShardIndex
from data_tools.shards.cache import ShardCache

CORPUS_FIELDS = frozenset({"corpus", "cache_dir", "cache_gb"})  # where it is; what it is, its manifest says


class CorpusSource(BaseModel):
    """A corpus made elsewhere, in a directory or at an address."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    corpus: str | None = Field(
        default=None,
        description="in place of inputs.corpus: a directory with manifest.json, index.parquet and shards, or "
        "an address of one (s3://bucket/corpus, http://…)",
    )
    cache_dir: Path | None = Field(
        default=None, description="for an address: where a node keeps the shards that it fetched"
    )
    cache_gb: float = Field(default=100.0, gt=0, description="that data.cache_dir may take, 10^9 bytes")

    @model_validator(mode="after")
    def _cached(self) -> "CorpusSource":
        if self.corpus is not None and is_address(self.corpus) and self.cache_dir is None:
            raise ValueError(
                f"data.cache_dir: missing; {self.corpus} is read by way of a cache: name a local directory"
            )
        return self

    def place(self, made_here: Path | None, recipe_directory: Path) -> Path | str:
        """The directory or address of the corpus; `made_here`: the out/ of the input stage, if there is one.

        Raises ValueError when neither names one.
        """
        if self.corpus is None:
            if made_here is None:
                raise ValueError("data.corpus: missing, and so is inputs.corpus; give one of them")
            return made_here
        return self.corpus if is_address(self.corpus) else recipe_directory / self.corpus

    def open(self, place: Path | str, split: str | None, recipe_directory: Path) -> ShardIndex:
        """A split of the corpus at `place`; None: all of it. Raises CorpusError: see ShardIndex.open."""
        cache = None
        if self.cache_dir is not None:
            cache = ShardCache(recipe_directory / self.cache_dir, int(self.cache_gb * 1e9))
        return ShardIndex.open(place, split, cache)

    def files(self) -> dict[str, Path]:
        """manifest.json, which says what the corpus is, where a directory is named: for a fingerprint."""
        if self.corpus is None or is_address(self.corpus):
            return {}
        return {"data.corpus": Path(self.corpus) / "manifest.json"}

    def addresses(self) -> dict[str, str]:
        """The same where an address is named."""
        if self.corpus is None or not is_address(self.corpus):
            return {}
        return {"data.corpus": f"{self.corpus.rstrip('/')}/manifest.json"}

    def named_elsewhere(self) -> frozenset[str]:
        """The role that needs no input stage."""
        return frozenset() if self.corpus is None else frozenset({"corpus"})
