"""Trains a small network on all ranks of a gang, each on its share of every batch.

Gradients are averaged over the ranks after each step, so that the ranks together do exactly what one process would do
with the whole batch: the loss is the same, whatever the number of ranks. `python train.py` alone is that one process.
"""

import json
import os

import torch
import torch.distributed as dist
from torch import nn

STEPS = 60
BATCH = 64
IN_A_JOB = "NABLA_JOB_ID" in os.environ
if IN_A_JOB:
    import nabla


def main() -> None:
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=size)  # finds MASTER_ADDR and MASTER_PORT
    torch.manual_seed(0)  # the same weights and the same data everywhere
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    model = nn.parallel.DistributedDataParallel(model) if size > 1 else model
    inputs = torch.randn(STEPS * BATCH, 8)
    targets = inputs.pow(2).sum(1, keepdim=True).sin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(STEPS):
        whole = slice(step * BATCH, (step + 1) * BATCH)
        mine = slice(whole.start + rank * BATCH // size, whole.start + (rank + 1) * BATCH // size)
        loss = nn.functional.mse_loss(model(inputs[mine]), targets[mine])
        optimizer.zero_grad()
        loss.backward()  # DistributedDataParallel averages the gradients here
        optimizer.step()
        shown = loss.detach().clone()
        if size > 1:
            dist.all_reduce(shown)
            shown /= size
        if rank == 0 and IN_A_JOB:
            nabla.log({"loss": shown.item()}, step=step)
    if rank == 0:
        output = os.environ.get("NABLA_ARTIFACTS", "output")
        os.makedirs(output, exist_ok=True)
        with open(os.path.join(output, "result.json"), "w") as file:
            json.dump({"ranks": size, "loss": shown.item()}, file)
        print(f"{size} ranks: loss {shown.item():.6f}")
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
