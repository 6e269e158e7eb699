"""The formats that an ingest knows: which files each needs, what it gives, and what holds for it by default.

A licence here is that of the texts and labels as their authors commonly state it, a reminder and no advice; a
recipe may say otherwise. The pictures are their owners'.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_tools.corpora import captions, classes, queries, questions, texts, videos, web
from data_tools.corpora.source import Source

Gives = Literal["pictures", "text pairs", "features"]


@dataclass(frozen=True)
class Format:
    """One format. `files` and `optional`: what each role's file is; a role in `many` takes several files."""

    read: Callable[[Source], Iterator[Any]]
    licence: str
    files: Mapping[str, str]
    optional: Mapping[str, str] = field(default_factory=dict)
    many: frozenset[str] = frozenset()
    lang: str = "en"
    images: Literal["needed", "may be given", "in the file"] = "needed"  # the URL prefix of the pictures
    options: frozenset[str] = frozenset()  # fields of source.Options
    gives: Gives = "pictures"


_RESEARCH = "research only"
_CN_LISTS = {name: f"ids of the {name} split, one a line" for name in captions.SPLIT_LISTS}
_PAIR_SPLITS = {name: f"Zero's pairs of the {name} split, JSON a line" for name in queries.PAIR_SPLITS}
_STS_SPLITS = {name: f"the {name} split" for name in texts.SPLITS}

FORMATS: dict[str, Format] = {
    "cc3m": Format(
        web.cc3m,
        "Conceptual Captions' terms: free for any purpose, as is (Google)",
        {"pairs": "Train_GCC-training.tsv"},
        many=frozenset({"pairs"}),
        images="in the file",
    ),
    "cc12m": Format(
        web.cc12m,
        "Conceptual 12M's terms: free for any purpose, as is (Google)",
        {"pairs": "cc12m.tsv"},
        many=frozenset({"pairs"}),
        images="in the file",
    ),
    "sbu": Format(
        web.sbu,
        "none stated (SBU); captions: their authors' terms at Flickr",
        {
            "urls": "SBU_captioned_photo_dataset_urls.txt",
            "captions": "SBU_captioned_photo_dataset_captions.txt",
        },
        images="in the file",
    ),
    "sbu_json": Format(
        web.sbu_json,
        "none stated (SBU); captions: their authors' terms at Flickr",
        {"pairs": "sbu-captions-all.json"},
        images="in the file",
    ),
    "wukong": Format(
        web.wukong,
        "CC-BY-NC-SA-4.0 (Noah-Wukong)",
        {"pairs": "wukong_100m_<n>.csv, or wukong_test.csv"},
        many=frozenset({"pairs"}),
        lang="zh",
        images="may be given",
    ),
    "zero": Format(
        queries.zero,
        f"{_RESEARCH} (Zero's terms)",
        {"pairs": "the pre-training set's .json, .jsonl or .csv"},
        many=frozenset({"pairs"}),
        lang="zh",
        images="in the file",
    ),
    "zero_pairs": Format(
        queries.zero_pairs,
        f"{_RESEARCH} (Zero's terms)",
        {},
        optional=_PAIR_SPLITS,
        lang="zh",
    ),
    "muge": Format(
        queries.muge,
        f"{_RESEARCH} (MUGE's terms at Tianchi)",
        {"queries": "MR_train_queries.jsonl"},
        many=frozenset({"queries"}),
        lang="zh",
    ),
    "karpathy": Format(
        captions.karpathy,
        f"{_RESEARCH}, non-commercial (Flickr30K, Flickr8K)",
        {"annotations": "dataset_coco.json, dataset_flickr30k.json or dataset_flickr8k.json"},
    ),
    "flickr30k_cn": Format(
        captions.flickr30k_cn,
        f"{_RESEARCH} (Flickr30k-CN, Flickr30k-CNA)",
        {"captions": "flickr30k_cna_train.txt, flickr30k_cn_test.txt …"},
        optional=_CN_LISTS,
        many=frozenset({"captions"}),
        lang="zh",
    ),
    "coco_cn": Format(
        captions.coco_cn,
        f"{_RESEARCH} (COCO-CN)",
        {"captions": "imageid.human-written-caption.txt"},
        optional=_CN_LISTS,
        many=frozenset({"captions"}),
        lang="zh",
    ),
    "aic_icc": Format(
        captions.aic_icc,
        f"{_RESEARCH} (AI Challenger's terms)",
        {"annotations": "caption_train_annotations_20170902.json"},
        lang="zh",
        options=frozenset({"first"}),
    ),
    "vqa2": Format(
        questions.vqa2,
        "CC-BY-4.0 (VQA's annotations)",
        {"questions": "v2_OpenEnded_mscoco_train2014_questions.json"},
        optional={"annotations": "v2_mscoco_train2014_annotations.json"},
    ),
    "gqa": Format(
        questions.gqa,
        "CC-BY-4.0 (GQA)",
        {"questions": "train_balanced_questions.json"},
        many=frozenset({"questions"}),
        options=frozenset({"answers"}),
    ),
    "coco_instances": Format(
        classes.coco_instances,
        captions.COCO_LICENCE,
        {"instances": "instances_train2014.json, instances_val2014.json"},
        many=frozenset({"instances"}),
    ),
    "nus_wide": Format(
        classes.nus_wide,
        f"{_RESEARCH} (NUS-WIDE)",
        {"pictures": "ImageList/Imagelist.txt", "labels": "the folder Groundtruth/AllLabels"},
        optional={"tags": "NUS_WID_Tags/All_Tags.txt", "urls": "NUS-WIDE-urls.txt"},
        images="may be given",
        options=frozenset({"most_frequent"}),
    ),
    "mirflickr": Format(
        classes.mirflickr,
        f"{_RESEARCH} (MIRFLICKR's annotations); pictures: Creative Commons, each its own",
        {"labels": "the folder mirflickr25k_annotations_v080"},
        optional={"tags": "the folder mirflickr/meta/tags"},
        options=frozenset({"narrow_classes"}),
    ),
    "msr_vtt": Format(
        videos.msr_vtt,
        f"{_RESEARCH} (MSR-VTT)",
        {"annotations": "train_val_videodatainfo.json", "features": "a folder of <video_id>.npy"},
        many=frozenset({"annotations"}),
        images="in the file",
        gives="features",
    ),
    "sts_benchmark": Format(
        texts.sts_benchmark,
        "CC-BY-SA-4.0 mostly; by genre (STS benchmark's LICENSE.txt)",
        {},
        optional=_STS_SPLITS,
        many=frozenset(_STS_SPLITS),
        images="in the file",
        gives="text pairs",
    ),
    "sts_csv": Format(
        texts.sts_csv,
        "CC-BY-SA-4.0 mostly; by genre (STS benchmark's LICENSE.txt)",
        {},
        optional=_STS_SPLITS,
        many=frozenset(_STS_SPLITS),
        images="in the file",
        gives="text pairs",
    ),
    "sts_tsv": Format(
        texts.sts_tsv,
        f"{_RESEARCH} (SemEval's terms)",
        {},
        optional=_STS_SPLITS,
        many=frozenset(_STS_SPLITS),
        images="in the file",
        gives="text pairs",
    ),
    "sts_year": Format(
        texts.sts_year,
        f"{_RESEARCH} (SemEval's terms)",
        {"sentences": "STS.input.<set>.txt", "scores": "STS.gs.<set>.txt"},
        many=frozenset({"sentences", "scores"}),
        images="in the file",
        gives="text pairs",
    ),
}
