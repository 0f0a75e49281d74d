"""Blocks: outlined submodules, each with a part of the graph as a graph of its own.

`chosen.py`: the submodules that the user asks for. `recorded.py`: their calls, as capture records
them.
`outlining.py` splits a graph at these calls: it takes a copy (`prepared.py`), finds the part of it
that each call is (`part.py`), makes a graph of that part (`inside.py`), and puts a call of the
submodule in its place (`around.py`), with checks of the submodule's outputs (`checks.py`).

`calls.py`: all ways in which a module's graphs call a block, with the input contract of each
(`contract.py`, with the guards on sizes in `guards.py`), and whether the arguments tell them apart
(`overlap.py`). `block.py`: the module that is called. `tree.py`: blocks in the module tree, also
inside a user's wrappers.
"""
