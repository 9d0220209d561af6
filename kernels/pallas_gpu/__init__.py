"""Kernels for GPUs, in Pallas: a module per family of ops."""
