"""Extraction on networks that are not ours: residuals, depthwise convolutions, GELU, layer norm, attention, mixers.

They need torchvision and timm, which nothing else does:
``pip install torchvision timm && pytest tests/test_foreign_networks.py``.
"""

import pytest
import torch
from torch import nn

import ffw_fast
from ffw_fast import reference
from ffw_fast.masking import maskable_layers
from ffw_fast.models import ResNet18

torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
timm = pytest.importorskip("timm", reason="timm is not installed")

CLASSES, SIDE = 3, 32


def small_convnext() -> nn.Module:
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    return ConvNeXt([CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)], num_classes=CLASSES)


def small_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(
        image_size=SIDE, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=CLASSES
    )


def small_mixer() -> nn.Module:
    from timm.models.mlp_mixer import MlpMixer

    return MlpMixer(num_classes=CLASSES, img_size=SIDE, patch_size=8, num_blocks=2, embed_dim=16)


NETWORKS = {  # the network, and the module that its classifier reads
    "torchvision resnet18": (lambda: torchvision.models.resnet18(num_classes=CLASSES), "avgpool"),
    "torchvision mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=CLASSES), "avgpool"),
    "torchvision ConvNeXt": (small_convnext, "avgpool"),
    "torchvision VisionTransformer": (small_vit, "encoder.ln"),
    "timm efficientnet": (lambda: timm.create_model("test_efficientnet", num_classes=CLASSES), "global_pool"),
    "timm MlpMixer": (small_mixer, "norm"),
    "timm convnext": (lambda: timm.create_model("test_convnext", num_classes=CLASSES), "head.global_pool"),
    "timm vit": (lambda: timm.create_model("test_vit", num_classes=CLASSES, img_size=SIDE), "norm"),
}


def made(name: str) -> tuple[nn.Module, str]:
    """The network in double precision, so that rounding decides no gate; its batch norms have seen some data."""
    make, bottleneck = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make().double()
        model(biased_set(16, 3)[0])
        for parameter in model.parameters():  # layer scale and the like start so small that nothing would be learned
            if parameter.dim() != 2 and parameter.abs().max() < 1e-2:
                nn.init.uniform_(parameter, -0.5, 0.5)
    return model.eval(), bottleneck


def biased_set(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    source = torch.Generator().manual_seed(seed)
    y, b = torch.randint(CLASSES, (2, count), generator=source)
    x = torch.randn(count, 3, SIDE, SIDE, generator=source, dtype=torch.float64)
    x[:, 0] += y.view(-1, 1, 1)
    x[:, 1] += b.view(-1, 1, 1)
    return x, y, b


@pytest.fixture(autouse=True)
def one_thread(restore_threads):
    torch.set_num_threads(1)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "torchvision resnet18"])  # too large for it
def test_it_is_extracted_as_by_the_reference(name):
    model, bottleneck = made(name)
    train, val = biased_set(18, 1), biased_set(12, 2)
    arguments = {
        "bottleneck": bottleneck, "num_bias_classes": CLASSES, "batch_size": 6, "max_epochs": 2, "progress": False,
    }  # fmt: skip
    found = ffw_fast.extract(model, train, val, **arguments)
    plain = reference.extract(model, train, val, **arguments)
    assert list(found.scores) == list(maskable_layers(model))
    ours, theirs = (torch.cat([score.flatten() for score in one.scores.values()]) for one in (found, plain))
    assert theirs.norm() > 0
    # Adam's first steps are signs, and the private heads compute in single precision: a gradient near 0 may take both.
    assert not (ours - theirs).norm() > 0.02 * theirs.norm()
    assert ((ours >= 0) == (theirs >= 0)).double().mean() >= 0.995

    pruned = found.model()
    assert 0 < found.metrics["pruned"]["sparsity"] < 1
    assert type(pruned) is type(model)
    for layer, mask in found.masks.items():
        assert not pruned.get_submodule(layer).weight[~mask].any()
    with torch.no_grad():
        accuracy = (pruned(val[0]).argmax(1) == val[1]).double().mean().item()
    assert accuracy == pytest.approx(found.metrics["pruned"]["task_accuracy"], abs=1 / 12 + 1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_masked_layers_stand_in_for_its_own(name):
    model, _ = made(name)
    for parameter in model.parameters():
        if not parameter.any():  # classifiers that start at 0 let no gradient through
            nn.init.normal_(parameter)
    x = biased_set(4, 5)[0]
    with torch.no_grad():
        expected = model(x)
    masked = ffw_fast.mask_model(model)
    torch.testing.assert_close(masked(x), expected)  # every gate is open at the start
    masked(x).square().sum().backward()
    layers = ffw_fast.masked_layers(masked)
    assert all(layer.scores.grad is not None for layer in layers.values())
    assert sum(bool(layer.scores.grad.any()) for layer in layers.values()) > 0.5 * len(layers)


@pytest.mark.parametrize("classes", [2, 1000])
def test_resnet18_takes_torchvisions_state_dict_and_gives_the_same_logits(classes):
    theirs = torchvision.models.resnet18(num_classes=classes).eval()
    ours = ResNet18(classes).eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))
