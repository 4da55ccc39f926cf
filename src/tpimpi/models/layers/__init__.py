"""The mathematics of a layer on one rank, tile by tile: pure functions that return a partial.

A partial is what one tile adds to its block's output, [positions, hidden] f32; the sum over all tiles of all ranks is the
whole. The functions know neither MPI nor files.
"""
