"""Weight formats: sizes, packing, unpacking, quantization."""
