"""The machine: memory, disks, network, launcher, files, terminal. It knows no model and no MPI."""
