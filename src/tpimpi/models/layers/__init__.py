"""The mathematics of a layer on one rank, tile by tile: pure functions that return a partial.

A partial is what one tile adds to its block's output, [positions, hidden] f32; the sum over all tiles of all ranks is the
whole. The functions know neither MPI nor files: they get a tile's matrices (`parts`), a backend and the KV cache.

`rope` has the rotary angles. Norms are a backend's operation (`Backend.rms_norm`): a layer's own before its blocks are in
engine.model, those of queries and keys in `attention`.
"""
