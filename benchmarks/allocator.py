"""The environment in which a benchmark's processes have their memory where it is, on glibc."""

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "33554432",
    "MALLOC_TRIM_THRESHOLD_": "4294967296",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}
"""glibc keeps what is freed. Else it gives memory back to the system and takes it again at every step or at none,
by chance of the heap's layout: 100 or 1000 page faults a step of the same ResNet, in any variant. And it asks for huge
pages: where small ones lie in memory is a process's for all of its life, and which of them push each other out of the
caches (the spread of the ResNet's rounds in `parity` is 0.013 with, 0.022 without)."""
