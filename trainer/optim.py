"""AdamW with its parameter groups, and the learning rate as a function of the step."""

import math
import re
from collections import defaultdict

import torch
from torch import nn

from conf.schema import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Return AdamW over the model's parameters; vectors (norms, biases) do not decay.

    Groups say by `lr_scale` how much of the learning rate is theirs.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = dict.fromkeys(parameters, 1.0)
    for pattern, scale in config.lr_scale.items():
        found = [name for name in parameters if re.search(pattern, name)]
        scales |= dict.fromkeys(found, scale)
    members = defaultdict[tuple[float, bool], list[nn.Parameter]](list)
    for name, parameter in parameters.items():
        members[scales[name], parameter.dim() >= 2].append(parameter)
    groups = [
        {"params": part, "lr_scale": scale, "weight_decay": config.weight_decay * is_matrix}
        for (scale, is_matrix), part in members.items()
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
