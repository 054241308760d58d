"""Four simulated devices, and a clean configuration for every test."""

import jax

jax.config.update("jax_num_cpu_devices", 4)
