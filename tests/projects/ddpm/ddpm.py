import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Denoiser(nn.Module):
    def __init__(self, size, steps, width=32):
        super().__init__()
        self.time = nn.Embedding(steps, width)
        self.enter = nn.Linear(size, width)
        self.leave = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, size))

    def forward(self, x, t):
        return self.leave(self.enter(x) + self.time(t))


class EMA(nn.Module):
    """A shadow of the weights in buffers, as in latent-diffusion."""

    def __init__(self, model, decay=0.95):
        super().__init__()
        self.decay = decay
        self.register_buffer("num_updates", torch.tensor(0, dtype=torch.int))
        for name, parameter in model.named_parameters():
            self.register_buffer(name.replace(".", "_"), parameter.clone().detach())

    @torch.no_grad()
    def forward(self, model):
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates.item()) / (10 + self.num_updates.item()))
        for name, parameter in model.named_parameters():
            shadow = getattr(self, name.replace(".", "_"))
            shadow.sub_((1 - decay) * (shadow - parameter))


class DDPM(pl.LightningModule):
    """Ho et al. 2020 on rows of numbers: linear schedule, noise predicted, ancestral sampling."""

    def __init__(self, size: int = 8, timesteps: int = 20, lr: float = 1e-3, use_ema: bool = True):
        super().__init__()
        self.save_hyperparameters()
        betas = torch.linspace(1e-4, 0.2, timesteps)
        self.register_buffer("betas", betas)
        self.register_buffer("alphas_cumprod", torch.cumprod(1 - betas, 0))
        self.model = Denoiser(size, timesteps)
        self.model_ema = EMA(self.model) if use_ema else None

    def q_sample(self, x, t, noise):
        kept = self.alphas_cumprod[t][:, None]
        return kept.sqrt() * x + (1 - kept).sqrt() * noise

    def p_losses(self, x):
        t = torch.randint(0, self.hparams.timesteps, (len(x),), device=self.device).long()
        noise = torch.randn_like(x)
        return nn.functional.mse_loss(self.model(self.q_sample(x, t, noise), t), noise)

    def training_step(self, batch, batch_idx):
        loss = self.p_losses(batch["image"])
        self.log_dict({"train/loss_simple": loss}, prog_bar=True, logger=True, on_step=True, on_epoch=True)
        self.log("global_step", float(self.global_step), prog_bar=True, logger=True, on_step=True, on_epoch=False)
        return loss

    def on_train_batch_end(self, *args, **kwargs):
        if self.hparams.use_ema:
            self.model_ema(self.model)

    @torch.no_grad()
    def validation_step(self, batch, batch_idx):
        self.log("val/loss_simple", self.p_losses(batch["image"]), sync_dist=True)

    def test_step(self, batch, batch_idx):
        self.log("test/loss_simple", self.p_losses(batch["image"]), sync_dist=True)

    @torch.no_grad()
    def sample(self, count):
        x = torch.randn(count, self.hparams.size, device=self.device)
        for step in reversed(range(self.hparams.timesteps)):
            t = torch.full((count,), step, device=self.device)
            beta, kept = self.betas[step], self.alphas_cumprod[step]
            x = (x - beta / (1 - kept).sqrt() * self.model(x, t)) / (1 - beta).sqrt()
            if step:
                x = x + beta.sqrt() * torch.randn_like(x)
        return x

    def predict_step(self, batch, batch_idx):
        return self.sample(len(batch["image"]))

    def configure_optimizers(self):
        return torch.optim.AdamW(self.model.parameters(), lr=self.hparams.lr)


class Named(TensorDataset):
    def __getitem__(self, index):
        return {"image": self.tensors[0][index], "caption": f"number {index}"}


class Rows(pl.LightningDataModule):
    def _loader(self, count, seed, shuffle=False):
        rows = torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)).cumsum(1)
        return DataLoader(Named(rows), batch_size=8, shuffle=shuffle)

    def train_dataloader(self):
        return self._loader(64, 1, True)

    def val_dataloader(self):
        return self._loader(16, 2)

    def test_dataloader(self):
        return self._loader(16, 3)
