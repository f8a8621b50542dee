"""Networks as users write them: what they overwrite, tie, hook or keep changes neither results nor their own data."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ffw_fast import evaluate, extract, mask_model, reference
from ffw_fast.convolutions import cheapest_convolutions, fft
from ffw_fast.extraction import Extraction

CLASSES = 3


def samples(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x (count, 1, 8, 8), y (count,), b (count,)."""
    source = torch.Generator().manual_seed(seed)
    y, b = torch.randint(CLASSES, (2, count), generator=source)
    return torch.randn(count, 1, 8, 8, generator=source), y, b


TRAIN, VAL = samples(60, 1), samples(40, 2)
SETTINGS: dict[str, Any] = {"num_bias_classes": CLASSES, "max_epochs": 2, "batch_size": 20, "progress": False}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # data of noise makes much doubtful


def found_in(model: nn.Module, train=TRAIN, **settings: Any) -> Extraction:
    return extract(model, train, VAL, **SETTINGS, **settings)


def assert_held_to_the_reference(model: nn.Module, train=TRAIN, **settings: Any) -> None:
    ours = found_in(model, train, **settings)
    theirs = reference.extract(model, train, VAL, **SETTINGS, **settings)
    for name, scores in theirs.scores.items():
        assert scores.abs().max() > 1e-3
        assert (ours.scores[name] - scores).abs().max() < 1e-5


def perceptron(*first: nn.Module, hidden: nn.Module | None = None) -> nn.Sequential:
    """Two hidden layers; its bottleneck is "last", the second one's ReLU."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *first, nn.Linear(64, 16), hidden or nn.ReLU(), nn.Linear(16, 8))
    model.last, model.classifier = nn.ReLU(), nn.Linear(8, CLASSES)
    return model


class Functions(nn.Module):
    """The same with a forward pass of its own, whose bottleneck is "last"."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.classifier = nn.Linear(64, 16), nn.Linear(16, 8), nn.Linear(8, CLASSES)
        self.relu, self.last = nn.ReLU(), nn.ReLU()

    def hidden(self, x: Tensor) -> Tensor:
        return self.relu(self.first(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.last(self.second(self.hidden(x))))


# What works in place --------------------------------------------------------------------------------------------------


class Standardised(Functions):
    def forward(self, x: Tensor) -> Tensor:
        x -= 0.3
        x *= 0.7
        return super().forward(x)


OVERWRITING = {
    "a module": lambda: perceptron(nn.LeakyReLU(0.2, inplace=True)),
    "statements": Standardised,
}


@pytest.mark.parametrize("make", OVERWRITING.values(), ids=OVERWRITING)
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_network_that_overwrites_its_input(make, granularity):
    model, kept = make(), [x.clone() for x, *_ in (TRAIN, VAL)]
    accuracies = {evaluate(model, VAL).average for _ in range(3)}
    assert_held_to_the_reference(model, bottleneck="last", granularity=granularity)
    found_in(model, bottleneck="last").finetune(TRAIN, VAL, epochs=1)
    assert len(accuracies) == 1
    assert all(torch.equal(x, before) for (x, *_), before in zip((TRAIN, VAL), kept, strict=True))


class Clipped(Functions):
    """Overwrites its input where that is large, and is no function of it that could be traced."""

    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 8:
            x.mul_(8 / x.max())
        return super().forward(x)


def test_a_network_that_overwrites_some_batches_only():
    x, y, b = samples(700, 3)
    x[600] = 9
    kept, model = x.clone(), Clipped()
    assert len({evaluate(model, (x, y, b)).average for _ in range(2)}) == 1
    found_in(model, (x, y, b), bottleneck="last").finetune((x, y, b), VAL, epochs=1)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("activation", [nn.SiLU, nn.LeakyReLU, nn.ELU, nn.Hardswish])
def test_channel_gates_behind_a_non_linearity_that_works_in_place(activation):
    model = perceptron(hidden=activation(inplace=True))
    assert_held_to_the_reference(model, bottleneck="last", granularity="channel")


def test_channel_gates_behind_a_statement_that_works_in_place():
    class Shifted(Functions):
        def hidden(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1))
            h.add_(1.0)
            return self.relu(h)

    assert_held_to_the_reference(Shifted(), bottleneck="last", granularity="channel", where="second")


def test_a_non_linearity_as_a_statement_has_no_gate_of_its_own():
    class Statement(Functions):
        def hidden(self, x: Tensor) -> Tensor:
            h = self.first(x.flatten(1))
            F.relu_(h)
            return h

    assert list(found_in(Statement(), bottleneck="last", granularity="channel").scores) == ["second"]


class Encoder(nn.Module):
    """Its bottleneck is a container, "encoder", which a ReLU follows."""

    def __init__(self, *last: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Flatten(), nn.Linear(64, 2), *last)
        self.relu, self.classifier = nn.ReLU(), nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.relu(self.encoder(x)))


class Sum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x


