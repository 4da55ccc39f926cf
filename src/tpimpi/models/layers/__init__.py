"""The mathematics of a layer on one rank, tile by tile: functions that return a partial.

A partial is what one tile adds to its block's output, [positions, hidden] f32; the sum over all tiles of all ranks is the
whole. The functions know neither MPI nor files: they get a tile's matrices and biases (`Parts`), a backend and the layer's
pages, into which attention stores keys and values.

`rope` has the rotary angles. Norms are a backend's operation (`Backend.rms_norm`): `norms.pre_norm` before a block is called
by engine.partials, those of queries and keys are in `attention` or, over all heads, in `projections`.
"""
