import lightning.pytorch as pl
import torch
from torch import nn


class Data:
    """One graph, or several as one: the class and its attributes are torch_geometric's."""

    def __init__(self, x, edge_index, y, batch=None):
        self.x, self.edge_index, self.y, self.batch = x, edge_index, y, batch

    @property
    def num_graphs(self):
        return len(self.y)

    def to(self, device, *args, **kwargs):
        return Data(*(getattr(self, name).to(device) for name in ("x", "edge_index", "y", "batch")))

    def pin_memory(self):
        return self


class Collater:
    def __init__(self, follow_batch):
        self.follow_batch = follow_batch

    def __call__(self, graphs):
        offsets = torch.tensor([0] + [len(graph.x) for graph in graphs]).cumsum(0)
        return Data(
            torch.cat([graph.x for graph in graphs]),
            torch.cat([graph.edge_index + offset for graph, offset in zip(graphs, offsets, strict=False)], 1),
            torch.cat([graph.y for graph in graphs]),
            torch.cat([torch.full((len(graph.x),), number) for number, graph in enumerate(graphs)]),
        )


class DataLoader(torch.utils.data.DataLoader):
    """As `torch_geometric.loader.DataLoader`."""

    def __init__(self, dataset, batch_size=1, shuffle=False, follow_batch=None, exclude_keys=None, **kwargs):
        kwargs.pop("collate_fn", None)
        self.follow_batch, self.exclude_keys = follow_batch, exclude_keys
        super().__init__(dataset, batch_size, shuffle, collate_fn=Collater(follow_batch), **kwargs)


def graph(seed):
    draw = torch.Generator().manual_seed(seed)
    nodes = 4 + seed % 5
    x = torch.randn(nodes, 6, generator=draw)
    return Data(x, torch.randint(0, nodes, (2, 3 * nodes), generator=draw), (x.mean() > 0).long()[None])


class GraphData(pl.LightningDataModule):
    def __init__(self, batch_size: int = 4):
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage=None):
        self.graphs = [graph(seed) for seed in range(72)]

    def train_dataloader(self):
        return DataLoader(self.graphs[:48], self.batch_size, shuffle=True)

    def val_dataloader(self):
        return DataLoader(self.graphs[48:60], self.batch_size)

    def test_dataloader(self):
        return DataLoader(self.graphs[60:], self.batch_size)


class GCN(pl.LightningModule):
    def __init__(self, hidden: int = 16):
        super().__init__()
        self.save_hyperparameters()
        self.first, self.second, self.head = nn.Linear(6, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)

    def forward(self, data):
        x = data.x
        for layer in (self.first, self.second):
            x = layer(x).relu()
            x = x.index_add(0, data.edge_index[1], x[data.edge_index[0]])
        pooled = x.new_zeros(data.num_graphs, x.shape[1]).index_add(0, data.batch, x)
        return self.head(nn.functional.dropout(pooled, 0.2, self.training))

    def step(self, data, stage):
        logits = self(data)
        loss = nn.functional.cross_entropy(logits, data.y)
        accuracy = (logits.argmax(1) == data.y).float().mean()
        self.log(f"{stage}_loss", loss, batch_size=data.num_graphs, sync_dist=True)
        self.log(f"{stage}_acc", accuracy, batch_size=data.num_graphs, sync_dist=True)
        return loss

    def training_step(self, batch, batch_idx):
        return self.step(batch, "train")

    def validation_step(self, batch, batch_idx):
        self.step(batch, "val")

    def test_step(self, batch, batch_idx):
        self.step(batch, "test")

    def predict_step(self, batch, batch_idx):
        return self(batch).softmax(1)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=5e-4)
