"""What knows nothing of curvature: trees by path, hyperparameters, devices, precision, versions."""
