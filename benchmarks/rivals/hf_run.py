"""PEFT + TRL, or Unsloth's CPU path, on one job, in that tool's own environment. A script: python hf_run.py JOB.json

Both are driven as their documentation has it: a model with a LoRA adapter goes into TRL's SFTTrainer. The rows come
tokenised and in a fixed order, and the factors begin as everybody's. A setting names what a user could choose:

    batch          rows of a micro-batch; the accumulation follows from the rows per step
    base           dtype of the frozen weights ("bfloat16"; TRL loads a model named by a string in "float32"; without
                   it, Unsloth chooses by itself)
    adapters       dtype of the factors: "float32" (PEFT's default) or "bfloat16"
    autocast       the trainer's bf16 mixed precision (TRL's default)
    checkpointing  recompute activations in the backward pass (the default of both)
    group          rows of like length into one micro-batch: "none", "step", "pool" (see job.arranged)
    padding_free   TRL: the micro-batch as one row, documents told apart by their positions
    compile        Unsloth: every decoder layer through torch.compile; TRL: the whole model, by the trainer's own switch
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from job import Job, Recorder, Rows, arranged, peak_bytes, read_job, say

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "bias": "none"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    job = read_job()
    if job.tool == "unsloth":
        os.environ["UNSLOTH_CPU_COMPILE"] = "1" if job.setting["compile"] else "0"
        import unsloth  # noqa: F401  (first: it changes TRL)
    import peft  # noqa: F401
    import trl  # noqa: F401

    recorder = Recorder(job, peak_bytes())
    model, tokenizer = (unsloth_model if job.tool == "unsloth" else trl_model)(job)
    take_factors(model, job.start)
    trainer = make_trainer(job, model, tokenizer, recorder)
    trainer.train()
    if job.out:
        model.save_pretrained(job.out)
    say({**recorder.answer(), "dtype": str(model.dtype).removeprefix("torch.")})


def trl_model(job: Job) -> tuple[Any, Any]:
    """The base with a fresh LoRA adapter, as SFTTrainer makes it from a model and a LoraConfig."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(job.base, dtype=job.setting["base"])
    config = LoraConfig(**LORA, target_modules=TARGETS, task_type="CAUSAL_LM")
    cast = job.setting["adapters"] == "float32"
    return get_peft_model(model, config, autocast_adapter_dtype=cast), AutoTokenizer.from_pretrained(job.base)


def unsloth_model(job: Job) -> tuple[Any, Any]:
    """The base with a fresh LoRA adapter, as FastLanguageModel makes it."""
    import torch
    from unsloth import FastLanguageModel

    checkpointing = "unsloth" if job.setting["checkpointing"] else False
    dtype = getattr(torch, job.setting["base"]) if "base" in job.setting else None
    model, tokenizer = FastLanguageModel.from_pretrained(
        job.base, max_seq_length=1024, dtype=dtype, load_in_4bit=False, use_gradient_checkpointing=checkpointing
    )
    model = FastLanguageModel.get_peft_model(
        model, **LORA, target_modules=TARGETS, use_gradient_checkpointing=checkpointing
    )
    return model, tokenizer


def take_factors(model: Any, folder: str) -> None:
    """Puts the factors of an adapter folder into the model, each in the dtype that stands there."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    tensors = load_file(f"{folder}/adapter_model.safetensors")
    result = set_peft_model_state_dict(model, tensors)
    assert not result.unexpected_keys, result.unexpected_keys[:3]
    assert get_peft_model_state_dict(model).keys() == tensors.keys(), "not the same layers are adapted"


def write_gradients(model: Any, folder: str) -> None:
    """The gradients of the factors, under the names of the adapter file."""
    from safetensors.torch import save_file

    trained = {name.replace(".default", ""): p.grad.float() for name, p in model.named_parameters() if p.requires_grad}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(trained, f"{folder}/adapter_model.safetensors")


def make_trainer(job: Job, model: Any, tokenizer: Any, recorder: Recorder) -> Any:
    """SFTTrainer over the job's rows; it stops when the recorder says so."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTTrainer

    rows = Rows(job.data)
    order = arranged(rows.lengths, job.examples_per_step, job.setting["batch"], job.setting["group"])
    tokens = [int(rows.lengths[row]) for row in order]
    labelled = [rows.labelled(row) for row in order]
    pairs = [rows.ids_and_labels(row) for row in order]
    dataset = Dataset.from_dict({"input_ids": [ids for ids, _ in pairs], "labels": [labels for _, labels in pairs]})

    class Trainer(SFTTrainer):
        loss_sum = 0.0

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            """The tool's own step; its loss is a part of the optimiser step's mean, so the parts are added up."""
            loss = super().training_step(*args, **kwargs)
            self.loss_sum += float(loss)
            return loss

    class Watch(TrainerCallback):
        def on_train_begin(self, *_args: Any, **_kwargs: Any) -> None:
            recorder.begin()

        def on_pre_optimizer_step(self, _args: Any, state: Any, *_rest: Any, **_kwargs: Any) -> None:
            if job.gradients and state.global_step == 0:
                write_gradients(model, job.gradients)

        def on_log(self, _args: Any, state: Any, control: Any, logs: dict[str, float], **_kwargs: Any) -> None:
            if "grad_norm" not in logs:
                return
            first = (state.global_step - 1) * job.examples_per_step
            taken = [(first + i) % len(order) for i in range(job.examples_per_step)]
            counts = sum(tokens[i] for i in taken), sum(labelled[i] for i in taken)
            control.should_training_stop = not recorder.step(trainer.loss_sum, logs["grad_norm"], *counts)
            trainer.loss_sum = 0.0

    parts = {"model": model, "args": arguments(job), "train_dataset": dataset, "processing_class": tokenizer}
    trainer = Trainer(**parts, callbacks=[Watch()])
    return trainer


def arguments(job: Job) -> Any:
    """SFTConfig of the job: what the protocol fixes, then what the setting says."""
    from trl import SFTConfig

    setting = job.setting
    fixed: dict[str, Any] = {
        "learning_rate": job.rate,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": job.clip,
        "seed": 0,
        "use_cpu": True,
        "max_steps": job.steps or 1_000_000,
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }
    quiet = {"logging_steps": 1, "save_strategy": "no", "report_to": "none", "disable_tqdm": True}
    return SFTConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=setting["batch"],
        gradient_accumulation_steps=job.examples_per_step // setting["batch"],
        gradient_checkpointing=setting["checkpointing"],
        bf16=setting["autocast"],
        max_length=None,
        padding_free=setting.get("padding_free", False),
        torch_compile=job.tool == "trl" and setting.get("compile", False),
        **fixed,
        **quiet,
    )


if __name__ == "__main__":
    main()
