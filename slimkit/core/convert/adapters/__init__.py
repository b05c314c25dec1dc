"""LoRA adapters between the layouts of PEFT, MindFormers and Megatron (MindSpeed): names, fused matrices, shards."""

from slimkit.core.convert.adapters.converting import AdapterReport, convert_adapter, is_adapter

__all__ = ["AdapterReport", "convert_adapter", "is_adapter"]
