"""One backward pass: what to measure, the measurement, and its checks."""
