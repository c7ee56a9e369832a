"""Inference engines, one file each; none is imported before its file is asked to register."""
