"""KFC against SGD with momentum, and what SUA and groups of channels cost in quality: CIFAR-10.

    python benchmarks/paper_kfc_cifar.py --data-dir DIR
    python benchmarks/paper_kfc_cifar.py --data digits --updates 200    # nothing to download

The claims: K-FAC for convolutions needs 3 to 7 times fewer iterations than SGD with momentum
(Grosse & Martens 2016, and the talk), and cheaper factors (SUA: channels alone; groups of
channels) train nearly as well (Laurent et al. 2018, Fujimoto & Ohira 2018). On the network and by
the rules of ``cifar.py``; K-FAC and EKFAC have one learning rate, the README's, and their defaults,
but that the trust radius falls with the rate's square: a step that it bounds would else not fall
with the rate. Writes PREFIX.png and PREFIX.json.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from cifar import Method, compare, sgd

import natgrad_jax as ng

RATE = (0.1,)
RADIUS = 1e-3
GROUP = 16  # channels


def bounded(alias: Callable[..., Any], rate: Callable[[Any], Any], layers: ng.Layers) -> Any:
    """The alias, every step of which falls with the rate."""
    radius = lambda step: RADIUS * (rate(step) / rate(0)) ** 2
    return alias(rate, layers, trust_radius=radius)


def natural(alias: Callable[..., Any], line: str) -> Method:
    return Method(partial(bounded, alias), RATE, line, fisher="mc")


METHODS = {
    "sgd": Method(sgd, (0.01, 0.03, 0.1), ":"),
    "kfc": natural(ng.kfac, "-"),
    "sua": natural(partial(ng.kfac, convolution="sua"), "--"),
    "groups": natural(partial(ng.kfac, group_size=GROUP), "-."),
    "ekfac": natural(ng.ekfac, "o-"),
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    compare(METHODS, "paper_kfc_cifar.py", __doc__, argv)


if __name__ == "__main__":
    main()
