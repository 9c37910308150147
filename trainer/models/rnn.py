"""Recurrent networks: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from trainer.core.errors import UserError
from trainer.models.linear_cross_entropy import Losses, LossHead, output_of

CELLS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentClassifier(nn.Module):
    """LSTM or GRU over a sequence of feature vectors, to `(batch, num_classes)` logits.

    Takes `(batch, length, features)` sequences, or `(batch, 1, length, features)` images, read row by row.

    Args:
        input_shape: Shape of a sample; its last size is `features`.
        num_classes: Number of classes.
        cell: `lstm` or `gru`.
        hidden: Size of the hidden state.
        layers: Number of stacked layers.
        bidirectional: Whether to read in both directions.
        dropout: Dropout probability between layers, and before the last linear layer.
    """

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.recurrent = _recurrent(
            cell, input_shape[-1], hidden, layers=layers, bidirectional=bidirectional, dropout=dropout
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), num_classes)
        self.directions = 2 if bidirectional else 1

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one."""
        return [self.recurrent]

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Return `(batch, num_classes)` logits.

        Args:
            inputs: Sequences of shape `(batch, length, features)` or `(batch, 1, length, features)`.
            lengths: Lengths of the sequences, shape `(batch,)`; positions after them are padding and change nothing.
        """
        sequences = inputs.flatten(0, -3) if inputs.dim() > 3 else inputs
        packed: Tensor | PackedSequence = sequences
        if lengths is not None:
            packed = pack_padded_sequence(sequences, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, state = self.recurrent(packed)
        last = state[0] if isinstance(state, tuple) else state
        features = torch.cat(list(last[-self.directions :]), dim=-1)
        logits: Tensor = self.head(self.dropout(features))
        return logits


class RecurrentTextClassifier(nn.Module):
    """LSTM or GRU over `(batch, length)` token ids, padded with `pad_id` at the end, to `(batch, num_classes)` logits.

    Args:
        vocab_size: Number of token ids.
        num_classes: Number of classes.
        pad_id: Token id of the padding; None: no padding.
        cell: `lstm` or `gru`.
        dim: Size of the embedding.
        hidden: Size of the hidden state.
        layers: Number of stacked layers.
        bidirectional: Whether to read in both directions.
        dropout: Dropout probability between layers, and before the last linear layer.
    """

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        pad_id: int | None = 0,
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        dim: int = 128,
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(vocab_size, dim)
        self.classifier = RecurrentClassifier(
            [dim],
            num_classes,
            cell=cell,
            hidden=hidden,
            layers=layers,
            bidirectional=bidirectional,
            dropout=dropout,
        )

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one."""
        return self.classifier.blocks()

    def forward(self, tokens: Tensor) -> Tensor:
        """Map `(batch, length)` token ids to `(batch, num_classes)` logits."""
        lengths = None
        if self.pad_id is not None:  # up to the last token that is not padding: texts may hold the id, too
            positions = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            lengths = ((tokens != self.pad_id) * positions).amax(1).clamp(min=1)
        logits: Tensor = self.classifier(self.embedding(tokens), lengths)
        return logits


class RecurrentDecoder(nn.Module):
    """LSTM or GRU language model: `(batch, length)` token ids to `(batch, length, vocab_size)` logits.

    Args:
        vocab_size: Number of token ids.
        cell: `lstm` or `gru`.
        dim: Size of the embedding.
        hidden: Size of the hidden state.
        layers: Number of stacked layers.
        dropout: Dropout probability between layers, and before the last linear layer.
    """

    computes_loss = True
    """Whether `forward` takes targets and then returns the sums of their losses."""
    for_tasks = ("trainer.tasks.language_modelling.LanguageModelling",)

    def __init__(
        self,
        vocab_size: int,
        *,
        cell: Literal["lstm", "gru"] = "lstm",
        dim: int = 128,
        hidden: int = 512,
        layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.recurrent = _recurrent(cell, dim, hidden, layers=layers, bidirectional=False, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = LossHead(hidden, vocab_size, bias=True)

    def blocks(self) -> list[nn.Module]:
        """Return the modules that a sharding strategy wraps one by one."""
        return [self.recurrent]

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor | Losses:
        """Map `(batch, length)` token ids to `(batch, length, vocab_size)` logits.

        With `(batch, length)` targets: to the sums of their losses, without all logits in memory.
        """
        features, _ = self.recurrent(self.embedding(tokens))
        return output_of(self.head, self.dropout(features), targets)


def _recurrent(
    cell: str, features: int, hidden: int, *, layers: int, bidirectional: bool, dropout: float
) -> nn.LSTM | nn.GRU:
    if cell not in CELLS:
        raise UserError(f"model.cell={cell}: unknown cell", "use lstm or gru")
    between = dropout if layers > 1 else 0.0
    recurrent = CELLS[cell](features, hidden, layers, batch_first=True, dropout=between, bidirectional=bidirectional)
    for name, parameter in recurrent.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.data.chunk(parameter.shape[0] // hidden):
                nn.init.orthogonal_(gate)
        elif name.startswith("bias_ih") and cell == "lstm":
            # A bias of 1 opens the forget gate at first: Jozefowicz et al. 2015.
            parameter.data[hidden : 2 * hidden] = 1.0
    return recurrent
