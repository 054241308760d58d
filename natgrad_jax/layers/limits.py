"""All sizes at which a layer gets another block.

``tests/tables/abstract_zoo.py`` takes its widths from here, one on each side of every limit.
"""

# A normalization with at most this many parameters has one full block; beyond, 2×2 per unit.
MAX_FULL_NORM = 512

# A parameter outside every layer with at most this many numbers has a full block: its statistics
# have rank one per measurement, too little for a larger matrix.
MAX_FREE = 256

# Most rows of a Kronecker factor, unless another number is chosen.
MAX_FACTOR = 8192

# Most numbers for each row of the sketch of a factor that would have more rows. No more either than
# the other side has rows: so a sketch takes no more memory than the kernel.
MAX_SKETCH = 128

# Largest full block that can be chosen: its inverse takes about a second on one core.
MAX_FULL = 8192

# Most numbers that the full or unit blocks of one layer may have together.
MAX_NUMBERS = 2**29

# Most numbers of examples' own gradients that one layer may keep in a backward pass (128 MB).
MAX_ROWS = 2**25
