"""Flax's TrainState, with statistics."""

from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` whose ``apply_gradients`` takes ``statistics``.

    In the training step: ``state.apply_gradients(grads=grads, statistics=statistics)``.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}))
    >>> ng.TrainState.create(apply_fn=None, params={}, tx=tx).step
    0
    """

    def apply_gradients(self, *, grads: Any, statistics: Any = None, **kwargs: Any) -> "TrainState":
        """One optimizer step; other keywords replace fields, as in Flax.

        Args:
          grads, statistics: from :func:`natgrad_jax.value_and_grad`.
        """
        tx = optax.with_extra_args_support(self.tx)
        updates, opt_state = tx.update(grads, self.opt_state, self.params, statistics=statistics)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
