"""Runs the CUDA branch of the engine on fake tensors: no GPU, no memory, a job of any number of ranks in one process.

What is real: every Python line of engine, megatron-core, optimizer and estimators, shapes, dtypes, lifetimes. What is
not: numbers, kernels, streams, NCCL, the allocator's fragments.
"""
