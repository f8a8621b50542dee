"""The roofline on paper: sizes by hand, floors below projections, and the tables."""

import json

import pytest
from ffw_fast.benchmarks import jobs, roofline

(BIASED_MNIST,) = jobs.chosen_jobs(["biased"])
(MULTI_COLOR,) = jobs.chosen_jobs(["multi"])


def test_kernels_of_a_layer_by_hand():
    fourth = jobs.all_layers(BIASED_MNIST)[3]  # 64 -> 128 channels, 7x7, on 28x28
    kernels = {kernel.name: kernel for kernel in roofline.layer_kernels(fourth, 100, "tf32", training=True)}
    flops = 2 * 100 * 784 * 128 * 64 * 49
    x, y, v = 4 * 100 * 784 * 64, 4 * 100 * 784 * 128, 4 * 128 * 64 * 49
    for name in ("forward", "gradient of the input", "gradient of the weight"):
        assert kernels[name].flops == flops
        assert kernels[name].bytes == x + y + v
        assert kernels[name].floor == pytest.approx(flops / 156e12)
    assert kernels["non-linearity"].floor == pytest.approx(2 * y / 1.555e12)
    without = [kernel.name for kernel in roofline.layer_kernels(fourth, 100, "tf32", training=False)]
    assert without == ["forward", "non-linearity"]


def test_the_first_layer_has_no_gradient_of_its_input_and_the_last_no_non_linearity():
    first, *_, last = jobs.all_layers(MULTI_COLOR)
    names = [{kernel.name for kernel in roofline.layer_kernels(layer, 100, "fp32", True)} for layer in (first, last)]
    assert "gradient of the input" not in names[0] and "gradient of the input" in names[1]
    assert "non-linearity" in names[0] and "non-linearity" not in names[1]


@pytest.mark.parametrize("job", jobs.JOBS, ids=lambda job: job.name)
def test_a_projection_is_above_its_floor_and_graphs_never_cost(job):
    rows = {precision: roofline.project(job, precision) for precision in roofline.MATRIX_RATES}
    for row in rows.values():
        assert row.floor < row.graph <= row.eager < row.paper
        assert row.graph == pytest.approx(row.gates + row.features + row.heads)
    assert rows["tf32"].floor < rows["fp32"].floor


def test_what_the_documentation_says():
    assert roofline.project(MULTI_COLOR, "tf32").eager < 10
    assert roofline.project(BIASED_MNIST, "bf16").graph < 120 < roofline.project(BIASED_MNIST, "tf32").graph
    assert roofline.project(BIASED_MNIST, "tf32").floor > 90


def test_tables_and_figures(tmp_path, capsys):
    target = tmp_path / "roofline.json"
    roofline.main(["--only", "multi", "--precision", "tf32", "--kernels", "--json", str(target)])
    printed = capsys.readouterr().out
    assert "PROJECTION" in printed and "Assumed:" in printed and "gated_adam_step_" in printed
    written = json.loads(target.read_text())
    assert written["what"] == "projection, not measured"
    assert [row["workload"] for row in written["rows"]] == ["Multi-Color MNIST"]
