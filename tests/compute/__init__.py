"""Weight formats, quantization, kernels and backends."""
