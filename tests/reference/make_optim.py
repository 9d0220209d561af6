"""Prints the numbers that tests/test_optim.py compares with: torch's optimizers and timm's cosine schedule.

python -m tests.reference.make_optim        (needs the `parity` extra; written with torch 2.13, timm 1.0.31)
"""

import torch
from timm.scheduler import CosineLRScheduler


def gradients(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the loss would give at each step; the test has the same in numpy."""
    kernel = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    bias = torch.tensor([0.25, -1.5], dtype=torch.float64)
    return kernel * (1.0 if step % 2 else -0.5) + 0.1 * step, bias * (step + 1)


def run(make_optimizer, steps: int = 5) -> None:
    kernel = torch.nn.Parameter(torch.tensor([[0.5, -1.0], [2.0, 0.25]], dtype=torch.float64))
    bias = torch.nn.Parameter(torch.tensor([1.0, -0.5], dtype=torch.float64))
    optimizer = make_optimizer(kernel, bias)
    for step in range(steps):
        kernel.grad, bias.grad = gradients(step)
        optimizer.step()
    print(kernel.tolist(), bias.tolist())


def adamw(kernel, bias):
    groups = [{"params": [kernel], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.99), eps=1e-6)


def adam(kernel, bias):
    groups = [{"params": [kernel], "weight_decay": 0.1}, {"params": [bias], "weight_decay": 0.0}]
    return torch.optim.Adam(groups, lr=0.01, betas=(0.8, 0.99), eps=1e-6)


def sgd(kernel, bias):
    return torch.optim.SGD([kernel, bias], lr=0.01, momentum=0.9)


def cosine() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=90,
        lr_min=1e-5,
        warmup_t=10,
        warmup_lr_init=1e-6,
        cycle_limit=1,
        t_in_epochs=False,
    )
    rates = {}
    for step in range(100):
        schedule.step_update(step)
        rates[step] = optimizer.param_groups[0]["lr"]
    print({step: rates[step] for step in (0, 3, 9, 10, 11, 45, 89, 90, 99)})


if __name__ == "__main__":
    run(adam)
    run(adamw)
    run(sgd)
    cosine()
