"""peft_teach: parameter-efficient fine-tuning, written to be read.

`import peft_teach` loads torch and safetensors and nothing else; peft, transformers, bitsandbytes,
matplotlib and hypothesis are imported by the functions that use them.
"""

import safetensors.torch  # noqa: F401  (the one format that adapters are kept in)
import torch  # noqa: F401

from peft_teach.checkpoint import load_adapter, save_adapter
from peft_teach.lora.inject import (
    ParameterCount,
    apply_lora_to_model,
    count_parameters,
    merge_lora,
    unmerge_lora,
    wrapped_layers,
)
from peft_teach.lora.layer import LoRALayer, LoRALinear, add_update, delta_weight, init_lora_

__version__ = "2026.1"

__all__ = [
    "LoRALayer",
    "LoRALinear",
    "ParameterCount",
    "add_update",
    "apply_lora_to_model",
    "count_parameters",
    "delta_weight",
    "init_lora_",
    "load_adapter",
    "merge_lora",
    "save_adapter",
    "unmerge_lora",
    "wrapped_layers",
]
