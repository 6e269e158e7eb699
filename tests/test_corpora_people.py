"""Sets that people annotated: each row of the real layouts; a file that does not fit is named by field."""

from pathlib import Path
from typing import Any

import pytest

from data_tools.corpora.captions import COCO_LICENCE
from data_tools.corpora.source import Row
from data_tools.errors import DataError
from tests.corpora_case import read, write

FLICKR = "http://flickr.example/"
COCO = "http://coco.example/"


def sentence(raw: Any, number: int = 0) -> dict[str, Any]:
    return {"tokens": str(raw).split(), "raw": raw, "imgid": 0, "sentid": number}


def test_karpathy_keeps_the_split_and_coco_s_folders(tmp_path: Path) -> None:
    coco = {
        "images": [
            {
                "filepath": "val2014",
                "sentids": [770337, 771687],
                "filename": "COCO_val2014_000000391895.jpg",
                "imgid": 0,
                "split": "restval",
                "sentences": [sentence('A man with a "red" helmet. '), sentence(" ", 1)],
                "cocoid": 391895,
            }
        ],
        "dataset": "coco",
    }
    flickr = {
        "images": [
            {
                "sentids": [0],
                "imgid": 0,
                "sentences": [sentence("Two young guys."), sentence("两个人", 1)],
                "split": "test",
                "filename": "1000092795.jpg",
            }
        ],
        "dataset": "flickr30k",
    }
    write(tmp_path, {"dataset_coco.json": coco, "dataset_flickr30k.json": flickr})
    source = {"format": "karpathy", "files": {"annotations": "dataset_coco.json"}, "images": COCO}
    rows, dropped = read(tmp_path, source)
    assert rows == [
        Row(
            f"{COCO}val2014/COCO_val2014_000000391895.jpg",
            captions=('A man with a "red" helmet.',),
            split="restval",
            licence=COCO_LICENCE,
        )
    ]
    assert dropped == [("no_text", "dataset_coco.json: images[0]: caption 1")]
    source = {"format": "karpathy", "files": {"annotations": "dataset_flickr30k.json"}, "images": FLICKR}
    rows, _ = read(tmp_path, source)
    assert rows == [Row(f"{FLICKR}1000092795.jpg", captions=("Two young guys.", "两个人"), split="test")]


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        ({"split": "train", "sentences": []}, r"images\[0\]: 'filename' is missing; it must be of type str"),
        ({"filename": 3, "sentences": []}, r"images\[0\]: 'filename' is '3'"),
        (
            {"filename": "a.jpg", "sentences": [sentence(None)]},
            r"images\[0\]\.sentences\[0\]: 'raw' is missing",
        ),
        ({"filename": "a.jpg", "sentences": []}, r"images\[0\]: 'split' is missing"),
    ],
)
def test_karpathy_names_the_entry_and_the_field(tmp_path: Path, image: Any, problem: str) -> None:
    write(tmp_path, {"dataset.json": {"images": [image]}})
    with pytest.raises(DataError, match=problem):
        read(tmp_path, {"format": "karpathy", "files": {"annotations": "dataset.json"}, "images": COCO})


def test_flickr30k_cn_and_cna_meet_on_karpathy_s_urls(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "cn.txt": "1000092795.jpg#zhb#0 两个 年轻人\r\n1007129816.jpg#zhb#1 一个戴帽子的人\n"
            "1000092795.jpg#zhb#2 \n",
            "cna.txt": "1000092795#0\t两个\t年轻的男人\n\n77 不在名单里\n",
            "train_ids.txt": "1000092795\n",
            "test_ids.txt": "\ufeff1007129816.jpg\r\n",
        },
    )
    files = {"captions": ["cn.txt", "cna.txt"], "train": "train_ids.txt", "test": "test_ids.txt"}
    rows, dropped = read(tmp_path, {"format": "flickr30k_cn", "files": files, "images": FLICKR})
    assert rows == [
        Row(f"{FLICKR}1000092795.jpg", captions=("两个 年轻人",), split="train"),
        Row(f"{FLICKR}1007129816.jpg", captions=("一个戴帽子的人",), split="test"),
        Row(f"{FLICKR}1000092795.jpg", captions=("两个\t年轻的男人",), split="train"),
    ]
    assert dropped == [("no_text", "cn.txt: line 3"), ("no_split", "cna.txt: line 3")]
    alone = {"format": "flickr30k_cn", "files": {"captions": "cna.txt"}, "images": FLICKR, "split": "train"}
    rows, dropped = read(tmp_path, alone)
    assert [row.split for row in rows] == ["train", "train"]
    assert dropped == []
    write(tmp_path, {"test_ids.txt": "1000092795\n"})
    with pytest.raises(DataError, match="'1000092795' stands in the list of train too"):
        read(tmp_path, {"format": "flickr30k_cn", "files": files, "images": FLICKR})
    write(tmp_path, {"cna.txt": b"1000092795#0\t\xd6\xd0\xce\xc4\n"})
    with pytest.raises(DataError, match=r"cna\.txt: line 1: invalid UTF-8"):
        read(tmp_path, alone)


