"""What users hand in: every layout that is read, and everything about data and models that is refused."""

import subprocess
import sys
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    TensorDataset,
)

from ffw_fast import inputs
from ffw_fast.data.samples import Samples
from ffw_fast.inputs import as_samples, check_layers, check_model, prepare
from ffw_fast.masking import mask_model
from ffw_fast.settings import Settings
from tests.six_features import BOTTLENECK, CLASSES, network, samples

SETTINGS = Settings(bottleneck=BOTTLENECK, num_bias_classes=CLASSES)


class Items(Dataset):
    """The given samples, each in the layout that a function gives it."""

    def __init__(self, data, layout=lambda index, x, y, b: (x, y, b)):
        self.data, self.layout = data, layout

    def __len__(self):
        return len(self.data[1])

    def __getitem__(self, index):
        return self.layout(index, *(part[index] for part in self.data))


class Stream(IterableDataset):
    def __init__(self, data):
        self.data = data

    def __iter__(self):
        return iter(zip(*self.data, strict=True))


LAYOUTS = {
    "x, (y, b...)": lambda index, x, y, b: (x, (int(y), *map(int, b))),
    "x, (y, b)": lambda index, x, y, b: (x, (y, b)),
    "x, y, b": lambda index, x, y, b: (x, y, b),
    "x, y, b as numbers": lambda index, x, y, b: (x.numpy(), int(y), int(b[0])),
    "index, x, y, attributes": lambda index, x, y, b: (index, x, y, b),
    "list": lambda index, x, y, b: [x, y, b],
}


def read(data, classes=CLASSES):
    return as_samples(data, "train", classes)


def assert_equal(given: Samples, data) -> None:
    x, y, b = data
    assert torch.equal(given.x, x)
    assert torch.equal(given.y, y)
    assert torch.equal(given.b, b)
    assert (given.x.dtype, given.y.dtype, given.b.dtype) == (torch.float32, torch.int64, torch.int64)


# what is read --------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5), st.integers(0, 3), st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]))
def test_tensors(count, biases, dtype):
    x, y, b = samples(count, max(biases, 1))
    given = read((x, y.to(dtype), (b if biases else b[:, 0]).to(dtype)))
    assert_equal(given, (x, y, b))


@pytest.mark.parametrize("biases", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: DataLoader(data, batch_size=7)])
def test_datasets_and_loaders_in_every_layout(layout, biases, wrap):
    data = samples(20, biases)
    if layout.endswith("numbers"):
        data = (*data[:2], data[2][:, :1])
    assert_equal(read(wrap(Items(data, LAYOUTS[layout]))), data)


def test_whatever_is_indexed_and_sized_is_a_dataset():
    class Plain:
        __len__, __getitem__ = Items.__len__, Items.__getitem__
        data, layout = samples(20), staticmethod(LAYOUTS["x, y, b"])

    assert_equal(read(Plain()), Plain.data)
    assert_equal(read(TensorDataset(*Plain.data)), Plain.data)
    assert_equal(read(list(zip(*Plain.data, strict=True))), Plain.data)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: DataLoader(data, batch_size=7)])
def test_streams_are_read_once(wrap):
    data = samples(20)
    assert_equal(read(wrap(Stream(data))), data)


def test_shuffled_loader_gives_all_samples_in_the_same_order_each_time():
    data = samples(50)
    data[0][:, 0] = torch.arange(50)
    state = torch.get_rng_state()
    given = read(DataLoader(Items(data), batch_size=8, shuffle=True))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1234)
    again = read(DataLoader(Items(data), batch_size=8, shuffle=True))
    torch.set_rng_state(state)
    assert torch.equal(given.x, again.x)
    order = given.x[:, 0].long()
    assert sorted(order.tolist()) == list(range(50))
    assert_equal(given, tuple(part[order] for part in data))


def loader_of_an_own_generator(data, source):
    return DataLoader(data, batch_size=8, shuffle=True, generator=source)


def loader_of_a_sampler(data, source):
    return DataLoader(data, batch_size=8, sampler=SubsetRandomSampler(range(50), generator=source))


def loader_of_a_sampler_of_batches(data, source):
    return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data, generator=source), 8, drop_last=False))


