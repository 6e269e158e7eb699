"""Questions about pictures with their answers: VQA v2 and GQA. A text is the question and its answer.

COOKIE counts these pairs among its 5.9M and does not say how the two are joined; here: with a blank.
"""

from collections.abc import Iterator

from data_tools.corpora.captions import coco_path
from data_tools.corpora.json_stream import entries
from data_tools.corpora.source import Dropped, Row, Source, member
from data_tools.errors import DataError


def vqa2(source: Source) -> Iterator[Row | Dropped]:
    """v2_OpenEnded_mscoco_<subset>_questions.json and v2_mscoco_<subset>_annotations.json; the answer is the
    multiple_choice_answer: what most of ten people said. The split is the subset (train2014, val2014).

    Without annotations (the test sets have none) a text is the question alone. Memory grows with the answers.
    """
    path = source.file("questions")
    answers = _answers(source) if source.files.get("annotations") else None
    subset = _subset(source)
    for number, question in entries(path, "questions"):
        where = f"{path}: questions[{number}]"
        picture = member(question, "image_id", int, where)
        text = member(question, "question", str, where).strip()
        url = source.url(coco_path(f"COCO_{subset}_{picture:012d}", where))
        place = f"{path.name}: questions[{number}]"
        if not text:
            yield Dropped("no_text", place, url=url)
        elif answers is None:
            yield Row(url, captions=(text,), split=subset)
        else:
            question_id = member(question, "question_id", int, where)
            if question_id not in answers:
                raise DataError(
                    f"{where}: {source.file('annotations')} has no answer to question {question_id}: "
                    "questions and annotations are of other subsets."
                )
            answer = answers[question_id]
            full = Row(url, captions=(f"{text} {answer}",), split=subset)
            yield full if answer else Dropped("no_answer", place, url=url, text=text)


def _answers(source: Source) -> dict[int, str]:
    """The answer of each question, by its id; "" where there is none."""
    path = source.file("annotations")
    answers = {}
    for number, annotation in entries(path, "annotations"):
        where = f"{path}: annotations[{number}]"
        given = member(annotation, "multiple_choice_answer", str, where)
        answers[member(annotation, "question_id", int, where)] = given.strip()
    return answers


def _subset(source: Source) -> str:
    """data_subtype of the questions: train2014, val2014, test2015 or test-dev2015 (pictures of test2015)."""
    path = source.file("questions")
    for key, value in entries(path):
        if key == "data_subtype":
            return str(value).replace("test-dev", "test")
    raise DataError(f"{path}: no 'data_subtype' at its top: not a question file of VQA v2.")


def gqa(source: Source) -> Iterator[Row | Dropped]:
    """train_balanced_questions.json and its fellows: {id: {imageId, question, answer, fullAnswer, …}}.

    `answers: full` takes the fullAnswer (a sentence). The picture is <imageId>.jpg.
    """
    wanted = "fullAnswer" if source.options.answers == "full" else "answer"
    for path in source.files["questions"]:
        for key, question in entries(path):
            where = f"{path}: question '{key}'"
            url = source.url(f"{member(question, 'imageId', str, where)}.jpg")
            text = member(question, "question", str, where).strip()
            answer = str(question.get(wanted) or "").strip()  # the test sets have none
            place = f"{path.name}: question '{key}'"
            if not text:
                yield Dropped("no_text", place, url=url)
            elif not answer:
                yield Dropped("no_answer", place, url=url, text=text)
            else:
                yield Row(url, captions=(f"{text} {answer}",))
