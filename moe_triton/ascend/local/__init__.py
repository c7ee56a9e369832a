"""Ascend's operators of one device: gating, permutation, routing, quantisation, experts."""
