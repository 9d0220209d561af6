"""A small TFDS data set of texts, written without TensorFlow."""

import json

from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

TEXT = {"pythonClassName": "tensorflow_datasets.core.features.text_feature.Text", "text": {}}
LABEL = {
    "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
    "classLabel": {"numClasses": "5"},
}


def write_tfds(directory, splits, feature="text"):
    """Writes the ArrayRecord data set NAME/1.0.0 below `directory`; `splits` are lists of texts by name."""
    name, root = directory.name, directory / "1.0.0"
    root.mkdir(parents=True)
    described = []
    for split, texts in splits.items():
        writer = array_record_module.ArrayRecordWriter(
            str(root / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1"
        )
        records = [_serialized(feature, text, place) for place, text in enumerate(texts)]
        for record in records:
            writer.write(record)
        writer.close()
        described.append(
            {
                "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
                "name": split,
                "numBytes": str(sum(map(len, records))),
                "shardLengths": [str(len(records))],
            }
        )
    info = {"fileFormat": "array_record", "moduleName": "none", "name": name, "splits": described, "version": "1.0.0"}
    features = {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "featuresDict": {"features": {feature: TEXT, "stars": LABEL}},
    }
    (root / "dataset_info.json").write_text(json.dumps(info))
    (root / "features.json").write_text(json.dumps(features))
    return root


def _serialized(feature, text, place):
    content = {
        feature: tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[text])),
        "stars": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[place % 5])),
    }
    return tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=content)).SerializeToString()
