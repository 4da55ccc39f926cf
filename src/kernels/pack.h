// Row form to packed form, both of which tpimpi/compute/formats specifies: a matrix is laid out for the kernels, to the
// bytes that the NumPy twins there make.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace tpimpi {

// Bytes of a row in row form: whole blocks, all that columns [first, first + columns) touch.
int64_t row_bytes(Format format, int64_t columns, int64_t first);

// The whole packed form of `rows` rows, `stride` bytes from one to the next; every byte of `out` is written.
void pack(Format format, int64_t rows, int64_t columns, int64_t first, const uint8_t* stored, int64_t stride, uint8_t* out);

}  // namespace tpimpi
