"""What an extraction gives back: masks, pruned networks, and the folder that it is kept in."""

import copy
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from ffw_fast import extraction as files
from ffw_fast import heads, reference
from ffw_fast.extract import extract
from ffw_fast.extraction import Extraction, apply_masks, load_masks, read_history, read_json, write_history
from tests.six_features import CLASSES, arguments, network, samples

WRITTEN = [files.CONFIG, files.METRICS, files.HISTORY, files.SCORES, files.BEST_SCORES, files.MODEL]


def find(model=None, **changes) -> Extraction:
    return extract(model or network(), samples(40, 2, 1), samples(30, 2, 2), **arguments(**changes))


@pytest.fixture(scope="module")
def found():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(heads, "MAX_EPOCHS", 6)
        result = find(max_epochs=4)
    source = torch.Generator().manual_seed(0)  # scores of both signs and zero, other ones as the best
    for scores in (*result.scores.values(), *result.best_scores.values()):
        scores.copy_(torch.randint(-2, 3, scores.shape, generator=source))
    return result


# masks and models ----------------------------------------------------------------------------------------------------


def test_scores_have_the_names_and_shapes_of_the_layers(found):
    shapes = {name: tuple(scores.shape) for name, scores in found.scores.items()}
    assert shapes == {"fc1": (8, 6), "classifier": (CLASSES, 8)}
    assert found.best_scores.keys() == found.scores.keys()
    assert not any(torch.equal(found.scores[name], found.best_scores[name]) for name in found.scores)


@pytest.mark.parametrize("best", [False, True])
def test_the_model_is_the_biased_one_with_zeros(found, best):
    scores, masks = (found.best_scores, found.best_masks) if best else (found.scores, found.masks)
    before = copy.deepcopy(found.dense_model.state_dict())
    model = found.model(best)
    assert type(model) is nn.Sequential
    assert not model.training
    for name, score in scores.items():
        assert torch.equal(masks[name], score >= 0)
        weight = model.get_submodule(name).weight
        assert torch.equal(weight, before[f"{name}.weight"] * (score >= 0))
        assert weight.requires_grad
        assert torch.equal(model.get_submodule(name).bias, before[f"{name}.bias"])
    with torch.no_grad():
        model.fc1.weight.fill_(7)
        model.fc1.bias.fill_(7)
    assert all(torch.equal(value, before[name]) for name, value in found.dense_model.state_dict().items())


def test_pruning_stays_within_the_named_layers():
    """A weight that an embedding shares with a layer is pruned in the layer alone."""
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "layer": nn.Linear(3, 5, bias=False)})
    model["layer"].weight = model["embedding"].weight
    before = model["embedding"].weight.detach().clone()
    apply_masks(model, {"layer": torch.zeros(5, 3, dtype=torch.bool)})
    assert not model["layer"].weight.any()
    assert torch.equal(model["embedding"].weight, before)


def test_metrics_and_history():
    result = find(max_epochs=3)
    assert set(result.metrics) == {"vanilla", "pruned", "best", "epochs", "seconds", "warnings"}
    for name in ("vanilla", "pruned", "best"):
        measured = result.metrics[name]
        assert set(measured) == {"task_accuracy", "bias_accuracy", "bias_mi", "sparsity", "weight_sparsity"}
        assert len(measured["bias_accuracy"]) == len(measured["bias_mi"]) == 2
    assert result.metrics["epochs"] == len(result.history) == 3
    assert [row["epoch"] for row in result.history] == [1, 2, 3]
    x, y, _ = samples(30, 2, 2)
    for best, name in ((False, "pruned"), (True, "best")):
        model = result.model(best)
        assert result.metrics[name]["task_accuracy"] == pytest.approx((model(x).argmax(1) == y).double().mean().item())
        weights = torch.cat([mask.flatten() for mask in (result.best_masks if best else result.masks).values()])
        assert result.metrics[name]["sparsity"] == pytest.approx(1 - weights.double().mean().item())
    assert result.metrics["vanilla"]["sparsity"] == 0


