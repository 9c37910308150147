"""One rank that trains every model for a few steps and writes the losses and weights: `python two_ranks.py FOLDER`.

All models in the same processes: starting Python and torch costs more than training them. Imported, it does the
same on one rank with the joint batch.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import distributed, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from trainer.models.efficientnet_lite import EfficientNetLite
from trainer.models.image_sequence import ImageToSequence, SequenceToImage
from trainer.models.mlp import MLP
from trainer.models.resnet import ResNet
from trainer.models.rnn import RecurrentClassifier, RecurrentDecoder, RecurrentTextClassifier
from trainer.models.sync_batch_norm import convert_sync_batch_norm
from trainer.models.transformer import Transformer
from trainer.models.vgg import VGG
from trainer.models.vit import ViT

BATCH, STEPS = 12, 4
VOCABULARY = 32
IMAGE = [1, 8, 8]
MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: MLP([1, 8, 8], 4, hidden=[16], dropout=0.0, norm="layer"),
    "mlp-batch-norm": lambda: MLP([1, 8, 8], 4, hidden=[16], dropout=0.0, norm="batch"),
    "resnet-basic": lambda: ResNet([1, 8, 8], 4, depth=None, layers=[1, 1], width=4, stem="small"),
    "resnet-bottleneck": lambda: ResNet([1, 8, 8], 4, depth=None, layers=[1, 1], block="bottleneck", width=4),
    "efficientnet": lambda: EfficientNetLite([1, 8, 8], 4, 16, 0.0, stages=[(1, 3, 1, 1, 4), (2, 5, 2, 2, 6)]),
    "vgg": lambda: VGG([1, 8, 8], 4, depth=None, convolutions=[1, 1], width=4, pooled=2, hidden=[8], dropout=0.0),
    "vit": lambda: ViT([1, 8, 8], 4, patch=4, dim=16, layers=1, heads=2),
    "lstm": lambda: RecurrentClassifier([1, 8, 8], 4, hidden=8, bidirectional=True),
    "gru": lambda: RecurrentClassifier([8, 8], 4, cell="gru", hidden=8),
    "lstm-text": lambda: RecurrentTextClassifier(VOCABULARY, 4, pad_id=3, dim=8, hidden=8),
    "lstm-decoder": lambda: RecurrentDecoder(VOCABULARY, dim=8, hidden=16),
    "llama": lambda: Transformer(VOCABULARY, 8, dim=16, layers=2, heads=4, kv_heads=2, tied=False),
    "image-to-sequence": lambda: ImageToSequence(IMAGE, VOCABULARY, 8, patch=4, dim=16, layers=1, heads=2),
    "sequence-to-image": lambda: SequenceToImage(IMAGE, VOCABULARY, 8, patch=4, dim=16, layers=1, heads=2),
    "gpt2": lambda: Transformer(
        VOCABULARY, 8, dim=16, layers=2, heads=2, norm="layer", activation="gelu", positions="learned", bias=True
    ),
}
Trained = tuple[list[float], dict[str, torch.Tensor]]


def batch(name: str) -> list[torch.Tensor]:
    """The joint batch of both ranks: inputs, and the target last."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, VOCABULARY, (BATCH, 9), generator=generator)
    targets = torch.arange(BATCH) % 4
    images = torch.randn(BATCH, *IMAGE, generator=generator) + targets.view(-1, 1, 1, 1)
    if name == "lstm-text":
        return [tokens, targets]
    if name in ("lstm-decoder", "llama", "gpt2"):
        return [tokens[:, :-1], tokens[:, 1:]]
    if name == "image-to-sequence":
        return [images, tokens[:, :-1], tokens[:, 1:]]
    return [tokens[:, :-1], images] if name == "sequence-to-image" else [images, targets]


def loss_of(outputs: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if target.is_floating_point():
        return functional.mse_loss(outputs, target)
    return functional.cross_entropy(outputs.flatten(0, -2), target.flatten())


def train(name: str, rank: int, ranks: int, synchronise: bool = True) -> Trained:
    """Losses over the joint batch, and the state afterwards."""
    torch.manual_seed(0)
    model = MODELS[name]()
    if synchronise:
        convert_sync_batch_norm(model, torch.device("cpu"))
    *inputs, target = (part.chunk(ranks)[rank] for part in batch(name))
    network = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        loss = loss_of(network(*inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        joint = loss.detach().clone()
        if ranks > 1:
            distributed.all_reduce(joint)
        losses.append(joint.item() / ranks)
    return losses, model.state_dict()


def main() -> None:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group("gloo")
    found = {name: train(name, rank, ranks) for name in MODELS}
    found["separate statistics"] = train("resnet-basic", rank, ranks, synchronise=False)
    torch.save(found, Path(sys.argv[1]) / f"rank-{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
