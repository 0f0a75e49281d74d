"""Blocks: outlined submodules, each with a part of the graph as a graph of its own.

`chosen.py`: which submodules the user asks for. `recorded.py`: what capture records of their calls.
`outlining.py` splits a graph at these calls: it takes a copy (`prepared.py`), finds the part of it
that each call is (`part.py`), makes a graph of that part (`inside.py`), and puts a call of the
submodule in its place (`around.py`), with checks of what the submodule returns (`checks.py`).

`calls.py`: all ways in which a module's graphs call a block, with the input contract of each
(`contract.py`, with the guards on sizes in `guards.py`), and whether the arguments tell them apart
(`overlap.py`). `block.py`: the module that is called. `standing.py`: what
stands in the module tree at its path, such as a wrapper around it.
"""
