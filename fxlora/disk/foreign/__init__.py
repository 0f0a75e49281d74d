"""Adapter files of other libraries: kohya and LyCORIS, diffusers, loralib, torchtune, bare PEFT.

A file (`tensors.py`) is split into layers by the one format that its keys fit (`formats.py`); the
layers' names are resolved to sites of the module, in the one way that fits (`names.py`); and a
format's own formula makes an update W0 + s·BA of each (`updates.py`), which is injected as a plan
(`plans.py`).
"""
