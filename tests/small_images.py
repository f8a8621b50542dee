"""A biased task on images of 8 x 8 pixels: shape tells the target, colour tells the biases."""

import torch
from torch import Tensor, nn

CLASSES = 4
BOTTLENECK = "flatten"
SETTINGS = {"bottleneck": BOTTLENECK, "num_bias_classes": CLASSES, "batch_size": 50, "progress": False}


def biased_set(count: int, biases: int = 1, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """x (count, 3, 8, 8), y (count,), b (count, biases); target and biases independent."""
    source = torch.Generator().manual_seed(seed)
    y = torch.randint(CLASSES, (count,), generator=source)
    b = torch.randint(CLASSES, (count, biases), generator=source)
    x = 0.3 * torch.randn(count, 3, 8, 8, generator=source)
    patterns = torch.randn(CLASSES, 1, 8, 8, generator=torch.Generator().manual_seed(99))
    colors = torch.randn(CLASSES, 3, 1, 1, generator=torch.Generator().manual_seed(98))
    x += patterns[y]
    for index in range(biases):
        columns = slice(None) if biases == 1 else slice(4 * index, 4 * index + 4)
        x[..., columns] += colors[b[:, index]]
    return x, y, b


def network(norm: bool = True, seed: int = 0) -> nn.Sequential:
    """A small convolutional network that was trained for a moment, so that its batch norms have statistics."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential()
        model.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        model.norm1 = nn.BatchNorm2d(8) if norm else nn.Identity()
        model.relu1 = nn.ReLU()
        model.conv2 = nn.Conv2d(8, 12, 3, stride=2, bias=False)
        model.norm2 = nn.BatchNorm2d(12) if norm else nn.Identity()
        model.relu2 = nn.ReLU()
        model.pool = nn.AdaptiveAvgPool2d(2)
        model.flatten = nn.Flatten()
        model.classifier = nn.Linear(48, CLASSES)
        x, y, _b = biased_set(400, seed=seed)
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for _ in range(20):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model.eval()


class Block(nn.Module):
    """A residual block whose one ReLU runs twice, as in torchvision."""

    def __init__(self, inner: int, outer: int, shortcut: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.bn2 = nn.Conv2d(outer, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Sequential(nn.Conv2d(inner, outer, 1), nn.BatchNorm2d(outer)) if shortcut else None

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.shortcut is None else self.shortcut(x)
        return self.relu(out)