def test_coco_cn_finds_coco_s_folder_from_the_name(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "imageid.human-written-caption.txt": "COCO_val2014_000000000042#0\t一双鞋和一只狗\n"
            "COCO_train2014_000000000009#zhm#0\t一盒饭\n",
            "coco-cn_train.txt": "COCO_train2014_000000000009\n",
            "coco-cn_test.txt": "COCO_val2014_000000000042\n",
        },
    )
    files = {
        "captions": "imageid.human-written-caption.txt",
        "train": "coco-cn_train.txt",
        "test": "coco-cn_test.txt",
    }
    rows, dropped = read(tmp_path, {"format": "coco_cn", "files": files, "images": COCO})
    assert rows == [
        Row(f"{COCO}val2014/COCO_val2014_000000000042.jpg", captions=("一双鞋和一只狗",), split="test"),
        Row(f"{COCO}train2014/COCO_train2014_000000000009.jpg", captions=("一盒饭",), split="train"),
    ]
    assert dropped == []
    write(tmp_path, {"other.txt": "1000092795.jpg#0\t不是\n"})
    with pytest.raises(DataError, match=r"other\.txt: line 1: '1000092795' is no name of a COCO picture"):
        read(tmp_path, {"format": "coco_cn", "files": {"captions": "other.txt"}, "images": COCO})


def test_aic_icc_takes_the_first_pictures_of_the_file(tmp_path: Path) -> None:
    images = [
        {"url": "http://m4.example/1", "image_id": "8f00.jpg", "caption": ["一个人", "", "两个人"]},
        {"url": "http://m4.example/2", "image_id": "8f01.jpg", "caption": ["三个人"]},
    ]
    write(tmp_path, {"caption_validation.json": images})
    source: Any = {"format": "aic_icc", "files": {"annotations": "caption_validation.json"}, "images": FLICKR}
    rows, dropped = read(tmp_path, source | {"first": 1})
    assert rows == [Row(f"{FLICKR}8f00.jpg", captions=("一个人", "两个人"))]
    assert dropped == [
        ("no_text", "caption_validation.json: [0]: caption 1"),
        ("beyond_first", "caption_validation.json: [1]"),
    ]
    assert len(read(tmp_path, source)[0]) == 2


def vqa(folder: Path, subset: str, answers: Any) -> dict[str, Any]:
    questions = [
        {"image_id": 9, "question": "What is this?", "question_id": 9000},
        {"image_id": 9, "question": "Is it big?", "question_id": 9001},
    ]
    head = {"info": {"year": 2017}, "task_type": "Open-Ended", "data_type": "mscoco", "license": {}}
    write(folder, {"questions.json": head | {"data_subtype": subset, "questions": questions}})
    files = {"questions": "questions.json"}
    if answers is not None:
        annotations = [
            {
                "question_type": "what is",
                "multiple_choice_answer": answer,
                "answers": [{"answer": answer, "answer_confidence": "yes", "answer_id": 1}],
                "image_id": 9,
                "answer_type": "other",
                "question_id": number,
            }
            for number, answer in answers
        ]
        write(folder, {"annotations.json": head | {"annotations": annotations}})
        files["annotations"] = "annotations.json"
    return {"format": "vqa2", "files": files, "images": COCO}


