"""Companion: distillation of segmentation models (not yet available)."""
