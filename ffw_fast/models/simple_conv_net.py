"""The convolutional network of Biased-MNIST."""

from torch import Tensor, nn


class SimpleConvNet(nn.Module):
    """Four 7x7 convolutions with 16, 32, 64 and 128 channels (Table 8 of the FFW paper).

    Batch norm and ReLU follow each of them, tanh the last one. Images keep their height and width until the
    global average pool. Its bottleneck is the output of ``flatten``, the 128 pooled features.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, kernel_size=7, padding=3)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(16, 32, kernel_size=7, padding=3)
        self.bn2 = nn.BatchNorm2d(32)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(32, 64, kernel_size=7, padding=3)
        self.bn3 = nn.BatchNorm2d(64)
        self.relu3 = nn.ReLU()
        self.conv4 = nn.Conv2d(64, 128, kernel_size=7, padding=3)
        self.bn4 = nn.BatchNorm2d(128)
        self.tanh = nn.Tanh()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.classifier = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """From float (n, 3, h, w) to logits (n, num_classes)."""
        x = self.relu1(self.bn1(self.conv1(x)))
        x = self.relu2(self.bn2(self.conv2(x)))
        x = self.relu3(self.bn3(self.conv3(x)))
        x = self.tanh(self.bn4(self.conv4(x)))
        return self.classifier(self.flatten(self.pool(x)))
