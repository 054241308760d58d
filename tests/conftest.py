"""Four simulated devices, quick compiles (almost all of the suite's time is compiling), and
pictures without a display."""

import os

import jax

os.environ["MPLBACKEND"] = "Agg"
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
