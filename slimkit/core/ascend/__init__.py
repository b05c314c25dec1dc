"""Ascend: targets, padding, the check of ONNX files for ATC, and W16A16S folders; all from documents, on any CPU."""

from slimkit.core.ascend.findings import Finding, OnnxCheck
from slimkit.core.ascend.onnxcheck import check_onnx
from slimkit.core.ascend.padding import LayerWaste, padded_waste
from slimkit.core.ascend.targets import TARGETS, AscendTarget, Source, target
from slimkit.core.ascend.w16a16s import W16A16S, W16A16SReport, load_w16a16s

__all__ = [
    "TARGETS",
    "W16A16S",
    "AscendTarget",
    "Finding",
    "LayerWaste",
    "OnnxCheck",
    "Source",
    "W16A16SReport",
    "check_onnx",
    "load_w16a16s",
    "padded_waste",
    "target",
]