def test_vqa2_joins_question_and_answer_by_the_question_s_id(tmp_path: Path) -> None:
    rows, dropped = read(tmp_path, vqa(tmp_path, "train2014", [(9001, ""), (9000, "lunch")]))
    url = f"{COCO}train2014/COCO_train2014_000000000009.jpg"
    assert rows == [Row(url, captions=("What is this? lunch",), split="train2014")]
    assert dropped == [("no_answer", "questions.json: questions[1]")]
    with pytest.raises(
        DataError, match=r"questions\[1\]: .*annotations\.json has no answer to question 9001"
    ):
        read(tmp_path, vqa(tmp_path, "train2014", [(9000, "lunch")]))


def test_vqa2_s_test_questions_have_no_answers(tmp_path: Path) -> None:
    rows, _ = read(tmp_path, vqa(tmp_path, "test-dev2015", None))
    url = f"{COCO}test2015/COCO_test2015_000000000009.jpg"
    assert [(row.url, row.captions) for row in rows] == [(url, ("What is this?",)), (url, ("Is it big?",))]


def test_gqa_takes_the_short_or_the_full_answer(tmp_path: Path) -> None:
    one = {"imageId": "2354786", "question": "Is the sky dark?", "answer": "yes", "fullAnswer": "Yes, it is."}
    bare = {"imageId": "2354787", "question": "Who?"}
    write(tmp_path, {"train_balanced_questions.json": {"02930152": one, "1": bare}})
    source: Any = {
        "format": "gqa",
        "files": {"questions": "train_balanced_questions.json"},
        "images": "http://gqa.example/",
    }
    rows, dropped = read(tmp_path, source)
    assert rows == [Row("http://gqa.example/2354786.jpg", captions=("Is the sky dark? yes",))]
    assert dropped == [("no_answer", "train_balanced_questions.json: question '1'")]
    rows, _ = read(tmp_path, source | {"answers": "full"})
    assert rows[0].captions == ("Is the sky dark? Yes, it is.",)


def test_coco_s_categories_join_by_the_picture(tmp_path: Path) -> None:
    names = ["COCO_train2014_000000000009.jpg", "COCO_train2014_000000000025.jpg"]
    whole = {
        "info": {},
        "images": [{"id": int(name[-10:-4]), "file_name": name} for name in names],
        "licenses": [],
        "annotations": [
            {"segmentation": [[1.5, 2]], "image_id": 9, "category_id": category, "id": n}
            for n, category in enumerate((51, 18, 51))
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 51, "name": "bowl"}],
    }
    write(tmp_path, {"instances_train2014.json": whole})
    source = {"format": "coco_instances", "files": {"instances": "instances_train2014.json"}, "images": COCO}
    rows, dropped = read(tmp_path, source)
    assert rows == [Row(f"{COCO}train2014/{names[0]}", classes=("bowl", "dog"))]
    assert dropped == [("no_class", "instances_train2014.json: images[1]")]
    write(tmp_path, {"instances_train2014.json": whole | {"categories": []}})
    with pytest.raises(DataError, match=r"annotations\[0\]: 'category_id' 51 is none of its categories"):
        read(tmp_path, source)


NUS_FILES = {
    "ImageList/Imagelist.txt": "actor\\0001_2124494179.jpg\r\nactor\\0002_174174086.jpg\r\n"
    "beach\\0003_7.jpg\n",
    "AllLabels/Labels_sky.txt": "1\r\n0\n1\n",
    "AllLabels/Labels_beach.txt": "0\n0\n1\n",
    "AllLabels/Labels_animal.txt": "0\n1\n0\n",
    "All_Tags.txt": "2124494179      cinema  sky \n174174086 cat\n7\tsea sand\n",
    "NUS-WIDE-urls.txt": "Photo_file  Photo_id  url_Large  url_Middle  url_Small  url_Original\n"
    "C:\\ImageData\\Flickr\\actor\\0001_2124494179.jpg 2124494179 http://l.example/1 null null null\n"
    "C:\\ImageData\\Flickr\\actor\\0002_174174086.jpg 174174086 null null null null\n"
    "C:\\ImageData\\Flickr\\beach\\0003_7.jpg 7 http://l.example/3 http://m.example/3 null null\n",
}


