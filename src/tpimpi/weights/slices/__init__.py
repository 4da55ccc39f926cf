"""The slice file: one rank's part of a model, as one HDF5 file. Version 2 of the format is specified here.

A slice file is named `rank-R-of-N.h5` and holds these objects:

`/header` (uint8)
    JSON, UTF-8: `tpimpi_slice` (this version, 2), `made_by`, `rank`, `formats` (of the weights: `layers`, a list of runs of
    layers that are alike, `[count, {part: format}]`; `head`; `embedding`; each f32, bf16, q8_0, q4_0 or q4_1), `model` (a
    name to show), `fingerprint` (of the source), `config` (ModelConfig), `plan` (`weights`, and for each rank
    `[heads, kv_heads, columns]`, each `[start, stop]`), and `tiles`: a list of records, in the order in which a run
    uses them. A record has `path` (of its group), `block` (`[kind, layer]`), `parts` (of `[name, format, shape]`), and
    for an attention tile `heads`, `kv_heads`, `q_to_kv` (see partition.AttentionTile).
`/checksums` (uint64)
    XXH3-64 of `/header`, then of each record's tile. A tile's checksum is taken over the bytes of its parts, in the
    order of the record, as they come out of the datasets: it stays true if another tool repacks or compresses them.
`/layers/LLLL/attn/tile-TTT/{q,k,v,o,q_bias,k_bias,v_bias}`
    Rows of the query, key and value projections of the tile's heads ([rows, hidden]), and its query heads' columns of
    the output projection ([hidden, heads * head_dim]); biases of the rows. A tile without KV heads has no k and v.
`/layers/LLLL/qkv/tile-TTT/{q,k,v,q_bias,k_bias,v_bias}`, `/layers/LLLL/attn/tile-TTT/o`
    The same in two tiles, where queries and keys are normed over all heads (see models/blocks).
`/layers/LLLL/mlp/tile-TTT/{gate,up,down,gate_bias,up_bias}`
    The tile's columns: rows of gate and up ([columns, hidden]), columns of down ([hidden, columns]).
`/layers/LLLL/experts`
    The tiles of a layer's experts: uint8 [experts, bytes of a tile]. A tile's record has `expert`, its number; its parts,
    {gate,up,gate_bias,up_bias,down_bias,down}, stand as an MLP tile's would in their datasets, each at a multiple of 4096
    bytes. They are all of the rank's columns of the expert. Rank 0 alone has down_bias ([hidden]).
`/head/tile-TTT/rows` (rank 0 only)
    A run of vocabulary rows of the output head ([rows, hidden]).
`/resident/tile-000/{router,router_bias,sinks,attn_norm,mlp_norm,attn_post_norm,mlp_post_norm,q_norm,k_norm,o_bias,down_bias,norm}`
    f32, not packed, small, kept in memory for the whole run: those norms that the model has, of all layers
    ([layers, hidden]; q_norm and k_norm [layers, head_dim], or [layers, heads * head_dim] and [layers, kv_heads *
    head_dim] where they are over all heads); routers ([layers, experts, hidden], f32, or bf16 where `formats` has
    `router`), their biases ([layers, experts]), zeros in dense layers; sinks ([layers, heads]); of
    random weights a `trace` of routing, the bytes of uint16 [positions, layers, experts a token]; rank 0
    alone has the biases of the output projections ([layers, hidden]), added once, and the final norm ([hidden]).
`/tokenizer/tile-000/NAME` (rank 0 only)
    The tokenizer's files as they are (uint8).
`/embedding/weight`, `/embedding/checksums` (rank 0 only)
    The embedding table in row form, of which a run reads single rows: f32 or bf16 [vocab, hidden], or blocks, uint8
    [vocab, bytes a row]; and XXH3-64 of each row's bytes (uint64).

Matrices (q, k, v, o, gate, up, down, rows; the shapes given above are those of the numbers, as in the header) are
stored in packed form: panels of 16 rows, as `tpimpi.compute.formats` specifies. The dataset is float32
[panels, columns, 16] for f32, uint16 [panels, ceil(columns / 2), 16, 2] for bf16, and uint8 [panels, bytes a panel] for
the quantized formats. Where the number of rows is no multiple of 16, or that of columns no multiple of 32 (of 2, in
bf16), the numbers that are not there are zeros. Biases are f32, not packed. f32 is stored as IEEE little-endian float,
bf16 as uint16.

The writer lays the parts of a tile next to each other, each at a multiple of 4096 bytes, so that a tile is one extent of
the file and is read with one call; a reader must not rely on that (`h5repack` may move or chunk them). HDF5 metadata
carries HDF5's own checksums (libver "latest").
slices/writer writes the file, slices/file reads it.
"""
