"""Which parameters an optimizer has, and how fast each group learns."""

import pytest
from torch import nn

from conf.schema import OptimConfig
from trainer.optim import build_optimizer


def optim(**settings: object) -> OptimConfig:
    fixed = {"lr": 1e-3, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
    fixed |= {"max_grad_norm": 1.0, "schedule": "constant", "warmup_steps": 0}
    return OptimConfig(**fixed, decay_steps=0, min_lr_ratio=0.1, **settings)


def test_groups_by_decay_and_by_factor() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(2, 3), "body": nn.Linear(2, 3)})
    model["body"].bias.requires_grad = False
    groups = build_optimizer(model, optim(lr_scale={"gate": 10.0, "bias": 2.0})).param_groups
    found = {(g["lr_scale"], g["weight_decay"]): g["params"] for g in groups}
    assert found.keys() == {(10.0, 0.1), (2.0, 0.0), (1.0, 0.1)}
    (weight,), (bias,), (body,) = found.values()
    assert weight is model["gate"].weight
    assert bias is model["gate"].bias
    assert body is model["body"].weight


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lr_scale: '\(' is no regular expression"):
        optim(lr_scale={"(": 1.0})
