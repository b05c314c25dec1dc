"""The delta room: layers with small trainable parts, and the calls that put them on a model and take them off."""

from slimkit.core.delta.spec import DeltaReport
from slimkit.delta.adapter import AdapterDense, AdapterLayer
from slimkit.delta.combine import combine_delta
from slimkit.delta.compress import compress_delta
from slimkit.delta.folders import merge_checkpoint
from slimkit.delta.inject import (
    apply_delta,
    disable_delta,
    lora_plus_groups,
    merge_delta,
    remove_delta,
    set_delta,
    unmerge_delta,
)
from slimkit.delta.lora import LoRADense
from slimkit.delta.low_rank_adapter import LowRankAdapterDense, LowRankAdapterLayer
from slimkit.delta.prefix import PrefixEncoder, PrefixLayer
from slimkit.delta.prompt import PromptTuning
from slimkit.delta.rdrop import RDropLoss, rdrop_repeat
from slimkit.delta.storage import load_delta, save_delta

__all__ = [
    "AdapterDense",
    "AdapterLayer",
    "DeltaReport",
    "LoRADense",
    "LowRankAdapterDense",
    "LowRankAdapterLayer",
    "PrefixEncoder",
    "PrefixLayer",
    "PromptTuning",
    "RDropLoss",
    "apply_delta",
    "combine_delta",
    "compress_delta",
    "disable_delta",
    "load_delta",
    "lora_plus_groups",
    "merge_checkpoint",
    "merge_delta",
    "rdrop_repeat",
    "remove_delta",
    "save_delta",
    "set_delta",
    "unmerge_delta",
]
