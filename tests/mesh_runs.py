"""Runs of a few steps on any mesh, of one small model of every family."""

import jax
import numpy as np

import zoo
from train import config as config_lib
from train import program, sharding
from train.face_set import FaceSet
from train.schema import default
from train.sequences import SequenceSet
from train.sources import ArraySource, Dataset
from zoo.image_model import ImageModel

BATCH, VOCABULARY, LENGTH, SOURCE = 8, 16, 32, 16
LANGUAGE = dict(width=16, mlp_hidden=16, num_heads=2, depth=2, chunk_size=8, window=8)
MEMORY = dict(memory_chunk=4, gate_rank=4, expansion=2, num_heads=2)
ROUTING = dict(width=16, depth=1, block=8, clusters=2, window=8)
# Model -> the fields that make it small; heads, widths and classes divide by 2 and by 4, as those of real sizes do.
MODELS = {
    "vit_nano": dict(image_size=8, depths=(1,), dim=16, num_heads=4),
    "dcal_nano": dict(depths=(2,), dim=16, num_heads=4),
    "ahan_nano": dict(image_size=16, dim=16, num_heads=4, patch=4, embedding_dim=16),
    "davit_nano": dict(depths=(1,), dims=(16,), num_heads=(4,)),
    "maxvit_nano": dict(depths=(1,), dims=(32,), strides=(2,), head_dim=8),
    "biformer_nano": {},
    "care_nano": dict(depths=(1, 1)),
    "transformer_nano": LANGUAGE,
    "sliding_window_nano": LANGUAGE,
    "linear_attention_nano": LANGUAGE,
    "retnet_nano": LANGUAGE,
    "gla_nano": LANGUAGE,
    "hgrn2_nano": LANGUAGE,
    "lightning_nano": LANGUAGE,
    "deltanet_nano": LANGUAGE,
    "gated_deltanet_nano": LANGUAGE,
    "gated_deltanet_h_nano": dict(LANGUAGE, mixers="GA"),
    "moneta_nano": dict(LANGUAGE, **MEMORY, link="identity", max_error=1.0),
    "yaad_h_nano": dict(LANGUAGE, **MEMORY),
    "memora_nano": dict(LANGUAGE, **MEMORY),
    "routing_transformer_nano": dict(ROUTING, hidden=16),
    "routing_transformer_image_nano": dict(ROUTING, hidden=16, image_size=(8, 4), length=LENGTH),
    "routing_transformer_seq2seq_nano": dict(ROUTING, hidden=16, encoder_depth=1),
    "routing_transformer_lucidrains_nano": dict(width=16, depth=1, head_dim=8, num_heads=2, local_heads=1, window=8),
}


LANGUAGE_MODELS = [name for name, fields in MODELS.items() if "mlp_hidden" in fields or name.startswith("routing")]


class Nothing:
    """A source of no examples."""

    def __len__(self):
        return 0

    def __getitem__(self, index):
        raise IndexError(index)


def dataset_of(name):
    """A data set without examples, of the kind that the model is for."""
    model = zoo.create_model(name, **MODELS[name])
    if not isinstance(model, ImageModel):
        source = SOURCE if "seq2seq" in name else None
        packed = not ("seq2seq" in name or "image" in name)
        return SequenceSet("rows", Nothing(), "", VOCABULARY, LENGTH, align=8, packed=packed, source_length=source)
    side = model.image_size if isinstance(model.image_size, tuple) else (model.image_size,) * 2
    shape, classes = (*side, model.in_chans), 8
    fields = dict(name="pictures", fingerprint="", num_classes=classes, label_names=tuple("abcdefgh"))
    fields |= dict(image_shape=shape, channels=shape[-1])
    fields |= dict(source=ArraySource(np.zeros((classes, *shape), np.uint8), np.arange(classes)))
    if not name.startswith("ahan"):
        return Dataset(**fields)
    people = np.arange(classes)
    flags = dict(hard=np.zeros(classes, bool), validation=np.zeros(classes, bool))
    return FaceSet(**fields, labels=people, twins=people ^ 1, **flags)


def batch_of(dataset, seed):
    rng = np.random.default_rng(seed)
    if not isinstance(dataset, SequenceSet):
        images = rng.integers(0, 256, (BATCH, *dataset.image_shape), dtype=np.uint8)
        return {"image": images, "label": np.array([0, 0, 1, 1, 2, 2, 3, 3], np.int32)}
    tokens = rng.integers(1, VOCABULARY, (BATCH, LENGTH + 1), dtype=np.int32)
    # Documents over several devices, one that begins with a device, padding at the end of the row.
    segments = np.repeat(np.array([[1, 1, 2, 3], [1, 2, 2, 0]], np.int32), LENGTH // 4, axis=1)
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "segments": np.tile(segments, (BATCH // 2, 1))}
    batch["weights"] = (batch["segments"] > 0).astype(np.float32)
    batch["bytes"] = np.full(BATCH, LENGTH, np.int32)
    if dataset.source_length is not None:
        batch["source"] = rng.integers(1, VOCABULARY, (BATCH, SOURCE), dtype=np.int32)
        batch["source_mask"] = np.arange(SOURCE) < rng.integers(4, SOURCE, (BATCH, 1))
    return batch


def built(name, dtype="float32", **mesh):
    """The program of a model on a mesh of as many devices as it takes."""
    dataset = dataset_of(name)
    tasks = {SequenceSet: "next_token", FaceSet: "verification", Dataset: "classify"}
    words = dict(task=tasks[type(dataset)], dtype=dtype, param_dtype=dtype, matmul_precision="highest")
    words |= {
        "model.name": name,
        "data.name": "rows",
        "data.batch_size": BATCH,
        "total_steps": 20,
        "optim.weight_decay": 0.1,
    }
    # Of a bias before a normalisation, whose gradient is nothing but rounding, a smaller epsilon would make steps.
    words |= {"optim.eps": 1e-6}
    words |= {f"model.overrides.{field}": value for field, value in MODELS[name].items()}
    words |= {f"mesh.{axis}": size for axis, size in {"data": 1, **mesh}.items()}
    if not isinstance(dataset, SequenceSet):
        channels = dataset.channels
        words |= {"data.mean": (0.5,) * channels, "data.std": (0.5,) * channels}
    given = [f"--config.{key}={value}" for key, value in words.items()]
    config = config_lib.overlay(default(), given)
    devices = jax.devices()[: int(np.prod(list(mesh.values())))]
    return program.build(config, dataset, devices), dataset


def trained(name, steps, dtype="float32", **mesh):
    """The losses of some steps of AdamW, the first gradient, and the last parameters and what else the model keeps."""
    run, dataset = built(name, dtype, **mesh)
    key = jax.jit(lambda: jax.random.key(0), out_shardings=run.replicated)()
    state, losses, gradient = run.init(), [], None
    for seed in range(steps):
        placed = sharding.place_batch(batch_of(dataset, seed), run.rows)
        state, metrics = run.train_step(state, placed, key, run.task)
        losses.append(float(metrics["loss"]))
        if gradient is None:
            # The first moment after one step is a share of the gradient.
            adam = [x for x in jax.tree.leaves(state.opt_state, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(x, "mu")]
            gradient = jax.tree.map(np.asarray, adam[0].mu)
    return np.array(losses), gradient, jax.tree.map(np.asarray, (state.params, state.model_state))
