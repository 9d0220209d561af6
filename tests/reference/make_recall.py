"""Writes the examples of multi-query associative recall that tests/test_recall.py compares with: Zoology's own.

    pip install torch pydantic pyyaml wandb pandas
    git clone https://github.com/HazyResearch/zoology official
    python -O -m tests.reference.make_recall --official official

`-O` because the generator asserts a vocabulary larger than the length, which its own example in the docstring is not.
Small cases are recorded whole, a large one by its digest. Written with numpy 2.4 and HazyResearch/zoology at d88d6f5.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

CASES = {
    "docstring": dict(vocab_size=12, input_seq_len=16, num_examples=8, num_kv_pairs=2, seed=0),
    "odd": dict(vocab_size=41, input_seq_len=40, num_examples=6, num_kv_pairs=5, power_a=0.3, seed=7),
    "full": dict(vocab_size=64, input_seq_len=32, num_examples=4, num_kv_pairs=8, power_a=1.0, seed=2**31 + 5),
}
LARGE = dict(vocab_size=8192, input_seq_len=256, num_examples=200, num_kv_pairs=16, seed=123)
SEGMENT = dict(vocab_size=64, input_seq_len=32, num_examples=5, num_kv_pairs=4)


def digest(tokens: np.ndarray, labels: np.ndarray) -> str:
    return hashlib.sha256(tokens.astype("<i8").tobytes() + labels.astype("<i8").tobytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--official", required=True)
    sys.path.insert(0, parser.parse_args().official)
    from zoology.config import DataConfig
    from zoology.data.multiquery_ar import MQARConfig, multiquery_ar
    from zoology.data.utils import prepare_data

    arrays = {}

    def record(name: str, tokens, labels) -> None:
        arrays[f"{name}/tokens"], arrays[f"{name}/labels"] = tokens.numpy(), labels.numpy()

    for name, case in CASES.items():
        segment = multiquery_ar(**case, random_non_queries=False)
        record(name, segment.inputs, segment.labels)
    # With random tokens for filler, which come from torch: the rest must be the same.
    segment = multiquery_ar(**CASES["full"])
    record("full_random", segment.inputs, segment.labels)
    # How a data configuration seeds its segments.
    config = DataConfig(
        train_configs=[MQARConfig(**SEGMENT, random_non_queries=False)],
        test_configs=[MQARConfig(**SEGMENT, random_non_queries=False)],
        batch_size=SEGMENT["num_examples"],
        seed=123,
    )
    for split, loader in zip(("train", "test"), prepare_data(config)):
        ((tokens, labels, _),) = loader
        record(split, tokens, labels)
    large = multiquery_ar(**LARGE, random_non_queries=False)
    tables = {
        "cases": CASES,
        "large": LARGE,
        "segment": SEGMENT,
        "digest": digest(large.inputs.numpy(), large.labels.numpy()),
    }
    path = Path(__file__).parent / "recall.npz"
    np.savez_compressed(path, tables=json.dumps(tables), **arrays)
    print(path, path.stat().st_size, {name: array.shape for name, array in arrays.items()})


if __name__ == "__main__":
    main()
