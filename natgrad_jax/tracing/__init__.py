"""The loss as a jaxpr of its parameters: traced, analysed, and evaluated again with taps."""