def test_double_precision_finds_what_single_does():
    train, val = ((x.double(), y, b) for x, y, b in (samples(40, 2, 1), samples(30, 2, 2)))
    double = extract(network().double(), train, val, **arguments())
    single = find()
    for name, scores in double.scores.items():
        assert scores.dtype == torch.float64
        torch.testing.assert_close(scores.float(), single.scores[name], rtol=1e-2, atol=1e-5)


# the folder ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(found, tmp_path):
    found.save(tmp_path / "run")
    return tmp_path / "run"


def test_what_is_saved_is_loaded(found, folder):
    assert sorted(path.name for path in folder.iterdir()) == sorted(WRITTEN)
    loaded = Extraction.load(folder, found.dense_model)
    for name in found.scores:
        assert torch.equal(loaded.scores[name], found.scores[name])
        assert torch.equal(loaded.best_scores[name], found.best_scores[name])
    assert loaded.history == found.history
    assert loaded.metrics == found.metrics
    assert loaded.settings == found.settings
    assert loaded.dense_model is found.dense_model
    for name, value in loaded.model(best=True).state_dict().items():
        assert torch.equal(value, found.model(best=True).state_dict()[name])


def test_the_pruned_network_can_be_loaded_without_this_package(found, folder):
    plain = network(seed=9)
    plain.load_state_dict(load_file(folder / files.MODEL))
    x, _, _ = samples(20)
    assert torch.equal(plain(x), found.model()(x))


def test_saving_again_replaces(found, folder):
    again = copy.copy(found)
    again.history, again.metrics = found.history[:1], {**found.metrics, "epochs": 1}
    again.save(folder)
    assert len(Extraction.load(folder, found.dense_model).history) == 1
    assert sorted(path.name for path in folder.iterdir()) == sorted(WRITTEN)


@pytest.mark.parametrize("name", [name for name in WRITTEN if name != files.MODEL])
def test_a_missing_file_is_named(found, folder, name):
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        Extraction.load(folder, found.dense_model)


def renamed():
    model = network()
    model.fc2 = model.fc1
    return nn.Sequential(*model.children())


def wider():
    model = network()
    model.classifier = nn.Linear(8, CLASSES + 1)
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (renamed, r"scores.safetensors and the model differ in their layers: 0, 2, classifier, fc1"),
        (wider, r"the scores of 'classifier' have shape \(3, 8\), expected \(4, 8\)"),
        (lambda: nn.Sequential(nn.ReLU()), "nothing to mask: Sequential has no Conv or Linear layer"),
    ],
)
def test_scores_of_another_model_are_refused(folder, make, message):
    with pytest.raises(ValueError, match=message):
        Extraction.load(folder, make())


@pytest.mark.filterwarnings("error")
def test_a_model_with_other_weights_is_pointed_out(found, folder):
    other = copy.deepcopy(found.dense_model)
    Extraction.load(folder, other)
    with torch.no_grad():
        other.classifier.bias[0] += 1
    with pytest.warns(UserWarning, match=r"not those that the scores were learned on: .*model\.safetensors"):
        Extraction.load(folder, other)
    (folder / files.MODEL).unlink()
    Extraction.load(folder, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: scores.long(), r"the scores of 'fc1' are torch\.int64"),
        (lambda scores: scores.clone().fill_(float("nan")), r"the scores of 'fc1' hold NaN"),
        (lambda scores: scores[:1], r"the scores of 'fc1' have shape \(1, 6\), expected \(8, 6\)"),
    ],
)
def test_scores_that_are_no_scores_are_refused(found, folder, change, message):
    files.save_scores(folder / files.SCORES, {**found.scores, "fc1": change(found.scores["fc1"])})
    with pytest.raises(ValueError, match=message):
        Extraction.load(folder, found.dense_model)


def test_scores_without_a_checksum_are_refused(found, folder):
    save_file(found.scores, folder / files.SCORES)
    with pytest.raises(ValueError, match="it has no checksum"):
        Extraction.load(folder, found.dense_model)


