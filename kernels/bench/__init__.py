"""The benchmark: `python -m kernels.bench --suite quick`."""
