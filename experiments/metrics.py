"""The numbers of a run as it goes: JSON lines and TensorBoard, each step once.

`metrics.jsonl` holds one object a line: `{"step": 100, "loss": 0.25}`, where
`step` counts finished steps. A number that is not finite is written as null.
Times are not written, so that a run taken up again writes the same bytes.
"""

import json
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import tensorboardX
from etils import epath

FILE = 'metrics.jsonl'


class Writer:
  """Writes the metrics of one run; only process 0 does.

  Args:
    workdir: Folder of `metrics.jsonl` and of the TensorBoard events.
    after: Finished steps of the checkpoint that the run goes on from; lines of
      later steps are dropped. None for a run that starts anew: all are.
  """

  def __init__(self, workdir: epath.PathLike, after: int | None):
    self._file = self._board = None
    if jax.process_index() != 0:
      return
    workdir = epath.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    kept = [] if after is None else _rows(workdir / FILE)
    kept = [line for row, line in kept if row['step'] <= after]
    write_atomically(workdir / FILE, ''.join(kept).encode())
    self._file = (workdir / FILE).open('a')
    purge = 0 if after is None else after + 1
    self._board = tensorboardX.SummaryWriter(str(workdir), purge_step=purge)

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Adds one line.

    Args:
      step: Finished steps.
      values: Host numbers or arrays by name. TensorBoard shows an array's mean.
    """
    if self._file is None:
      return
    values = {name: np.asarray(x) for name, x in values.items()}
    row = {'step': step} | {name: _to_json(x) for name, x in values.items()}
    self._file.write(json.dumps(row, allow_nan=False) + '\n')
    for name, x in values.items():
      self._board.add_scalar(name, np.mean(x, dtype=np.float64), step)

  def flush(self) -> None:
    """Hands all lines to the system: no kill of this process loses one."""
    if self._file is not None:
      self._file.flush()
      self._board.flush()

  def close(self) -> None:
    """Flushes and closes the files."""
    if self._file is not None:
      self._file.close()
      self._board.close()


def read(workdir: epath.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Reads the metrics of a run back.

  Args:
    workdir: Folder of `metrics.jsonl`.

  Returns:
    For each name its steps (n,), int, and its values (n, ...), float64.

  Raises:
    FileNotFoundError: If there is no such file.
  """
  path = epath.Path(workdir) / FILE
  if not path.exists():
    raise FileNotFoundError(f'no metrics in {path}.')
  series = {}
  for row, _ in _rows(path):
    step = row.pop('step')
    for name, value in row.items():
      steps, values = series.setdefault(name, ([], []))
      steps.append(step)
      values.append(np.asarray(value, dtype=np.float64))
  return {name: (np.array(s), np.stack(v)) for name, (s, v) in series.items()}


def write_atomically(path: epath.Path, data: bytes) -> None:
  """Writes a file whole or not at all."""
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = path.with_name(f'.{path.name}.draft')
  draft.write_bytes(data)
  draft.replace(path)


def _rows(path: epath.Path) -> list[tuple[dict[str, Any], str]]:
  """The parsed rows and their lines; a half-written last line is no row."""
  if not path.exists():
    return []
  lines = path.read_text().splitlines(keepends=True)
  return [(json.loads(line), line) for line in lines if line.endswith('}\n')]


def _to_json(x: np.ndarray | np.generic) -> Any:
  if x.ndim:
    return [_to_json(entry) for entry in x]
  if np.issubdtype(x.dtype, np.integer) or x.dtype == bool:
    return int(x)
  return float(x) if np.isfinite(x) else None
