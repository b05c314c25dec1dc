"""Ascend: targets, padding, the check of ONNX files for ATC, W16A16S and W8A8S folders; from documents, on any CPU."""

from slimkit.core.ascend.adapters import AdapterCheck, check_adapter
from slimkit.core.ascend.findings import Finding, OnnxCheck
from slimkit.core.ascend.onnxcheck import check_onnx
from slimkit.core.ascend.padding import LayerWaste, padded_waste
from slimkit.core.ascend.served import ServedCheck, check_served
from slimkit.core.ascend.targets import TARGETS, AscendTarget, Source, target
from slimkit.core.ascend.w8a8s import W8A8S, W8A8SReport, load_w8a8s
from slimkit.core.ascend.w16a16s import W16A16S, W16A16SReport, load_w16a16s

__all__ = [
    "TARGETS",
    "W8A8S",
    "W16A16S",
    "AdapterCheck",
    "AscendTarget",
    "Finding",
    "LayerWaste",
    "OnnxCheck",
    "ServedCheck",
    "Source",
    "W8A8SReport",
    "W16A16SReport",
    "check_adapter",
    "check_onnx",
    "check_served",
    "load_w8a8s",
    "load_w16a16s",
    "padded_waste",
    "target",
]
