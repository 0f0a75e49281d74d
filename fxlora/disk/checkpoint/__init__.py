"""Checkpoints that may be larger than memory: adapters are folded into their files, as a stream.

A checkpoint is one .safetensors file, or a folder of them. No model is built, and no more than a
few blocks of one tensor are in memory. The headers (`weights_file.py`, `base.py`) and the adapter
say which tensors change and how (`changes.py`).
"""
