"""The oracle of the gates: plain transformers + PEFT, one row at a time, no padding, in the environment of TRL.

A script: python reference_run.py JOB.json. Its tasks: "loss" and "gradients" of the first step in fp32, "logits" of the
first rows in fp32, "evaluate" over all rows in the dtype of its setting.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from job import Job, Rows, read_job, say
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def main() -> None:
    job = read_job()
    task = {"loss": loss, "gradients": gradients, "logits": logits, "evaluate": evaluate}[job.task]
    say({"tool": "reference", "task": job.task, "workload": job.workload, **task(job, Rows(job.data))})


def adapted(job: Job, dtype: torch.dtype) -> Any:
    """The base with the job's adapter on it."""
    base = AutoModelForCausalLM.from_pretrained(job.base, dtype=dtype)
    return PeftModel.from_pretrained(base, job.start, is_trainable=True).eval()


def row_loss(model: Any, rows: Rows, row: int) -> tuple[torch.Tensor, int]:
    """(sum of token losses, labelled tokens) of one row. The softmax is taken in fp64: torch's in fp32 is 1e-5 off."""
    ids, labels = rows.ids_and_labels(row)
    logits_TV = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    targets_T = torch.tensor(labels[1:])
    return F.cross_entropy(logits_TV, targets_T, reduction="sum", ignore_index=-100), int((targets_T != -100).sum())


@torch.no_grad()
def loss(job: Job, rows: Rows) -> dict[str, Any]:
    """The loss of the first step."""
    return _mean_loss(adapted(job, torch.float32), rows, job.examples_per_step)


@torch.no_grad()
def evaluate(job: Job, rows: Rows) -> dict[str, Any]:
    """The loss over all rows."""
    return _mean_loss(adapted(job, getattr(torch, job.setting["dtype"])), rows, len(rows))


def _mean_loss(model: Any, rows: Rows, count: int) -> dict[str, Any]:
    found = [row_loss(model, rows, row) for row in range(count)]
    return {"loss": sum(float(total) for total, _ in found) / sum(n for _, n in found), "rows": count}


def gradients(job: Job, rows: Rows) -> dict[str, Any]:
    """The loss of the first step, and its gradients written to `gradients` under the names of the adapter file."""
    model = adapted(job, torch.float32)
    labelled = sum(rows.labelled(row) for row in range(job.examples_per_step))
    mean = 0.0
    for row in range(job.examples_per_step):
        part = row_loss(model, rows, row)[0] / labelled
        part.backward()
        mean += float(part.detach())
    trained = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if p.requires_grad}
    Path(str(job.gradients)).mkdir(parents=True, exist_ok=True)
    save_file(trained, f"{job.gradients}/adapter_model.safetensors")
    return {"loss": mean, "labelled_tokens": labelled}


@torch.no_grad()
def logits(job: Job, rows: Rows) -> dict[str, Any]:
    """Writes the logits of the first rows to `out`."""
    model = adapted(job, torch.float32)
    listed = [torch.tensor([rows.ids_and_labels(row)[0]]) for row in range(min(job.examples_per_step, len(rows)))]
    np.savez(str(job.out), *[model(input_ids=ids, use_cache=False).logits[0].numpy() for ids in listed])
    return {}


if __name__ == "__main__":
    main()
