"""Attention models for JAX: build one by name, load its published weights, look inside."""

from zoo import davit  # noqa: F401
