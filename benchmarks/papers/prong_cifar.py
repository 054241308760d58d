"""Natural Neural Networks, figure 4 a and b: CIFAR-10 by a convolutional network, PRONG beside BN.

    python benchmarks/papers/prong_cifar.py --data-dir DIR
    python benchmarks/papers/prong_cifar.py --data digits --updates 200    # nothing to download

SGD with momentum, the same with batch normalization, and PRONG, on the network and by the rules of
``lib/cifar.py``. The paper's network and schedule are larger than two cores allow: what is compared
is the order of the methods. Writes PREFIX.png and PREFIX.json.
"""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import natgrad_jax as ng

sys.path.insert(0, str(Path(__file__).parents[1]))  # for lib and the other folders
from lib.cifar import MOMENTUM, Method, compare, sgd

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)
METHODS = {
    "sgd": Method(sgd, RATES[2:], ":"),
    "batch norm": Method(sgd, RATES[1:], "--", normalized=True),
    "prong": Method(partial(ng.prong, momentum=MOMENTUM), RATES[:4], "-", fisher="none"),
}


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else list(argv)
    compare(METHODS, "papers/prong_cifar.py", __doc__, argv)


if __name__ == "__main__":
    main()