@pytest.mark.parametrize("last", [[], [Sum()], [nn.BatchNorm1d(2)]], ids=["a layer", "a sum", "a batch norm"])
def test_what_a_container_gives_stays_as_it_is(last):
    """On the first samples, by which simplifications are checked, a ReLU that overwrites it changes nothing."""
    model = Encoder(*last).eval()
    x, y, b = TRAIN
    with torch.no_grad():
        order = model.encoder(x).amin(1).argsort(descending=True)
        train = x[order], y[order], b[order]
        model.encoder[1].bias -= model.encoder(train[0])[:8].amin(0) - 0.01
        if last and isinstance(last[0], Sum):
            model.encoder[1].bias += 2 * model.encoder(train[0])[:8].amin(0).abs()
    assert_held_to_the_reference(model, train, bottleneck="encoder")


# What is tied, hooked, kept -------------------------------------------------------------------------------------------


def test_a_weight_that_is_also_read_by_itself():
    class Tied(Functions):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(64, 64)
            self.weight, self.second = self.first.weight, nn.Linear(64, 8)

        def hidden(self, x: Tensor) -> Tensor:
            return self.relu(F.linear(self.first(x.flatten(1)), self.weight))

    assert_held_to_the_reference(Tied(), bottleneck="last")


@pytest.mark.parametrize("make", [perceptron, Functions], ids=["modules", "functions"])
@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_hooks_of_the_whole_model(make, granularity):
    model = make()
    model.register_forward_pre_hook(lambda _module, inputs: (inputs[0] * 3 - 1,))
    model.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    assert_held_to_the_reference(model, bottleneck="last", granularity=granularity)


def test_hooks_that_read_gradients():
    model = perceptron()
    model[1].register_full_backward_hook(lambda _module, _inputs, _outputs: None)
    assert_held_to_the_reference(model, bottleneck="last")


@pytest.mark.parametrize("wrapped", [lambda output: output, lambda output: {"features": [output]}])
def test_a_model_that_keeps_an_output(wrapped):
    class Keeping(Functions):
        def hidden(self, x: Tensor) -> Tensor:
            output = super().hidden(x)
            self.kept = wrapped(output)
            return output

    model = Keeping()
    found = found_in(model, bottleneck="last")
    expected = found.model()(VAL[0])
    model(VAL[0]).sum().backward()
    assert torch.equal(found.model()(VAL[0]), expected)
    assert_held_to_the_reference(model, bottleneck="last")
    assert not evaluate(model, VAL).average < 0


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_part_that_was_scripted():
    model = Functions()
    model.relu = torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))
    found = found_in(model, bottleneck="last")
    assert any("'relu.0.weight' (RecursiveScriptModule) have no gates" in text for text in found.warnings)
    found.finetune(TRAIN, VAL, epochs=1)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_a_model_keeps_beside_parameters(tmp_path):
    class Keeping(Functions):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("sparse", torch.eye(3).to_sparse())

        def get_extra_state(self) -> dict[str, int]:
            return {"version": 3}

        def set_extra_state(self, state: dict[str, int]) -> None:
            assert state == {"version": 3}

    model = Keeping()
    found = found_in(model, bottleneck="last", run_dir=tmp_path)
    found.save(tmp_path)
    loaded = Extraction.load(tmp_path, model)
    assert torch.equal(loaded.model()(VAL[0]), found.model()(VAL[0]))


# Modes ----------------------------------------------------------------------------------------------------------------


MODES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_the_caller_s_modes_change_nothing(mode):
    expected = found_in(perceptron(), bottleneck="last")
    with mode():
        found = found_in(perceptron(), bottleneck="last")
        tuned = found.finetune(TRAIN, VAL, epochs=1, gamma=1.0)
        plain = reference.extract(perceptron(), TRAIN, VAL, **SETTINGS, bottleneck="last")
    for name, scores in expected.scores.items():
        assert torch.equal(found.scores[name], scores)
        assert (plain.scores[name] - scores).abs().max() < 1e-5
    again = expected.finetune(TRAIN, VAL, epochs=1, gamma=1.0)
    assert all(torch.equal(a, b) for a, b in zip(tuned.parameters(), again.parameters(), strict=True))


def test_a_model_in_train_mode_whose_functions_are_told_so():
    class Dropping(Functions):
        def hidden(self, x: Tensor) -> Tensor:
            h = torch.sigmoid(self.first(x.flatten(1)))
            return F.dropout(h, 0.5, self.training)

    found = found_in(Dropping().train(), bottleneck="last", granularity="channel")
    found.scores["first"][:5] = -1
    for network in (found.model(), mask_model(Dropping().train(), granularity="channel").eval()):
        assert torch.equal(network(VAL[0]), network(VAL[0]))


def test_evaluation_ends_in_the_mode_of_before_by_the_model_s_own_means():
    class Merging(Functions):
        merged = False

        def train(self, mode: bool = True):
            self.merged = not mode
            return super().train(mode)

    model = Merging().train()
    evaluate(model, VAL)
    found_in(model, bottleneck="last")
    assert model.training and not model.merged