def test_nus_wide_reads_pictures_labels_tags_and_urls(tmp_path: Path) -> None:
    write(tmp_path, NUS_FILES)
    files = {"pictures": "ImageList/Imagelist.txt", "labels": "AllLabels", "tags": "All_Tags.txt"}
    source: Any = {"format": "nus_wide", "files": files, "images": "http://nus.example/"}
    rows, dropped = read(tmp_path, source)
    assert rows == [
        Row("http://nus.example/actor/0001_2124494179.jpg", captions=("cinema sky",), classes=("sky",)),
        Row("http://nus.example/actor/0002_174174086.jpg", captions=("cat",), classes=("animal",)),
        Row("http://nus.example/beach/0003_7.jpg", captions=("sea sand",), classes=("beach", "sky")),
    ]
    assert dropped == []
    rows, dropped = read(tmp_path, source | {"most_frequent": 2})  # sky 2; animal before beach, 1 each
    assert [row.classes for row in rows] == [("sky",), ("animal",), ("sky",)]
    rows, dropped = read(tmp_path, source | {"most_frequent": 1})
    assert dropped == [("no_class", "Imagelist.txt: line 2")]
    web = {"format": "nus_wide", "files": files | {"urls": "NUS-WIDE-urls.txt"}}
    rows, dropped = read(tmp_path, web)
    assert [row.url for row in rows] == ["http://l.example/1", "http://m.example/3"]
    assert dropped == [("no_picture", "Imagelist.txt: line 2")]


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ("1\n0\n", r"Labels_sky\.txt: it has 2 lines, .*Imagelist\.txt has 3 pictures"),
        ("1\n0\n1\n1\n", r"Labels_sky\.txt: line 4: one line too many"),
        ("1\n2\n1\n", r"Labels_sky\.txt: line 2: '2' is not 0 or 1"),
    ],
)
def test_nus_wide_s_labels_must_fit_the_list(tmp_path: Path, labels: str, problem: str) -> None:
    write(tmp_path, NUS_FILES | {"AllLabels/Labels_sky.txt": labels})
    files = {"pictures": "ImageList/Imagelist.txt", "labels": "AllLabels"}
    with pytest.raises(DataError, match=problem):
        read(tmp_path, {"format": "nus_wide", "files": files, "images": COCO})


def test_nus_wide_s_training_labels_are_read_with_their_own_list(tmp_path: Path) -> None:
    write(tmp_path, {"TrainImagelist.txt": "a\\1_1.jpg\n", "train/Labels_sky_Train.txt": "1\n"})
    files = {"pictures": "TrainImagelist.txt", "labels": "train"}
    rows, _ = read(tmp_path, {"format": "nus_wide", "files": files, "images": COCO})
    assert rows[0].classes == ("sky",)
    write(tmp_path, {"train/Labels_sky_Test.txt": "1\n"})
    with pytest.raises(DataError, match="labels of several lists"):
        read(tmp_path, {"format": "nus_wide", "files": files, "images": COCO})


def test_mirflickr_has_24_labels_and_the_narrow_ones_where_asked(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "annotations/README.txt": "read me",
            "annotations/baby.txt": "3\r\n12\r\n",
            "annotations/baby_r1.txt": "12\n",
            "annotations/sky.txt": "12\n",
            "tags/tags3.txt": "",
            "tags/tags4.txt": "canon\n",
            "tags/tags12.txt": "blue\r\nnueva york\r\n",
        },
    )
    source: Any = {
        "format": "mirflickr",
        "files": {"labels": "annotations", "tags": "tags"},
        "images": "http://mir.example/",
    }
    rows, dropped = read(tmp_path, source)
    assert rows == [
        Row("http://mir.example/im3.jpg", classes=("baby",)),
        Row("http://mir.example/im12.jpg", captions=("blue nueva york",), classes=("baby", "sky")),
    ]
    assert dropped == [("no_class", "tags4.txt")]
    rows, _ = read(tmp_path, source | {"narrow_classes": True})
    assert rows[1].classes == ("baby", "baby_r1", "sky")
    write(tmp_path, {"annotations/sky.txt": "im12\n"})
    with pytest.raises(DataError, match=r"sky\.txt: line 1: 'im12' is no number"):
        read(tmp_path, source)
    write(tmp_path, {"annotations/sky.txt": "99\n"})
    with pytest.raises(DataError, match=r"tags99\.txt: missing"):
        read(tmp_path, source)
