"""Attention models for JAX: build one by name, load its published weights, look inside."""

# Importing a family registers it.
from zoo import ahan, biformer, care, davit, dcal, maxvit, routing_transformer, sequence, vit
from zoo.cards import model_card
from zoo.conversion import convert
from zoo.errors import WeightsError
from zoo.features import forward_intermediates
from zoo.info import model_info
from zoo.prediction import load_classifier, predict
from zoo.pretrained import load_pretrained, save_pretrained
from zoo.registry import create_model, list_models, pretrained_cfg
from zoo.sequence.generation import generate, load_language_model
from zoo.verification import verify
from zoo.watch import attention_maps

__all__ = [
    "WeightsError",
    "ahan",
    "attention_maps",
    "biformer",
    "care",
    "convert",
    "create_model",
    "davit",
    "dcal",
    "forward_intermediates",
    "generate",
    "list_models",
    "load_classifier",
    "load_language_model",
    "load_pretrained",
    "maxvit",
    "model_card",
    "model_info",
    "predict",
    "pretrained_cfg",
    "routing_transformer",
    "save_pretrained",
    "sequence",
    "verify",
    "vit",
]