def test_every_changed_bit_of_the_scores_is_found(found, folder):
    path = folder / files.SCORES
    content = path.read_bytes()
    for position in range(8 + int.from_bytes(content[:8], "little"), len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 8
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="do not have the checksum that was written"):
            Extraction.load(folder, found.dense_model)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is damaged"),
        ("[1, 2]", "must hold a JSON object, got list"),
        ("[" * 100_000, "is damaged"),
        ("{}", "does not hold the settings of an extraction"),
        ('{"settings": [1]}', "does not hold the settings of an extraction"),
        ('{"settings": {"bottleneck": "relu"}}', "does not hold the settings .*num_bias_classes"),
        ('{"settings": {"bottleneck": "relu", "num_bias_classes": 3, "colour": 1}}', "does not hold .* 'colour'"),
        ('{"settings": {"bottleneck": "relu", "num_bias_classes": 1}}', "does not hold .* at least 2, got 1"),
    ],
)
def test_bad_settings_on_disk(found, folder, content, message):
    (folder / files.CONFIG).write_text(content)
    with pytest.raises(ValueError, match=rf"config.json.*{message}"):
        Extraction.load(folder, found.dense_model)


@pytest.mark.parametrize(
    "content",
    [
        b"epoch,loss\r\none,2\r\n",
        b"epoch,loss\r\n1,2\r\n2",
        b"epoch\r\n1,2,3\r\n",
        b"epoch\r\n\xff\xfe\r\n",
        b'epoch\r\n"' + b"1" * 200_000,
    ],
)
def test_bad_history_on_disk(found, folder, content):
    (folder / files.HISTORY).write_bytes(content)
    with pytest.raises(ValueError, match=r"history.csv is damaged"):
        Extraction.load(folder, found.dense_model)


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_history_that_lost_its_end(found, folder, keep):
    lines = (folder / files.HISTORY).read_text().splitlines(keepends=True)
    (folder / files.HISTORY).write_text("".join(lines[:keep]))
    with pytest.raises(ValueError, match=rf"history.csv has {max(0, keep - 1)} epochs and metrics.json says 4"):
        Extraction.load(folder, found.dense_model)


def test_metrics_without_a_network(found, folder):
    metrics = files.read_json(folder / files.METRICS)
    del metrics["best"]
    files.write_json(folder / files.METRICS, metrics)
    with pytest.raises(ValueError, match=r"metrics.json is damaged: it lacks best"):
        Extraction.load(folder, found.dense_model)


@pytest.fixture(scope="module")
def intact(found, tmp_path_factory):
    """A folder, and what its files hold while they are whole."""
    folder = tmp_path_factory.mktemp("run")
    found.save(folder)
    return folder, {name: (folder / name).read_bytes() for name in WRITTEN if name != files.MODEL}


@given(st.data())
def test_mutated_files_give_a_value_error_or_an_extraction(found, intact, data):
    folder, contents = intact
    name = data.draw(st.sampled_from(sorted(contents)))
    content = contents[name]
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(start + 30, len(content))) | st.just(len(content)))
    (folder / name).write_bytes(content[:start] + data.draw(st.binary(max_size=30)) + content[end:])
    try:
        loaded = Extraction.load(folder, found.dense_model)
        assert loaded.scores.keys() == found.scores.keys()
        loaded.model()
    except ValueError:
        pass
    finally:
        (folder / name).write_bytes(content)


finite = st.floats(allow_nan=False)
accuracies = st.lists(finite, min_size=1, max_size=3)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"epoch": st.integers(1, 200), "loss": finite, "val_bias_accuracy": accuracies},
            optional={"pruned_task_accuracy": finite, "pruned_bias_accuracy": accuracies},
        ),
        max_size=4,
    )
)
def test_history_survives_the_disk(tmp_path_factory, history):
    path = tmp_path_factory.mktemp("history") / "history.csv"
    write_history(path, history)
    assert read_history(path) == history


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "metrics.json"
    files.write_json(path, {"epochs": 3})
    with pytest.raises(TypeError):
        files.write_json(path, {"model": object()})
    assert read_json(path) == {"epochs": 3}
    assert json.loads(path.read_text()) == {"epochs": 3}


# smaller networks and masks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("best", [False, True])
def test_a_compact_model_computes_the_same(found, best):
    pytest.importorskip("torch_pruning", reason="the extra 'compact' is not installed")
    pruned = copy.deepcopy(found)
    for scores in (pruned.scores, pruned.best_scores):
        scores["fc1"][:3] = -1
    dense, small = pruned.model(best), pruned.model(best, compact=True)
    assert small.fc1.out_features <= 5 < dense.fc1.out_features
    x, _, _ = samples(20)
    torch.testing.assert_close(small(x), dense(x))


