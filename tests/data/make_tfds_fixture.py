"""The recipe of the data sets under tests/data/tfds: `python tests/data/make_tfds_fixture.py`.

Writing TFDS files needs TensorFlow (`pip install tensorflow-cpu tensorflow-datasets array_record pillow`); the tests
only read them and do without it. Two data sets of the same kind are written:

- colour_patches: ArrayRecord, 24 training and 10 test images each,
- colour_patches_tfrecord: TFRecord, 3 + 3 images, which random access cannot read.

An image is a JPEG of 40 rows by 32 columns. The class is the brightest of the colours red, green and blue; a dark
stripe lies in row 2 * key, so no two images of a split are alike. Image number `key` has label `key % 3`.
"""

import io
import pathlib

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

COLOURS = ("red", "green", "blue")
DATA_DIR = pathlib.Path(__file__).parent / "tfds"


def encoded_image(key):
    image = np.full((40, 32, 3), 60, np.uint8)
    image[..., key % 3] = 200
    image[2 * (key % 20) : 2 * (key % 20) + 2] = 20
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=90)
    buffer.seek(0)
    return buffer


class ColourPatches(tfds.core.GeneratorBasedBuilder):
    """Images whose brightest colour channel is their label."""

    VERSION = tfds.core.Version("1.0.0")
    SIZES = {"train": 24, "test": 10}

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "label": tfds.features.ClassLabel(names=COLOURS),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features, description=type(self).__doc__)

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(size) for split, size in self.SIZES.items()}

    def _generate_examples(self, size):
        for key in range(size):
            yield key, {"image": encoded_image(key), "label": key % 3}


class ColourPatchesTfrecord(ColourPatches):
    """The same in the file format that only TensorFlow reads."""

    SIZES = {"train": 3, "test": 3}


def main():
    for builder_class, file_format in (
        (ColourPatches, "array_record"),
        (ColourPatchesTfrecord, "tfrecord"),
    ):
        builder = builder_class(data_dir=DATA_DIR, file_format=file_format)
        builder.download_and_prepare(download_config=tfds.download.DownloadConfig(register_checksums=False))


if __name__ == "__main__":
    main()