def loader_of_single_samples(data, source):
    shuffled = BatchSampler(RandomSampler(data, generator=source), 8, drop_last=False)
    return DataLoader(data, batch_size=None, sampler=shuffled)


def loader_that_keeps_its_workers(data, source):
    return DataLoader(data, batch_size=8, shuffle=True, num_workers=2, persistent_workers=True)


@pytest.mark.parametrize(
    "make",
    [
        loader_of_an_own_generator,
        loader_of_a_sampler,
        loader_of_a_sampler_of_batches,
        loader_of_single_samples,
        loader_that_keeps_its_workers,
    ],
)
def test_a_loader_with_a_state_of_its_own_gives_the_same_order_each_time_and_keeps_its_state(make):
    source = torch.Generator().manual_seed(5)
    loader = make(TensorDataset(*samples(50)), source)
    before = source.get_state()
    given = read(loader)
    assert torch.equal(source.get_state(), before)
    next(iter(loader))
    assert torch.equal(read(loader).x, given.x)
    assert sorted(given.x[:, 0].tolist()) == sorted(samples(50)[0][:, 0].tolist())


def test_a_broken_sample_that_the_sampler_leaves_out_is_not_read():
    class Broken(Items):
        def __getitem__(self, index):
            if index == 0:
                raise OSError("damaged")
            return super().__getitem__(index)

    given = read(DataLoader(Broken(samples(20)), batch_size=8, sampler=range(1, 20)))
    assert_equal(given, tuple(part[1:] for part in samples(20)))


class Lazy(Dataset):
    """Samples in a file that each worker opens for itself."""

    def __init__(self, path, count):
        self.path, self.count, self.file = path, count, None

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        self.file = self.file or self.path.open("rb")
        self.file.seek(4 * index)
        time.sleep(1e-4)  # for another worker to move a place in the file that they share
        return torch.frombuffer(bytearray(self.file.read(4)), dtype=torch.float32), 0, 0


def test_a_file_that_workers_open_for_themselves_is_not_open_before(tmp_path):
    expected = torch.arange(300.0)
    (tmp_path / "data").write_bytes(expected.numpy().tobytes())
    dataset = Lazy(tmp_path / "data", 300)
    given = read(DataLoader(dataset, batch_size=10, num_workers=2))
    assert dataset.file is None
    assert torch.equal(given.x[:, 0], expected)


def test_samples_come_in_the_samplers_order_whichever_worker_is_faster():
    class Slow(Items):
        def __getitem__(self, index):
            time.sleep(0.1 if index < 8 else 0)
            return super().__getitem__(index)

    assert_equal(read(DataLoader(Slow(samples(32)), batch_size=8, num_workers=2, in_order=False)), samples(32))


class Opened(Items):
    """Samples that can be read once a worker has opened them."""

    is_open = False

    def __getitem__(self, index):
        assert self.is_open, "a file that is not open"
        return super().__getitem__(index)

    @staticmethod
    def open(_worker):
        torch.utils.data.get_worker_info().dataset.is_open = True


def test_what_a_worker_opens_at_its_start_is_open():
    loader = DataLoader(Opened(samples(20)), batch_size=8, num_workers=1, worker_init_fn=Opened.open)
    assert_equal(read(loader), samples(20))


def test_samples_may_have_names():
    class Named(Items):
        def __getitem__(self, name):
            return super().__getitem__(int(name[1:]))

    data = samples(20)
    assert_equal(read(DataLoader(Named(data), batch_size=8, sampler=[f"n{index}" for index in range(20)])), data)


def test_a_sampler_that_goes_on_and_on_is_read_for_the_length_of_its_loader():
    class Repeated(BatchSampler):
        def __iter__(self):
            while True:
                yield from super().__iter__()

    data = samples(20)
    assert_equal(read(DataLoader(Items(data), batch_sampler=Repeated(range(20), 8, drop_last=False))), data)


def test_a_sampler_chooses_what_is_read():
    data = samples(20)
    data[0][:, 0] = torch.arange(20)
    given = read(DataLoader(Items(data), batch_size=4, sampler=SubsetRandomSampler([3, 5, 8])))
    assert sorted(given.x[:, 0].tolist()) == [3, 5, 8]


def test_inputs_that_require_gradients_are_detached():
    x, y, b = samples()
    assert not read((x.requires_grad_(), y, b)).x.requires_grad


