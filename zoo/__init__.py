"""Attention models for JAX: build one by name, load its published weights, look inside."""

from zoo import davit  # noqa: F401
from zoo.errors import WeightsError
from zoo.features import forward_intermediates
from zoo.pretrained import load_pretrained, save_pretrained
from zoo.registry import create_model, list_models, pretrained_cfg

__all__ = [
    "WeightsError",
    "create_model",
    "forward_intermediates",
    "list_models",
    "load_pretrained",
    "pretrained_cfg",
    "save_pretrained",
]
