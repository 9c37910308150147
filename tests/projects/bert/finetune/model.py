from __future__ import annotations

from collections import OrderedDict
from datetime import datetime

import lightning as L
import torch
from torch import nn


class Output(OrderedDict):
    """What a Hugging Face model returns: a dict whose entries are attributes, too."""

    __getattr__ = OrderedDict.__getitem__


class TinyBert(nn.Module):
    """Takes and returns what `BertForSequenceClassification` does."""

    def __init__(self, vocab_size: int, hidden_size: int, num_labels: int):
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, hidden_size, padding_idx=0)
        layer = nn.TransformerEncoderLayer(hidden_size, 2, 2 * hidden_size, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.LayerNorm = nn.LayerNorm(hidden_size)
        self.classifier = nn.Linear(hidden_size, num_labels)

    def forward(self, input_ids=None, attention_mask=None, labels=None):
        hidden = self.encoder(self.embeddings(input_ids), src_key_padding_mask=attention_mask == 0)
        logits = self.classifier(self.LayerNorm(hidden[:, 0]))
        if labels is None:
            return Output(logits=logits)
        return Output(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


class GLUETransformer(L.LightningModule):
    """Lightning's own text example: a batch is a dict, and the loss comes first."""

    def __init__(
        self,
        vocab_size: int = 40,
        learning_rate: float = 2e-3,
        adam_epsilon: float = 1e-8,
        warmup_steps: int = 2,
        weight_decay: float = 0.01,
        eval_splits: list | None = None,
    ):
        super().__init__()
        self.save_hyperparameters()
        self.started = datetime.now()
        self.model = TinyBert(vocab_size, 16, 2)
        self.outputs = []

    def forward(self, **inputs):
        return self.model(**inputs)

    def training_step(self, batch, batch_idx):
        return self(**batch)[next(iter(["loss"]))]

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        outputs = self(**batch)
        self.outputs.append({"loss": outputs.loss, "preds": outputs.logits.argmax(1), "labels": batch["labels"]})
        return outputs.loss

    def on_validation_epoch_end(self):
        preds = torch.cat([one["preds"] for one in self.outputs])
        labels = torch.cat([one["labels"] for one in self.outputs])
        loss = torch.stack([one["loss"] for one in self.outputs]).mean()
        self.log("val_loss", loss, prog_bar=True, sync_dist=True)
        self.log_dict({"accuracy": (preds == labels).float().mean()}, prog_bar=True, sync_dist=True)
        self.outputs.clear()

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self(**batch).loss, sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return self(**batch).logits

    def configure_optimizers(self):
        no_decay = ["bias", "LayerNorm.weight"]
        named = list(self.model.named_parameters())
        groups = [
            {
                "params": [p for n, p in named if not any(nd in n for nd in no_decay)],
                "weight_decay": self.hparams.weight_decay,
            },
            {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.hparams.learning_rate, eps=self.hparams.adam_epsilon)
        total, warm = self.trainer.estimated_stepping_batches, self.hparams.warmup_steps
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(step / warm, max(0.0, (total - step) / max(1, total - warm)))
        )
        return [optimizer], [{"scheduler": scheduler, "interval": "step", "frequency": 1}]
