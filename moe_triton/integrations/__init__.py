"""Engines, for inference and training, one file each; ``register()`` imports the engine."""
