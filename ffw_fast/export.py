"""A network as a file that runs without its Python code: a ``torch.export`` program or ONNX, checked after writing."""

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ffw_fast.modes import evaluation_mode
from ffw_fast.modules import masked_layers
from ffw_fast.precision import full_float32

TOLERANCE = 1e-4  # of the largest output; other kernels round differently
INPUT, OUTPUT, BATCH = "input", "logits", "batch"
ONNX_DTYPES = (torch.float16, torch.float32, torch.float64)


def export(model: nn.Module, example: Tensor, path: str | os.PathLike[str], format: str | None = None) -> float:
    """Write a network as a program for batches of any size, and compare what the written file computes.

    Args:
        model: logits of a batch; it is exported in eval mode.
        example: a batch (n, ...) of at least 2 samples, on the model's device.
        path: where to.
        format: "pt2" (``torch.export.load``) or "onnx" (``input`` to ``logits``). Default: the path's ending.

    Returns:
        The largest difference of the file's outputs to the model's, for a batch of another size.

    Raises:
        ImportError: ONNX without the extra ``onnx``.
        ValueError: an unknown format, a batch that is too small, a network with gates, which no file could be read of
            without this package, one that cannot be exported (its code looks at values, or fixes the batch size), or a
            file whose outputs differ; then nothing is left behind.
    """
    path = Path(path)
    format = format or path.suffix.removeprefix(".")
    if format not in WRITERS:
        raise ValueError(f"unknown format {format!r} for {path}; known formats: {', '.join(FORMATS)}")
    if masked := masked_layers(model):
        raise ValueError(f"prune the network first, by apply_masks or to_dense; it has gates at {', '.join(masked)}")
    if len(example) < 2:
        raise ValueError(f"the example needs at least 2 samples to leave the batch size open, got {len(example)}")
    write, run = WRITERS[format]()
    batch = torch.cat([example, example[:1]])
    temporary = path.with_name(f".{path.stem}.writing.{format}")
    try:
        with evaluation_mode(model), torch.no_grad(), _quiet():
            write(model, example, temporary)
            with full_float32():
                expected = model(batch)
                difference = float((run(temporary, batch).to(expected) - expected).abs().max())
        if not difference <= TOLERANCE * float(expected.abs().max()):
            raise ValueError(f"the exported network computes something else: outputs differ by up to {difference:.3g}")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return difference


Write = Callable[[nn.Module, Tensor, Path], None]
Run = Callable[[Path, Tensor], Tensor]


def _program(model: nn.Module, example: Tensor) -> ExportedProgram:
    try:
        return torch.export.export(model, (example,), dynamic_shapes=({0: Dim(BATCH, min=1)},))
    except Exception as error:  # the exporter raises what it likes, with pages of advice
        reason = str(error).strip().splitlines()
        raise ValueError(f"{type(model).__name__} cannot be exported: {reason[0] if reason else error!r}") from error


def _torch_export() -> tuple[Write, Run]:
    def write(model: nn.Module, example: Tensor, path: Path) -> None:
        program = io.BytesIO()  # PyTorch's own writer ends the process where a disk is full
        torch.export.save(_program(model, example), program)
        path.write_bytes(program.getbuffer())

    def run(path: Path, x: Tensor) -> Tensor:
        return torch.export.load(path).module()(x)

    return write, run


def _onnx() -> tuple[Write, Run]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"an export to ONNX needs {error.name}: pip install 'ffw_fast[onnx]'") from error

    def write(model: nn.Module, example: Tensor, path: Path) -> None:
        if example.dtype not in ONNX_DTYPES:
            raise ValueError(f"an export to ONNX needs float16, float32 or float64, got {example.dtype}")
        program: Any = torch.onnx.export(
            _program(model, example), input_names=[INPUT], output_names=[OUTPUT], dynamo=True, verbose=False
        )
        program.save(path, external_data=False)

    def run(path: Path, x: Tensor) -> Tensor:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run([OUTPUT], {INPUT: x.cpu().numpy()})[0])

    return write, run


WRITERS = {"onnx": _onnx, "pt2": _torch_export}
FORMATS = tuple(WRITERS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks about packages that this one does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
