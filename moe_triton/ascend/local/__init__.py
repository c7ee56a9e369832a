"""Ascend's MoE operators of one device: gating, permutation, routing, re-routing."""
