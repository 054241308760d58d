"""What every package uses: parameter paths, hyperparameters, precision, devices."""
