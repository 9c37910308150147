import lightning as L
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


class Generator(nn.Module):
    def __init__(self, latent_dim, size):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(latent_dim, 32), nn.LeakyReLU(0.2), nn.Linear(32, size), nn.Tanh())

    def forward(self, z):
        return self.model(z)


class Discriminator(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(size, 32), nn.LeakyReLU(0.2), nn.Dropout(0.2), nn.Linear(32, 1))

    def forward(self, x):
        return self.model(x)


class GAN(L.LightningModule):
    """Lightning's own GAN example: manual optimization, two optimizers, each toggled in turn."""

    def __init__(self, size: int = 16, latent_dim: int = 8, lr: float = 0.0002, b1: float = 0.5, b2: float = 0.999):
        super().__init__()
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.generator = Generator(latent_dim, size)
        self.discriminator = Discriminator(size)
        self.validation_z = torch.randn(8, latent_dim)
        self.example_input_array = torch.zeros(2, latent_dim)

    def forward(self, z):
        return self.generator(z)

    def adversarial_loss(self, y_hat, y):
        return F.binary_cross_entropy_with_logits(y_hat, y)

    def training_step(self, batch):
        (real,) = batch
        optimizer_g, optimizer_d = self.optimizers()
        z = torch.randn(real.shape[0], self.hparams.latent_dim).type_as(real)

        self.toggle_optimizer(optimizer_g)
        valid = torch.ones(real.size(0), 1).type_as(real)
        g_loss = self.adversarial_loss(self.discriminator(self(z)), valid)
        self.log("g_loss", g_loss, prog_bar=True)
        self.manual_backward(g_loss)
        optimizer_g.step()
        optimizer_g.zero_grad()
        self.untoggle_optimizer(optimizer_g)

        self.toggle_optimizer(optimizer_d)
        real_loss = self.adversarial_loss(self.discriminator(real), valid)
        fake_loss = self.adversarial_loss(self.discriminator(self(z).detach()), torch.zeros_like(valid))
        d_loss = (real_loss + fake_loss) / 2
        self.log("d_loss", d_loss, prog_bar=True)
        self.manual_backward(d_loss)
        optimizer_d.step()
        optimizer_d.zero_grad()
        self.untoggle_optimizer(optimizer_d)

    def validation_step(self, batch, batch_idx):
        self.log("realism", self.discriminator(batch[0]).mean(), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test_realism", self.discriminator(batch[0]).mean(), sync_dist=True)

    def predict_step(self, batch, batch_idx):
        return torch.sigmoid(self.discriminator(batch[0]))

    def configure_optimizers(self):
        lr, betas = self.hparams.lr, (self.hparams.b1, self.hparams.b2)
        return [
            torch.optim.Adam(self.generator.parameters(), lr=lr, betas=betas),
            torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=betas),
        ], []

    def on_validation_epoch_end(self):
        sample = self(self.validation_z.type_as(self.generator.model[0].weight))
        self.log("sample_std", sample.std(), sync_dist=True)


class Waves(L.LightningDataModule):
    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size = batch_size

    def _loader(self, count, seed, shuffle=False):
        phases = torch.rand(count, 1, generator=torch.Generator().manual_seed(seed)) * 6.28
        waves = torch.sin(phases + torch.arange(16) * 0.5)
        return DataLoader(TensorDataset(waves), batch_size=self.batch_size, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(64, 1, shuffle=True)

    def val_dataloader(self):
        return self._loader(16, 2)

    def test_dataloader(self):
        return self._loader(16, 3)
