"""The environment of a process that trains: one thread, and an allocator that keeps its memory. Peers get the same."""

WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    # Freed activations stay with the process: 15 page faults a round of workload W2 instead of 129,000, and 5 to 9%
    # less time on it. More than 64 MiB on top of the heap gained nothing more.
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": str(64 << 20),
    "RAY_ENABLE_ZERO_COPY_TORCH_TENSORS": "1",  # see cluster.py
}
"""Read when a process starts; one of Ray's with an environment of its own starts 0.5 s later than one without."""
