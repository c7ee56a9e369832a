"""The benches of ``moe-triton bench``: each checks its results before it times them."""
