"""KFC against SGD with momentum, and what SUA and groups of channels cost in quality: CIFAR-10.

    python benchmarks/papers/kfc_cifar.py --data-dir DIR
    python benchmarks/papers/kfc_cifar.py --data digits --updates 200    # nothing to download

The claims: K-FAC for convolutions needs 3 to 7 times fewer iterations than SGD with momentum
(Grosse & Martens 2016, and the talk), and cheaper factors (SUA: channels alone; groups of
channels) train nearly as well (Laurent et al. 2018, Fujimoto & Ohira 2018). On the network and by
the rules of ``lib/cifar.py``; K-FAC and EKFAC have one learning rate, the README's, and their
defaults (``--trust-radius`` changes one). Writes PREFIX.png and PREFIX.json.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib.cifar import Method, compare, sgd

RATE = (0.1,)
GROUP = 16  # channels
METHODS = {
    "sgd": Method(sgd, (0.01, 0.03, 0.1), ":"),
    "kfc": Method(ng.kfac, RATE, "-", fisher="mc"),
    "sua": Method(partial(ng.kfac, approximation="sua"), RATE, "--", fisher="mc"),
    "groups": Method(
        partial(ng.kfac, approximation=ng.Approximation(group_size=GROUP)), RATE, "-.", fisher="mc"
    ),
    "ekfac": Method(ng.ekfac, RATE, "o-", fisher="mc"),
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    compare(METHODS, "papers/kfc_cifar.py", __doc__, argv)


if __name__ == "__main__":
    main()
