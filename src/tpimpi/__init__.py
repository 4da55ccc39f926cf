"""tpimpi: tensor-parallel inference of large language models over MPI, on the machines a person owns."""

__version__ = "0.2.0.dev0"
