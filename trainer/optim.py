"""AdamW with its parameter groups, and the learning rate as a function of the step."""

import math

import torch
from torch import nn

from conf.schema import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the model's parameters; vectors (norms, biases) do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    beta1, beta2 = config.betas
    return torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), eps=config.eps, fused=True)


def learning_rate(config: OptimConfig, step: int, num_steps: int) -> float:
    """Return the learning rate of optimizer step `step`, counted from 1 to `num_steps`."""
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    floor = config.min_lr_ratio
    if config.schedule == "cosine":
        progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
        return config.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * progress)) / 2)
    if config.schedule == "wsd" and config.decay_steps:
        left = (num_steps - step) / config.decay_steps
        return config.lr * (floor + (1 - floor) * min(1.0, left))
    return config.lr
