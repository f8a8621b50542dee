"""The multilayer perceptron of Multi-Color MNIST."""

from torch import Tensor, nn


class MLP(nn.Module):
    """Three hidden layers with ReLU, 2352-100-100-100-10 by default (Table 8 of the FFW paper).

    Its bottleneck is the output of ``relu3``, the last hidden activation.
    """

    def __init__(self, in_features: int = 3 * 28 * 28, hidden: int = 100, num_classes: int = 10) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(in_features, hidden)
        self.relu1 = nn.ReLU()
        self.fc2 = nn.Linear(hidden, hidden)
        self.relu2 = nn.ReLU()
        self.fc3 = nn.Linear(hidden, hidden)
        self.relu3 = nn.ReLU()
        self.classifier = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """From float (n, ...) with ``in_features`` numbers a sample to logits (n, num_classes)."""
        x = self.relu1(self.fc1(self.flatten(x)))
        x = self.relu2(self.fc2(x))
        x = self.relu3(self.fc3(x))
        return self.classifier(x)
