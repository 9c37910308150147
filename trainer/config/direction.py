"""The direction of a metric (lower or higher is better), inferred from its name. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal

Direction = Literal["min", "max"]
"""Whether a lower (min) or a higher (max) value of a metric is better."""

_LOWER = """loss losses error err mse rmse mae mape smape msle rmsle nll ppl perplexity bpb bpc bpd wer cer ter eer fid
kid lpips ece mce brier fpr fnr far frr hausdorff assd hd95 chamfer regret kl kld divergence crossentropy xent bce
logloss deviance rse wape mase crps ade fde epe absrel sqrel lsd mcd"""
_HIGHER = """acc accuracy auroc auc auprc roc prauc f1 f2 fbeta fscore dice iou miou giou jaccard map mar ap precision
recall sensitivity specificity bleu sacrebleu rouge rougel meteor cider chrf psnr ssim msssim vif pesq stoi sdr sisdr
sisnr snr r2 pearson spearman corrcoef correlation ccc concordance kappa mcc matthews tpr tnr ppv npv ndcg mrr hit hits
reward return winrate success elbo likelihood bertscore vmaf ari nmi ami silhouette em exactmatch top1 top5"""
_PHRASES: dict[str, Direction] = {
    "cross_entropy": "min",
    "bits_per": "min",
    "log_loss": "min",
    "neg_log": "min",
    "negative_log": "min",
    "false_positive": "min",
    "false_negative": "min",
    "true_positive": "max",
    "true_negative": "max",
    "win_rate": "max",
    "hit_rate": "max",
    "exact_match": "max",
    "explained_variance": "max",
    "cosine_similarity": "max",
    "inception_score": "max",
    "log_prob": "max",
}
_CAMEL = re.compile(r"[A-Z]+[a-z]?[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+|[A-Z]+|\d+")
_WORDS: dict[str, Direction] = {word: "min" for word in _LOWER.split()}
_WORDS |= {word: "max" for word in _HIGHER.split()}


def direction_of(name: str) -> Direction | None:
    """Return `min` or `max` for a metric such as `val/acc`, `valLoss`, `val_f1_epoch`; None if the name is unknown.

    The last known word of the name decides: `acc_loss` is a loss, `loss_acc` is not.
    """
    words = _words(name)
    joined = "_".join(words)
    phrases = [(joined.rfind(phrase), meaning) for phrase, meaning in _PHRASES.items() if phrase in joined]
    if phrases:
        return max(phrases)[1]
    for word in reversed(words):
        direction = _WORDS.get(word) or _WORDS.get(word.rstrip("0123456789"))
        if direction:
            return direction
    return None


def is_loss(name: str) -> bool:
    """Return whether the name is that of a loss."""
    return bool({"loss", "losses"} & set(_words(name)))


def _words(name: str) -> list[str]:
    """Split a name such as `val/meanIoU@50` into val, mean, iou, 50; known names such as mAP are one word."""
    name = re.sub(r"/dataloader_idx_\d+$", "", name)
    words: list[str] = []
    for part in re.split(r"[^A-Za-z0-9]+", name):
        whole = part.lower()
        if whole in _WORDS or whole.rstrip("0123456789") in _WORDS:
            words.append(whole)
        else:
            words += [word.lower() for word in _CAMEL.findall(part)]
    return [word for word in words if word]
