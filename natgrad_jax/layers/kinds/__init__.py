"""One file per kind of layer: how its calls become rows (``layers/layer_call.py``)."""
