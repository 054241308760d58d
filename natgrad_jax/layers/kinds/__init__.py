"""One file a layer kind: how one call of a layer becomes rows of inputs and outputs.

Every kind has a ``Call``: a hashable record of how one call arranges its arrays, with

- ``examples(x)``: the layer's input with the example axis first, nothing copied;
- ``inputs(examples)``: ``ā`` of shape ``(N, T, *blocks, inputs + bias)``;
- ``outputs(g)``: the output cotangent as ``(N, T, *blocks, outputs)``;
- ``row_axes(ndim)``: the output's axes of examples and positions, in the order of N and T;
- ``width``: numbers that one example takes in ``inputs``, for bounding memory.

N are examples, T positions (pixels of the output map, tokens). What is summed over them
stands in ``natgrad_jax/curvature/layer_sums.py`` and is the same for every kind.
"""
