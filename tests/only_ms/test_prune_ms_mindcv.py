"""Pruning mindcv's models, in small: all hit the target, run in both modes and go on training."""

from __future__ import annotations

import numpy as np
import pytest

from slimkit_ms.prune import PruneMindSpore
from tests import zoo_ms

import mindspore as ms
from mindspore import nn, ops


@pytest.fixture(autouse=True, scope="module")
def _mindspore():
    ms.set_device("CPU")
    ms.runtime.launch_blocking()


def resnet():
    from mindcv.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10)


def densenet():
    from mindcv.models.densenet import DenseNet

    return DenseNet(growth_rate=16, block_config=(2, 2), num_init_features=32, num_classes=10)


def mobilenet():
    from mindcv.models.mobilenetv2 import MobileNetV2

    return MobileNetV2(alpha=0.25, num_classes=10)


def vgg():
    from mindcv.models import vgg

    # VGG-11 at a quarter of its width; a classifier that reads 32 instead of 224 pixels.
    vgg.cfgs["quarter"] = [n if n == "M" else n // 4 for n in vgg.cfgs["vgg11"]]
    net = vgg.VGG("quarter", batch_norm=True, num_classes=10)
    net.classifier = nn.SequentialCell(nn.Dense(128, 64), nn.ReLU(), nn.Dense(64, 10))
    net.update_parameters_name("")
    return net


def efficientnet():
    from mindcv.models.efficientnet import EfficientNet, MBConvConfig

    rows = [MBConvConfig(1, 3, 1, 16, 16, 1), MBConvConfig(4, 3, 2, 16, 32, 2), MBConvConfig(4, 5, 2, 32, 48, 1)]
    return EfficientNet("efficientnet_b0", 0.2, num_classes=10, inverted_residual_setting=rows, drop_path_prob=0.0)


def convnext():
    from mindcv.models.convnext import ConvNeXt

    return ConvNeXt(in_channels=3, num_classes=10, depths=[1, 1, 1, 1], dims=[32, 64, 96, 128])


def vit():
    from mindcv.models.vit import VisionTransformer

    return VisionTransformer(image_size=32, patch_size=8, num_classes=10, embed_dim=96, depth=2, num_heads=6)


def swin():
    from mindcv.models.swintransformer import SwinTransformer

    return SwinTransformer(
        image_size=32, patch_size=2, num_classes=10, embed_dim=48, depths=[1, 2], num_heads=[3, 6], window_size=4
    )


# name -> (model, image size, share of parameters asked for, un_prune_list)
NETS = {
    "resnet": (resnet, 32, 0.5, [0, -1]),
    "densenet": (densenet, 32, 0.5, [0, -1]),
    "mobilenet": (mobilenet, 32, 0.5, [0, -1]),
    "vgg": (vgg, 32, 0.5, [0, -1]),
    "efficientnet": (efficientnet, 32, 0.5, [0, -1]),
    "convnext": (convnext, 32, 0.5, [0, -1]),
    "vit": (vit, 32, 0.7, [-1]),
    "swin": (swin, 32, 0.8, [-1]),
}


def count(model):
    """Weights, those that do not train included; no running statistics."""
    return sum(p.size for p in model.get_parameters() if p.is_floating_point() and "moving_" not in p.name)


@pytest.mark.parametrize("name", list(NETS))
def test_pruned(name):
    make, size, ratio, un_prune = NETS[name]
    model, x = make(), zoo_ms.images(2, 3, size, size)
    model.set_train(False)
    before, shape = count(model), model(x).shape
    pruner = PruneMindSpore(model, x).set_alignment(8)
    left, desc = pruner.analysis(ratio, un_prune)
    assert count(model) == before
    pruner.prune_by_desc(desc)
    assert count(model) == left
    assert abs(left / before - ratio) <= 0.03, pruner.report()["whole"]
    eager = model(x)
    assert eager.shape == shape
    ms.set_context(mode=ms.GRAPH_MODE)
    try:
        # float32, twenty layers deep; the compiler orders sums in its own way
        np.testing.assert_allclose(model(x).asnumpy(), eager.asnumpy(), atol=1e-4)
    finally:
        ms.set_context(mode=ms.PYNATIVE_MODE)
    weights = model.trainable_params()
    gradients = ms.grad(lambda a: ops.mean(ops.square(model(a))), None, weights)(x)
    assert all(g.shape == p.shape and np.isfinite(g.asnumpy()).all() for g, p in zip(gradients, weights))
