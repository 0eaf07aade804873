"""Writing the adapters of a UNet so that `load_lora_weights` restores their exact effect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict

from diffpref.data.tensors import order_metadata

ADAPTER = "default"  # the name that add_adapter gives


def save_lora(pipeline_class: Any, unet: Any, folder: Path, adapter: str) -> None:
    """Write `pytorch_lora_weights.safetensors` with rank, alpha and targets in its metadata.

    Without the metadata a loader takes alpha = rank, and the LoRA would act with another strength.
    """
    config = unet.peft_config[adapter].to_dict()
    pipeline_class.save_lora_weights(
        folder,
        unet_lora_layers=convert_state_dict_to_diffusers(
            get_peft_model_state_dict(unet, adapter_name=adapter)
        ),
        unet_lora_adapter_metadata={
            key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
        },
        safe_serialization=True,
    )
    order_metadata(Path(folder) / "pytorch_lora_weights.safetensors")
