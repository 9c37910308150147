"""Recurrent networks: LSTM (Hochreiter and Schmidhuber 1997) and GRU (Cho et al. 2014)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from trainer.core.errors import UserError

CELLS: dict[str, type[nn.LSTM] | type[nn.GRU]] = {"lstm": nn.LSTM, "gru": nn.GRU}


class RecurrentClassifier(nn.Module):
    """(n, length, features) sequences, or pictures (n, 1, length, features) read row by row, to (n, num_classes)."""

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        input_shape: Sequence[int],
        num_classes: int,
        cell: str = "lstm",
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = False,
        dropout: float = 0.0,
    ) -> None:
        """`dropout`: between layers, and before the last linear one."""
        super().__init__()
        self.recurrent = _recurrent(cell, input_shape[-1], hidden, layers, bidirectional, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden * (2 if bidirectional else 1), num_classes)
        self.directions = 2 if bidirectional else 1

    def blocks(self) -> list[nn.Module]:
        """What a sharding strategy wraps one by one."""
        return [self.recurrent]

    def forward(self, inputs: Tensor, lengths: Tensor | None = None) -> Tensor:
        """`lengths`: (n,) of the sequences; what is behind them is padding, which changes nothing."""
        sequences = inputs.flatten(0, -3) if inputs.dim() > 3 else inputs
        packed: Tensor | PackedSequence = sequences
        if lengths is not None:
            packed = pack_padded_sequence(sequences, lengths.cpu(), batch_first=True, enforce_sorted=False)
        _, state = self.recurrent(packed)
        last = state[0] if isinstance(state, tuple) else state
        features = torch.cat(list(last[-self.directions :]), dim=-1)
        return self.head(self.dropout(features))


class RecurrentTextClassifier(nn.Module):
    """(n, length) token ids, filled up with `pad_id` behind their ends, to (n, num_classes)."""

    for_tasks = ("trainer.tasks.classification.Classification",)

    def __init__(
        self,
        vocab_size: int,
        num_classes: int,
        pad_id: int | None = 0,
        cell: str = "lstm",
        dim: int = 128,
        hidden: int = 128,
        layers: int = 1,
        bidirectional: bool = True,
        dropout: float = 0.0,
    ) -> None:
        """`pad_id`: null: nothing is filled up. `dim`: of the embedding. The rest as in `RecurrentClassifier`."""
        super().__init__()
        self.pad_id = pad_id
        self.embedding = nn.Embedding(vocab_size, dim)
        self.classifier = RecurrentClassifier([dim], num_classes, cell, hidden, layers, bidirectional, dropout)

    def blocks(self) -> list[nn.Module]:
        """What a sharding strategy wraps one by one."""
        return self.classifier.blocks()

    def forward(self, tokens: Tensor) -> Tensor:
        lengths = None
        if self.pad_id is not None:  # the last place that is not padding: its id may be a token, too
            places = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)
            lengths = ((tokens != self.pad_id) * places).amax(1).clamp(min=1)
        logits: Tensor = self.classifier(self.embedding(tokens), lengths)
        return logits


class RecurrentDecoder(nn.Module):
    """(n, length) token ids to (n, length, vocab_size) logits of the next tokens."""

    for_tasks = ("trainer.tasks.language_modelling.LanguageModelling",)

    def __init__(
        self,
        vocab_size: int,
        cell: str = "lstm",
        dim: int = 128,
        hidden: int = 512,
        layers: int = 1,
        dropout: float = 0.0,
    ) -> None:
        """`dim`: of the embedding."""
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.recurrent = _recurrent(cell, dim, hidden, layers, False, dropout)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(hidden, vocab_size)

    def blocks(self) -> list[nn.Module]:
        """What a sharding strategy wraps one by one."""
        return [self.recurrent]

    def forward(self, tokens: Tensor) -> Tensor:
        features, _ = self.recurrent(self.embedding(tokens))
        return self.head(self.dropout(features))


def _recurrent(
    cell: str, features: int, hidden: int, layers: int, bidirectional: bool, dropout: float
) -> nn.LSTM | nn.GRU:
    if cell not in CELLS:
        raise UserError(f"model.cell={cell} is not known", "use lstm or gru")
    between = dropout if layers > 1 else 0.0
    made = CELLS[cell](features, hidden, layers, batch_first=True, dropout=between, bidirectional=bidirectional)
    for name, parameter in made.named_parameters():
        if name.startswith("weight_hh"):
            for gate in parameter.data.chunk(parameter.shape[0] // hidden):
                nn.init.orthogonal_(gate)
        elif name.startswith("bias_ih") and cell == "lstm":
            # The forget gate starts open: Jozefowicz et al. 2015.
            parameter.data[hidden : 2 * hidden] = 1.0
    return made
