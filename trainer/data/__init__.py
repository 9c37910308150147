"""Datasets and data modules that are the same at any number of ranks.

To add a data set `x`:

1. `data/x.py`: a LightningDataModule with a literal `provides`, `facts()`, and `default_task` where a task fits.
   `fashion_mnist.py` is a short example on `arrays.py`; a source that only it can read in order: `stream.py`.
2. `conf/data/x.yaml`: its `_target_` and every argument with its default.
3. A section of `docs/data.md`.
4. Tests: what it returns in `tests/data/test_modules.py`; the same global batches at 1, 2 and 4 ranks, and after a
   resume, in `tests/data/test_every_kind.py`.
"""
