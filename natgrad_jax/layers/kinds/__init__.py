"""One file per kind of layer: how a call becomes rows; the interface is ``layers/calls.py``."""
