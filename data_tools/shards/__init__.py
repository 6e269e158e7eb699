"""Corpora on disk: `ShardIndex` reads any sample of one, `ShardWriter` writes one.

What their files look like is told in `format`.
"""

from data_tools.shards.files import CorpusError
from data_tools.shards.index import ShardIndex
from data_tools.shards.writer import ShardWriter

__all__ = ["CorpusError", "ShardIndex", "ShardWriter"]
