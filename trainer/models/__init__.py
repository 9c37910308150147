"""Networks and their layers.

To add a network `x`:

1. `models/x.py`: an `nn.Module`. Name arguments after the facts of data modules that fill them (`input_shape`,
   `num_classes`, `vocab_size`); define `blocks()` where FSDP and activation checkpointing should not guess.
2. `conf/model/x.yaml`: its `_target_` and every argument with its default; null is filled from a fact of its name.
3. A test in `tests/models/`. A loss or metric of its own is a LightningModule: `tasks/`, `conf/task/`.
"""