class Listed(Functions):
    """Reaches its layers past its children."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = [self.first, self.relu, (self.second.forward, {"last": self.last})]

    def forward(self, x: Tensor) -> Tensor:
        first, relu, (second, others) = self.steps
        return self.classifier(others["last"](second(relu(first(x.flatten(1))))))


@pytest.mark.parametrize("granularity", ["weight", "channel"])
def test_a_network_that_keeps_its_layers_in_a_list(granularity):
    model = Listed()
    assert_held_to_the_reference(model, bottleneck="last", granularity=granularity)
    found = found_in(model, bottleneck="last", granularity=granularity)
    for scores in found.scores.values():
        scores.fill_(-1)
    logits = found.model()(VAL[0])
    assert torch.equal(logits, logits[:1].expand_as(logits)), "all gates are shut"


def test_masked_layers_cannot_take_the_place_of_listed_ones():
    with pytest.raises(ValueError, match=r"layer 'first' is held by the attribute Listed\.steps too"):
        mask_model(Listed())
    masked = mask_model(Listed(), granularity="channel")
    for scores in masked.parameters():
        if scores.requires_grad:
            scores.data.fill_(-1e3)
    logits = masked(VAL[0])
    torch.testing.assert_close(logits, logits[:1].expand_as(logits))


class Counting(Functions):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


def test_buffers_that_a_forward_pass_changes_stay_as_they_were():
    model = Counting()
    found_in(model, bottleneck="last")
    assert model.calls == 0


class OwnLinear(nn.Linear):
    pass


class Transposed(nn.ConvTranspose1d):
    """A layer with a parameter beside its weight, and a scale of channels that is none of its weights."""

    def __init__(self) -> None:
        super().__init__(1, 1, 1)
        self.table, self.scale = nn.Parameter(torch.ones(64, 1).T.repeat(2, 1)), nn.Parameter(torch.ones(1, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.unsqueeze(1)).squeeze(1) * self.table.mean(0)


@pytest.mark.parametrize(
    ("layer", "named"), [(OwnLinear(64, 64), "'1.weight' (OwnLinear)"), (Transposed(), "'1.table' (Transposed)")]
)
def test_weights_without_gates_are_pointed_out(layer, named):
    found = found_in(perceptron(layer), bottleneck="last")
    assert any(text.startswith(f"the weights {named} have no gates and stay as they are") for text in found.warnings)
    assert not any("have no gates" in text for text in found_in(perceptron(), bottleneck="last").warnings)


def test_a_model_of_weights_that_cannot_be_gated():
    with pytest.raises(ValueError, match=r"no Conv or Linear layer, only weights of other.*: '0.weight' \(OwnLinear\)"):
        mask_model(nn.Sequential(OwnLinear(2, 2)))


def test_fine_tuning_leaves_no_hooks_and_the_flags_as_they_were():
    model = perceptron()
    model[1].weight.requires_grad_(False)
    tuned = found_in(model, bottleneck="last").finetune(TRAIN, VAL, epochs=1)
    flags = {name: parameter.requires_grad for name, parameter in tuned.named_parameters()}
    assert flags == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert not any(parameter._backward_hooks for parameter in tuned.parameters())
    assert not any(module._forward_hooks for module in tuned.modules())


# Shapes and memory ----------------------------------------------------------------------------------------------------


def test_the_shape_of_a_sample_is_that_of_the_given_ones():
    pytest.importorskip("torch_pruning")
    found = found_in(perceptron(), bottleneck="last", granularity="channel")
    assert found.input_shape == (1, 8, 8)
    x = VAL[0]
    torch.testing.assert_close(found.model(compact=True)(x), found.model()(x))


def test_a_convolution_that_is_called_by_name():
    class Named(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            first, *others = self
            x = first(input=x)
            for layer in others:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Named(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    assert_held_to_the_reference(model, bottleneck="2")


def test_an_input_that_overflows_in_the_network_is_told():
    x, y, b = TRAIN
    large = x.clone()
    large[3] = 3e38
    model = perceptron()
    with torch.no_grad():
        model[1].weight *= 100
    assert model(large[3:4]).isnan().all() and not model(large[:3]).isnan().any()
    with pytest.raises(FloatingPointError, match="no longer finite"):
        found_in(model, (large, y, b), bottleneck="last")


def test_memory_for_spectra_is_given_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 7, padding=3), nn.ReLU(), nn.Conv2d(8, 8, 7, padding=3), nn.ReLU())
    model.pool, model.flatten, model.classifier = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)
    found_in(model, bottleneck="flatten")
    assert not fft._free_memory
    x = torch.randn(20, 1, 28, 28)
    with cheapest_convolutions(model, x[:2]):
        model(x).sum().backward()
    assert not fft._free_memory
