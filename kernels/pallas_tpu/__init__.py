"""Kernels for TPUs, written in Pallas and compiled by Mosaic."""
