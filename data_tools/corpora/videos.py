"""MSR-VTT: videos as files of frame features, with their captions. There are no pictures to fetch."""

from collections.abc import Iterator

from data_tools.corpora.json_stream import entries
from data_tools.corpora.source import Dropped, FeatureRow, Source, member


def msr_vtt(source: Source) -> Iterator[FeatureRow | Dropped]:
    """train_val_videodatainfo.json, test_videodatainfo.json: videos[] of video_id and split (train, validate,
    test), sentences[] of video_id and caption; and a folder of <video_id>.npy, (frames, width).

    Memory grows with the captions (200,000).
    """
    features = source.file("features")
    for path in source.files["annotations"]:
        captions: dict[str, list[str]] = {}
        for number, sentence in entries(path, "sentences"):
            where = f"{path}: sentences[{number}]"
            text = member(sentence, "caption", str, where).strip()
            video = member(sentence, "video_id", str, where)
            if text:
                captions.setdefault(video, []).append(text)
            else:
                yield Dropped("no_text", f"{path.name}: sentences[{number}]", url=video)
        for number, video in entries(path, "videos"):
            where = f"{path}: videos[{number}]"
            name = member(video, "video_id", str, where)
            split = member(video, "split", str, where)
            file = features / f"{name}.npy"
            if not file.is_file():
                yield Dropped("no_features", f"{path.name}: videos[{number}]", url=name)
            elif name not in captions:
                yield Dropped("no_text", f"{path.name}: videos[{number}]", url=name)
            else:
                yield FeatureRow(name, file, tuple(captions[name]), split)
