"""Four simulated devices, and quick compiles: almost all of the suite's time is compiling."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_disable_most_optimizations", True)
