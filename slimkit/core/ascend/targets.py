"""The Ascend targets: what the public documents say of each, with the document named. Nothing here was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from slimkit.core import check

_DOCS = "https://www.hiascend.com/document/detail"

# The cube unit takes 32 bytes of each of 16 rows at a time, hence (16, 32 bytes / size of an entry).
BLOCK_ROWS = 16
_BLOCK_BYTES = 32
ITEM_BYTES: Mapping[str, int] = MappingProxyType({"float16": 2, "bfloat16": 2, "float32": 4, "int8": 1, "uint8": 1})


@dataclass(frozen=True)
class Source:
    """A public document and what it says.

    Args:
        says: the fact, in our words.
        url: where it stands.
    """

    says: str
    url: str


@dataclass(frozen=True)
class AscendTarget:
    """One family of Ascend devices as its documentation describes it.

    Args:
        name: "310P", "A2" or "A3".
        products: what the family is sold as.
        soc_version: the chip that the `atc` line names unless another is asked for.
        sparsity: the zeros that the hardware can use: "unstructured" or "4:2".
        row_bytes: rows of matrices in memory are best a multiple of this many bytes; None where no document says so.
        refused_dtypes: dtype -> why the device cannot compute in it.
        sources: topic -> the document.
    """

    name: str
    products: str
    soc_version: str
    sparsity: str
    row_bytes: int | None
    refused_dtypes: Mapping[str, str]
    sources: Mapping[str, Source] = field(repr=False)

    def block(self, dtype: str) -> tuple[int, int] | None:
        """Rows (output channels) and columns (input channels, also called C0) of one block; None for other dtypes.

        Example:
            >>> target("A2").block("int8")
            (16, 32)
        """
        size = ITEM_BYTES.get(dtype)
        return None if size is None else (BLOCK_ROWS, _BLOCK_BYTES // size)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "products": self.products,
            "soc_version": self.soc_version,
            "sparsity": self.sparsity,
            "row_bytes": self.row_bytes,
            "blocks": {dtype: list(self.block(dtype) or ()) for dtype in ITEM_BYTES},
            "refused_dtypes": dict(self.refused_dtypes),
            "sources": {topic: {"says": s.says, "url": s.url} for topic, s in self.sources.items()},
        }


_SHARED = {
    "blocks": Source(
        "matrices lie in memory as blocks of 16 rows by 32 bytes: 16x16 entries in float16, 16x32 in int8, 16x8 in "
        "float32; a last block that is not full is padded",
        f"{_DOCS}/en/canncommercial/850/graph/graphdevg/atlas_ascendc_10_0099.html",
    ),
    "channels": Source(
        "NC1HWC0: channels are cut into pieces of C0, the width of the cube unit; the last piece is padded",
        f"{_DOCS}/en/canncommercial/850/API/appdevgapi/aclcppdevg_03_1348.html",
    ),
    "precision": Source(
        "atc computes in float16 unless asked otherwise, wherever an operator offers both",
        "https://www.hiascend.com/doc_center/source/zh/CANNCommunityEdition/80RC1alpha002/devaids/auxiliarydevtool/atlasatc_16_0098.html",
    ),
    "inputs": Source(
        "inputs of an ONNX model are float32, float16 or, through --insert_op_conf, uint8; no axis may have length 0; "
        "a quantized model takes no dynamic shapes",
        "https://hiascend.com/document/detail/zh/canncommercial/80RC3/devaids/devtools/atc/atlasatc_16_0039.html",
    ),
    "bfloat16": Source(
        "casts to bfloat16 exist on A2 and A3 products and not on Atlas inference products",
        f"{_DOCS}/en/CANNCommunityEdition/900/API/ascendcopapi/atlasascendc_api_07_0021.html",
    ),
}
_SPARSITY_42 = Source(
    "--sparsity=1: of four neighbouring input channels at least two weights are zero; for A2 and A3 products, "
    "not for Atlas inference products",
    f"{_DOCS}/en/canncommercial/850/devaids/atctool/atlasatcparam_16_0061.html",
)
_SPARSITY_RULE = Source(
    "the fusion behind --sparsity=1 takes Conv2D, FullyConnection and MatMulV2 with int8 or uint8 inputs, no groups",
    f"{_DOCS}/zh/CANNCommunityEdition/81RC1alpha002/devguide/moddevg/graphubfusionref/atlasrr_30_0035.html",
)
_ROWS = Source(
    "moving data from an address that is a multiple of 512 bytes reaches the full bandwidth, from a multiple of 32 "
    "bytes as little as 70 % of it; the document names A2 products",
    f"{_DOCS}/en/canncommercial/850/opdevg/Ascendcopdevg/atlas_ascendc_best_practices_10_0014.html",
)
_SOC = Source(
    "npu-smi info shows the name of the chip for --soc_version",
    f"{_DOCS}/zh/CANNCommunityEdition/900beta2/appdevg/acldevg/aclpythondevg_0030.html",
)
# What is known of the targets that drop two of four weights.
_SOURCES_42 = MappingProxyType(
    {
        **_SHARED,
        "rows": _ROWS,
        "sparsity": _SPARSITY_42,
        "sparsity-rule": _SPARSITY_RULE,
        "soc_version": _SOC,
    }
)

TARGETS: Mapping[str, AscendTarget] = MappingProxyType(
    {
        "310P": AscendTarget(
            name="310P",
            products="Atlas inference products: Atlas 300I Pro, 300V, 300I Duo",
            soc_version="Ascend310P3",
            sparsity="unstructured",
            row_bytes=None,
            refused_dtypes=MappingProxyType({"bfloat16": "the 310P does not compute in bfloat16"}),
            sources=MappingProxyType(
                {
                    **_SHARED,
                    "sparsity": Source(
                        "float16 weights with zeros anywhere are compressed for, and unpacked by, the Atlas 300I Duo "
                        "(W16A16S, then W16A16SC)",
                        f"{_DOCS}/zh/mindie/230/mindiellm/llmdev/mindie_llm0529.html",
                    ),
                    "atc-sparsity": _SPARSITY_42,
                    "soc_version": _SOC,
                }
            ),
        ),
        "A2": AscendTarget(
            name="A2",
            products="Atlas A2 training and inference products: Atlas 800T A2, 800I A2, 300I A2",
            soc_version="Ascend910B3",
            sparsity="4:2",
            row_bytes=512,
            refused_dtypes=MappingProxyType({}),
            sources=_SOURCES_42,
        ),
        "A3": AscendTarget(
            name="A3",
            products="Atlas A3 training and inference products: Atlas 900 A3, 800T A3, 800I A3",
            soc_version="Ascend910_9391",
            sparsity="4:2",
            # The document speaks of A2; A3 is treated alike, and the findings are hints only.
            row_bytes=512,
            refused_dtypes=MappingProxyType({}),
            sources=_SOURCES_42,
        ),
    }
)


def target(name: str | AscendTarget) -> AscendTarget:
    """The target of that name, in any letter case.

    Args:
        name: "310P", "A2" or "A3", or an AscendTarget, which comes back as it is.

    Returns:
        The target.

    Raises:
        ArgumentTypeError: neither a str nor an AscendTarget.
        ArgumentError: no such target.

    Example:
        >>> target("310p").soc_version
        'Ascend310P3'
    """
    if isinstance(name, AscendTarget):
        return name
    return TARGETS[check.choice(check.text(name, "target").upper(), TARGETS, "target")]
