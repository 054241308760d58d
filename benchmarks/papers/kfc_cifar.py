"""KFC against SGD with momentum, and what SUA and groups of channels cost in quality: CIFAR-10.

    python benchmarks/papers/kfc_cifar.py --data-dir DIR
    python benchmarks/papers/kfc_cifar.py --data digits --updates 200    # nothing to download

The claims: K-FAC for convolutions needs 3 to 7 times fewer iterations than SGD with momentum
(Grosse & Martens 2016, and the talk), and cheaper factors (SUA: channels alone; groups of
channels) train nearly as well (Laurent et al. 2018, Fujimoto & Ohira 2018). On the network and by
the rules of ``lib/cifar.py``; K-FAC and EKFAC have one learning rate, the README's, and their
defaults but for the trust radius, 1e-3 for all of them: at the default 2e-3 SUA's network dies.
Writes PREFIX.png and PREFIX.json.
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
kfac = partial(ng.kfac, trust_radius=1e-3)
ekfac = partial(ng.ekfac, trust_radius=1e-3)
METHODS = {
    "sgd": Method(sgd, (0.01, 0.03, 0.1), ":"),
    "kfc": Method(kfac, RATE, "-", fisher="mc"),
    "sua": Method(partial(kfac, approximation="sua"), RATE, "--", fisher="mc"),
    "groups": Method(
        partial(kfac, approximation=ng.Approximation(group_size=GROUP)), RATE, "-.", fisher="mc"
    ),
    "ekfac": Method(ekfac, RATE, "o-", fisher="mc"),
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    compare(METHODS, "papers/kfc_cifar.py", __doc__, argv)


if __name__ == "__main__":
    main()
