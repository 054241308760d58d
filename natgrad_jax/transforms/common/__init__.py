"""What the transformations share: the step, factors in the state, refreshes, damped inverses."""
