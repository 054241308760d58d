"""Flax's TrainState, with statistics and other extra arguments of transformations."""

from typing import Any

import optax
from flax.training import train_state

# Keywords for transformations, of this library and of optax; all others replace fields.
EXTRA = ("args", "grad", "value", "value_fn")


class TrainState(train_state.TrainState):
    """``flax.training.train_state.TrainState`` whose ``apply_gradients`` takes ``statistics``.

    In the training step: ``state.apply_gradients(grads=grads, statistics=statistics)``; with
    :func:`natgrad_jax.adaptive_kfac` also ``value=loss, args=(batch,)``.

    >>> import natgrad_jax as ng
    >>> tx = ng.kfac(0.1, ng.Layers({}))
    >>> ng.TrainState.create(apply_fn=None, params={}, tx=tx).step
    0
    """

    def apply_gradients(self, *, grads: Any, statistics: Any = None, **kwargs: Any) -> "TrainState":
        """One optimizer step; other keywords replace fields, as in Flax.

        Args:
          grads, statistics: from :func:`natgrad_jax.value_and_grad`.
          value, value_fn, grad, args: if the transformation needs them.
        """
        tx = optax.with_extra_args_support(self.tx)
        extra = {key: kwargs.pop(key) for key in EXTRA if key in kwargs}
        updates, opt_state = tx.update(
            grads, self.opt_state, self.params, statistics=statistics, **extra
        )
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **kwargs)