def test_the_shape_of_the_input_is_remembered(found, folder):
    assert found.input_shape == (6,)
    loaded = Extraction.load(folder, found.dense_model)
    assert loaded.input_shape == (6,)
    assert loaded.example(3).shape == (3, 6)
    assert torch.equal(loaded.example(), found.example())
    loaded.input_shape = ()
    with pytest.raises(ValueError, match="does not know the shape of its input"):
        loaded.model(compact=True)


def test_the_reference_remembers_the_shape_of_the_input():
    found = reference.extract(network(), samples(40, 2, 1), samples(30, 2, 2), **arguments(max_epochs=1))
    assert found.input_shape == (6,)


@pytest.mark.parametrize("shape", ["6", [0], [2.5], {"height": 3}])
def test_a_bad_shape_on_disk(found, folder, shape):
    config = read_json(folder / files.CONFIG)
    files.write_json(folder / files.CONFIG, {**config, "input_shape": shape})
    with pytest.raises(ValueError, match=r"config.json: input_shape must be a list of positive integers"):
        Extraction.load(folder, found.dense_model)


def test_masks_from_disk_prune_any_copy_of_the_network(found, folder):
    masks = load_masks(folder / files.SCORES)
    assert all(torch.equal(masks[name], mask) for name, mask in found.masks.items())
    by_us, by_torch = network(), network()
    apply_masks(by_us, masks)
    for name, mask in masks.items():
        prune.custom_from_mask(by_torch.get_submodule(name), "weight", mask)
    x, _, _ = samples(20)
    assert torch.equal(by_us(x), by_torch(x))
    assert torch.equal(by_us(x), found.model()(x))


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        ({"fc3": torch.ones(8, 6, dtype=torch.bool)}, "Sequential has no layer 'fc3'"),
        ({"relu": torch.ones(8, dtype=torch.bool)}, "Sequential has no layer 'relu' with a weight"),
        ({"fc1": torch.ones(6, 8, dtype=torch.bool)}, r"mask of 'fc1' has shape \(6, 8\), expected \(8, 6\)"),
        ({"fc1": torch.ones(8, 6)}, r"mask of 'fc1' must be boolean, got torch\.float32"),
        ({"fc1": [True]}, "mask of 'fc1' must be a tensor, got list"),
    ],
)
def test_masks_of_another_network_are_refused(masks, message):
    model = network()
    whole = {"classifier": torch.zeros(CLASSES, 8, dtype=torch.bool)}
    with pytest.raises((ValueError, TypeError), match=message):
        apply_masks(model, whole | masks)
    assert model.classifier.weight.any(), "nothing was pruned"


@pytest.mark.parametrize(
    "computed",
    [
        parametrizations.weight_norm,
        nn.utils.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 2),
    ],
    ids=["parametrized", "by a hook", "pruned by PyTorch"],
)
def test_masks_of_computed_weights_are_refused(computed):
    model = nn.Sequential(nn.Linear(3, 3), computed(nn.Linear(3, 3)))
    masks = {"0": torch.zeros(3, 3, dtype=torch.bool), "1": torch.ones(3, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="the weight of layer '1' is computed"):
        apply_masks(model, masks)
    assert model[0].weight.any(), "nothing was pruned"
    model(torch.randn(2, 3))


def test_masks_that_are_no_scores_are_refused(found, folder, tmp_path):
    with pytest.raises(
        ValueError, match=r"model\.safetensors holds a network's .*, and no scores; those are in scores"
    ):
        load_masks(folder / files.MODEL)
    with pytest.raises(TypeError, match="must map names of layers to tensors, got NoneType"):
        apply_masks(found.model(), None)
    files.save_scores(tmp_path / "masks.safetensors", {"fc1": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"the scores of 'fc1' are torch\.int64"):
        load_masks(tmp_path / "masks.safetensors")
    (tmp_path / "masks.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match="is damaged"):
        load_masks(tmp_path / "masks.safetensors")