# data that changes, and data that is refused --------------------------------------------------------------------------


class Flipping(Items):
    """Half of the time a sample is mirrored, by the generator of PyTorch, of numpy or of Python."""

    def __init__(self, data, coin):
        super().__init__(data)
        self.coin = coin

    def __getitem__(self, index):
        x, y, b = super().__getitem__(index)
        return (x.flip(0) if self.coin() else x), y, b


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("count", [1, 3, 100])
def test_random_augmentation_is_seen_and_streamed(seed, count):
    coin = torch.Generator().manual_seed(seed)
    data = Flipping(samples(count), lambda: torch.rand((), generator=coin) < 0.5)
    for wrapped in (data, DataLoader(data)):
        assert read(wrapped).augments


class Unsized(Sampler):
    """Says nothing of its length."""

    def __iter__(self):
        return iter(range(8))


X, Y, B = samples(8)
NAN = X.clone()
NAN[5, 2] = float("nan")
INF = X.clone()
INF[3, 0] = -float("inf")


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        (None, TypeError, "train must be tensors .* got NoneType"),
        (3, TypeError, "train must be tensors .* got int"),
        ({"x": X}, TypeError, "train must be tensors .* got dict"),
        (X, TypeError, "train must be tensors .* got Tensor"),
        ("folder", TypeError, "train must be tensors .* got str"),
        ((X, Y), TypeError, r"train must be three tensors \(x, y, b\), got \(Tensor, Tensor\)"),
        ((X, Y, B, B), TypeError, "train must be three tensors"),
        ([X, Y], TypeError, "train must be three tensors"),
        ((X.numpy(), Y, B), TypeError, r"train must be three tensors \(x, y, b\), got \(ndarray, Tensor, Tensor\)"),
        ((X.long(), Y, B), TypeError, "train: x must be floating point, got torch.int64; convert and normalise"),
        ((X.to(torch.float8_e4m3fn), Y, B), TypeError, "train: x must be floating point, got torch.float8_e4m3fn"),
        ((X, Y.float(), B), TypeError, "train: y must hold integers, got torch.float32"),
        ((X, Y, B.double()), TypeError, "train: b must hold integers, got torch.float64"),
        ((X, Y.bool(), B), TypeError, "train: y must hold integers, got torch.bool"),
        ((X, Y, B.to(torch.complex64)), TypeError, "train: b must hold integers, got torch.complex64"),
        ((X.to_sparse(), Y, B), TypeError, "train: x, y and b must be dense tensors"),
        ((X, Y, B.to("meta")), TypeError, "train: x, y and b must be dense tensors"),
        ((X[:0], Y[:0], B[:0]), ValueError, r"train is empty: x has shape \(0, 6\)"),
        ((X[:, :0], Y, B), ValueError, r"train is empty: x has shape \(8, 0\)"),
        ((X[0, 0], Y, B), ValueError, r"train: x must have shape \(n, ...\), got \(\)"),
        ((X[:, 0], Y, B), ValueError, r"train: x must have shape \(n, ...\), got \(8,\)"),
        ((X[:7], Y, B), ValueError, "train: x, y and b differ in length: 7, 8 and 8"),
        ((X, Y[:6], B), ValueError, "train: x, y and b differ in length: 8, 6 and 8"),
        ((X, Y, B[:1]), ValueError, "train: x, y and b differ in length: 8, 8 and 1"),
        ((X, Y[:, None], B), ValueError, r"train: y must have shape \(n,\), got \(8, 1\)"),
        ((X, Y[0], B), ValueError, r"train: y must have shape \(n,\), got \(\)"),
        ((X, Y, B[..., None]), ValueError, r"train: b must have shape .* got \(8, 1, 1\)"),
        ((X, Y, B[:, :0]), ValueError, r"train: b must have shape .* got \(8, 0\)"),
        ((X, Y, B[0, 0]), ValueError, r"train: b must have shape .* got \(\)"),
        ((X, Y - 1, B), ValueError, "train: y holds negative labels, the lowest is -1"),
        ((X, Y, B - 3), ValueError, "train: b holds negative labels, the lowest is -3"),
        ((X, Y, B + 1), ValueError, "train: b holds label 3, but num_bias_classes is 3"),
        ((NAN, Y, B), ValueError, "train: x holds NaN or inf, first in sample 5"),
        ((INF, Y, B), ValueError, "train: x holds NaN or inf, first in sample 3"),
        (Items((X[:0], Y[:0], B[:0])), ValueError, "train is empty"),
        ([], ValueError, "train is empty"),
        (Stream((X[:0], Y[:0], B[:0])), ValueError, "train is empty"),
        (Items((X, Y, B), lambda index, x, y, b: x), TypeError, "train must yield .* got Tensor"),
        (Items((X, Y, B), lambda index, x, y, b: {"x": x}), TypeError, "train must yield .* got dict"),
        (Items((X, Y, B), lambda index, x, y, b: (x,)), TypeError, "train must yield .* of length 1"),
        (Items((X, Y, B), lambda index, x, y, b: (0, x, y, b, b)), TypeError, "train must yield .* of length 5"),
        (Items((X, Y, B), lambda index, x, y, b: (x, y)), ValueError, r"train yields \(x, y\) without a bias"),
        (Items((X, Y, B), lambda index, x, y, b: (x, (y,))), ValueError, "train yields no bias label"),
        (Items((X, Y, B), lambda index, x, y, b: (x, y, y + 0.5)), TypeError, "train: b must hold integers"),
        (
            Items((X, Y, B), lambda index, x, y, b: (x, "cat", b)),
            TypeError,
            "train: y must be a tensor or numbers, got",
        ),
        (Items((X, Y, B), lambda index, x, y, b: (x[: 6 - index], y, b)), ValueError, "train: samples differ in shape"),
        (DataLoader(Items((X, Y, B)), batch_size=None), ValueError, "train yields single samples .* batch_size"),
        (
            DataLoader(TensorDataset(X, Y, B[:, 0]), batch_size=None),
            ValueError,
            "train yields single samples .* batch_",
        ),
        (DataLoader(Items((X, Y, B)), batch_size=3, drop_last=True), ValueError, "train drops its last samples"),
        (
            DataLoader(Items((X, Y, B)), batch_size=3, drop_last=True, sampler=Unsized()),
            ValueError,
            "train drops its last samples",
        ),
        (DataLoader(Stream((X, Y, B)), batch_size=3, drop_last=True), ValueError, "train drops its last samples"),
        (
            DataLoader(Items((X, Y, B)), batch_sampler=BatchSampler(range(8), 3, drop_last=True)),
            ValueError,
            "train drops its last samples in an incomplete batch; give its DataLoader or BatchSampler drop_last=False",
        ),
        (
            DataLoader(Items((X, Y, B), lambda index, x, y, b: (x[: 3 + index // 4], y, b)), batch_size=4),
            ValueError,
            r"train: samples differ in the shape of x: \(3,\) and \(4,\)",
        ),
        (
            DataLoader(Items((X, Y, B), lambda index, x, y, b: (x, y, b.repeat(1 + index // 4))), batch_size=4),
            ValueError,
            r"train: samples differ in the shape of b: \(1,\) and \(2,\)",
        ),
    ],
)
def test_data_that_is_refused(data, error, message):
    with pytest.raises(error, match=message):
        read(data)


def peak(script: str) -> int:
    """The most memory, in kB, that a script takes, in a process of its own, after its line ``before = taken()``."""
    taken = "import resource\ndef taken(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
    command = [sys.executable, "-c", taken + script + "\nprint(taken() - before)"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_a_dataset_is_read_into_its_place():
    script = """
import torch
from ffw_fast.inputs import as_samples
class Items:
    def __len__(self): return 1000
    def __getitem__(self, index): return torch.full((50_000,), 1.0), 0, 0
before = taken()
as_samples(torch.utils.data.DataLoader(Items(), batch_size=50), "train", 2)
"""
    assert peak(script) < 300_000, "kB, for inputs of 200 MB"


def test_batches_that_differ_in_dtype_layout_or_number_are_joined():
    def collate(items):
        x, y, b = torch.utils.data.default_collate(items)
        return (x.double() if y[0] else x, y, b) if len(y) == 4 else (x.T.contiguous().T, y, b)

    x, y, b = samples(23)
    y[8] = 1
    given = read(DataLoader(Items((x, y, b)), batch_size=4, collate_fn=collate))
    assert given.x.dtype == torch.float64
    assert torch.equal(given.x, x.double())
    twice = DataLoader(Items((x, y, b)), 4, collate_fn=lambda items: torch.utils.data.default_collate(items * 2))
    assert len(read(twice).x) == 46
    half = DataLoader(Items((x, y, b)), 4, collate_fn=lambda items: torch.utils.data.default_collate(items[:2]))
    assert len(read(half).x) == 12


@pytest.mark.parametrize("piece", [1, 100])
def test_the_first_sample_that_is_not_finite_is_named_whichever_piece_it_is_in(monkeypatch, piece):
    monkeypatch.setattr(inputs, "PIECE", piece)
    x = X.clone()
    x[6:, 1] = float("nan")
    with pytest.raises(ValueError, match="train: x holds NaN or inf, first in sample 6"):
        read((x, Y, B))


def test_checks_take_little_memory_beside_the_inputs():
    script = """
import torch
from ffw_fast.inputs import as_samples
x, y = torch.ones(1000, 100_000), torch.zeros(1000, dtype=torch.int64)
before = taken()
as_samples((x, y, y), "train", 2)
"""
    assert peak(script) < 100_000, "kB, beside inputs of 400 MB"


def test_a_loader_that_drops_nothing_may_drop_the_last():
    for data in (Items((X, Y, B)), Stream((X, Y, B))):
        assert_equal(read(DataLoader(data, batch_size=4, drop_last=True)), (X, Y, B))
    assert_equal(read(DataLoader(Items((X, Y, B)), 4, drop_last=True, sampler=Unsized())), (X, Y, B))


# train and val, data and model ---------------------------------------------------------------------------------------


def test_train_and_val_must_agree():
    model, train = network(), samples(10, 2)
    with pytest.raises(ValueError, match="train has 2 biases and val has 1"):
        prepare(model, train, samples(10, 1), SETTINGS)
    x, y, b = samples(10, 2)
    with pytest.raises(ValueError, match=r"samples of train and val differ in shape: \(6,\) and \(5,\)"):
        prepare(model, train, (x[:, :5], y, b), SETTINGS)
    with pytest.raises(ValueError, match="val: y holds negative labels"):
        prepare(model, train, (x, y - 5, b), SETTINGS)


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_inputs_are_widened_to_the_weights_and_never_narrowed(given, weights):
    x, y, b = samples(10)
    train, model = (x.to(given), y, b), network().to(weights)
    if given == torch.float64 and weights == torch.float32:
        with pytest.raises(TypeError, match=r"train: x is torch.float64 and the model's weights are torch.float32"):
            prepare(model, train, samples(10), SETTINGS)
        return
    problem = prepare(model, train, samples(10), SETTINGS)
    assert problem.train.x.dtype == problem.val.x.dtype == weights
    assert torch.equal(problem.train.x, x.to(given).to(weights))
    assert problem.width == 8


def test_dropout_in_training_mode_is_pointed_out_and_the_mode_is_kept():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES)).train()
    settings = Settings(bottleneck="1", num_bias_classes=CLASSES)
    model[0].eval()
    with pytest.warns(UserWarning, match="training mode and has dropout: extraction runs a copy in eval mode"):
        prepare(model, samples(), samples(), settings)
    assert [part.training for part in model.modules()] == [True, False, True, True]


@pytest.mark.filterwarnings("error")
def test_dropout_in_eval_mode_is_not_worth_a_warning():
    model = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.5), nn.Linear(4, CLASSES)).eval()
    prepare(model, samples(), samples(), Settings(bottleneck="1", num_bias_classes=CLASSES))


def mixed():
    model = network()
    model.classifier.double()
    return model


def masked():
    return mask_model(network(), include="fc1")


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), ValueError, "nothing to mask: Sequential has no Conv or Linear layer"),
        (lambda: None, TypeError, r"the model must be a torch\.nn\.Module, got NoneType"),
        (masked, ValueError, "layers 'fc1' are masked already; hand in the dense model"),
        (lambda: network().to("meta"), ValueError, "layer 'fc1' is on the device 'meta', which holds no numbers"),
        (lambda: network().half(), TypeError, "layer 'fc1' is torch.float16, but scores are learned in float32"),
        (lambda: network().bfloat16(), TypeError, "layer 'fc1' is torch.bfloat16, but scores"),
        (mixed, TypeError, "layers 'fc1' and 'classifier' differ in dtype: torch.float32 and torch.float64"),
        (
            lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)),
            ValueError,
            "batch norm '1' keeps no running statistics",
        ),
    ],
)
def test_layers_that_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        check_layers(make())


