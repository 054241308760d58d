"""Whole networks as people write them in Flax, as tiny as their structure allows.

``CASES`` is a table like the zoo's. Every parameter of every model is covered.
"""

from functools import cache

from architectures_linen import LINEN
from architectures_nnx import NNX
from zoo import Case

# Linen's problems never change: make each once
CASES = [Case(f"linen: {name}", cache(make)) for name, make in LINEN.items()]
CASES += [Case(f"nnx: {name}", make) for name, make in NNX.items()]
