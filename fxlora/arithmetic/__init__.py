"""Arithmetic of adapters: scaled, combined, and extracted from two checkpoints."""