class Custom(nn.Module):
    """fc1, a bottleneck that does what a function says, and the classifier."""

    def __init__(self, bottleneck=nn.functional.relu, forward=None):
        super().__init__()
        self.fc1, self.relu, self.classifier = nn.Linear(6, 8), Function(bottleneck), nn.Linear(8, CLASSES)
        self.after = forward or (lambda self, features: self.classifier(features))

    def forward(self, x):
        return self.after(self, self.relu(self.fc1(x)))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def reached_twice():
    return nn.Sequential(*([network().fc1, relu := nn.ReLU(), nn.Linear(8, 8), relu, nn.Linear(8, CLASSES)]))


@pytest.mark.parametrize(
    ("model", "bottleneck", "error", "message"),
    [
        (network(), "fc7", ValueError, "unknown bottleneck 'fc7'; the modules of Sequential: fc1, relu, classifier"),
        (network(), "", ValueError, "unknown bottleneck ''"),
        (reached_twice(), "1", ValueError, "bottleneck '1' is reached 2 times in a forward pass"),
        (Custom(forward=lambda self, z: z[:, :3]), "classifier", ValueError, "'classifier' is never reached"),
        (Custom(lambda x: (x, x), lambda self, z: z[0]), "relu", TypeError, "'relu' must give .* got tuple"),
        (Custom(lambda x: x.sum(), lambda self, z: z), "relu", TypeError, r"'relu' must give .* of shape \(\)"),
        (Custom(lambda x: x.sum(1), lambda self, z: z), "relu", TypeError, r"'relu' must give .* of shape \(2,\)"),
        (Custom(lambda x: x.T, lambda self, z: self.classifier(z.T)), "relu", TypeError, r"of shape \(8, 2\)"),
        (Custom(lambda x: x.long(), lambda self, z: z.float()), "relu", TypeError, r"got torch.int64 of shape"),
        (Custom(lambda x: x[:, :0], lambda self, z: z.new_ones(2, 3)), "relu", TypeError, r"of shape \(2, 0\)"),
        (Custom(forward=lambda self, z: [z]), "relu", TypeError, "the model must give logits .* got list"),
        (Custom(forward=lambda self, z: z[:, 0]), "relu", TypeError, r"must give logits .* of shape \(2,\)"),
        (Custom(forward=lambda self, z: z[:1]), "relu", TypeError, r"must give logits .* of shape \(1, 8\)"),
        (Custom(forward=lambda self, z: z[:, :2]), "relu", ValueError, "y holds label 2, but the model has 2 classes"),
        (Custom(forward=lambda self, z: z.relu_()), "relu", ValueError, "'relu' is overwritten by a later layer"),
        (Custom(nn.functional.dropout), "relu", ValueError, "its forward pass is random"),
        (Custom(lambda x: x / 0), "relu", ValueError, "the model gives NaN or inf at bottleneck 'relu'"),
        (nn.Sequential(nn.Linear(5, 3)), "0", ValueError, r"the model fails on samples x of shape \(2, 6\): mat1 and"),
        (Custom(forward=lambda self, z: 1 / 0), "relu", ValueError, "the model fails .* division by zero"),
    ],
)
def test_models_that_do_not_fit(model, bottleneck, error, message):
    state = torch.get_rng_state()
    modes = [part.training for part in model.modules()]
    with pytest.raises(error, match=message):
        check_model(model, bottleneck, (Samples(*samples()),))
    assert torch.equal(torch.get_rng_state(), state)
    assert [part.training for part in model.modules()] == modes
    assert not any(part._forward_hooks for part in model.modules())


def test_a_model_with_overwriting_behind_another_module_fits():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Linear(8, CLASSES))
    assert check_model(model, "1", (Samples(*samples()),)) == 8
    with pytest.raises(ValueError, match="the output of bottleneck '0' is overwritten"):
        check_model(model, "0", (Samples(*samples()),))
