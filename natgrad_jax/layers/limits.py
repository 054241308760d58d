"""The sizes at which a layer gets another block: all of them, in one place.

``tests/abstract_zoo.py`` takes the widths that it tries from here, one on each side of every limit.
"""

# A normalization with at most this many parameters has one full block; beyond, 2×2 a unit.
MAX_FULL_NORM = 512

# A parameter of no known layer with at most this many numbers has a full block: its statistics
# have rank one a measurement, which a larger matrix would not make up for.
MAX_FREE = 256

# Largest full block that can be asked for: its inverse takes about a second on one core.
MAX_FULL = 8192

# Most numbers that the full or unit blocks of one layer may have together.
MAX_NUMBERS = 2**29
