"""Former name of `trainer.models.image_sequence`, kept for the configurations of existing runs."""

from __future__ import annotations

from trainer.models.image_sequence import ImageToSequence, SequenceToImage

__all__ = ["ImageToSequence", "SequenceToImage"]
