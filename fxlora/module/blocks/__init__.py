"""Blocks: outlined submodules, each with a part of the graph as a graph of its own.

`chosen.py`: which submodules the user asks for. `outlining.py`: the split of a graph at the calls
of these. `calls.py`: all ways in which a module's graphs call a block, with the input contract of
each (`contract.py`, with the guards on sizes in `guards.py`), and whether the arguments tell them
apart (`overlap.py`). `checks.py`: what the graph around a block checks at each call of it.
`block.py`: the module that is called.
"""
