"""Decisions of annotators onto the pairs of a benchmark, and the balance of the labels again.

In a matching set `match` and `no match` set the label: a positive that people refuse becomes a negative, and
the other way round. A retrieval set has positives alone, so `no match` drops the pair. A corrected text that
another pair of the set has already would put a text twice, perhaps into two splits: its pair is dropped.
Then, in every split, the label that has more pairs loses those drawn last.
"""

from pathlib import Path

import ibis
import ibis.expr.types as ir
from ibis.backends.duckdb import Backend

from data_tools.benchmark.pairs import ROW_GROUP, SPLITS
from data_tools.benchmark.votes import UNDECIDED

CORRECTION_REASONS = {
    "judged_drop": "annotators say to drop it",
    "judged_no_match": "annotators say that the text is not the picture's (of a retrieval set)",
    "undecided": "as many annotators say one thing as another",
    "corrected_to_repeated": "its corrected text is another pair's text",
    "unbalanced": "the other label has fewer pairs in this split",
}


def finish_pairs(connection: Backend, pairs: Path, decisions: Path | None, matching: bool, out: Path) -> None:
    """All pairs with `reason` (null: it stays) and `corrected`, by split and key: the pairs as drawn, or with
    `decisions` applied."""
    rows = connection.read_parquet(pairs)
    if decisions is None:
        rows = rows.mutate(reason=ibis.null("string"), corrected=ibis.literal(False))
    else:
        rows = _decided(rows, connection.read_parquet(decisions), matching)
        rows = _without_repeated(rows)
        if matching:
            rows = _balanced(rows)
    connection.to_parquet(rows.order_by(in_splits(rows), rows.key), out, row_group_size=ROW_GROUP)


def in_splits(rows: ir.Table) -> ir.IntegerValue:
    """What pairs are ordered by first: train, val, test."""
    return ibis.cases(*((rows.split == name, place) for place, name in enumerate(SPLITS)), else_=len(SPLITS))


def _decided(rows: ir.Table, decisions: ir.Table, matching: bool) -> ir.Table:
    said = decisions.select("id", "verdict", "corrected_text", "corrected_same")
    rows = rows.left_join(said, "id").drop("id_right")
    verdict = rows.verdict.fill_null("")
    dropped = [(verdict == "drop", "judged_drop"), (verdict == UNDECIDED, "undecided")]
    if not matching:
        dropped.append((verdict == "no match", "judged_no_match"))
    label = ibis.cases((verdict == "match", 1), (verdict == "no match", 0), else_=rows.label).cast("int8")
    rows = rows.mutate(
        reason=ibis.cases(*dropped, else_=ibis.null("string")),
        corrected=rows.corrected_text.notnull(),
        text=rows.corrected_text.fill_null(rows.text),
        same=rows.corrected_same.fill_null(rows.same),
        # a text that was written for this picture is this picture's
        text_key=ibis.ifelse(rows.corrected_text.notnull(), rows.key, rows.text_key),
        label=label,
    )
    return rows.drop("verdict", "corrected_text", "corrected_same")


def _without_repeated(rows: ir.Table) -> ir.Table:
    """Of pairs that stay and have the same text, the first: an uncorrected one before others."""
    window = ibis.window(
        group_by=[rows.reason.isnull(), rows.same], order_by=[rows.corrected, rows.draw, rows.id]
    )
    rows = rows.mutate(copy_=ibis.row_number().over(window))
    again = rows.reason.isnull() & (rows.copy_ > 0)
    return rows.mutate(reason=ibis.ifelse(again, "corrected_to_repeated", rows.reason)).drop("copy_")


def _balanced(rows: ir.Table) -> ir.Table:
    stays = rows.reason.isnull()
    in_split = ibis.window(group_by=rows.split)
    positives = (stays & (rows.label == 1)).sum().over(in_split)
    negatives = (stays & (rows.label == 0)).sum().over(in_split)
    place = ibis.row_number().over(group_by=[stays, rows.split, rows.label], order_by=[rows.draw, rows.id])
    rows = rows.mutate(surplus_=stays & (place >= ibis.least(positives, negatives)))
    return rows.mutate(reason=ibis.ifelse(rows.surplus_, "unbalanced", rows.reason)).drop("surplus_")
