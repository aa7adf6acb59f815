"""How good a model is on held-out text: mean next-token cross-entropy."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headfold.export.data.token_data import TokenData


def evaluate(decoder: nn.Module, data: TokenData, sequence: int, sequences: int, batch: int = 8) -> float:
    """Mean cross-entropy in nats per token over at most `sequences` windows, spread evenly over the data."""
    device = next(decoder.parameters()).device
    return cross_entropy(decoder, data.spread(sequences, sequence), batch, device).item()


@torch.no_grad()
def cross_entropy(model: nn.Module, rows: Tensor, batch: int, device: torch.device) -> Tensor:
    """The mean over rows [N, S + 1], as a scalar tensor."""
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.split(rows, batch):
        part = part.to(device)
        logits = model(part[:, :-1]).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten(), reduction="sum").double().cpu()
    return (total / rows[:, 1:].numel()).float().to(device)
